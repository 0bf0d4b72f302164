"""On a real SLURM of two nodes: what it stops goes on by itself and loses no bit, and the stages follow each other."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from models.folder import sha256

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NEVER = 10**6
SMALL = [
    "model.hidden=32", "model.depth=2", "model.heads=2", "train.batch_size=8", "train.log_every=8", "optim.warmup=16",
    "optim.lr=1e-3", f"sample.every={NEVER}", f"sample.first={NEVER}", "sample.count=1", "sampler.steps=1",
    "checkpoint.every=80", "checkpoint.keep=100",
]  # fmt: skip
FILES = ("denoiser/model.safetensors", "denoiser/ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs and logs go."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def sbatch(slurm, folder: Path, shapes: Path):
    """`sbatch(name, images, minutes, slow, warn)`: the number of a job of two nodes that trains stage 1."""
    patient = folder / "python-slow"
    patient.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/slurm/slow.py" "$@"\n')
    patient.chmod(0o755)

    def submit(name: str, images: int, minutes: int = 5, slow: float = 0, warn: int = 120) -> str:
        return slurm.call(
            "sbatch", "--parsable", "--nodes=2", f"--time={minutes}", f"--signal=USR1@{warn}",
            f"--output={folder}/{name}.log", "scripts/slurm/train.sbatch", "train_stage1.py", f"name={name}",
            f"outputs={folder}", f"data.path={shapes}", f"train.images={images}", *SMALL,
            TRIPTYCH_PYTHON=str(patient) if slow else sys.executable, SLOW=str(slow),
        ).strip()  # fmt: skip

    return submit


@pytest.fixture(scope="module")
def straight(slurm, sbatch, folder: Path) -> dict[str, str]:
    """The digests of a run of two ranks that nothing disturbs."""
    job = sbatch("straight", 320)
    assert slurm.wait(job, folder / "straight.log")["Restarts"] == "0"
    return digests(folder / "straight")


def digests(run: Path) -> dict[str, str]:
    return {name: sha256(run / "checkpoints" / "320" / name) for name in FILES}


def steps(run: Path, count: int) -> None:
    """Return when a run has logged so many steps."""
    until, metrics = time.monotonic() + 90, run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"train"') >= count):
        assert time.monotonic() < until, f"{run.name} does not come to step {count}"
        time.sleep(0.2)


def starts(log: Path) -> list[str]:
    """The lines that say from where each start began."""
    return re.findall(r"^\S+ (?:starts|continues) from .*", log.read_text(), re.MULTILINE)


def test_a_requeue_loses_no_bit(slurm, sbatch, folder, straight):
    job, log = sbatch("requeued", 320, slow=0.5), folder / "requeued.log"
    steps(folder / "requeued", 4)
    slurm.call("scontrol", "requeue", job)
    assert slurm.wait(job, log)["Restarts"] == "1"
    first, second = starts(log)
    assert first == "requeued starts from scratch"
    seen = int(second.split()[-2])
    assert 32 <= seen < 80, "it left at the end of a step, before any checkpoint was due"
    assert digests(folder / "requeued") == straight


def test_a_time_limit_loses_no_bit(slurm, sbatch, folder, straight):
    job, log = sbatch("limited", 320, minutes=1, slow=1.5, warn=5), folder / "limited.log"
    found = slurm.wait(job, log)
    assert found["Restarts"] == "1", log.read_text()
    assert "left with 85: back to the queue" in log.read_text()
    assert len(starts(log)) == 2
    assert digests(folder / "limited") == straight


def test_a_killed_rank_is_replaced(slurm, sbatch, folder, straight):
    job, log = sbatch("killed", 320, slow=0.5), folder / "killed.log"
    steps(folder / "killed", 12)
    os.kill(rank(job, 1), signal.SIGKILL)
    assert slurm.wait(job, log)["Restarts"] == "1"
    assert starts(log)[1] == "killed continues from 80 images"
    assert digests(folder / "killed") == straight


def rank(job: str, number: int) -> int:
    """The process of a job's rank."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_text().split("\0")
            arguments = (process / "cmdline").read_text()
        except OSError:  # gone since
            continue
        if f"SLURM_JOB_ID={job}" in words and f"RANK={number}" in words and "train_stage1.py" in arguments:
            return int(process.name)
    raise AssertionError(f"job {job} has no rank {number}")


def test_a_failure_is_not_requeued_and_says_so(slurm, folder):
    log = folder / "wrong.log"
    job = slurm.call(
        "sbatch", "--parsable", f"--output={log}", "--time=1", "scripts/slurm/train.sbatch", "train_stage1.py",
        f"outputs={folder}", "optim.rl=1", TRIPTYCH_PYTHON=sys.executable,
    ).strip()  # fmt: skip
    assert slurm.wait(job, log, "FAILED")["Restarts"] == "0"
    assert "did you mean optim.lr?" in log.read_text()
    assert f"job {job} ended with 1, not to be queued again" in log.read_text()


def test_a_script_that_is_not_there_is_named(slurm, folder):
    log = folder / "nowhere.log"
    job = slurm.call("sbatch", "--parsable", f"--output={log}", "scripts/slurm/train.sbatch", "train_stage4.py").strip()
    slurm.wait(job, log, "FAILED")
    assert "has no train_stage4.py; submit from the checkout" in log.read_text()


def test_the_stages_follow_each_other_over_two_nodes(slurm, folder, shapes):
    text = f"data.path={shapes} data.resolution=64"
    printed = slurm.call(
        "bash", "scripts/slurm/curriculum.sh", "chain", f"outputs={folder}", "train.images=160",
        *(word for word in SMALL if not word.startswith("optim")),
        TRIPTYCH_SBATCH="--nodes=2 --time=9", TRIPTYCH_PYTHON=sys.executable,
        STAGE1=f"data.path={shapes}", STAGE2=text, STAGE3=text,
        REPARAMETERIZE="model=pixart_tiny model.hidden=32 model.depth=2 model.heads=2",
    )  # fmt: skip
    jobs = dict(line.split()[::-1] for line in printed.splitlines())
    assert list(jobs) == ["stage1", "reparameterize", "stage2", "stage3"]
    assert slurm.show(jobs["stage3"])["Dependency"].startswith(f"afterok:{jobs['stage2']}")
    logs = {name: folder / "chain" / f"slurm-{name}-{job}.log" for name, job in jobs.items()}
    for name, job in jobs.items():
        found = slurm.wait(job, logs[name])
        assert found["NumNodes"] == ("1" if name == "reparameterize" else "2")
    assert "PixArt from CCDiT" in logs["reparameterize"].read_text()
    assert f"starts from {folder}/chain/reparameterized" in logs["stage2"].read_text()
    assert f"starts from {folder}/chain/stage2" in logs["stage3"].read_text()
    for stage in ("stage1", "stage2", "stage3"):
        assert "64 records, 2 ranks" in logs[stage].read_text()
        assert (folder / "chain" / stage / "checkpoints" / "160").is_dir()


def test_stages_after_one_that_failed_are_cancelled(slurm, folder):
    printed = slurm.call(
        "bash", "scripts/slurm/curriculum.sh", "broken", f"outputs={folder}", "optim.rl=1",
        TRIPTYCH_SBATCH="--time=1", TRIPTYCH_PYTHON=sys.executable,
    )  # fmt: skip
    *_, last = (line.split()[0] for line in printed.splitlines())
    slurm.wait(last, folder / "none.log", "CANCELLED")
