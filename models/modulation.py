"""CCDiT's modulation, one linear a block, as PixArt's: one linear for all blocks and a table each.

CCDiT modulates block i by S_i(t) = W_i h(t) + b_i with h(t) = silu(time_mlp(t) + y); PixArt by W h(t) + b + E_i. With y
the null class, added to the time MLP's last bias, h is the same in both:

    anchor   W, b = W_0, b_0             E_i = S_i(t*) - S_0(t*)        block 0 exact at all t, all blocks at t*
    mean     W, b = mean_i W_i, b_i      E_i = mean_t [S_i(t) - (W h(t) + b)]

`mean` is the least-squares optimum of S_i(t) = f(t) + E_i over all f and E_i: the two-way decomposition of S by block
and time. Both are E_i = W_i g + b_i - (W g + b), where g is h(t*) or mean_t h(t). PixArt's last layer adds a table to
time_mlp(t) + y itself, so its table is S_final - (time_mlp(t) + y), at t* or in the mean. Cross-attention starts
silent; hence in `anchor` mode the whole network equals CCDiT under the null class at t*, whatever the text.

PixArt (Chen et al. 2023, arXiv 2310.00426, section 2.3) anchors likewise, at step 500 of 1000. Times here are what the
denoiser is given, in [0, 1].
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.account import Piece
from models.ccdit import CCDiT
from models.pixart import PixArt
from models.weights import unwrap

MODES = ("anchor", "mean")
GRID = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # the times of `mean`


def shared_modulation(source: CCDiT, mode: str, anchor: float) -> dict[str, Piece]:
    """PixArt's shared linear and tables."""
    times = torch.tensor([anchor], dtype=torch.float64) if mode == "anchor" else GRID
    time = null_time(source, times)
    mean_h = F.silu(time).mean(0)
    linears: list[Any] = [block.modulation for block in source.blocks]
    shared = linears[:1] if mode == "anchor" else linears
    weight, bias = _mean([linear.weight for linear in shared]), _mean([linear.bias for linear in shared])
    made_of, kind = range(len(shared)), "copied" if mode == "anchor" else "folded"
    pieces = {
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
    return pieces


def null_class(source: CCDiT) -> dict[str, Piece]:
    """The time MLP's last bias with the null class added."""
    folded = source.time_mlp.fc2.bias.cpu().double() + source.class_embedding.weight[-1].cpu().double()
    return {"time_mlp.fc2.bias": Piece("folded", folded, ["time_mlp.fc2.bias", "class_embedding.weight"])}


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
    that worse. The last layer of PixArt has no linear, and may well be below. The networks have the same size.
    """
    made, result = modulations(target, times), {}
    for name, s in modulations(source, times).items():
        spread = (s - s.mean(0)).square().sum().clamp_min(1e-30)
        result[name] = float(1 - (made[name] - s).square().sum() / spread)
    return result


def null_time(denoiser: CCDiT | PixArt, times: Tensor) -> Tensor:
    """What modulation reads before its SiLU, with the null class of a CCDiT: (times,) -> (times, hidden) float64."""
    time = denoiser.embed_time(times.to(denoiser.time_mlp.fc1.weight.device, torch.float32))
    time = time.cpu().double()
    return time + denoiser.embed_class(None).cpu().double() if isinstance(denoiser, CCDiT) else time


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return sum((x.cpu().double() for x in tensors), start=torch.zeros((), dtype=torch.float64)) / len(tensors)


def _affine(linear: Any, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.cpu().double(), linear.bias.cpu().double())
