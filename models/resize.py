"""A network's tensors in another size of the same class: deeper, wider, with other ends.

Three maps on {name: Piece}, each from the sizes of one config to those of another. What they leave out starts fresh.

    deeper     the old blocks at even distances, the first and the last in place; a new block repeats the one before
               it, with the linears that lead out of it zeroed: exactly the same function
    shallower  blocks at even distances, the first and the last among them: not the same function
    wider k    channel j copies channel j // k, head j copies head j // k; what reads k copies shares its weight among
               them (Net2Net, Chen et al. 2016, arXiv 1511.05641): exactly the same function, but for positions
    ends       other channels, patches, classes

Copies with the same weights and the same gradients would stay copies. Shares are therefore drawn anew for every weight,
uneven, with sum 1: the copies' gradients point elsewhere from the first step.

Two things are not copied, but computed at the new width: the UNet's time, of frequencies 10000^(-j/half), and the
transformers' positions, of frequencies 10000^(-4j/hidden). In both, every k-th wave is an old one, j = k i; so the
layout above is the one that puts it where its channel is. What reads them gives all of the weight to the copies
j = k i, and none to the rest: the time is exact, and of the positions only their part in the mean and the variance of
LN over all channels is new.
"""

import re
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.account import Piece
from models.base import ModelConfig
from models.unet import UNetConfig

Pieces = dict[str, Piece]

LEADS_OUT = re.compile(r"(?:(?:text|image)\.)?(?:attn2?\.out|cross_attn\.out|mlp\.fc2|conv2|proj_out)\.")
READS_WAVES = re.compile(r"(?:blocks\..*(?:qkv|cross_attn\.q|mlp\.fc1)|final\.linear|time_mlp\.fc1)\.weight")
WRITES = re.compile(r"class_embedding\.weight|.*table")  # matrices whose second axis is no input
BY_HEADS = re.compile(r"(.*)\.(?:attn2?|cross_attn|compress)\.(qkv|kv|q|out|conv|norm)\.\w+")
# the axis on which heads stand, and how often all of them
HEADS = {"qkv": (0, 3), "kv": (0, 2), "q": (0, 1), "conv": (0, 1), "norm": (0, 1), "out": (1, 1)}
EMBED, HEAD = ("patch_embed.weight", "conv_in.weight"), ("final.linear.", "conv_out.")


def skeleton(config: ModelConfig) -> Any:
    """The network's names and shapes, without numbers."""
    with torch.device("meta"):
        return config.build()


def spread(old: int, new: int) -> list[int]:
    """For each of `new` blocks the one of `old` blocks that it is or repeats."""
    return [j * (old - 1) // max(new - 1, 1) for j in range(new)]


def stacks(old: Any, new: Any) -> list[tuple[str, list[int]]]:
    """Names of what is stacked, as a pattern whose group is the number, with its `spread`; the innermost first."""
    if not isinstance(old, UNetConfig):
        return [(r"blocks\.(\d+)\.", spread(old.depth, new.depth))]
    last = len(old.depths) - 1
    depths = [
        (rf"(?:down\.{i}|up\.{last - i})\.attn\.\d+\.blocks\.(\d+)\.", spread(a, b))
        for i, (a, b) in enumerate(zip(old.depths, new.depths, strict=True))
    ]
    down = spread(old.layers, new.layers)
    # upwards a layer reads what one of down gave, in the other order, and the last one what came from above
    up = [0, *(old.layers - 1 - i for i in reversed(down[:-1])), old.layers]
    return [
        *depths,
        (r"middle\.attn\.\d+\.blocks\.(\d+)\.", spread(old.middle_depth, new.middle_depth)),
        (r"down\.\d+\.\w+\.(\d+)\.", down),
        (r"up\.\d+\.\w+\.(\d+)\.", up),
    ]


def restacked(pieces: Pieces, old: Any, new: Any) -> Pieces:
    """More or fewer blocks; MMDiT's modulations of more chunks or fewer, since these depend on a block's place."""
    layouts, result = stacks(old, new), {}
    for name, like in skeleton(new).state_dict().items():
        origin, silent = name, ""  # silent: the rest of the name, in a block that repeats the one before it
        for pattern, chosen in layouts:
            if match := re.match(pattern, name):
                j = int(match[1])
                origin = f"{origin[: match.start(1)]}{chosen[j]}{origin[match.end(1) :]}"
                silent = name[match.end() :] if j and chosen[j] == chosen[j - 1] else silent
        piece = pieces.get(origin)
        if silent.startswith("skip."):  # of [x; kept] only x goes on
            value = torch.eye(*like.shape[:2])[..., None, None] if like.ndim > 1 else torch.zeros(like.shape)
            piece = Piece("identity", value, [])
        elif piece is None:
            continue
        elif LEADS_OUT.match(silent):
            piece = Piece("zeroed", torch.zeros(like.shape), [])
        elif silent:
            piece = replace(piece, kind="duplicated")
        if ".modulation." in name and piece.value.shape[0] != like.shape[0]:
            piece = Piece("padded", chunks(piece.value, like.shape[0]), piece.source)
        if piece.value.shape == like.shape:
            result[name] = piece
    return result


def chunks(value: Tensor, rows: int) -> Tensor:
    """The first rows, or all and then zeros: a gate of zero is a branch that says nothing."""
    return torch.cat([value[:rows], value.new_zeros(max(rows - len(value), 0), *value.shape[1:])])


def widened(pieces: Pieces, new: Any, factor: int) -> Pieces:
    """`factor` times the channels and heads."""
    if factor == 1:
        return pieces
    wide, result = skeleton(new), {}
    for name, like in wide.state_dict().items():
        if name not in pieces:
            continue
        piece = pieces[name]
        value = piece.value.cpu().to(torch.promote_types(piece.value.dtype, torch.float32))
        units = {0: 1, 1: 1}
        if match := BY_HEADS.fullmatch(name):
            axis, count = HEADS[match[2]]
            if axis < like.ndim:
                units[axis] = like.shape[axis] // (count * wide.get_submodule(match[1]).attn.heads)
        for axis, unit in units.items():
            if axis < value.ndim and value.shape[axis] != like.shape[axis]:
                value = value.unflatten(axis, (-1, unit)).repeat_interleave(factor, axis).flatten(axis, axis + 1)
                if axis == 1 and not WRITES.fullmatch(name):
                    value = shared(value, unit, factor, bool(READS_WAVES.fullmatch(name)))
        grown = piece.kind == "copied" and value.shape != piece.value.shape
        result[name] = Piece("widened" if grown else piece.kind, value, piece.source)
    return result


def shared(value: Tensor, unit: int, factor: int, first: bool) -> Tensor:
    """Columns in copies, `factor` after one another, with the weight shared among them, or the first's alone."""
    copies = value.unflatten(1, (-1, factor, unit))
    share = torch.rand(copies.shape, dtype=value.dtype) + 0.5
    if first:
        share[:, :, 1:] = 0
    return (copies * (share / share.sum(2, keepdim=True))).flatten(1, 3)


def with_ends(pieces: Pieces, old: Any, new: Any) -> Pieces:
    """Other latents, patches or classes; whatever then has another shape starts fresh."""
    result, p, q = {}, old.patch_size, new.patch_size
    other_latents = old.in_channels != new.in_channels
    for name, like in skeleton(new).state_dict().items():
        if name not in pieces or (other_latents and name.startswith(HEAD)):
            continue
        kind, value, source = pieces[name].kind, pieces[name].value, pieces[name].source
        if name in EMBED and other_latents:
            kind, value = "redrawn", redrawn(value, new.in_channels)
        if name.startswith((EMBED[0], *HEAD)) and p != q:
            kind, value = "interpolated", resize_patch(name, value, p, q)
        if name == "class_embedding.weight" and len(value) != len(like):
            kind, value = "duplicated", value[-1:].expand(like.shape)
        if value.shape == like.shape:
            result[name] = Piece(kind, value, source)
    return result


def redrawn(kernel: Tensor, channels: int) -> Tensor:
    """A random kernel (hidden, channels, ...) whose rows have the norms of those of `kernel` (hidden, c, ...).

    White noise is x_t at t = 1 in any latent: every channel of its tokens keeps mean and variance. Kernels that are an
    isometric mix of the old ones keep covariances too, but are blind to all but c directions of the new channels: on
    made-up latents of 16 channels, from 8, their loss after 100 steps was 0.53, against 0.19 here and 0.20 unscaled.
    """
    kernel = kernel.cpu().double()
    drawn = torch.randn(len(kernel), channels, *kernel.shape[2:], dtype=kernel.dtype)
    scale = kernel.flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
    return scale[:, None, None, None] * drawn


def resize_patch(name: str, tensor: Tensor, p: int, q: int) -> Tensor:
    """Kernel (hidden, c, p, p) of `patch_embed`, or `final.linear`'s rows (p * p * c, ...), for patches of side q.

    With B (q, p) the box resizing of a row of cells: new kernels K minimise |<K, B x B^T> - <k, x>| over patches x
    (FlexiViT, Beyer et al. 2023), and the new output is B y B^T. Where q is a multiple of p, a picture enlarged by
    repeating its cells gives exactly the same tokens, and the output enlarged likewise.
    """
    box = F.interpolate(torch.eye(p, dtype=torch.float64)[None], size=q, mode="area")[0].T
    tensor = tensor.cpu().double()
    if name.startswith("patch_embed."):
        inverse = torch.linalg.pinv(box.T)
        return torch.einsum("ui,vj,hcij->hcuv", inverse, inverse, tensor)
    return torch.einsum("ui,vj,ij...->uv...", box, box, tensor.unflatten(0, (p, p, -1))).flatten(0, 2)
