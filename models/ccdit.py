"""Class-conditioned DiT with adaLN-zero (Peebles and Xie 2023, arXiv 2212.09748).

    c = time_mlp(t) + class_embedding(class_id)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = W_i silu(c) + b_i        per block i
    x <- x + gate_msa attn(LN(x) (1 + scale_msa) + shift_msa)
    x <- x + gate_mlp  mlp(LN(x) (1 + scale_mlp) + shift_mlp)

W_i, b_i and the last linear start at zero: every block is the identity and the network's first output is zero.
One linear per block on a shared c, rather than an MLP per block on the time, is what lets `models.surgery` write the
modulation of PixArt in closed form.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Cond, require_positive
from models.embed import TIME_DIM
from models.layers import (
    MLP,
    Final,
    PatchTransformer,
    SelfAttention,
    TransformerConfig,
    gated,
    gelu_tanh,
    init_zero,
    modulate_by,
)


@dataclass(slots=True, kw_only=True)
class CCDiTConfig(TransformerConfig):
    """DiT-XL/2 for ImageNet at 256 px, without the learnt variance. The null class is row `num_classes`.

    as_diffusers: compute what `DiTTransformer2DModel` does where it departs from DiT: time's frequencies reach 1/10000
    in 127 steps, not 128, and the norm before the MLP has eps 1e-5, not 1e-6.
    """

    condition: ClassVar[str] = "class"

    num_classes: int = 1000
    as_diffusers: bool = False

    def __post_init__(self) -> None:
        TransformerConfig.__post_init__(self)
        require_positive(self, "num_classes")

    def build(self) -> "CCDiT":
        return CCDiT(self)


class Block(nn.Module):
    """Self-attention and MLP, both modulated and gated by the condition."""

    def __init__(self, config: CCDiTConfig):
        super().__init__()
        hidden = config.hidden
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.attn = SelfAttention(hidden, config.heads, config.qk_norm)
        self.mlp = MLP(hidden, config.mlp_ratio * hidden, hidden, gelu_tanh)
        self.mlp_eps = 1e-5 if config.as_diffusers else 1e-6

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = gated(x, gate_msa, self.attn(x, modulate_by(shift_msa, scale_msa)))
        return gated(x, gate_mlp, self.mlp(x, modulate_by(shift_mlp, scale_mlp, self.mlp_eps)))


class CCDiT(PatchTransformer):
    """Denoiser conditioned on a class."""

    config: CCDiTConfig

    def __init__(self, config: CCDiTConfig):
        super().__init__(config)
        self.time_steps = TIME_DIM // 2 - 1 if config.as_diffusers else 0
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final = Final(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as DiT does."""
        self.init_linears()
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        init_zero(self.final.modulation, self.final.linear)
        for part in self.modules():
            if isinstance(part, Block):
                init_zero(part.modulation)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, kept: Tensor | None = None, aligned: bool = False) -> Any:
        """Predict from x_t (b, c, h, w) at t (b,) given cond.class_id (b,), None meaning the null class everywhere.

        kept and aligned are for training: see `walk` and `output`.
        """
        x = self.tokens(x_t)  # b n hidden
        c = F.silu(self.embed_time(t) + self.embed_class(cond.class_id))  # b hidden
        x, seen = self.walk(x, lambda block, x: self.run(block, x, c), kept)
        return self.output(self.image(self.final(x, c), *x_t.shape[2:]), seen, aligned)

    def embed_class(self, class_id: Tensor | None) -> Tensor:
        """Class rows (b, hidden); the null row (1, hidden) without a class."""
        return self.class_embedding.weight[-1:] if class_id is None else self.class_embedding(class_id)
