"""Processes and signals: one rank or many, the same code.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them the run is one process and no group is made.

    ddp   every rank holds everything; gradients are averaged over all ranks
    fsdp  every rank holds 1/n of weights, gradients, averages and optimizer state; blocks are gathered for their turn
    hsdp  the same within a node, and copies between nodes: gathering stays on the fast links

Masters and sums of gradients are float32 in all three. Under fsdp and hsdp blocks are gathered in the dtype of the
step, which autocast would round them to anyway; what stands outside them (embeddings, head) is gathered in float32,
and inputs are left alone, so that times keep their digits.
"""

import copy
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inference.device import best_device
from models.lora import base_memo
from training.restart import exit_code
from training.sharded import local
from training.watch import Watch

if TYPE_CHECKING:  # what shards takes seconds to import, and one process never needs it
    from torch.distributed.device_mesh import DeviceMesh

ALONE = 2 * 3600  # seconds that one rank may work alone (the exam, say) while the others wait in a collective
ECHO = 2.0  # seconds in which a signal may come twice for one wish: from the terminal, and from the launcher
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_sessions = count()


class Parallel(Enum):
    """What the ranks share."""

    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


@dataclass(slots=True)
class Ranks:
    """This process among all of them, and whether it was asked to leave."""

    rank: int
    world: int
    device: torch.device
    asked: int = 0  # the signal that this rank got
    agreed: int = 0  # the one that all ranks act upon
    _watch: Watch | None = None

    @property
    def main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers; over the CPU, so that the accelerator does not wait for it."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank; all get the same answer."""
        return bool(self.largest(int(flag)))

    def leaving(self) -> bool:
        """Whether any rank got a signal to stop: all ranks get the same answer at the same step."""
        self.agreed = self.largest(self.asked)
        return self.agreed > 0

    def exit_code(self) -> int:
        """What the process should end with, by the signal that all ranks left for."""
        return exit_code(self.agreed)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def advance(self, step: int) -> None:
        """So many steps are finished. From the first call on, the next one must end within the time-out."""
        if self._watch:
            self._watch.step = step

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Around work of one rank that the others wait for: it may take its time (up to `ALONE`)."""
        if self._watch:
            self._watch.alone = True
        try:
            yield
        finally:
            if self._watch:
                self._watch.alone = False

    def shard(self, module: nn.Module, parallel: Parallel, dtype: torch.dtype = torch.float32) -> None:
        """Split a denoiser's parameters over ranks, in place, block by block, and move them to the device.

        It comes before optimizer and averages are made, which then hold the same shares. With ddp, and for one
        process, nothing happens.
        """
        mesh = self.mesh(parallel)
        if mesh is not None:
            _shard(module, mesh, dtype)

    def wrap(self, module: Any, parallel: Parallel = Parallel.ddp, dtype: torch.dtype = torch.float32) -> Any:
        """What to call instead of `module`, so that backward leaves the mean gradient over ranks in its parameters."""
        if parallel is not Parallel.ddp:
            if not sharded(module):
                self.shard(module, parallel, dtype)
            return module
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True) if self.world > 1 else module

    def mesh(self, parallel: Parallel) -> "DeviceMesh | None":
        """The ranks to shard over: a line, or a table of copies x shares. None where nothing is sharded."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if parallel is Parallel.hsdp and (local == 1 or self.world % local):
            raise ValueError(
                f"train.parallel=hsdp shares a model within a node, but of {self.world} ranks {local} run on this node;"
                " start the same number, two or more, on every node, or choose fsdp"
            )
        if parallel is Parallel.ddp or self.world == 1:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        if parallel is Parallel.fsdp:
            return init_device_mesh(self.device.type, (self.world,), mesh_dim_names=("shard",))
        return init_device_mesh(self.device.type, (self.world // local, local), mesh_dim_names=("replicate", "shard"))


def _shard(module: Any, mesh: "DeviceMesh", dtype: torch.dtype) -> None:
    """`fully_shard` on every block, and on the root for the rest. Gathered weights never outlive their use.

    torch would keep the root's from a forward to its backward, and after one without a backward for good: the module's
    parameters would then be whole copies, which neither optimizer nor average knows.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    lower = None if dtype is torch.float32 else dtype
    blocks = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    root = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in module.units():
        fully_shard(block, mesh=mesh, mp_policy=blocks, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, mp_policy=root, reshard_after_forward=True)


def sharded(module: nn.Module) -> bool:
    """Whether the ranks hold shares of a module, and calling it is work for all of them together."""
    return hasattr(module, "set_requires_gradient_sync")  # torch adds it to the class


def twin(module: Any) -> Any:
    """A copy in memory of its own, but for what adapters stand on, which is shared; of a sharded denoiser one that is
    sharded alike, and can be called like it.

    A sharded module cannot be deep-copied: a new one is built without memory, sharded, and given the same shares.
    """
    if not sharded(module):
        return copy.deepcopy(module, base_memo(module))
    first: Any = next(module.parameters())
    with torch.device("meta"):
        made = module.config.build()
    _shard(made, first.device_mesh, torch.float32)
    made.to_empty(device=first.device)
    with torch.no_grad():
        for mine, theirs in zip(shares(made), shares(module), strict=True):
            mine.copy_(theirs)
    return made


def shares(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers as this rank holds them: plain tensors, views of the shares of a sharded module."""
    return [local(tensor) for tensor in (*module.parameters(), *module.buffers())]


def synchronised(module: Any, last: bool) -> AbstractContextManager:
    """Around forward and backward of a micro-batch: gradients are averaged over ranks with the last one of a step.

    Under fsdp they stay whole until then, which costs their memory and saves the traffic; under hsdp they are shared
    out within the node each time, and only the sum between nodes waits.
    """
    if sharded(module):
        if next(module.parameters()).device_mesh.ndim == 2:
            module.set_requires_all_reduce(last)
        else:
            module.set_requires_gradient_sync(last)
    elif isinstance(module, nn.parallel.DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


@contextmanager
def session(timeout: float = 600, folder: Path | None = None) -> Iterator[Ranks]:
    """Join the other ranks, catch SIGTERM, SIGINT and SIGUSR1 as a wish to leave, and undo both at the end.

    A second signal leaves at once. A rank that stands still or is silent for `timeout` seconds ends all of them with
    its name (see training.watch), and their stacks in `folder`/stacks. An error on one rank ends the others too.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = best_device()
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.accelerator.set_device_index(device.index)
    ranks = Ranks(rank, world, device)
    with _listening(ranks):
        if world == 1 or dist.is_initialized():
            yield ranks
            return
        with _joined(ranks, timeout, folder):
            yield ranks


@contextmanager
def _joined(ranks: Ranks, timeout: float, folder: Path | None) -> Iterator[None]:
    """The process group, and the watch over it."""
    store, connection = _meet(ranks, timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo",
        store=store, rank=ranks.rank, world_size=ranks.world, timeout=timedelta(seconds=max(timeout, ALONE)),
    )  # fmt: skip
    if ranks.main:
        connection.set("verdict", "none")
    watch = ranks._watch = Watch(ranks.rank, ranks.world, connection, folder, timeout, _kept())
    try:
        dist.barrier()
        watch.start()
        yield
        with ranks.alone():
            dist.barrier()  # who leaves early makes the launcher end the others, maybe within a save
    except BaseException as error:
        if _broken(error):
            watch.blame()
        watch.failed(error)
        raise
    finally:
        watch.stop()
        ranks._watch = None
        dist.destroy_process_group()


def _meet(ranks: Ranks, timeout: float) -> tuple[dist.Store, dist.Store]:
    """The store that the group is made with, once all ranks have come to it, and a second connection to it."""
    if not os.environ.keys() >= {"MASTER_ADDR", "MASTER_PORT"}:
        raise ValueError(
            f"WORLD_SIZE={ranks.world}, but MASTER_ADDR and MASTER_PORT are not set, so the ranks cannot meet; start"
            " them with torchrun"
        )
    name = f"triptych/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_sessions)}"

    def connect(serve: bool) -> dist.Store:
        return dist.PrefixStore(
            name,
            dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=serve, wait_for_workers=False,
                timeout=timedelta(seconds=timeout),
            ),
        )  # fmt: skip

    try:
        store = connect(serve=ranks.main and not _kept())
        store.set(f"here/{ranks.rank}", "")
        store.wait([f"here/{rank}" for rank in range(ranks.world)])
    except dist.DistStoreError as error:
        absent = [str(rank) for rank in range(ranks.world) if not store.check([f"here/{rank}"])]
        raise ValueError(
            f"rank {', '.join(absent)} of {ranks.world} did not come within train.timeout={timeout:g} s;"
            " look at its log, and start all of them again"
        ) from error
    return store, connect(serve=False)


def _kept() -> bool:
    """Whether the launcher keeps the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _broken(error: BaseException) -> bool:
    """Whether a collective failed, and not something of this rank."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def _listening(ranks: Ranks) -> Iterator[None]:
    """Take the first signal as a wish; a second one does what it does to any process."""
    launched, first = bool({"TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"} & os.environ.keys()), 0.0

    def ask(number: int, _frame: Any) -> None:
        nonlocal first
        if not ranks.asked:
            ranks.asked, first = number, time.monotonic()
        if not launched or time.monotonic() - first > ECHO:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        if launched and time.monotonic() - first > ECHO:
            os.kill(os.getpid(), number)

    try:
        before = {number: signal.signal(number, ask) for number in SIGNALS}
    except ValueError:  # not the main thread: signals are someone else's
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
