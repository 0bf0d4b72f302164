"""Text-to-image DiT with cross-attention and adaLN-single (PixArt-alpha, Chen et al. 2023, arXiv 2310.00426).

    m = W silu(time_mlp(t)) + b                                        once, for all blocks
    shift_msa, ..., gate_mlp = m + table_i                             per block i: 6 x hidden numbers, not a linear
    x <- x + gate_msa attn(LN(x) (1 + scale_msa) + shift_msa)
    x <- x + cross_attn(x, text)                                       neither normed nor gated; starts at zero
    x <- x + gate_mlp mlp(LN(x) (1 + scale_mlp) + shift_mlp)

Self-attention, MLP, patch embedding, time MLP and last linear have the names and shapes of `models.ccdit`, so that a
class-conditioned trunk can be carried over tensor by tensor.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Cond, require_positive
from models.layers import (
    MLP,
    CrossAttention,
    PatchTransformer,
    SelfAttention,
    TransformerConfig,
    gated,
    gelu_tanh,
    init_small,
    init_zero,
    modulate,
    open_empty,
    text_states,
)


@dataclass(slots=True, kw_only=True)
class PixArtConfig(TransformerConfig):
    """PixArt-XL/2 at 256 px for T5-XXL states, without the learnt variance."""

    text_dim: int = 4096

    def __post_init__(self) -> None:
        TransformerConfig.__post_init__(self)
        require_positive(self, "text_dim")

    def build(self) -> "PixArt":
        return PixArt(self)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden = config.hidden
        self.table = nn.Parameter(torch.empty(6, hidden))
        self.attn = SelfAttention(hidden, config.heads, config.qk_norm)
        self.cross_attn = CrossAttention(hidden, config.heads, hidden)
        self.mlp = MLP(hidden, config.mlp_ratio * hidden, hidden, gelu_tanh)

    def forward(self, x: Tensor, m: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (m + self.table).chunk(6, dim=1)
        x = gated(x, gate_msa, self.attn(modulate(x, shift_msa, scale_msa)))
        x = x + self.cross_attn(x, text, mask)
        return gated(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)))


class Final(nn.Module):
    """Norm modulated by the time embedding itself, and the linear from tokens to patches."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.table = nn.Parameter(torch.empty(2, config.hidden))
        self.linear = nn.Linear(config.hidden, config.patch_width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (time[:, None] + self.table).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))


class PixArt(PatchTransformer):
    """Denoiser conditioned on text states through cross-attention."""

    config: PixArtConfig

    def __init__(self, config: PixArtConfig):
        super().__init__(config)
        self.modulation = nn.Linear(config.hidden, 6 * config.hidden)
        self.text_mlp = MLP(config.text_dim, config.hidden, config.hidden, gelu_tanh)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final = Final(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as PixArt does."""
        self.init_linears()
        init_small(self.text_mlp)
        nn.init.normal_(self.modulation.weight, std=0.02)
        init_zero(self.final.linear)
        for part in self.modules():
            if isinstance(part, Block | Final):
                nn.init.normal_(part.table, std=self.config.hidden**-0.5)
            if isinstance(part, Block):
                init_zero(part.cross_attn.out)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predict from x_t (b, c, h, w) at t (b,) given cond.text (b, n, text_dim) and cond.text_mask (b, n)."""
        text = self.text_mlp(text_states(cond.text, cond.text_mask, self.config.text_dim))  # b m hidden
        mask = None if cond.text_mask is None else open_empty(cond.text_mask)[:, None, None]  # b 1 1 m
        x = self.tokens(x_t)  # b n hidden
        time = self.embed_time(t)  # b hidden
        m = self.modulation(F.silu(time)).unflatten(-1, (6, -1))  # b 6 hidden
        for block in self.blocks:
            x = self.run(block, x, m, text, mask)
        return self.image(self.final(x, time), *x_t.shape[2:])
