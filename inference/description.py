"""What a checkpoint says of itself beside its weights, `pipeline.json`, and how a folder that has one is found.

Trainer and sampler share it: objective, autoencoder and text encoders are those that the weights were trained with.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from torch import Tensor

from diffusion.objective import Objective, ObjectiveConfig
from diffusion.sample import Sampler, check_eta
from diffusion.timesteps import Grid
from models.autoencoder import AutoencoderConfig
from models.folder import fault, newest
from models.text import TextConfig
from models.weights import locate

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class SamplerConfig:
    """How pictures are drawn unless the caller says otherwise.

    grid: None is the one that the objective was trained for. eta: fresh noise of the stochastic samplers, 0 none, 1 as
    much as DDPM; None is each sampler's own. negative_scale: None lets a negative prompt stand in for the empty one; a
    number makes it a branch of its own, pushed away with that weight. ramp_max: largest sigma_edm of the karras and
    exponential grids, which a step from pure noise precedes where that is noisier; None is the table's. tolerance: of
    the adaptive sampler dopri5, absolute and relative. aesthetic, negative_aesthetic: the scores that a model is told
    which reads one, as SDXL's refiner: of the picture, and in the branch that guidance leads away from.
    """

    name: Sampler = Sampler.euler
    steps: int = 28  # from noise to picture; dopri5 chooses its own
    grid: Grid | None = None
    guidance: float = 4.0  # 1: the plain conditional prediction; 0: the unconditional one
    negative_scale: float | None = None
    rescale: float = 0.0  # share, 0 to 1, of the contrast that guidance adds which is taken back
    interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # times at which guidance acts
    eta: float | None = None
    rho: float = 7.0  # of the karras grid
    ramp_max: float | None = None
    tolerance: float = 1e-3
    aesthetic: float = 6.0
    negative_aesthetic: float = 2.5

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"sampler.steps={self.steps} must be at least 1; 28 is usual")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"sampler.interval={self.interval} must rise within [0, 1] in noise time; choose e.g. [0.0, 1.0]"
            )
        for key in ("rho", "ramp_max", "tolerance"):
            if (value := getattr(self, key)) is not None and not value > 0:
                raise ValueError(f"sampler.{key}={value} is not positive; choose a number above 0")
        check_eta(self.name, self.eta)

    def times(self, objective: Objective, cells: int) -> Tensor:
        """The noise times that a picture of so many latent cells is walked through: (steps + 1,) float64.

        Raises ValueError if the objective has no such grid.
        """
        return objective.grid(self.steps, self.grid, cells=cells, rho=self.rho, ramp_max=self.ramp_max)


@dataclass(slots=True, kw_only=True)
class Base:
    """What adapters were trained on: a folder with pipeline.json, which of its weights, and their SHA-256."""

    path: str
    weights: str
    sha256: str


@dataclass(slots=True, kw_only=True)
class Description:
    """What a checkpoint says of itself, beside its weights; `base` where these are adapters alone."""

    objective: ObjectiveConfig
    sampler: SamplerConfig
    vae: AutoencoderConfig
    text: TextConfig | None
    resolution: int
    num_classes: int | None
    base: Base | None = None

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
            base=known.get("base") and typed(Base, known["base"]),
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
    """The config dataclass that `plain` made `values` of."""
    hints = get_type_hints(kind)
    inner = {key: typed(hints[key], value) for key, value in values.items() if dataclasses.is_dataclass(hints.get(key))}
    choices = {name: choice for name, hint in hints.items() for choice in (hint, *get_args(hint)) if _is_enum(choice)}
    named = {key: choices[key][value] if key in choices and value else value for key, value in values.items()}
    return kind(**named | inner)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


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
