"""Noise times: how training draws them and how samplers walk them.

A law is its inverse CDF, a rising function of uniform numbers `u` in (0, 1). The caller owns the randomness, so a draw
can be replayed from a seed, or stratified over a batch, without this module knowing.

    table           t = table[floor(n u)]                    the discrete times of DDPM, SD and SDXL
    uniform         t = u
    logit_normal    t = sigmoid(m + s Phi^-1(u))             SD3's best; also EDM's ln sigma_edm ~ N(m, s^2)
    mode            t = u + s (u - sin^2(pi u/2))            SD3: denser in the middle for s > 0, at the ends for s < 0
    cosmap          t = sin/(sin + cos), both of pi u/2      SD3: the angle atan(sigma_edm) is uniform

A grid is a descending sequence of steps + 1 times, float64, ending at 0. Those named trailing, leading and linspace
pick entries of a table; karras and exponential are ramps between two noise levels.
"""

import math
from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

_TINY = 2.0**-24  # logits are clamped here, so the ends of [0, 1] have finite ones


class TimeLaw(Enum):
    """Distributions of the training time, before the shift."""

    table = "table"
    uniform = "uniform"
    logit_normal = "logit_normal"
    mode = "mode"
    cosmap = "cosmap"


class Grid(Enum):
    """Spacings of the sampling times."""

    uniform = "uniform"
    trailing = "trailing"
    leading = "leading"
    linspace = "linspace"
    karras = "karras"
    exponential = "exponential"


def from_table(u: Tensor, table: Tensor) -> Tensor:
    """Uniform over the entries of `table`, (n,)."""
    index = (u * len(table)).long().clamp(max=len(table) - 1)
    return table[index]


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """logit(t) ~ N(mean, std^2), from Esser et al. (arXiv:2403.03206)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # the law rises between these


def mode(u: Tensor, scale: float = 1.29) -> Tensor:
    """Density heaped up at 1/2, from Esser et al. (arXiv:2403.03206); their f_mode falls: this is f_mode(1-u)."""
    return u + scale * (u - torch.sin(math.pi / 2 * u) ** 2)


def cosmap(u: Tensor) -> Tensor:
    """Density 2/(pi (1 - 2t + 2t^2)), from Esser et al. (arXiv:2403.03206): the log-SNR of a cosine schedule."""
    angle = math.pi / 2 * u
    return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))


def stratified(u: Tensor, positions: Tensor, batch_size: int) -> Tensor:
    """One number in each of `batch_size` equal shares of (0, 1), u and positions (b,): ((p mod B) + u)/B.

    Each batch of consecutive positions then covers the whole law evenly, whoever computes which part of it.
    """
    return (positions % batch_size + u) / batch_size


def share(law: Callable[[Tensor], Tensor], low: float, high: float) -> tuple[float, float]:
    """The (first, last) u between which a rising `law` stays within [low, high]; first > last where it never does.

    Found by bisection on the host, from a law on float64 tensors of no dimension.
    """

    def crossing(holds: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The last u at which a condition fails that holds from somewhere on, and the first at which it holds."""
        fails, does = torch.tensor([0.0, 1.0], dtype=torch.float64)
        if holds(fails):
            return -1.0, 0.0
        if not holds(does):
            return 1.0, 2.0
        for _ in range(60):
            middle = (fails + does) / 2
            fails, does = (fails, middle) if holds(middle) else (middle, does)
        return float(fails), float(does)

    return crossing(lambda u: law(u) >= low)[1], crossing(lambda u: law(u) > high)[0]


def table_index(t: Tensor, table: Tensor) -> Tensor:
    """Fractional index of times `t` in an ascending `table`, (n,), linear in log sigma_edm between its entries.

    Exact at the entries; times beyond either end get that end's index.
    """
    x, knots = torch.logit(t, eps=_TINY), torch.logit(table, eps=_TINY)  # logit(t) = log sigma_edm
    right = torch.searchsorted(knots, x).clamp(1, len(table) - 1)
    left = right - 1
    fraction = (x - knots[left]) / (knots[right] - knots[left])
    return left + fraction.clamp(0, 1)


def table_grid(kind: Grid, steps: int, table: Tensor) -> Tensor:
    """Entries of an ascending `table`, (n,), from noisy to clean, then 0; spacings as in Lin et al. (arXiv:2305.08891).

    trailing: every (n/steps)-th entry counted back from the last. linspace: from the last to the first, whole indices.
    leading: every floor(n/steps)-th counted from the second (SD's steps_offset=1), so that it starts below the
    noisiest time and asks the model to treat pure noise as slightly noised; here to repeat what others did.
    """
    n = len(table)
    most = n - 1 if kind is Grid.leading else n
    if not 1 <= steps <= most:
        raise ValueError(f"sampler.steps={steps} does not fit a table of {n} times; choose 1 to {most}")
    count = torch.arange(steps, dtype=torch.float64)
    match kind:
        case Grid.trailing:
            index = torch.round(n - count * n / steps) - 1
        case Grid.linspace:
            index = torch.round(count * ((n - 1) / (steps - 1))).flip(0) if steps > 1 else count + n - 1
        case Grid.leading:
            index = count.flip(0) * (n // steps) + 1
        case _:
            raise AssertionError(kind)
    return torch.cat([table[index.long()], table.new_zeros(1)])


def uniform_grid(steps: int, t_max: float = 1.0) -> Tensor:
    """Equal steps from `t_max` to 0."""
    if steps < 1:
        raise ValueError(f"sampler.steps={steps} walks nowhere; choose 1 or more")
    return torch.linspace(t_max, 0, steps + 1, dtype=torch.float64)


def ramp(kind: Grid, n: int, high: float, low: float, rho: float = 7.0) -> Tensor:
    """(n,) descending from `high` to `low`, both included: equal steps in x^(1/rho) (karras) or ln x (exponential).

    Karras et al. (arXiv:2206.00364), equation 5.
    """
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    if kind is Grid.exponential:
        return torch.exp(math.log(high) + x * (math.log(low) - math.log(high)))
    return (high ** (1 / rho) + x * (low ** (1 / rho) - high ** (1 / rho))) ** rho
