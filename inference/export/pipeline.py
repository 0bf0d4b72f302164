"""A pipeline of ours as one of diffusers' classes, which draws the same.

    our network   its condition                                   diffusers' pipeline
    UNet          one CLIP, last states                           StableDiffusionPipeline
                  CLIP and OpenCLIP, sizes                        StableDiffusionXLPipeline
                  OpenCLIP alone, sizes and aesthetic score       StableDiffusionXLImg2ImgPipeline (the refiner)
    MMDiT         two CLIPs, and T5 or `text.empty` zeros for it   StableDiffusion3Pipeline
    PixArt        T5, masked                                      PixArtSigmaPipeline
    CCDiT         up to 1000 classes                              DiTPipeline

What a public pipeline would do otherwise than ours is refused in one sentence, or, where it is a choice of the caller
(guidance, steps), said in the model card. The schedulers are in `inference.export.scheduler`.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inference.export.scheduler import scheduler_for
from inference.pipeline import Pipeline
from models.autoencoder import Autoencoder
from models.ccdit import CCDiT
from models.interchange import to_diffusers
from models.mmdit import MMDiT
from models.pixart import PixArt
from models.text import TextEncoders
from models.unet import UNet
from models.weights import unwrap

CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
DIT_CLASSES = 1000  # DiTPipeline knows its null class by this number


def to_public(pipeline: Pipeline) -> Any:
    """A `DiffusionPipeline` that draws what `pipeline` draws, given the same noise, steps and guidance.

    The modules may share memory with ours. ValueError where no public class does the same.
    """
    import diffusers

    network = unwrap(pipeline.denoiser)
    makers: dict[type, Callable[[Pipeline], tuple[str, dict[str, Any]]]] = {
        UNet: _unet_parts,
        MMDiT: _mmdit_parts,
        PixArt: _pixart_parts,
        CCDiT: _ccdit_parts,
    }
    name, parts = makers[type(network)](pipeline)
    scheduler = scheduler_for(pipeline.objective, fractions=isinstance(network, MMDiT))
    return getattr(diffusers, name)(scheduler=scheduler, **parts)


def _unet_parts(pipeline: Pipeline) -> tuple[str, dict[str, Any]]:
    config = pipeline.denoiser.config
    text = _text(pipeline, masked=False, zeros=config.vector_dim > 0)
    statistics = config.vector_dim and isinstance(pipeline.autoencoder.shift, torch.Tensor)  # SDXL's know of them
    vae = pipeline.autoencoder.module if statistics else without_shift(pipeline.autoencoder)
    parts = {"unet": to_diffusers(pipeline.denoiser), "vae": vae}
    if not config.vector_dim:
        _require(_classes(text) == [CLIP] and not text.config.penultimate, text, "one CLIPTextModel's last states")
        checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return "StableDiffusionPipeline", parts | checker | _named(text, [""])
    parts |= {"force_zeros_for_empty_prompt": text.config.zero_null, "add_watermarker": False}
    if _classes(text) == [PROJECTED] and text.config.penultimate:
        absent = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
        return "StableDiffusionXLImg2ImgPipeline", parts | absent | _named(text, ["_2"])
    wanted = f"the last states but one of {CLIP} and {PROJECTED}, or of the second alone"
    _require(_classes(text) == [CLIP, PROJECTED] and text.config.penultimate, text, wanted)
    return "StableDiffusionXLPipeline", parts | _named(text, ["", "_2"])


def _mmdit_parts(pipeline: Pipeline) -> tuple[str, dict[str, Any]]:
    text = _text(pipeline, masked=False)
    third = _classes(text) == [PROJECTED, PROJECTED, T5]
    zeros = _classes(text) == [PROJECTED, PROJECTED] and text.config.empty > 0
    wanted = f"the last states but one of two {PROJECTED}, and {T5} or text.empty zeros in its place"
    _require((third or zeros) and text.config.penultimate, text, wanted)
    absent = {} if third else {"text_encoder_3": None, "tokenizer_3": None}
    parts = {"transformer": to_diffusers(pipeline.denoiser), "vae": pipeline.autoencoder.module}
    return "StableDiffusion3Pipeline", parts | absent | _named(text, ["", "_2", "_3"][: len(text.encoders)])


def _pixart_parts(pipeline: Pipeline) -> tuple[str, dict[str, Any]]:
    text = _text(pipeline, masked=True)
    _require(_classes(text) == [T5] and text.config.lower, text, f"one {T5} of captions in small letters")
    parts = {"transformer": to_diffusers(pipeline.denoiser), "vae": without_shift(pipeline.autoencoder)}
    return "PixArtSigmaPipeline", parts | _named(text, [""])


def _ccdit_parts(pipeline: Pipeline) -> tuple[str, dict[str, Any]]:
    transformer = to_diffusers(_with_thousand_classes(pipeline.denoiser))
    return "DiTPipeline", {"transformer": transformer, "vae": without_shift(pipeline.autoencoder)}


def _text(pipeline: Pipeline, masked: bool, zeros: bool = False) -> TextEncoders:
    """The encoders, if a public pipeline reads them so: `masked` or not, and with `zeros` for a null or never."""
    text, kind = pipeline.conditioner.text, type(pipeline.denoiser).__name__
    assert text is not None
    _require(zeros or not text.config.zero_null, text, "the empty caption for a null, text.zero_null=false")
    if text.config.masked != masked:
        does = "hand a network the mask of its tokens" if masked else "show a network all tokens, padding too"
        raise ValueError(
            f"text.masked={str(text.config.masked).lower()}, but public pipelines of a {kind} {does}; a model is"
            f" exportable when trained with text.masked={str(masked).lower()}"
        )
    return text


def _require(true: bool, text: TextEncoders, wanted: str) -> None:
    if not true:
        found = ", ".join(_classes(text))
        raise ValueError(
            f"public pipelines of such a network read {wanted}; this one was trained with {found} of"
            f" {text.config.path}, text.penultimate={str(text.config.penultimate).lower()}"
        )


def _classes(text: TextEncoders) -> list[str]:
    return [type(encoder).__name__ for encoder in text.encoders]


def _named(text: TextEncoders, suffixes: list[str]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for suffix, encoder, tokenizer in zip(suffixes, text.encoders, text.tokenizers, strict=True):
        parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
    return parts


@torch.no_grad()
def without_shift(autoencoder: Autoencoder) -> Any:
    """Its public module with the latents' shift inside: pipelines other than SD3's know of a scale alone.

    z - shift is a bias of the last convolution before the latents, z + shift one of the first after them.
    """
    if isinstance(autoencoder.shift, torch.Tensor):
        raise ValueError(
            "the autoencoder has latents_mean and latents_std, which SDXL's pipelines alone know of; choose a UNet with"
            " SDXL's text encoders, or an autoencoder without"
        )
    if not autoencoder.shift:
        return autoencoder.module
    module = copy.deepcopy(autoencoder.module)
    if module.quant_conv is None or module.post_quant_conv is None:
        raise ValueError(
            f"the autoencoder has shift_factor={autoencoder.shift:g} and no 1x1 convolutions around the latents to hold"
            " it; only SD3's pipeline knows of a shift, so choose an MMDiT, or another vae="
        )
    module.quant_conv.bias[: autoencoder.channels] -= autoencoder.shift
    module.post_quant_conv.bias += module.post_quant_conv.weight.sum((1, 2, 3)) * autoencoder.shift
    module.register_to_config(shift_factor=None)
    return module


def _with_thousand_classes(denoiser: CCDiT) -> nn.Module:
    """The same network with the null class in row 1000; the rows between its own classes and that are null too."""
    rows: Tensor = denoiser.class_embedding.weight
    if len(rows) == DIT_CLASSES + 1:
        return denoiser
    if len(rows) > DIT_CLASSES + 1:
        raise ValueError(
            f"model.num_classes={len(rows) - 1}, but DiTPipeline takes class {DIT_CLASSES} for the null one; it can be"
            f" exported with up to {DIT_CLASSES}"
        )
    with torch.device("meta"):
        padded: Any = replace(denoiser.config, num_classes=DIT_CLASSES).build()
    table = torch.cat([rows, rows[-1:].expand(DIT_CLASSES + 1 - len(rows), -1)])
    padded.load_state_dict(denoiser.state_dict() | {"class_embedding.weight": table}, assign=True)
    return padded.eval()
