"""Training objectives: what a denoiser is asked to predict, and what its error is worth.

Every objective is one row (c, d) of a 2x2 linear map, and the noised sample is the other:

    [ x_t    ]   [ alpha  sigma ] [ x0  ]            eps   (0, 1)            v     (-sigma, alpha)
    [ target ] = [ c      d     ] [ eps ]            x0    (1, 0)            flow  (alpha', sigma')

so one inverse recovers clean latent and noise from any prediction p:

    x0 = (d x_t - sigma p) / det        eps = (alpha p - c x_t) / det        det = alpha d - sigma c

det says where a parameterisation is blind: alpha for eps (nothing at t = 1), -sigma for x0 (t = 0), never 0 for v and
flow. The same line turns errors into one another, |x0 error| = |sigma/det| |p error|, so a weighting is written once,
as W(SNR) on the squared x0 error, and means the same in every objective:

    w(t) = W(SNR) (sigma/det)^2         none: w = 1         min_snr: W = max(min(SNR, gamma), floor)

Min-SNR is Hang et al. (arXiv:2303.09556). Without a floor W is 0 at zero SNR, the very step that a zero-terminal
schedule adds.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from diffusion.schedule import Betas, Path, alpha_sigma, alpha_sigma_slope, per_sample, shift, table_times
from diffusion.timesteps import Grid, TimeLaw, from_table, logit_normal, table_index, trailing_grid, uniform_grid

_TINY = 1e-15  # its inverse can be squared in float32


class Prediction(Enum):
    """What the denoiser's output stands for."""

    eps = "eps"
    x0 = "x0"
    v = "v"
    flow = "flow"


class Weighting(Enum):
    """Weight of the squared x0 error as a function of SNR; `none` leaves the prediction's own error unweighted."""

    none = "none"
    min_snr = "min_snr"


class NetworkTime(Enum):
    """What the denoiser is told of t.

    `noise` is t itself, `index` the fractional table index / 1000, `whole` t in whole thousandths, rounded down, as
    diffusers' schedulers tell a UNet of flow; they start at 0.999.
    """

    noise = "noise"
    index = "index"
    whole = "whole"


def coefficients(prediction: Prediction, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """(c, d) of target = c x0 + d eps, shaped like `t`."""
    match prediction:
        case Prediction.eps:
            return torch.zeros_like(t), torch.ones_like(t)
        case Prediction.x0:
            return torch.ones_like(t), torch.zeros_like(t)
        case Prediction.v:
            alpha, sigma = alpha_sigma(path, t)
            return -sigma, alpha
        case Prediction.flow:
            return alpha_sigma_slope(path, t)


def target(prediction: Prediction, path: Path, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the denoiser should output for x_t; x0, eps (b, ...), t (b,)."""
    c, d = (per_sample(k, x0) for k in coefficients(prediction, path, t))
    return c * x0 + d * eps


def split(prediction: Prediction, path: Path, pred: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, eps) that `pred` and `x_t`, (b, ...), imply at t (b,). ValueError where the prediction does not say.

    Reads the determinant on the host: for samplers and analysis, not for a training step.
    """
    alpha, sigma = alpha_sigma(path, t)
    c, d = coefficients(prediction, path, t)
    det = alpha * d - sigma * c
    if bool((det == 0).any()):
        end = "t=1, where x_t is pure noise" if prediction is Prediction.eps else "t=0, where x_t is clean"
        raise ValueError(f"prediction={prediction.name} cannot be inverted at {end}; avoid that end or use v or flow")
    alpha, sigma, c, d, det = (per_sample(k, x_t) for k in (alpha, sigma, c, d, det))
    return (d * x_t - sigma * pred) / det, (alpha * pred - c * x_t) / det


def min_snr_weight(prediction: Prediction, path: Path, t: Tensor, gamma: float = 5.0, floor: float = 0.0) -> Tensor:
    """max(min(SNR, gamma), floor) (sigma/det)^2, shaped like `t`, finite on all of [0, 1].

    The fraction is multiplied into the clamp, so no SNR is formed that could be infinite or divided by itself at 0.
    """
    alpha, sigma = (k.clamp(min=_TINY) for k in alpha_sigma(path, t))
    c, d = coefficients(prediction, path, t)
    det = alpha * d - sigma * c
    unit = (sigma / det) ** 2
    return torch.clamp((alpha / det) ** 2, floor * unit, gamma * unit)


@dataclass(slots=True, kw_only=True)
class ObjectiveConfig:
    """One objective, shared by trainer and sampler and stored with the weights.

    `times` is the law of t before `shift` multiplies sigma_edm. `betas` and `zero_terminal` make the table, for the law
    `table` and the network time `index`. `logit_mean` and `logit_std` belong to the law `logit_normal`, `gamma` and
    `floor` (in units of SNR) to the weighting `min_snr`.
    """

    prediction: Prediction = Prediction.eps
    path: Path = Path.vp
    times: TimeLaw = TimeLaw.table
    betas: Betas = Betas.scaled_linear
    zero_terminal: bool = False
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    weighting: Weighting = Weighting.none
    gamma: float = 5.0
    floor: float = 0.0
    network_time: NetworkTime = NetworkTime.noise

    def __post_init__(self) -> None:
        """Refuse combinations that cannot train, warn of one that trains less than it seems to."""
        name = f"objective.prediction={self.prediction.name}"
        if self.prediction is Prediction.flow and self.path is not Path.linear:
            raise ValueError(f"{name} is defined on the straight path; set objective.path=linear")
        if self.prediction in (Prediction.eps, Prediction.v) and self.path is not Path.vp:
            raise ValueError(f"{name} is defined on the variance-preserving path; set objective.path=vp")
        if self.prediction is Prediction.eps and (self.zero_terminal or self.times is not TimeLaw.table):
            raise ValueError(
                f"{name} says nothing of x0 at t=1, which objective.zero_terminal={self.zero_terminal} with "
                f"objective.times={self.times.name} reaches; set zero_terminal=false and times=table, or prediction=v"
            )
        for key in ("shift", "logit_std", "gamma"):
            if not getattr(self, key) > 0:
                raise ValueError(f"objective.{key}={getattr(self, key)} is not positive; choose a number above 0")
        if not 0 <= self.floor <= self.gamma:
            raise ValueError(f"objective.floor={self.floor} is not between 0 and gamma={self.gamma}; choose 0 or 1")
        terminal = self.zero_terminal and self.times is TimeLaw.table
        if terminal and self.weighting is Weighting.min_snr and self.floor == 0:
            warnings.warn(
                "objective.weighting=min_snr with zero_terminal=true and floor=0 gives the terminal time weight 0, so "
                "it is never trained; set objective.floor=1",
                stacklevel=2,
            )


class Objective:
    """An `ObjectiveConfig` at work. Times are (b,), latents (b, ...).

    Nothing a training step calls reads a tensor on the host; `split` and what `denoise` returns do, to refuse t = 1.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        """Build the beta table in float64; it is cast where it is used."""
        self.config = config
        self.table = table_times(config.betas, config.zero_terminal)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def draw_times(self, u: Tensor) -> Tensor:
        """Times for uniform numbers `u` in (0, 1), same shape and precision: the law's inverse CDF, then the shift."""
        config = self.config
        match config.times:
            case TimeLaw.table:
                t = from_table(u, self._table_like(u))
            case TimeLaw.uniform:
                t = u
            case TimeLaw.logit_normal:
                t = logit_normal(u, config.logit_mean, config.logit_std)
        return shift(t, config.shift)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps."""
        alpha, sigma = (per_sample(k, x0) for k in alpha_sigma(self.config.path, t))
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should output for `add_noise(x0, eps, t)`."""
        return target(self.config.prediction, self.config.path, x0, eps, t)

    def split(self, pred: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) that a prediction implies; see the function `split`."""
        return split(self.config.prediction, self.config.path, pred, x_t, t)

    def weight(self, t: Tensor) -> Tensor:
        """Weight of the squared prediction error, (b,)."""
        config = self.config
        if config.weighting is Weighting.none:
            return torch.ones_like(t)
        return min_snr_weight(config.prediction, config.path, t, config.gamma, config.floor)

    def network_time(self, t: Tensor) -> Tensor:
        """What the denoiser is given for t, (b,). It multiplies by 1000, so `index` shows it 0 to 999."""
        match self.config.network_time:
            case NetworkTime.noise:
                return t
            case NetworkTime.index:
                return table_index(t, self._table_like(t)) / len(self.table)
            case NetworkTime.whole:
                return (1000 * t + 1e-3).floor() / 1000  # 1e-3: thousandths themselves, whatever their last bit

    def denoise(self, denoiser: Callable[[Tensor, Tensor, Any], Tensor]) -> Callable[[Tensor, Tensor, Any], Tensor]:
        """The x0 estimate (z, t, cond) -> x0 that samplers ask for, z = (1-t) x0 + t eps whatever the path."""

        def x0_of(z: Tensor, t: Tensor, cond: Any) -> Tensor:
            alpha, sigma = alpha_sigma(self.config.path, t)
            x_t = per_sample(alpha + sigma, z) * z
            x0, _ = self.split(denoiser(x_t, self.network_time(t), cond), x_t, t)
            return x0

        return x0_of

    @property
    def t_max(self) -> float:
        """The largest time this objective trains at: where sampling starts."""
        return float(self.grid(1)[0])

    def grid(self, steps: int, kind: Grid | None = None) -> Tensor:
        """(steps + 1,) descending float64 times from `t_max` to 0, shifted as in training.

        Default: `trailing` where training draws from the table, else `uniform`.
        """
        on_table = self.config.times is TimeLaw.table
        kind = kind or (Grid.trailing if on_table else Grid.uniform)
        if kind is Grid.trailing:
            if not on_table:
                raise ValueError(
                    f"a trailing grid walks a table, but objective.times={self.config.times.name}; use the uniform grid"
                )
            times = trailing_grid(steps, self.table)
        else:
            most = 0.999 if self.config.network_time is NetworkTime.whole else 1.0
            times = uniform_grid(steps, float(self.table[-1]) if on_table else most)
        return shift(times, self.config.shift)

    def start(self, noise: Tensor, times: Tensor) -> Tensor:
        """The z at times[0] that shows the denoiser unit Gaussian `noise`: noise/(alpha + sigma).

        A grid that stops short of t = 1 still starts from pure noise.
        """
        return noise / float(sum(alpha_sigma(self.config.path, times[0])))

    def _table_like(self, t: Tensor) -> Tensor:
        key = (t.device, t.dtype)
        if key not in self._tables:  # copied once to each device, so a step waits for no transfer
            self._tables[key] = self.table.to(t)
        return self._tables[key]
