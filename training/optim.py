"""AdamW with parameter groups, a learning rate that is a pure function of images seen, and a guarded step.

Nothing here keeps a clock of its own, so resuming cannot change the schedule and world size does not enter it.
"""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(slots=True, kw_only=True)
class GroupConfig:
    """Parameters whose name matches `pattern` (a regular expression, searched), and how they differ."""

    pattern: str
    lr_scale: float = 1.0
    frozen: bool = False


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019); biases, norms and tables are not decayed."""

    lr: float = 1e-4
    weight_decay: float = 0.03
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    clip: float = 1.0  # largest gradient norm
    warmup: int = 10_000  # images of linear warm-up
    final: float = 0.01  # share of lr left at the end of the cosine; 1: constant
    groups: list[GroupConfig] = field(default_factory=list)

    def __post_init__(self):
        if self.lr <= 0 or self.clip <= 0:
            raise ValueError(f"optim.lr={self.lr} and optim.clip={self.clip} must be positive; choose larger ones")


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """One fused AdamW; every parameter falls into the first group whose pattern matches, or the rest."""
    rest = GroupConfig(pattern="")
    groups = [*config.groups, rest]
    members: dict[tuple[int, bool], list[Tensor]] = {}
    matched = set()
    for name, parameter in module.named_parameters():
        index = next(i for i, group in enumerate(groups) if re.search(group.pattern, name))
        matched.add(index)
        if groups[index].frozen:
            parameter.requires_grad_(False)
        else:
            members.setdefault((index, parameter.ndim >= 2), []).append(parameter)
    for index, group in enumerate(config.groups):
        if index not in matched:
            names = ", ".join(name for name, _ in list(module.named_parameters())[:5])
            raise ValueError(
                f"optim.groups[{index}].pattern={group.pattern!r} matches no parameter;"
                f" choose a part of a name such as {names}"
            )
    if not members:
        raise ValueError("optim.groups freezes every parameter; leave at least one group free")
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr_scale": groups[index].lr_scale,
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
            for (index, decayed), parameters in members.items()
        ],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def learning_rate(config: OptimConfig, images_seen: int, images: int) -> float:
    """Linear warm-up, then cosine to `final * lr` at the end of the run."""
    if images_seen < config.warmup:
        return config.lr * images_seen / config.warmup
    done = min(1.0, (images_seen - config.warmup) / max(1, images - config.warmup))
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * done)))


def guarded_step(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], lr: float, clip: float):
    """Clip, and update unless the gradient is not finite; returns (gradient norm, 1.0 if skipped), on the device.

    The fused kernel itself reads `found_inf` and leaves everything as it was, so no host sync is needed. Gradients
    are summed over ranks before, so a bad number on one rank is seen, and skipped, by all.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    skipped = (~torch.isfinite(norm)).float()
    nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
