"""LoRA files, added to a network before it draws.

    W  <-  W + weight (alpha / r) B A                    A (r, in), B (out, r), and likewise of convolutions
    W  <-  W + weight (m (W + s B A) / |W + s B A| - W)  DoRA: m is the norm that each row is to have

A file has the names of diffusers and PEFT (`unet.`, `transformer.` or nothing, `text_encoder.`; `lora_A` and `lora_B`,
`lora.down` and `lora.up`), kohya's (`lora_unet_`, `lora_te1_` and a path with underscores for dots, of diffusers'
modules or of Stable Diffusion's own), or ours (`denoiser.blocks.0.attn.qkv.lora_A.weight`), which a network without a
public twin needs. Without their dots, the names of all kinds are keys of one table. What is added to a part of a fused
tensor of ours is carried there by the rules of `models.interchange`, with zeros for the other parts.

Of several each is a change of the same W, and these are summed. Everything in a file must be understood and fit, and is
checked before anything is touched.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from inference.description import Description, find
from inference.export.original import FAMILIES, from_original, to_original
from models.base import ModelConfig
from models.interchange import Place, places, public_twin
from models.lora import DENOISER, networks
from models.text import TextEncoders
from models.weights import Causes, misfit, unwrap

METADATA = "lora_adapter_metadata"  # of diffusers: PEFT's settings as JSON, each behind its network's name
# Which network a name is of; the rest of it is the module's.
NETWORKS = (
    (r"text_encoder\.|lora_te1?_", "text_encoder"),
    (r"text_encoder_2\.|lora_te2_", "text_encoder_2"),
    (r"text_encoder_3\.|lora_te3_", "text_encoder_3"),
    (r"(base_model\.model\.)?((unet|transformer|diffusion_model|denoiser)\.|lora_(unet|transformer)_|)", DENOISER),
)
FACTOR = re.compile(r"(.+?)\.(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)(?:\.\w+)?\.weight")
MAGNITUDE = re.compile(r"(.+?)\.(?:lora_magnitude_vector|dora_scale)(?:\.\w+)?(?:\.weight)?")
OTHERS = (
    (r"\.hada_", "a LoHa"),
    (r"\.lokr_", "a LoKr"),
    (r"\.b?oft_", "an OFT"),
    (r"\.lora_mid\.", "a LoRA in Tucker's form"),
    (r"\.lora_\w+\.(\w+\.)?bias$", "a LoRA with biases"),
    (r"\.lora_embedding_", "a LoRA of embeddings"),
    (r"", "something else than a LoRA"),
)
CAUSES: Causes = (
    (all, r"^(text_encoder|lora_te)", "it changes text encoders which this model has not."),
    (all, r" for ", "it was made for a model of the same class in other sizes."),
    (any, r"", "it was made for another model; take one that was trained on this one."),
)


@dataclass(slots=True)
class Update:
    """What is added to the weight of a module, by its name in the file: scale * up @ down.

    up (out, r), down (r, in) or (r, in, k, k), magnitude (out, 1) of a DoRA's rows, float32.
    """

    name: str
    up: Tensor
    down: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape((len(self.up), *self.down.shape[1:]))

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a weight, in its shape: a linear may be a 1x1 convolution."""
        product = (self.scale * self.up @ self.down.flatten(1)).reshape(weight.shape)
        if self.magnitude is None:
            return product
        weight = weight.to(product.device, torch.promote_types(weight.dtype, torch.float32))
        rows = (weight + product).flatten(1)
        return (self.magnitude * rows / rows.norm(dim=1, keepdim=True)).reshape(weight.shape) - weight


Updates = dict[str, Update]  # by keys, see `_key`


@dataclass(slots=True)
class Change:
    """A tensor of a network and what LoRA files, each with its weight, make of it."""

    tensor: Tensor
    parts: list[tuple[float, Callable[[Tensor], Tensor]]] = field(default_factory=list)

    @torch.no_grad()
    def make(self) -> None:
        """Change it in place; where all weights are 0, not even the sign of a zero."""
        deltas = [(weight, delta(self.tensor)) for weight, delta in self.parts if weight]  # each of the same weight
        for weight, delta in deltas:
            self.tensor.add_(delta.to(self.tensor.device), alpha=weight)


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE.safetensors:0.8` as a path and a weight, which is 1 if there is none."""
    path, colon, weight = text.rpartition(":")
    if not colon:
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not path or not math.isfinite(number):
        raise ValueError(
            f"--lora {text} does not end in a weight; give FILE.safetensors:0.8, or FILE.safetensors for 1"
        )
    return Path(path), number


def apply(
    denoiser: nn.Module, text_encoders: TextEncoders | None, loras: Sequence[tuple[str | Path, float]]
) -> list[str]:
    """Add LoRA files, each with its weight, to a network and its text encoders in place.

    Returns the names of the tensors they change, such as denoiser.blocks.0.attn.qkv.weight. ValueError if a file is not
    understood or does not fit, and then nothing is touched.
    """
    found = changes(denoiser, text_encoders, loras)
    for change in found.values():
        change.make()
    return list(found)


def changes(
    denoiser: nn.Module, text_encoders: TextEncoders | None, loras: Sequence[tuple[str | Path, float]]
) -> dict[str, Change]:
    """What `apply` would do, by the names of the tensors; nothing is touched."""
    nets = networks(unwrap(denoiser), text_encoders)
    found: dict[str, Change] = {}
    for path, weight in loras:
        for name, tensor, delta in _steps(lora_file(path), nets):
            found.setdefault(name, Change(tensor)).parts.append((weight, delta))
    return found


def lora_file(path: str | Path) -> Path:
    """The file that is meant: itself, the same with .safetensors, or the averaged adapters of a run or checkpoint."""
    path = Path(path)
    if path.is_dir():
        folder = find(path)
        if Description.load(folder).base is None:
            raise ValueError(
                f"{path} holds a whole network and no LoRA; give a LoRA's file, or a run of model.lora.rank"
            )
        return folder / "denoiser" / "ema.safetensors"
    suffixed = path.with_name(f"{path.name}.safetensors")
    return suffixed if suffixed.is_file() and not path.is_file() else path


# --- files -------------------------------------------------------------------------------------------------


def read_lora(path: str | Path) -> dict[str, Updates]:
    """What a LoRA file adds, by network (denoiser, text_encoder, text_encoder_2, ...) and module."""
    tensors, told = _read(Path(path))
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        factor = FACTOR.fullmatch(re.sub(r"\.processor\.(to_\w+)_lora\.", r".\1.lora.", name))
        if factor:
            factors.setdefault(factor[1], {})["up" if factor[2] in ("B", "up") else "down"] = tensor.float()
        elif magnitude := MAGNITUDE.fullmatch(name):
            factors.setdefault(magnitude[1], {})["columns" if _of_columns(name, tensor) else "rows"] = tensor.float()
        elif not name.endswith(".alpha"):
            kind = next(kind for pattern, kind in OTHERS if re.search(pattern, name))
            raise ValueError(f"{path} is {kind}, by its tensor {name}, which is not read here; give a plain LoRA")
    if not factors:
        raise ValueError(f"{path} holds no LoRA; give a file with tensors such as unet.*.lora_A.weight")
    found: dict[str, Updates] = {}
    for name, pair in factors.items():
        prefix, network = next((hit[0], to) for start, to in NETWORKS if (hit := re.match(start, name)))
        try:
            up, down = _product(pair)
            scale = _scale(tensors.get(f"{name}.alpha"), told, prefix, name.removeprefix(prefix), len(down))
            magnitude = _magnitude(pair, len(up))
        except ValueError as error:
            raise ValueError(f"{path} is broken: {name} {error}; get the file again, or leave it out") from error
        found.setdefault(network, {})[_key(name.removeprefix(prefix))] = Update(name, up, down, scale, magnitude)
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what its header says of PEFT's settings."""
    if not path.is_file() or path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file; give a LoRA in that format")
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get(METADATA) or "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); get the file again") from error
    return tensors, told if isinstance(told, dict) else {}


def _product(pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors of a module, up (out, r) and down (r, ...)."""
    if missing := {"up", "down"} - pair.keys():
        raise ValueError(f"lacks its factor {missing.pop()}")
    up, down = pair["up"], pair["down"]
    if min(up.ndim, down.ndim) < 2 or math.prod(up.shape[1:]) != len(down):
        raise ValueError(f"has factors {tuple(up.shape)} and {tuple(down.shape)}, which have no product")
    if not len(down):
        raise ValueError("has rank 0")
    if not (up.isfinite().all() and down.isfinite().all()):
        raise ValueError("has numbers that are not finite")
    return up.flatten(1), down


def _of_columns(name: str, tensor: Tensor) -> bool:
    """Whether a DoRA has a norm for each input, as some of kohya's kind have, by its shape (1, in)."""
    return name.endswith("dora_scale") and tensor.ndim > 1 and len(tensor) == 1 < tensor.numel()


def _magnitude(pair: Mapping[str, Tensor], rows: int) -> Tensor | None:
    """The norms (rows, 1) of a DoRA."""
    if "columns" in pair:
        raise ValueError("has norms of columns, and only those of rows are read")
    if "rows" not in pair:
        return None
    if pair["rows"].numel() != rows or not pair["rows"].isfinite().all():
        raise ValueError(f"has {pair['rows'].numel()} norms, which must be {rows} finite numbers")
    return pair["rows"].reshape(rows, 1)


def _scale(alpha: Tensor | None, told: Mapping[str, Any], prefix: str, module: str, rank: int) -> float:
    """alpha / r, alpha being a tensor's, or of PEFT's settings, or r."""
    prefix = prefix.removeprefix("base_model.model.")
    number: Any = told.get(f"{prefix}lora_alpha", rank)
    for name, value in _patterns(told.get(f"{prefix}alpha_pattern")).items():
        number = value if f".{module}".endswith(f".{name}") else number
    if alpha is not None:
        number = alpha.item() if alpha.numel() == 1 else None
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ValueError("has an alpha that is no finite number")
    return number / (math.sqrt(rank) if alpha is None and told.get(f"{prefix}use_rslora") else rank)


def _patterns(told: Any) -> dict[str, Any]:
    """The alphas of single modules by their names, or the ends of these."""
    named = {name.lstrip("^"): value for name, value in told.items()} if isinstance(told, dict) else {}
    if odd := [name for name in named if not re.fullmatch(r"[\w.]+", name)]:
        raise ValueError(f"has an alpha by the regular expression {odd[0]}, and only names are read")
    return named


def _key(module: str) -> str:
    """A module's name as kohya has it; CLIP's may go without its first part, and to_out is the first of two there."""
    return re.sub(r"_to_out$", "_to_out_0", module.replace(".", "_").removeprefix("text_model_"))


# --- networks ----------------------------------------------------------------------------------------------

Step = tuple[str, Tensor, Callable[[Tensor], Tensor]]  # a tensor's full name, itself, and how it is changed


def _steps(path: Path, nets: Mapping[str, Any]) -> list[Step]:
    """What a file adds to which tensors."""
    steps: list[Step] = []
    problems: dict[str, list[str]] = {"unknown": [], "misshapen": []}
    for part, updates in read_lora(path).items():
        weights = _weights(nets[part]) if part in nets else {}
        found, rest = _matched(updates, weights)
        problems["misshapen"] += _misshapen(found, weights)
        steps += [(f"{part}.{name}", weights[name], update.delta) for name, update in found.items()]
        if rest and part == DENOISER:
            module = _twin(nets[part], path)
            standing, public = _standing(nets[part].config, weights, module)
            found, rest = _matched(rest, public)
            parts, rest = _matched_originals(rest, public, module)
            found |= parts
            problems["misshapen"] += _misshapen(found, public)
            steps += [
                (f"{part}.{name}", weights[name], partial(_carried, place, found, public))
                for name, place in standing.items()
                if found.keys() & place.names
            ]
        problems["unknown"] += [update.name for update in rest.values()]
    if any(problems.values()):
        raise misfit(str(path), type(nets[DENOISER]).__name__, problems, CAUSES)
    return steps


def _twin(network: Any, path: Path) -> Any:
    try:
        return public_twin(network.config)
    except ValueError as error:
        raise ValueError(
            f"{path} names tensors of a public network, and this one has no public twin ({error}); a LoRA for it has"
            " names of ours, such as denoiser.blocks.0.attn.qkv.lora_A.weight"
        ) from error


def _standing(
    config: ModelConfig, weights: Mapping[str, Tensor], module: nn.Module
) -> tuple[dict[str, Place], dict[str, Tensor]]:
    """Where our weights stand among those of the public module, and the latter; one that is many there is left out."""
    public = module.state_dict()
    standing = {name: place for name, place in places(config, weights, public).items() if not place.tied}
    return standing, {name: public[name] for place in standing.values() for name in place.names}


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Its matrices and convolutions."""
    return {name: x for name, x in network.state_dict().items() if name.endswith(".weight") and x.ndim > 1}


def _matched(updates: Updates, weights: Mapping[str, Tensor]) -> tuple[dict[str, Update], Updates]:
    """Updates by the names of the weights they are for, and the rest."""
    names = {_key(name.removesuffix(".weight")): name for name in weights}
    found = {names[key]: update for key, update in updates.items() if key in names}
    return found, {key: update for key, update in updates.items() if key not in names}


def _matched_originals(
    updates: Updates, public: Mapping[str, Tensor], module: Any
) -> tuple[dict[str, Update], Updates]:
    """The same for the names of Stable Diffusion's own modules, of which several public ones may be parts."""
    kinds = {part.public: part for family in FAMILIES.values() for part in family.values()}
    if type(module).__name__ not in kinds:
        return {}, updates
    rules = kinds[type(module).__name__].rules(module.config)
    originals: dict[str, list[str]] = {}
    for name, like in public.items():
        (original,) = to_original({name: like}, rules)
        originals.setdefault(original, []).append(name)
    wholes, rest = _matched(updates, dict.fromkeys(originals, torch.empty(0)))
    found = {}
    for original, update in wholes.items():
        names = originals[original]
        if len(update.up) % len(names):
            found[names[0]] = update  # which it does not fit
            continue
        rows = update.up.new_empty(len(update.up) // len(names), update.up.shape[1])
        parts = from_original({original: update.up}, dict.fromkeys(names, rows), rules)
        norms: dict[str, Tensor] = {}
        if update.magnitude is not None:
            norms = from_original({original: update.magnitude}, dict.fromkeys(names, rows[:, :1]), rules)
        found |= {name: replace(update, up=up, magnitude=norms.get(name)) for name, up in parts.items()}
    return found, rest


def _misshapen(found: Mapping[str, Update], weights: Mapping[str, Tensor]) -> list[str]:
    pairs = [(update, _shape(weights[name].shape)) for name, update in found.items()]
    return [f"{update.name} {update.shape} for {shape}" for update, shape in pairs if update.shape != shape]


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape, without the sides of a 1x1 convolution."""
    return tuple(shape[:2]) if set(shape[2:]) <= {1} else tuple(shape)


def _carried(place: Place, found: Mapping[str, Update], public: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """What is added to public weights as what is added to the one of ours that they are parts of."""
    wholes = place.write(weight, {name: public[name].shape for name in place.names})
    parts = {
        name: found[name].delta(part) if name in found else torch.zeros(part.shape) for name, part in wholes.items()
    }
    return place.read(parts, weight.shape)
