"""Adapters of low rank beside the layers of a frozen network: what a LoRA trains.

    y = W x + (alpha / r) B A x                          A (r, in) drawn at random, B (out, r) zero
    y = m (W + s B A) x / |W + s B A|                    DoRA (arXiv:2402.09353): m, the norms of rows, is learnt too

PEFT computes them. A checkpoint of such a run holds the adapters alone, under the names of a LoRA file of ours,
`denoiser.blocks.0.attn.qkv.lora_A.weight` and `text_encoder.*`, which `inference.lora` reads like any other.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.text import TextEncoders

DENOISER = "denoiser"
TARGETS = ("qkv", "q", "kv", "out", "mlp.fc1", "mlp.fc2")  # attention and MLP, in every denoiser here
NAME = "default"  # PEFT's, of the one adapter that there is


@dataclass(slots=True, kw_only=True)
class LoRAConfig:
    """Adapters to train instead of a network's own weights, which stay as they are.

    rank: None for none. alpha: their weight is alpha / rank; None: 1. targets: ends of the names of the layers to adapt
    (`attn.qkv`, or `conv1` of a UNet); []: linears of attention and MLP. dora: learn the norms of rows beside them.
    trigger: words that call what was learnt, for those who use the file.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: list[str] = field(default_factory=list)
    dora: bool = False
    trigger: str = ""

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ValueError(
                f"lora.rank={self.rank} is no rank; give a whole number from 1, such as 16, or null for none"
            )
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(
                f"lora.alpha={self.alpha} is not positive; give the rank or half of it, or null for the rank"
            )


class Adapted(nn.Module):
    """A denoiser and the text encoders that learn with it, as one module; called as the denoiser."""

    def __init__(self, denoiser: Any, text: "TextEncoders"):
        super().__init__()
        self.denoiser, self.text, self.config = denoiser, text, denoiser.config

    def forward(self, *args: Any) -> Tensor:
        return self.denoiser(*args)


def adapt(denoiser: Any, text: "TextEncoders | None") -> nn.Module:
    """What is to be trained: the denoiser itself, or with adapters on what its and the text's config say.

    Then everything but the adapters is frozen, and text encoders that have some are part of the module returned.
    """
    lora, words = denoiser.config.lora, text.config.lora if text else LoRAConfig()
    if lora.rank is None and words.rank is None:
        return denoiser
    denoiser.requires_grad_(False)
    inject(denoiser, lora)
    if text is None or words.rank is None:
        return denoiser
    pooled = getattr(denoiser.config, "pooled_dim", 0) or getattr(denoiser.config, "vector_dim", 0)
    read = text.linears(pooled=pooled > 0)
    chosen = matching({f"{i}.{name}" for i, names in enumerate(read) for name in names}, words.targets, "text.")
    for i, encoder in enumerate(text.encoders):
        _inject(encoder, words, [name for name in read[i] if f"{i}.{name}" in chosen])
    text.frozen = False
    return Adapted(denoiser, text)


def inject(denoiser: nn.Module, config: LoRAConfig) -> None:
    """Put adapters on a denoiser's layers in place, if there is a rank."""
    layers = {name for name, part in denoiser.named_modules() if _is_layer(part)}
    if config.rank is not None:
        chosen = matching(layers, config.targets or TARGETS, "model.", given=config.targets)
        _inject(denoiser, config, sorted(chosen))


def matching(names: Iterable[str], ends: Iterable[str], key: str, given: Iterable[str] | None = None) -> set[str]:
    """Those of the names that end so, by whole parts between dots; no ends: all. ValueError if one `given` is of none.

    given: of the ends those that the user gave, None for all.
    """
    names = set(names)
    if not ends:
        return names
    found = {end: {name for name in names if f".{name}".endswith(f".{end}")} for end in ends}
    if empty := [end for end in (ends if given is None else given) if not found[end]]:
        leaves = sorted({".".join(part for part in name.split(".")[-2:] if not part.isdigit()) for name in names})
        raise ValueError(
            f"{key}lora.targets has {empty[0]!r}, in which no layer's name ends; choose among {', '.join(leaves)}"
        )
    return set().union(*found.values())


def _is_layer(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1)


def _inject(network: nn.Module, config: LoRAConfig, names: list[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # slow to import

    assert config.rank is not None
    if not names:
        return
    alpha = config.rank if config.alpha is None else config.alpha
    settings = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=names, use_dora=config.dora)  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(settings, network)
    for parameter in network.parameters():
        if parameter.requires_grad:  # of a base in half precision too
            parameter.data = parameter.data.float()


# --- what a checkpoint holds of it -------------------------------------------------------------------------


def parts(trained: Any) -> tuple[Any, "TextEncoders | None"]:
    """The denoiser in what is trained, and the text encoders where they are trained too."""
    return (trained.denoiser, trained.text) if isinstance(trained, Adapted) else (trained, None)


def networks(denoiser: nn.Module, text: "TextEncoders | None") -> dict[str, nn.Module]:
    """A denoiser and its text encoders by the names that LoRA files have for them."""
    if text is None:
        return {DENOISER: denoiser}
    usual = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    names = [name if name in usual else usual[i] for i, name in enumerate(text.config.encoders)]
    return {DENOISER: denoiser} | dict(zip(names, text.encoders, strict=True))


def adapters(trained: nn.Module) -> dict[str, Tensor]:
    """The adapters in what is trained, by their names in a LoRA file, each with its alpha; {} if it has none."""
    return {
        f"{network}.{name}.{kind}": tensor
        for network, part in networks(*parts(trained)).items()
        for name, layer in part.named_modules() if hasattr(layer, "lora_A")
        for kind, tensor in _tensors(layer)
    }  # fmt: skip


def _tensors(layer: Any) -> Iterator[tuple[str, Tensor]]:
    yield "lora_A.weight", layer.lora_A[NAME].weight
    yield "lora_B.weight", layer.lora_B[NAME].weight
    yield "alpha", torch.tensor(float(layer.lora_alpha[NAME]))
    if NAME in layer.lora_magnitude_vector:
        yield "lora_magnitude_vector", layer.lora_magnitude_vector[NAME].weight


def base_memo(trained: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: what adapters stand on, which never changes, is to be shared and not copied."""
    return {id(p): p for p in trained.parameters() if not p.requires_grad} if adapters(trained) else {}
