"""UNet of Stable Diffusion 1.x, of SDXL and of SDXL's refiner (arXiv:2112.10752, arXiv:2307.01952).

    e      = time_mlp(t) + vector_mlp([pooled; sines of size_ids])                  the second where there is a vector
    down   on each level: (residual, transformer) x layers, then halve the side     every result is kept
    middle residual, transformer, residual
    up     on each level, back: (residual on [x; last kept], transformer) x (layers + 1), then double the side

    residual     x + conv(silu(GN(conv(silu(GN(x))) + W silu(e))))
    transformer  x + out(blocks(in(GN(x)))) on the cells as tokens; a block is
                 x <- x + attn(LN(x))     x <- x + cross_attn(LN(x), text)     x <- x + geglu(LN(x))

Padding tokens of the text are read like any others unless `cond.text_mask` closes them; the public weights were
trained without a mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Cond, ModelConfig, require_positive
from models.embed import number_embedding, time_embedding
from models.layers import MLP, CrossAttention, Denoiser, SelfAttention, init_zero, lean, open_empty, text_states

SIZE_DIM = 256  # sines of each number of `size_ids`


@dataclass(slots=True, kw_only=True)
class UNetConfig(ModelConfig):
    """Stable Diffusion 1.5.

    channels: width of each level, from the largest side to the smallest. depths: transformer blocks behind each
    residual block of a level, 0 for none; middle_depth: those in the middle. heads: of each level; the middle has the
    last's. layers: residual blocks of a level on the way down. vector_dim: width of `cond.pooled` and 256 for each of
    `cond.size_ids`, which together join the time; 0 for none. groups: of the group norms. linear_projection: the public
    file holds `proj_in` and `proj_out` as linears (SD 2, SDXL), not as 1x1 convolutions (SD 1), of the same function.
    """

    patch_size: int = 1
    base_size: int = 64
    channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    depths: list[int] = field(default_factory=lambda: [1, 1, 1, 0])
    middle_depth: int = 1
    heads: list[int] = field(default_factory=lambda: [8, 8, 8, 8])
    layers: int = 2
    text_dim: int = 768  # width of the text states
    vector_dim: int = 0
    groups: int = 32
    linear_projection: bool = False

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        require_positive(self, "middle_depth", "layers", "text_dim", "groups")
        if self.patch_size != 1:
            raise ValueError(f"model.patch_size={self.patch_size} but a UNet works on single cells; leave it at 1")
        if not self.channels or not len(self.channels) == len(self.depths) == len(self.heads):
            raise ValueError(
                f"model.channels={self.channels}, model.depths={self.depths} and model.heads={self.heads} must name "
                "the same levels; give one number for each"
            )
        for width, heads in zip(self.channels, self.heads, strict=True):
            if width < 1 or width % self.groups or heads < 1 or width % heads:
                raise ValueError(
                    f"model.channels has {width}, which is not a multiple of model.groups={self.groups} and of its "
                    f"{heads} heads; change one of the three"
                )
        if min(self.depths) < 0:
            raise ValueError(f"model.depths={self.depths} has a negative depth; 0 is a level without transformers")

    def build(self) -> "UNet":
        return UNet(self)


class ResBlock(nn.Module):
    """Two convolutions, with the time added between them."""

    def __init__(self, width_in: int, width: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, width_in, eps=1e-5)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.time = nn.Linear(4 * config.channels[0], width)
        self.norm2 = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(e)[..., None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.skip is None else self.skip(x))


class GEGLU(nn.Module):
    """fc2(a gelu(b)) with [a, b] = fc1(x) (Shazeer 2020)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 8 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return lean(self.fc2, glu, self.fc1(x))


def glu(x: Tensor) -> Tensor:
    """a gelu(b), the halves being x = [a, b]."""
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, text_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attn = CrossAttention(width, heads, text_dim, bias=False)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = GEGLU(width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), text, mask)
        return x + self.mlp(self.norm3(x))


class Transformer(nn.Module):
    """Blocks on the cells of a feature map as tokens."""

    def __init__(self, width: int, depth: int, heads: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, heads, config.text_dim) for _ in range(depth))
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None, run: Callable[..., Tensor]) -> Tensor:
        """`run` calls a block: see `Denoiser`."""
        y = self.proj_in(self.norm(x).flatten(2).mT)  # b h*w width
        for block in self.blocks:
            y = run(block, y, text, mask)
        return x + self.proj_out(y).mT.unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Residual blocks of one side of the feature map, the transformers behind them, and the way to the next side."""

    def __init__(
        self, widths_in: list[int], width: int, depths: list[int], heads: int, config: UNetConfig, resample: int = 0
    ):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(width_in, width, config) for width_in in widths_in)
        self.attn = nn.ModuleList(Transformer(width, depth, heads, config) for depth in depths if depth)
        self.resample = nn.Conv2d(width, width, 3, stride=resample, padding=1) if resample else None

    def layers(self) -> list[tuple[nn.Module, nn.Module | None]]:
        """Each residual block, and the transformer behind it where there is one."""
        return list(zip_longest(self.res, self.attn))


class UNet(Denoiser):
    """Denoiser conditioned on text states through cross-attention, and on a vector beside the time in SDXL."""

    config: UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        channels, depths, heads, layers = config.channels, config.depths, config.heads, config.layers
        width, last = channels[0], len(channels) - 1
        self.time_mlp = MLP(width, 4 * width, 4 * width, F.silu)
        self.vector_mlp = MLP(config.vector_dim, 4 * width, 4 * width, F.silu) if config.vector_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        before = [channels[0], *channels]  # before[i]: width that reaches level i from above
        self.down = nn.ModuleList(
            Level(
                [before[i]] + [channels[i]] * (layers - 1), channels[i], [depths[i]] * layers, heads[i], config,
                resample=2 if i < last else 0,
            )
            for i in range(last + 1)
        )  # fmt: skip
        self.middle = Level([channels[-1]] * 2, channels[-1], [config.middle_depth], heads[-1], config)
        below = [*channels[1:], channels[-1]]  # below[i]: width that reaches level i from beneath
        self.up = nn.ModuleList(
            Level(
                [below[i] + channels[i]] + [2 * channels[i]] * (layers - 1) + [channels[i] + before[i]],
                channels[i], [depths[i]] * (layers + 1), heads[i], config, resample=1 if i else 0,
            )
            for i in reversed(range(last + 1))
        )  # fmt: skip
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as latent diffusion does: torch's defaults, and every residual branch starts silent."""
        for part in self.modules():
            if isinstance(part, ResBlock):
                init_zero(part.conv2)
            if isinstance(part, Transformer):
                init_zero(part.proj_out)
        init_zero(self.conv_out)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predict from x_t (b, c, h, w) at t (b,) given cond.text (b, m, text_dim); SDXL: and .pooled, .size_ids."""
        text = text_states(cond.text, cond.text_mask, self.config.text_dim)
        mask = None if cond.text_mask is None else open_empty(cond.text_mask)[:, None, None]  # b 1 1 m
        e = F.silu(self.embed(t, cond))
        x = self.conv_in(self.checked(x_t))
        kept = [x]
        for level in cast("list[Level]", self.down):
            for layer in level.layers():
                x = self.layer(layer, x, e, text, mask)
                kept.append(x)
            if level.resample is not None:
                x = level.resample(x)
                kept.append(x)
        for layer in self.middle.layers():
            x = self.layer(layer, x, e, text, mask)
        for level in cast("list[Level]", self.up):
            for layer in level.layers():
                x = self.layer(layer, torch.cat([x, kept.pop()], dim=1), e, text, mask)
            if level.resample is not None:
                x = level.resample(F.interpolate(x, size=kept[-1].shape[2:]))  # an odd side is not twice its half
        return self.conv_out(F.silu(self.norm_out(x)))

    def embed(self, t: Tensor, cond: Cond) -> Tensor:
        """Time, and SDXL's vector, to the width that the residual blocks read: (b, 4 channels[0])."""
        dtype, config = self.time_mlp.fc1.weight.dtype, self.config
        e = self.time_mlp(time_embedding(t, config.channels[0]).to(dtype))
        if self.vector_mlp is None:
            return e
        if cond.pooled is None or cond.size_ids is None:
            absent = "pooled" if cond.pooled is None else "size_ids"
            raise ValueError(f"cond.{absent} is None but model.vector_dim={config.vector_dim} is made of it; give it")
        vector = torch.cat([cond.pooled, number_embedding(cond.size_ids, SIZE_DIM).flatten(1)], dim=-1)
        if vector.shape[1] != config.vector_dim:
            raise ValueError(
                f"model.vector_dim={config.vector_dim} but cond.pooled of {cond.pooled.shape[1]} and {SIZE_DIM} for"
                f" each of {cond.size_ids.shape[1]} size_ids make {vector.shape[1]}; give what the model was made for"
            )
        return e + self.vector_mlp(vector.to(dtype))

    def layer(
        self, layer: tuple[nn.Module, nn.Module | None], x: Tensor, e: Tensor, text: Tensor, mask: Tensor | None
    ) -> Tensor:
        """One residual block and the transformer behind it."""
        res, attn = layer
        x = self.run(res, x, e)
        return x if attn is None else attn(x, text, mask, self.run)

    def units(self) -> list[nn.Module]:
        """Residual blocks and the transformers' blocks."""
        return [part for part in self.modules() if isinstance(part, ResBlock | Block)]
