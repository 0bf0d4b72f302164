"""One denoiser's tensors onto another's, with an account of every one of them.

    same class      tensor by tensor; patch kernels of another size are resized, what has no counterpart stays fresh
    CCDiT -> PixArt   the trunk as it is, and below
    CCDiT -> MMDiT    the trunk becomes the image stream; not the same function, since attention now sees text

CCDiT modulates block i by S_i(t) = W_i h(t) + b_i with h(t) = silu(time_mlp(t) + y); PixArt by W h(t) + b + E_i, one
linear for all blocks and a table each. With y the null class, added to the time MLP's last bias, h is the same in both:

    anchor   W, b = W_0, b_0             E_i = S_i(t*) - S_0(t*)        block 0 exact at all t, all blocks at t*
    mean     W, b = mean_i W_i, b_i      E_i = mean_t [S_i(t) - (W h(t) + b)]

`mean` is the least-squares optimum of S_i(t) = f(t) + E_i over all f and E_i: the two-way decomposition of S by block
and time. Both are E_i = W_i g + b_i - (W g + b), where g is h(t*) or mean_t h(t). PixArt's last layer adds a table to
time_mlp(t) + y itself, so its table is S_final - (time_mlp(t) + y), at t* or in the mean. Cross-attention starts
silent; hence in `anchor` mode the whole network equals CCDiT under the null class at t*, whatever the text.

PixArt (Chen et al. 2023, arXiv 2310.00426, section 2.3) anchors likewise, at step 500 of 1000. Times here are what the
denoiser is given, in [0, 1].
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Cond, ModelConfig
from models.ccdit import CCDiT
from models.mmdit import MMDiT
from models.pixart import PixArt
from models.unet import SIZE_DIM
from models.weights import unwrap

MODES = ("anchor", "mean")
KINDS = ("copied", "folded", "interpolated", "zeroed", "initialised", "dropped")
GRID = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # the times of `mean`
# What may differ between the networks; anything else would be another trunk.
ADAPTABLE = {
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


@dataclass(slots=True)
class Entry:
    """What became of one tensor. A dropped one belongs to the source, all others to the target."""

    name: str
    kind: str
    parameters: int
    source: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Account:
    """Every tensor of the target and every unused one of the source, and what else the user should know."""

    title: str
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def names(self, kind: str) -> list[str]:
        """Tensors of one kind."""
        return [entry.name for entry in self.entries if entry.kind == kind]

    def summary(self) -> list[str]:
        """One line a kind, with counts and what it comprises, and the notes."""
        lines = [self.title]
        owners = {(part, entry.kind) for entry in self.entries for part in _parts(entry.name)}
        shared = {part for part, kind in owners if any((part, other) in owners for other in KINDS if other != kind)}
        for kind in KINDS:
            these = [entry for entry in self.entries if entry.kind == kind]
            if these:
                count = sum(entry.parameters for entry in these)
                # the shortest name that is all of this kind
                parts = dict.fromkeys(
                    next((part for part in _parts(entry.name) if part not in shared), entry.name) for entry in these
                )
                lines.append(f"{kind:<12} {len(these):>4} tensors {count:>13,} parameters  {', '.join(parts)}")
        return lines + [f"note: {note}" for note in self.notes]

    def table(self) -> list[dict[str, Any]]:
        """All entries as what JSON knows."""
        return [asdict(entry) for entry in self.entries]


@dataclass(slots=True)
class Piece:
    """The value that a tensor of the target is to take, and the source's tensors it is made of."""

    kind: str
    value: Tensor
    source: list[str]


@torch.no_grad()
def transfer(source: nn.Module, target: nn.Module, mode: str = "anchor", anchor: float = 0.5) -> Account:
    """Put `source`'s tensors onto a freshly initialised `target` in place; after an error `target` is untouched.

    `mode` and `anchor` (a time in [0, 1]) matter from CCDiT to PixArt only. ValueError where no transfer exists.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known; choose one of {', '.join(MODES)}")
    if not 0 <= anchor <= 1:
        raise ValueError(f"anchor={anchor} is not a noise time; choose one in [0, 1], such as 0.5")
    source, target = unwrap(source), unwrap(target)
    title = f"{type(target).__name__} from {type(source).__name__}"
    if isinstance(source, CCDiT) and isinstance(target, PixArt):
        title += f", modulation exact at t={anchor:g}" if mode == "anchor" else ", modulation by least squares over t"
        same_trunk(source, target)
        pieces = trunk(source, target) | shared_modulation(source, target, mode, anchor)
    elif isinstance(source, CCDiT) and isinstance(target, MMDiT):
        same_trunk(source, target)
        pieces = trunk(source, target, stream=".image.") | silent_text(source, target)
    elif type(source) is type(target):
        same_trunk(source, target)
        pieces = trunk(source, target)
    else:
        raise ValueError(
            f"no transfer exists from {type(source).__name__} to {type(target).__name__}, whose tensors mean other"
            " things; choose model= of the source's class, or init.from=null to start from scratch"
        )

    account = Account(title, notes=remarks(source, target))
    for name, tensor in target.state_dict().items():
        piece = pieces.get(name) or Piece("initialised", tensor, [])
        tensor.copy_(piece.value)
        account.entries.append(Entry(name, piece.kind, tensor.numel(), piece.source))
    used = {name for entry in account.entries for name in entry.source}
    for name, tensor in source.state_dict().items():
        if name not in used:
            account.entries.append(Entry(name, "dropped", tensor.numel()))
    return account


def same_trunk(source: nn.Module, target: nn.Module) -> None:
    """Refuse networks that differ in more than `ADAPTABLE`."""
    ours, theirs = _config(target), _config(source)
    common = {f.name for f in fields(theirs)} - ADAPTABLE
    names = [f.name for f in fields(ours) if f.name in common and getattr(ours, f.name) != getattr(theirs, f.name)]
    if names:
        wrong = ", ".join(f"model.{name}={getattr(ours, name)}" for name in names)
        right = " ".join(f"model.{name}={getattr(theirs, name)}" for name in names)
        raise ValueError(
            f"{wrong} where the source {type(source).__name__} has {right.replace('model.', '')}; tensors are carried"
            f" over one to one, so give {right}, or init.from=null to start from scratch"
        )


def trunk(source: nn.Module, target: nn.Module, stream: str = ".") -> dict[str, Piece]:
    """The tensors that the networks share by name: copied, or with their patch resized; `stream` as in `.image.`."""
    known, pieces = source.state_dict(), {}
    p, q = _config(source).patch_size, _config(target).patch_size
    same_latent = _config(source).in_channels == _config(target).in_channels
    for name, tensor in target.state_dict().items():
        origin = name.replace(stream, ".")
        if origin not in known:
            continue
        if name.startswith(("patch_embed.weight", "final.linear.")) and p != q:
            if same_latent:
                pieces[name] = Piece("interpolated", resize_patch(name, known[origin], p, q), [origin])
        elif known[origin].shape == tensor.shape:
            pieces[name] = Piece("copied", known[origin], [origin])
    return pieces


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


def shared_modulation(source: CCDiT, target: PixArt, mode: str, anchor: float) -> dict[str, Piece]:
    """PixArt's shared linear and tables, and the null class in its time MLP."""
    times = torch.tensor([anchor], dtype=torch.float64) if mode == "anchor" else GRID
    time = null_time(source, times)
    mean_h = F.silu(time).mean(0)
    linears: list[Any] = [block.modulation for block in source.blocks]
    shared = linears[:1] if mode == "anchor" else linears
    weight, bias = _mean([linear.weight for linear in shared]), _mean([linear.bias for linear in shared])
    made_of, kind = range(len(shared)), "copied" if mode == "anchor" else "folded"
    pieces = null_class(source) | {
        "modulation.weight": Piece(kind, weight, [f"blocks.{i}.modulation.weight" for i in made_of]),
        "modulation.bias": Piece(kind, bias, [f"blocks.{i}.modulation.bias" for i in made_of]),
        "final.table": Piece(
            "folded",
            _affine(source.final.modulation, mean_h).unflatten(0, (2, -1)) - time.mean(0),
            ["final.modulation.weight", "final.modulation.bias"],
        ),
    }
    for i, linear in enumerate(linears):
        table = _affine(linear, mean_h) - (weight @ mean_h + bias)
        origin = [f"blocks.{i}.modulation.weight", f"blocks.{i}.modulation.bias"]
        pieces[f"blocks.{i}.table"] = Piece("folded", table.unflatten(0, (6, -1)), origin)
    for name, tensor in target.state_dict().items():
        if ".cross_attn.out." in name:
            pieces[name] = Piece("zeroed", torch.zeros_like(tensor), [])
    return pieces


def silent_text(source: CCDiT, target: MMDiT) -> dict[str, Piece]:
    """The null class in MMDiT's time MLP, no pooled text yet, and text values (the last third of qkv) of zero.

    Queries and keys stay as initialised: text tokens take their share of the attention, and for now add nothing.
    """
    pieces = null_class(source)
    for name, tensor in target.state_dict().items():
        if name.startswith("pooled_mlp.fc2."):
            pieces[name] = Piece("zeroed", torch.zeros_like(tensor), [])
        elif ".text.attn.qkv." in name:
            query, key, value = tensor.chunk(3)
            pieces[name] = Piece("zeroed", torch.cat([query, key, torch.zeros_like(value)]), [])
    return pieces


def null_class(source: CCDiT) -> dict[str, Piece]:
    """The time MLP's last bias with the null class added."""
    folded = source.time_mlp.fc2.bias.cpu().double() + source.class_embedding.weight[-1].cpu().double()
    return {"time_mlp.fc2.bias": Piece("folded", folded, ["time_mlp.fc2.bias", "class_embedding.weight"])}


def remarks(source: nn.Module, target: nn.Module) -> list[str]:
    """What the counts do not say."""
    old, new, notes = _config(source), _config(target), []
    if isinstance(source, CCDiT) and not isinstance(target, CCDiT):
        notes.append("of class_embedding the null row alone is kept, in time_mlp.fc2.bias")
    if isinstance(source, CCDiT) and isinstance(target, MMDiT):
        notes.append("of text.attn.qkv only the values are zeroed; text tokens dilute the picture's attention for now")
    if old.in_channels != new.in_channels:
        notes.append(
            f"in_channels {old.in_channels} -> {new.in_channels} is another autoencoder: both ends of the network start"
            " anew, and adapting takes long"
        )
    elif old.patch_size != new.patch_size:
        notes.append(f"patch_size {old.patch_size} -> {new.patch_size}: both ends are resized, then need training")
    grid = old.base_size // old.patch_size
    if new.base_size // new.patch_size != grid:
        notes.append(
            f"positions will count 0..{new.base_size // new.patch_size - 1}, not the 0..{grid - 1} learnt;"
            f" model.base_size={grid * new.patch_size} keeps them at every resolution"
        )
    if getattr(old, "as_diffusers", False) != getattr(new, "as_diffusers", False):
        notes.append("time gets other frequencies: those of model.as_diffusers=true are its alone")
    for name in ("positions", "text_dim", "pooled_dim", "vector_dim", "num_classes"):
        before, after = getattr(old, name, None), getattr(new, name, None)
        if None not in (before, after) and before != after:
            notes.append(f"{name} {before} -> {after}: what depends on it does not mean the same any more")
    return notes


@torch.no_grad()
def modulations(denoiser: nn.Module, times: Tensor) -> dict[str, Tensor]:
    """Modulation under the null class, "blocks.i" -> (times, 6 hidden) and "final" -> (times, 2 hidden), float64."""
    denoiser = unwrap(denoiser)
    if isinstance(denoiser, CCDiT):
        h = F.silu(null_time(denoiser, times))
        made = {f"blocks.{i}": _affine(block.modulation, h) for i, block in enumerate(denoiser.blocks)}
        return made | {"final": _affine(denoiser.final.modulation, h)}
    if isinstance(denoiser, PixArt):
        time = null_time(denoiser, times)
        m = _affine(denoiser.modulation, F.silu(time))
        parts: dict[str, Any] = dict(denoiser.named_modules())
        tables = {name: part.table.flatten().cpu().double() for name, part in parts.items() if hasattr(part, "table")}
        return {name: (time.repeat(1, 2) if name == "final" else m) + table for name, table in tables.items()}
    raise ValueError(f"{type(denoiser).__name__} has no modulation to decompose; give a CCDiT or a PixArt")


def block_r2(source: CCDiT, target: PixArt, times: Tensor = GRID[::10]) -> dict[str, float]:
    """Share of the modulation's variance over time that `target` explains, for every block and the last layer.

    R^2 = 1 - sum_t |S_i(t) - f(t) - E_i|^2 / sum_t |S_i(t) - mean_t S_i|^2: 1 exact, 0 as good as a constant, below
    that worse. The last layer of PixArt has no linear, and may well be below.
    """
    made, result = modulations(target, times), {}
    for name, s in modulations(source, times).items():
        spread = (s - s.mean(0)).square().sum().clamp_min(1e-30)
        result[name] = float(1 - (made[name] - s).square().sum() / spread)
    return result


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

    `shape` is (b, c, h, w), the conditions have b rows, `generator` is the CPU's. One noise serves all times.
    """
    if len(channels := {_config(net).in_channels for net in (source, target)} | {shape[1]}) > 1:
        raise ValueError(
            f"in_channels differ among the networks and the latent ({', '.join(map(str, sorted(channels)))});"
            " compare networks of one autoencoder"
        )
    weight = next(source.parameters())
    x = torch.randn(*shape, generator=generator).to(weight)
    differences = []
    for time in times:
        t = time.to(weight.device, torch.float32).expand(shape[0])
        expected, actual = source(x, t, cond_source).cpu().double(), target(x, t, cond_target).cpu().double()
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


def null_time(denoiser: CCDiT | PixArt, times: Tensor) -> Tensor:
    """What modulation reads before its SiLU, with the null class of a CCDiT: (times,) -> (times, hidden) float64."""
    time = denoiser.embed_time(times.to(denoiser.time_mlp.fc1.weight.device, torch.float32))
    time = time.cpu().double()
    return time + denoiser.embed_class(None).cpu().double() if isinstance(denoiser, CCDiT) else time


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return sum((x.cpu().double() for x in tensors), start=torch.zeros((), dtype=torch.float64)) / len(tensors)


def _affine(linear: Any, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.cpu().double(), linear.bias.cpu().double())


def _config(denoiser: nn.Module) -> Any:
    return unwrap(denoiser).config


def _parts(name: str) -> list[str]:
    """Ever longer: `blocks.3.attn.qkv.weight` -> `blocks.*.attn`, `blocks.*.attn.qkv`, `blocks.*.attn.qkv.weight`."""
    full = re.sub(r"\.\d+\.", ".*.", name)
    stem = full.removesuffix(".weight").removesuffix(".bias")
    return [".".join(stem.split(".")[:3]), stem, full]
