"""Text states of captions into shards, and the digest of the encoders that made them."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch

from data.shards import Shard, ShardWriter
from data.texts import TextLayout


class TextEncoders(Protocol):
    """What is needed of `models.text.TextEncoders`."""

    def encode(self, captions: list[str], /) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]: ...
    def state_dict(self) -> dict[str, torch.Tensor]: ...


def text_layout(text: TextEncoders, dtype: str) -> TextLayout:
    """How the states of these encoders are stored, in float16 or int8."""
    states, mask, pooled = text.encode([""])
    return TextLayout(
        dtype=dtype,
        width=states.shape[2],
        length=states.shape[1],
        masked=mask is not None,
        pooled=0 if pooled is None else pooled.shape[1],
        encoder=digest(text),
    )


@torch.inference_mode()
def add_texts(writer: Shard | ShardWriter, text: TextEncoders, captions: Sequence[str], batch: int = 64) -> None:
    """Encode captions, each once, and append their states."""
    distinct = list(dict.fromkeys(captions))
    for first in range(0, len(distinct), batch):
        some = distinct[first : first + batch]
        states, mask, pooled = (None if x is None else x.cpu() for x in text.encode(some))
        assert states is not None
        for i, caption in enumerate(some):
            writer.add_text(
                caption,
                states[i].float().numpy(),
                None if pooled is None else pooled[i].float().numpy(),
                None if mask is None else mask[i].numpy(),
            )


def digest(text: TextEncoders) -> str:
    """Sixteen letters of the SHA-256 of all weights."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(text.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]
