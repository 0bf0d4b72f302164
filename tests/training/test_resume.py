"""A run that was stopped and started again ends where an undisturbed one ends, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.faults import as_schema
from models.folder import fault, newest, publish, sha256
from training.restart import AGAIN
from training.run import run

FILES = ("denoiser/model.safetensors", "denoiser/ema.safetensors", "optimizer.safetensors")


def digests(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in FILES}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_three_interruptions_within_an_epoch_change_nothing(config, stage):
    length = "train.images=64"  # 40 records: the run also crosses the end of an epoch
    run(config(stage, length, name="straight"))
    for stop in (8, 24, 32):
        run(config(stage, length, f"train.stop_at={stop}", name="resumed"))
    cfg = config(stage, length, name="resumed")
    run(cfg)
    straight = cfg.folder.parent / "straight"
    assert digests(straight / "checkpoints" / "64") == digests(cfg.folder / "checkpoints" / "64")
    one, two = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (straight, cfg.folder))
    keys = ("kind", "images", "loss", "loss_unweighted", "grad_norm", "lr")
    pick = [[{k: json.loads(line).get(k) for k in keys} for line in lines if '"train"' in line] for lines in (one, two)]
    assert pick[0] == pick[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_loses_nothing(config, shards, tmp_path, number):
    cfg = config("stage1", "train.images=400", "checkpoint.every=40", name="straight")
    run(cfg)
    overrides = [
        "name=killed", f"outputs={tmp_path}", f"data.path={shards / 'shapes-64'}", "train.images=400",
        "model.hidden=32", "model.depth=2", "model.heads=2", "train.batch_size=8", "train.log_every=8",
        "optim.warmup=16", "optim.lr=1e-3", "sample.every=1000000", "sample.first=1000000",
        "checkpoint.every=40", "checkpoint.keep=100",
    ]  # fmt: skip
    command = [sys.executable, "train_stage1.py", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    metrics = tmp_path / "killed" / "metrics.jsonl"
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 12):
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == (AGAIN if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (tmp_path / "killed" / "checkpoints" / "400").exists(), "the signal came too late to test anything"
    subprocess.run(command, env=environment, check=True)
    assert digests(cfg.folder / "checkpoints" / "400") == digests(tmp_path / "killed" / "checkpoints" / "400")


def test_a_broken_checkpoint_is_named_and_passed_over(config, capsys):
    run(config("stage1", "train.images=64", "train.stop_at=16"))
    cfg = config("stage1", "train.images=64", "train.stop_at=24")
    run(cfg)
    broken = cfg.folder / "checkpoints" / "24" / "optimizer.safetensors"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    assert newest(cfg.folder / "checkpoints") == cfg.folder / "checkpoints" / "16"
    assert "24 is passed over: optimizer.safetensors does not match its hash" in capsys.readouterr().out


def test_a_checkpoint_of_the_schema_before_is_continued(config):
    """It has no guard, which then begins anew; with few updates known it decides nothing, so the bits are the same."""
    run(config("stage1", "train.images=32", name="straight"))
    run(config("stage1", "train.images=32", "train.stop_at=16", name="older"))
    cfg = config("stage1", "train.images=32", name="older")
    as_schema(cfg.folder / "checkpoints" / "16", 1)
    run(cfg)
    straight = cfg.folder.parent / "straight"
    assert digests(straight / "checkpoints" / "32") == digests(cfg.folder / "checkpoints" / "32")


def test_a_resume_that_fails_is_an_error_and_never_a_fresh_start(config):
    cfg = config("stage1", "train.images=16")
    run(cfg)
    (cfg.folder / "checkpoints" / "16" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="none is whole; move the folder away"):
        run(cfg)


def test_resume_refuses_another_seed_or_architecture(config):
    run(config("stage1", "train.images=16", "train.stop_at=8"))
    with pytest.raises(ValueError, match="seed=1 differs from seed=0"):
        run(config("stage1", "train.images=16", "seed=1"))
    with pytest.raises(ValueError, match=r"model=.*differs from model="):
        run(config("stage1", "train.images=16", "model.depth=3"))


def test_a_killed_writer_leaves_the_old_checkpoint_and_no_new_one(tmp_path):
    publish(tmp_path / "10", lambda folder: (folder / "a").write_text("old") and None)

    def die(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "20", die)
    assert [path.name for path in tmp_path.iterdir()] == ["10"]
    assert fault(tmp_path / "10") is None
    with pytest.raises(ValueError, match="exists already and is never overwritten"):
        publish(tmp_path / "10", lambda folder: None)


def test_checkpoints_hold_no_pickle_and_optimizer_state_by_name(config):
    cfg = config("stage1", "train.images=16", "optim.groups=[{pattern: patch_embed, frozen: true}]")
    run(cfg)
    folder = cfg.folder / "checkpoints" / "16"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    names = {key.partition("/")[2] for key in load_file(folder / "optimizer.safetensors")}
    assert names
    assert not any(name.startswith("patch_embed") for name in names)
