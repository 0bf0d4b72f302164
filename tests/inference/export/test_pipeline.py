"""Exported pipelines: diffusers alone draws the same pictures, and what comes back is what left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from diffusion.objective import NetworkTime, ObjectiveConfig, Prediction
from diffusion.sample import Sampler
from diffusion.schedule import Path as NoisePath
from diffusion.timesteps import Grid, TimeLaw
from inference.description import Description, SamplerConfig
from inference.export.card import model_card, snippet
from inference.export.pipeline import to_public
from inference.export.scheduler import walked
from inference.export.start import from_public
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.base import ModelConfig
from models.ccdit import CCDiTConfig
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.text import Conditioner, TextConfig
from models.unet import UNetConfig

SHAPES = "assets/shapes"
SIDE = 64  # pixels: 8 cells
EPS = ObjectiveConfig(network_time=NetworkTime.index)
V = ObjectiveConfig(prediction=Prediction.v, zero_terminal=True, network_time=NetworkTime.index)
V_AT_T = ObjectiveConfig(prediction=Prediction.v, times=TimeLaw.logit_normal)
FLOW = ObjectiveConfig(prediction=Prediction.flow, path=NoisePath.linear, times=TimeLaw.logit_normal, shift=2.0)
FLOW_WHOLE = replace(FLOW, network_time=NetworkTime.whole)

UNET: dict[str, Any] = {"in_channels": 8, "base_size": 8, "channels": [16, 32], "depths": [1, 1], "heads": [2, 4]}
UNET["groups"] = 8
TRANSFORMER: dict[str, Any] = {"in_channels": 8, "base_size": 8, "hidden": 32, "depth": 2, "heads": 4}
MODELS: dict[str, ModelConfig] = {
    "sd": UNetConfig(**UNET, text_dim=64),
    "sdxl": UNetConfig(**UNET, text_dim=192, vector_dim=128 + 6 * 256, linear_projection=True),
    "refiner": UNetConfig(**UNET, text_dim=128, vector_dim=128 + 5 * 256, linear_projection=True),
    "sd3": MMDiTConfig(**TRANSFORMER, text_dim=40, pooled_dim=32, qk_norm=True),
    "sd3 without T5": MMDiTConfig(**TRANSFORMER, text_dim=40, pooled_dim=32, positions="crop", table_size=12),
    "pixart": PixArtConfig(**TRANSFORMER, text_dim=40),
    "dit": CCDiTConfig(**TRANSFORMER, num_classes=48, as_diffusers=True),
}
RUNS = {
    "sd": (EPS, V),
    "sdxl": (EPS, V, V_AT_T, FLOW, FLOW_WHOLE),
    "sd3": (FLOW, V),
    "sd3 without T5": (FLOW,),
    "pixart": (EPS, FLOW_WHOLE),
    "dit": (EPS, V),
}
ABSENT = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SD3's three encoders in small: two CLIPs with projections and a T5."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    clip = CLIPTokenizer.from_pretrained(SHAPES, subfolder="tokenizer")
    for suffix in ("", "_2"):
        clip.save_pretrained(folder / f"tokenizer{suffix}")
        config = CLIPTextConfig(
            vocab_size=641, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, projection_dim=16, bos_token_id=639, eos_token_id=640, pad_token_id=640,
        )  # fmt: skip
        CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{suffix}")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "star"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder / "tokenizer_3")
    t5 = T5Config(vocab_size=8, d_model=40, d_kv=10, d_ff=32, num_layers=2, num_heads=4)
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder_3")
    return folder


def text_config(name: str, encoders: Path) -> TextConfig | None:
    match name:
        case "sd":
            return TextConfig(
                path=SHAPES, encoders=["text_encoder"], tokenizers=["tokenizer"], penultimate=False, masked=False
            )
        case "sdxl":
            return TextConfig(path=SHAPES, masked=False, zero_null=True)
        case "refiner":
            return TextConfig(path=SHAPES, encoders=["text_encoder_2"], tokenizers=["tokenizer_2"], masked=False)
        case "sd3":
            three = ["", "_2", "_3"]
            named = {"encoders": [f"text_encoder{i}" for i in three], "tokenizers": [f"tokenizer{i}" for i in three]}
            return TextConfig(path=str(encoders), **named, masked=False, length=9)
        case "sd3 without T5":
            return TextConfig(path=str(encoders), masked=False, empty=9, width=40)
        case "pixart":
            named = {"encoders": ["text_encoder_3"], "tokenizers": ["tokenizer_3"]}
            return TextConfig(path=str(encoders), **named, length=9, lower=True)
    return None


def build(name: str, objective: ObjectiveConfig, encoders: Path) -> Pipeline:
    """A pipeline of a network that answers to everything, but mildly: pictures stay pictures."""
    torch.manual_seed(1)
    denoiser: Any = MODELS[name].build().eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    text = text_config(name, encoders)
    classes = getattr(denoiser.config, "num_classes", None)
    description = Description(
        objective=objective,
        sampler=SamplerConfig(steps=7, guidance=3.0),
        vae=AutoencoderConfig(path=SHAPES),
        text=text,
        resolution=SIDE,
        num_classes=classes,
    )
    conditioner = Conditioner(text.build() if text else None, classes, getattr(denoiser.config, "vector_dim", 0))
    return Pipeline(denoiser, conditioner, description.vae.build(), description)


def pictures_of_ours(pipeline: Pipeline, times: torch.Tensor) -> np.ndarray:
    """(2, h, w, 3) float in [0, 1], before they are rounded to bytes."""
    decoded, decode = [], pipeline.autoencoder.decode
    pipeline.autoencoder.decode = lambda z: decoded.append(decode(z)) or decoded[-1]
    subject = {"prompts": ["a red circle", "a blue star"]} if pipeline.conditioner.text else {"class_ids": [3, 41]}
    pipeline.generate(**subject, seeds=[5, 6], times=times)
    pipeline.autoencoder.decode = decode
    return ((decoded[0] + 1) / 2).permute(0, 2, 3, 1).numpy()


def pictures_of_theirs(public: Any, pipeline: Pipeline) -> np.ndarray:
    public.set_progress_bar_config(disable=True)
    steps, name = pipeline.description.sampler.steps, type(public).__name__
    options: dict[str, Any] = {
        "generator": [torch.Generator().manual_seed(seed) for seed in (5, 6)],
        "output_type": "np",
    }
    options |= {"guidance_scale": pipeline.description.sampler.guidance, "num_inference_steps": steps}
    if name == "DiTPipeline":
        return public(class_labels=[3, 41], **options).images
    options |= {"height": SIDE, "width": SIDE}
    if name == "StableDiffusion3Pipeline":
        options["max_sequence_length"] = 9
        if "FlowMatch" in type(public.scheduler).__name__:
            options["sigmas"] = [1 - i / steps for i in range(steps)]
    if name == "PixArtSigmaPipeline":
        options |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 9}
    return public(["a red circle", "a blue star"], **options).images


@pytest.mark.parametrize(
    ("name", "objective"), [(name, objective) for name, objectives in RUNS.items() for objective in objectives],
    ids=lambda x: x if isinstance(x, str) else f"{x.prediction.name}-{x.network_time.name}",
)  # fmt: skip
def test_diffusers_draws_the_same_pictures(name, objective, encoders, tmp_path):
    pipeline = build(name, objective, encoders)
    to_public(pipeline).save_pretrained(tmp_path / "public")
    public = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "public", **(ABSENT if "without" in name else {}))
    theirs = pictures_of_theirs(public, pipeline)
    ours = pictures_of_ours(pipeline, walked(public.scheduler, 7))
    assert ours.std() > 0.05  # not a flat grey
    told_less = name == "sdxl" and objective is FLOW  # up to a thousandth less than the time, and noise of 1, not 0.999
    assert np.abs(ours - theirs).max() < (0.02 if told_less else 1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_comes_back(name, encoders, tmp_path):
    objective = FLOW if "sd3" in name else EPS
    pipeline = build(name, objective, encoders)
    to_public(pipeline).save_pretrained(tmp_path, variant="fp16", max_shard_size="40KB")
    assert len(list(tmp_path.glob("*/*.safetensors"))) > 5  # sharded
    start = from_public(str(tmp_path), variant="fp16")
    before, after = pipeline.denoiser.state_dict(), start.denoiser.state_dict()
    table = {"class_embedding.weight"} if name == "dit" else set()  # padded to a thousand classes
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - table)
    assert start.description.objective == objective
    assert start.description.resolution == SIDE
    captions = ["a red circle", "a blue star on a star"]
    if pipeline.conditioner.text is not None and start.description.text is not None:
        length = {"length": 9} if pipeline.conditioner.text.config.length else {}
        length |= {"empty": 9} if start.description.text.empty else {}
        text = replace(start.description.text, **length).build()
        for a, b in zip(text.encode(captions), pipeline.conditioner.text.encode(captions), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert text.config.zero_null == pipeline.conditioner.text.config.zero_null
    latents = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    picture = start.description.vae.build().decode(latents)
    torch.testing.assert_close(picture, pipeline.autoencoder.decode(latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "objective"), [("sd", V), ("sdxl", EPS), ("sdxl", FLOW_WHOLE), ("dit", EPS)])
def test_an_exported_folder_opens_as_a_checkpoint_does(name, objective, encoders, tmp_path):
    pipeline = build(name, objective, encoders)
    to_public(pipeline).save_pretrained(tmp_path)
    opened = Pipeline.load(tmp_path, device="cpu")
    assert opened.name == tmp_path.name and len(opened.model_hash()) == 10
    subject = {"class_ids": [3]} if name == "dit" else {"prompts": ["a red circle"]}
    ours, theirs = (one.generate(**subject, sampler=pipeline.description.sampler) for one in (pipeline, opened))
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("objective", [EPS, FLOW], ids=["eps", "flow"])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_card_runs(name, objective, encoders, tmp_path):
    pipeline = build(name, objective, encoders)
    pipeline.description.sampler = SamplerConfig(name=Sampler.ddim, steps=7, guidance=3.0, rescale=0.7, eta=0.5)
    public = to_public(pipeline)
    public.save_pretrained(tmp_path)
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "picture.png")
    code = snippet(pipeline, public).replace("this folder", str(tmp_path)).replace("pipeline(", "picture = pipeline(")
    scope: dict[str, Any] = {}
    exec(code.replace("picture.png", str(tmp_path / "picture.png")), scope)
    assert scope["picture"].size == (SIDE, SIDE)
    card = model_card(pipeline, public, "Shapes")
    assert code.splitlines()[-1].partition("(")[2] in card
    assert type(public.scheduler).__name__ in card
    assert "adds fresh noise in every step (eta 0.5)" in card


def test_the_card_says_what_spaces_our_steps(encoders):
    shifted = build("sd", replace(EPS, shift=2.0), encoders)
    assert "spaces its steps with a shift of 2" in model_card(shifted, to_public(shifted), "Shapes")
    plain = build("sd", EPS, encoders)
    plain.description.sampler = SamplerConfig(name=Sampler.unipc, grid=Grid.karras)
    card = model_card(plain, to_public(plain), "Shapes")
    assert "steps of second order or higher (unipc)" in card and "by the grid karras" in card
    plain.description.sampler = SamplerConfig(grid=Grid.trailing)
    assert "What Triptych's sampler does" not in model_card(plain, to_public(plain), "Shapes")


def test_what_no_public_pipeline_runs_is_refused(encoders):
    def refused(name: str, message: str, objective: ObjectiveConfig = EPS, **changes: Any) -> None:
        pipeline = build(name, objective, encoders)
        if pipeline.conditioner.text is not None:
            pipeline.conditioner.text.config = replace(pipeline.conditioner.text.config, **changes)
        with pytest.raises(ValueError, match=message):
            to_public(pipeline)

    refused("sdxl", "text.masked=true, but public pipelines of a UNet show .* text.masked=false", masked=True)
    refused("pixart", "text.masked=false, but public pipelines of a PixArt hand", masked=False)
    refused("pixart", "read one T5EncoderModel of captions in small letters; this one", lower=False)
    refused("sd", "one CLIPTextModel's last states; .* text.penultimate=true", penultimate=True)
    refused("sdxl", "last states but one of CLIPTextModel and .*penultimate=false", penultimate=False)
    refused("sd", "the empty caption for a null, text.zero_null=false", zero_null=True)
    refused("sd3 without T5", "or text.empty zeros in its place; .* with CLIPText", empty=0, width=0)
    pair = build("sdxl", EPS, encoders)  # whose first CLIP has no projection
    pair.denoiser = MODELS["sd3 without T5"].build()
    pair.conditioner.text.config = replace(pair.conditioner.text.config, empty=9, width=192, zero_null=False)
    with pytest.raises(ValueError, match="of two CLIPTextModelWithProjection, and .* with CLIPTextModel, CLIPText"):
        to_public(pair)
    many = build("dit", EPS, encoders)
    many.denoiser = replace(many.denoiser.config, num_classes=1001).build()
    with pytest.raises(ValueError, match="model.num_classes=1001, but DiTPipeline takes class 1000 for the null one"):
        to_public(many)


def test_the_shapes_pipeline_is_refused_by_name():
    with pytest.raises(ValueError, match="read one T5EncoderModel"):
        to_public(Pipeline.load("assets/shapes/pipeline"))


def test_folders_that_hold_no_start_are_refused(encoders, tmp_path):
    with pytest.raises(ValueError, match="holds no model_index.json"):
        from_public(str(tmp_path))
    public = to_public(build("sd", EPS, encoders))
    public.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "KandinskyPipeline"))
    with pytest.raises(ValueError, match="is a KandinskyPipeline, which has no twin here; give one of StableDiffusion"):
        from_public(str(tmp_path))
    index.write_text(index.read_text().replace("KandinskyPipeline", "StableDiffusionPipeline"))
    with pytest.raises(ValueError, match="unet cannot be read"):
        from_public(str(tmp_path), variant="fp16")
    config = tmp_path / "unet" / "config.json"
    config.write_text(config.read_text().replace('"layers_per_block": 2', '"layers_per_block": 3'))
    with pytest.raises(ValueError, match="does not fit a UNet2DConditionModel: .* tensors are .*down_blocks"):
        from_public(str(tmp_path))
