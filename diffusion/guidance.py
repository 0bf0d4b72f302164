"""Classifier-free guidance (Ho & Salimans, arXiv:2207.12598) around a denoise function, in x0 space.

    x0 = x_null + w sum_i a_i (x_i - x_null) - n (x_negative - x_null)

x_i are the positive prompts, most often one with a_1 = 1, else those that are composed (Liu et al., arXiv:2206.01714).
A negative prompt is a branch of its own with the scale n, or it stands in for the null condition and has no other. So
w = 1 is the conditional model alone and w = 0 the unconditional one.

The coefficients of all branches sum to 1, and one whose coefficient is 0 is not run. Every prediction is an affine
function of x0 with coefficients that all branches share, so guiding in x0 space equals guiding eps, v or flow.
Rescaling does not commute with that map, and needs one space:

    x0 <- phi x0 std(x_plain)/std(x0) + (1 - phi) x0        std over each sample (Lin et al., arXiv:2305.08891)

x_plain is the positive prompts without guidance, w = 1 and n = 0. The space is x0 here because its standard deviation
has a meaning, the contrast of the picture, at every time and for every objective; a rescaled run therefore does not
change when the objective does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.schedule import per_sample

Weight = Tensor | float


def guided(
    denoise: Callable[[Tensor, Tensor, Any], Tensor],
    positive: Sequence[tuple[Any, Weight]],
    null: Any,
    scale: float,
    *,
    negative: tuple[Any, float] | None = None,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    together: bool = True,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind conditions to `denoise(z, t, cond)`: (z (b, ...), t (b,)) -> x0.

    `positive` are conditions and their weights a_i, numbers or (b,); `negative` is a condition and its scale n.
    `rescale` is phi. Outside `interval`, closed and in noise time, x_plain is used (arXiv:2404.07724). The branches
    run in one batch, or one after the other, which takes longer and less memory: where not `together`, and from the
    first time that the device has no room for the batch.

    The conditions are opaque here. Each describes b samples, and `type(cond).cat(conds)` must describe all of them.
    """
    low, high = interval
    if not 0 <= rescale <= 1:
        raise ValueError(f"sampler.rescale={rescale} is outside 0 to 1; choose 0 for none, 0.7 as in the paper")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"sampler.interval={list(interval)} is not an ordered pair of times in 0 to 1; choose [0, 1]")
    conds = [cond for cond, _ in positive] + [null] + ([negative[0]] if negative else [])
    pushed = [-negative[1]] if negative else []
    weights = [weight for _, weight in positive]
    strong = _complete([scale * weight for weight in weights], pushed)
    plain = _complete(weights, [0.0] * len(pushed)) if scale else strong  # 0 is the unconditional model at all times
    guiding, neutral = ({i for i, weight in enumerate(used) if _acts(weight)} for used in (strong, plain))  # read once

    def run(z: Tensor, t: Tensor, branches: list[int]) -> dict[int, Tensor]:
        nonlocal together
        if together and len(branches) > 1:
            try:
                n, cond = len(branches), type(null).cat([conds[i] for i in branches])
                parts = denoise(torch.cat([z] * n), torch.cat([t] * n), cond).chunk(n)
                return dict(zip(branches, parts, strict=True))
            except torch.OutOfMemoryError:
                together = False
        return {i: denoise(z, t, conds[i]) for i in branches}

    def guided_denoise(z: Tensor, t: Tensor) -> Tensor:
        inside = (low <= t) & (t <= high)
        some, every = bool(inside.any()), bool(inside.all())
        wanted = (guiding if some else set()) | (neutral if not every or rescale > 0 else set())
        x = run(z, t, sorted(wanted))
        if not some:
            return _mix(plain, x)
        x0 = _mix(strong, x)
        if rescale:
            x0 = x0 * (1 - rescale + rescale * per_sample(_contrast(_mix(plain, x), x0), x0))
        return x0 if every else torch.where(per_sample(inside, x0) > 0, x0, _mix(plain, x))

    return guided_denoise


def _complete(positive: Sequence[Weight], negative: Sequence[Weight]) -> list[Weight]:
    """Coefficients of all branches, that of null between the others, so that they sum to 1."""
    return [*positive, 1 - sum([*positive, *negative]), *negative]


def _acts(weight: Weight) -> bool:
    return bool((weight != 0).any()) if isinstance(weight, Tensor) else weight != 0


def _mix(weights: list[Weight], x: dict[int, Tensor]) -> Tensor:
    """The sum of the branches, each times its coefficient; one that has 1 alone is returned as it is."""
    terms = []
    for i, part in x.items():
        weight = weights[i]
        if isinstance(weight, Tensor):
            terms.append(per_sample(weight.to(part.device), part) * part)
        elif weight:
            terms.append(part if weight == 1 else weight * part)
    return sum(terms[1:], start=terms[0])


def _contrast(wanted: Tensor, actual: Tensor) -> Tensor:
    """std(wanted)/std(actual) of each sample, (b,); 1 where `actual` is flat."""
    wanted, actual = wanted.flatten(1).std(1), actual.flatten(1).std(1)
    return torch.where(actual > 0, wanted / actual, torch.ones_like(actual))
