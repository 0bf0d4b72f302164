"""Text states on disk: found by the hash of their caption, without padding, in 16 bits or in 8.

A caption is one safetensors file, whose tensors lie in this order:

    pooled   (p,) float16, where the encoders have it
    scale    (k, d/g) float16: with 8 bits, of each token's groups of g channels
    states   (k, d) of the k tokens that are not padding, float16 or int8
    mask     (n,) bool: which of the n tokens the k are, where padding is marked as such

Eight bits are `round(x / s)` with `s = max |x| / 127` over a group of at most 64 channels. A CLIP has channels
thirty times as large as the others; a scale for a whole token would leave those others a handful of values.
"""

from dataclasses import dataclass
from math import gcd

import numpy as np
from safetensors.numpy import save
from torch import Tensor
from xxhash import xxh3_64_intdigest

GROUP = 64
ORDER = ("pooled", "scale", "states", "mask")
TEXTS = np.dtype(
    [  # of a caption: its hash, where its tensors lie, their checksum, how many tokens are real, where the last ends
        ("caption", "<u8"), ("shard", "<i4"), ("start", "<i8"), ("check", "<u4"), ("tokens", "<i4"), ("end", "<i4")
    ]
)  # fmt: skip


def caption_hash(caption: str) -> int:
    """64 bits of a caption: what its states are found by. Among a billion captions two share them once in 37 sets."""
    return xxh3_64_intdigest(caption.encode())


@dataclass(slots=True, kw_only=True)
class TextLayout:
    """How the text states of a set are stored, and which encoders made them."""

    dtype: str  # float16 or int8
    width: int
    length: int  # tokens of a caption, padding included
    masked: bool
    encoder: str  # a digest of the weights
    pooled: int = 0

    def __post_init__(self):
        if self.dtype not in ("float16", "int8"):
            raise ValueError(f"text states are stored as float16 or int8, not as {self.dtype}")

    @property
    def group(self) -> int:
        """Channels that share a scale."""
        return gcd(self.width, GROUP)

    def pack(
        self, states: np.ndarray, pooled: np.ndarray | None, mask: np.ndarray | None
    ) -> tuple[bytes, int, int, int]:
        """States (n, d), pooled vector (p,) and mask (n,) as a file; its header's bytes, real tokens, their end."""
        if states.shape[1] != self.width or len(states) > self.length or (pooled is not None) != bool(self.pooled):
            raise ValueError(f"text states of {states.shape} do not fit {self}")
        if mask is None or not self.masked:
            mask = np.arange(self.length) < len(states)
        states = states[mask[: len(states)]]
        found = {"states": _finite(states)}
        if self.dtype == "int8":
            found["states"], found["scale"] = quantise(states, self.group)
        if self.masked:
            found["mask"] = np.ascontiguousarray(mask, np.bool_)
        if pooled is not None:
            found["pooled"] = _finite(pooled)
        content = save(found)
        begin = 8 + int.from_bytes(content[:8], "little")
        assert content[begin:] == b"".join(found[name].tobytes() for name in ORDER if name in found)
        return content, begin, len(states), 1 + int(np.flatnonzero(mask).max(initial=0))


def quantise(states: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(k, d) float -> int8 (k, d) and the float16 scale (k, d/group) that `restore` multiplies by."""
    x = np.asarray(states, np.float32).reshape(len(states), -1, group)
    scale = _finite(np.abs(x).max(-1) / 127)
    steps = np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
    return np.rint(x / steps).clip(-127, 127).astype(np.int8).reshape(states.shape), scale


def restore(states: Tensor, scale: Tensor) -> Tensor:
    """int8 (..., d) and scale (..., d/g) -> float32 (..., d)."""
    return (states.float().unflatten(-1, (scale.shape[-1], -1)) * scale.float()[..., None]).flatten(-2)


def _finite(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # said below
        stored = np.ascontiguousarray(array, "<f2")
    if not np.isfinite(stored).all():
        raise ValueError("text states have values that are not finite in float16; check what encoded them")
    return stored
