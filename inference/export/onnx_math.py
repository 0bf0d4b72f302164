"""What draws pictures, in numpy: the mathematics of `diffusion/` for machines without torch.

    noise       torch's own numbers for a seed                  torch.Generator().manual_seed(seed), torch.randn
    Objective   grids of times, and x0 of a prediction          diffusion/objective.py, schedule.py, timesteps.py
    guided      classifier-free guidance in x0 space            diffusion/guidance.py
    sample      samplers on z = (1-t) x0 + t eps                diffusion/sample.py

Formulas, names and reasons are those of the modules on the right, and a test compares the two for every objective.
Only what is used in drawing from noise is here. Tables of betas come from the export as the times they amount to. What
a network is told (t, alpha, sigma) is computed in float32 and the times of a grid in float64, as there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray
Denoise = Callable[[Array, float], Array]

_TINY = 2.0**-24
_BLOCK = 16  # numbers that torch makes together


# --- noise -------------------------------------------------------------------------------------------------


class Noise:
    """Unit Gaussian noise as `torch.randn` draws it from a CPU generator with this seed, one call after the other.

    Both libraries have the Mersenne Twister, whose low 24 bits are torch's uniform numbers u. Of a block of 16, the
    first eight are radii and the last eight angles of Box and Muller; a rest shorter than a block is filled by drawing
    the last 16 again. The same within rounding: 3e-7.
    """

    def __init__(self, seed: int):
        self._bits = np.random.RandomState(seed % 2**32)

    def normal(self, shape: Sequence[int]) -> Array:
        """(*shape,) float32, of 16 numbers at least: fewer are drawn otherwise in torch."""
        count = math.prod(shape)
        assert count >= _BLOCK
        z = np.empty(count, np.float32)
        z[: count // _BLOCK * _BLOCK] = _box_muller(self._uniform(count)[: count // _BLOCK * _BLOCK])
        if count % _BLOCK:
            z[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return z.reshape(shape)

    def _uniform(self, count: int) -> Array:
        return self._bits.randint(2**24, size=count, dtype=np.uint32).astype(np.float32) * np.float32(_TINY)


def _box_muller(u: Array) -> Array:
    first, second = u.reshape(-1, 2, _BLOCK // 2).swapaxes(0, 1)
    radius, angle = np.sqrt(-2 * np.log(1 - first)), np.float32(2 * np.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()


# --- objectives --------------------------------------------------------------------------------------------


def alpha_sigma(path: str, t: Any) -> tuple[Any, Any]:
    """Signal and noise amplitudes at times t."""
    norm = ((1 - t) ** 2 + t**2) ** 0.5 if path == "vp" else 1
    return (1 - t) / norm, t / norm


def shift(t: Any, factor: float) -> Any:
    """Multiply sigma_edm by `factor`."""
    return factor * t / ((1 - t) + factor * t)


class Objective:
    """What a network predicts, and the times it was trained at.

    `config` is an ObjectiveConfig in plain words; `table` are the times of its betas, cut at sigma_max, ascending, and
    `ends` the first and the last of them without a zero terminal.
    """

    def __init__(self, config: Mapping[str, Any], table: Sequence[float], ends: Sequence[float]):
        self.config, self.table, self.ends = config, np.array(table), np.array(ends)
        most = config["sigma_max"]
        self._cut = 1.0 if most is None else most / (1 + most)

    def denoise(self, network: Callable[[Array, np.float32, Any], Array]) -> Callable[[Array, np.float32, Any], Array]:
        """The x0 estimate (z, t, cond) -> x0 of a network (x_t, its time, cond) -> prediction."""

        def x0_of(z: Array, t: np.float32, cond: Any) -> Array:
            alpha, sigma = alpha_sigma(self.config["path"], t)
            x_t = (alpha + sigma) * z
            c, d = self._coefficients(t)
            if (det := alpha * d - sigma * c) == 0:
                raise ValueError(
                    f"prediction={self.config['prediction']} cannot be inverted at t={float(t):g}; use a grid that"
                    " avoids it"
                )
            return (d * x_t - sigma * network(x_t, self.network_time(t), cond)) / det

        return x0_of

    def _coefficients(self, t: np.float32) -> tuple[Any, Any]:
        """(c, d) of target = c x0 + d eps; flow is known on the straight path alone."""
        alpha, sigma = alpha_sigma(self.config["path"], t)
        return {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-sigma, alpha), "flow": (-1.0, 1.0)}[
            self.config["prediction"]
        ]

    def network_time(self, t: np.float32) -> np.float32:
        """What the network is told of t."""
        match self.config["network_time"]:
            case "index":
                return np.float32(_table_index(t, self.table.astype(np.float32)) / len(self.table))
            case "whole":
                return np.float32(np.floor(1000 * t + 1e-3) / 1000)
        return t

    def start(self, noise: Array, times: Array) -> Array:
        """The z at times[0] that shows the network this noise."""
        return noise / float(sum(alpha_sigma(self.config["path"], times[0])))

    def shift_at(self, cells: int) -> float:
        """The factor on sigma_edm for a latent of so many cells."""
        config = self.config
        match config["shift_law"]:
            case "sqrt":
                return config["shift"] * math.sqrt(cells / config["shift_cells"])
            case "exponential":  # FLUX's mu: 0.5 at 256 tokens of 4 cells, 1.15 at 4096
                return config["shift"] * math.exp(0.5 + (1.15 - 0.5) * (cells / 4 - 256) / (4096 - 256))
        return config["shift"]

    def grid(self, steps: int, kind: str | None, cells: int, rho: float = 7.0, ramp_max: float | None = None) -> Array:
        """(steps + 1,) descending float64 times to 0; kind None is the one that the objective was trained for."""
        if steps < 1:
            raise ValueError(f"sampler.steps={steps} walks nowhere; choose 1 or more")
        from_table = self.config["times"] == "table"
        factor, kind = self.shift_at(cells), kind or ("trailing" if from_table else "uniform")
        match kind:
            case "uniform":
                top = self._top(factor)
                times = shift(np.linspace(shift(top, 1 / factor), 0, steps + 1), factor)
                times[0] = top
                return times
            case "karras" | "exponential":
                return self._ramp(kind, steps, factor, rho, ramp_max)
            case "trailing" | "leading" | "linspace" if from_table:
                return _table_grid(kind, steps, self._trained(factor))
        raise ValueError(
            f"sampler.grid={kind} is none of this objective's, with times={self.config['times']}; choose one of"
            f" {'trailing, leading, linspace, ' if from_table else ''}uniform, karras, exponential"
        )

    def _top(self, factor: float) -> float:
        if self.config["times"] == "table":
            return float(self._trained(factor)[-1])
        most = 0.999 if self.config["network_time"] == "whole" else 1.0
        return min(shift(most, factor), self._cut, self.config["range"][1])

    def _trained(self, factor: float) -> Array:
        times = np.unique(np.minimum(shift(self.table, factor), self._cut))
        return times[times <= self.config["range"][1]]

    def _ramp(self, kind: str, steps: int, factor: float, rho: float, ramp_max: float | None) -> Array:
        top, linear = self._top(factor), self.config["path"] == "linear"
        low, high = shift(np.array([0.001, 1.0]) if linear else self.ends, factor).tolist()
        start = min(top, high if ramp_max is None else ramp_max / (1 + ramp_max))
        before = [top] if top - start > 1e-9 else []
        if steps - len(before) > 1 and not low < start:
            raise ValueError(
                f"a {kind} grid falls to t={low:.3g}, but would start at t={start:.3g}; choose a larger"
                " sampler.ramp_max or another sampler.grid"
            )
        if linear:
            times = _descent(kind, steps - len(before), start, low, rho)
        else:
            sigmas = _descent(kind, steps - len(before), start / (1 - start), low / (1 - low), rho)
            times = sigmas / (1 + sigmas)
        times = np.concatenate([before, times, [0.0]])
        times[0] = top
        return times


def _table_index(t: np.float32, table: Array) -> np.float32:
    """Fractional index of t in an ascending table, linear in log sigma_edm between its entries."""
    x, knots = _logit(t), _logit(table)
    right = int(np.clip(np.searchsorted(knots, x), 1, len(table) - 1))
    left = right - 1
    return left + np.clip((x - knots[left]) / (knots[right] - knots[left]), 0, 1)


def _logit(t: Any) -> Any:
    t = np.clip(t, _TINY, 1 - _TINY)
    return np.log(t / (1 - t))


def _table_grid(kind: str, steps: int, table: Array) -> Array:
    """Entries of an ascending table, from noisy to clean, then 0."""
    n = len(table)
    most = n - 1 if kind == "leading" else n
    if steps > most:
        raise ValueError(f"sampler.steps={steps} does not fit a table of {n} times; choose 1 to {most}")
    count = np.arange(steps)
    match kind:
        case "trailing":
            index = np.round(n - count * n / steps) - 1
        case "linspace":
            index = np.round(count * ((n - 1) / (steps - 1)))[::-1] if steps > 1 else count + n - 1
        case _:
            index = count[::-1] * (n // steps) + 1
    return np.append(table[index.astype(int)], 0.0)


def _descent(kind: str, n: int, high: float, low: float, rho: float) -> Array:
    """(n,) from high to low in equal steps of x^(1/rho) or of ln x."""
    x = np.linspace(0, 1, n)
    if kind == "exponential":
        return np.exp(math.log(high) + x * (math.log(low) - math.log(high)))
    return (high ** (1 / rho) + x * (low ** (1 / rho) - high ** (1 / rho))) ** rho


# --- guidance ----------------------------------------------------------------------------------------------


def guided(
    denoise: Callable[[Array, np.float32, Any], Array],
    join: Callable[[list[Any]], Any],
    positive: Sequence[tuple[Any, Array]],
    null: Any,
    scale: float,
    *,
    negative: tuple[Any, float] | None = None,
    rescale: float = 0.0,
    interval: Sequence[float] = (0.0, 1.0),
) -> Callable[[Array, np.float32], Array]:
    """x0 = x_null + w sum_i a_i (x_i - x_null) - n (x_negative - x_null), all branches in one batch.

    `join` makes one condition of several; the weights a_i of `positive` are (b,).
    """
    low, high = interval
    if not 0 <= rescale <= 1:
        raise ValueError(f"sampler.rescale={rescale} is outside 0 to 1; choose 0 for none, 0.7 as in the paper")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"sampler.interval={list(interval)} is not an ordered pair of times in 0 to 1; choose [0, 1]")
    conds = [cond for cond, _ in positive] + [null] + ([negative[0]] if negative else [])
    weights, pushed = [weight for _, weight in positive], [-negative[1]] if negative else []
    strong = _complete([scale * weight for weight in weights], pushed)
    plain = _complete(weights, [0.0] * len(pushed)) if scale else strong

    def guided_denoise(z: Array, t: np.float32) -> Array:
        inside = low <= t <= high
        wanted = [strong] if inside else []
        wanted += [plain] if rescale > 0 or not inside else []
        used = [i for i in range(len(conds)) if any(np.any(mix[i]) for mix in wanted)]
        joined = denoise(np.concatenate([z] * len(used)), t, join([conds[i] for i in used]))
        x = dict(zip(used, np.split(joined, len(used)), strict=True))
        x0 = _mix(wanted[0], x)
        if rescale > 0 and inside:
            x0 = x0 * (1 - rescale + rescale * _contrast(_mix(plain, x), x0))
        return x0

    return guided_denoise


def _complete(positive: list[Array], negative: list[float]) -> list[Any]:
    """Coefficients of all branches, that of null between the others, so that they sum to 1."""
    return [*positive, 1 - sum([*positive, *negative]), *negative]


def _mix(weights: list[Any], x: dict[int, Array]) -> Array:
    parts = [np.float32(weights[i]).reshape(-1, 1, 1, 1) * part for i, part in x.items()]
    return sum(parts[1:], start=parts[0])


def _contrast(wanted: Array, actual: Array) -> Array:
    """std(wanted)/std(actual) of each sample, 1 where `actual` is flat."""
    wanted, actual = (x.std((1, 2, 3), keepdims=True, ddof=1) for x in (wanted, actual))
    return np.where(actual > 0, wanted / np.where(actual > 0, actual, 1), 1)


# --- samplers ----------------------------------------------------------------------------------------------

# How much fresh noise is added when nobody says; None: such a sampler takes none.
SAMPLERS = {"euler": None, "heun": None, "ddim": 0.0, "ddpm": 1.0, "euler_ancestral": 1.0}
SAMPLERS |= {"dpmpp_2m": None, "dpmpp_2m_sde": 1.0}


def sample(
    name: str, denoise: Denoise, z: Array, times: Array, *, eta: float | None, noise: Callable[[], Array]
) -> Array:
    """Walk `times` from z with the sampler of that name; `noise()` gives unit Gaussian noise shaped like z."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler.name={name} is not among those that run without torch: {', '.join(SAMPLERS)}")
    if SAMPLERS[name] is None and eta:
        able = ", ".join(other for other, fresh in SAMPLERS.items() if fresh is not None)
        raise ValueError(f"sampler.eta={eta} adds noise, but sampler.name={name} takes none; choose one of {able}")
    eta = SAMPLERS[name] if eta is None else eta
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta={eta} is outside 0 to 1; choose 0 for deterministic, 1 for ancestral")
    if name == "heun":
        return heun(denoise, z, times)
    return (dpmpp_2m if name.startswith("dpmpp") else ddim)(denoise, z, times, eta or 0.0, noise)


def heun(denoise: Denoise, z: Array, times: Array) -> Array:
    """Second order in t; two evaluations a step but one in the last."""
    for t, s in pairwise(times.tolist()):
        slope = (z - denoise(z, t)) / t
        if s > 0:
            ahead = z + (s - t) * slope
            slope = (slope + (ahead - denoise(ahead, s)) / s) / 2
        z = z + (s - t) * slope
    return z


def ddim(denoise: Denoise, z: Array, times: Array, eta: float, noise: Callable[[], Array]) -> Array:
    """DDIM; eta = 0 is Euler's method on the straight path, eta = 1 DDPM's ancestral sampler."""
    for t, s in pairwise(times.tolist()):
        x0 = denoise(z, t)
        eps = (z - (1 - t) * x0) / t
        fresh = eta * math.sqrt(1 - _sigma_ratio(t, s) ** 2)
        if s > 0 and fresh > 0:
            eps = math.sqrt(1 - fresh**2) * eps + fresh * noise()
        z = (1 - s) * x0 + s * eps
    return z


def dpmpp_2m(denoise: Denoise, z: Array, times: Array, eta: float, noise: Callable[[], Array]) -> Array:
    """DPM-Solver++ 2M, second order in the half log-SNR; eta > 0 its stochastic form."""
    before: tuple[Array, float] | None = None
    for t, s in pairwise(times.tolist()):
        x0, q = denoise(z, t), _sigma_ratio(t, s)
        h = -math.log(q) if q else math.inf
        ahead = x0 if before is None or s == 0 else x0 + (x0 - before[0]) * (h / (2 * before[1]))
        z = (s / t) * q**eta * z + (1 - s) * (1 - q ** (1 + eta)) * ahead
        if s > 0 and eta > 0:
            z = z + s * math.sqrt(1 - q ** (2 * eta)) * noise()
        before = x0, h
    return z


def _sigma_ratio(t: float, s: float) -> float:
    """q = sigma_edm(s)/sigma_edm(t) for s < t, 0 at t = 1."""
    return s * (1 - t) / (t * (1 - s))
