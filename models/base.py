"""What every denoiser is given and how every denoiser is described.

A denoiser is an `nn.Module` called as `denoiser(x_t, t, cond)`:

    x_t (b, c, h, w)   noisy latent
    t   (b,)           noise time in [0, 1], 0 clean and 1 noise; the networks see 1000 t
    cond               a `Cond`: whatever there is to condition on, each field a batch of rows or None

and returns (b, c, h, w). It carries `.config`, the dataclass that built it.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.lora import LoRAConfig


@dataclass(frozen=True, slots=True)
class Region:
    """Where one encoder's numbers lie in a `Cond`: its tokens and features of the text, and its part of pooled."""

    tokens: slice
    features: slice
    pooled: slice


@dataclass(slots=True)
class Cond:
    """Conditioning of a batch; a denoiser reads the fields it knows.

    text (b, n, d) states, text_mask (b, n) bool with True at tokens (None: all are tokens), pooled (b, p),
    class_id (b,) int64, size_ids (b, 6) float32: original height, width, crop top, left, target height, width, in
    pixels (SDXL), or (b, 5) with the aesthetic score for the target's (its refiner).
    """

    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    class_id: Tensor | None = None
    size_ids: Tensor | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Cond":
        """Move every field to `device`; `dtype` is for text and pooled: in bfloat16, 1023 pixels would be 1024."""

        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None, non_blocking=True)

        sizes = self.size_ids
        return replace(self._map(move), size_ids=None if sizes is None else sizes.to(device=device, non_blocking=True))

    def select(self, rows: Tensor | slice) -> "Cond":
        """Rows by boolean mask (b,), by index (k,) or by slice; an index may repeat a row."""
        return self._map(lambda x: x[rows])

    def cut(self, tokens: int) -> "Cond":
        """The first `tokens` text tokens, the rest being padding."""
        text, mask = self.text, self.text_mask
        return replace(
            self,
            text=None if text is None else text[:, :tokens],
            text_mask=None if mask is None else mask[:, :tokens],
        )

    def where(self, drop: Tensor, null: "Cond") -> "Cond":
        """Take the single row of `null` wherever `drop` (b,) bool is True: classifier-free guidance's dropout."""

        def choose(name: str, rows: Sequence[Tensor]) -> Tensor:
            x, other = rows
            if other.shape[0] != 1 or other.shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"null.{name} has shape {tuple(other.shape)} beside cond.{name} {tuple(x.shape)}; "
                    "the null condition has one row and the same row shape, so encode it to the same length"
                )
            return torch.where(drop.view(-1, *[1] * (x.ndim - 1)), other.to(x.dtype), x)

        return Cond._zip([self, null], choose)

    def where_regions(self, drops: Tensor, null: "Cond", regions: Sequence[Region]) -> "Cond":
        """`where` for each encoder by itself: `drops` (b, k) bool says which of k regions of a row become the null's.

        Encoders that share tokens share their mask: it stays the row's as long as one of them is kept, whose states
        would be hidden otherwise, and is the null's when all are dropped. `null` is as for `where`.
        """
        if self.text is None or null.text is None:
            raise ValueError("cond.text is None: regions are those of text encoders; give a condition on text")
        text, pooled = self.text.clone(), None if self.pooled is None else self.pooled.clone()
        kept = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
        for drop, region in zip(drops.unbind(1), regions, strict=True):
            rows, here = drop[:, None], (slice(None), region.tokens, region.features)
            text[here] = torch.where(rows[..., None], null.text[here].to(text.dtype), text[here])
            kept[:, region.tokens] |= ~rows
            if pooled is not None and null.pooled is not None:
                mine = slice(None), region.pooled
                pooled[mine] = torch.where(rows, null.pooled[mine].to(pooled.dtype), pooled[mine])
        mask, other = self.text_mask, null.text_mask
        mask = mask if mask is None or other is None else torch.where(kept, mask, other)
        return replace(self, text=text, text_mask=mask, pooled=pooled)

    @staticmethod
    def cat(conds: Sequence["Cond"]) -> "Cond":
        """Concatenate batches; every one has the same fields and the same text length."""
        return Cond._zip(conds, lambda _, rows: torch.cat(list(rows)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Cond":
        return Cond(*(None if (x := getattr(self, f.name)) is None else change(x) for f in fields(self)))

    @staticmethod
    def _zip(conds: Sequence["Cond"], join: Callable[[str, Sequence[Tensor]], Tensor]) -> "Cond":
        """Join field by field; a field is in all or in none, but an absent mask beside a mask is all True."""
        joined = Cond()
        for field in fields(Cond):
            rows = [getattr(cond, field.name) for cond in conds]
            if field.name == "text_mask" and any(row is not None for row in rows):
                rows = [cond.text_mask if cond.text_mask is not None else _all_tokens(cond) for cond in conds]
            given = [row for row in rows if row is not None]
            if given and len(given) == len(rows):
                setattr(joined, field.name, join(field.name, given))
            elif given:
                raise ValueError(f"cond.{field.name} is given in some conditions and None in others; give all or none")
        return joined


def _all_tokens(cond: Cond) -> Tensor | None:
    return None if cond.text is None else cond.text.new_ones(cond.text.shape[:2], dtype=torch.bool)


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """Description of a denoiser. Subclasses add their fields and `build`.

    in_channels: channels of the latent. patch_size: side of a token in latent cells. base_size: side of the latent at
    which positions count 0, 1, 2, ...; other sizes are anchored to that range. lora: adapters to train on it,
    which are no part of what the network is, nor of its config.json.

    A subclass's `__post_init__` calls its parent's by name: `super()` without arguments does not work in a class that
    `slots=True` has rebuilt.
    """

    condition: ClassVar[str] = "text"  # or "class": what there must be in a `Cond`

    in_channels: int = 4
    patch_size: int = 2
    base_size: int = 32
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig, compare=False)

    def __post_init__(self) -> None:
        require_positive(self, "in_channels", "patch_size", "base_size")
        if self.base_size % self.patch_size:
            raise ValueError(indivisible(self.patch_size, self.base_size))

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network, freshly initialised, on the current default device."""
        raise NotImplementedError


def require_positive(config: ModelConfig, *names: str) -> None:
    """Refuse a field that is not a whole number from 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"model.{name}={getattr(config, name)} is not positive; give a whole number from 1")


def indivisible(patch_size: int, side: int) -> str:
    """Say that a latent side is not a whole number of patches, and what would be."""
    choices = ", ".join(str(k) for k in range(1, min(side, 16) + 1) if side % k == 0)
    return f"model.patch_size={patch_size} does not divide the latent side {side}; choose one of {choices}"
