"""Frozen text encoders behind one `encode`, and the `Conditioner` that turns captions into a `Cond`.

The layout is SDXL's: a CLIP and an OpenCLIP encoder read the same caption. Their penultimate states are joined
along the features, and the second one's projected embedding is the pooled vector. The null condition is the
encoding of the empty caption, in the trainer and in the sampler alike.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.base import Cond
from models.weights import locate


@dataclass(slots=True, kw_only=True)
class TextConfig:
    """Where the encoders are: one folder or hub name, with a subfolder for each encoder and tokenizer."""

    path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    encoders: list[str] = field(default_factory=lambda: ["text_encoder", "text_encoder_2"])
    tokenizers: list[str] = field(default_factory=lambda: ["tokenizer", "tokenizer_2"])
    revision: str | None = None

    def __post_init__(self):
        if len(self.encoders) != len(self.tokenizers) or not self.encoders:
            raise ValueError(
                f"text.encoders={self.encoders} and text.tokenizers={self.tokenizers} must pair up one to one;"
                " name one tokenizer folder for each encoder"
            )

    def build(self) -> "TextEncoders":
        """Load them all, frozen. Only the last needs a projection, whose output is the pooled vector."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # slow to import
        from transformers.utils import logging

        logging.disable_progress_bar()  # of reading a file: it would break into ours
        kinds = [CLIPTextModel] * (len(self.encoders) - 1) + [CLIPTextModelWithProjection]
        where = {"pretrained_model_name_or_path": locate(self.path), "revision": self.revision}
        return TextEncoders(
            [CLIPTokenizer.from_pretrained(subfolder=name, **where) for name in self.tokenizers],
            [kind.from_pretrained(subfolder=name, **where) for kind, name in zip(kinds, self.encoders, strict=True)],
        )


class TextEncoders(nn.Module):
    """Several CLIP encoders read as one: states (b, n, sum of widths), mask (b, n), pooled (b, projection)."""

    def __init__(self, tokenizers: list[Any], encoders: list[nn.Module]):
        super().__init__()
        self.tokenizers = tokenizers
        self.encoders = nn.ModuleList(encoders).eval().requires_grad_(False)
        configs: list[Any] = [encoder.config for encoder in encoders]
        self.width: int = sum(config.hidden_size for config in configs)
        self.pooled_width: int = configs[-1].projection_dim
        self.length: int = min(config.max_position_embeddings for config in configs)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Captions -> (states, mask, pooled); longer captions are cut at `length` tokens."""
        states, masks, pooled = [], [], torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            tokens = tokenizer(
                captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            ).to(next(encoder.parameters()).device)
            # no attention mask: CLIP attends causally, so padding changes nothing before it, and SD passes none
            output = encoder(tokens.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            masks.append(tokens.attention_mask.bool())
            pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        return torch.cat(states, -1), masks[0], pooled


class Conditioner:
    """Captions and class labels to the `Cond` that a denoiser reads, and the null of the same shape.

    `text` is None for a denoiser conditioned on classes, `num_classes` None for one conditioned on text.
    """

    def __init__(self, text: TextEncoders | None = None, num_classes: int | None = None):
        self.text = text
        self.num_classes = num_classes
        self._null: Cond | None = None

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
        """One row: the empty caption, or the label after the last class."""
        if self._null is None:
            self._null = self([""]) if self.text else self(class_id=torch.tensor([self.num_classes]))
        return self._null.to(device)
