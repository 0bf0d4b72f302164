"""One denoiser's tensors onto another's, by stated rules and with an account of every one of them.

A transfer is a chain of maps on {name: piece}, each of which may find nothing to do:

    class   the same, tensor by tensor; or from CCDiT, whose null class joins the time, to
            PixArt   the trunk as it is; the modulation decomposed as `models.modulation` says; cross-attention silent
            MMDiT    the trunk as the image stream; not the same function, since attention now sees text
    depth   blocks inserted in silence or left out          }
    width   channels and heads times a whole number         }  `models.resize`
    ends    other latents, patches, classes                 }

What no map provides stays as the target was initialised. Positions are computed, never carried over: they keep the
range of coordinates that was learnt as long as base_size / patch_size stays.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.account import Account, Entry, Piece
from models.base import Cond, ModelConfig
from models.ccdit import CCDiT, CCDiTConfig
from models.mmdit import MMDiT, MMDiTConfig
from models.modulation import MODES, null_class, shared_modulation
from models.pixart import PixArt
from models.resize import Pieces, restacked, spread, widened, with_ends
from models.unet import SIZE_DIM
from models.weights import unwrap

# What may differ between two networks, by the map that sees to it; anything else would be another trunk.
DEPTHS = {
    "depth",
    "dual",
    "kv_compression",
    "kv_blocks",
    "depths",
    "middle_depth",
    "layers",
    "route",
    "route_blocks",
    "align_dim",
    "align_depth",
}
WIDTHS = {"hidden", "channels", "heads"}
ENDS = {
    "in_channels",
    "patch_size",
    "base_size",
    "positions",
    "table_size",
    "text_dim",
    "pooled_dim",
    "vector_dim",
    "num_classes",
    "linear_projection",
}


@torch.no_grad()
def transfer(source: nn.Module, target: nn.Module, mode: str = "anchor", anchor: float = 0.5) -> Account:
    """Put `source`'s tensors onto a freshly initialised `target` in place; after an error `target` is untouched.

    `mode` and `anchor` (a time in [0, 1]) matter from CCDiT to PixArt only. What is random comes from torch's global
    generator. ValueError where no transfer exists.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known; choose one of {', '.join(MODES)}")
    if not 0 <= anchor <= 1:
        raise ValueError(f"anchor={anchor} is not a noise time; choose one in [0, 1], such as 0.5")
    source, target = unwrap(source), unwrap(target)
    account = Account(f"{type(target).__name__} from {type(source).__name__}")
    tensors = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("projector.")}
    pieces = {name: Piece("copied", tensor, [name]) for name, tensor in tensors.items()}  # a projector starts anew
    quiet: Pieces = {}
    if isinstance(source, CCDiT) and isinstance(target, PixArt):
        account.title += f", modulation {'by least squares over t' if mode == 'mean' else f'exact at t={anchor:g}'}"
        pieces |= null_class(source) | shared_modulation(source, mode, anchor)
        quiet = silent_cross_attention(target)
    elif isinstance(source, CCDiT) and isinstance(target, MMDiT):
        pieces = {re.sub(r"^blocks\.\d+", r"\g<0>.image", name): piece for name, piece in pieces.items()}
        pieces |= null_class(source)
        quiet = silent_text(target)
    elif type(source) is not type(target):
        raise ValueError(
            f"no transfer exists from {type(source).__name__} to {type(target).__name__}, whose tensors mean other"
            " things; choose model= of the source's class, or init.from=null to start from scratch"
        )

    first, last = sizes_of(_config(source), _config(target)), _config(target)
    factor = check_sizes(_config(source), first, last)
    deep = _with(first, last, DEPTHS)
    wide = _with(deep, last, WIDTHS)
    pieces = with_ends(widened(restacked(pieces, first, deep), wide, factor), wide, last) | quiet

    account.notes = remarks(_config(source), first, last, factor)
    for name, tensor in target.state_dict().items():
        piece = pieces.get(name) or Piece("initialised", tensor, [])
        tensor.copy_(piece.value)
        account.entries.append(Entry(name, piece.kind, tensor.numel(), piece.source))
    used = {name for entry in account.entries for name in entry.source}
    for name, tensor in source.state_dict().items():
        if name not in used:
            account.entries.append(Entry(name, "dropped", tensor.numel()))
    return account


def sizes_of(old: Any, new: Any) -> Any:
    """The sizes of `old` as a config of the class of `new`, from where one map after another leads there."""
    plain = type(new)()
    return type(new)(**{f.name: getattr(old, f.name, getattr(plain, f.name)) for f in fields(new)})


def check_sizes(old: Any, first: Any, last: Any) -> int:
    """How many times as wide `last` is as the source; ValueError where no map leads there from `first`."""
    source = type(old).__name__.removesuffix("Config")

    def refuse(names: list[str], rule: str, right: dict[str, Any]) -> ValueError:
        wrong = ", ".join(f"model.{name}={getattr(last, name)}" for name in names)
        theirs = ", ".join(f"{name}={getattr(first, name)}" for name in names)
        give = " ".join(f"model.{name}={value}".replace(", ", ",") for name, value in right.items())
        return ValueError(
            f"{wrong} where the source {source} has {theirs}; {rule}, so give {give},"
            " or init.from=null to start from scratch"
        )

    common = [f.name for f in fields(last) if hasattr(old, f.name)]
    if names := [n for n in common if n not in DEPTHS | WIDTHS | ENDS and getattr(first, n) != getattr(last, n)]:
        raise refuse(names, "no rule carries that over", {name: getattr(first, name) for name in names})
    widths = {name: _list(getattr(first, name)) for name in common if name in WIDTHS}
    wanted = {name: _list(getattr(last, name)) for name in widths}
    factor = max(1, next(wanted[name][0] // width[0] for name, width in widths.items()))
    times = {name: [factor * n for n in width] for name, width in widths.items()}
    if wanted != times:
        names = [name for name in widths if wanted[name] != widths[name]]
        right = {name: n if isinstance(getattr(last, name), list) else n[0] for name, n in times.items()}
        raise refuse(names, "channels and heads are multiplied by one whole number", right)
    if dual := getattr(first, "dual", 0):
        layout = spread(first.depth, last.depth)
        place = layout.index(max(i for i in layout if i < dual))
        if last.dual <= place:
            rule = f"the last block with a second attention becomes number {place}, counted from 0"
            raise refuse(["dual"], rule, {"dual": place + 1})
    return factor


def remarks(old: Any, first: Any, last: Any, factor: int) -> list[str]:
    """What the counts do not say."""
    notes = []
    if isinstance(old, CCDiTConfig) and not isinstance(last, CCDiTConfig):
        notes.append("of class_embedding the null row alone is kept, in time_mlp.fc2.bias")
        if old.as_diffusers:
            notes.append("time gets other frequencies: those of model.as_diffusers=true are its alone")
    if isinstance(old, CCDiTConfig) and isinstance(last, MMDiTConfig):
        notes.append("of text.attn.qkv only the values are zeroed; text tokens dilute the picture's attention for now")
    for name in ("depth", "depths", "middle_depth", "layers"):
        before, after = (_list(getattr(config, name, [])) for config in (first, last))
        if any(a < b for a, b in zip(before, after, strict=True)):
            notes.append(f"{name} grows: a new block repeats the one before it, and says nothing until it is trained")
        if any(a > b for a, b in zip(before, after, strict=True)):
            notes.append(f"{name} shrinks: blocks at even distances stay, and have to learn to do without the others")
    if factor > 1:
        notes.append(
            f"{factor} times as wide: channels and heads in {factor} copies; what reads them is shared unevenly"
        )
        if hasattr(last, "positions"):
            notes.append(
                "positions have new waves between the old ones; nothing reads them yet, but LN's mean and variance do:"
                " not exactly the same function, by 0.1 to 0.5 % of the output in the shapes' networks"
            )
    if first.in_channels != last.in_channels:
        notes.append(
            f"in_channels {first.in_channels} -> {last.in_channels} is another autoencoder: both ends of the network"
            " start anew, the first with its rows' norms, and adapting takes long"
        )
    elif first.patch_size != last.patch_size:
        notes.append(
            f"patch_size {first.patch_size} -> {last.patch_size}: both ends are resized, for pictures enlarged as much,"
            " whose detail is to be learnt"
        )
    grid = first.base_size // first.patch_size
    if hasattr(last, "positions") and last.base_size // last.patch_size != grid:
        notes.append(
            f"positions will count 0..{last.base_size // last.patch_size - 1}, not the 0..{grid - 1} learnt;"
            f" model.base_size={grid * last.patch_size} keeps them at every resolution"
        )
    for name in ("positions", "text_dim", "pooled_dim", "vector_dim", "kv_compression", "kv_blocks"):
        before, after = getattr(first, name, None), getattr(last, name, None)
        if before != after and (hasattr(old, name) or name.startswith("kv_")):
            notes.append(f"{name} {before} -> {after}: what depends on it does not mean the same any more")
    if (before := getattr(first, "num_classes", None)) != (after := getattr(last, "num_classes", None)):
        notes.append(f"num_classes {before} -> {after}: every class starts as the null class")
    return notes


def silent_cross_attention(target: PixArt) -> Pieces:
    """Outputs of zero."""
    names = [name for name in target.state_dict() if ".cross_attn.out." in name]
    return {name: Piece("zeroed", torch.zeros(()), []) for name in names}


def silent_text(target: MMDiT) -> Pieces:
    """No pooled text yet, and text values (the last third of qkv) of zero.

    Queries and keys stay as initialised: text tokens take their share of the attention, and for now add nothing.
    """
    pieces = {}
    for name, tensor in target.state_dict().items():
        if name.startswith("pooled_mlp.fc2."):
            pieces[name] = Piece("zeroed", torch.zeros_like(tensor), [])
        elif ".text.attn.qkv." in name:
            query, key, value = tensor.chunk(3)
            pieces[name] = Piece("zeroed", torch.cat([query, key, torch.zeros_like(value)]), [])
    return pieces


@torch.no_grad()
def gap(
    source: nn.Module,
    target: nn.Module,
    cond_source: Cond,
    cond_target: Cond,
    times: Tensor,
    shape: Sequence[int],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Relative difference |target - source| / |source| of the outputs on Gaussian noise at each of `times`: (times,).

    `shape` is (b, c, h, w), the conditions have b rows, `generator` is the CPU's. One noise serves all times. Networks
    of patch sizes p and q see the same tokens: the noise enlarged p/g and q/g times by repetition, where g is their
    greatest common divisor, and their outputs are averaged back to `shape`.
    """
    nets = unwrap(source), unwrap(target)
    if len(channels := {_config(net).in_channels for net in nets} | {shape[1]}) > 1:
        raise ValueError(
            f"in_channels differ among the networks and the latent ({', '.join(map(str, sorted(channels)))});"
            " compare networks of one autoencoder"
        )
    weight = next(source.parameters())
    x = torch.randn(*shape, generator=generator).to(weight)
    cell = math.gcd(*(_config(net).patch_size for net in nets))

    def output(net: nn.Module, t: Tensor, cond: Cond) -> Tensor:
        zoom = _config(net).patch_size // cell
        large = x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        return F.avg_pool2d(net(large, t, cond), zoom).cpu().double()

    differences = []
    for time in times:
        t = time.to(weight.device, torch.float32).expand(shape[0])
        expected, actual = output(nets[0], t, cond_source), output(nets[1], t, cond_target)
        differences.append((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    return torch.stack(differences)


def null_condition(config: ModelConfig, rows: int, tokens: int = 77) -> Cond:
    """A condition that says nothing, without any text encoder: the null class, or `tokens` states of zeros."""
    if config.condition == "class":
        return Cond()
    cond = Cond(text=torch.zeros(rows, tokens, getattr(config, "text_dim", 0)))
    if pooled := getattr(config, "pooled_dim", 0):
        cond.pooled = torch.zeros(rows, pooled)
    if vector := getattr(config, "vector_dim", 0):  # of one number, since the config does not say how many
        cond.pooled, cond.size_ids = torch.zeros(rows, vector - SIZE_DIM), torch.zeros(rows, 1)
    return cond


def _with(config: Any, other: Any, names: set[str]) -> Any:
    return replace(config, **{f.name: getattr(other, f.name) for f in fields(config) if f.name in names})


def _list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]


def _config(denoiser: nn.Module) -> Any:
    return unwrap(denoiser).config
