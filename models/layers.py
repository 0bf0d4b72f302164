"""The parts that the three transformers share.

    modulate(x, shift, scale) = LN(x) (1 + scale) + shift          LN without weights of its own
    gated(x, gate, y)         = x + gate y
    attend(q, k, v)           = softmax(q k^T / sqrt(d)) v          per head

`PatchTransformer` holds what is the same at both ends of the networks: latents to tokens and back, time, checkpoints.
Tensor names are common to the networks, so that surgery can copy a trunk by name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.base import ModelConfig, indivisible, require_positive
from models.embed import POSITIONS, TIME_DIM, positions, time_embedding


@dataclass(slots=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """Fields common to the transformers; the defaults are the XL/2 size.

    hidden: width. qk_norm: RMS-normalise queries and keys per head, for stable training in low precision.
    positions: see `models.embed`. variance: the last linear also makes DDPM's learnt variance, as in the public weights
    of DiT and PixArt; it is kept with them and never returned.

    Of training alone: route: the share of the picture's tokens that skip the blocks from the first to the last of
    route_blocks (TREAD, Krause et al. 2025, arXiv:2501.04765: 0.5). align_dim: width of the features that a projector
    makes of the tokens after align_depth blocks, for `training.alignment`; 0 for none.
    """

    hidden: int = 1152
    depth: int = 28  # blocks
    heads: int = 16  # of attention
    mlp_ratio: int = 4  # inner width of the MLP, in widths
    qk_norm: bool = False
    positions: str = "centre"
    variance: bool = False
    route: float = 0.0
    route_blocks: list[int] = field(default_factory=list)  # [first, last]
    align_dim: int = 0
    align_depth: int = 8  # blocks before the features are taken

    @property
    def patch_width(self) -> int:
        """Numbers that the last linear makes of a token."""
        return self.patch_size**2 * self.in_channels * (2 if self.variance else 1)

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        require_positive(self, "hidden", "depth", "heads", "mlp_ratio")
        if self.hidden % self.heads:
            raise ValueError(
                f"model.hidden={self.hidden} is not a multiple of model.heads={self.heads}; "
                f"hidden={self.hidden // self.heads * self.heads or self.heads} is"
            )
        if self.hidden % 4:
            raise ValueError(
                f"model.hidden={self.hidden} is not a multiple of 4, as sines and cosines of two coordinates need; "
                f"hidden={self.hidden // 4 * 4 + 4} is"
            )
        known = [kind for kind in POSITIONS if kind != "crop" or hasattr(self, "table_size")]
        if self.positions not in known:
            raise ValueError(f"model.positions={self.positions!r} is not known here; choose one of {', '.join(known)}")
        self._check_training()

    def _check_training(self) -> None:
        if not 0 <= self.route < 1:
            raise ValueError(f"model.route={self.route} is no share of tokens to skip; choose 0 for none, or 0.5")
        ends, quarter = self.route_blocks, self.depth // 4
        if self.route and not (len(ends) == 2 and 0 <= ends[0] <= ends[1] < self.depth):
            raise ValueError(
                f"model.route_blocks={ends} is not the first and the last of the blocks 0 to {self.depth - 1} that"
                f" model.route={self.route} skips; give two, such as [{quarter}, {self.depth - 1 - quarter}]"
            )
        if self.align_dim < 0:
            raise ValueError(f"model.align_dim={self.align_dim} is no width; give the encoder's, or 0 for no alignment")
        if self.align_dim and not 1 <= self.align_depth <= self.depth:
            raise ValueError(
                f"model.align_depth={self.align_depth} is not among the {self.depth} blocks;"
                f" choose about a third of them, {max(1, self.depth // 3)}"
            )


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) (1 + scale) + shift; x (b, n, hidden), shift and scale (b, 1, hidden)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def modulate_by(shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Callable[[Tensor], Tensor]:
    """`modulate` as a function of x alone, to stand before a layer that is `lean`."""
    return partial(modulate, shift=shift, scale=scale, eps=eps)


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y; x and y (b, n, hidden), gate (b, 1, hidden)."""
    return torch.addcmul(x, gate, y)


_slice: int | None = None  # a global, which compilers can follow, and harmless between threads: no result depends on it


@contextmanager
def sliced_attention(queries: int | None) -> Iterator[None]:
    """Within, attend for at most so many queries at once: the same result, and scores n/queries times smaller.

    Fused kernels never store the scores, so it saves where there is none, as on MPS. None leaves all together.
    """
    if queries is not None and queries < 1:
        raise ValueError(f"attention_slices={queries} is no number of queries; choose 1024 or so, or none")
    global _slice
    before, _slice = _slice, queries
    try:
        yield
    finally:
        _slice = before


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention: q (b, n, heads, d), k and v (b, m, heads, d), mask (b, 1, 1, m) -> (b, n, heads * d)."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    parts = [
        F.scaled_dot_product_attention(part.transpose(1, 2), k, v, attn_mask=mask)
        for part in ([q] if _slice is None else q.split(_slice, 1))  # a dynamic size cannot be split by itself
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).transpose(1, 2).flatten(2)


Before = Callable[[Tensor], Tensor] | None
LEAN_FROM = 2**19  # numbers in x


def lean(layer: nn.Module, before: Before, x: Tensor) -> Tensor:
    """layer(before(x)), keeping x for the backward pass and not before(x), which is cheap and computed again.

    torch stops the second computation as soon as it has what the gradient needs, so the layer's product is not
    repeated. A compiler finds by itself what to compute again, and what is small is kept: the second call would cost
    more than it is worth.
    """
    if before is None:
        return layer(x)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.numel() < LEAN_FROM:
        return layer(before(x))
    return checkpoint(lambda x: layer(before(x)), x, use_reentrant=False, preserve_rng_state=False)


class MLP(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width_in: int, width: int, width_out: int, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fc1 = nn.Linear(width_in, width)
        self.fc2 = nn.Linear(width, width_out)
        self.act = act

    def forward(self, x: Tensor, before: Before = None) -> Tensor:
        return self.fc2(self.act(lean(self.fc1, before, x)))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, as in the public weights."""
    return F.gelu(x, approximate="tanh")


class RMSNorm(nn.RMSNorm):
    """RMS norm in the dtype of its input: under autocast a float32 weight would bar the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one linear for query, key and value.

    `project=False` leaves the output linear away: MMDiT's last text stream gives keys and values only.
    """

    def __init__(self, hidden: int, heads: int, qk_norm: bool = False, project: bool = True, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=bias)
        self.q_norm = RMSNorm(hidden // heads, eps=1e-6) if qk_norm else None
        self.k_norm = RMSNorm(hidden // heads, eps=1e-6) if qk_norm else None
        self.out = nn.Linear(hidden, hidden) if project else None

    def heads_of(self, x: Tensor, before: Before = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (b, n, hidden) -> 3 x (b, n, heads, d)."""
        q, k, v = lean(self.qkv, before, x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, x: Tensor, before: Before = None) -> Tensor:
        assert self.out is not None
        return self.out(attend(*self.heads_of(x, before)))


class CrossAttention(nn.Module):
    """Queries from the picture, keys and values from the text."""

    def __init__(self, hidden: int, heads: int, text_dim: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(hidden, hidden, bias=bias)
        self.kv = nn.Linear(text_dim, 2 * hidden, bias=bias)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.out(attend(q, k, v, mask))


class Final(nn.Module):
    """Modulated norm and the linear from tokens to patches."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.modulation = nn.Linear(config.hidden, 2 * config.hidden)
        self.linear = nn.Linear(config.hidden, config.patch_width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class Checkpointing(Enum):
    """What of a block is kept for the backward pass; the rest is computed again."""

    none = "none"  # everything, but see `lean`
    selective = "selective"  # results of products and of attention
    full = "full"  # the block's inputs


PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}  # fmt: skip


def _policy(_context: Any, operator: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def call(unit: nn.Module, checkpointing: Checkpointing, *args: Any) -> Any:
    """unit(*args), with that much kept for the backward pass. No unit draws random numbers, so no state is kept."""
    if checkpointing is Checkpointing.none:
        return unit(*args)
    if checkpointing is Checkpointing.full:
        return checkpoint(unit, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(unit, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class Denoiser(nn.Module):
    """What every network of ours carries: its config, and units that are recomputed and compiled one by one."""

    call: Callable[..., Any]

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.call = call

    def units(self) -> list[nn.Module]:
        """The modules that `run` is called with."""
        return list(self.blocks)  # pyright: ignore[reportArgumentType]

    def checkpoint(self, checkpointing: Checkpointing, every: int = 1) -> None:
        """In training, keep only so much of every n-th unit for the backward pass, and compute the rest again."""
        for index, unit in enumerate(self.units()):
            setattr(unit, "checkpointing", Checkpointing.none if index % every else checkpointing)  # noqa: B010

    def run(self, unit: nn.Module, *args: Any) -> Any:
        """Call a unit, through `call` or what was compiled of it."""
        kept = getattr(unit, "checkpointing", Checkpointing.none) if self.training else Checkpointing.none
        return self.call(unit, kept, *args)

    def checked(self, x: Tensor) -> Tensor:
        """`x` (b, c, h, w) itself, if it has the channels that the network was made for."""
        if x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"model.in_channels={self.config.in_channels} but the latent has {x.shape[1]} channels; "
                "choose the autoencoder that the model was made for, or set in_channels"
            )
        return x


class PatchTransformer(Denoiser):
    """Both ends of a transformer on latents: patches and positions in, time, and patches out."""

    config: TransformerConfig
    table_size = 0  # for positions="crop"
    time_steps = 0  # of the time's frequencies, where they are not as many as these

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        p = config.patch_size
        self.patch_embed = nn.Conv2d(config.in_channels, config.hidden, kernel_size=p, stride=p)
        self.time_mlp = MLP(TIME_DIM, config.hidden, config.hidden, F.silu)
        width = config.mlp_ratio * config.hidden
        self.projector = MLP(config.hidden, width, config.align_dim, F.silu) if config.align_dim else None

    def tokens(self, x: Tensor) -> Tensor:
        """Patches as tokens, in reading order, with their positions added: (b, c, h, w) -> (b, n, hidden)."""
        config, p = self.config, self.config.patch_size
        for side in x.shape[2:]:
            if side % p:
                raise ValueError(indivisible(p, side))
        x = self.patch_embed(self.checked(x))
        grid = (x.shape[2], x.shape[3])
        dtype = self.patch_embed.weight.dtype  # float32 under autocast: the residual stream keeps its precision
        place = positions(
            grid, config.base_size // p, config.hidden, config.positions, self.table_size, x.device, dtype
        )
        return place + x.flatten(2).mT  # `place` first: the sum takes its memory order, and all that follows too

    def walk(
        self, x: Tensor, step: Callable[[nn.Module, Tensor], Tensor], kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The picture's tokens (b, n, hidden) through the blocks by `step`: as they come out, and after `align_depth`.

        kept (b, k): indices of the tokens that `route_blocks` see; the others come back unchanged behind these.
        """
        config, whole, seen = self.config, x, x
        first, last = config.route_blocks or (-1, -1)
        for i, block in enumerate(self.blocks):  # pyright: ignore[reportArgumentType]
            if kept is not None and i == first:
                whole, x = x, take(x, kept)
            x = step(block, x)
            if kept is not None and i == last:
                x = whole.scatter(1, _rows(kept, x), x.to(whole.dtype))
            seen = x if i + 1 == config.align_depth else seen
        return x, seen

    def output(self, image: Tensor, seen: Tensor, aligned: bool) -> Any:
        """The prediction; if `aligned`, a pair of it and the projected tokens (b, n or k, align_dim)."""
        if not aligned:
            return image
        assert self.projector is not None  # `check_alignment` has asked for align_dim
        return image, self.projector(seen)

    def image(self, x: Tensor, height: int, width: int) -> Tensor:
        """Undo the patches: (b, n, p * p * c) -> (b, c, height, width), without a variance."""
        p, c = self.config.patch_size, self.config.in_channels
        x = x.view(x.shape[0], height // p, width // p, p, p, -1)[..., :c]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], c, height, width)

    def embed_time(self, t: Tensor) -> Tensor:
        """Time to the width of the network: (b,) -> (b, hidden)."""
        return self.time_mlp(time_embedding(t, steps=self.time_steps).to(self.time_mlp.fc1.weight.dtype))

    def init_linears(self) -> None:
        """DiT's start: Xavier-uniform linears (the patch embedding seen as one), no biases, a small time MLP."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        init_small(self.time_mlp)


def init_small(mlp: MLP) -> None:
    """Weights N(0, 0.02^2): an embedding that starts quiet."""
    nn.init.normal_(mlp.fc1.weight, std=0.02)
    nn.init.normal_(mlp.fc2.weight, std=0.02)


def init_zero(*linears: nn.Linear | nn.Conv2d) -> None:
    """Linears and convolutions that start silent."""
    for linear in linears:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)  # pyright: ignore[reportArgumentType]


def take(x: Tensor, kept: Tensor) -> Tensor:
    """Tokens (b, k, d) of x (b, n, d) by their indices (b, k)."""
    return x.gather(1, _rows(kept, x))


def _rows(kept: Tensor, x: Tensor) -> Tensor:
    return kept[..., None].expand(-1, -1, x.shape[-1])


def text_states(text: Tensor | None, mask: Tensor | None, width: int) -> Tensor:
    """Text states (b, n, width) with the padding zeroed: whatever stands there, NaN included, cannot pass."""
    if text is None:
        raise ValueError("cond.text is None but this model is conditioned on text; encode the captions (text=...)")
    if text.shape[-1] != width:
        raise ValueError(
            f"model.text_dim={width} but the text states are {text.shape[-1]} wide; "
            "choose the text encoder that the model was made for, or set text_dim"
        )
    return text if mask is None else text.masked_fill(~mask[..., None], 0)


def open_empty(mask: Tensor) -> Tensor:
    """Open the rows of a key mask (b, m) that have no token: a softmax over nothing is NaN, over zeroed states not."""
    return mask | ~mask.any(dim=-1, keepdim=True)
