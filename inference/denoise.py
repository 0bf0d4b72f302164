"""Denoise functions made of others: one after the other, outside of what is painted, and side by side in a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.sample import Denoise


def in_turn(first: Denoise, then: Denoise, t: float) -> Denoise:
    """One denoise function above noise time t, another from there on."""
    return lambda z, now: (first if float(now[0]) > t + 1e-6 else then)(z, now)


def outside(painted: Tensor, known: Tensor, denoise: Denoise) -> Denoise:
    """x0 as given outside of what is painted: z, begun as a noised copy there, then stays one at every time."""
    return lambda z, t: torch.where(painted, denoise(z, t), known)


def side_by_side(parts: Sequence[tuple[list[int], Denoise]]) -> Denoise:
    """Denoise functions of some rows each as one of all."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        x0 = torch.empty_like(z)
        for rows, part in parts:
            x0[rows] = part(z[rows], t[rows])
        return x0

    return denoise
