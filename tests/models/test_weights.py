"""A saved denoiser comes back bit for bit, or the error says what does not fit and why."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.base import Cond
from models.ccdit import CCDiTConfig
from models.interchange import to_diffusers
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.unet import UNetConfig
from models.weights import ROOT, load_denoiser, load_strict, locate, save_denoiser

SMALL = {"hidden": 16, "depth": 1, "heads": 2, "base_size": 4}
CONFIGS = [
    CCDiTConfig(**SMALL, in_channels=4, num_classes=3, qk_norm=True, positions="corner"),
    PixArtConfig(**SMALL, in_channels=4, text_dim=6),
    MMDiTConfig(**SMALL, in_channels=4, text_dim=6, pooled_dim=5, positions="crop", table_size=8),
    PixArtConfig(**SMALL, in_channels=4, text_dim=6, kv_compression=2, kv_blocks=[0, 0]),
]
CCDIT, PIXART, MMDIT, _ = CONFIGS
UNET = UNetConfig(channels=[16, 32], depths=[1, 0], heads=[2, 2], groups=8, text_dim=6)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_round_trip_is_bit_equal(config, tmp_path: Path):
    model = config.build()
    torch.nn.init.normal_(model.final.linear.weight)
    save_denoiser(model, tmp_path)
    loaded = load_denoiser(tmp_path)
    assert loaded.config == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    x, t = torch.randn(2, 4, 4, 4), torch.rand(2)
    cond = Cond(text=torch.randn(2, 3, 6), pooled=torch.randn(2, 5), class_id=torch.tensor([0, 1]))
    assert torch.equal(model(x, t, cond), loaded(x, t, cond))
    assert model(x, t, cond).abs().max() > 0


def test_two_sets_of_weights_share_a_config(tmp_path: Path):
    model, ema = CONFIGS[1].build(), CONFIGS[1].build().bfloat16()
    save_denoiser(model, tmp_path)
    save_denoiser(ema, tmp_path, name="ema")
    assert torch.equal(load_denoiser(tmp_path).patch_embed.weight, model.patch_embed.weight)
    assert torch.equal(load_denoiser(tmp_path, "ema").patch_embed.weight, ema.patch_embed.weight)  # and its dtype


def test_wrappers_leave_no_trace(tmp_path: Path):
    model = CONFIGS[0].build()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    save_denoiser(torch.compile(model), whole)
    model.blocks[0] = torch.compile(model.blocks[0])
    save_denoiser(model, parts)
    plain = set(CONFIGS[0].build().state_dict())
    assert set(load_denoiser(whole).state_dict()) == set(load_denoiser(parts).state_dict()) == plain


def test_files_obey_the_umask_and_leave_no_remains(tmp_path: Path):
    before = os.umask(0o027)
    try:
        save_denoiser(CONFIGS[0].build(), tmp_path)
    finally:
        os.umask(before)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


def test_a_failed_write_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = CONFIGS[0].build()
    save_denoiser(model, tmp_path)

    def broken(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("models.weights.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_denoiser(CONFIGS[0].build(), tmp_path)
    assert torch.equal(load_denoiser(tmp_path).patch_embed.weight, model.patch_embed.weight)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_every_misfit_is_named(tmp_path: Path):
    save_denoiser(PIXART.build(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["patch_embed.bias"]
    tensors |= {"stray": torch.zeros(1), "patch_embed.weight": torch.zeros(16, 16, 2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    message = r"model.safetensors does not fit PixArt: 1 missing: patch_embed.bias; 1 extra: stray; "
    message += r"1 misshapen: patch_embed.weight \(16, 16, 2, 2\) for \(16, 4, 2, 2\). Likely cause: another class"
    with pytest.raises(ValueError, match=message):
        load_denoiser(tmp_path)


def refused(model, tensors, cause: str) -> None:
    """The tensors are refused for that cause, and the model stays as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"file does not fit {type(model).__name__}: .* Likely cause: .*{cause}"):
        load_strict(model, tensors, source="file")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "change", "cause"),
    [
        (PIXART, {"qk_norm": True}, "model.qk_norm"),
        (MMDIT, {"qk_norm": True}, "model.qk_norm"),
        (PIXART, {"kv_compression": 2}, "model.kv_compression"),
        (MMDIT, {"dual": 1}, "model.dual"),
        (PIXART, {"mlp_ratio": 2}, "model.mlp_ratio"),
        (PIXART, {"variance": True}, "model.variance"),
        (CCDIT, {"num_classes": 7}, "model.num_classes"),
        (PIXART, {"in_channels": 16}, "was the autoencoder changed"),
        (PIXART, {"patch_size": 4}, "model.in_channels or model.patch_size"),
        (UNET, {"in_channels": 16}, "was the autoencoder changed"),
        (PIXART, {"text_dim": 8}, "were the text encoders changed"),
        (UNET, {"text_dim": 8}, "were the text encoders changed"),
        (MMDIT, {"text_dim": 8, "pooled_dim": 9}, "were the text encoders changed"),
        (UNET, {"vector_dim": 8}, "were the text encoders changed"),
        (CCDIT, {"depth": 2}, "model.depth"),
        (PIXART, {"depth": 2}, "model.depth"),
        (MMDIT, {"depth": 2}, "model.depth"),
        (UNET, {"depths": [2, 0]}, "model.depths"),
        (UNET, {"layers": 1}, "model.layers"),
        (CCDIT, {"hidden": 32}, "the same class in other sizes"),
        (CCDIT, {"heads": 4}, "the same class in other sizes"),  # of the norms of queries and keys
        (PIXART, {"hidden": 32}, "the same class in other sizes"),
        (UNET, {"channels": [32, 64]}, "the same class in other sizes"),
        (PIXART, {"hidden": 32, "depth": 2}, "another class"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else ",".join(value),
)
def test_another_option_is_the_cause_whichever_side_has_it(config, change, cause):
    one, other = config.build(), replace(config, **change).build()
    refused(one, other.state_dict(), cause)
    refused(other, one.state_dict(), cause)


@pytest.mark.parametrize(
    ("rename", "cause"),
    [
        (lambda name: f"module.{name}", "saved from inside a DDP or compile wrapper"),
        (lambda name: f"_orig_mod.{name}", "saved from inside a DDP or compile wrapper"),
        (lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."), "saved from inside a DDP or compile wrapper"),
        (lambda name: f"ema.{name}", "an average saved under a prefix"),
        (lambda name: f"model_ema.{name.replace('.', '')}", "an average saved under a prefix"),
        (lambda name: f"model.diffusion_model.{name}", "the original layout of a single file"),
        (lambda name: name.replace("patch_embed.", "x_embedder.proj."), "the original layout of a single file"),
        (lambda name: name.replace(".weight", ".lora_A.weight"), "a LoRA"),
        (lambda name: f"lora_unet_{name.replace('.', '_')}", "a LoRA"),
        (lambda name: name.replace("final.", "head."), "another class"),
    ],
)
def test_names_betray_a_foreign_file(rename, cause):
    model = PIXART.build()
    refused(model, {rename(name): tensor for name, tensor in model.state_dict().items()}, cause)


@pytest.mark.parametrize("config", [replace(CCDIT, qk_norm=False, as_diffusers=True), PIXART, MMDIT, UNET])
def test_a_diffusers_file_is_recognised(config):
    model = config.build()
    refused(model, to_diffusers(model).state_dict(), "a diffusers file")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_another_class_is_recognised(config):
    for other in (CCDIT, PIXART, MMDIT, UNET):
        if type(other) is not type(config):
            refused(config.build(), other.build().state_dict(), "another class")


def test_only_ten_names_are_listed():
    model = CONFIGS[1].build()
    with pytest.raises(ValueError, match="does not fit PixArt") as error:
        load_strict(model, {}, source="nothing")
    listed = str(error.value).split("missing: ")[1].split(". Likely")[0].split(", ")
    assert len(listed) == 11
    assert listed[-1] == "..."


def test_errors_of_the_folder_are_readable(tmp_path: Path):
    with pytest.raises(ValueError, match="model.safetensors does not exist; .* holds the weights of nothing"):
        load_denoiser(tmp_path)
    save_denoiser(CONFIGS[1].build(), tmp_path)
    with pytest.raises(ValueError, match="ema.safetensors does not exist; .* holds the weights model"):
        load_denoiser(tmp_path, "ema")
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "hiden": 3}))
    with pytest.raises(ValueError, match="keys that PixArt lacks: hiden"):
        load_denoiser(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**described, "_class_name": "Pixart"}))
    with pytest.raises(ValueError, match="_class_name='Pixart'; this project builds CCDiT, PixArt, MMDiT, UNet"):
        load_denoiser(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json does not exist"):
        load_denoiser(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path):
    save_denoiser(CONFIGS[1].build(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_denoiser(tmp_path)


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert locate("models/base.py") == str(ROOT / "models/base.py")  # below the repository
    (tmp_path / "models").mkdir()
    (tmp_path / "models/base.py").touch()
    assert locate("models/base.py") == "models/base.py"  # as given, when it exists
    assert locate("someone/some-model") == "someone/some-model"  # a hub's name
