"""Optimizers with parameter groups, a learning rate that is a pure function of images seen, and a guarded step.

Nothing here keeps a clock of its own, so resuming cannot change the schedule and world size does not enter it. State
is tensors by parameter, saved by name. A step that is skipped is skipped on the device: no number comes to the host.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from training.rules import (
    ADAFACTOR,
    ADAMW,
    ADAMW8BIT,
    MUON,
    SCHEDULE_FREE,
    Group,
    Rule,
    average_of,
    round_by_chance,
    split,
)
from training.sharded import local, whole

MATRICES = re.compile(r"\bblocks\.\d+\..*(attn|mlp)\.\w+\.weight$")  # what Muon turns; modulation and tables are not
TOGETHER = 1 << 22  # numbers in the parameters that are updated at once
STACKED = {"qkv": 3, "kv": 2}  # matrices that one layer holds below one another


class Kind(Enum):
    """The update rule."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"  # moments in 8 bits: 2 bytes a weight instead of 8
    adafactor = "adafactor"  # a row and a column instead of moments
    muon = "muon"  # matrices of blocks turned towards orthogonal ones; AdamW for the rest
    schedule_free = "schedule_free"  # AdamW that averages instead of lowering its rate


class Weights(Enum):
    """How the weights in training are stored; updates are computed in float32 in either case."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(slots=True, kw_only=True)
class GroupConfig:
    """Parameters whose name matches `pattern` (a regular expression, searched), and how they differ."""

    pattern: str
    lr_scale: float = 1.0  # factor on lr
    frozen: bool = False  # not trained at all


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) or another kind; biases, norms and tables are not decayed."""

    kind: Kind = Kind.adamw
    lr: float = 1e-4  # the highest learning rate
    weight_decay: float = 0.03  # a step takes lr times this share off the weights
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # decay of the means of gradients and squares
    momentum: float = 0.95  # of Muon's matrices
    eps: float = 1e-8  # beside the root of the squares, against division by 0
    clip: float = 1.0  # largest gradient norm; inf: none
    warmup: int = 10_000  # images of linear warm-up
    final: float = 0.01  # share of lr left at the end of the cosine; 1: constant
    groups: list[GroupConfig] = field(default_factory=list)  # who trains otherwise; the first that matches counts
    weights: Weights = Weights.fp32
    stochastic_rounding: bool = True  # of bf16 weights; rounding to the nearest loses the small steps
    in_backward: bool = False  # update each parameter as soon as its gradient is there, and free that

    def __post_init__(self):
        if self.lr <= 0 or self.clip <= 0:
            raise ValueError(f"optim.lr={self.lr} and optim.clip={self.clip} must be positive; choose larger ones")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)) or len(self.betas) != 2:
            raise ValueError(
                f"optim.betas={self.betas} and optim.momentum={self.momentum} must be two shares and one, from 0 to"
                " below 1; choose [0.9, 0.99] and 0.95"
            )
        if self.kind is Kind.schedule_free and self.betas[0] == 0:
            raise ValueError("optim.betas[0]=0 leaves nothing of schedule_free's average in training; choose 0.9")
        if self.in_backward and self.clip != math.inf:
            raise ValueError(
                f"optim.in_backward=true updates before the whole norm is known, so optim.clip={self.clip} could not"
                " act; give optim.clip=inf"
            )

    def check_steps(self, micro_batches: int, replicas: int) -> None:
        """Refuse to update in the backward pass what is summed over micro-batches or replicas (DDP) after it."""
        if self.in_backward and (micro_batches > 1 or replicas > 1):
            raise ValueError(
                f"optim.in_backward=true updates after every backward pass, but a step sums {micro_batches} micro-"
                f"batches on each of {replicas} replicas; train with one micro-batch, on one rank or sharded, or set it"
                " to false"
            )


class Ruled(torch.optim.Optimizer):
    """Updates by the rule of each group, parameters of one shape together; where `found_inf` is 1, nothing changes."""

    found_inf: Tensor

    def __init__(self, groups: list[Group], defaults: Group, stochastic: bool, in_backward: bool):
        super().__init__(groups, defaults)
        self.stochastic = stochastic
        self.norms: list[Tensor] | None = [] if in_backward else None  # of the gradients that were used and freed
        self.placed: set[Tensor] = set()
        place = 0
        for group in self.param_groups:
            group["places"] = {parameter: place + i for i, parameter in enumerate(group["params"])}
            place += len(group["params"])
            if in_backward:
                for parameter in group["params"]:
                    parameter.register_post_accumulate_grad_hook(lambda p, group=group: self.consume(p, group))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameters in alike([p for p in group["params"] if p.grad is not None]):
                self.update(parameters, group, self.found_inf)

    @torch.no_grad()
    def consume(self, parameter: Tensor, group: Group) -> None:
        """Update one parameter within the backward pass, unless its own gradient is not finite, and free that."""
        assert self.norms is not None and parameter.grad is not None
        norm = gradient_norm([parameter])
        self.norms.append(norm)
        self.update([parameter], group, (~torch.isfinite(norm)).float())
        parameter.grad = None

    def update(self, parameters: list[Tensor], group: Group, skipped: Tensor) -> None:
        """Parameters of one shape, in place; an exact no-op where `skipped` is 1."""
        rule: Rule = group["rule"]
        states = [self.state_of(parameter, rule) for parameter in parameters]
        if rule.fused and parameters[0].dtype is torch.float32:
            return rule.fused(parameters, states, group, skipped)
        chances = [self.drawing(parameter, group) for parameter in parameters]
        gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
        updated = rule.update([parameter.float() for parameter in parameters], gradients, states, group, chances)
        skip = skipped.bool()
        for parameter, state, chance, (weights, fresh) in zip(parameters, states, chances, updated, strict=True):
            weights = local(weights)
            if parameter.dtype is torch.bfloat16 and self.stochastic:
                weights = round_by_chance(weights, chance)
            keep(local(parameter), weights, skip)
            for name, value in fresh.items():
                keep(local(state[name]), local(value), skip)

    def state_of(self, parameter: Tensor, rule: Rule) -> dict[str, Tensor]:
        """What is kept of a parameter; made before its first step, sharded as it is after it was read whole."""
        state = self.state[parameter]
        if parameter not in self.placed:
            self.placed.add(parameter)
            state |= {name: split(state.get(name, zero), zero) for name, zero in rule.start(parameter).items()}
        return state

    def drawing(self, parameter: Tensor, group: Group) -> torch.Generator:
        """Chance for one update of one parameter: a function of how many there were, which is saved, and its place.

        The count lives on the host and goes on when an update is skipped; ranks that hold the same draw the same.
        """
        generator = torch.Generator(local(parameter).device)
        if group["rule"] is not ADAMW8BIT and not (self.stochastic and parameter.dtype is torch.bfloat16):
            return generator
        state = self.state[parameter]
        draws = state.get("draws", torch.zeros((), dtype=torch.int64)).cpu() + 1
        state["draws"] = draws
        return generator.manual_seed((int(draws) << 20) + group["places"][parameter])


def alike(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape and dtype, up to TOGETHER numbers: small matrices are worth a kernel only in stacks."""
    kinds: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
    for (shape, _), members in kinds.items():
        count = max(1, TOGETHER // max(1, shape.numel()))
        yield from (members[first : first + count] for first in range(0, len(members), count))


def keep(old: Tensor, new: Tensor, skip: Tensor) -> None:
    """`old` becomes `new` in place, unless `skip`."""
    torch.where(skip, old, new.to(old.dtype), out=old)


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """One optimizer; every parameter falls into the first group whose pattern matches, or the rest.

    Fused AdamW where that will do. `optim.weights=bf16` turns the module's parameters into bfloat16 here.
    """
    if config.weights is Weights.bf16:
        module.to(torch.bfloat16)
    plain = config.kind is Kind.adamw and config.weights is Weights.fp32 and not config.in_backward
    rest = GroupConfig(pattern="")
    groups = [*config.groups, rest]
    members: dict[tuple[Any, ...], list[Tensor]] = {}
    matched = set()
    for name, parameter in module.named_parameters():
        index = next(i for i, group in enumerate(groups) if re.search(group.pattern, name))
        matched.add(index)
        if groups[index].frozen:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:  # what adapters stand on does not
            rule = () if plain else rule_of(name, parameter, config.kind)
            members.setdefault((index, parameter.ndim >= 2, *rule), []).append(parameter)
    for index, group in enumerate(config.groups):
        if index not in matched:
            names = ", ".join(name for name, _ in list(module.named_parameters())[:5])
            raise ValueError(
                f"optim.groups[{index}].pattern={group.pattern!r} matches no parameter;"
                f" choose a part of a name such as {names}"
            )
    if not members:
        raise ValueError("optim.groups freezes every parameter; leave at least one group free")
    if config.kind is Kind.muon and all(rule is not MUON for _, _, rule, _ in members):
        raise ValueError(
            "optim.kind=muon finds no free matrix of attention or MLP in the model's blocks; choose optim.kind=adamw"
        )
    made: list[Group] = [
        {
            "params": parameters,
            "lr_scale": groups[index].lr_scale,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (index, decayed, *_), parameters in members.items()
    ]
    if plain:
        return torch.optim.AdamW(
            made, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True
        )
    for group, (_, _, rule, parts) in zip(made, members, strict=True):
        group |= {"rule": rule, "parts": parts}
    defaults = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "momentum": config.momentum}
    return Ruled(made, defaults, config.stochastic_rounding, config.in_backward)


def rule_of(name: str, parameter: Tensor, kind: Kind) -> tuple[Rule, int]:
    """The rule of a parameter, and how many matrices it holds."""
    match kind:
        case Kind.muon if parameter.ndim == 2 and MATRICES.search(name):
            return MUON, STACKED.get(name.split(".")[-2], 1)
        case Kind.adamw | Kind.muon:
            return ADAMW, 1
        case Kind.adamw8bit:
            return ADAMW8BIT, 1
        case Kind.adafactor:
            return ADAFACTOR, 1
        case Kind.schedule_free:
            return SCHEDULE_FREE, 1


def learning_rate(config: OptimConfig, images_seen: int, images: int) -> float:
    """Linear warm-up, then cosine to `final * lr` at the end of the run."""
    if images_seen < config.warmup:
        return config.lr * images_seen / config.warmup
    done = min(1.0, (images_seen - config.warmup) / max(1, images - config.warmup))
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * done)))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate; before the backward pass where that one updates."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def gradient_norm(parameters: list[nn.Parameter] | list[Tensor]) -> Tensor:
    """The norm of all gradients together, over all shards: a float32 scalar on the device."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])).float()


def guarded_step(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    lr: float,
    clip: float,
    veto: Tensor | None = None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clip, and update unless `veto` is 1.0 or, without one, the gradient not finite; returns (norm, 1.0 if skipped).

    All scalars are on the device: the optimizer itself reads `found_inf` and leaves everything as it was, step counts
    included, so no host sync is needed. Gradients are summed over ranks before, so a bad number on one rank is seen,
    and skipped, by all. `norm`: that of `gradient_norm`, where it is known. An optimizer that updates in the backward
    pass has done so, and skipped parameter by parameter; that is counted here.
    """
    set_rate(optimizer, lr)
    if isinstance(optimizer, Ruled) and optimizer.norms is not None:
        return count_consumed(optimizer.norms, veto)
    norm = gradient_norm(parameters) if norm is None else norm
    skipped = (~torch.isfinite(norm)).float() if veto is None else veto
    if clip != math.inf:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def count_consumed(norms: list[Tensor], veto: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm over all gradients of a backward pass that has used them, and 1.0 if any was skipped."""
    if veto is not None:
        raise ValueError(
            "optim.in_backward=true has updated before a guard can judge the whole step; set it to false, or guard"
            " nothing"
        )
    norm = torch.linalg.vector_norm(torch.stack(norms))
    norms.clear()
    return norm, (~torch.isfinite(norm)).float()


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse state that was loaded from the checkpoint of another kind of optimizer."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = optimizer.state.get(parameter, {}).keys() - {"draws"}
            known = group.get("rule", ADAMW).start(torch.empty(parameter.shape, device="meta")).keys()
            if held and held != known:
                raise ValueError(
                    f"the checkpoint's optimizer state holds {', '.join(sorted(held))}, but this optim.kind keeps"
                    f" {', '.join(sorted(known))}; give the optim.kind of that run, or start another with init.from"
                )


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, parameters hold the weights to draw with: schedule-free's average x; of other kinds, what they are.

    Afterwards they are, to the bit, what is trained. Costs a second copy of the weights for that long.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if "z" in optimizer.state.get(parameter, ()):
                    y, z = local(parameter), local(optimizer.state[parameter]["z"])
                    kept.append((y, y.clone()))
                    y.copy_(average_of(y.float(), z, group["betas"][0]))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, y in kept:
                parameter.copy_(y)
