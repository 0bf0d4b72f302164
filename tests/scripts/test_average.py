"""Averages made after training: a pipeline like any other, with the weights that were asked for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.shapes import PAIRS
from inference.description import Description, find
from inference.pipeline import Pipeline
from models.weights import load_denoiser, read_tensors, save_denoiser
from scripts.average import average
from training.ema import EMA, EMAConfig

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "assets" / "shapes" / "pipeline"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of twenty steps of a random walk from the committed pipeline: snapshots, and a checkpoint at the end."""
    folder, net = tmp_path_factory.mktemp("run"), load_denoiser(SHIPPED / "denoiser", "ema")
    ema = EMA(net, EMAConfig(sigma_rel=[0.05, 0.1]))
    torch.manual_seed(0)
    for step in range(1, 21):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        ema.update(net, 4 * step, 4)
        if step % 5 == 0:
            kept = folder / ("checkpoints" if step == 20 else "snapshots") / str(4 * step)
            for name, module in ema.profiles.items():
                save_denoiser(module, kept / "denoiser", name)
            Description.load(find(SHIPPED)).save(kept)
    return folder


def test_a_width_that_was_kept_is_what_was_kept_and_another_is_between(run, tmp_path):
    average(run, 0.1, None, tmp_path / "kept")
    average(run, 0.07, None, tmp_path / "between")
    narrow, wide = (read_tensors(run / "checkpoints" / "80" / "denoiser", f"ema_{w}") for w in ("0.050", "0.100"))
    kept, between = (read_tensors(tmp_path / name / "denoiser", "ema") for name in ("kept", "between"))
    torch.testing.assert_close(kept, wide, atol=1e-6, rtol=1e-6)
    for name in wide:
        apart = (narrow[name] - wide[name]).norm()
        assert (between[name] - wide[name]).norm() < apart
        assert (between[name] - narrow[name]).norm() < apart


def test_the_command_writes_a_pipeline_that_draws(run, tmp_path):
    command = [sys.executable, "scripts/average.py", "--run", run, "--width", "0.05", "0.15", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 2
    pipeline = Pipeline.load(tmp_path / "out" / "0.15")
    assert pipeline.generate([" ".join(PAIRS[0])], seeds=[0], size=(64, 64)).shape == (1, 64, 64, 3)


def test_what_cannot_be_averaged_is_one_sentence(run, tmp_path):
    with pytest.raises(ValueError, match="holds neither snapshots nor checkpoints; give the folder of a run"):
        average(tmp_path, 0.1, None, tmp_path / "out")
    with pytest.raises(ValueError, match=r"sigma_rel=0.5 is outside"):
        average(run, 0.5, None, tmp_path / "out")
    with pytest.raises(ValueError, match="images=100 is not within the 80 images"):
        average(run, 0.1, 100, tmp_path / "out")
    with pytest.raises(ValueError, match="exists already and is never overwritten"):
        average(run, 0.1, None, tmp_path)
