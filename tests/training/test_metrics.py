"""What a run tells the loggers beside metrics.jsonl."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from models.base import Cond
from training.flops import flops_per_image
from training.run import run


def test_a_run_that_continues_is_one_run_to_wandb(config, monkeypatch):
    begun, logged = [], []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(log=logged.append, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    overrides = ("logger=wandb", "logger.offline=true", "train.images=32", "evaluate.count=0")
    run(config("stage1", *overrides, "train.stop_at=16"))
    run(config("stage1", *overrides))
    assert begun[0] == begun[1]
    assert (begun[0]["mode"], begun[0]["resume"], begun[0]["name"]) == ("offline", "allow", "run")
    losses = [line["images"] for line in logged if "train/loss" in line]
    assert losses == [8, 16, 24, 32]
    run(config("stage1", *overrides, name="another"))
    assert begun[2]["id"] != begun[0]["id"]


def test_every_line_says_how_fast_it_was(config):
    cfg = config("stage1", "train.images=32", "evaluate.count=0")
    run(cfg)
    lines = [json.loads(line) for line in (cfg.folder / "metrics.jsonl").read_text().splitlines()]
    (device,) = [line for line in lines if line["kind"] == "device"]
    assert device["source"] == "measured"
    side = 64 // 8  # of the latent: the embedded autoencoder's factor is 8
    flops = flops_per_image(
        cfg.model.build(), (cfg.model.in_channels, side, side), Cond(class_id=torch.zeros(1).long())
    )
    for line in lines:
        if line["kind"] == "train":
            assert line["tflops"] == pytest.approx(line["images_per_s"] * flops / 1e12)
            assert line["peak_share"] == pytest.approx(line["tflops"] / device["peak_tflops"])
