"""Public networks that stay as they are: found in a folder or by a hub's name, read whole, and frozen.

What the autoencoder and the text encoders have in common: where they are, in what precision they compute, and that a
file which lacks tensors, or an activation which overflows, is an error and never noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from models.weights import first_names, locate

T = TypeVar("T")


class FrozenPrecision(Enum):
    """How frozen parts compute; what they return is float32 in every case."""

    fp32 = torch.float32
    bf16 = torch.bfloat16
    fp16 = torch.float16


@dataclass(slots=True, kw_only=True)
class FrozenConfig:
    """Where a frozen part is, and how it is read.

    path: a folder or hub name in diffusers layout. revision: a commit of the hub, for the same weights tomorrow.
    variant: `fp16` reads the files that have it in their names.
    """

    group: ClassVar[str]  # the config group, for messages

    path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    revision: str | None = None
    variant: str | None = None
    precision: FrozenPrecision = FrozenPrecision.fp32

    def read(self, load: Callable[..., T], subfolder: str, **options: Any) -> T:
        """What `load` (a `from_pretrained`) makes of a subfolder; ValueError if that cannot be read."""
        try:
            return load(locate(self.path), subfolder=subfolder, revision=self.revision, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            way = f"give a folder or hub name in diffusers layout, or {self.group}.variant=fp16 if its files say that"
            if "tiktoken" in reason:  # what transformers asks for, of a spiece.model that it could not open
                way = "pip install sentencepiece protobuf"
            raise ValueError(
                f"{self.group}.path={self.path} has nothing readable in {subfolder or 'it'}: {reason}; {way}"
            ) from error

    def network(self, kind: Any, subfolder: str, **options: Any) -> Any:
        """The network of class `kind` in a subfolder, frozen; ValueError if its file lacks tensors."""
        options |= {"variant": self.variant, "output_loading_info": True}
        module, info = self.read(kind.from_pretrained, subfolder, **options)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{self.group}.path={self.path} lacks tensors of a {kind.__name__} in {subfolder or 'it'}:"
                f" {first_names(missing)}; copy or download it again"
            )
        return module.eval().requires_grad_(False)

    def require_finite(self, x: Tensor, what: str) -> Tensor:
        """`x` itself, if all of it is finite."""
        if not x.isfinite().all():
            cause = (
                f"float16 overflows in it; set {self.group}.precision=bf16 or fp32"
                if self.precision is FrozenPrecision.fp16
                else "its weights or what it was given are broken; check the files and the data"
            )
            raise ValueError(f"{self.group}.path={self.path} gave {what} that are not finite: {cause}")
        return x
