"""Samplers: from noise to a picture, given a function that estimates x0.

All of them walk z = (1-t) x0 + t eps, whatever the objective: `Objective.denoise` answers in that space. The
probability-flow ODE and its step from t to s < t are then

    dz/dt = eps - x0 = (z - x0)/t           z_s = z + (s - t) (z - x0)/t = (1-s) x0 + s eps

which is at once Euler's method for flow models and DDIM (arXiv:2010.02502). No step divides by alpha, so t = 1 is an
ordinary point, and the last step, to s = 0, returns the x0 estimate. Latents are unbounded: nothing is clamped.

A sampler is `(denoise, z, times, callback=None) -> z`: denoise(z, t (b,)) -> x0, times (n+1,) descending, and
callback(step, z, x0) after each step with the x0 estimate that step used. Begin at `Objective.start(noise, times)` for
a new picture, or at (1-t) x0 + t eps to continue from a given one.
"""

import math
from collections.abc import Callable
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor], object]


def euler(denoise: Denoise, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """First order, one evaluation a step; the same map as DDIM with eta = 0."""
    for step, (t, s) in enumerate(_intervals(times)):
        x0 = denoise(z, _fill(t, z))
        z = z + (s - t) * (z - x0) / t
        if callback:
            callback(step, z, x0)
    return z


def heun(denoise: Denoise, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """Second order, two evaluations a step but one in a step to t = 0; EDM's solver (arXiv:2206.00364)."""
    for step, (t, s) in enumerate(_intervals(times)):
        x0 = denoise(z, _fill(t, z))
        slope = (z - x0) / t
        ahead = z + (s - t) * slope
        if s > 0:
            slope = (slope + (ahead - denoise(ahead, _fill(s, z))) / s) / 2
        z = z + (s - t) * slope
        if callback:
            callback(step, z, x0)
    return z


def ddim(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    callback: Callback | None = None,
    *,
    eta: float = 1.0,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """DDIM with fresh noise: eta = 1 is the ancestral sampler of DDPM, eta = 0 is `euler`.

    `noise(step)` gives unit Gaussian noise shaped like z; by default it comes from torch's global generator. With
    q = sigma_edm(s)/sigma_edm(t) the paper's variance is tau^2 = eta^2 sigma^2 (1 - q^2), and the old noise keeps the
    rest, so z_s holds noise of amplitude exactly s for every eta.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta={eta} is outside 0 to 1; choose 0 for deterministic, 1 for ancestral")
    for step, (t, s) in enumerate(_intervals(times)):
        x0 = denoise(z, _fill(t, z))
        eps = (z - (1 - t) * x0) / t
        fresh = eta * math.sqrt(1 - _sigma_ratio(t, s) ** 2)
        if s > 0 and fresh > 0:
            eps = math.sqrt(1 - fresh**2) * eps + fresh * (noise(step) if noise else torch.randn_like(z))
        z = (1 - s) * x0 + s * eps
        if callback:
            callback(step, z, x0)
    return z


class Sampler(Enum):
    """Names of the samplers, for configurations."""

    euler = "euler"
    heun = "heun"
    ddim = "ddim"


SAMPLERS: dict[Sampler, Callable[..., Tensor]] = {Sampler.euler: euler, Sampler.heun: heun, Sampler.ddim: ddim}


def _intervals(times: Tensor) -> list[tuple[float, float]]:
    """Pairs (t, s) to step from and to, as Python floats: the step's arithmetic is in double precision."""
    pairs = list(pairwise(times.tolist()))
    if not pairs or not all(1 >= t > s >= 0 for t, s in pairs):
        raise ValueError(f"times={times.tolist()} do not descend strictly within 1 to 0; use Objective.grid(steps)")
    return pairs


def _fill(t: float, z: Tensor) -> Tensor:
    """One t for each sample, (b,), in float32 at least."""
    return z.new_full((len(z),), t, dtype=torch.promote_types(z.dtype, torch.float32))


def _sigma_ratio(t: float, s: float) -> float:
    """sigma_edm(s)/sigma_edm(t) for s < t, 0 at t = 1."""
    return s * (1 - t) / (t * (1 - s))
