"""The stages hand over to each other: what was trained is what the next one starts from, and it says so."""

import json

import pytest
import torch
from safetensors.torch import load_file

from inference.description import find
from inference.pipeline import Pipeline
from training.run import run


@pytest.fixture
def first(config):
    cfg = config("stage1", "train.images=32", name="first")
    run(cfg)
    return cfg


def test_another_objective_inherits_every_tensor(config, capsys):
    two = config("stage2", "train.images=16", name="two")
    run(two)
    capsys.readouterr()
    three = config("stage3", "train.images=16", "optim.lr=1e-30", f"init.from={two.folder}", name="three")
    run(three)
    said = capsys.readouterr().out
    assert "overridden  objective.prediction: v -> flow" in said
    assert "copied" in said
    source = load_file(find(two.folder) / "denoiser" / "ema.safetensors")
    result = load_file(find(three.folder) / "denoiser" / "model.safetensors")
    assert source.keys() == result.keys()
    for name, tensor in source.items():
        torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-20)


def test_a_class_model_becomes_a_text_model(config, first, capsys):
    second = config("stage2", "train.images=16", f"init.from={first.folder}", name="second")
    run(second)
    said = capsys.readouterr().out
    assert "folded" in said
    assert "initialised" in said


def test_own_checkpoint_comes_before_init(config, first, capsys):
    overrides = ("train.images=32", f"init.from={first.folder}")
    run(config("stage1", *overrides, "train.stop_at=8", name="next"))
    assert "starts from" in capsys.readouterr().out
    run(config("stage1", *overrides, name="next"))
    said = capsys.readouterr().out
    assert "next continues from 8 images" in said
    assert "starts from" not in said


def test_a_run_leaves_what_the_readme_says(config, first):
    cfg = config("stage1", "train.images=16", "sample.first=8", "evaluate.count=4", "evaluate.batch=4", name="full")
    run(cfg)
    assert (cfg.folder / "config.yaml").read_text().startswith("name: full")
    kinds = [json.loads(line)["kind"] for line in (cfg.folder / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["device", "train", "sample", "train", "sample", "eval"]
    assert sorted(path.name for path in (cfg.folder / "samples").iterdir()) == ["000000008.png", "000000016.png"]
    assert json.loads((cfg.folder / "evaluation.json").read_text())["count"] == 4
    names = {path.name for path in (cfg.folder / "checkpoints" / "16").iterdir()}
    wanted = {
        "denoiser",
        "guard.safetensors",
        "optimizer.safetensors",
        "state.json",
        "pipeline.json",
        "config.json",
        "manifest.json",
    }
    assert names == wanted
    pictures = Pipeline.load(cfg.folder).generate(class_ids=[0, 1])
    assert pictures.shape == (2, 64, 64, 3)


@pytest.mark.parametrize("model", ["pixart_tiny", "mmdit_tiny"])
@pytest.mark.parametrize("options", [["train.checkpointing=full"], ["train.precision=bf16"]])
def test_options_of_the_step_train_every_text_model(config, model, options):
    cfg = config("stage3", f"model={model}", "train.images=16", *options)
    run(cfg)
    lines = [json.loads(line) for line in (cfg.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0.1 < line["loss"] < 10 for line in lines if line["kind"] == "train")


def test_stored_text_states_train_as_encoded_captions_do(config, tmp_path):
    from models.autoencoder import AutoencoderConfig
    from models.text import TextConfig
    from prepare.shapes import prepare_shapes

    folder = tmp_path / "with-text"
    vae, text = AutoencoderConfig(path="assets/shapes").build(), TextConfig(path="assets/shapes").build()
    prepare_shapes(folder, resolution=128, num_images=16, seed=0, vae=vae, text=text)
    losses = []
    for stored in ("true", "false"):
        cfg = config("stage2", f"data.path={folder}", f"data.text_states={stored}", "train.images=16", name=stored)
        run(cfg)
        lines = [json.loads(line) for line in (cfg.folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # float16 in the shards
