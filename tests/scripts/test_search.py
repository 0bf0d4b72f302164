"""A search tries what it was asked to, goes on after being stopped, and a mistake ends in one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from models.autoencoder import AutoencoderConfig
from prepare.shapes import prepare_shapes
from scripts import search

SMALL = [
    "train_stage1", "model.hidden=32", "model.depth=1", "model.heads=1", "train.batch_size=8", "train.log_every=8",
    "sample.every=1000000", "sample.first=1000000", "checkpoint.every=8", "train.images=2000",
]  # fmt: skip


def test_sweeps_are_what_optuna_draws_from():
    space, fixed = search.split(
        ["optim.lr=tag(log, interval(1e-4, 1e-2))", "optim=adamw,muon", "model.depth=range(4, 9, 2)", "seed=3"]
    )
    assert space == {
        "optim.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "optim": CategoricalDistribution(["adamw", "muon"]),
        "model.depth": IntDistribution(4, 8, step=2),
    }
    assert fixed == ["seed=3"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*SMALL], "nothing is searched; give a range such as"),
        (["train_stage9", "seed=1,2"], "train_stage9 is no training script; choose one of train_stage1"),
        ([*SMALL, "optim.lr=interval(2, 1)"], "optim.lr=interval(2, 1) is no range to search"),
        ([*SMALL, "optim.lr=glob(*)"], "optim.lr=glob(*) is no range to search"),
        ([*SMALL, "optim.rate=interval(1, 2)"], "optim.rate is not a key of stage1; did you mean"),
        ([*SMALL, "optim.lr=interval(-1, 1)"], "optim.lr=-1.0 and optim.clip=1.0 must be positive"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, outputs):
    with pytest.raises(SystemExit, match="search.py: ") as ended:
        search.main([*arguments, f"outputs={outputs}"])
    assert words in str(ended.value)
    assert "\n" not in str(ended.value)


@pytest.mark.slow
def test_a_stopped_search_goes_on_with_the_trial_it_was_at(tmp_path):
    prepare_shapes(
        tmp_path / "data", resolution=64, num_images=40, seed=0, vae=AutoencoderConfig(path="assets/shapes").build(),
        two=0,
    )  # fmt: skip
    command = [
        sys.executable, "scripts/search.py", *SMALL, f"data.path={tmp_path / 'data'}", f"outputs={tmp_path}",
        "name=search", "optim.lr=tag(log, interval(1e-4, 1e-2))", "--trials", "2",
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    first = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "search" / "0" / "checkpoints"
    deadline = time.time() + 120
    while not any(checkpoints.glob("[0-9]*")):
        assert time.time() < deadline
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == search.AGAIN
    assert said.count("trial") == 1

    whole = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout
    begun = [line for line in whole.splitlines() if line.startswith("trial ") and "optim.lr" in line]
    assert begun[0] == said.strip()  # the same trial with the same values, not another
    assert "continues from" in (tmp_path / "search" / "0" / "log.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "search").iterdir() if path.is_dir()) == ["0", "1"]
    lines = map(json.loads, (tmp_path / "search" / "0" / "metrics.jsonl").read_text().splitlines())
    assert f"trial 0: loss_unweighted {[v for v in lines if v['kind'] == 'train'][-1]['loss_unweighted']:.5g}" in whole
    assert "the best: python train_stage1.py" in whole

    refused = subprocess.run([*command, "--metric", "loss"], cwd=root, capture_output=True, text=True)
    assert "search searches optim.lr by loss_unweighted, and was now asked for optim.lr by loss" in refused.stderr
