"""What a run's state costs: saving it, finding it again at a start, and keeping it alike on two ranks.

python benchmarks/states.py
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Row, seconds
from inference.description import Description, find, plain
from models.base import Cond
from models.pixart import PixArtConfig
from training.checkpoint import CheckpointConfig, Saver, TrainState
from training.distributed import Parallel, session
from training.ema import EMA, EMAConfig
from training.optim import OptimConfig, build_optimizer, gradient_norm, guarded_step

ROUNDS = 3
WIDE = PixArtConfig(in_channels=8, patch_size=2, base_size=16, hidden=512, depth=6, heads=8, text_dim=192)  # 31 M
SMALL = PixArtConfig(in_channels=8, patch_size=2, base_size=16, hidden=256, depth=6, heads=4, text_dim=192)


def states() -> Iterator[Row]:
    """All rows of this file."""
    yield from saving()
    yield from starting()
    yield from ranks()


def trained(config: PixArtConfig) -> tuple[Any, torch.optim.Optimizer, EMA]:
    """A network after one step, with all state that a run has."""
    network = config.build()
    optimizer, ema = build_optimizer(network, OptimConfig()), EMA(network, EMAConfig())
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    guarded_step(optimizer, list(network.parameters()), 1e-4, 1.0)
    return network, optimizer, ema


def saving() -> Iterator[Row]:
    """How long the loop waits for a save: beside torch.save, and beside distributed checkpoints as they come."""
    import torch.distributed.checkpoint as dcp

    network, optimizer, ema = trained(WIDE)
    average: nn.Module = ema.module
    description = Description.load(find("assets/shapes/pipeline"))
    everything = {"model": network.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict()}
    took: dict[str, list[float]] = {"ours": [], "torch.save": [], "plain DCP": []}
    with TemporaryDirectory() as name, Saver(Path(name) / "ours", CheckpointConfig(keep=1), lambda _: None) as saver:
        for turn in range(ROUNDS + 1):  # the first allocates
            state = TrainState(images_seen=turn + 1)
            ways: dict[str, Callable[[], object]] = {
                "ours": lambda state=state: saver.save(
                    state, network, ema.profiles, optimizer, {}, description, {"model": plain(WIDE)}
                ),
                "torch.save": lambda: torch.save(everything, Path(name) / "usual.pt"),
                "plain DCP": lambda turn=turn: dcp.save(everything, checkpoint_id=Path(name) / f"dcp-{turn % 2}"),
            }
            for way, call in ways.items():
                took[way].append(seconds(call) * 1e3)
                saver.wait()
    median = {way: statistics.median(times[1:]) for way, times in took.items()}
    for way in ("torch.save", "plain DCP"):
        yield Row(name=f"save 0.44 GB of state: the loop waits ({way})", ours=median["ours"], usual=median[way])


def starting() -> Iterator[Row]:
    """A run from its command to its first logged step, new and continued."""
    from models.autoencoder import AutoencoderConfig
    from prepare.shapes import prepare_shapes

    fresh, continued = [], []
    with TemporaryDirectory() as name:
        vae = AutoencoderConfig(path="assets/shapes").build()
        prepare_shapes(Path(name) / "data", resolution=64, num_images=64, seed=0, vae=vae, two=0)
        for turn in range(ROUNDS):
            command = [
                sys.executable, "train_stage1.py", f"name={turn}", f"outputs={name}", f"data.path={name}/data",
                "train.batch_size=32", "train.log_every=32", "train.images=64", "sample.first=1000", "evaluate.count=0",
            ]  # fmt: skip
            metrics = Path(name) / str(turn) / "metrics.jsonl"
            fresh.append(first_step([*command, "train.stop_at=32"], metrics, 0))
            continued.append(first_step(command, metrics, 32))
    yield Row(name="a run, from its start to its first step", ours=statistics.median(fresh), unit="s")
    yield Row(name="a run continued, to its first step", ours=statistics.median(continued), unit="s")


def first_step(command: list[str], metrics: Path, after: int) -> float:
    """Seconds until the first line of training beyond so many images."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (metrics.is_file() and any(stepped(line, after) for line in metrics.read_text().splitlines())):
        if child.poll():
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
        time.sleep(0.005)
    took = time.perf_counter() - start
    child.wait()
    return took


def stepped(line: str, after: int) -> bool:
    """Whether a line, which may be half written, tells of training beyond so many images."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return record["kind"] == "train" and record["images"] > after


def ranks() -> Iterator[Row]:
    """A step on two ranks with a thread each, beside one rank's share alone with one thread."""
    alone = stepping(1, Parallel.ddp)
    for parallel in (Parallel.ddp, Parallel.fsdp):
        took = stepping(2, parallel)
        yield Row(name=f"a step on two ranks, {parallel.value} (one rank's share alone)", ours=took, usual=alone)


def stepping(world: int, parallel: Parallel) -> float:
    """Milliseconds of a step of the first of so many ranks, the median."""
    with socket.socket() as free, TemporaryDirectory() as name:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(name) / "took"
        torch.multiprocessing.spawn(_step, (world, port, parallel.value, str(out)), nprocs=world)
        return float(out.read_text())


def _step(rank: int, world: int, port: int, parallel: str, out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if world == 1:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    with session() as found:
        network: Any = SMALL.build()
        found.shard(network, Parallel(parallel))
        optimizer = build_optimizer(network, OptimConfig())
        wrapped, free = found.wrap(network, Parallel(parallel)), list(network.parameters())
        x, t = torch.randn(8, 8, 16, 16), torch.rand(8)
        cond = Cond(text=torch.randn(8, 24, 192))

        def step() -> None:
            wrapped(x, t, cond).square().mean().backward()
            guarded_step(optimizer, free, 1e-4, 1.0, norm=gradient_norm(free))

        for _ in range(3):
            step()
        took = [seconds(step) * 1e3 for _ in range(20)]
        if rank == 0:
            Path(out).write_text(str(statistics.median(took)))


if __name__ == "__main__":
    for row in states():
        print(row, flush=True)
