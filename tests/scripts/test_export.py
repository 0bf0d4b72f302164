"""The commands: a checkpoint to a folder, a single file and a .ckpt, and each of them back to what draws the same."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.objective import NetworkTime, ObjectiveConfig, Prediction
from inference.description import Description, SamplerConfig
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.text import TextConfig
from models.unet import UNetConfig
from models.weights import load_denoiser, save_denoiser
from training.origin import inherit

ROOT = Path(__file__).parents[2]
V = ObjectiveConfig(prediction=Prediction.v, zero_terminal=True, network_time=NetworkTime.index)


def run(script: str, *arguments: object) -> None:
    """A command of scripts/, in this process."""
    before, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An SDXL in small, that answers to everything."""
    torch.manual_seed(0)
    unet = UNetConfig(
        in_channels=8, base_size=8, channels=[16, 32], depths=[0, 1], heads=[2, 4], groups=8, text_dim=192,
        vector_dim=128 + 6 * 256, linear_projection=True,
    ).build()  # fmt: skip
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    folder = tmp_path / "checkpoint"
    save_denoiser(unet, folder / "denoiser", "ema")
    Description(
        objective=V,
        sampler=SamplerConfig(steps=4, guidance=3.0),
        vae=AutoencoderConfig(path="assets/shapes"),
        text=TextConfig(path="assets/shapes", masked=False),
        resolution=64,
        num_classes=None,
    ).save(folder)
    return folder


def draw(folder: Path, sampler: SamplerConfig) -> np.ndarray:
    return Pipeline.load(folder, device="cpu").generate(["a red circle"], seeds=[3], sampler=sampler)


@pytest.mark.parametrize(
    ("form", "name"), [("diffusers", "folder"), ("single-file", "file.safetensors"), ("ckpt", "file.ckpt")]
)
def test_there_and_back_draws_the_same(form, name, checkpoint, tmp_path, capsys):
    out, back = tmp_path / name, tmp_path / "back"
    run("export.py", "--checkpoint", checkpoint, "--format", form, "--out", out)
    if form == "diffusers":
        assert "StableDiffusionXLPipeline" in (out / "README.md").read_text()
        run("import.py", "--from", out, "--out", back)
    else:
        folder = tmp_path / "config"  # tokenizers are in no single file
        run("export.py", "--checkpoint", checkpoint, "--out", folder)
        run("import.py", "--from", out, "--config", folder, "--out", back)
        moved = tmp_path / "moved"
        back = back.rename(moved)  # its parts lie beside it
    assert f"init.from={tmp_path / 'back'}" in capsys.readouterr().out
    sampler = Description.load(checkpoint).sampler
    assert Description.load(back).objective == V
    assert Description.load(back).resolution == 64
    assert np.abs(draw(back, sampler).astype(int) - draw(checkpoint, sampler)).max() <= 1
    source = load_denoiser(checkpoint / "denoiser", "ema")
    fresh: Any = source.config.build()
    inherit(fresh, {"from": str(back), "mode": "anchor", "weights": "ema"}, Description.load(checkpoint), print)
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in source.state_dict().items())


def test_half_precision_is_written_where_asked(checkpoint, tmp_path):
    out = tmp_path / "half"
    run("export.py", "--checkpoint", checkpoint, "--dtype", "float16", "--variant", "fp16", "--out", out)
    assert (out / "unet" / "diffusion_pytorch_model.fp16.safetensors").stat().st_size < 3e6
    run("import.py", "--from", out, "--variant", "fp16", "--out", tmp_path / "back")
    sampler = Description.load(checkpoint).sampler
    assert np.abs(draw(tmp_path / "back", sampler).astype(int) - draw(checkpoint, sampler)).mean() < 2


def test_refusals_are_one_sentence_and_leave_nothing(checkpoint, tmp_path):
    def refused(message: str, *command: object) -> None:
        with pytest.raises(SystemExit, match=message) as error:
            run(*command)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    refused("exists already and is never overwritten", "export.py", "--checkpoint", checkpoint, "--out", checkpoint)
    refused(
        "read one T5EncoderModel",
        "export.py",
        "--checkpoint",
        ROOT / "assets/shapes/pipeline",
        "--out",
        tmp_path / "out",
    )
    refused("holds no model_index.json", "import.py", "--from", checkpoint, "--out", tmp_path / "out")
    refused("does not exist", "import.py", "--from", tmp_path / "no.safetensors", "--out", tmp_path / "out")
    description = Description.load(checkpoint)
    objective = replace(V, network_time=NetworkTime.noise)
    replace(description, objective=objective).save(checkpoint)
    file = tmp_path / "out.safetensors"
    refused(
        "readers of single files tell",
        "export.py",
        "--checkpoint",
        checkpoint,
        "--format",
        "single-file",
        "--out",
        file,
    )
