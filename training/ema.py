"""Averages of the weights, with their clocks in images.

After every step `ema += (1 - beta) (weights - ema)`. The main average forgets exponentially, `beta = 0.5 ** (batch /
halflife)`; early in a run the half-life is at most `rampup` of the images seen, so that it forgets the random start.

Further averages follow power functions (Karras et al. 2024, arXiv 2312.02696, section 3): after t images the weights of
tau images count as `p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)`, so that memory grows with the run, and
`beta = (1 - batch / t)^(gamma + 1)`. Each is named by its width in time as a share of the run,

    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)).

From two of them, kept at several times, any other width is made after training: `combine` finds the sum of kept
profiles that is nearest, in least squares over time, to the profile asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.lora import adapters
from training.sharded import local

WIDEST = 0.28  # gamma = 0, the plain mean of all weights, has 1 / sqrt(12) = 0.289


@dataclass(slots=True, kw_only=True)
class EMAConfig:
    """Half-life in images, its cap as a share of the images seen so far, and widths of further averages."""

    halflife: int = 500_000  # images after which a weight counts half
    rampup: float = 0.05  # halflife is at most this share of the images seen
    sigma_rel: list[float] = field(default_factory=list)  # [0.05, 0.1] lets any width be made later

    def __post_init__(self):
        if self.halflife <= 0 or self.rampup <= 0:
            raise ValueError(
                f"ema.halflife={self.halflife} and ema.rampup={self.rampup} must be positive; choose larger ones"
            )
        for width in self.sigma_rel:
            check_width(width, f"ema.sigma_rel={self.sigma_rel}")
        if len({name_of(width) for width in self.sigma_rel}) < len(self.sigma_rel):
            raise ValueError(f"ema.sigma_rel={self.sigma_rel} has a width twice to three digits; give each once")


class EMA:
    """Holds `profiles`, averaged copies by name that are ready to use; `module` is the main one, `ema`.

    Those of a sharded denoiser are sharded alike, and follow it part by part.
    """

    def __init__(self, module: nn.Module, config: EMAConfig):
        from training.distributed import twin  # takes seconds to import, and EMAConfig is read everywhere

        self.config = config
        self.gammas = {name_of(width): gamma_of(width) for width in config.sigma_rel}
        names = ["ema", *self.gammas]
        # adapters are float32, and what they stand on is shared as it is
        copies = {name: twin(module) if adapters(module) else twin(module).float() for name in names}
        self.profiles = {name: copied.eval().requires_grad_(False) for name, copied in copies.items()}

    @property
    def module(self) -> nn.Module:
        """The main average."""
        return self.profiles["ema"]

    def beta(self, images_seen: int, batch_size: int, profile: str = "ema") -> float:
        """How much of the old average stays after the step that brings the count to `images_seen`."""
        if profile in self.gammas:
            return (1 - batch_size / images_seen) ** (self.gammas[profile] + 1)
        halflife = min(self.config.halflife, images_seen * self.config.rampup)
        return 0.5 ** (batch_size / halflife)

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move the averages towards `module`, all tensors at once."""
        free = [parameter.requires_grad for parameter in module.parameters()]
        weights = [local(parameter).float() for parameter in compress(module.parameters(), free)]
        for name, average in self.profiles.items():
            tensors = [local(parameter) for parameter in compress(average.parameters(), free)]
            torch._foreach_lerp_(tensors, weights, 1.0 - self.beta(images_seen, batch_size, name))


def name_of(sigma_rel: float) -> str:
    """How an average of this width is called in a checkpoint: `ema_0.050`."""
    return f"ema_{sigma_rel:.3f}"


def check_width(sigma_rel: float, said: str) -> None:
    """Refuse a width that no power function has."""
    if not 0.001 <= sigma_rel <= WIDEST:
        raise ValueError(f"{said} is outside 0.001 to {WIDEST}; choose widths such as 0.05 and 0.1")


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose power function has this width: the largest root of its cubic."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def coefficients(kept: Sequence[tuple[int, float]], images: int, sigma_rel: float) -> list[float]:
    """How to sum averages, each of (images seen, sigma_rel), to come nearest to width `sigma_rel` at `images`.

    With P the scalar products of the kept profiles and q theirs with the wanted one, over time: P c = q, as nearly as
    sum(c) = 1 allows, without which a few snapshots would make weights that are all some percent too large.
    """
    times, gammas = np.array([time for time, _ in kept], float), np.array([gamma_of(width) for _, width in kept])
    gram = _product(times[:, None], gammas[:, None], times[None], gammas[None])
    wanted = _product(times, gammas, float(images), gamma_of(sigma_rel))
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of length 1: early ones are high and narrow
    ones = scale / np.linalg.norm(scale)  # the sum, over the scaled unknowns; its multiplier is the last of them
    saddle = np.block([[gram * scale[:, None] * scale, ones[:, None]], [ones[None], np.zeros((1, 1))]])
    sides = np.append(wanted * scale, 1 / np.linalg.norm(scale))
    return list(scale * np.linalg.lstsq(saddle, sides, rcond=1e-14)[0][:-1])


def _product(time, gamma, other_time, other_gamma):
    """Integral over tau of two power functions: both are zero after their time."""
    early = np.minimum(time, other_time)
    shares = (early / time) ** gamma * (early / other_time) ** other_gamma * early / (time * other_time)
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * shares


def combine(folders: Sequence[Path], sigma_rel: float, images: int | None = None) -> dict[str, Tensor]:
    """Weights as an average of width `sigma_rel` would hold them after `images` (None: the latest kept).

    folders: checkpoints or snapshots, named by the images seen, of which none is later than `images` needs. Every
    `ema_*` in them is used, tensor by tensor, summed in float64.
    """
    from safetensors import safe_open

    check_width(sigma_rel, f"sigma_rel={sigma_rel}")
    files = sorted(path for folder in folders for path in (folder / "denoiser").glob("ema_*.safetensors"))
    kept = [(int(path.parents[1].name), float(path.stem.removeprefix("ema_"))) for path in files]
    if not kept:
        raise ValueError(
            f"{', '.join(map(str, folders)) or 'no folder'} holds no average that can be combined; train with"
            " ema.sigma_rel=[0.05,0.1] and checkpoint.snapshot_every=..."
        )
    latest = max(time for time, _ in kept)
    images = latest if images is None else images
    if not 0 < images <= latest:
        raise ValueError(f"images={images} is not within the {latest} images of the averages kept; choose one that is")
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path, weight in zip(files, coefficients(kept, images, sigma_rel), strict=True):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                tensor = file.get_tensor(name)
                dtypes[name] = tensor.dtype
                total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + weight * tensor.double()
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}
