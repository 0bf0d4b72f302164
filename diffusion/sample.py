"""Samplers: from noise to a picture, given a function that estimates x0.

All of them walk z = (1-t) x0 + t eps, whatever the objective: `Objective.denoise` answers in that space. Written with
q = sigma_edm(s)/sigma_edm(t) = exp(-h), h the step in half the log-SNR, a step from t to s < t is

    euler, ddim    z_s = (1-s) x0 + s (sqrt(1-f^2) eps + f n)               f = eta sqrt(1-q^2), eps = (z - (1-t) x0)/t
    dpmpp_2m       z_s = (s/t) q^eta z + (1-s)(1 - q^(1+eta)) D + s sqrt(1 - q^(2 eta)) n
                         D = x0 + (x0 - x0_before)/(2r), r = h_before/h

n is fresh noise. With eta = 0 the first is Euler's method on dz/dt = eps - x0, whatever the path, and with eta = 1 the
ancestral sampler of DDPM; k-diffusion's Euler ancestral is the same map again. No step divides by alpha, so t = 1 is an
ordinary point: there q = 0, which is the first step from infinite sigma, and the step after it is of first order. The
last step, to s = 0, returns the x0 estimate. Latents are unbounded: nothing is clamped.

A sampler is `(denoise, z, times, callback=None) -> z`: denoise(z, t (b,)) -> x0, times (n+1,) descending, and
callback(step, z, x0) after each step with the x0 estimate that step used. Begin at `Objective.start(noise, times)` for
a new picture, or at (1-t) x0 + t eps to continue from a given one.
"""

import math
from collections.abc import Callable
from enum import Enum
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor], object]
Noise = Callable[[int], Tensor]

_MOST = 1000  # steps of the adaptive solver: on a network rougher than its tolerance it would take them for ever
_LAST = 1e-3  # where the adaptive solver hands over to Euler's last step: dz/dt is 0/0 at t = 0


class Sampler(Enum):
    """Names of the samplers, for configurations."""

    euler = "euler"
    heun = "heun"
    heun_edm = "heun_edm"
    ddim = "ddim"
    ddpm = "ddpm"
    euler_ancestral = "euler_ancestral"
    dpmpp_2m = "dpmpp_2m"
    dpmpp_2m_sde = "dpmpp_2m_sde"
    unipc = "unipc"
    ode_euler = "ode_euler"
    dopri5 = "dopri5"


# How much fresh noise the stochastic samplers add when nobody says: 0 none, 1 as much as DDPM.
ETA = {Sampler.ddim: 0.0, Sampler.ddpm: 1.0, Sampler.euler_ancestral: 1.0, Sampler.dpmpp_2m_sde: 1.0}


def check_eta(kind: Sampler, eta: float | None) -> None:
    """Refuse fresh noise that is no share, or that this sampler does not take; None is the sampler's own."""
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta={eta} is outside 0 to 1; choose 0 for deterministic, 1 for ancestral")
    if kind not in ETA and eta:
        able = ", ".join(sampler.name for sampler in ETA)
        raise ValueError(
            f"sampler.eta={eta} adds noise, but sampler.name={kind.name} takes none; give sampler.eta=null, or choose"
            f" one of {able}"
        )


def sample(
    kind: Sampler,
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    callback: Callback | None = None,
    *,
    eta: float | None = None,
    noise: Noise | None = None,
    tolerance: float = 1e-3,
) -> Tensor:
    """Walk `times` with the sampler of that name.

    `eta` (None: see `ETA`) and `noise` are for the stochastic ones, and no others take an eta above 0; `tolerance` is
    for dopri5.
    """
    check_eta(kind, eta)
    fresh = ETA.get(kind, 0.0) if eta is None else eta
    match kind:
        case Sampler.euler:
            return euler(denoise, z, times, callback)
        case Sampler.heun:
            return heun(denoise, z, times, callback)
        case Sampler.heun_edm:
            return heun_edm(denoise, z, times, callback)
        case Sampler.ddim | Sampler.ddpm | Sampler.euler_ancestral:
            return ddim(denoise, z, times, callback, eta=fresh, noise=noise)
        case Sampler.dpmpp_2m | Sampler.dpmpp_2m_sde:
            return dpmpp_2m(denoise, z, times, callback, eta=fresh, noise=noise)
        case Sampler.unipc:
            return unipc(denoise, z, times, callback)
        case Sampler.ode_euler:
            return ode_euler(denoise, z, times, callback)
        case Sampler.dopri5:
            return dopri5(denoise, z, times, callback, tolerance=tolerance)


def euler(denoise: Denoise, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """First order, one evaluation a step; the same map as DDIM with eta = 0."""
    for step, (t, s) in enumerate(_intervals(times)):
        x0 = denoise(z, _fill(t, z))
        z = z + (s - t) * (z - x0) / t
        if callback:
            callback(step, z, x0)
    return z


def heun(denoise: Denoise, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """Second order in t, as flow models are solved; two evaluations a step but one in a step to t = 0."""
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


def heun_edm(denoise: Denoise, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """Heun's method in sigma_edm, EDM's solver (arXiv:2206.00364): the slope of z/(1-t) is eps, and two are averaged.

    Two evaluations a step but one in a step to t = 0, and in one from t = 1, where sigma_edm is infinite.
    """
    for step, (t, s) in enumerate(_intervals(times)):
        x0 = denoise(z, _fill(t, z))
        eps = (z - (1 - t) * x0) / t
        ahead = (1 - s) * x0 + s * eps
        if s > 0 and t < 1:
            eps = (eps + (ahead - (1 - s) * denoise(ahead, _fill(s, z))) / s) / 2
            ahead = (1 - s) / (1 - t) * (z - t * eps) + s * eps
        z = ahead
        if callback:
            callback(step, z, x0)
    return z


def ddim(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    callback: Callback | None = None,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Tensor:
    """DDIM (arXiv:2010.02502): eta = 0 is `euler`, eta = 1 the ancestral sampler of DDPM.

    `noise(step)` gives unit Gaussian noise shaped like z; by default it comes from torch's global generator. The
    paper's variance is tau^2 = eta^2 sigma^2 (1 - q^2), and the old noise keeps the rest, so z_s holds noise of
    amplitude exactly s for every eta.
    """
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


def dpmpp_2m(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    callback: Callback | None = None,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Tensor:
    """DPM-Solver++ 2M (arXiv:2211.01095): second order in the half log-SNR, one evaluation a step.

    eta > 0 is its stochastic form, with fresh noise; eta = 1 the SDE of the paper. The last step, to t = 0, is of first
    order, as h is infinite there.
    """
    before: tuple[Tensor, float] | None = None  # the last x0, and the h of the last step
    for step, (t, s) in enumerate(_intervals(times)):
        x0, q = denoise(z, _fill(t, z)), _sigma_ratio(t, s)
        h = _h(t, s)
        ahead = x0 if before is None or s == 0 else x0 + (x0 - before[0]) * h / (2 * before[1])
        z = (s / t) * q**eta * z + (1 - s) * (1 - q ** (1 + eta)) * ahead
        if s > 0 and eta > 0:
            z = z + s * math.sqrt(1 - q ** (2 * eta)) * (noise(step) if noise else torch.randn_like(z))
        before = x0, h
        if callback:
            callback(step, z, x0)
    return z


class _Step(NamedTuple):
    """What UniPC keeps of a step from t: where it began, the x0 there and the one before, and h_before/h."""

    z: Tensor
    t: float
    x0: Tensor
    older: Tensor  # x0 itself where the step was of first order, which has r = 1
    r: float
    h: float


def unipc(denoise: Denoise, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """UniPC of second order with B(h) = e^h - 1 (arXiv:2302.04867): `dpmpp_2m`, whose every step is corrected.

    One evaluation a step: the estimate made for the next step also corrects where the last one has led to.
    """
    last: _Step | None = None
    for step, (t, s) in enumerate(_intervals(times)):
        x0, h = denoise(z, _fill(t, z)), _h(t, s)
        if last:
            z = _corrected(last, x0, t)
        second = last is not None and s > 0
        older, r = (last.x0, last.h / h) if second and last else (x0, 1.0)
        last = _Step(z, t, x0, older, r, h)
        z = (s / t) * z + (1 - s) * (1 - _sigma_ratio(t, s)) * (x0 + (x0 - older) / (2 * r))
        if callback:
            callback(step, z, x0)
    return z


def _corrected(last: _Step, x0: Tensor, s: float) -> Tensor:
    """UniC: the last step to s again, now that x0 at s is known.

    Of second order, rho solves  rho_1 + rho_2 = b_1,  -r rho_1 + rho_2 = b_2;  of first order rho_2 = 1/2.
    """
    z, t, x0_t, older, r, h = last
    q = _sigma_ratio(t, s)
    if older is x0_t:
        bend = (x0 - x0_t) / 2
    else:
        phi = (1 - q) / h - 1
        b1, b2 = -phi / (1 - q), (2 * phi / h + 1) / (1 - q)
        rho = (b1 - b2) / (1 + r)  # 0 after a step from t = 1, where r is infinite
        bend = rho / r * (x0_t - older) + (b1 - rho) * (x0 - x0_t)
    return (s / t) * z + (1 - s) * (1 - q) * (x0_t + bend)


def ode_euler(denoise: Denoise, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """torchdiffeq's fixed-step Euler on the grid as it stands: on a shifted one, SD3's "alpha-weighted" Euler."""
    for step, (t, s) in enumerate(_intervals(times)):
        z, x0 = _solved(denoise, z, t, s, method="euler")
        if callback:
            callback(step, z, x0)
    return z


def dopri5(
    denoise: Denoise, z: Tensor, times: Tensor, callback: Callback | None = None, *, tolerance: float = 1e-3
) -> Tensor:
    """torchdiffeq's adaptive Runge-Kutta of order 5 from the first time to the last: the grid between only reports.

    `tolerance` is absolute and relative, of the root mean square over the whole batch.
    """
    start, *marks = [t for t, _ in _intervals(times)]
    z = z.to(torch.promote_types(z.dtype, torch.float32))  # whose steps are smaller than bfloat16 can tell
    end = float(times[-1]) or min(_LAST, *marks[-1:], start / 2)
    done = 0

    def report(t: float, z: Tensor, x0: Tensor) -> None:
        nonlocal done
        while callback and done < len(marks) and t <= marks[done]:
            callback(done, z, x0)
            done += 1

    z, x0 = _solved(denoise, z, start, end, method="dopri5", tolerance=tolerance, report=report)
    if times[-1] == 0:
        z = x0 = denoise(z, _fill(end, z))
    report(0.0, z, x0)
    if callback:
        callback(done, z, x0)
    return z


def _solved(
    denoise: Denoise,
    z: Tensor,
    t: float,
    s: float,
    method: str,
    tolerance: float = 1e-3,
    report: Callable[[float, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """z at s and the last x0 estimate, by a method of torchdiffeq on dz/dt = (z - x0)/t."""
    from torchdiffeq import odeint  # slow to import

    x0 = z

    def slope(time: Tensor, z: Tensor) -> Tensor:
        nonlocal x0
        now = float(time)
        x0 = denoise(z, _fill(now, z))
        if report:
            report(now, z, x0)
        return (z - x0) / now

    span = torch.tensor([t, s], dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    options = {"max_num_steps": _MOST} if method == "dopri5" else None
    try:
        path: Any = odeint(slope, z, span, method=method, rtol=tolerance, atol=tolerance, options=options)
        return path[-1], x0
    except AssertionError as error:
        raise ValueError(
            f"sampler.tolerance={tolerance} is finer than the network is smooth ({error}); choose 1e-3"
        ) from error


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
    """q = sigma_edm(s)/sigma_edm(t) for s < t, 0 at t = 1."""
    return s * (1 - t) / (t * (1 - s))


def _h(t: float, s: float) -> float:
    """The step in half the log-SNR, -ln q: infinite from t = 1 and to s = 0."""
    q = _sigma_ratio(t, s)
    return -math.log(q) if q else math.inf
