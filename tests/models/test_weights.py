"""A saved denoiser comes back bit for bit, or the error says what does not fit and why."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.base import Cond
from models.ccdit import CCDiTConfig
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.weights import ROOT, load_denoiser, load_strict, locate, save_denoiser

SMALL = {"hidden": 16, "depth": 1, "heads": 2, "base_size": 4}
CONFIGS = [
    CCDiTConfig(**SMALL, in_channels=4, num_classes=3, qk_norm=True, positions="corner"),
    PixArtConfig(**SMALL, in_channels=4, text_dim=6),
    MMDiTConfig(**SMALL, in_channels=4, text_dim=6, pooled_dim=5, positions="crop", table_size=8),
]


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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("patch_embed.bias"), "1 missing: patch_embed.bias. Likely cause: another class or depth"),
        (lambda s: s.update(stray=torch.zeros(1)), "1 extra: stray"),
        (
            lambda s: s.update({"patch_embed.weight": torch.zeros(16, 16, 2, 2)}),
            r"1 misshapen: patch_embed.weight \(16, 16, 2, 2\) for \(16, 4, 2, 2\). Likely cause: model.in_channels",
        ),
        (lambda s: s.update({"blocks.0.table": torch.zeros(6, 8)}), "Likely cause: the same class at another size"),
        (lambda s: s.update({"blocks.0.attn.q_norm.weight": torch.ones(8)}), "Likely cause: model.qk_norm differs"),
        (lambda s: s.update({"module.stray": torch.zeros(1)}), "Likely cause: saved from inside a DDP or compile"),
        (lambda s: s.update({"transformer_blocks.0.x": torch.zeros(1)}), "Likely cause: a diffusers file"),
    ],
)
def test_loading_is_strict(spoil, message: str, tmp_path: Path):
    save_denoiser(CONFIGS[1].build(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors does not fit PixArt: .*{message}"):
        load_denoiser(tmp_path)


def test_only_ten_names_are_listed():
    model = CONFIGS[1].build()
    with pytest.raises(ValueError, match="does not fit PixArt") as error:
        load_strict(model, {}, source="nothing")
    listed = str(error.value).split("missing: ")[1].split(". Likely")[0].split(", ")
    assert len(listed) == 11
    assert listed[-1] == "..."


def test_a_misfit_leaves_the_model_as_it_was():
    model = CONFIGS[1].build()
    before = model.patch_embed.weight.clone()
    tensors = {key: value + 1 for key, value in model.state_dict().items()}
    del tensors["patch_embed.bias"]
    with pytest.raises(ValueError, match="1 missing"):
        load_strict(model, tensors, source="somewhere")
    assert torch.equal(model.patch_embed.weight, before)


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
