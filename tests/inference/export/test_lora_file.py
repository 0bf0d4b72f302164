"""LoRA files that we write: the same network for us, and the same picture for diffusers, whatever the names."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from inference.export.lora import Style, export_lora
from inference.export.pipeline import to_public
from inference.export.scheduler import walked
from inference.lora import apply
from inference.networks import find_base
from inference.pipeline import Pipeline
from models.lora import LoRAConfig, adapt, adapters, networks, parts
from models.text import Conditioner
from models.weights import save_denoiser, write_config, write_tensors
from tests.inference.export.test_pipeline import EPS, FLOW, build, encoders, pictures_of_ours, pictures_of_theirs

assert encoders  # a fixture, by its name below
PLAIN = LoRAConfig(rank=3, alpha=6.0, trigger="a sks thing")
CONV = LoRAConfig(rank=3, targets=["qkv", "out", "q", "kv", "mlp.fc1", "mlp.fc2", "conv1", "time", "skip", "proj_in"])
DORA = LoRAConfig(rank=2, dora=True)
CLIP = LoRAConfig(rank=2, targets=["q_proj", "v_proj", "fc1"])


def adapted(name: str, lora: LoRAConfig, words: LoRAConfig, encoders: Path, folder: Path) -> tuple[Pipeline, Pipeline]:
    """A base, and the same with adapters by PEFT; saved in `folder`/base and `folder`/lora."""
    base = build(name, FLOW if name == "sd3" else EPS, encoders)
    base.description.save(_made(folder / "base"))
    save_denoiser(base.denoiser, folder / "base" / "denoiser", "ema")
    description = replace(base.description, base=find_base(folder / "base", "ema"))
    denoiser: Any = copy.deepcopy(base.denoiser)
    denoiser.config.lora = lora
    text = None
    if description.text:
        description.text = replace(description.text, lora=words)
        text = description.text.build()
    trained = adapt(denoiser, text)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_((0.3 if name == "sd3" or lora.dora else 0.1) * torch.randn_like(parameter))
    checkpoint = _made(folder / "lora")
    description.save(checkpoint)
    write_config(denoiser.config, _made(checkpoint / "denoiser"))
    write_tensors(adapters(trained), checkpoint / "denoiser", "ema")
    run = {part: {"lora": vars_of(config)} for part, config in (("model", lora), ("text", words))}
    (checkpoint / "config.json").write_text(json.dumps(run))
    network, _ = parts(trained)
    conditioner = Conditioner(text, description.num_classes, getattr(network.config, "vector_dim", 0))
    return base, Pipeline(network, conditioner, base.autoencoder, description)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def vars_of(config: LoRAConfig) -> dict[str, Any]:
    return {"rank": config.rank, "trigger": config.trigger}


def tensors(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    nets = networks(pipeline.denoiser, pipeline.conditioner.text)
    return {f"{part}.{name}": tensor for part, net in nets.items() for name, tensor in net.state_dict().items()}


CASES = [
    ("sd", PLAIN, PLAIN), ("sdxl", CONV, PLAIN), ("sdxl", DORA, DORA), ("sd3", PLAIN, PLAIN),
    ("sd3", DORA, LoRAConfig()), ("pixart", PLAIN, PLAIN), ("dit", PLAIN, LoRAConfig()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lora", "words"), CASES)
def test_what_is_written_is_read_as_the_checkpoint_itself(name, lora, words, encoders, tmp_path):
    base, beside = adapted(name, lora, words, encoders, tmp_path)
    merged, before = Pipeline.load(tmp_path / "lora", device="cpu"), copy.deepcopy(tensors(base))
    changed = [key for key, x in tensors(merged).items() if not torch.equal(x, before[key])]
    held = load_file(tmp_path / "lora/denoiser/ema.safetensors")
    assert len(changed) == sum(key.endswith("lora_A.weight") for key in held)
    subject: dict[str, Any] = {"class_ids": [3]} if name == "dit" else {"prompts": ["a red circle"]}
    one, two, plain = (x.draw(**subject, sampler=base.description.sampler) for x in (merged, beside, base))
    assert (one - two).abs().max() < 1e-4 < 0.01 < (two - plain).abs().max()
    for style in Style if name != "sd3" or words.rank is None else (Style.kohya, Style.triptych):
        file = tmp_path / f"{style.name}.safetensors"
        export_lora(tmp_path / "lora", file, style)
        denoiser, text = copy.deepcopy(base.denoiser), copy.deepcopy(base.conditioner.text)
        apply(denoiser, text, [(file, 1.0)])
        ours = Pipeline(denoiser, Conditioner(text), base.autoencoder, base.description)
        for key, x in tensors(ours).items():
            torch.testing.assert_close(x, tensors(merged)[key], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "style", "lora", "words"),
    [
        ("sdxl", "diffusers", CONV, PLAIN), ("sdxl", "kohya", PLAIN, PLAIN), ("sdxl", "kohya", CONV, PLAIN),
        ("sdxl", "diffusers", DORA, LoRAConfig()), ("sd", "diffusers", PLAIN, PLAIN), ("sd", "kohya", PLAIN, PLAIN),
        ("sd3", "diffusers", PLAIN, CLIP),
    ],
)  # fmt: skip
def test_diffusers_draws_our_picture_with_the_file(name, style, lora, words, encoders, tmp_path):
    base, _ = adapted(name, lora, words, encoders, tmp_path)
    to_public(copy.deepcopy(base)).save_pretrained(tmp_path / "public")
    public = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "public")
    export_lora(tmp_path / "lora", tmp_path / "file.safetensors", style)
    before = pictures_of_theirs(public, base)
    public.load_lora_weights(str(tmp_path), weight_name="file.safetensors", adapter_name="a")
    theirs = pictures_of_theirs(public, base)
    ours = pictures_of_ours(Pipeline.load(tmp_path / "lora", device="cpu"), walked(public.scheduler, 7))
    assert np.abs(theirs - before).max() > 0.02
    assert np.abs(ours - theirs).max() < 1e-3


def test_files_tell_their_base_and_the_words_that_call_them(encoders, tmp_path):
    adapted("sdxl", PLAIN, PLAIN, encoders, tmp_path)
    told = {}
    for style in Style:
        assert export_lora(tmp_path / "lora", tmp_path / f"{style.name}.safetensors", style, title="Things") > 30
        with safe_open(tmp_path / f"{style.name}.safetensors", "pt") as file:
            told[style] = file.metadata()
            assert told[style]["modelspec.title"] == "Things"
            assert told[style]["modelspec.trigger_phrase"] == "a sks thing"
            assert told[style]["triptych.base_sha256"] == find_base(tmp_path / "base", "ema").sha256
    kohya = told[Style.kohya]
    assert (kohya["ss_network_dim"], kohya["ss_network_alpha"]) == ("3", "6")
    assert (kohya["ss_network_module"], kohya["ss_base_model_version"]) == ("networks.lora", "sdxl_base_v1-0")
    assert kohya["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    settings = json.loads(told[Style.diffusers]["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"], settings["text_encoder_2.use_dora"]) == (3, 6.0, False)
    names = set(load_file(tmp_path / "kohya.safetensors"))
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {f"{block}.lora_down.weight", f"{block}.lora_up.weight", f"{block}.alpha"} <= names
    assert any(name.startswith("lora_te2_text_model_encoder_layers_1_") for name in names)


def test_what_no_public_file_can_say_is_refused(encoders, tmp_path):
    adapted("dit", LoRAConfig(rank=2, targets=["time_mlp.fc1"]), LoRAConfig(), encoders, tmp_path)
    with pytest.raises(
        ValueError, match=r"DiTTransformer2DModel has no single place for time_mlp.fc1.weight; export with"
    ):
        export_lora(tmp_path / "lora", tmp_path / "a.safetensors")
    export_lora(tmp_path / "lora", tmp_path / "a.safetensors", "triptych")
    with pytest.raises(
        ValueError, match=r"a.safetensors exists already and is never overwritten; choose another --out"
    ):
        export_lora(tmp_path / "lora", tmp_path / "a.safetensors", "triptych")
    with pytest.raises(ValueError, match="a.bin does not end in .safetensors; choose another --out"):
        export_lora(tmp_path / "lora", tmp_path / "a.bin")
    with pytest.raises(
        ValueError, match="base holds a whole network and no adapters; train them with model.lora.rank=16"
    ):
        export_lora(tmp_path / "base", tmp_path / "b.safetensors")
    adapted("sd3", PLAIN, PLAIN, encoders, tmp_path / "sd3")
    with pytest.raises(
        ValueError, match="diffusers reads no adapters of a third text encoder.*export with style kohya"
    ):
        export_lora(tmp_path / "sd3/lora", tmp_path / "b.safetensors")
