"""Processes and signals: one rank or many, the same code.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them the run is one process and no group is made.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inference.device import best_device


@dataclass(slots=True)
class Ranks:
    """This process among all of them, and whether it was asked to leave."""

    rank: int
    world: int
    device: torch.device
    _asked: bool = False

    @property
    def main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def leaving(self) -> bool:
        """Whether any rank got a signal to stop: all ranks get the same answer at the same step."""
        if self.world == 1:
            return self._asked
        flag = torch.tensor(int(self._asked))  # on the CPU, so over gloo: the accelerator does not wait for it
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, module: Any) -> Any:
        """DistributedDataParallel where there is someone to share with."""
        if self.world == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)


@contextmanager
def session() -> Iterator[Ranks]:
    """Join the other ranks, catch SIGTERM, SIGINT and SIGUSR1 as a wish to leave, and undo both at the end.

    A second signal leaves at once.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = best_device()
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.accelerator.set_device_index(device.index)
    ours = world > 1 and not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(rank, world, device)

    def ask(number: int, _frame) -> None:
        ranks._asked = True
        signal.signal(number, signal.SIG_DFL)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    try:
        before = {number: signal.signal(number, ask) for number in signals}
    except ValueError:  # not the main thread: signals are someone else's
        before = {}
    try:
        yield ranks
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if ours:
            dist.destroy_process_group()
