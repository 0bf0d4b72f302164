"""Exponential moving average of the weights, with its clock in images.

After every step `ema += (1 - beta) (weights - ema)` with `beta = 0.5 ** (batch / halflife)`. Early in a run the
half-life is at most `rampup` of the images seen, so that the average forgets the random start
(Karras et al. 2024, arXiv 2312.02696, section 3.1 of the appendix).
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(slots=True, kw_only=True)
class EMAConfig:
    """Half-life in images, and its cap as a share of the images seen so far."""

    halflife: int = 500_000
    rampup: float = 0.05

    def __post_init__(self):
        if self.halflife <= 0 or self.rampup <= 0:
            raise ValueError(
                f"ema.halflife={self.halflife} and ema.rampup={self.rampup} must be positive; choose larger ones"
            )


class EMA:
    """Holds `module`, an averaged copy that is ready to use."""

    def __init__(self, module: nn.Module, config: EMAConfig):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.config = config

    def beta(self, images_seen: int, batch_size: int) -> float:
        """How much of the old average stays after the step that brings the count to `images_seen`."""
        halflife = min(self.config.halflife, images_seen * self.config.rampup)
        return 0.5 ** (batch_size / halflife)

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move the average towards `module`, all tensors at once."""
        torch._foreach_lerp_(
            list(self.module.parameters()),
            list(module.parameters()),
            1.0 - self.beta(images_seen, batch_size),
        )
