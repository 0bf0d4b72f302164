"""Work of a network, and what of the device's peak a run makes of it.

Model FLOPs are the multiplications and additions of matrix products, convolutions and attention that one trained image
needs, forward and backward, recomputation left out. torch counts them on meta tensors, through autograd: what is frozen
or needs no gradient is not counted. They are a polynomial of second degree in the number of text tokens (attention is
the square, every linear the rest), so three counts give all.

Peaks are dense TFLOP/s as NVIDIA's data sheets of the products give them: bfloat16 with float32 sums, and float32
without TF32. Of any other device the best of some matrix products is taken.
"""

import time
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.base import Cond
from models.lora import inject
from training.step import kept_tokens

PEAKS = {  # part of the device's name: bfloat16, float32; the first that matches
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200": (989, 67),
    "GB200": (2500, 80),
    "B200": (2250, 75),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
}


def flops_per_image(denoiser: nn.Module, latent: tuple[int, ...], cond: Cond) -> int:
    """FLOPs of training on one image, a latent (c, h, w), with a condition of one row; only its shapes are read."""
    config: Any = denoiser.config
    with torch.device("meta"):
        twin = config.build()
        inject(twin, config.lora)
    for mine, theirs in zip(twin.parameters(), denoiser.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    with FlopCounterMode(display=False) as counter:
        frozen = not any(parameter.requires_grad for parameter in twin.parameters())  # but not the text before it
        seen = (
            torch.empty(1, *latent, device="meta", requires_grad=frozen),
            torch.empty(1, device="meta"),
            cond.to("meta"),
        )
        kept = kept_tokens(config, latent, torch.zeros(1, dtype=torch.int64), 0, "meta")
        (twin(*seen) if kept is None else twin(*seen, kept)).sum().backward()
    return counter.get_total_flops()


class Work:
    """FLOPs that a run has asked for since the last read."""

    def __init__(self, denoiser: nn.Module):
        self._denoiser = denoiser
        self._sum = 0.0
        self._counted: dict[tuple[int, ...], list[int]] = {}

    def add(self, x0: Tensor, cond: Cond) -> None:
        """One micro-batch: latents (b, c, h, w) and their condition."""
        self._sum += len(x0) * self.per_image(tuple(x0.shape[1:]), cond)

    def read(self) -> float:
        """The sum, which starts anew."""
        work, self._sum = self._sum, 0.0
        return work

    def per_image(self, latent: tuple[int, ...], cond: Cond) -> float:
        """`flops_per_image`, counted once for each shape of the latent."""
        tokens = 0 if cond.text is None else cond.text.shape[1]
        if latent not in self._counted:
            lengths = (8, 16, 24) if tokens else (0,)
            one = cond.select(slice(0, 1)).to("meta")
            counts = [flops_per_image(self._denoiser, latent, _of_length(one, n)) for n in lengths]
            self._counted[latent] = counts if tokens else 3 * counts
        low, middle, high = self._counted[latent]
        u = tokens / 8 - 1
        return low + u * (middle - low) + u * (u - 1) / 2 * (high - 2 * middle + low)


def _of_length(cond: Cond, tokens: int) -> Cond:
    """The same condition with that many text tokens, and no mask: what is padding is computed all the same."""
    if cond.text is None:
        return cond
    return replace(cond, text=cond.text.new_empty(1, tokens, cond.text.shape[2]), text_mask=None)


@lru_cache(maxsize=8)
def peak_tflops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Most TFLOP/s that the device can do, and where the figure is from: the data sheet, or measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, (bf16, fp32) in PEAKS.items():
        if part in name:
            return (bf16 if dtype is torch.bfloat16 else fp32), "data sheet"
    return measured_tflops(device, dtype), "measured"


def measured_tflops(device: torch.device, dtype: torch.dtype, budget: float = 0.2) -> float:
    """Best TFLOP/s of square matrix products within `budget` seconds."""
    side = 1024 if device.type == "cpu" else 4096
    a = torch.full((side, side), 0.5, device=device, dtype=dtype)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < budget:
        before = time.perf_counter()
        float((a @ a)[0, 0])  # the number itself: it cannot be there before the product
        best = min(best, time.perf_counter() - before)
    return 2 * side**3 / best / 1e12
