"""Where and in what precision to compute when nobody says, and where weights wait that are not in use."""

from enum import Enum

import torch


class Precision(Enum):
    """How a network computes; in training, weights, optimizer and EMA are float32 in every case."""

    auto = "auto"  # bf16 where the accelerator has it, else fp32
    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"  # products of the blocks' linear layers, all else in bf16; in training alone


class Offload(Enum):
    """Where weights wait. Each takes less memory and more time than the one before; no picture changes."""

    none = "none"  # on the device
    component = "component"  # in main memory: text encoders, denoiser and autoencoder take turns on the accelerator
    sequential = "sequential"  # in main memory: each layer comes when it is called
    disk = "disk"  # in a temporary folder: as sequential, for machines whose main memory is the bottleneck


def best_device() -> torch.device:
    """CUDA or ROCm, XPU or MPS where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")  # type: ignore[return-value]


def precision(wanted: Precision, device: torch.device) -> torch.dtype:
    """What products are computed in: bfloat16 where asked for, or where the accelerator is good at it."""
    able = (device.type == "cuda" and torch.cuda.is_bf16_supported()) or device.type == "xpu"
    halved = wanted in (Precision.bf16, Precision.fp8) or (wanted is Precision.auto and able)
    return torch.bfloat16 if halved else torch.float32
