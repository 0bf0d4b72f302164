"""The networks of a checkpoint: its own weights, or adapters merged into the base that they were trained on.

Such a checkpoint names its base by path and SHA-256 (`inference.description.Base`). What is opened here is a plain
network in either case, which draws, is exported and is trained further like any other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.description import Base, Description, find
from models.folder import sha256
from models.lora import networks
from models.text import TextEncoders
from models.weights import load_denoiser, locate, unwrap


def load_networks(folder: Path, weights: str = "ema") -> tuple[Description, Any, TextEncoders | None]:
    """Description, denoiser and text encoders of a folder with pipeline.json; `weights` is ema or model.

    ValueError if the base of adapters is missing or another than it was.
    """
    description = Description.load(folder)
    text = description.text.build() if description.text else None
    return description, _denoiser(folder, description.base, text, weights), text


def _denoiser(folder: Path, base: Base | None, text: TextEncoders | None, weights: str) -> Any:
    """The denoiser; what stands on a base also changes `text` in place."""
    if base is None:
        return load_denoiser(folder / "denoiser", name=weights)
    from inference.lora import apply

    denoiser = open_base(base, folder)
    apply(denoiser, text, [(folder / "denoiser" / f"{weights}.safetensors", 1.0)])
    return denoiser


class Stacked:
    """LoRA files on networks from which they can be taken again: what they change is kept as it was, in main memory."""

    def __init__(self):
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def set(self, denoiser: Any, text: TextEncoders | None, loras: Sequence[tuple[str | Path, float]]) -> None:
        """Take off what was set before, and put these on, each with its weight."""
        from inference.lora import changes

        found = changes(denoiser, text, loras)
        parts = networks(unwrap(denoiser), text).items()
        tensors = {f"{part}.{name}": x for part, network in parts for name, x in network.state_dict().items()}
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError("LoRAs cannot be set on weights that are offloaded; give them to Pipeline.load instead")
        for name, before in self._before.items():
            tensors[name].copy_(before)
        self._before = {name: change.tensor.cpu().clone() for name, change in found.items()}
        for change in found.values():
            change.make()


def find_base(path: str | Path, weights: str) -> Base:
    """The base that a run folder, checkpoint or pipeline is for adapters; its text encoders must be plain files."""
    folder = find(path)
    known = Description.load(folder)
    if known.base and known.text and known.text.lora.rank is not None:
        raise ValueError(
            f"{folder} has adapters on its text encoders, on which nothing can be trained further; give init.from="
            f"{known.base.path}, which they were trained on"
        )
    return Base(path=str(folder), weights=weights, sha256=sha256(folder / "denoiser" / f"{weights}.safetensors"))


def open_base(base: Base, holder: Path) -> Any:
    """The denoiser that the adapters of `holder` stand on, if it is what it was."""
    folder = Path(locate(base.path))
    file = folder / "denoiser" / f"{base.weights}.safetensors"
    if not file.is_file():
        raise ValueError(
            f"{holder} holds adapters alone, and {base.path}, which they were trained on, has no denoiser's"
            f" {base.weights}.safetensors; put it back there"
        )
    if (digest := sha256(file)) != base.sha256:
        raise ValueError(
            f"{holder} holds adapters for {base.path} with the SHA-256 {base.sha256[:10]}, but the weights there have"
            f" {digest[:10]}; put back those that they were trained on"
        )
    return _denoiser(folder, Description.load(folder).base, None, base.weights)
