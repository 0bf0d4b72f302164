"""What the README promises of a run that is stopped and started again, by one process and by two ranks."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from benchmarks.faults import at_step
from configs.schema import compose
from data.loader import Batches
from models.folder import newest, sha256
from tests.training.conftest import SMALL
from tests.training.test_distributed import free_port
from training.run import run

FIRST, SECOND = 64, 32  # images of two runs, the second of which starts from the first; 40 records: over an epoch's end
STOPS = (8, 24, 32)
Job = tuple[str, str, list[str]]  # config, name, overrides


def jobs(name: str, stops: tuple[int, ...] = (), later: tuple[int, ...] = ()) -> list[Job]:
    """A run of the first config and one of the second that starts from it, each stopped at some images."""
    two = f"{name}-two"
    first: list[Job] = [("stage1", name, [f"train.images={FIRST}", *stop]) for stop in (*map(stop_at, stops), [])]
    origin = [f"train.images={SECOND}", f"init.from={name}"]
    return first + [("stage2", two, [*origin, *stop]) for stop in (*map(stop_at, later), [])]


def stop_at(images: int) -> list[str]:
    return [f"train.stop_at={images}"]


def perform(rank: int, ports: list[int], root: str, shards: str, todo: list[Job], dies: int = 0) -> None:
    """One rank of several runs, one after the other; what it reads is written down.

    ports: where two ranks meet, for each run; for one process none. dies: the step in which rank 1 is killed.
    """
    if dies and rank == 1:
        at_step(dies, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if ports:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
        }  # fmt: skip
        torch.set_num_threads(1)
    for index, (config, name, overrides) in enumerate(todo):
        if ports:
            os.environ["MASTER_PORT"] = str(ports[index])
        where = [f"name={name}", f"outputs={root}", f"data.path={shards}/shapes-{64 if config == 'stage1' else 128}"]
        given = [key.replace("init.from=", f"init.from={root}/") for key in overrides]
        with (Path(root) / f"{name}.seen{rank}").open("a", buffering=1) as file:
            taken(file.write, lambda: run(compose(config, [*SMALL, *where, "data.workers=0", *given])))  # noqa: B023


def taken(write: Callable[[str], Any], work: Callable[[], Any]) -> None:
    """Write down the positions and records of every batch that is read meanwhile."""
    real = Batches.at

    def at(self: Batches, positions: np.ndarray) -> Any:
        write(json.dumps([positions.tolist(), self.ledger(positions)[1].tolist()]) + "\n")
        return real(self, positions)

    Batches.at = at
    try:
        work()
    finally:
        Batches.at = real


def seen(root: Path, name: str) -> list[tuple[int, int]]:
    """Position and record of every image that any rank read, in every start, by position."""
    lines = [json.loads(line) for path in root.glob(f"{name}.seen*") for line in path.read_text().splitlines()]
    return sorted((position, record) for line in lines for position, record in zip(*line, strict=True))


def digests(root: Path, name: str, images: int) -> dict[str, str]:
    folder = root / name / "checkpoints" / str(images)
    return {path.name: sha256(path) for path in folder.rglob("*.safetensors")}


def losses(root: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def one(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undisturbed and stopped, by one process."""
    root = tmp_path_factory.mktemp("one")
    perform(0, [], str(root), str(shards), jobs("straight") + jobs("stopped", STOPS, (8,)))
    return root


@pytest.fixture(scope="module")
def two(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two ranks; and one run of which they do the first half."""
    root = tmp_path_factory.mktemp("two")
    todo = jobs("straight") + jobs("stopped", STOPS, (8,)) + jobs("moved", STOPS[-1:])[:1]
    mp.spawn(perform, ([free_port() for _ in todo], str(root), str(shards), todo), nprocs=2)
    return root


WORLDS = ["one", pytest.param("two", marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
def test_three_stops_an_epochs_end_and_a_new_start_from_it_change_no_bit(world, request):
    root = request.getfixturevalue(world)
    for name, images in (("", FIRST), ("-two", SECOND)):
        straight = digests(root, f"straight{name}", images)
        assert straight.keys() == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "guard.safetensors"}
        assert straight == digests(root, f"stopped{name}", images)
        assert losses(root, f"straight{name}") == losses(root, f"stopped{name}")


@pytest.mark.parametrize("world", WORLDS)
def test_every_position_is_read_once_whatever_stops_the_run(world, request):
    root = request.getfixturevalue(world)
    for name, images in (("straight", FIRST), ("stopped", FIRST), ("straight-two", SECOND), ("stopped-two", SECOND)):
        assert [position for position, _ in seen(root, name)] == list(range(images))
    assert seen(root, "straight") == seen(root, "stopped")
    assert sorted(record for _, record in seen(root, "straight")[:40]) == list(range(40))  # an epoch is all of them


@pytest.mark.slow
def test_a_rank_that_is_killed_costs_what_was_not_saved_and_no_bit(two, shards):
    todo = [("stage1", "killed", [f"train.images={FIRST}", "checkpoint.every=16"])]
    with pytest.raises(mp.ProcessExitedException):
        mp.spawn(perform, ([free_port()], str(two), str(shards), todo, 6), nprocs=2)
    saved = newest(two / "killed" / "checkpoints")
    assert saved
    assert saved.name in ("16", "32")  # 40 images were seen; that of 32 may have been on its way to the disk
    mp.spawn(perform, ([free_port()], str(two), str(shards), todo), nprocs=2)
    assert digests(two, "killed", FIRST) == digests(two, "straight", FIRST)
    times = Counter(position for position, _ in seen(two, "killed"))
    assert set(times) == set(range(FIRST))
    assert all(times[position] == 1 for position in (*range(int(saved.name)), *range(48, FIRST)))


@pytest.mark.slow
def test_another_number_of_ranks_sees_the_same_and_differs_by_the_order_of_sums(one, two, shards):
    perform(0, [], str(two), str(shards), jobs("moved")[:1])  # one process goes on where two stopped
    for name in ("straight", "moved"):
        assert seen(two, name) == seen(one, "straight")
        assert losses(two, name) == pytest.approx(losses(one, "straight"), rel=1e-4)
    assert losses(two, "straight") != losses(one, "straight")  # else nothing was compared
