"""The command: a checkpoint in, a pipeline out that training starts from, and one sentence when it cannot."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.schema import compose
from inference.description import Description, find
from models.base import Cond
from models.folder import publish
from models.pixart import PixArt
from models.weights import load_denoiser, read_tensors, save_denoiser
from reparameterize import main, retargeting
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
    return [f"from={source}", f"model={model}", "out=outputs/carried", *more]


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
    assert account["gap"]["t=0.5"] < 1e-4 < account["gap"]["t=0.0"]
    assert account["r2"]["blocks.0"] > 0.999 > account["r2"]["blocks.1"]

    fresh, said = carried.config.build(), []
    inherit(fresh, {"from": str(folder), "mode": "anchor", "weights": "ema"}, after, said.append)
    assert all(torch.equal(tensor, ema[name]) for name, tensor in fresh.state_dict().items())


def test_mode_weights_and_anchor_are_obeyed(source: Path):
    main(command(source, *SMALL, "mode=mean", "weights=model"))
    carried = load_denoiser("outputs/carried/denoiser")
    origin = load_denoiser(find(source) / "denoiser", "model")
    assert isinstance(carried, PixArt)
    mean = torch.stack([block.modulation.weight for block in origin.blocks]).mean(0)  # pyright: ignore
    torch.testing.assert_close(carried.modulation.weight, mean)
    account = json.loads(Path("outputs/carried/account.json").read_text())
    assert account["mode"] == "mean"


def test_class_model_stays_a_class_model(source: Path):
    main(command(source, *SMALL, "model.patch_size=1", model="ccdit_tiny"))
    description = Description.load(find("outputs/carried"))
    assert description.text is None
    assert description.num_classes == 48


@pytest.mark.parametrize(("patch_size", "base_size", "resolution"), [(1, 4, 32), (2, 8, 64), (4, 16, 128)])
def test_positions_keep_the_range_that_was_learnt(
    source: Path, capsys, patch_size: int, base_size: int, resolution: int
):
    """Whatever base_size the model's file has; the command says what training must be given."""
    main(command(source, *SMALL, "model.in_channels=8", f"model.patch_size={patch_size}", model="mmdit_tiny"))
    folder = find("outputs/carried")
    assert load_denoiser(folder / "denoiser").config.base_size == base_size  # pyright: ignore[reportAttributeAccessIssue]
    assert Description.load(folder).resolution == resolution
    printed = capsys.readouterr().out
    assert (f" model.base_size={base_size}\n" in printed) == (base_size != 8)
    assert "positions will count" not in printed


def test_positions_of_another_range_when_asked(source: Path, capsys):
    main(command(source, *SMALL, "model.base_size=16", model="ccdit_tiny"))
    assert "positions will count 0..7, not the 0..3 learnt" in capsys.readouterr().out


def test_larger_in_every_way_and_on_to_another_objective(source: Path, capsys):
    sizes = ["model.hidden=64", "model.heads=8", "model.depth=3"]
    main(command(source, *sizes, "objective=flow", "objective.shift=3", model="ccdit_tiny"))
    printed = capsys.readouterr().out
    assert "overridden   objective.prediction: eps -> flow" in printed
    assert "leave objective= away: samplers ask for x0,\nwhich follows exactly from eps at every t but 1" in printed
    folder = find("outputs/carried")
    objective = Description.load(folder).objective
    assert (objective.prediction.name, objective.path.name, objective.shift) == ("flow", "linear", 3.0)
    account = json.loads((folder / "account.json").read_text())
    assert max(account["gap"].values()) < 0.05
    assert list(account["retargeting"]) == [f"t=0.{i}" for i in range(1, 10)]
    assert f"init.from=outputs/carried model=ccdit_tiny {' '.join(sizes)}\n" in printed


def test_another_autoencoder(source: Path):
    main(command(source, *SMALL, "model.in_channels=16", "vae=sd3", model="ccdit_tiny"))
    folder = find("outputs/carried")
    assert Description.load(folder).vae == compose("train", ["name=any", "vae=sd3"]).vae
    account = json.loads((folder / "account.json").read_text())
    assert {entry["name"] for entry in account["tensors"] if entry["kind"] == "redrawn"} == {"patch_embed.weight"}
    assert "gap" not in account


def test_retargeting_of_a_perfect_denoiser():
    """On white data eps is t/D x_t, D^2 = (1-t)^2 + t^2: as flow that says t x_t, where (2t - 1)/D x_t is meant."""
    trained, wanted = (compose("train", ["name=any", f"objective={name}"]).objective for name in ("eps", "flow"))
    t = torch.tensor([0.2, 0.4, 0.7, 0.9])
    norm = ((1 - t) ** 2 + t**2).sqrt()

    def denoiser(x: torch.Tensor, t: torch.Tensor, _: Cond) -> torch.Tensor:
        return x * (t / ((1 - t) ** 2 + t**2).sqrt())[:, None]

    noise = torch.randn(3, 7)
    gaps = torch.tensor(retargeting(denoiser, trained, wanted, t, noise, Cond()))
    torch.testing.assert_close(gaps, (t * norm / (2 * t - 1) - 1).abs())
    assert max(retargeting(denoiser, trained, trained, t, noise, Cond())) < 1e-5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "model.hidden=160, model.heads=5 where the source CCDiT has hidden=32, heads=4"),
        ([*SMALL, "model.dept=2"], "model.dept"),
        ([*SMALL, "train.images=2"], "train.images=2 has no part in this; give any of from= model= out= mode="),
        ([*SMALL, "anhcor=0.3"], "anhcor=0.3 has no part in this; did you mean anchor=VALUE"),
        ([*SMALL, "--mode"], "--mode has no part in this; did you mean mode=VALUE"),
        ([*SMALL, "model.patch_size=3"], "model.patch_size=3 does not divide"),
        ([*SMALL, "anchor=500"], "anchor=500.0 is not a noise time"),
        ([*SMALL, "seed=one"], "seed=one is not a number; give one such as seed=0"),
        ([*SMALL, "mode=median"], "mode='median' is not known; choose one of anchor, mean"),
        ([*SMALL, "weights=best"], "holds the weights ema, model"),
        (
            [*SMALL, "objective=flew"],
            "objective=flew is not a choice; choose one of cosine, edm, eps, flow, novelai_v3",
        ),
        ([*SMALL, "objective.shift=3"], "objective.KEY=VALUE changes an objective that is chosen; give objective=NAME"),
        ([*SMALL, "model.in_channels=4"], "in_channels=4 where the source has 8 is another autoencoder; give vae=NAME"),
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
    with pytest.raises(SystemExit, match="model= out= must be given: from=DIR model=NAME out=DIR"):
        main([f"from={source}"])
    Path("outputs/carried").mkdir()
    with pytest.raises(SystemExit, match="out=outputs/carried exists already and is never overwritten"):
        main(command(source, *SMALL))


def test_help_waits_for_no_library():
    code = "import sys, reparameterize as r; assert not {'torch', 'hydra'} & sys.modules.keys(); r.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "init.from=" in done.stdout
