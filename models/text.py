"""Text encoders, frozen but for adapters, behind one `encode`, and the `Conditioner` that turns captions into a `Cond`.

All read the same caption, and what each is follows from the config.json beside its weights:

    CLIP          states joined along the features; pooled vectors of those with a projection joined too
    T5, T5Gemma   states follow along the sequence, the narrower ones padded with zeros to the wider

    SD 1.x  CLIP-L                  77 x 768                  SDXL     CLIP-L, bigG           77 x 2048,          1280
    PixArt  T5-XXL           120 or 300 x 4096                SD3      CLIP-L, bigG, T5-XXL   (77 + 256) x 4096,  2048

The null condition is the encoding of the empty caption, or zeros, in the trainer and in the sampler alike.

A caption is one fragment of weight 1. A prompt may be several, and longer than CLIP reads at once:

    CLIP          tokens of each segment in chunks of 77 - 2, each with its start, end and padding, encoded alone and
                  joined along the sequence; pooled is the first chunk's
    T5, T5Gemma   all tokens in one row, cut to its length
    weights       multiply the states of their tokens; then all states of a chunk are scaled to the mean they had
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Cond, Region
from models.lora import LoRAConfig
from models.pretrained import FrozenConfig
from models.unet import SIZE_DIM

Fragment = tuple[str, float]  # text and its weight
Segments = Sequence[Sequence[Fragment]]  # one prompt; each segment starts a chunk of its own
Tokens = list[tuple[int, float]]  # and the weight of each

EMPTY: Segments = ((("", 1.0),),)


@dataclass(slots=True, kw_only=True)
class TextConfig(FrozenConfig):
    """Which encoders there are, and how they are read.

    encoders, tokenizers: a subfolder for each, "" for the folder itself. penultimate: CLIP's last states but one, as
    SDXL and SD3 take them; else the last, normed, as SD 1.x. length: tokens of each T5. masked: say which tokens are
    padding, to T5 and to the denoiser; public SD, SDXL and SD3 weights were trained without. lower: captions in small
    letters, as PixArt's. empty, width: tokens of zeros behind CLIP's, and how wide, which stand for a T5 left out.
    zero_null: the null condition is zeros, as SDXL's, and not the empty caption. lora: adapters to train on them.
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
    lora: LoRAConfig = field(default_factory=LoRAConfig)

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
        self.pooled_width: int = sum(map(_pooled_width, clip))
        self.frozen = True  # or adapters learn, so that nothing encoded is worth keeping
        self.home: torch.device | None = None  # where to compute, of encoders whose weights wait elsewhere

    @property
    def regions(self) -> list[Region]:
        """Each encoder's share of what `encode` returns, in the order of `text.encoders`."""
        regions, tokens, features, pooled = [], self.clip_length, 0, 0
        for encoder in self.encoders:
            width, projected, length = _width(encoder), _pooled_width(encoder), self.config.length or 0
            if _is_clip(encoder):
                mine = slice(features, features + width), slice(pooled, pooled + projected)
                regions.append(Region(slice(0, self.clip_length), *mine))
                features, pooled = features + width, pooled + projected
            else:
                regions.append(Region(slice(tokens, tokens + length), slice(0, width), slice(0, 0)))
                tokens += length
        return regions

    def linears(self, pooled: bool) -> list[list[str]]:
        """Names of the linears of each encoder's layers whose result is read, by `pooled` vectors too or not.

        Of CLIP's states the last but one are read, so that its last layer matters to the pooled vector alone.
        """
        found = []
        for encoder in self.encoders:
            names, config = [name for name, x in encoder.named_modules() if isinstance(x, nn.Linear)], encoder.config
            if _is_clip(encoder):
                last = f".layers.{config.num_hidden_layers - 1}."  # pyright: ignore
                unread = self.config.penultimate and not (pooled and _pooled_width(encoder))
                names = [name for name in names if ".layers." in name and not (unread and last in name)]
            found.append(names)
        return found

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Captions -> (states, mask or None, pooled or None), the floats in float32; captions too long are cut."""
        return self.encode_weighted([[[(caption, 1.0)]] for caption in captions], 1)

    def chunks_needed(self, prompts: Sequence[Segments]) -> int:
        """Chunks of CLIP that hold the longest of the prompts; 1 where there is no CLIP."""
        clip = [one for one, encoder in zip(self.tokenizers, self.encoders, strict=True) if _is_clip(encoder)]
        return max((len(chunks) for one in clip for chunks in self._chunks(one, prompts)), default=1)

    def encode_weighted(
        self, prompts: Sequence[Segments], chunks: int | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Prompts -> (states, mask or None, pooled or None), as `encode`.

        CLIP's states are `chunks` times as long, by default as many as the longest prompt needs: prompts with fewer
        are filled up with empty chunks, and those with more are cut.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self._encode(prompts, chunks)

    def _encode(self, prompts: Sequence[Segments], chunks: int | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config, chunks = self.config, chunks or self.chunks_needed(prompts)
        clip, parts = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            (clip if _is_clip(encoder) else parts).append(self._read(tokenizer, encoder, prompts, chunks))
        if clip:
            parts.insert(0, (torch.cat([states for states, *_ in clip], -1), clip[0][1], None))
        if config.empty:
            zeros = parts[0][0].new_zeros(len(prompts), config.empty, config.width)
            parts.append((zeros, zeros.new_zeros(zeros.shape[:2], dtype=torch.bool), None))
        states = torch.cat([F.pad(states, (0, self.width - states.shape[-1])) for states, *_ in parts], 1)
        mask = torch.cat([mask for _, mask, _ in parts], 1) if config.masked else None
        pooled = torch.cat([x for *_, x in clip if x is not None], -1).float() if self.pooled_width else None
        return config.require_finite(states.float(), "states"), mask, pooled

    def _read(
        self, tokenizer: Any, encoder: nn.Module, prompts: Sequence[Segments], chunks: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """States (b, n, width), mask (b, n), and pooled (b, projection) or None, of one encoder."""
        config, device, pooled = self.config, self.home or next(encoder.parameters()).device, None
        if _is_clip(encoder):
            found = [_filled(pieces, chunks) for pieces in self._chunks(tokenizer, prompts)]
            ids, mask, weights = _rows(tokenizer, list(chain(*found)), self.clip_length)
            # no attention mask: CLIP attends causally, so padding changes nothing before it, and SD passes none
            output = encoder(ids.to(device), output_hidden_states=True)
            states = output.hidden_states[-2] if config.penultimate else output.last_hidden_state
            pooled = output.get("text_embeds")
        else:
            joined = [list(chain(*segments)) for segments in self._tokens(tokenizer, prompts)]
            chunks, (ids, mask, weights) = 1, _rows(tokenizer, joined, config.length or 0)
            # one that is not masked reads its padding too, as SD3's
            read = mask.long() if config.masked else torch.ones_like(ids)
            states = encoder(ids.to(device), attention_mask=read.to(device)).last_hidden_state
        if (weights != 1).any():
            states = emphasised(states.float(), weights.to(device))
        states, mask = (rows.unflatten(0, (-1, chunks)).flatten(1, 2) for rows in (states, mask.to(device)))
        return states, mask, None if pooled is None else pooled[::chunks]

    def _chunks(self, tokenizer: Any, prompts: Sequence[Segments]) -> list[list[Tokens]]:
        """Each prompt's chunks for CLIP; a segment without tokens is a chunk all the same."""
        room, all_segments = self.clip_length - len(tokenizer("").input_ids), self._tokens(tokenizer, prompts)
        return [
            [segment[i : i + room] for segment in segments for i in range(0, max(len(segment), 1), room)]
            for segments in all_segments
        ]

    def _tokens(self, tokenizer: Any, prompts: Sequence[Segments]) -> list[list[Tokens]]:
        """Each prompt's segments as tokens and their weights, without the special ones."""
        texts = [text for prompt in prompts for segment in prompt for text, _ in segment]
        if self.config.lower:
            texts = [text.lower().strip() for text in texts]
        found = iter(tokenizer(texts, add_special_tokens=False).input_ids)  # all at once: that is fast
        return [
            [[(token, weight) for _, weight in segment for token in next(found)] for segment in prompt]
            for prompt in prompts
        ]


def _filled(chunks: list[Tokens], number: int) -> list[Tokens]:
    """So many of the chunks, or empty ones behind them."""
    return [*chunks, *[[]] * (number - len(chunks))][:number]


def _rows(tokenizer: Any, rows: list[Tokens], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and weights (b, length) of rows of tokens, cut, with special tokens about them and padding behind."""
    special = tokenizer("").input_ids  # such as a start and an end; of T5 an end alone, and there may be none
    inside = len(special) - (special[-1:] == [tokenizer.eos_token_id])
    start, end = ([(token, 1.0) for token in part] for part in (special[:inside], special[inside:]))
    full = [[*start, *row[: length - len(special)], *end] for row in rows]
    padded = [[*row, *[(tokenizer.pad_token_id, 1.0)] * (length - len(row))] for row in full]
    ids = torch.tensor([[token for token, _ in row] for row in padded])
    weights = torch.tensor([[weight for _, weight in row] for row in padded])
    return ids, torch.arange(length) < torch.tensor([[len(row)] for row in full]), weights


def emphasised(states: Tensor, weights: Tensor) -> Tensor:
    """States (b, n, d) times weights (b, n), each row then scaled to the mean that it had.

    The mean says something only where it is more than a hundredth of the root mean square, and where the scale comes
    out between 1/4 and 4. Elsewhere, as in states that a norm has centred, they stay as they were weighted.
    """
    weighted = states * weights[..., None]
    mean, scale = states.mean((1, 2)), states.mean((1, 2)) / weighted.mean((1, 2))
    sound = (mean.abs() > states.square().mean((1, 2)).sqrt() / 100) & (scale > 1 / 4) & (scale < 4)
    return weighted * torch.where(sound, scale, 1.0)[:, None, None]


def _is_clip(encoder: Any) -> bool:
    return encoder.config.model_type == "clip_text_model"


def _width(encoder: Any) -> int:
    return encoder.get_input_embeddings().embedding_dim


def _pooled_width(encoder: Any) -> int:
    return encoder.config.projection_dim if hasattr(encoder, "text_projection") else 0


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
        self._nulls: dict[int, Cond] = {}
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
        return self.weighted([[[(caption, 1.0)]] for caption in captions], 1)

    def weighted(self, prompts: Sequence[Segments], chunks: int | None = None) -> Cond:
        """Cond for b prompts of weighted fragments, in as many chunks as they need or as are given."""
        if self.text is None:
            raise ValueError("this model is conditioned on classes: give class labels, not a prompt")
        states, mask, pooled = self.text.encode_weighted(prompts, chunks)
        return Cond(text=states, text_mask=mask, pooled=pooled)

    def null(self, device: torch.device | str = "cpu", chunks: int = 1) -> Cond:
        """One row: the empty caption in each chunk, zeros, or the label after the last class; sizes are never null."""
        if chunks not in self._nulls or not (self.text is None or self.text.frozen):
            null = self.weighted([EMPTY], chunks) if self.text else self(class_id=torch.tensor([self.num_classes]))
            if self.text and self.text.config.zero_null:
                text, pooled = null.text, null.pooled
                null.text = None if text is None else torch.zeros_like(text)
                null.pooled = None if pooled is None else torch.zeros_like(pooled)
            self._nulls[chunks] = null
        return self._nulls[chunks].to(device)

    def forget(self) -> None:
        """Encode the null anew: the encoders have changed."""
        self._nulls.clear()

    @property
    def reads_score(self) -> bool:
        """Whether the model is told an aesthetic score."""
        return self._columns == SIZE_COLUMNS[5]

    def size_ids(self, sizes: Tensor) -> Tensor | None:
        """What the model reads, if anything, of `sizes` (b, 7) as `data.loader.Batch` has them."""
        return None if self._columns is None else sizes[:, self._columns]
