"""A Hydra multirun whose jobs are SLURM's."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["model.hidden=32", "model.depth=2", "model.heads=2", "train.batch_size=8", "train.log_every=8"]


@pytest.fixture
def multirun(slurm, shapes: Path, tmp_path: Path):
    """`multirun(*overrides)`: the running command, in an empty folder."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install hydra-submitit-launcher")
    for name in ("assets", "train_stage1.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "shapes").symlink_to(shapes)

    def start(*overrides: str) -> subprocess.Popen[str]:
        fixed = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=10", "data.path=shapes", "sampler.steps=1"]
        return subprocess.Popen(
            [sys.executable, "train_stage1.py", "-m", *fixed, *SMALL, *overrides],
            cwd=tmp_path, env=slurm.environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


@pytest.mark.slow
def test_a_multirun_of_four_jobs_finishes(multirun, tmp_path):
    done = multirun("name=sweep", "train.images=80", "optim.lr=1e-3,2e-3", "seed=1,2")
    printed, _ = done.communicate(timeout=240)
    assert done.returncode == 0, printed
    runs = [path.parent for path in tmp_path.glob("outputs/sweep/**/metrics.jsonl")]
    assert len(runs) == 4
    assert all((run / "checkpoints" / "80").is_dir() for run in runs)
    for rate in ("0.001", "0.002"):
        for seed in (1, 2):
            assert [run for run in runs if f"optim.lr={rate}" in str(run) and f"seed={seed}" in str(run)]


@pytest.mark.slow
def test_a_job_of_two_ranks_goes_on_after_its_limit(slurm, multirun, tmp_path):
    done = multirun("name=pair", "train.images=1600", "optim.lr=1e-3", "hydra.launcher.nodes=2")
    until = time.monotonic() + 90
    while not (found := list(tmp_path.glob("outputs/pair/**/metrics.jsonl"))):
        assert time.monotonic() < until, "the job does not begin"
        time.sleep(0.2)
    job = slurm.call("squeue", "--noheader", "--name=pair", "--format=%A").strip()
    slurm.call("scancel", "--signal=USR1", job)  # what comes before the limit
    printed, _ = done.communicate(timeout=240)
    assert done.returncode == 0, printed
    (log,) = tmp_path.glob("outputs/pair/.submitit/*/*_0_log.out")
    text = log.read_text()
    assert text.count("64 records, 2 ranks") == 2, "it started twice"
    before, asked, after = text.partition("was asked to stop; the same command continues from")
    assert asked and "starts from scratch" in before and " continues from " in after
    assert (found[0].parent / "checkpoints" / "1600").is_dir()
