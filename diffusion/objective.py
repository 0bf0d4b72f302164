"""Training objectives: what a denoiser is asked to predict, and what its error is worth.

Every objective is one row (c, d) of a 2x2 linear map, and the noised sample is the other:

    [ x_t    ]   [ alpha  sigma ] [ x0  ]            eps   (0, 1)            v     (-sigma, alpha)
    [ target ] = [ c      d     ] [ eps ]            x0    (1, 0)            flow  (alpha', sigma')

so one inverse recovers clean latent and noise from any prediction p:

    x0 = (d x_t - sigma p) / det        eps = (alpha p - c x_t) / det        det = alpha d - sigma c

det says where a parameterisation is blind: alpha for eps (nothing at t = 1), -sigma for x0 (t = 0), never 0 for v and
flow. The same line turns errors into one another, |x0 error| = |sigma/det| |p error|, so a weighting is written once,
as W(SNR) on the squared x0 error, and means the same in every objective:

    w(t) = W(SNR) (sigma/det)^2

    none            w = 1
    min_snr         W = max(min(SNR, gamma), floor)         Hang et al. (arXiv:2303.09556), where the floor is 0
    soft_min_snr    W = gamma SNR/(SNR + gamma)             k-diffusion's, with gamma = 1/sigma_data^2
    snr             W = SNR                                 the plain eps error
    p2              W = SNR/(k + SNR)^p2_gamma              Choi et al. (arXiv:2204.00227)
    edm             W = SNR + 1/sigma_data^2                Karras et al. (arXiv:2206.00364), the plain F error

Only `edm` and a floor are above 0 at zero SNR, the very step that a zero-terminal schedule adds. SNR itself is never
formed: each W is multiplied out into (alpha/det)^2 and (sigma/det)^2, which are finite on all of [0, 1] where w is.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from diffusion.schedule import (
    Betas,
    Path,
    ShiftLaw,
    alpha_sigma,
    alpha_sigma_slope,
    exponential_factor,
    per_sample,
    shift,
    sqrt_factor,
    table_times,
    unshift,
)
from diffusion.timesteps import (
    MODE_SCALES,
    Grid,
    TimeLaw,
    cosmap,
    from_table,
    logit_normal,
    mode,
    ramp,
    share,
    table_grid,
    table_index,
    uniform_grid,
)

_TINY = 1e-15  # its inverse can be squared in float32
_NO_SHARE = 2.0**-40  # of u: what rounding leaves of a range between two times


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
    soft_min_snr = "soft_min_snr"
    snr = "snr"
    p2 = "p2"
    edm = "edm"


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


@dataclass(slots=True, kw_only=True)
class ObjectiveConfig:
    """One objective, shared by trainer and sampler and stored with the weights.

    Times: `times` is the law of t before the shift multiplies sigma_edm. `betas` and `zero_terminal` make the table for
    the law `table` and the network time `index`. `sigma_max` stands for an infinite sigma_edm: times beyond are cut to
    it. `logit_mean` and `logit_std` belong to the law `logit_normal`, `mode_scale` to `mode`. `shift_law` says how the
    shift depends on the size; in the law `sqrt`, `shift` holds at `shift_cells`, height times width of a latent.
    `stratified` spreads a batch evenly over the law. `range`: the noise times trained at, after the shift.

    Loss: `gamma` and `floor` (in units of SNR) belong to the weighting `min_snr`, `gamma` to `soft_min_snr` too, `p2_k`
    and `p2_gamma` to `p2`, `sigma_data` to `edm`. `huber`: the error beyond which the loss grows more slowly.

    Noise: `offset_noise` is the amplitude of a second noise, one number a channel, which hides a picture's mean as the
    first hides its details. `pairing`: neighbouring images among which noises are dealt so that each lies near its own.

    `contrast`: the share lambda of the error to another image's target that is taken off the loss (contrastive flow
    matching, Stoica et al. 2025, arXiv:2506.05350: 0.05). The best prediction is then no longer E[target | x_t], but
    (E[target | x_t] - lambda E[target])/(1 - lambda): it overshoots, much as guidance does, and wants less of that.
    """

    prediction: Prediction = Prediction.eps
    path: Path = Path.vp
    times: TimeLaw = TimeLaw.table
    betas: Betas = Betas.scaled_linear
    zero_terminal: bool = False
    sigma_max: float | None = None  # NovelAI V3: 20000
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29  # SD3's best of its kind
    shift: float = 1.0
    shift_law: ShiftLaw = ShiftLaw.fixed
    shift_cells: int | None = None
    stratified: bool = False
    range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    weighting: Weighting = Weighting.none
    gamma: float = 5.0
    floor: float = 0.0
    p2_k: float = 1.0
    p2_gamma: float = 1.0
    sigma_data: float = 1.0
    huber: float | None = None
    offset_noise: float = 0.0  # SDXL: 0.05
    pairing: int = 1
    contrast: float = 0.0
    network_time: NetworkTime = NetworkTime.noise

    def __post_init__(self) -> None:
        """Refuse combinations that cannot train, warn of one that trains less than it seems to."""
        name = f"objective.prediction={self.prediction.name}"
        if self.prediction is Prediction.flow and self.path is not Path.linear:
            raise ValueError(f"{name} is defined on the straight path; set objective.path=linear")
        if self.prediction in (Prediction.eps, Prediction.v) and self.path is not Path.vp:
            raise ValueError(f"{name} is defined on the variance-preserving path; set objective.path=vp")
        self._check_times()
        self._check_numbers()
        if self.prediction is Prediction.eps and self._reaches_noise():
            raise ValueError(
                f"{name} says nothing of x0 at t=1, which objective.zero_terminal={self.zero_terminal} with "
                f"objective.times={self.times.name} reaches; set zero_terminal=false and times=table, or prediction=v"
            )
        terminal = self.zero_terminal and self.times is TimeLaw.table and self.prediction is not Prediction.eps
        if terminal and self.weighting is Weighting.min_snr and self.floor == 0:
            warnings.warn(
                "objective.weighting=min_snr with zero_terminal=true and floor=0 gives the terminal time weight 0, so "
                "it is never trained; set objective.floor=1",
                stacklevel=2,
            )
        if terminal and self.weighting in (Weighting.soft_min_snr, Weighting.snr, Weighting.p2):
            warnings.warn(
                f"objective.weighting={self.weighting.name} with zero_terminal=true gives the terminal time weight 0, "
                "so it is never trained; set objective.weighting=min_snr and objective.floor=1",
                stacklevel=2,
            )

    def _check_times(self) -> None:
        low, high = MODE_SCALES
        if not low <= self.mode_scale <= high:
            raise ValueError(
                f"objective.mode_scale={self.mode_scale} makes times that do not rise; choose {low:g} to {high:.3g}"
            )
        if self.sigma_max is not None and self.sigma_max < 1:
            raise ValueError(
                f"objective.sigma_max={self.sigma_max} is below 1, though it stands for an infinite one; choose 20000,"
                " or null for no cut"
            )
        if self.shift_law is ShiftLaw.sqrt and self.shift_cells is None:
            raise ValueError(
                "objective.shift_law=sqrt has no size at which shift holds; set objective.shift_cells to a latent's"
                " height times width, 16384 for 1024 pixels"
            )
        if self.shift_cells is not None and self.shift_cells < 1:
            raise ValueError(
                f"objective.shift_cells={self.shift_cells} is no latent's size; choose its height times width"
            )
        if len(self.range) != 2 or not 0 <= self.range[0] < self.range[1] <= 1:
            raise ValueError(
                f"objective.range={self.range} does not rise within 0 to 1; choose two noise times such as [0.0, 1.0]"
            )

    def _check_numbers(self) -> None:
        for key in ("shift", "logit_std", "gamma", "p2_k", "sigma_data", "huber"):
            if (value := getattr(self, key)) is not None and not value > 0:
                raise ValueError(f"objective.{key}={value} is not positive; choose a number above 0")
        for key in ("p2_gamma", "offset_noise"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"objective.{key}={getattr(self, key)} is negative; choose 0 for none, or more")
        if not 0 <= self.floor <= self.gamma:
            raise ValueError(f"objective.floor={self.floor} is not between 0 and gamma={self.gamma}; choose 0 or 1")
        if self.pairing < 1:
            raise ValueError(f"objective.pairing={self.pairing} counts images; choose 1 for none, or more")
        if not 0 <= self.contrast < 1:
            raise ValueError(f"objective.contrast={self.contrast} is not from 0 to below 1; choose 0 for none, or 0.05")
        if self.contrast and self.prediction is not Prediction.flow:
            raise ValueError(
                f"objective.contrast={self.contrast} parts flows, but objective.prediction={self.prediction.name};"
                " set prediction=flow, or contrast=0"
            )

    def _reaches_noise(self) -> bool:
        """Whether training may see t = 1, where nothing is left of x0."""
        uncut = self.sigma_max is None and self.range[1] == 1
        return uncut and (self.zero_terminal or self.times is not TimeLaw.table)


class Objective:
    """An `ObjectiveConfig` at work. Times are (b,), latents (b, ...), `cells` a latent's height times width.

    Nothing a training step calls reads a tensor of the device on the host; `split` and what `denoise` returns do, to
    refuse t = 1.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        """Build the beta table in float64; it is cast where it is used."""
        self.config = config
        self._cut = 1.0 if config.sigma_max is None else _time_of_sigma(config.sigma_max)
        self.table = table_times(config.betas, config.zero_terminal).clamp(max=self._cut)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._shares: dict[float, tuple[float, float]] = {}
        self._share(config.shift)  # refuses a range without times before anything else is built

    def shift_at(self, cells: int | None = None) -> float:
        """The factor on sigma_edm for a latent of so many cells; a fixed law need not be told."""
        config = self.config
        if config.shift_law is ShiftLaw.fixed:
            return config.shift
        if cells is None:
            raise ValueError(
                f"objective.shift_law={config.shift_law.name} shifts each size differently, and none was given; give"
                " cells, a latent's height times width, or set shift_law=fixed"
            )
        if config.shift_law is ShiftLaw.exponential:
            return config.shift * exponential_factor(cells)
        assert config.shift_cells is not None  # __post_init__ has asked for it
        return config.shift * sqrt_factor(cells, config.shift_cells)

    def draw_times(self, u: Tensor, cells: int | None = None) -> Tensor:
        """Times for uniform numbers `u` in (0, 1), same shape and precision.

        The law's inverse CDF, then the shift for latents of `cells`, then the cut at `sigma_max`; conditioned on
        `range`, by drawing from the share of u that leads there.
        """
        factor = self.shift_at(cells)
        first, last = self._share(factor)
        return self._time(torch.clamp(first + (last - first) * u, first, last), factor)

    def _time(self, u: Tensor, factor: float) -> Tensor:
        """The whole law, rising with u."""
        config = self.config
        match config.times:
            case TimeLaw.table:
                t = from_table(u, self._table_like(u))
            case TimeLaw.uniform:
                t = u
            case TimeLaw.logit_normal:
                t = logit_normal(u, config.logit_mean, config.logit_std)
            case TimeLaw.mode:
                t = mode(u, config.mode_scale)
            case TimeLaw.cosmap:
                t = cosmap(u)
        return shift(t, factor).clamp(max=self._cut)

    def _share(self, factor: float) -> tuple[float, float]:
        """The u between which times lie in `range`, found once a factor."""
        if factor not in self._shares:
            low, high = self.config.range
            first, last = share(lambda u: self._time(u, factor), low, high)
            if last - first < _NO_SHARE:
                raise ValueError(
                    f"objective.range={self.config.range} holds no time of objective.times={self.config.times.name}"
                    f" with shift {factor:g}; choose a wider one"
                )
            self._shares[factor] = max(first, 0.0), min(last, 1.0)
        return self._shares[factor]

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
        """Weight of the squared prediction error, (b,), finite on all of [0, 1]: W(SNR) (sigma/det)^2.

        For x0 at t = 0 `snr` and `edm` have no bound, nor has `edm` for eps at t = 1: there it is some 1e30.
        """
        config = self.config
        if config.weighting is Weighting.none:
            return torch.ones_like(t)
        alpha, sigma = (k.clamp(min=_TINY) for k in alpha_sigma(config.path, t))
        c, d = coefficients(config.prediction, config.path, t)
        det = alpha * d - sigma * c
        snr, one = (alpha / det) ** 2, (sigma / det) ** 2  # what W = SNR and W = 1 are worth
        match config.weighting:
            case Weighting.min_snr:
                return torch.clamp(snr, config.floor * one, config.gamma * one)
            case Weighting.soft_min_snr:
                return config.gamma * alpha**2 / (alpha**2 + config.gamma * sigma**2) * one
            case Weighting.snr:
                return snr
            case Weighting.p2:
                return snr * (sigma**2 / (config.p2_k * sigma**2 + alpha**2)) ** config.p2_gamma
            case Weighting.edm:
                return snr + one / config.sigma_data**2

    def penalty(self, squared: Tensor) -> Tensor:
        """What each element's squared error e^2 costs: itself, or pseudo-Huber 2 d (sqrt(e^2 + d^2) - d), d = `huber`.

        They agree for e << d; for e >> d the latter grows as 2 d |e|. Written without a difference that rounds to 0.
        """
        d = self.config.huber
        return squared if d is None else 2 * d * squared / ((squared + d**2).sqrt() + d)

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
        """The largest time this objective trains at, where sampling starts; at the size that `shift` is for."""
        return self._top(self.config.shift)

    def _top(self, factor: float) -> float:
        if self.config.times is TimeLaw.table:
            return float(self._trained(factor)[-1])
        most = 0.999 if self.config.network_time is NetworkTime.whole else 1.0
        return min(float(shift(torch.tensor(most, dtype=torch.float64), factor)), self._cut, self.config.range[1])

    def _trained(self, factor: float) -> Tensor:
        """The table's times as training draws them, up to the end of `range`, ascending float64."""
        times = shift(self.table, factor).clamp(max=self._cut).unique()
        return times[times <= self.config.range[1]]

    @property
    def default_grid(self) -> Grid:
        """`trailing` where training draws from the table, else `uniform`."""
        return Grid.trailing if self.config.times is TimeLaw.table else Grid.uniform

    def grid(
        self,
        steps: int,
        kind: Grid | None = None,
        *,
        cells: int | None = None,
        rho: float = 7.0,
        ramp_max: float | None = None,
    ) -> Tensor:
        """(steps + 1,) descending float64 times to 0, shifted as in training for latents of `cells`.

        Default: `default_grid`. All but `leading` start at the largest time trained at. `rho` belongs to `karras`;
        `ramp_max`, in sigma_edm, is where the ramps of `karras` and `exponential` start.
        """
        factor, kind = self.shift_at(cells), kind or self.default_grid
        if kind is Grid.uniform:
            top = self._top(factor)
            times = shift(uniform_grid(steps, float(unshift(torch.tensor(top, dtype=torch.float64), factor))), factor)
            times[0] = top  # to the last bit
            return times
        if kind in (Grid.karras, Grid.exponential):
            return self._ramp(kind, steps, factor, rho, ramp_max)
        if self.config.times is not TimeLaw.table:
            raise ValueError(
                f"a {kind.name} grid walks a table, but objective.times={self.config.times.name}; use the uniform grid"
            )
        return table_grid(kind, steps, self._trained(factor))

    def _ramp(self, kind: Grid, steps: int, factor: float, rho: float, ramp_max: float | None) -> Tensor:
        """A ramp of noise levels, then 0; where training reaches higher than the ramp, one step from there before it.

        On path vp the ramp is over sigma_edm, from the largest to the smallest of the betas without the rescale to a
        zero terminal: 14.6 to 0.03, as k-diffusion's. A ramp from the 20000 that stands for infinity would spend most
        steps, 21 of 28, where the sample is all but noise: infinity is one step, not a range (NovelAI V3, "20000, 17.8,
        12.4, ..."). On path linear it is over t, from the largest to a thousandth shifted once, as FlowMatchEuler of
        diffusers does when it is handed these ends; left to itself, it shifts the last one twice by a fixed shift.
        """
        if steps < 1:
            raise ValueError(f"sampler.steps={steps} walks nowhere; choose 1 or more")
        top, linear = self._top(factor), self.config.path is Path.linear
        ends = torch.tensor([0.001, 1.0], dtype=torch.float64) if linear else table_times(self.config.betas)[[0, -1]]
        low, high = shift(ends, factor).tolist()
        start = min(top, high if ramp_max is None else _time_of_sigma(ramp_max))
        before = [top] if top - start > 1e-9 else []
        if steps - len(before) > 1 and not low < start:
            raise ValueError(
                f"a {kind.name} grid falls to t={low:.3g}, but would start at t={start:.3g}; choose a larger"
                " sampler.ramp_max or another sampler.grid"
            )
        if linear:
            times = ramp(kind, steps - len(before), start, low, rho)
        else:
            sigmas = ramp(kind, steps - len(before), start / (1 - start), low / (1 - low), rho)
            times = sigmas / (1 + sigmas)
        times = torch.cat([torch.tensor(before, dtype=torch.float64), times, torch.zeros(1, dtype=torch.float64)])
        times[0] = top  # to the last bit
        return times

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


def _time_of_sigma(sigma_edm: float) -> float:
    return sigma_edm / (1 + sigma_edm)
