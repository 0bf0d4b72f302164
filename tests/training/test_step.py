"""The step: accumulation, ranks, the guard against bad numbers, rates, averages, dropout."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from data.draws import uniform
from models.base import Cond
from training.ema import EMA, EMAConfig
from training.optim import OptimConfig, build_optimizer, guarded_step, learning_rate
from training.run import run


def train_lines(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def weights(folder, images):
    return load_file(folder / "checkpoints" / str(images) / "denoiser" / "model.safetensors")


def assert_same_training(one, two, images):
    for a, b in zip(train_lines(one), train_lines(two), strict=True):
        assert a["images"] == b["images"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        for x, y in zip(a["loss_bins"], b["loss_bins"], strict=True):
            assert x == (y if y is None else pytest.approx(y, rel=1e-4))
    first, second = weights(one, images), weights(two, images)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-5)


def test_accumulated_micro_batches_equal_one_batch(config):
    whole = config("stage1", "train.images=48", name="whole")
    parts = config("stage1", "train.images=48", "train.micro_batch=2", name="parts")
    run(whole)
    run(parts)
    assert_same_training(whole.folder, parts.folder, 48)


def test_worker_processes_change_nothing(config):
    plain = config("stage2", "train.images=24", name="plain")
    workers = config("stage2", "train.images=24", "data.workers=2", name="workers")
    run(plain)
    run(workers)
    assert_same_training(plain.folder, workers.folder, 24)


@pytest.mark.slow
def test_two_ranks_equal_one_and_reduce_once_a_step(config, tmp_path):
    cfg = config("stage1", "train.images=48", name="one")
    run(cfg)
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook\n"
        "from configs.schema import compose\n"
        "from training import distributed, run\n"
        "reductions = []\n"
        "wrap = distributed.Ranks.wrap\n"
        "def counting(self, module):\n"
        "    wrapped = wrap(self, module)\n"
        "    def hook(state, bucket):\n"
        "        reductions.append(bucket.is_last())\n"
        "        return allreduce_hook(state, bucket)\n"
        "    wrapped.register_comm_hook(None, hook)\n"
        "    return wrapped\n"
        "distributed.Ranks.wrap = counting\n"
        "run.run(compose('stage1', json.loads(sys.argv[1])))\n"
        "Path(sys.argv[2], 'reductions' + os.environ['RANK']).write_text(str(sum(reductions)))\n"
    )
    overrides = [
        "name=two", f"outputs={tmp_path}", f"data.path={cfg.data.path}", "train.images=48", "train.micro_batch=2",
        "model.hidden=32", "model.depth=2", "model.heads=2", "train.batch_size=8", "train.log_every=8",
        "optim.warmup=16", "optim.lr=1e-3", "sample.every=1000000", "sample.first=1000000",
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, json.dumps(overrides), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [(tmp_path / f"reductions{rank}").read_text() for rank in (0, 1)]
    assert counts == ["6", "6"]  # 6 steps of 2 micro-batches a rank: one each, not two
    assert_same_training(cfg.folder, tmp_path / "two", 48)


def test_a_bad_gradient_skips_the_update_and_counts(config, monkeypatch):
    net = nn.Linear(4, 4)
    config_ = OptimConfig(weight_decay=0.1)
    optimizer = build_optimizer(net, config_)
    net(torch.ones(2, 4)).sum().backward()
    norm, skipped = guarded_step(optimizer, list(net.parameters()), 0.1, 1.0)
    assert norm > 0
    assert skipped == 0
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    moments = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    (net(torch.ones(2, 4)).sum() * float("nan")).backward()
    _, skipped = guarded_step(optimizer, list(net.parameters()), 0.1, 1.0)
    assert skipped == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(torch.equal(a, e["exp_avg"]) for a, e in zip(moments, optimizer.state.values(), strict=True))
    net(torch.ones(2, 4)).sum().backward()
    guarded_step(optimizer, list(net.parameters()), 0.1, 1.0)
    assert not torch.equal(before["weight"], net.weight)


def test_a_run_of_bad_gradients_ends_with_the_way_out(config, monkeypatch):
    from training import step

    monkeypatch.setattr(step, "noise", lambda *a: torch.full((8, 8, 8, 8), float("nan")))
    with pytest.raises(FloatingPointError, match=r"train.max_skipped=2; lower optim.lr"):
        run(config("stage1", "train.images=64", "train.max_skipped=2"))


def test_learning_rate_is_a_function_of_images_alone():
    config_ = OptimConfig(lr=1.0, warmup=100, final=0.1)
    assert learning_rate(config_, 50, 1100) == 0.5
    assert learning_rate(config_, 100, 1100) == 1.0
    assert learning_rate(config_, 600, 1100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(config_, 1100, 1100) == pytest.approx(0.1)


def test_groups_scale_freeze_and_spare_biases_from_decay():
    net = nn.ModuleDict({"trunk": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    config_ = OptimConfig(weight_decay=0.5, groups=[])
    assert {group["weight_decay"] for group in build_optimizer(net, config_).param_groups} == {0.0, 0.5}
    from training.optim import GroupConfig

    frozen = replace(
        config_, groups=[GroupConfig(pattern="^trunk", frozen=True), GroupConfig(pattern="head", lr_scale=0.1)]
    )
    groups = build_optimizer(net, frozen).param_groups
    assert {group["lr_scale"] for group in groups} == {0.1}
    assert not net["trunk"].weight.requires_grad
    with pytest.raises(ValueError, match="matches no parameter; choose a part of a name such as trunk.weight"):
        build_optimizer(net, replace(config_, groups=[GroupConfig(pattern="tail")]))


def test_ema_halves_in_a_halflife():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = EMA(net, EMAConfig(halflife=1000, rampup=1e9))
    nn.init.ones_(net.weight)
    for step in range(100):
        ema.update(net, (step + 1) * 10, 10)
    assert ema.module.weight.item() == pytest.approx(0.5, rel=1e-5)
    assert ema.beta(10, 10) == pytest.approx(0.5 ** (10 / 1000))
    assert EMA(net, EMAConfig(halflife=1000, rampup=0.1)).beta(100, 10) == pytest.approx(0.5)


def test_measured_dropout_is_the_setting_and_the_null_is_the_samplers():
    dropped = uniform(0, "drop", np.arange(100_000)) < 0.1
    assert dropped.mean() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 100_000))
    from models.text import Conditioner, TextConfig

    conditioner = Conditioner(TextConfig(path="assets/shapes").build())
    cond = conditioner(["a red circle", "a blue star"])
    mixed = cond.where(torch.tensor([True, False]), conditioner.null())
    empty = conditioner([""])
    assert isinstance(mixed, Cond)
    assert mixed.text is not None
    assert cond.text is not None
    assert empty.text is not None
    assert torch.equal(mixed.text[0], empty.text[0])
    assert torch.equal(mixed.text[1], cond.text[1])
