"""Options of a step that change its speed and memory, and no result beyond the order of sums.

checkpointing, checkpoint_every    what of a block is kept for the backward pass        same bits
channels_last                      memory order of pictures inside convolutions         float order
compile                            fused kernels, of each block or of the whole         float order
attention                          who computes softmax(q k^T) v                        float order
"""

import shutil
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.layers import Denoiser


class Compile(Enum):
    """What torch.compile is given. Blocks of one kind share their code, so depth costs nothing to compile."""

    none = "none"
    blocks = "blocks"
    whole = "whole"


class Attention(Enum):
    """Who computes attention. With auto torch chooses by shape and device."""

    auto = "auto"
    flash = "flash"
    efficient = "efficient"
    cudnn = "cudnn"
    math = "math"


BACKENDS = {
    Attention.flash: SDPBackend.FLASH_ATTENTION,
    Attention.efficient: SDPBackend.EFFICIENT_ATTENTION,
    Attention.cudnn: SDPBackend.CUDNN_ATTENTION,
    Attention.math: SDPBackend.MATH,
}


def attention_by(wanted: Attention) -> AbstractContextManager:
    """Around a step, backward too: blocks may be computed again there."""
    return nullcontext() if wanted is Attention.auto else sdpa_kernel(BACKENDS[wanted])


def check_attention(wanted: Attention, device: torch.device, dtype: torch.dtype, masked: bool) -> None:
    """Refuse a back-end that this device has not, or not for masks."""
    q = torch.zeros(1, 1, 16, 64, device=device, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, 1, 16, device=device, dtype=torch.bool) if masked else None
    try:
        with attention_by(wanted):
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward()
    except RuntimeError:
        raise ValueError(
            f"train.attention={wanted.value} cannot be had on {device.type} in {str(dtype).removeprefix('torch.')}"
            f"{' with masked text' if masked else ''}; choose auto, which takes the fastest that can"
        ) from None


def check_compiler(wanted: Compile) -> None:
    """Refuse to compile where there is no C++ compiler: kernels, also the accelerator's, are launched from C++."""
    if wanted is not Compile.none and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise ValueError(
            f"train.compile={wanted.value} needs a C++ compiler, and this machine has none on its PATH;"
            " install g++ or choose train.compile=none"
        )


def compile_denoiser(denoiser: Denoiser, wanted: Compile) -> None:
    """Compile in place, at the first step. Names of tensors stay, and copies made before stay as they were."""
    if wanted is Compile.none:
        return
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # a UNet's blocks have more shapes than the 8 allowed
    if wanted is Compile.blocks:
        denoiser.call = torch.compile(denoiser.call)
    else:
        denoiser.compile()


def compile_seconds() -> float:
    """Seconds that this process has spent compiling."""
    from torch._dynamo.utils import calculate_time_spent

    times: dict[str, Any] = calculate_time_spent()
    return times.get("total_wall_time", 0.0)


def channels_last(denoiser: nn.Module) -> None:
    """Store the convolutions' weights so that pictures between them have their channels last in memory."""
    denoiser.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
