"""Our networks beside their public twins: the same weights, tensors and threads, in one run.

Time of a forward pass and of one with its backward pass; memory over the weights at its peak, and what of it is kept
between the two passes. Where the weights are many and the picture small, the peak is the gradients and hardly moves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, compare, memory
from models.base import Cond, ModelConfig
from models.ccdit import CCDiTConfig
from models.interchange import to_diffusers
from models.layers import Checkpointing, Denoiser
from models.mmdit import MMDiTConfig
from models.unet import UNetConfig
from training.speed import Compile, compile_denoiser


@dataclass(slots=True, kw_only=True)
class Case:
    """A network and the batch that it is given."""

    name: str
    config: ModelConfig
    side: int  # of the latent
    tokens: int = 0  # of the text
    batch: int = 1


TINY_UNET = Case(
    name="UNet, 4.2 M",
    config=UNetConfig(channels=[64, 128], depths=[1, 1], heads=[2, 4], layers=1, text_dim=64),
    side=32, tokens=77, batch=4,
)  # fmt: skip
TINY_MMDIT = Case(
    name="MMDiT, 2.3 M",
    config=MMDiTConfig(
        hidden=128, depth=4, heads=4, text_dim=64, pooled_dim=32, in_channels=4, base_size=32, table_size=24,
        positions="crop",
    ),
    side=32, tokens=77, batch=4,
)  # fmt: skip
TINY_DIT = Case(
    name="DiT, 1.4 M",
    config=CCDiTConfig(hidden=128, depth=4, heads=4, as_diffusers=True, positions="corner"),
    side=32, batch=4,
)  # fmt: skip
SD15 = Case(name="UNet of SD 1.5, 860 M", config=UNetConfig(), side=32, tokens=77)
WIDE_MMDIT = Case(
    name="MMDiT, 2 blocks of 1536", config=MMDiTConfig(depth=2, positions="crop"), side=64, tokens=154, batch=4
)


class Pair:
    """A case built twice with one set of weights. Random, as at the start a network says nothing."""

    def __init__(self, case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        config: Any = case.config
        with torch.device(device):
            denoiser = config.build()
            for parameter in denoiser.parameters():
                nn.init.normal_(parameter, std=0.02)
            self.ours: Denoiser = denoiser
            self.theirs: Any = to_diffusers(denoiser)
            for parameter in self.theirs.parameters():  # theirs alone: a step of one would be a step of both
                parameter.data = parameter.data.clone()
            self.x, self.t = torch.randn(case.batch, config.in_channels, case.side, case.side), torch.rand(case.batch)
            self.cond = Cond(class_id=torch.zeros(case.batch, dtype=torch.long))
            if case.tokens:
                self.cond.text = torch.randn(case.batch, case.tokens, config.text_dim)
            if pooled := getattr(config, "pooled_dim", None) or max(0, getattr(config, "vector_dim", 0) - 6 * 256):
                self.cond.pooled = torch.randn(case.batch, pooled)
            self.cond.size_ids = torch.tensor([[512.0, 512, 0, 0, 512, 512]]).expand(case.batch, 6)
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=dtype is torch.bfloat16)

    def call_ours(self) -> Tensor:
        with self._autocast:
            return self.ours(self.x, self.t, self.cond)

    def call_theirs(self) -> Tensor:
        cond, t = self.cond, 1000 * self.t
        with self._autocast:
            match type(self.ours).__name__:
                case "UNet":
                    added = {"text_embeds": cond.pooled, "time_ids": cond.size_ids}
                    return self.theirs(self.x, t, cond.text, added_cond_kwargs=added).sample
                case "MMDiT":
                    return self.theirs(self.x, cond.text, cond.pooled, t).sample
                case "PixArt":
                    return self.theirs(self.x, cond.text, t).sample
                case _:
                    return self.theirs(self.x, t, cond.class_id).sample

    def compile(self) -> None:
        """Both block by block."""
        compile_denoiser(self.ours, Compile.blocks)
        for part in self.theirs.modules():
            if type(part).__name__ in ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock"):
                part.compile()


def backward(call: Callable[[], Tensor], module: nn.Module) -> Callable[[], None]:
    """A forward and a backward pass that leaves no gradients behind."""

    def both() -> None:
        call().float().square().mean().backward()
        for parameter in module.parameters():
            parameter.grad = None

    return both


def times(pair: Pair, name: str, rounds: int) -> list[Row]:
    """Forward, and forward and backward."""
    passes = torch.no_grad()(pair.call_ours), torch.no_grad()(pair.call_theirs)
    both = backward(pair.call_ours, pair.ours), backward(pair.call_theirs, pair.theirs)
    return [
        compare(f"{name}: forward", *passes, rounds=rounds),
        compare(f"{name}: forward and backward", *both, rounds=rounds),
    ]


def memories(pair: Pair, name: str) -> list[Row]:
    """At the peak of forward and backward, and between the two."""
    calls = (pair.call_ours, pair.call_theirs)
    both = [backward(call, module) for call, module in zip(calls, (pair.ours, pair.theirs), strict=True)]
    (peak, _), (usual_peak, _) = map(memory, both)
    (_, kept), (_, usual_kept) = map(memory, calls)
    return [
        Row(name=f"{name}: peak", ours=peak, usual=usual_peak, unit="MiB"),
        Row(name=f"{name}: kept for backward", ours=kept, usual=usual_kept, unit="MiB"),
    ]


def recomputed(pair: Pair, name: str) -> list[Row]:
    """Our own options against our own network without them: what they save and what they cost."""
    rows = []
    ours = backward(pair.call_ours, pair.ours)
    for kind in (Checkpointing.selective, Checkpointing.full):

        def optional(kind: Checkpointing = kind) -> None:
            pair.ours.checkpoint(kind)
            ours()
            pair.ours.checkpoint(Checkpointing.none)

        rows.append(compare(f"{name}: {kind.value} against none", optional, ours, rounds=3))
        (peak, _), (plain, _) = memory(optional), memory(ours)
        rows.append(Row(name=f"{name}: {kind.value} against none, peak", ours=peak, usual=plain, unit="MiB"))
    return rows


def networks() -> Iterator[Row]:
    """Tiny and real widths, eager; compiled the one whose blocks are alike: a UNet takes minutes on two cores."""
    for case, rounds in ((TINY_UNET, 9), (TINY_MMDIT, 9), (TINY_DIT, 9), (WIDE_MMDIT, 5), (SD15, 5)):
        pair = Pair(case)
        yield from times(pair, case.name, rounds)
        yield from memories(pair, case.name)
        if case is TINY_MMDIT:
            yield from recomputed(pair, case.name)
            pair.compile()
            yield from times(pair, f"{case.name}, compiled", rounds)
