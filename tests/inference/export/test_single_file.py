"""Single files against diffusers, which reads them; against themselves, bit for bit; and at the public sizes."""

import hashlib
import json
import os
import re
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as theirs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inference.export.single_file import (
    DENOISER,
    from_tensors,
    modelspec,
    read_single_file,
    to_tensors,
    write_single_file,
)
from models.interchange import from_diffusers, to_diffusers

SPEC: dict[str, Any] = {"title": "A model", "date": "2026-11-21", "resolution": (64, 48), "prediction_type": "epsilon"}
ATTENTIVE = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def unet(down: tuple[str, ...], up: tuple[str, ...], text_dim: int, pooled: int = 0, **options: Any) -> nn.Module:
    sizes = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": pooled,
        "use_linear_projection": True,
    }
    options = {"block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 4} | options
    types = {"down_block_types": down, "up_block_types": up}
    return diffusers.UNet2DConditionModel(cross_attention_dim=text_dim, **types, **(sizes if pooled else {}), **options)


def vae(latent_channels: int = 4, **options: Any) -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=latent_channels,
        **options,
    )


def clip(width: int, projected: bool = False) -> nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=9,
        bos_token_id=0,
        eos_token_id=2,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def sd3(**options: Any) -> nn.Module:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 3, "caption_projection_dim": 32}
    text = {"joint_attention_dim": 40, "pooled_projection_dim": 40, "sample_size": 8, "pos_embed_max_size": 12}
    return diffusers.SD3Transformer2DModel(**sizes, **text, **options)


def t5() -> nn.Module:
    sizes = {"d_model": 40, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 30}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))


def _sd1() -> dict[str, nn.Module]:
    return {"unet": unet(*ATTENTIVE, 16), "vae": vae(), "text_encoder": clip(16)}


def _sdxl() -> dict[str, nn.Module]:
    deep = {"transformer_layers_per_block": (1, 2), "layers_per_block": 3, "attention_head_dim": (2, 4)}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    encoders = {"text_encoder": clip(16), "text_encoder_2": clip(24, projected=True)}
    return {"unet": unet(down, up, 40, 24 + 6 * 256, **deep), "vae": vae(scaling_factor=0.5), **encoders}


def _refiner() -> dict[str, nn.Module]:
    return {"unet": unet(*ATTENTIVE, 24, 24 + 5 * 256), "vae": vae(), "text_encoder_2": clip(24, projected=True)}


def _sd3() -> dict[str, nn.Module]:
    encoders = {"text_encoder": clip(16, projected=True), "text_encoder_2": clip(24, projected=True)}
    convs = {"use_quant_conv": False, "use_post_quant_conv": False}
    return {"transformer": sd3(), "vae": vae(16, shift_factor=0.1, **convs), **encoders, "text_encoder_3": t5()}


def _sd35() -> dict[str, nn.Module]:
    return _sd3() | {"transformer": sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1))}


CASES = {
    "sd1": (_sd1, "sd1", "StableDiffusionPipeline"),
    "sdxl": (_sdxl, "sdxl", "StableDiffusionXLPipeline"),
    "refiner": (_refiner, "sdxl-refiner", "StableDiffusionXLImg2ImgPipeline"),
    "sd3": (_sd3, "sd3", "StableDiffusion3Pipeline"),
    "sd3.5": (_sd35, "sd3", "StableDiffusion3Pipeline"),
}


def components(case: str) -> dict[str, nn.Module]:
    """Tiny modules with loud random weights, so that no two tensors and no two halves are alike."""
    generator, modules = torch.Generator().manual_seed(0), CASES[case][0]()
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if case.startswith("sd3"):
            modules["text_encoder"].text_projection.weight.copy_(torch.eye(16))  # readers take SD3's CLIP-L so
    return modules


def config_folder(modules: dict[str, nn.Module], pipeline: str, folder: Path) -> Path:
    """A folder in diffusers' layout without any weights."""
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", "DDIMScheduler"]}
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    for name, module in modules.items():
        index[name] = [type(module).__module__.partition(".")[0], type(module).__name__]
        save = module.save_config if index[name][0] == "diffusers" else module.config.save_pretrained
        save(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def same(ours: nn.Module, others: nn.Module) -> bool:
    a, b = ours.state_dict(), others.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("case", CASES)
def test_diffusers_reads_what_is_written(case, tmp_path):
    modules, pipeline = components(case), getattr(diffusers, CASES[case][2])
    write_single_file(tmp_path / "file.safetensors", modules, {})
    absent = {"tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder"} & signature(pipeline).parameters.keys()
    read = pipeline.from_single_file(
        str(tmp_path / "file.safetensors"),
        config=str(config_folder(modules, pipeline.__name__, tmp_path / "configs")),
        **dict.fromkeys(absent - modules.keys()),
        local_files_only=True,
    )
    for name, module in modules.items():
        assert same(getattr(read, name), module), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_round_trip_keeps_every_bit(case, suffix, tmp_path):
    modules = {
        name: module.to(torch.bfloat16 if name == "vae" else torch.float32) for name, module in components(case).items()
    }
    write_single_file(
        tmp_path / f"file{suffix}", modules, {"note": "kept", "modelspec.hash_sha256": "0x0"}, pickled=suffix == ".ckpt"
    )
    read = read_single_file(tmp_path / f"file{suffix}")
    assert (read.family, read.left_out, read.metadata["note"]) == (CASES[case][1], [], "kept")
    assert "modelspec.hash_sha256" not in read.metadata  # another file's
    assert read.modules.keys() == modules.keys()
    for name, module in read.modules.items():
        assert same(module, modules[name]), name
        assert not module.training
        assert options(module) == options(modules[name]), name
        assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in modules[name].parameters())
    ids = torch.tensor([[0, 7, 9, 2]])
    for name in modules.keys() - {"unet", "transformer", "vae"}:
        a, b = (parts[name].eval()(ids).last_hidden_state for parts in (modules, read.modules))
        assert torch.equal(a, b)  # also what is not saved, CLIP's positions, is back


def options(module: Any) -> dict[str, Any]:
    known = dict(module.config) if isinstance(module, diffusers.ModelMixin) else module.config.to_dict()
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
    return {key: value for key, value in plain.items() if not key.startswith("_") and "dtype" not in key}


def test_our_networks_leave_and_come_back(tmp_path):
    for case, name in {"sdxl": "unet", "sd3.5": "transformer"}.items():
        ours = from_diffusers(components(case)[name])
        write_single_file(tmp_path / "file.safetensors", {name: torch.compile(to_diffusers(ours)), "vae": None}, {})
        back = from_diffusers(read_single_file(tmp_path / "file.safetensors").modules[name])
        assert same(back, ours)
        assert back.config == ours.config


def meta(kind: Any, options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return kind(**options) if issubclass(kind, diffusers.ModelMixin) else kind(kind.config_class(**options))


XL_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
XL_UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
VECTOR = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
XL_VAE = VAE | {"scaling_factor": 0.13025, "sample_size": 1024}
SD3_VAE = VAE | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024}
SD3_VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_attention_heads": 12, **IDS}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_attention_heads": 20, **IDS}
CLIP_G |= {"num_hidden_layers": 32, "hidden_act": "gelu"}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
SD3 = {"caption_projection_dim": 1536, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16}
CLIP, CLIP_PROJECTED = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
SD3_PARTS = {
    "vae": (diffusers.AutoencoderKL, SD3_VAE),
    "text_encoder": (CLIP_PROJECTED, CLIP_L),
    "text_encoder_2": (CLIP_PROJECTED, CLIP_G),
    "text_encoder_3": (transformers.T5EncoderModel, T5_XXL),
}
PUBLIC = {  # what diffusers calls the file, ModelSpec's name, and the options of the public configs
    "v1": ("stable-diffusion-v1", {
        "unet": (diffusers.UNet2DConditionModel, {"cross_attention_dim": 768, "sample_size": 64}),
        "vae": (diffusers.AutoencoderKL, VAE | {"sample_size": 512}),
        "text_encoder": (CLIP, CLIP_L),
    }),
    "xl_base": ("stable-diffusion-xl-v1-base", {
        "unet": (diffusers.UNet2DConditionModel, VECTOR | {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": XL_DOWN,
            "up_block_types": XL_UP,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        }),
        "vae": (diffusers.AutoencoderKL, XL_VAE),
        "text_encoder": (CLIP, CLIP_L),
        "text_encoder_2": (CLIP_PROJECTED, CLIP_G),
    }),
    "xl_refiner": ("stable-diffusion-xl-v1-refiner", {
        "unet": (diffusers.UNet2DConditionModel, VECTOR | {
            "block_out_channels": (384, 768, 1536, 1536),
            "down_block_types": (*XL_DOWN, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *XL_UP),
            "transformer_layers_per_block": 4,
            "attention_head_dim": (6, 12, 24, 24),
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
            "sample_size": 128,
        }),
        "vae": (diffusers.AutoencoderKL, XL_VAE),
        "text_encoder_2": (CLIP_PROJECTED, CLIP_G),
    }),
    "sd3": ("stable-diffusion-v3-medium", SD3_PARTS | {
        "transformer": (diffusers.SD3Transformer2DModel, SD3 | {"pos_embed_max_size": 192}),
    }),
    "sd35_medium": ("stable-diffusion-v3.5-medium", SD3_PARTS | {
        "transformer": (diffusers.SD3Transformer2DModel, SD3 | {
            "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
        }),
    }),
    "sd35_large": ("stable-diffusion-v3.5-large", SD3_PARTS | {
        "transformer": (diffusers.SD3Transformer2DModel, SD3 | {
            "caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38,
            "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        }),
    }),
}  # fmt: skip


def converted(name: str, module: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A component's tensors as diffusers converts those of a file."""
    match name, type(module).__name__:
        case "unet", _:
            return theirs.convert_ldm_unet_checkpoint(tensors, module.config)
        case "transformer", _:
            kept = {key: tensor for key, tensor in tensors.items() if key.startswith(DENOISER)}
            return theirs.convert_sd3_transformer_checkpoint_to_diffusers(kept)
        case "vae", _:
            return theirs.convert_ldm_vae_checkpoint(tensors, module.config)
        case "text_encoder_3", _:
            return theirs.convert_sd3_t5_checkpoint_to_diffusers(tensors)
    open_clip = next((key for key in tensors if key.endswith(".ln_final.weight")), None)
    if open_clip and name == "text_encoder_2":
        return theirs.convert_open_clip_checkpoint(module, tensors, open_clip.removesuffix("ln_final.weight"))
    prefix = {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.clip_g."}[name]
    found = theirs.convert_ldm_clip_checkpoint(tensors, f"{prefix}transformer.")
    return found if hasattr(module, "text_model") else {key.removeprefix("text_model."): found[key] for key in found}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_sizes_have_the_public_names_and_are_recognised(name):
    architecture, parts = PUBLIC[name]
    modules = {component: meta(kind, options) for component, (kind, options) in parts.items()}
    spec = modelspec(modules, **SPEC)
    assert spec["modelspec.architecture"] == architecture
    family = {"v1": "sd1", "xl_base": "sdxl", "xl_refiner": "sdxl-refiner"}.get(name, "sd3")
    tensors = to_tensors(modules, family)
    assert theirs.infer_diffusers_model_type(tensors) == name
    read = from_tensors(tensors, family, {}, source="meta")
    for component, module in modules.items():
        wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
        found = {key: tensor.shape for key, tensor in converted(component, module, tensors).items()}
        assert found == wanted, component
        assert {key: tensor.shape for key, tensor in read[component].state_dict().items()} == wanted
        one_or_many = {"transformer_layers_per_block": None}  # shapes have told
        assert options(read[component]) | one_or_many == options(module) | one_or_many, component


def test_the_header_is_modelspec_with_the_hash_of_what_follows_it(tmp_path):
    modules, path = components("sdxl"), tmp_path / "new" / "file.safetensors"
    write_single_file(path, modules, modelspec(modules, **SPEC))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    metadata.pop("triptych.config")
    assert metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "A model",
        "modelspec.date": "2026-11-21",
        "modelspec.resolution": "64x48",
        "modelspec.prediction_type": "epsilon",
        "modelspec.hash_sha256": "0x" + hashlib.sha256(content[8 + size :]).hexdigest(),
    }
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(("terminal", "markers"), [(False, ["v_pred"]), (True, ["v_pred", "ztsnr"])])
def test_uis_are_told_of_v(terminal, markers, tmp_path):
    modules, path = components("sdxl"), tmp_path / "file.safetensors"
    spec = modelspec(modules, **SPEC | {"prediction_type": "v"}, zero_terminal_snr=terminal)
    write_single_file(path, modules, spec)
    tensors = load_file(path)
    assert [name for name in ("v_pred", "ztsnr") if name in tensors] == markers
    save_file(tensors, path, {"triptych.config": read_single_file(path).metadata["triptych.config"]})
    read = read_single_file(path)
    assert read.left_out == markers
    assert read.metadata["modelspec.prediction_type"] == "v"
    assert ("triptych.zero_terminal_snr" in read.metadata) == terminal


def rewritten(tmp_path: Path, case: str, change: Any, metadata: bool = True) -> Path:
    """A file written here and then changed by somebody else."""
    path = tmp_path / "file.safetensors"
    write_single_file(path, components(case), {})
    with safe_open(path, "pt") as file:
        kept = file.metadata() if metadata else None
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path, kept)
    return path


def test_what_files_leave_out_and_what_they_hold_besides(tmp_path):
    besides = {
        "betas": torch.ones(3),
        "sqrt_one_minus_alphas_cumprod": torch.ones(3),
        "model_ema.num_updates": torch.tensor(3),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": torch.arange(9)[None],
        "text_encoders.clip_g.logit_scale": torch.tensor(1.0),
    }

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["text_encoders.clip_l.transformer.text_projection.weight"]
        del tensors["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"]
        tensors.update(besides)

    read = read_single_file(rewritten(tmp_path, "sd3", change))
    assert read.left_out == sorted(besides)
    assert all(same(read.modules[name], module) for name, module in components("sd3").items())
    assert not read.has_ema


def test_averaged_weights_are_taken_when_asked_for(tmp_path):
    def average(name: str) -> str:
        return "model_ema." + name.removeprefix("model.").replace(".", "")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {average(name): -tensors[name] for name in tensors if name.startswith(DENOISER)}

    path, modules = rewritten(tmp_path, "sd1", change), components("sd1")
    assert average(f"{DENOISER}input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"
    for ema, sign in ((False, 1), (True, -1)):
        read = read_single_file(path, ema=ema)
        assert read.has_ema
        assert torch.equal(read.modules["unet"].conv_in.weight, sign * modules["unet"].conv_in.weight)
        assert same(read.modules["vae"], modules["vae"])
    with pytest.raises(
        ValueError, match=r"lacks \d+ averaged tensors: model_ema.diffusion_model.*take the model's own"
    ):
        read_single_file(rewritten(tmp_path, "sd1", lambda tensors: None), ema=True)


def test_files_of_no_public_size_need_configs(tmp_path):
    path, modules = rewritten(tmp_path, "sdxl", lambda tensors: None, metadata=False), components("sdxl")
    sizes = r"UNet2DConditionModel of no public size \(block_out_channels=\[16, 32\], cross_attention_dim=40\)"
    with pytest.raises(ValueError, match=rf"{sizes}.* do not tell attention_head_dim.*give config="):
        read_single_file(path)
    with pytest.raises(ValueError, match="config=.*nowhere holds no .*unet.*give a diffusers pipeline"):
        read_single_file(path, tmp_path / "nowhere")
    read = read_single_file(path, config_folder(modules, "StableDiffusionXLPipeline", tmp_path / "configs"))
    assert all(same(read.modules[name], module) for name, module in modules.items())
    assert options(read.modules["unet"]) == options(modules["unet"])


def renamed(pattern: str, replacement: str) -> Any:
    return lambda tensors: {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}


MISFITS = {
    "missing": (
        "sdxl",
        lambda tensors: {name: tensors[name] for name in tensors if ".ln_final." not in name},
        r"does not fit sdxl: 2 missing: conditioner.embedders.1.model.ln_final.\w+, .* cause: other text encoders",
    ),
    "extra": (
        "sd1",
        lambda tensors: tensors | {"something.else": torch.ones(1)},
        "1 extra: something.else. Likely cause: another architecture",
    ),
    "another VAE": (
        "sd1",
        lambda tensors: tensors | {"first_stage_model.quant_conv.bias": torch.ones(3)},
        r"1 misshapen: first_stage_model.quant_conv.bias \(3,\) for \(8,\). Likely cause: another VAE",
    ),
    "another network": ("sd3", renamed(r"joint_blocks", "blocks"), "does not fit Stable Diffusion: 1 missing"),
    "compiled": ("sd1", renamed(r"^(model\.)", r"\1_orig_mod."), "a compile prefix, `_orig_mod.`"),
    "compiled inside": ("sd3", renamed(r"(x_block)\.", r"\1._orig_mod."), "a compile prefix, `_orig_mod.`"),
    "averages alone": ("sd1", renamed(r"^model\.", "model_ema."), "an EMA prefix"),
    "of diffusers": ("sd1", renamed(r"^model\.diffusion_model\.input_blocks", "down_blocks"), "a file of diffusers"),
    "a LoRA": ("sd1", renamed(r"^model\.", "lora_unet_"), "a LoRA, which is added"),
    "SD 2": ("sd1", renamed(r"^cond_stage_model.transformer", "cond_stage_model.model"), "Stable Diffusion 2"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_named_with_its_likely_cause(misfit, tmp_path):
    case, change, sentence = MISFITS[misfit]
    with pytest.raises(ValueError, match=sentence) as refusal:
        read_single_file(rewritten(tmp_path, case, change))
    assert str(refusal.value).count(", ") <= 30  # ten names of each kind


def test_a_cut_file_says_what_is_missing(tmp_path):
    save_file({f"{DENOISER}input_blocks.0.0.weight": torch.ones(320, 4, 3, 3)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: model.diffusion_model.out.2.weight. Likely cause: another"):
        read_single_file(tmp_path / "file.safetensors")


@pytest.mark.parametrize(
    ("case", "change", "name", "sentence"),
    [
        ("sd1", {}, "file.ckpt", "file.ckpt must end in .safetensors, since pickled=False"),
        ("sd1", {"unet": None}, "file.safetensors", "modules vae, text_encoder lack a unet or a transformer"),
        ("sd1", {"text_encoder_2": clip(16)}, "file.safetensors", "text_encoder_2 has no place in a file of sd1"),
        (
            "sd3",
            {"text_encoder": clip(16)},
            "file.safetensors",
            "text_encoder is a CLIPTextModel, but a file of sd3 holds a CLIPTextModelWith",
        ),
        ("sd3", {"text_encoder": clip(16, True)}, "file.safetensors", "has a text_projection.weight that readers"),
        (
            "sd1",
            {"unet": unet(*ATTENTIVE, 16, class_embed_type="timestep")},
            "file.safetensors",
            "unet has 4 tensors without an original name: class_embedding.linear_1.bias",
        ),
    ],
)
def test_what_has_no_original_name_is_not_written(case, change, name, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        write_single_file(tmp_path / name, components(case) | change, {})
    assert os.listdir(tmp_path) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path, modules = tmp_path / "file.safetensors", components("sd1")
    write_single_file(path, modules, {})
    before = path.read_bytes()
    monkeypatch.setattr(hashlib, "file_digest", None)  # the disc is full, say, when all but the hash is written
    with pytest.raises(TypeError):
        write_single_file(path, components("sdxl"), modelspec(modules, **SPEC))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(ValueError, match="metadata steps must be text"):
        write_single_file(path, modules, {"steps": 3})
    assert path.read_bytes() == before


def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "file.safetensors"
    with pytest.raises(ValueError, match="file.safetensors does not exist; give a checkpoint file"):
        read_single_file(path)
    write_single_file(path, components("sd1"), {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="file.safetensors is damaged .*take another copy"):
        read_single_file(path)
    save_file({"a": torch.ones(1)}, path, {"triptych.config": "[]"})
    with pytest.raises(ValueError, match="damaged metadata triptych.config"):
        read_single_file(path)
