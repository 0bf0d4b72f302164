"""From a checkpoint to pictures: everything that samples, samples through here.

A checkpoint says how it was trained (`pipeline.json`: objective, autoencoder, text encoders, resolution), and the
pipeline obeys. Picture i depends on its own seed alone, so a batch gives what its members give one by one.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor

from data.loader import AESTHETIC
from diffusion.guidance import guided
from diffusion.objective import Objective, ObjectiveConfig
from diffusion.sample import SAMPLERS, Sampler, ddim
from inference.device import best_device
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.folder import fault, newest
from models.text import Conditioner, TextConfig
from models.weights import load_denoiser, locate

T = TypeVar("T")

NULL_AESTHETIC = 2.5  # what the refiner is guided away from


@dataclass(slots=True, kw_only=True)
class SamplerConfig:
    """How pictures are drawn unless the caller says otherwise."""

    name: Sampler = Sampler.euler
    steps: int = 28
    guidance: float = 4.0  # 1: the plain conditional prediction
    rescale: float = 0.0
    interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # times at which guidance acts
    eta: float = 0.0  # fresh noise of ddim: 0 none, 1 as much as DDPM

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"sampler.steps={self.steps} must be at least 1; 28 is usual")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"sampler.interval={self.interval} must rise within [0, 1] in noise time; choose e.g. [0.0, 1.0]"
            )


@dataclass(slots=True, kw_only=True)
class Description:
    """What a checkpoint says of itself, beside its weights."""

    objective: ObjectiveConfig
    sampler: SamplerConfig
    vae: AutoencoderConfig
    text: TextConfig | None
    resolution: int
    num_classes: int | None

    def save(self, folder: Path) -> None:
        """Write `pipeline.json`."""
        (folder / "pipeline.json").write_text(json.dumps(plain(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Description":
        """Read `pipeline.json`."""
        path = folder / "pipeline.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no pipeline.json; give a run folder, a checkpoint or an exported pipeline"
            )
        known = json.loads(path.read_text())
        for part in filter(None, (known["vae"], known["text"])):
            if part["path"].startswith("./"):  # kept beside the network
                part["path"] = str(folder / part["path"])
        return cls(
            objective=typed(ObjectiveConfig, known["objective"]),
            sampler=typed(SamplerConfig, known["sampler"]),
            vae=typed(AutoencoderConfig, known["vae"]),
            text=known["text"] and typed(TextConfig, known["text"]),
            resolution=known["resolution"],
            num_classes=known["num_classes"],
        )


def plain(config: Any) -> Any:
    """A config dataclass as what JSON knows: enums by their names."""
    if dataclasses.is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, (list, tuple)):
        return [plain(item) for item in config]
    return {key: plain(item) for key, item in config.items()} if isinstance(config, dict) else config


def typed(kind: type[T], values: dict[str, Any]) -> T:
    """The flat config dataclass that `plain` made `values` of."""
    hints = get_type_hints(kind)
    enums = {name for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Enum)}
    return kind(**{key: hints[key][value] if key in enums else value for key, value in values.items()})


def find(path: str | Path) -> Path:
    """The folder with `pipeline.json`: `path` itself, or the newest whole checkpoint of a run."""
    folder = Path(locate(str(path)))
    if (folder / "pipeline.json").is_file():
        if (folder / "manifest.json").is_file() and (reason := fault(folder)):
            raise ValueError(f"{folder} is broken: {reason}; take an older checkpoint beside it")
        return folder
    found = newest(folder / "checkpoints")
    if found is None:
        raise ValueError(f"{folder} holds no whole checkpoint; give a run folder, a checkpoint or an exported pipeline")
    return found


class Pipeline:
    """Denoiser, objective, conditioner and autoencoder, ready to draw."""

    def __init__(
        self,
        denoiser: Any,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        description: Description,
        device: torch.device | str = "cpu",
    ):
        self.denoiser = denoiser
        self.conditioner = conditioner
        self.autoencoder = autoencoder
        self.description = description
        self.objective = Objective(description.objective)
        self.device = torch.device(device)

    @classmethod
    def load(cls, path: str | Path, *, weights: str = "ema", device: torch.device | str | None = None) -> "Pipeline":
        """Open a run folder, a checkpoint or an exported pipeline. `weights` is ema or model."""
        folder, device = find(path), torch.device(device or best_device())
        description = Description.load(folder)
        denoiser = load_denoiser(folder / "denoiser", name=weights).to(device).eval()
        text = description.text.build().to(device) if description.text else None
        return cls(
            denoiser,
            Conditioner(text, description.num_classes, getattr(denoiser.config, "vector_dim", 0)),
            description.vae.build().to(device),
            description,
            device,
        )

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        class_ids: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        sampler: SamplerConfig | None = None,
        size: tuple[int, int] | None = None,
        times: Tensor | None = None,
        progress: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> np.ndarray:
        """Draw one picture for each prompt, or for each class: (b, height, width, 3) uint8.

        `seeds` has one number a picture, `size` is (height, width) in pixels, `times` are noise times to walk down to 0
        instead of `sampler.steps` on the objective's grid, and `progress(step, z, x0)` is called after each of them.
        """
        sampler = sampler or self.description.sampler
        labels = None if class_ids is None else torch.tensor(list(class_ids), device=self.device)
        cond = self.conditioner(None if prompts is None else list(prompts), labels)
        count = len(prompts if prompts is not None else class_ids or [])
        seeds = list(range(count)) if seeds is None else list(seeds)
        if len(seeds) != count:
            raise ValueError(f"seeds has {len(seeds)} numbers for {count} pictures; give one a picture")
        size = size or (self.description.resolution, self.description.resolution)
        shape, generators = self._latent_shape(size), [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise(_step: int = 0) -> Tensor:
            # drawn one picture at a time and on the CPU: the same whatever the batch and the device
            return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(self.device)

        null = self.conditioner.null(self.device).select(torch.zeros(count, dtype=torch.long, device=self.device))
        cond.size_ids, null.size_ids = (self._size_ids(size, count, score) for score in (AESTHETIC, NULL_AESTHETIC))
        denoise = guided(
            self.objective.denoise(self.denoiser), cond, null,
            sampler.guidance, sampler.rescale, (sampler.interval[0], sampler.interval[1]),
        )  # fmt: skip
        times = self.objective.grid(sampler.steps) if times is None else times
        z = self.objective.start(noise(), times)
        if sampler.name is Sampler.ddim:
            z = ddim(denoise, z, times, progress, eta=sampler.eta, noise=noise)
        else:
            z = SAMPLERS[sampler.name](denoise, z, times, progress)
        pixels = (self.autoencoder.decode(z) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _size_ids(self, size: tuple[int, int], count: int, aesthetic: float) -> Tensor | None:
        """What the denoiser reads of `count` whole pictures of `size` pixels: (count, 6 or 5), or None."""
        height, width = size
        told = [height, width, 0, 0, height, width, aesthetic]
        return self.conditioner.size_ids(torch.tensor([told] * count, dtype=torch.float32, device=self.device))

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for a picture of `size` pixels, which must be whole patches."""
        height, width = size
        unit = self.autoencoder.factor * self.denoiser.config.patch_size
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % unit:
                raise ValueError(
                    f"{name}={side} must be a multiple of {unit}, the autoencoder's factor times the patch;"
                    f" choose {max(unit, side // unit * unit)}"
                )
        return self.autoencoder.channels, height // self.autoencoder.factor, width // self.autoencoder.factor
