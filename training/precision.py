"""FP8 products in the blocks' linear layers; weights, their names and everything between stay as they were.

    y = Q(x) Q(w)^T + b       dx = Q(g) Q(w)       dw = Q(g)^T Q(x)
    Q(a) = s round(a / s)     s = max |a| / (largest number of the format)

x and w are rounded to e4m3, the gradient g to e5m2, or to e4m3 in MXFP8. Current scaling takes one s from the very
tensor that it rounds; MXFP8 takes a power of two for every 32 neighbours (Micikevicius et al. 2022, arXiv:2209.05433;
Rouhani et al. 2023, arXiv:2310.10537). Which of them is the device's affair: see `SCALING`. Delayed scaling, with s
from a history of maxima, was decided against: a resumed run would need that history, and its library pickles it.

Converted are the projections of attention and the MLPs. Modulation, embeddings and the head compute in bf16, as all
else does: they have a row for each image, not for each token, so there is nothing to win and precision to lose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import MLP, CrossAttention, Denoiser, SelfAttention
from models.unet import GEGLU
from training.distributed import Parallel, Ranks


class Library(Enum):
    """Whose products. With auto, Transformer Engine's where it is installed, else torchao's."""

    auto = "auto"
    transformer_engine = "transformer_engine"
    torchao = "torchao"


@dataclass(slots=True, kw_only=True)
class FP8Config:
    """How train.precision=fp8 is computed."""

    library: Library = Library.auto
    fallback: bool = False  # compute in bf16 what cannot be had in fp8 here: a layer, or all of it
    main_grad: bool = False  # Transformer Engine's products add weight gradients up in float32 themselves
    emulate: bool = False  # round as fp8 does and multiply as ever: slow, on any device

    def __post_init__(self):
        if self.emulate and self.library is Library.transformer_engine:
            raise ValueError(
                "fp8.emulate=true is not for fp8.library=transformer_engine, which has no emulation; choose torchao"
            )
        if self.main_grad and (self.emulate or self.library is Library.torchao):
            raise ValueError(
                "fp8.main_grad=true needs Transformer Engine, whose products add gradients up themselves;"
                " choose fp8.library=transformer_engine without fp8.emulate, or fp8.main_grad=false"
            )


class Recipe(Enum):
    """What is computed how, by whom."""

    bf16 = "bf16"  # nothing in fp8
    emulated = "current scaling, emulated by torchao"
    torchao = "current scaling, by torchao"
    current = "current scaling, by Transformer Engine"
    mxfp8 = "MXFP8, by Transformer Engine"

    @property
    def multiple(self) -> int:
        """What the sides of every matrix are multiples of."""
        return 32 if self is Recipe.mxfp8 else 16


SCALING = {  # compute capability: what its tensor cores do in all three products, as Transformer Engine has it
    (8, 9): Recipe.current,
    (9, 0): Recipe.current,
    (10, 0): Recipe.mxfp8,
    (10, 3): Recipe.mxfp8,
}  # not 12.0: its MXFP8 lacks two of the three layouts


def recipe(config: FP8Config, device: torch.device, say: Callable[[str], Any] = print) -> Recipe:
    """What fp8 is on this device; refused where there is none, unless `fallback` asks for bf16, which is then said."""
    try:
        return _recipe(config, device)
    except ValueError as reason:
        if not config.fallback:
            raise
        say(f"fp8.fallback=true: all is computed in bf16, because {reason}")
        return Recipe.bf16


def _recipe(config: FP8Config, device: torch.device) -> Recipe:
    ways = "choose train.precision=bf16, or fp8.fallback=true to take bf16 wherever there is no fp8"
    if config.emulate:
        _installed(Library.torchao)
        return Recipe.emulated
    if device.type != "cuda" or torch.version.hip:
        raise ValueError(f"train.precision=fp8 needs an NVIDIA GPU, and this device is {_named(device)}; {ways}")
    capability = torch.cuda.get_device_capability(device)
    if capability not in SCALING:
        known = ", ".join(f"{major}.{minor}" for major, minor in SCALING)
        raise ValueError(
            f"train.precision=fp8 needs compute capability {known}, and {_named(device)} has"
            f" {capability[0]}.{capability[1]}; {ways}"
        )
    library = config.library
    if library is Library.auto:
        library = Library.transformer_engine if find_spec("transformer_engine") else Library.torchao
    _installed(library)
    if library is Library.transformer_engine:
        return SCALING[capability]
    if config.main_grad:
        raise ValueError(
            "fp8.main_grad=true needs Transformer Engine, which is not installed;"
            " pip install 'transformer-engine[pytorch]', or fp8.main_grad=false"
        )
    return Recipe.torchao


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _installed(library: Library) -> None:
    if not find_spec(library.value):
        package = "torchao" if library is Library.torchao else "'transformer-engine[pytorch]'"
        raise ValueError(
            f"train.precision=fp8 needs {library.value}, which is not installed;"
            f" pip install {package}, or choose train.precision=bf16"
        )


def check_main_grad(config: FP8Config, parallel: Parallel, in_backward: bool) -> None:
    """Refuse `main_grad` where the gradient must come through autograd: to be sharded, or used at once."""
    if config.main_grad and parallel is not Parallel.ddp:
        raise ValueError(
            f"fp8.main_grad=true needs whole weights on every rank, and train.parallel={parallel.value} shards them;"
            " choose train.parallel=ddp or fp8.main_grad=false"
        )
    if config.main_grad and in_backward:
        raise ValueError(
            "optim.in_backward=true updates a weight when autograd brings its gradient, which with fp8.main_grad=true"
            " it never does; set one of them to false"
        )


def convert(denoiser: Denoiser, how: Recipe, config: FP8Config) -> list[str]:
    """From now on multiply in fp8 in place; returns the layers' names.

    Parameters stay the same objects under the same names, so optimizers, averages and checkpoints notice nothing.
    Copies made before stay as they were. Rows, which are tokens, may be of any number: they are filled up with zeros.
    """
    if how is Recipe.bf16:
        return []
    layers = linears(denoiser)
    misfits = [
        name for name, layer in layers.items() if layer.in_features % how.multiple or layer.out_features % how.multiple
    ]
    if misfits and not config.fallback:
        layer = layers[misfits[0]]
        raise ValueError(
            f"train.precision=fp8 needs widths that are multiples of {how.multiple}, and {len(misfits)} of"
            f" {len(layers)} layers have others, such as {misfits[0]} from {layer.in_features} to {layer.out_features};"
            " choose such a model.hidden (of a UNet, model.channels and model.text_dim), or fp8.fallback=true to leave"
            " them in bf16"
        )
    names = [name for name in layers if name not in misfits]
    if how in (Recipe.torchao, Recipe.emulated):
        _to_torchao(denoiser, names, emulate=how is Recipe.emulated)
    else:
        for name in names:
            denoiser.set_submodule(name, _to_transformer_engine(layers[name], how, config.main_grad))
    return names


def linears(denoiser: Denoiser) -> dict[str, nn.Linear]:
    """The linear layers of attention and MLPs in the denoiser's units."""
    parts = (part for unit in denoiser.units() for part in unit.modules())
    inner = {
        child
        for part in parts
        if isinstance(part, SelfAttention | CrossAttention | MLP | GEGLU)
        for child in part.children()
    }
    return {
        name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear) and module in inner
    }


def _to_torchao(denoiser: nn.Module, names: list[str], emulate: bool) -> None:
    """torchao's layers; compiled they are fast, alone they are slower than bf16."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = set(names)
    convert_to_float8_training(
        denoiser,
        module_filter_fn=lambda _, name: name in chosen,
        # dw sums over rows, whose number must be a multiple of 16 too: torchao fills up what is summed over
        config=Float8LinearConfig(emulate=emulate, pad_inner_dim=True),
    )


def _to_transformer_engine(linear: nn.Linear, how: Recipe, main_grad: bool) -> nn.Module:
    layer = _transformer_engine(how)(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        params_dtype=linear.weight.dtype,
        device="meta",  # the weights are there already
        fuse_wgrad_accumulation=main_grad,
    )
    layer.weight = linear.weight
    if linear.bias is not None:
        layer.bias = linear.bias
    return layer


@cache
def _transformer_engine(how: Recipe) -> Any:
    """Its Linear, for rows of any number and without its extra state, which these recipes leave empty."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling, MXFP8BlockScaling

    scaling = MXFP8BlockScaling() if how is Recipe.mxfp8 else Float8CurrentScaling()

    class Linear(te.Linear):
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(0, -2)
            rest = -len(rows) % how.multiple
            # here and not around the network: blocks that are computed again in the backward pass must round alike
            with te.autocast(enabled=True, recipe=scaling):
                y = super().forward(F.pad(rows, (0, 0, 0, rest)) if rest else rows)
            return y[: len(rows)].unflatten(0, x.shape[:-1])

    return Linear


class MainGrads:
    """Weight gradients in float32 that the products of Transformer Engine add into, past autograd and DDP.

    It spares the rounding of every micro-batch's gradient to bf16, and the sum after. What autograd and DDP would have
    done is done here: zeros before the first micro-batch, the mean over ranks after the last, and `.grad` to clip and
    step on. All lie in one buffer, so that each of these is one kernel; the mean does not overlap with the backward
    pass. Made after `convert` with its names, before DDP wraps the denoiser; without names it does nothing.
    """

    def __init__(self, denoiser: nn.Module, names: list[str]):
        weights: list[Any] = [denoiser.get_parameter(f"{name}.weight") for name in names]
        self._weights = [weight for weight in weights if weight.requires_grad]
        sizes = [weight.numel() for weight in self._weights]
        self._all = torch.zeros(sum(sizes), device=weights[0].device if weights else None)
        for weight, part in zip(self._weights, self._all.split(sizes), strict=True):
            weight.main_grad = part.view_as(weight)
        if names:  # DDP would wait for gradients that never come
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                denoiser, [f"{name}.weight" for name in names]
            )

    def start(self) -> None:
        """Before the first micro-batch of a step."""
        self._all.zero_()

    def finish(self, ranks: Ranks) -> None:
        """After the last: the mean over ranks, in `.grad`."""
        if self._weights:
            ranks.sum(self._all).div_(ranks.world)
        for weight in self._weights:
            weight.grad = weight.main_grad
