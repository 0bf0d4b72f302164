"""Noise schedules: how much signal and how much noise a sample holds at each time.

One time serves every objective: the *noise time* `t` in [0, 1], 0 = clean and 1 = pure noise, defined by

    t = sigma / (alpha + sigma)        x_t = alpha x0 + sigma eps

so that SNR = ((1-t)/t)^2 and sigma_edm = sigma/alpha = t/(1-t) whichever path is walked. A path only fixes the scale:

    linear   alpha = 1-t        sigma = t          (rectified flow, SD3)
    vp       alpha = (1-t)/D    sigma = t/D        D = sqrt((1-t)^2 + t^2), alpha^2 + sigma^2 = 1  (DDPM, SD, SDXL)

Hence a sample moves between paths by a rescale, x = (alpha + sigma) z with z on the linear path, and a table of betas
is nothing but a set of times. The terminal point is exactly (alpha, sigma) = (0, 1); no infinite sigma is formed.

A larger picture needs more noise to hide what it shows. All rules for that are one operation, sigma_edm' = a sigma_edm,
and differ in how the factor a follows from the number n of a latent's cells, height times width:

    fixed         a = shift                         one size, or one value for all
    sqrt          a = shift sqrt(n / n_shift)       SD3 (arXiv:2403.03206, section 5.3.2): `shift` holds at n_shift
    exponential   a = shift e^mu, mu linear in n    FLUX, "dynamic shifting" in diffusers
"""

import math
from enum import Enum

import torch
from torch import Tensor


class Path(Enum):
    """The two scalings of one family of noised samples."""

    vp = "vp"
    linear = "linear"


def alpha_sigma(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise amplitudes at times `t` of any shape."""
    if path is Path.linear:
        return 1 - t, t
    norm = _norm(t)
    return (1 - t) / norm, t / norm


def alpha_sigma_slope(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """(d alpha/dt, d sigma/dt). On `vp` the pair turns by an angle phi = atan(sigma/alpha), d phi/dt = 1/D^2."""
    if path is Path.linear:
        return -torch.ones_like(t), torch.ones_like(t)
    alpha, sigma = alpha_sigma(path, t)
    rate = _norm(t) ** -2
    return -sigma * rate, alpha * rate


def snr(t: Tensor) -> Tensor:
    """Signal-to-noise ratio (alpha/sigma)^2; infinite at t = 0."""
    return ((1 - t) / t) ** 2


def log_snr(t: Tensor) -> Tensor:
    """Natural logarithm of the SNR, 2 ln((1-t)/t); +inf at t = 0 and -inf at t = 1."""
    return 2 * (torch.log1p(-t) - torch.log(t))


def time_of_log_snr(log_snr: Tensor) -> Tensor:
    """Inverse of `log_snr`, infinities included."""
    return torch.sigmoid(-log_snr / 2)


def shift(t: Tensor, factor: float) -> Tensor:
    """Multiply sigma_edm by `factor`: t' = a t / (1 + (a-1) t), the resolution shift of SD3.

    The same operation lowers log-SNR by 2 ln a (simple diffusion) and turns logit-normal(m, s) into
    logit-normal(m + ln a, s). Both ends stay exactly where they are.
    """
    return factor * t / ((1 - t) + factor * t)  # this grouping is exact at t = 1 for every factor


def unshift(t: Tensor, factor: float) -> Tensor:
    """Inverse of `shift`."""
    return shift(t, 1 / factor)


class ShiftLaw(Enum):
    """How the shift's factor follows from the size of a latent."""

    fixed = "fixed"
    sqrt = "sqrt"
    exponential = "exponential"


# mu of FLUX's reference sampler, through these two points and on beyond them: (tokens, mu)
FLUX_SMALL, FLUX_LARGE = (256, 0.5), (4096, 1.15)
CELLS_PER_TOKEN = 4  # FLUX's patches are of 2 x 2 cells


def sqrt_factor(cells: int, shift_cells: int) -> float:
    """What SD3 multiplies sigma_edm by at `cells`, relative to `shift_cells`: sqrt(n / n_shift)."""
    return math.sqrt(cells / shift_cells)


def exponential_factor(cells: int) -> float:
    """What FLUX multiplies sigma_edm by at `cells`: e^mu, 1.65 at 256 tokens and 3.16 at 4096."""
    (few, low), (many, high) = FLUX_SMALL, FLUX_LARGE
    return math.exp(low + (high - low) * (cells / CELLS_PER_TOKEN - few) / (many - few))


class Betas(Enum):
    """Tables of 1000 betas that published weights were trained on."""

    scaled_linear = "scaled_linear"  # Stable Diffusion, SDXL: 0.00085 to 0.012, linear in the square root
    linear = "linear"  # DDPM, DiT, PixArt: 0.0001 to 0.02
    cosine = "cosine"  # improved DDPM (arXiv:2102.09672): sqrt(alpha_bar) a cosine, betas at most 0.999


def beta_table(betas: Betas, n: int = 1000) -> Tensor:
    """The betas themselves, (n,) float64."""
    match betas:
        case Betas.scaled_linear:
            return torch.linspace(0.00085**0.5, 0.012**0.5, n, dtype=torch.float64) ** 2
        case Betas.linear:
            return torch.linspace(1e-4, 0.02, n, dtype=torch.float64)
        case Betas.cosine:
            angle = (torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2
            alpha_bar = angle.cos() ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def table_times(betas: Betas = Betas.scaled_linear, zero_terminal: bool = False) -> Tensor:
    """Times of a beta table, (1000,) float64 ascending; the last is exactly 1 with `zero_terminal`.

    `zero_terminal` is Algorithm 1 of Lin et al. (arXiv:2305.08891): sqrt(alpha_bar) is shifted so that the last is 0
    and rescaled so that the first is unchanged.
    """
    alpha = torch.cumprod(1 - beta_table(betas), dim=0).sqrt()
    if zero_terminal:
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    sigma = (1 - alpha**2).sqrt()
    return sigma / (alpha + sigma)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Shape one value a sample, (b,), to broadcast over `like`, (b, ...), in its precision but at least float32.

    A bfloat16 latent therefore meets a float32 coefficient: rounding t to 8 bits would move the noise level itself.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    return value.to(dtype).reshape(-1, *[1] * (like.ndim - 1))


def _norm(t: Tensor) -> Tensor:
    """D(t) = sqrt((1-t)^2 + t^2), never below sqrt(1/2)."""
    return ((1 - t) ** 2 + t**2).sqrt()
