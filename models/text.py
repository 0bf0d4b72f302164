"""Frozen text encoders behind one `encode`, and the `Conditioner` that turns captions into a `Cond`.

All read the same caption, and what each is follows from the config.json beside its weights:

    CLIP          states joined along the features; pooled vectors of those with a projection joined too
    T5, T5Gemma   states follow along the sequence, the narrower ones padded with zeros to the wider

    SD 1.x  CLIP-L                  77 x 768                  SDXL     CLIP-L, bigG           77 x 2048,          1280
    PixArt  T5-XXL           120 or 300 x 4096                SD3      CLIP-L, bigG, T5-XXL   (77 + 256) x 4096,  2048

The null condition is the encoding of the empty caption, or zeros, in the trainer and in the sampler alike.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Cond
from models.pretrained import FrozenConfig
from models.unet import SIZE_DIM


@dataclass(slots=True, kw_only=True)
class TextConfig(FrozenConfig):
    """Which encoders there are, and how they are read.

    encoders, tokenizers: a subfolder for each, "" for the folder itself. penultimate: CLIP's last states but one, as
    SDXL and SD3 take them; else the last, normed, as SD 1.x. length: tokens of each T5. masked: say which tokens are
    padding, to T5 and to the denoiser; public SD, SDXL and SD3 weights were trained without. lower: captions in small
    letters, as PixArt's. empty, width: tokens of zeros behind CLIP's, and how wide, which stand for a T5 left out.
    zero_null: the null condition is zeros, as SDXL's, and not the empty caption.
    """

    group: ClassVar[str] = "text"

    encoders: list[str] = field(default_factory=lambda: ["text_encoder", "text_encoder_2"])
    tokenizers: list[str] = field(default_factory=lambda: ["tokenizer", "tokenizer_2"])
    penultimate: bool = True
    length: int | None = None
    masked: bool = True
    lower: bool = False
    empty: int = 0
    width: int = 0
    zero_null: bool = False

    def __post_init__(self):
        if len(self.encoders) != len(self.tokenizers) or not self.encoders:
            raise ValueError(
                f"text.encoders={self.encoders} and text.tokenizers={self.tokenizers} must pair up one to one;"
                " name one tokenizer folder for each encoder"
            )
        if self.length is not None and self.length < 1:
            raise ValueError(f"text.length={self.length} is not positive; 120 and 256 are usual")
        if min(self.empty, self.width) < 0 or (self.empty > 0) != (self.width > 0):
            raise ValueError(
                f"text.empty={self.empty} and text.width={self.width} stand together for a T5 that is left out;"
                " give both, as 77 and 4096 for SD3, or leave both at 0"
            )

    def build(self) -> "TextEncoders":
        """Load them all, frozen."""
        from transformers import AutoTokenizer, PreTrainedConfig  # slow to import
        from transformers.utils import logging

        logging.disable_progress_bar()  # of reading a file: it would break into ours
        logging.set_verbosity_error()  # about a T5's decoder, which is left out; what is missing is an error here
        tokenizers, encoders = [], []
        for folder, tokenizer in zip(self.encoders, self.tokenizers, strict=True):
            described, _ = self.read(PreTrainedConfig.get_config_dict, folder)
            kind, options = self._kind(described)
            tokenizers.append(self.read(AutoTokenizer.from_pretrained, tokenizer))
            encoders.append(self.network(kind, folder, dtype=self.precision.value, **options))
        return TextEncoders(self, tokenizers, encoders)

    def _kind(self, described: dict[str, Any]) -> tuple[type, dict[str, Any]]:
        """The class of an encoder by its config.json, and what its `from_pretrained` must be told."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, T5GemmaEncoderModel

        projects = "CLIPTextModelWithProjection" in (described.get("architectures") or [])
        known = {
            "clip_text_model": (CLIPTextModelWithProjection if projects else CLIPTextModel, {}),
            "t5": (T5EncoderModel, {}),
            "t5gemma": (T5GemmaEncoderModel, {"is_encoder_decoder": False}),
        }
        name = described.get("model_type")
        if name not in known:
            raise ValueError(
                f"text.path={self.path} has an encoder of model_type={name!r}; choose among {', '.join(known)}"
            )
        if name != "clip_text_model" and self.length is None:
            raise ValueError(f"text.length must be given for the {name} encoder of text.path={self.path}; 120 is usual")
        return known[name]


class TextEncoders(nn.Module):
    """Several encoders read as one: states (b, length, width) and pooled (b, pooled_width), 0 being none."""

    def __init__(self, config: TextConfig, tokenizers: list[Any], encoders: list[nn.Module]):
        super().__init__()
        self.config = config
        self.tokenizers = tokenizers
        self.encoders = nn.ModuleList(encoders)
        clip: list[Any] = [encoder for encoder in encoders if _is_clip(encoder)]
        rest = [encoder for encoder in encoders if not _is_clip(encoder)]
        self.clip_length: int = min((one.config.max_position_embeddings for one in clip), default=0)
        self.length: int = self.clip_length + len(rest) * (config.length or 0) + config.empty
        self.width: int = max(sum(map(_width, clip)), *map(_width, rest), config.width)
        self.pooled_width: int = sum(one.config.projection_dim for one in clip if hasattr(one, "text_projection"))

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Captions -> (states, mask or None, pooled or None), the floats in float32; captions too long are cut."""
        config = self.config
        if config.lower:
            captions = [caption.lower().strip() for caption in captions]
        clip, parts = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            (clip if _is_clip(encoder) else parts).append(self._read(tokenizer, encoder, captions))
        if clip:
            parts.insert(0, (torch.cat([states for states, *_ in clip], -1), clip[0][1], None))
        if config.empty:
            zeros = parts[0][0].new_zeros(len(captions), config.empty, config.width)
            parts.append((zeros, zeros.new_zeros(zeros.shape[:2], dtype=torch.bool), None))
        states = torch.cat([F.pad(states, (0, self.width - states.shape[-1])) for states, *_ in parts], 1)
        mask = torch.cat([mask for _, mask, _ in parts], 1) if config.masked else None
        pooled = torch.cat([x for *_, x in clip if x is not None], -1).float() if self.pooled_width else None
        return config.require_finite(states.float(), "states"), mask, pooled

    def _read(self, tokenizer: Any, encoder: nn.Module, captions: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """States (b, n, width), mask (b, n), and pooled (b, projection) or None, of one encoder."""
        clip, config = _is_clip(encoder), self.config
        tokens = tokenizer(
            captions, padding="max_length", max_length=self.clip_length if clip else config.length,
            truncation=True, padding_side="right", return_tensors="pt",  # Gemma's tokenizer would pad on the left
        ).to(next(encoder.parameters()).device)  # fmt: skip
        mask = tokens.attention_mask
        if clip:
            # no attention mask: CLIP attends causally, so padding changes nothing before it, and SD passes none
            output = encoder(tokens.input_ids, output_hidden_states=True)
            states = output.hidden_states[-2] if config.penultimate else output.last_hidden_state
            return states, mask.bool(), output.get("text_embeds")
        # one that is not masked reads its padding too, as SD3's
        output = encoder(tokens.input_ids, attention_mask=mask if config.masked else torch.ones_like(mask))
        return output.last_hidden_state, mask.bool(), None


def _is_clip(encoder: Any) -> bool:
    return encoder.config.model_type == "clip_text_model"


def _width(encoder: Any) -> int:
    return encoder.get_input_embeddings().embedding_dim


SIZE_COLUMNS = {
    6: [0, 1, 2, 3, 4, 5],
    5: [0, 1, 2, 3, 6],
}  # SDXL's, and its refiner's, of the seven numbers in `Batch.sizes`


class Conditioner:
    """Captions and class labels to the `Cond` that a denoiser reads, and the null of the same shape.

    `text` is None for a denoiser conditioned on classes, `num_classes` None for one conditioned on text. `vector_dim`
    is that of a UNet which reads the picture's size beside the pooled text, 0 for others.
    """

    def __init__(self, text: TextEncoders | None = None, num_classes: int | None = None, vector_dim: int = 0):
        self.text = text
        self.num_classes = num_classes
        self._null: Cond | None = None
        self._columns: list[int] | None = None
        if text and vector_dim:
            count, rest = divmod(vector_dim - text.pooled_width, SIZE_DIM)
            if rest or count not in SIZE_COLUMNS:
                fits = " or ".join(str(text.pooled_width + n * SIZE_DIM) for n in SIZE_COLUMNS)
                raise ValueError(
                    f"model.vector_dim={vector_dim} is not a pooled text of {text.pooled_width} and 6 numbers of"
                    f" {SIZE_DIM} (SDXL) or 5 (its refiner); give model.vector_dim={fits}, or the text encoders that"
                    " the model was made for"
                )
            self._columns = SIZE_COLUMNS[count]

    def __call__(self, captions: list[str] | None = None, class_id: Tensor | None = None) -> Cond:
        """Cond for b captions, or for b class labels."""
        if self.text is None:
            if class_id is None:
                raise ValueError("this model is conditioned on classes: give class labels, not a prompt")
            return Cond(class_id=class_id)
        if captions is None:
            raise ValueError("this model is conditioned on text: give a prompt, not a class label")
        states, mask, pooled = self.text.encode(captions)
        return Cond(text=states, text_mask=mask, pooled=pooled)

    def null(self, device: torch.device | str = "cpu") -> Cond:
        """One row: the empty caption, zeros, or the label after the last class; sizes are never null."""
        if self._null is None:
            self._null = self([""]) if self.text else self(class_id=torch.tensor([self.num_classes]))
            if self.text and self.text.config.zero_null:
                text, pooled = self._null.text, self._null.pooled
                self._null.text = None if text is None else torch.zeros_like(text)
                self._null.pooled = None if pooled is None else torch.zeros_like(pooled)
        return self._null.to(device)

    def size_ids(self, sizes: Tensor) -> Tensor | None:
        """What the model reads, if anything, of `sizes` (b, 7) as `data.loader.Batch` has them."""
        return None if self._columns is None else sizes[:, self._columns]
