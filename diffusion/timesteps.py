"""Noise times: how training draws them and how samplers walk them.

A law is its inverse CDF, a function of uniform numbers `u` in (0, 1). The caller owns the randomness, so a draw can be
replayed from a seed, or stratified over a batch, without this module knowing.

    table           t = table[floor(n u)]               the discrete times of DDPM, SD and SDXL
    uniform         t = u
    logit_normal    t = sigmoid(m + s Phi^-1(u))        SD3

A grid is a descending sequence of steps + 1 times, float64, ending at 0.
"""

from enum import Enum

import torch
from torch import Tensor

_TINY = 2.0**-24  # logits are clamped here, so the ends of [0, 1] have finite ones


class TimeLaw(Enum):
    """Distributions of the training time, before the shift."""

    table = "table"
    uniform = "uniform"
    logit_normal = "logit_normal"


class Grid(Enum):
    """Spacings of the sampling times."""

    trailing = "trailing"
    uniform = "uniform"


def from_table(u: Tensor, table: Tensor) -> Tensor:
    """Uniform over the entries of `table`, (n,)."""
    index = (u * len(table)).long().clamp(max=len(table) - 1)
    return table[index]


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """logit(t) ~ N(mean, std^2), from Esser et al. (arXiv:2403.03206)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def table_index(t: Tensor, table: Tensor) -> Tensor:
    """Fractional index of times `t` in an ascending `table`, (n,), linear in log sigma_edm between its entries.

    Exact at the entries; times beyond either end get that end's index.
    """
    x, knots = torch.logit(t, eps=_TINY), torch.logit(table, eps=_TINY)  # logit(t) = log sigma_edm
    right = torch.searchsorted(knots, x).clamp(1, len(table) - 1)
    left = right - 1
    fraction = (x - knots[left]) / (knots[right] - knots[left])
    return left + fraction.clamp(0, 1)


def trailing_grid(steps: int, table: Tensor) -> Tensor:
    """Every (n/steps)-th entry of `table` counted back from its last, then 0.

    Starts at the noisiest time trained; a grid that starts below it ("leading") asks the model to treat pure noise as
    slightly noised. Lin et al. (arXiv:2305.08891), section 3.3.
    """
    n = len(table)
    if not 1 <= steps <= n:
        raise ValueError(f"sampler.steps={steps} does not fit a table of {n} times; choose 1 to {n}")
    index = torch.round(n - torch.arange(steps, dtype=torch.float64) * n / steps).long() - 1
    return torch.cat([table[index], table.new_zeros(1)])


def uniform_grid(steps: int, t_max: float = 1.0) -> Tensor:
    """Equal steps from `t_max` to 0."""
    if steps < 1:
        raise ValueError(f"sampler.steps={steps} walks nowhere; choose 1 or more")
    return torch.linspace(t_max, 0, steps + 1, dtype=torch.float64)
