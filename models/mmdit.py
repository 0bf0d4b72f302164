"""Multimodal DiT: two streams that meet in attention (SD3, Esser et al. 2024, arXiv 2403.03206).

    c = time_mlp(t) + pooled_mlp(pooled)
    text  <- text  + gate attn_text     text  <- text  + gate mlp_text(...)         modulation, qkv and MLP of its own
    image <- image + gate attn_image    image <- image + gate mlp_image(...)        likewise
    attention: one softmax over the tokens of [text; image]

The last block's text stream only provides keys and values: nothing reads its output. Every modulation and the last
linear start at zero, so the network's first output is zero.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Cond, require_positive
from models.layers import (
    MLP,
    Final,
    PatchTransformer,
    SelfAttention,
    TransformerConfig,
    attend,
    gated,
    gelu_tanh,
    init_small,
    init_zero,
    modulate_by,
    text_states,
)


@dataclass(slots=True, kw_only=True)
class MMDiTConfig(TransformerConfig):
    """SD3-medium. The family's rule is hidden = 64 depth and heads = depth.

    table_size: cells of SD3's fixed position table, from whose middle `positions="crop"` cuts; its public weights want
    that and base_size 128. dual: how many blocks, from the first, have a second attention of the image to itself, as
    SD3.5-medium's 13.
    """

    in_channels: int = 16
    base_size: int = 128
    hidden: int = 1536
    depth: int = 24
    heads: int = 24
    text_dim: int = 4096  # width of the text states
    pooled_dim: int = 2048  # width of the pooled text state
    table_size: int = 192
    dual: int = 0

    def __post_init__(self) -> None:
        TransformerConfig.__post_init__(self)
        require_positive(self, "text_dim", "pooled_dim", "table_size")

    def build(self) -> "MMDiT":
        return MMDiT(self)


class Stream(nn.Module):
    """One modality's share of a block, with a second attention to itself if `dual`.

    With `last`, the text's in the last block: keys and values, nothing after.
    """

    def __init__(self, config: TransformerConfig, last: bool = False, dual: bool = False):
        super().__init__()
        hidden = config.hidden
        self.modulation = nn.Linear(hidden, (2 if last else 9 if dual else 6) * hidden)
        self.attn = SelfAttention(hidden, config.heads, config.qk_norm, project=not last)
        self.attn2 = SelfAttention(hidden, config.heads, config.qk_norm) if dual else None
        self.mlp = None if last else MLP(hidden, config.mlp_ratio * hidden, hidden, gelu_tanh)

    def before(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Queries, keys and values of the stream, and the modulation left for `after`."""
        shift, scale, *rest = self.modulation(c)[:, None].split(x.shape[-1], dim=-1)
        return self.attn.heads_of(x, modulate_by(shift, scale)), tuple(rest)

    def after(
        self, x: Tensor, y: Tensor, gate_msa: Tensor, shift: Tensor, scale: Tensor, gate_mlp: Tensor, *dual: Tensor
    ) -> Tensor:
        """What follows the attention's result y."""
        assert self.attn.out is not None
        assert self.mlp is not None
        out = gated(x, gate_msa, self.attn.out(y))
        if self.attn2 is not None:
            shift2, scale2, gate2 = dual
            out = gated(out, gate2, self.attn2(x, modulate_by(shift2, scale2)))
        return gated(out, gate_mlp, self.mlp(out, modulate_by(shift, scale)))


class Block(nn.Module):
    """Two streams and the attention they share."""

    def __init__(self, config: TransformerConfig, last: bool, dual: bool):
        super().__init__()
        self.text = Stream(config, last)
        self.image = Stream(config, dual=dual)

    def forward(self, text: Tensor, image: Tensor, c: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        text_qkv, text_rest = self.text.before(text, c)
        image_qkv, image_rest = self.image.before(image, c)
        y = attend(*(torch.cat(pair, dim=1) for pair in zip(text_qkv, image_qkv, strict=True)), mask=mask)
        del text_qkv, image_qkv  # large, and of no use while `after` needs room
        text_y, image_y = y.split([text.shape[1], image.shape[1]], dim=1)
        if text_rest:
            text = self.text.after(text, text_y, *text_rest)
        return text, self.image.after(image, image_y, *image_rest)


class MMDiT(PatchTransformer):
    """Denoiser conditioned on text states as tokens beside the picture's, and on a pooled text vector."""

    config: MMDiTConfig

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        self.table_size = config.table_size
        self.pooled_mlp = MLP(config.pooled_dim, config.hidden, config.hidden, F.silu)
        self.text_embed = nn.Linear(config.text_dim, config.hidden)
        self.blocks = nn.ModuleList(
            Block(config, last=i == config.depth - 1, dual=i < config.dual) for i in range(config.depth)
        )
        self.final = Final(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as DiT does; the paper does not say."""
        self.init_linears()
        init_small(self.pooled_mlp)
        init_zero(self.final.modulation, self.final.linear)
        for part in self.modules():
            if isinstance(part, Stream):
                init_zero(part.modulation)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, kept: Tensor | None = None, aligned: bool = False) -> Any:
        """Predict from x_t (b, c, h, w) at t (b,) given cond.text (b, m, text_dim), .text_mask and .pooled (b, p).

        kept and aligned are for training: see `walk` and `output`.
        """
        text = text_states(cond.text, cond.text_mask, self.config.text_dim)
        if cond.pooled is None or cond.pooled.shape[-1] != self.config.pooled_dim:
            width = "None" if cond.pooled is None else f"{cond.pooled.shape[-1]} wide"
            raise ValueError(
                f"model.pooled_dim={self.config.pooled_dim} but cond.pooled is {width}; "
                "give the pooled text vector that the model was made for, or set pooled_dim"
            )
        image = self.tokens(x_t)  # b n hidden
        text = self.text_embed(text).to(image.dtype)  # b m hidden
        c = F.silu(self.embed_time(t) + self.pooled_mlp(cond.pooled))  # b hidden
        mask = cond.text_mask  # b m; as keys b 1 1 m+n, all of the picture being open
        mask = None if mask is None else F.pad(mask, (0, image.shape[1]), value=True)[:, None, None]

        def step(block: nn.Module, image: Tensor) -> Tensor:
            nonlocal text
            keys = mask if mask is None or kept is None else mask[..., : text.shape[1] + image.shape[1]]
            text, image = self.run(block, text, image, c, keys)
            return image

        image, seen = self.walk(image, step, kept)
        return self.output(self.image(self.final(image, c), *x_t.shape[2:]), seen, aligned)
