"""A checkpoint of adapters as a LoRA file: in the names of diffusers, of kohya's trainers, or ours.

    unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight         diffusers
    lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight kohya, and .alpha
    denoiser.down.1.attn.0.blocks.0.attn.qkv.lora_A.weight                                triptych

What is one tensor of ours and several in public, as qkv, has one A for all of them and the rows of B, so that it is
carried over exactly. SD3's transformer has its original names in kohya's files, in which qkv is one tensor again.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inference.description import Description, find
from inference.export.original import FAMILIES, to_original
from inference.lora import METADATA, Update, lora_file, read_lora
from models.base import ModelConfig
from models.interchange import Place, places, public_twin
from models.lora import DENOISER
from models.weights import appearing, first_names, read_config

TRIGGER = "modelspec.trigger_phrase"
PREFIXES = {"UNet2DConditionModel": "unet"}  # diffusers'; of the others it is transformer
SD3 = "SD3Transformer2DModel"
KOHYA = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
# Of the public class, and whether it reads pictures' sizes: the base as kohya's files say it, and as modelspec does.
BASES = {
    ("UNet2DConditionModel", False): ("sd_v1", "stable-diffusion-v1/lora"),
    ("UNet2DConditionModel", True): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    (SD3, False): ("sd3", "stable-diffusion-3/lora"),
    ("PixArtTransformer2DModel", False): ("pixart_sigma", "pixart-sigma/lora"),
    ("DiTTransformer2DModel", False): ("dit", "dit/lora"),
}


class Style(Enum):
    """Whose names a file has."""

    diffusers = "diffusers"
    kohya = "kohya"
    triptych = "triptych"


@dataclass(slots=True)
class Adapters:
    """What a checkpoint holds: by network, the updates with the names of our modules; and what is told about them."""

    networks: dict[str, list[Update]]
    config: ModelConfig
    settings: Mapping[str, Any]  # of the denoiser's adapters, or else of the encoders'
    description: Description


def export_lora(
    checkpoint: str | Path,
    out: str | Path,
    style: Style | str = Style.diffusers,
    *,
    weights: str = "ema",
    dtype: torch.dtype = torch.float32,
    title: str | None = None,
) -> int:
    """Write the adapters of a run or checkpoint as one file; returns how many layers it changes.

    ValueError if it holds none, or has layers that no public network has in one place.
    """
    out, style = Path(out), Style(style)
    if out.exists() or out.suffix != ".safetensors":
        reason = "exists already and is never overwritten" if out.exists() else "does not end in .safetensors"
        raise ValueError(f"{out} {reason}; choose another --out")
    held = open_adapters(checkpoint, weights)
    twin = None if style is Style.triptych else public_twin(held.config)
    about = _about(held, title or out.stem, twin)
    if twin is None:
        named = {f"{network}.{one.name}": one for network, updates in held.networks.items() for one in updates}
        tensors = dict(_peft(named, alpha=True))
    else:
        public = {network: _public(network, updates, held.config, twin) for network, updates in held.networks.items()}
        write = _diffusers if style is Style.diffusers else _kohya
        tensors, told = write(public, twin)
        about |= told
    # the parts of one tensor of ours have one A, and files refuse shared memory
    tensors = {
        name: tensor.to(dtype, copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with appearing(out) as partial:
        save_file(tensors, partial, {"format": "pt", **about})
    return sum(map(len, held.networks.values()))


def trigger_of(path: str | Path) -> str:
    """The words that call what a LoRA file, or a run or checkpoint of adapters, has learnt; "" if it names none."""
    if Path(path).is_dir():
        return open_adapters(path).settings.get("trigger") or ""
    with safe_open(lora_file(path), framework="pt") as file:
        return (file.metadata() or {}).get(TRIGGER, "").strip()


def open_adapters(checkpoint: str | Path, weights: str = "ema") -> Adapters:
    """The adapters of a run folder or checkpoint."""
    folder = find(checkpoint)
    description = Description.load(folder)
    if description.base is None:
        raise ValueError(
            f"{checkpoint} holds a whole network and no adapters; train them with model.lora.rank=16 init.from=..., or"
            " export the network with --format diffusers"
        )
    found = read_lora(folder / "denoiser" / f"{weights}.safetensors")
    networks = {
        network: [replace(one, name=one.name.removeprefix(f"{network}.")) for one in updates.values()]
        for network, updates in found.items()
    }
    described = folder / "config.json"  # snapshots have none
    run = json.loads(described.read_text()) if described.is_file() else {}
    settings = [(run.get(part) or {}).get("lora") or {} for part in ("model", "text")]
    chosen = next((one for one in settings if one.get("rank") is not None), {})
    return Adapters(networks, read_config(folder / "denoiser"), chosen, description)


# --- to public names ---------------------------------------------------------------------------------------


def _public(network: str, updates: list[Update], config: ModelConfig, twin: nn.Module) -> list[Update]:
    """The same updates, with the names of public modules and shaped for them."""
    if network != DENOISER:
        return [replace(one, name=_encoder_name(one.name)) for one in updates]
    public = twin.state_dict()
    standing = places(config, [f"{one.name}.weight" for one in updates], public)
    if tied := [name for name, place in standing.items() if place.tied or not set(place.names) <= public.keys()]:
        raise ValueError(
            f"{type(twin).__name__} has no single place for {first_names(tied)}; export with style triptych, or train"
            " with other model.lora.targets"
        )
    return [
        part for one in updates for part in _split(one, standing[f"{one.name}.weight"], public)
    ]  # fmt: skip


def _split(update: Update, place: Place, public: Mapping[str, Tensor]) -> Iterator[Update]:
    """An update of one tensor of ours as those of the public ones it is made of: rows of B beside one A."""

    def rows(tensor: Tensor) -> dict[str, Tensor]:
        return place.write(tensor, {name: torch.Size([len(public[name]), tensor.shape[1]]) for name in place.names})

    ups, norms = rows(update.up), rows(update.magnitude) if update.magnitude is not None else {}
    for name, up in ups.items():
        down = update.down.reshape(len(update.down), *public[name].shape[1:])
        yield replace(update, name=name.removesuffix(".weight"), up=up, down=down, magnitude=norms.get(name))


def _encoder_name(module: str) -> str:
    """CLIP's modules have their public names behind text_model, also where transformers leaves that away."""
    return f"text_model.{module}" if module.startswith("encoder.layers.") else module


# --- styles ------------------------------------------------------------------------------------------------

Written = tuple[dict[str, Tensor], dict[str, str]]  # tensors and metadata


def _peft(named: Mapping[str, Update], alpha: bool) -> Iterator[tuple[str, Tensor]]:
    for name, one in named.items():
        kernel = [1] * (one.down.ndim - 2)
        yield f"{name}.lora_A.weight", one.down
        yield f"{name}.lora_B.weight", one.up.reshape(*one.up.shape, *kernel)
        if one.magnitude is not None:
            shape = (1, -1, *kernel) if kernel else (-1,)  # PEFT's
            yield f"{name}.lora_magnitude_vector", one.magnitude.reshape(shape)
        if alpha:
            yield f"{name}.alpha", torch.tensor(_alpha(one))


def _alpha(update: Update) -> float:
    return update.scale * len(update.down)


def _diffusers(public: Mapping[str, list[Update]], twin: nn.Module) -> Written:
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    if "text_encoder_3" in public and type(twin).__name__ == SD3:
        raise ValueError(
            "diffusers reads no adapters of a third text encoder, which would be left out in silence; export with style"
            " kohya or triptych, or train with text.lora.targets=[q_proj,k_proj,v_proj,out_proj]"
        )
    for network, updates in public.items():
        prefix = PREFIXES.get(type(twin).__name__, "transformer") if network == DENOISER else network
        tensors |= dict(_peft({f"{prefix}.{one.name}": one for one in updates}, alpha=False))
        settings = {
            "r": len(updates[0].down),
            "lora_alpha": _alpha(updates[0]),
            "target_modules": sorted(one.name.removeprefix("text_model.") for one in updates),
            "use_dora": updates[0].magnitude is not None,
        }
        told |= {f"{prefix}.{key}": value for key, value in settings.items()}
    return tensors, {METADATA: json.dumps(told, sort_keys=True)}


def _kohya(public: Mapping[str, list[Update]], twin: Any) -> Written:
    tensors: dict[str, Tensor] = {}
    for network, updates in public.items():
        prefix = _kohya_prefix(network, twin)
        updates = _originals(updates, twin) if network == DENOISER else updates
        for one in updates:
            name, kernel = f"{prefix}{one.name.replace('.', '_')}", [1] * (one.down.ndim - 2)
            tensors |= {
                f"{name}.lora_down.weight": one.down,
                f"{name}.lora_up.weight": one.up.reshape(*one.up.shape, *kernel),
                f"{name}.alpha": torch.tensor(_alpha(one)),
            }
            if one.magnitude is not None:
                tensors[f"{name}.dora_scale"] = one.magnitude.reshape(-1, 1, *kernel)
    every = [one for updates in public.values() for one in updates]
    ranks, alphas = {len(one.down) for one in every}, {_alpha(one) for one in every}
    arguments = {"conv_dim": str(min(ranks))} if any(one.down.shape[2:].numel() > 1 for one in every) else {}
    if any(one.magnitude is not None for one in every):
        arguments["dora_wd"] = "True"
    return tensors, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_network_args": json.dumps(arguments),
    }


def _kohya_prefix(network: str, twin: Any) -> str:
    sd3 = type(twin).__name__ == SD3
    if network == DENOISER:
        return "lora_unet_" if sd3 or type(twin).__name__ in PREFIXES else "lora_transformer_"
    several = sd3 or _sized(twin)
    return KOHYA[network] if several or network != "text_encoder" else "lora_te_"


def _sized(twin: Any) -> bool:
    return getattr(twin.config, "addition_embed_type", None) == "text_time"


def _originals(updates: list[Update], twin: Any) -> list[Update]:
    """Updates of SD3's transformer with its original names; of the others as they are."""
    if type(twin).__name__ != SD3:
        return updates
    parts = [part for family in FAMILIES.values() for part in family.values() if part.public == type(twin).__name__]
    rules = parts[0].rules(twin.config)
    named = {f"{one.name}.weight": one for one in updates}
    whole = {original: name for name in named for original in to_original({name: named[name].up}, rules)}
    ups = to_original({name: one.up for name, one in named.items()}, rules)
    norms = to_original({name: one.magnitude for name, one in named.items() if one.magnitude is not None}, rules)
    return [
        replace(named[whole[original]], name=original.removesuffix(".weight"), up=up, magnitude=norms.get(original))
        for original, up in ups.items()
    ]


def _about(held: Adapters, title: str, twin: Any) -> dict[str, str]:
    """What every file tells: its base and the words that call what was learnt."""
    base, trigger = held.description.base, held.settings.get("trigger") or ""
    assert base is not None
    side = held.description.resolution
    about = {"modelspec.title": title, "modelspec.resolution": f"{side}x{side}", "triptych.base": base.path}
    about["triptych.base_sha256"] = base.sha256
    if trigger:
        about |= {TRIGGER: trigger, "ss_tag_frequency": json.dumps({title: {trigger: 1}})}
    if twin is not None:
        version, architecture = BASES[type(twin).__name__, _sized(twin)]
        about |= {"modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": architecture}
        about |= {"ss_base_model_version": version, "ss_output_name": title}
    return about
