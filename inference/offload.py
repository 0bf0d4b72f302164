"""Weights that wait outside of the accelerator until they are called: accelerate's hooks on the parts of a pipeline.

    component    one part at a time moves to the accelerator whole        some seconds a picture
    sequential   each layer comes when it is called                       many times slower, least memory
    disk         the same, from files, on any device                      for machines with little main memory

The arithmetic is that of the device in every case, so no picture changes.
"""

import tempfile
from typing import Any

import torch
from torch import nn

from inference.device import Offload


def offload_parts(pipeline: Any, kind: Offload) -> None:
    """Hook the denoiser, the autoencoder and each text encoder of a pipeline; ValueError where it cannot be."""
    try:
        import accelerate
    except ModuleNotFoundError:
        raise ValueError(f"offload={kind.name} needs accelerate; run: pip install accelerate") from None
    device = pipeline.device
    if kind is Offload.component and device.type == "cpu":
        raise ValueError(
            "offload=component moves parts between main memory and an accelerator, and there is none;"
            " choose offload=disk to need less main memory, or offload=none"
        )
    text = pipeline.conditioner.text
    encoders: list[nn.Module] = list(text.encoders) if text else []
    if text:
        text.home = torch.device(device)
    parts = [*encoders, pipeline.denoiser, pipeline.autoencoder.module]
    match kind:
        case Offload.component:
            before = None
            for part in parts:
                _, before = accelerate.cpu_offload_with_hook(part, device, before)
        case Offload.sequential:
            for part in parts:
                accelerate.cpu_offload(part, device)
        case Offload.disk:
            for part in parts:
                folder = tempfile.TemporaryDirectory(prefix="triptych-")
                part.offloaded = folder  # it goes when the part goes
                accelerate.disk_offload(part, folder.name, device)
