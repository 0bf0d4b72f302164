"""A checkpoint is a folder named by the images seen: safetensors and JSON, published whole or not at all.

    denoiser/config.json  denoiser/model.safetensors  denoiser/ema.safetensors
    optimizer.safetensors  state.json  pipeline.json  config.json  manifest.json

`inference.pipeline` opens it as it is; nothing is pickled.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inference.description import Description
from models.folder import clean, newest, publish
from models.weights import load_strict, read_tensors, save_denoiser

SCHEMA = 1


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """How often to save, in images, and how many to keep."""

    every: int = 100_000
    keep: int = 2

    def __post_init__(self):
        if self.every <= 0 or self.keep < 1:
            raise ValueError(
                f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be positive; choose larger ones"
            )


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Where a run stands. The images seen fix data order, noise, times and learning rate; the rest is counted."""

    images_seen: int = 0
    step: int = 0
    skipped: int = 0  # updates dropped for a non-finite gradient
    damaged: int = 0  # images that could not be read
    seconds: float = 0.0


def save_checkpoint(
    folder: Path,
    state: TrainState,
    denoiser: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    description: Description,
    config: dict[str, Any],
    keep: int,
) -> Path:
    """Publish `folder`/<images seen> and drop all but the newest `keep`."""

    def write(aside: Path) -> None:
        save_denoiser(denoiser, aside / "denoiser")
        save_denoiser(ema, aside / "denoiser", name="ema")
        save_file(optimizer_tensors(denoiser, optimizer), aside / "optimizer.safetensors")
        description.save(aside)
        (aside / "state.json").write_text(json.dumps({"schema": SCHEMA, **asdict(state)}, indent=1) + "\n")
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    target = folder / str(state.images_seen)
    if not target.exists():
        publish(target, write)
    older = sorted((path for path in folder.glob("[0-9]*") if path.name.isdigit()), key=lambda path: int(path.name))
    for path in older[:-keep]:
        shutil.rmtree(path)
    return target


def resume(
    folder: Path,
    denoiser: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    say: Callable[[str], None],
) -> TrainState | None:
    """Load the newest whole checkpoint of `folder` into everything; None if nothing was ever saved there.

    A folder with checkpoints of which none can be read is an error, never a fresh start.
    """
    clean(folder)
    found = newest(folder, warn=say)
    if found is None:
        if any(path.is_dir() for path in folder.glob("[0-9]*")):
            raise ValueError(
                f"{folder} holds checkpoints, but none is whole; move the folder away to start again, or restore one"
            )
        return None
    known = json.loads((found / "config.json").read_text())
    for key in ("seed", "model"):
        if known[key] != config[key]:
            raise ValueError(
                f"{key}={config[key]} differs from {key}={known[key]} in {found}, which this run would continue;"
                " give the old value, or another name=... for a new run"
            )
    for line in changes(known, config):
        say(f"changed since {found.name} images: {line}")
    saved = json.loads((found / "state.json").read_text())
    if saved.pop("schema") != SCHEMA:
        raise ValueError(f"{found} was written by another version (state schema); continue it with that version")
    for module, name in ((denoiser, "model"), (ema, "ema")):
        load_strict(module, read_tensors(found / "denoiser", name), source=str(found))
    load_optimizer(denoiser, optimizer, load_file(found / "optimizer.safetensors"))
    return TrainState(**saved)


def changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Each value of two nested configs that differs, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in new if key in old] + sorted(new.keys() ^ old.keys())
        return [line for key in keys for line in changes(old.get(key), new.get(key), f"{prefix}.{key}".strip("."))]
    return [] if old == new else [f"{prefix}: {old} -> {new}"]


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `exp_avg/blocks.0.attn.qkv.weight` and so on."""
    names: dict[Any, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{kind}/{names[parameter]}": tensor
        for parameter, entries in optimizer.state.items()
        for kind, tensor in entries.items()
    }


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; names must agree with the free parameters."""
    free = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        saved.setdefault(name, {})[kind] = tensor
    if saved and saved.keys() != free:
        odd = sorted(saved.keys() ^ free)[:10]
        raise ValueError(
            f"the checkpoint's optimizer state and optim.groups disagree on {odd}; give the groups of that run"
        )
    for name, parameter in module.named_parameters():
        if name in saved:
            optimizer.state[parameter] = {
                # the fused kernel wants the step count beside the parameter, and all in float32
                kind: tensor.to(parameter.device)
                for kind, tensor in saved[name].items()
            }
