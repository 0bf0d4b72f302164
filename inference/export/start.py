"""Public pipelines as a start for training: folders of diffusers, hub names, and single files.

A start is a network of ours and the description of what it was trained for. The autoencoder and the text encoders of a
folder stay where they are and are referred to; those of a single file are kept beside the network.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion.objective import NetworkTime, Objective, ObjectiveConfig, Prediction
from diffusion.schedule import Path as NoisePath
from diffusion.timesteps import TimeLaw
from inference.description import Description, SamplerConfig, typed
from inference.export.card import OBJECTIVE
from inference.export.scheduler import objective_of
from inference.export.single_file import ZERO_TERMINAL_SNR, SingleFile, read_single_file
from models.autoencoder import AutoencoderConfig, factor_of
from models.interchange import from_diffusers
from models.text import TextConfig
from models.weights import first_names, locate

BESIDE = "./"  # the path of what is kept beside the network
# Families of single files: the pipeline that runs them, and its public weights.
FAMILIES = {
    "sd1": ("StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sdxl": ("StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"),
    "sdxl-refiner": ("StableDiffusionXLImg2ImgPipeline", "stabilityai/stable-diffusion-xl-refiner-1.0"),
    "sd3": ("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3-medium-diffusers"),
}


@dataclass(slots=True)
class Start:
    """What training can start from: a network, what it was trained for, and parts to keep beside it, by subfolder."""

    denoiser: Any
    description: Description
    parts: dict[str, Any] = field(default_factory=dict)


def from_public(path: str, *, variant: str | None = None, revision: str | None = None) -> Start:
    """Read network and scheduler of a pipeline in diffusers' layout, a folder or a hub's name, from safetensors only.

    Its autoencoder and text encoders stay where they are and are referred to. `variant` is the middle of the files'
    names, such as fp16.
    """
    import diffusers

    source = _Source(path, revision)
    index = source.index()
    part = "unet" if "unet" in index else "transformer"
    network = source.read(getattr(diffusers, index[part][1]), part, variant=variant, torch_dtype=torch.float32)
    denoiser: Any = from_diffusers(network)
    return Start(
        denoiser,
        describe(
            denoiser,
            objective=objective_of(source.scheduler(index)),
            vae=AutoencoderConfig(path=path, revision=revision, variant=variant),
            factor=source.factor(),
            text=source.text(index, denoiser, variant),
        ),
    )


def from_single_file(path: str, config: str | None = None, *, ema: bool = False) -> Start:
    """Read a .safetensors or .ckpt file with the original names; `ema` takes averaged weights where it has some.

    `config` is a pipeline of the same kind in diffusers' layout, by default the public one of its family: what the file
    lacks, tokenizers at least, is taken from there.
    """
    folder = locate(config) if config else None
    file = read_single_file(path, folder if folder and Path(folder).is_dir() else None, ema=ema)
    name, public = FAMILIES[file.family]
    source = _Source(config or public)
    parts: dict[str, Any] = dict(file.modules)
    network = parts.pop("unet", None) or parts.pop("transformer")
    denoiser: Any = from_diffusers(network.float())
    if present := sorted(part for part in parts if part.startswith("text_encoder")):
        text = LAYOUTS[name](present, denoiser.config.text_dim, path=BESIDE)
        parts |= {tokenizer: source.tokenizer(tokenizer) for tokenizer in text.tokenizers} if text else {}
    else:
        text = source.text(source.index(), denoiser, None)
    vae = parts.get("vae")
    factor = factor_of(vae.config) if vae else source.factor()
    autoencoder = AutoencoderConfig(path=BESIDE if vae else source.path)
    description = describe(denoiser, objective=_objective(file), vae=autoencoder, factor=factor, text=text)
    return Start(denoiser, description, parts)


def _objective(file: SingleFile) -> ObjectiveConfig:
    """What a single file says of its objective, or what its family was trained for."""
    if told := file.metadata.get(OBJECTIVE):
        return typed(ObjectiveConfig, json.loads(told))
    if file.family == "sd3":
        flow = {"prediction": Prediction.flow, "path": NoisePath.linear, "times": TimeLaw.logit_normal}
        return ObjectiveConfig(**flow, shift=3.0)
    v = file.metadata.get("modelspec.prediction_type") == "v"
    return ObjectiveConfig(
        prediction=Prediction.v if v else Prediction.eps,
        zero_terminal=v and file.metadata.get(ZERO_TERMINAL_SNR) == "true",
        network_time=NetworkTime.index,
    )


@dataclass(slots=True)
class _Source:
    """A pipeline in diffusers' layout: a folder or a hub's name."""

    path: str
    revision: str | None = None

    def index(self) -> dict[str, Any]:
        """model_index.json of a class that has a twin here."""
        from diffusers import DiffusionPipeline

        index: Any = self._described(DiffusionPipeline.load_config)
        if (name := index["_class_name"]) not in LAYOUTS:
            raise ValueError(f"{self.path} is a {name}, which has no twin here; give one of {', '.join(LAYOUTS)}")
        return index

    def read(self, kind: Any, subfolder: str, **options: Any) -> Any:
        """A network, all of whose tensors must be in safetensors files."""
        options |= {"subfolder": subfolder, "revision": self.revision, "use_safetensors": True}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # said below, in one sentence
        try:
            module, info = kind.from_pretrained(locate(self.path), **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}/{subfolder} cannot be read: {' '.join(str(error).split())}") from error
        mismatched = [name for name, *_ in info["mismatched_keys"]]
        if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"], *mismatched]):  # they come as sets
            raise ValueError(
                f"{self.path}/{subfolder} does not fit a {kind.__name__}: {len(wrong)} tensors are missing, extra or"
                f" misshapen: {first_names(wrong)}; was its config.json changed, or is it another architecture?"
            )
        return module

    def scheduler(self, index: dict[str, Any]) -> Any:
        """The scheduler."""
        import diffusers

        kind = getattr(diffusers, index["scheduler"][1])
        return kind.from_pretrained(locate(self.path), subfolder="scheduler", revision=self.revision)

    def tokenizer(self, subfolder: str) -> Any:
        """A tokenizer, which single files are without."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(locate(self.path), subfolder=subfolder, revision=self.revision)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} has no {subfolder} that can be read from here, and a single file holds none; give"
                " --config, a pipeline of the same kind in diffusers' layout"
            ) from error

    def factor(self) -> int:
        """Pixels to a latent cell of the autoencoder, a side."""
        from diffusers import AutoencoderKL

        config: Any = self._described(AutoencoderKL.load_config, subfolder="vae")
        return factor_of(config)

    def text(self, index: dict[str, Any], denoiser: Any, variant: str | None) -> TextConfig | None:
        """How the pipeline reads its text."""
        present = sorted(name for name, part in index.items() if name.startswith("text_encoder") and part[1])
        width = getattr(denoiser.config, "text_dim", 0)
        at = {"path": self.path, "revision": self.revision, "variant": variant}
        zero_null = bool(index.get("force_zeros_for_empty_prompt"))
        return LAYOUTS[index["_class_name"]](present, width, zero_null=zero_null, **at)

    def _described(self, load: Callable[..., Any], **options: Any) -> Any:
        try:
            return load(locate(self.path), revision=self.revision, **options)
        except OSError as error:
            raise ValueError(
                f"{self.path} holds no model_index.json, or not its parts; give a pipeline in diffusers' layout, or a"
                " single file"
            ) from error


def describe(
    denoiser: Any, *, objective: ObjectiveConfig, vae: AutoencoderConfig, factor: int, text: TextConfig | None
) -> Description:
    """A description with the sampler that such networks are used with."""
    terminal = objective.path is NoisePath.vp and Objective(objective).t_max == 1
    return Description(
        objective=objective,
        sampler=SamplerConfig(steps=28, guidance=5.0, rescale=0.7 if terminal else 0.0),
        vae=vae,
        text=text,
        resolution=denoiser.config.base_size * factor,
        num_classes=getattr(denoiser.config, "num_classes", None),
    )


def _encoders(present: list[str], **options: Any) -> TextConfig:
    return TextConfig(
        encoders=present, tokenizers=[name.replace("text_encoder", "tokenizer") for name in present], **options
    )


def _sd3_text(present: list[str], width: int, **options: Any) -> TextConfig:
    third = {"length": 256} if "text_encoder_3" in present else {"empty": 256, "width": width}
    return _encoders(present, masked=False, **third, **options)


# how each pipeline reads its text: (encoders present, width that the network reads, where they are) -> TextConfig
LAYOUTS: dict[str, Callable[..., TextConfig | None]] = {
    "StableDiffusionPipeline": lambda present, width, **at: _encoders(present, masked=False, penultimate=False, **at),
    "StableDiffusionXLPipeline": lambda present, width, **at: _encoders(present, masked=False, **at),
    "StableDiffusionXLImg2ImgPipeline": lambda present, width, **at: _encoders(present, masked=False, **at),
    "StableDiffusion3Pipeline": _sd3_text,
    "PixArtAlphaPipeline": lambda present, width, **at: _encoders(present, length=120, lower=True, **at),
    "PixArtSigmaPipeline": lambda present, width, **at: _encoders(present, length=300, lower=True, **at),
    "DiTPipeline": lambda present, width, **at: None,
}
