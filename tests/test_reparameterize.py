"""The command: a checkpoint in, a pipeline out that training starts from, and one sentence when it cannot."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.schema import compose
from inference.pipeline import Description, find
from models.base import Cond
from models.folder import publish
from models.pixart import PixArt
from models.weights import load_denoiser, read_tensors, save_denoiser
from reparameterize import main
from training.origin import inherit

ROOT = Path(__file__).parents[1]
SMALL = ["model.hidden=32", "model.depth=2", "model.heads=4"]


@pytest.fixture
def source(outputs: Path) -> Path:
    """A checkpoint of a small class-conditioned model, whose EMA differs from its weights."""
    cfg = compose("train", ["name=source", "model=ccdit_tiny", "objective=eps", *SMALL])
    description = Description(
        objective=cfg.objective, sampler=cfg.sampler, vae=cfg.vae, text=None, resolution=64, num_classes=48
    )

    def write(aside: Path) -> None:
        for seed, name in enumerate(("model", "ema")):
            denoiser, generator = cfg.model.build(), torch.Generator().manual_seed(seed)
            for parameter in denoiser.parameters():
                parameter.data.normal_(std=0.1, generator=generator)
            save_denoiser(denoiser, aside / "denoiser", name)
        description.save(aside)

    publish(outputs / "source" / "checkpoints" / "64", write)
    return outputs / "source"


def command(source: Path, *more: str, model: str = "pixart_tiny") -> list[str]:
    return ["--from", str(source), "--model", model, "--out", "outputs/carried", *more]


def test_writes_a_pipeline_that_training_starts_from(source: Path, capsys: pytest.CaptureFixture[str]):
    main(command(source, *SMALL, "model.text_dim=24", "model.patch_size=2", "model.base_size=8"))
    printed = capsys.readouterr().out
    assert "PixArt from CCDiT, modulation exact at t=0.5" in printed
    assert "(ema weights)" in printed

    folder = find("outputs/carried")
    before, after = Description.load(find(source)), Description.load(folder)
    assert after == replace(before, text=compose("train", ["name=any"]).text, num_classes=None)
    assert after.objective.prediction.name == "eps"

    carried, origin = load_denoiser(folder / "denoiser", "ema"), load_denoiser(find(source) / "denoiser", "ema")
    x, t = torch.randn(2, 8, 8, 8), torch.full((2,), 0.5)
    with torch.no_grad():
        expected, actual = origin(x, t, Cond()), carried(x, t, Cond(text=torch.randn(2, 3, 24)))
    assert (actual - expected).norm() < 1e-4 * expected.norm()
    model, ema = (read_tensors(folder / "denoiser", name) for name in ("model", "ema"))
    assert model.keys() == ema.keys()
    assert all(torch.equal(model[name], ema[name]) for name in model)

    account = json.loads((folder / "account.json").read_text())
    assert [entry["name"] for entry in account["tensors"] if entry["kind"] != "dropped"] == list(carried.state_dict())
    assert account["gap"]["0.5"] < 1e-4 < account["gap"]["0.0"]
    assert account["r2"]["blocks.0"] > 0.999 > account["r2"]["blocks.1"]

    fresh, said = carried.config.build(), []
    inherit(fresh, {"from": str(folder), "mode": "anchor", "weights": "ema"}, after, said.append)
    assert all(torch.equal(tensor, ema[name]) for name, tensor in fresh.state_dict().items())


def test_mode_weights_and_anchor_are_obeyed(source: Path):
    main(command(source, *SMALL, "--mode", "mean", "--weights", "model"))
    carried = load_denoiser("outputs/carried/denoiser")
    origin = load_denoiser(find(source) / "denoiser", "model")
    assert isinstance(carried, PixArt)
    mean = torch.stack([block.modulation.weight for block in origin.blocks]).mean(0)  # pyright: ignore
    torch.testing.assert_close(carried.modulation.weight, mean)
    account = json.loads(Path("outputs/carried/account.json").read_text())
    assert account["mode"] == "mean"


def test_class_model_stays_a_class_model(source: Path):
    main(command(source, *SMALL, "model.patch_size=1", "model.base_size=4", model="ccdit_tiny"))
    description = Description.load(find("outputs/carried"))
    assert description.text is None
    assert description.num_classes == 48


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "model.hidden=160, model.depth=6, model.heads=5 where the source CCDiT has hidden=32"),
        ([*SMALL, "model.dept=2"], "model.dept"),
        ([*SMALL, "train.images=2"], "train.images=2 has no part in this; give model.KEY=VALUE"),
        ([*SMALL, "model.patch_size=3"], "model.patch_size=3 does not divide"),
        ([*SMALL, "--anchor", "500"], "anchor=500.0 is not a noise time"),
    ],
)
def test_errors_are_one_sentence(source: Path, more: list[str], message: str):
    with pytest.raises(SystemExit, match=message) as error:
        main(command(source, *more))
    assert "\n" not in str(error.value)
    assert not Path("outputs/carried").exists()


def test_errors_about_folders_and_names(source: Path):
    with pytest.raises(SystemExit, match="nowhere holds no whole checkpoint"):
        main(command(source.parent / "nowhere"))
    with pytest.raises(SystemExit, match="pixart_huge"):
        main(command(source, model="pixart_huge"))
    Path("outputs/carried").mkdir()
    with pytest.raises(SystemExit, match="exists already and is never overwritten"):
        main(command(source, *SMALL))


def test_help_waits_for_no_library():
    code = "import sys, reparameterize as r; assert not {'torch', 'hydra'} & sys.modules.keys(); r.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "init.from=" in done.stdout
