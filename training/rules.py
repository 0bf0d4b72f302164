"""Update rules of optimizers as pure functions: (weights, gradient, state) -> (new weights, new state).

Nothing is changed in place, so one `torch.where` a tensor (training/optim.py) turns an update into an exact no-op on
the device, for every rule alike; where a kernel does all of it, and skips by itself, that one is used. Weights and
gradients come as float32; state is tensors alone, named as it is saved.

    AdamW          m = lerp(m, g, 1 - b1)   v = lerp(v, g^2, 1 - b2)   w -= lr (wd w + m_hat / (sqrt(v_hat) + eps))
    Adafactor      v = row x column / mean(row)   w -= max(eps2, rms(w)) min(lr, 1/sqrt(t)) u / max(1, rms(u))
    Muon           m = lerp(m, g, 1 - mu)   w -= lr (wd w + 0.2 sqrt(max(rows, columns)) polar(lerp(g, m, mu)))
    schedule-free  y = lerp(z, x, b1)       z -= lr_t (wd y + g(y) / (sqrt(v) + eps))     x = lerp(x, z, c)

Sharded tensors (DTensor) are treated by their local part where a rule is elementwise; where it is not, sums run over
the ranks. AdamW: Loshchilov & Hutter 2019. Adafactor: Shazeer & Stern 2018, arXiv 1804.04235, as torch.optim.Adafactor.
Muon: Jordan et al. 2024; its step in the size of AdamW's: Liu et al. 2025, arXiv 2502.16982. Schedule-free: Defazio et
al. 2024, arXiv 2405.15682. Moments in 8 bits: after Dettmers et al. 2022, arXiv 2110.02861, with another code.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw

from training.sharded import is_part, local, whole

State = dict[str, Tensor]
Group = dict[str, Any]  # lr, weight_decay, betas, eps and what else a rule reads
BLOCK = 256  # numbers that share a scale in 8 bits
SMALL = 4096  # tensors below this many numbers are not worth 8 bits


Update = Callable[[Tensor, Tensor, State, Group, torch.Generator], tuple[Tensor, State]]


class Rule(NamedTuple):
    """The state before the first step; the update of parameters of one shape; the same in place, skips heeded."""

    start: Callable[[Tensor], State]
    update: Callable[
        [list[Tensor], list[Tensor], list[State], Group, list[torch.Generator]], list[tuple[Tensor, State]]
    ]
    fused: Callable[[list[Tensor], list[State], Group, Tensor], None] | None = None


def each(update: Update) -> Any:
    """The update of several parameters, one after another."""

    def updates(ps: list[Tensor], gs: list[Tensor], states: list[State], group: Group, chances: list[torch.Generator]):
        return [update(p, g, state, group, chance) for p, g, state, chance in zip(ps, gs, states, chances, strict=True)]

    return updates


def like(part: Tensor, p: Tensor) -> Tensor:
    """A local part in the shards of `p`, which lie along its rows."""
    if not is_part(p):
        return part
    from torch.distributed.tensor import DTensor  # takes seconds to import

    shape = torch.Size([len(p), *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def zeros(p: Tensor) -> Tensor:
    """Float32 zeros in the shape, on the device and in the shards of `p`."""
    return torch.zeros_like(p, dtype=torch.float32)


def count(p: Tensor) -> Tensor:
    """A scalar 0.0 on the device of `p`."""
    return torch.zeros((), device=local(p).device)


# AdamW


def adamw_start(p: Tensor) -> State:
    return {"step": count(p), "exp_avg": zeros(p), "exp_avg_sq": zeros(p)}


def adamw_update(p: Tensor, g: Tensor, state: State, group: Group, _) -> tuple[Tensor, State]:
    beta1, beta2 = group["betas"]
    p, g, m, v = local(p), local(g), local(state["exp_avg"]), local(state["exp_avg_sq"])
    step = state["step"] + 1
    m = m.lerp(g, 1 - beta1)
    v = v.lerp(g.square(), 1 - beta2)
    spread = (v / (1 - beta2**step)).sqrt_().add_(group["eps"]).mul_(1 - beta1**step)
    new = torch.addcdiv(p * (1 - group["lr"] * group["weight_decay"]), m, spread, value=-group["lr"])
    return new, {"step": step, "exp_avg": m, "exp_avg_sq": v}


def adamw_fused(ps: list[Tensor], states: list[State], group: Group, skipped: Tensor) -> None:
    """The same of float32 weights by torch's kernel, which leaves everything as it was where `skipped` is 1."""
    beta1, beta2 = group["betas"]
    adamw(
        [local(p) for p in ps],
        [local(p.grad) for p in ps if p.grad is not None],
        [local(state["exp_avg"]) for state in states],
        [local(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        fused=True, found_inf=skipped, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=group["lr"],
        weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip


# AdamW, moments in 8 bits


def adamw8bit_start(p: Tensor) -> State:
    if p.ndim < 2 or p.numel() < SMALL:
        return adamw_start(p)
    rows, row = len(local(p)), math.prod(p.shape[1:])
    scales = torch.zeros(rows, -(-row // BLOCK), device=local(p).device)
    codes = torch.zeros_like(local(p), dtype=torch.int8)
    return {
        "step": count(p),
        "exp_avg": like(codes, p),
        "exp_avg_scale": like(scales, p),
        "exp_avg_sq": like(codes.to(torch.uint8), p),
        "exp_avg_sq_scale": like(scales.clone(), p),
    }


def adamw8bit_update(p: Tensor, g: Tensor, state: State, group: Group, generator) -> tuple[Tensor, State]:
    if "exp_avg_scale" not in state:
        return adamw_update(p, g, state, group, generator)
    wide = {
        "step": state["step"],
        "exp_avg": expand(local(state["exp_avg"]), local(state["exp_avg_scale"])),
        "exp_avg_sq": expand(local(state["exp_avg_sq"]), local(state["exp_avg_sq_scale"])),
    }
    new, wide = adamw_update(p, g, wide, group, generator)
    m, m_scale = compress(wide["exp_avg"], torch.int8, generator)
    v, v_scale = compress(wide["exp_avg_sq"], torch.uint8, generator)
    narrow = {"exp_avg": m, "exp_avg_scale": m_scale, "exp_avg_sq": v, "exp_avg_sq_scale": v_scale}
    return new, {"step": wide["step"], **narrow}


def compress(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers (rows, ...) as 8-bit logarithms of their share of the largest in a block, and these largest ones.

    int8 is a sign and 127 levels, 8 an octave, and zero; uint8 is 256 levels, 16 an octave, and nothing below the
    last one: a second moment is rather too large than zero. Between two levels chance decides, so that the mean is
    right: a running average of 8 bits that rounded to the nearest would never move, as it changes by less than a level.
    """
    signed = dtype is torch.int8
    levels, octave = (127, 8) if signed else (255, 16)
    blocks = in_blocks(x)
    scale = blocks.abs().amax(-1, keepdim=True)
    share = blocks.abs().div_(scale.clamp_min(torch.finfo(x.dtype).tiny))
    below = share.log2().mul_(octave).add_(levels).floor_().clamp_(0, levels)
    rise = (share / torch.exp2((below - levels) / octave)).sub_(1).div_(2 ** (1 / octave) - 1)
    if signed:  # what is below level 0 is zero
        rise = torch.where(below > 0, rise, share * 2 ** ((levels - 1) / octave))
    code = below.add_(torch.rand(share.shape, generator=generator, device=x.device) < rise).clamp_(max=levels)
    code = (code.copysign_(blocks) if signed else code).to(dtype)
    return code.flatten(1)[:, : math.prod(x.shape[1:])].reshape(x.shape), scale.squeeze(-1)


def expand(code: Tensor, scale: Tensor) -> Tensor:
    """The numbers that `compress` made codes of."""
    signed = code.dtype is torch.int8
    levels, octave = (127, 8) if signed else (255, 16)
    blocks = in_blocks(code).float()
    x = blocks.abs().sub_(levels).div_(octave).exp2_().mul_(scale[..., None])
    return (x.mul_(blocks.sign()) if signed else x).flatten(1)[:, : math.prod(code.shape[1:])].reshape(code.shape)


def in_blocks(x: Tensor) -> Tensor:
    """(rows, ...) as (rows, blocks, BLOCK); what is missing at the end of a row is 0."""
    rows = x.flatten(1)
    return F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


# Adafactor


def adafactor_start(p: Tensor) -> State:
    if p.ndim < 2:
        return {"step": count(p), "variance": zeros(p)}
    row, col = torch.zeros(len(local(p)), 1, device=local(p).device), zeros(p[:1].flatten(1))
    return {"step": count(p), "row_var": like(row, p), "col_var": whole(col)}


def adafactor_update(p: Tensor, g: Tensor, state: State, group: Group, _) -> tuple[Tensor, State]:
    tiny, least = torch.finfo(torch.float32).eps, 1e-3
    step = state["step"] + 1
    fresh = step**-0.8  # share of the new square in the averages
    size = torch.clamp(rms(p), min=least) * torch.clamp(step**-0.5, max=group["lr"])
    square = local(g).square()
    if p.ndim < 2:
        v = local(state["variance"]).lerp(square, fresh)
        saved = {"variance": v}
    else:
        square = square.flatten(1)
        row = local(state["row_var"]).lerp(square.mean(1, keepdim=True), fresh)
        col = state["col_var"].lerp(mean_of_rows(square, p), fresh)
        v = (row * col / mean_of_rows(row, p).clamp(min=tiny)).reshape(local(p).shape)
        saved = {"row_var": row, "col_var": col}
    moved = local(g) * v.clamp(min=tiny**2).rsqrt()
    move = size / torch.clamp(rms(like(moved, p)), min=1.0)
    return local(p) * (1 - group["lr"] * group["weight_decay"]) - moved * move, {"step": step, **saved}


def mean_of_rows(part: Tensor, p: Tensor) -> Tensor:
    """(rows here, n) -> (1, n): the mean over the rows of all ranks."""
    return whole(like(part, p).sum(0, keepdim=True)) / len(p)


def rms(tensor: Tensor) -> Tensor:
    """Root of the mean square of all numbers, a scalar, over all ranks."""
    return whole(torch.linalg.vector_norm(tensor)) / tensor.numel() ** 0.5


# Muon


def muon_start(p: Tensor) -> State:
    return {"momentum_buffer": zeros(p)}


def muon_update(ps: list[Tensor], gs: list[Tensor], states: list[State], group: Group, _) -> list[tuple[Tensor, State]]:
    """Of matrices; `group["parts"]` of them lie below one another, as in a layer that makes q, k and v at once."""
    mu, lr = group["momentum"], group["lr"]
    momenta = [local(state["momentum_buffer"]).lerp(local(g), 1 - mu) for state, g in zip(states, gs, strict=True)]
    ahead = [whole(like(local(g).lerp(m, mu).bfloat16(), g)) for g, m in zip(gs, momenta, strict=True)]
    parts = torch.stack(ahead).unflatten(1, (group["parts"], -1))
    turned = polar(parts.flatten(0, 1)).unflatten(0, parts.shape[:2]).flatten(1, 2)
    step = 0.2 * math.sqrt(max(parts.shape[2:])) * lr  # as long as AdamW's, so that lr means the same
    kept = 1 - lr * group["weight_decay"]
    return [
        (torch.add(local(p) * kept, local(split(turn, p)), alpha=-step), {"momentum_buffer": m})
        for p, turn, m in zip(ps, turned, momenta, strict=True)
    ]


def split(tensor: Tensor, model: Tensor) -> Tensor:
    """What every rank has whole, in the shards of `model`; nothing is sent."""
    if not is_part(model) or is_part(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


def polar(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with singular values near 1 and the same singular vectors.

    Five Newton-Schulz steps of the quintic whose slope at 0 is largest; the values end between 0.7 and 1.2 or so,
    which serves as well as 1 (https://kellerjordan.github.io/posts/muon). bfloat16 is enough for that.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).bfloat16()
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)  # (a + b G + c G^2) y
    return (y.mT if tall else y).to(x.dtype)


# Schedule-free AdamW: the parameters are y; the averaged weights x = lerp(y, z, 1 - 1/beta) are never stored


def schedule_free_start(p: Tensor) -> State:
    return {"step": count(p), "weight_sum": count(p), "z": p.detach().float().clone(), "exp_avg_sq": zeros(p)}


def schedule_free_update(y: Tensor, g: Tensor, state: State, group: Group, _) -> tuple[Tensor, State]:
    beta1, beta2 = group["betas"]
    y, g, z, v = local(y), local(g), local(state["z"]), local(state["exp_avg_sq"])
    step = state["step"] + 1
    rate = group["lr"] * (1 - beta2**step).sqrt()
    weight_sum = state["weight_sum"] + rate.square()
    new_in_x = rate.square() / weight_sum.clamp(min=torch.finfo(rate.dtype).tiny)
    v = v.lerp(g.square(), 1 - beta2)
    x = average_of(y, z, beta1)
    moved = (g / v.sqrt().add_(group["eps"])).add_(y, alpha=group["weight_decay"])
    z = torch.addcmul(z, rate, moved, value=-1)
    x = x.lerp(z, new_in_x)
    return z.lerp(x, beta1), {"step": step, "weight_sum": weight_sum, "z": z, "exp_avg_sq": v}


def average_of(y: Tensor, z: Tensor, beta1: float) -> Tensor:
    """The weights to use, from those that are trained: y = lerp(z, x, beta1) solved for x."""
    return y.lerp(z, 1 - 1 / beta1)


ADAMW = Rule(adamw_start, each(adamw_update), adamw_fused)
ADAMW8BIT = Rule(adamw8bit_start, each(adamw8bit_update))
ADAFACTOR = Rule(adafactor_start, each(adafactor_update))
MUON = Rule(muon_start, muon_update)
SCHEDULE_FREE = Rule(schedule_free_start, each(schedule_free_update))


def round_by_chance(x: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 as bfloat16, up or down by chance so that the mean is `x`: steps below the last bit are not lost."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
