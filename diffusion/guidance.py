"""Classifier-free guidance (Ho & Salimans, arXiv:2207.12598) around a denoise function, in x0 space.

    x0 = x_null + w (x_cond - x_null)

Every prediction is an affine function of x0 with coefficients that both branches share, so guiding in x0 space equals
guiding eps, v or flow. Rescaling does not commute with that map, and needs one space:

    x0 <- phi x0 std(x_cond)/std(x0) + (1 - phi) x0         std over each sample (Lin et al., arXiv:2305.08891)

It is x0 here because that is the space whose standard deviation has a meaning, the contrast of the picture, at every
time and for every objective; a rescaled run therefore does not change when the objective does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.schedule import per_sample


def guided(
    denoise: Callable[[Tensor, Tensor, Any], Tensor],
    cond: Any,
    null: Any,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind conditions to `denoise(z, t, cond)`: (z (b, ...), t (b,)) -> x0.

    `scale` 1 is the conditional model alone and 0 the null model alone, one branch each with nothing to rescale or
    confine; any other value runs both branches in one batch. `null` is the empty or the negative prompt. `rescale` is
    phi. Outside `interval`, closed and in noise time, the conditional model is used alone (arXiv:2404.07724).

    The conditions are opaque here. Both describe b samples, and `type(cond).cat([cond, null])` must describe 2b.
    """
    low, high = interval
    if not 0 <= rescale <= 1:
        raise ValueError(f"sampler.rescale={rescale} is outside 0 to 1; choose 0 for none, 0.7 as in the paper")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"sampler.interval={list(interval)} is not an ordered pair of times in 0 to 1; choose [0, 1]")
    if scale in (0, 1):
        only = cond if scale == 1 else null
        return lambda z, t: denoise(z, t, only)
    both = type(cond).cat([cond, null])

    def guided_denoise(z: Tensor, t: Tensor) -> Tensor:
        inside = (low <= t) & (t <= high)
        if not bool(inside.any()):
            return denoise(z, t, cond)
        x_cond, x_null = denoise(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        x0 = x_null + scale * (x_cond - x_null)
        if rescale:
            x0 = x0 * (1 - rescale + rescale * per_sample(_contrast(x_cond, x0), x0))
        return torch.where(inside.reshape(-1, *[1] * (z.ndim - 1)), x0, x_cond)

    return guided_denoise


def _contrast(wanted: Tensor, actual: Tensor) -> Tensor:
    """std(wanted)/std(actual) of each sample, (b,); 1 where `actual` is flat."""
    wanted, actual = wanted.flatten(1).std(1), actual.flatten(1).std(1)
    return torch.where(actual > 0, wanted / actual, torch.ones_like(actual))
