"""Text-to-image DiT with cross-attention and adaLN-single (PixArt-alpha, Chen et al. 2023, arXiv 2310.00426).

    m = W silu(time_mlp(t)) + b                                        once, for all blocks
    shift_msa, ..., gate_mlp = m + table_i                             per block i: 6 x hidden numbers, not a linear
    x <- x + gate_msa attn(LN(x) (1 + scale_msa) + shift_msa)
    x <- x + cross_attn(x, text)                                       neither normed nor gated; starts at zero
    x <- x + gate_mlp mlp(LN(x) (1 + scale_mlp) + shift_mlp)

PixArt-Sigma (Chen et al. 2024, arXiv 2403.04692) shortens the self-attention of chosen blocks: before the softmax, the
keys and the values of each window of r x r tokens become one, LN(conv(k)) and LN(conv(v)) with one depthwise
convolution of stride r and one norm for both. The convolution starts as the mean of the window.

Self-attention, MLP, patch embedding, time MLP and last linear have the names and shapes of `models.ccdit`, so that a
class-conditioned trunk can be carried over tensor by tensor.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Cond, require_positive
from models.layers import (
    MLP,
    Before,
    CrossAttention,
    PatchTransformer,
    SelfAttention,
    TransformerConfig,
    attend,
    gated,
    gelu_tanh,
    init_small,
    init_zero,
    modulate,
    modulate_by,
    open_empty,
    text_states,
)


@dataclass(slots=True, kw_only=True)
class PixArtConfig(TransformerConfig):
    """PixArt-XL/2 at 256 px for T5-XXL states, without the learnt variance.

    kv_compression: side r of the windows of keys and values, 1 for none. kv_blocks: the first and the last block that
    has them; [] for all. qk_norm is RMS per head here, where PixArt-Sigma's own option, which no public configuration
    of it sets, is LN over the whole width.
    """

    text_dim: int = 4096  # width of the text states
    kv_compression: int = 1
    kv_blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        TransformerConfig.__post_init__(self)
        require_positive(self, "text_dim", "kv_compression")
        if self.kv_blocks and not (
            len(self.kv_blocks) == 2 and 0 <= self.kv_blocks[0] <= self.kv_blocks[1] < self.depth
        ):
            raise ValueError(
                f"model.kv_blocks={self.kv_blocks} is not the first and the last of some of the blocks 0 to "
                f"{self.depth - 1}; [{self.depth // 2}, {self.depth - 1}] is, and [] means all"
            )
        first, last = self.route_blocks if self.route else (0, -1)
        if squeezed := [i for i in range(first, last + 1) if self.window(i) > 1]:
            raise ValueError(
                f"model.route={self.route} leaves no grid for model.kv_compression={self.kv_compression} in the blocks"
                f" {squeezed[0]} to {squeezed[-1]}; choose other route_blocks, or set kv_compression=1"
            )

    def window(self, block: int) -> int:
        """Side of the windows of keys and values in a block."""
        first, last = self.kv_blocks or (0, self.depth - 1)
        return self.kv_compression if first <= block <= last else 1

    def build(self) -> "PixArt":
        return PixArt(self)


class Compress(nn.Module):
    """Windows of tokens to one token each: a depthwise convolution and a norm, as in PixArt-Sigma."""

    def __init__(self, hidden: int, window: int):
        super().__init__()
        self.window = window
        self.conv = nn.Conv2d(hidden, hidden, window, stride=window, groups=hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Keys or values (b, n, heads, d) of a grid of n tokens -> (b, m, heads, d).

        Rows and columns beyond the last whole window are left out, as the public code does: nothing attends to them.
        """
        if min(grid) < self.window:
            raise ValueError(
                f"model.kv_compression={self.window} but the picture is {grid[0]} x {grid[1]} tokens, not one window; "
                "give a larger picture, or set kv_compression=1"
            )
        y = self.conv(x.flatten(2).mT.unflatten(2, grid))  # b hidden rows columns
        return self.norm(y.flatten(2).mT).view(x.shape[0], -1, *x.shape[2:])


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP."""

    def __init__(self, config: TransformerConfig, window: int):
        super().__init__()
        hidden = config.hidden
        self.table = nn.Parameter(torch.empty(6, hidden))
        self.attn = SelfAttention(hidden, config.heads, config.qk_norm)
        self.compress = Compress(hidden, window) if window > 1 else None
        self.cross_attn = CrossAttention(hidden, config.heads, hidden)
        self.mlp = MLP(hidden, config.mlp_ratio * hidden, hidden, gelu_tanh)

    def forward(self, x: Tensor, m: Tensor, text: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (m + self.table).chunk(6, dim=1)
        x = gated(x, gate_msa, self.attend(x, grid, modulate_by(shift_msa, scale_msa)))
        x = x + self.cross_attn(x, text, mask)
        return gated(x, gate_mlp, self.mlp(x, modulate_by(shift_mlp, scale_mlp)))

    def attend(self, x: Tensor, grid: tuple[int, int], before: Before = None) -> Tensor:
        """Self-attention, to all tokens or to windows of them."""
        if self.compress is None:
            return self.attn(x, before)
        assert self.attn.out is not None
        q, k, v = self.attn.heads_of(x, before)
        return self.attn.out(attend(q, self.compress(k, grid), self.compress(v, grid)))


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
        self.blocks = nn.ModuleList(Block(config, config.window(i)) for i in range(config.depth))
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
            if isinstance(part, Compress):
                nn.init.constant_(part.conv.weight, part.window**-2)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, kept: Tensor | None = None, aligned: bool = False) -> Any:
        """Predict from x_t (b, c, h, w) at t (b,) given cond.text (b, n, text_dim) and cond.text_mask (b, n).

        kept and aligned are for training: see `walk` and `output`.
        """
        text = self.text_mlp(text_states(cond.text, cond.text_mask, self.config.text_dim))  # b m hidden
        mask = None if cond.text_mask is None else open_empty(cond.text_mask)[:, None, None]  # b 1 1 m
        x = self.tokens(x_t)  # b n hidden
        grid = (x_t.shape[2] // self.config.patch_size, x_t.shape[3] // self.config.patch_size)
        time = self.embed_time(t)  # b hidden
        m = self.modulation(F.silu(time)).unflatten(-1, (6, -1))  # b 6 hidden
        x, seen = self.walk(x, lambda block, x: self.run(block, x, m, text, mask, grid), kept)
        return self.output(self.image(self.final(x, time), *x_t.shape[2:]), seen, aligned)
