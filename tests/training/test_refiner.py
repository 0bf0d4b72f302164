"""A run at low noise alone: pictures from its base's beginnings, and aesthetic scores from a table to the network."""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data import shapes
from data.reader import ShardReader
from diffusion.sample import Sampler
from diffusion.timesteps import Grid
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.text import Conditioner
from models.unet import UNet, UNetConfig
from prepare.encode import EncodeConfig, encode
from prepare.sources import SourceConfig, open_source
from training.refiner import Refined, check_base, told_scores
from training.run import run

BASE = str(Path("assets/shapes/pipeline").resolve())
PROMPTS = ["a large red circle in the centre on a white background", "a small blue star at the top"]
TOP = 0.36


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return Pipeline.load(BASE)


def ranged(pipeline: Pipeline, top: float, **sampler) -> Pipeline:
    """The pipeline as if it had been trained at times up to `top` alone."""
    objective = replace(pipeline.description.objective, range=[0.0, top])
    how = replace(pipeline.description.sampler, **sampler)
    description = replace(pipeline.description, objective=objective, sampler=how)
    return Pipeline(pipeline.denoiser, pipeline.conditioner, pipeline.autoencoder, description)


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


# --- the hand-over ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dopri5"])
def test_the_refiner_is_asked_at_all_times_of_its_range_and_no_others(base, name):
    """Also where no step of the grid ends there, and for the solver that chooses its own steps."""
    other = ranged(Pipeline.load(BASE), TOP)
    told: dict[str, list[float]] = {"base": [], "refiner": []}
    hooks = [
        one.denoiser.register_forward_pre_hook(lambda _, given, seen=told[which]: seen.append(float(given[1][0])))
        for which, one in (("base", base), ("refiner", other))
    ]
    sampler = replace(base.description.sampler, name=Sampler[name], eta=None, steps=7, guidance=1.0, tolerance=0.05)
    base.generate(PROMPTS[:1], sampler=sampler, refiner=other)
    for hook in hooks:
        hook.remove()
    assert told["base"] and min(told["base"]) > TOP
    assert told["refiner"] and max(told["refiner"]) <= TOP + 1e-6
    assert len(told["base"]) + len(told["refiner"]) == base.evaluations


def test_a_share_still_says_where_and_a_refiner_of_all_times_takes_the_last_fifth(base):
    sampler, calls = replace(base.description.sampler, name=Sampler.euler, eta=None, steps=10), []
    other = Pipeline.load(BASE)
    other.denoiser.register_forward_hook(lambda *_: calls.append(1))
    base.generate(PROMPTS[:1], sampler=sampler, refiner=other)
    assert len(calls) == 2
    base.generate(PROMPTS[:1], sampler=sampler, refiner=ranged(other, 0.9), handover=0.5)
    assert len(calls) == 2 + 5


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_a_refiner_that_equals_its_base_changes_nothing(base, name):
    refiner = ranged(base, TOP, name=Sampler[name], eta=None, steps=6)
    alone = base.generate(PROMPTS, seeds=[1, 2], sampler=refiner.description.sampler)
    assert apart(Refined(BASE, refiner).generate(PROMPTS, seeds=[1, 2]), alone) == 0


def test_one_network_at_a_time_draws_the_same(base):
    """The refiner, whose own grid ends below the base's, is told the times."""
    refiner = ranged(Pipeline.load(BASE), TOP, name=Sampler.euler, eta=None, steps=10)
    refiner.denoiser.final.linear.weight.data.mul_(0.9)  # so that it is another
    how = refiner.description.sampler
    z = base.draw(PROMPTS, sampler=how, denoising_end=0.8)
    apart = refiner.draw(PROMPTS, sampler=how, denoising_start=0.8, z=z, times=base.times(how))
    assert torch.equal(apart, base.draw(PROMPTS, sampler=how, refiner=refiner, handover=0.8))
    assert torch.equal(
        apart, base.draw(PROMPTS, sampler=how, refiner=refiner)
    )  # 0.333, the eighth of ten, is the first
    assert not torch.equal(apart, base.draw(PROMPTS, sampler=how))


# --- a run with a base --------------------------------------------------------------------------------------

LOW = [f"objective.range=[0.0,{TOP}]", "train.images=16", "sampler.steps=8", "sampler.guidance=2.0", "sample.count=2"]


def test_grids_and_exam_of_a_refiner_run_are_its_base_s_beginnings_and_its_own_ends(config):
    cfg = config("stage3", *LOW, f"sample.base={BASE}", "evaluate.count=4", "sample.first=8")
    result = run(cfg)
    grids = sorted((cfg.folder / "samples").glob("*.png"))
    assert [grid.name for grid in grids] == ["000000008.png", "000000016.png"]
    draw = partial(Pipeline.load(BASE).generate, sampler=cfg.sampler, refiner=Pipeline.load(cfg.folder))
    records = [json.loads(line) for line in (cfg.folder / "metrics.jsonl").read_text().splitlines()]
    asked = next(record["prompts"] for record in records if record["kind"] == "sample")
    drawn = draw(asked, seeds=[cfg.sample.seed, cfg.sample.seed + 1])
    assert apart(np.asarray(Image.open(grids[1]))[:, :256], np.concatenate(list(drawn), 1)) <= 1
    scenes = shapes.exam(cfg.evaluate.seed, 4, 1)
    pictures = draw([shapes.prompt(scene) for scene in scenes], seeds=[cfg.evaluate.seed + i for i in range(4)])
    assert result["prompt_accuracy"] == shapes.mark(scenes, pictures)["all"]


def test_without_a_base_it_draws_nothing_and_says_so(config, capsys):
    cfg = config("stage3", *LOW, "evaluate.count=4")
    assert run(cfg) == {} and not (cfg.folder / "samples").exists()
    assert "no grids of pictures, and no exam; for these give sample.base=" in capsys.readouterr().out


def test_a_base_that_does_not_fit_is_refused(config, base):
    with pytest.raises(ValueError, match="sample.base=x draws for a refiner, but objective.range=.* draws from noise"):
        config("stage3", "sample.base=x")
    with pytest.raises(ValueError, match=f"sample.base={BASE} draws pictures of 128 pixels, but data.resolution=64"):
        run(config("stage1", "objective.range=[0.0,0.4]", f"sample.base={BASE}", "train.images=8"))
    low = ranged(base, TOP)
    with pytest.raises(
        ValueError, match="sample.base=x was itself trained at noise times up to 0.5 only, .* begins no"
    ):
        check_base("x", ranged(base, 0.5), low)
    other = ranged(base, 1.0)
    other.autoencoder = AutoencoderConfig(path="assets/shapes").build()
    other.autoencoder.digest = "another"
    with pytest.raises(ValueError, match="sample.base=x draws latents of the autoencoder .* give a base of the same"):
        check_base("x", other, low)
    classes = ranged(base, 1.0)
    classes.conditioner = Conditioner(None, 30)
    with pytest.raises(ValueError, match="sample.base=x is conditioned on 30 classes, and the run's model on text"):
        check_base("x", classes, low)
    with pytest.raises(ValueError, match="a trailing grid walks a table"):
        check_base("x", base, ranged(base, TOP, grid=Grid.trailing))
    few = "was trained up to noise time 0.36, and the last of the 2 steps begins at 0.667, so .* choose more steps"
    with pytest.raises(ValueError, match=few):
        check_base("x", base, ranged(base, TOP, steps=2))


# --- scores -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """Shards of a table of pictures with LAION's column of scores, empty in every third row."""
    root, rows = tmp_path_factory.mktemp("scored"), []
    for i in range(12):
        scene, file = shapes.scene(4, i, two=0), io.BytesIO()
        Image.fromarray(shapes.render(scene, 64)).save(file, "PNG")
        score = None if i % 3 == 2 else 4.0 + i / 4
        rows.append({"image": file.getvalue(), "TEXT": shapes.prompt(scene), "AESTHETIC_SCORE": score})
    pq.write_table(pa.Table.from_pylist(rows), root / "table.parquet")
    source = open_source(SourceConfig(paths=[str(root / "table.parquet")]))
    config = EncodeConfig(resolutions=[64], buckets=False)
    encode(config, source, root / "64", resolution=64, vae=AutoencoderConfig(path="assets/shapes"))
    return root / "64"


TINY = ["model=unet_tiny", "model.channels=[16,32]", "model.depths=[0,1]", "model.heads=[1,2]"]
SCORED = [*TINY, f"model.vector_dim={128 + 5 * 256}", "data=shards", "data.resolution=64", "data.workers=0"]


def small_unet(shards: Path, outputs: Path, *overrides: str):
    from configs.schema import compose

    every = ["train.batch_size=4", "train.log_every=4", "train.images=12", "train.text_dropout=0.0", "sampler.steps=2"]
    where = ["name=unet", f"outputs={outputs}", f"data.path={shards}", "sample.count=1", "optim.warmup=4"]
    return compose("train", [*SCORED, *every, *where, "objective.range=[0.0,0.36]", *overrides])


def test_scores_of_a_table_reach_the_network(scored, tmp_path, monkeypatch, capsys):
    told, forward = [], UNet.forward

    def listened(self, x_t, t, cond, *rest):
        if not x_t.is_meta:  # where work is counted, nothing is learnt
            told.extend(cond.size_ids.tolist())
        return forward(self, x_t, t, cond, *rest)

    monkeypatch.setattr(UNet, "forward", listened)
    run(small_unet(scored, tmp_path))
    wanted = sorted(6.0 if i % 3 == 2 else 4.0 + i / 4 for i in range(12))
    assert sorted(ids[4] for ids in told) == wanted  # each of them once in an epoch
    assert all(ids[:4] == [64, 64, 0, 0] for ids in told)
    said = capsys.readouterr().out
    assert "of the first 12 records 8 have an aesthetic score, from 4 to 6.5; without one a picture counts as 6" in said


def test_a_model_of_scores_says_when_there_are_none(shards):
    said = told_scores([ShardReader(shards / "shapes-64")])
    assert said.startswith("none of the first 40 records has an aesthetic score, which the model reads: all count as 6")


def test_pictures_are_drawn_with_the_scores_that_are_asked_for(base):
    vector = 128 + 5 * 256
    unet = UNetConfig(
        in_channels=8, channels=[16], depths=[0], heads=[1], layers=1, groups=16, text_dim=192, vector_dim=vector
    ).build()
    told = []
    unet.register_forward_pre_hook(lambda _, given: told.append(given[2].size_ids[:, 4].tolist()))
    description = ranged(base, TOP).description
    refiner = Pipeline(unet, Conditioner(base.conditioner.text, None, vector), base.autoencoder, description)
    how = replace(base.description.sampler, steps=8, interval=[0.0, 1.0], aesthetic=7.5, negative_aesthetic=3.0)
    with torch.no_grad():
        base.generate(PROMPTS[:1], sampler=how, refiner=refiner)
    assert told and all(scores == [7.5, 3.0] for scores in told)


def test_a_score_is_given_on_the_command_line():
    from scripts.sample import chosen_sampler, parser

    assert chosen_sampler(parser().parse_args(["--checkpoint", "x", "--aesthetic", "7"])) == {"aesthetic": 7}
    assert parser().parse_args(["--checkpoint", "x"]).handover is None
