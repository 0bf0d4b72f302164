"""A campaign of faults against one small run: whatever befalls it, the same command ends in the same bytes.

    make faults                              150 tries, in about ten minutes; writes benchmarks/faults.md
    python benchmarks/faults.py --tries 5    a bounded one, as the tests run it

One run is trained undisturbed. Then it is trained again and again in a folder of its own, and each time something
happens to it: a signal, a kill at a write of a save, a full disk, a rank that hangs. It is started again, undisturbed,
until it is done. An outcome is good if it has a name, if weights, averages, optimizer state and guard of the last
checkpoint are those of the undisturbed run, bit for bit, and if no start repeated more than the steps between two saves
and those trained while a save was on its way to the disk: less than two intervals, as a save waits for the one before.
In so small a run a save takes as long as several steps. Processes are forked from one that has imported everything, so
that a start takes little time.
"""

import argparse
import ctypes
import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

BATCH, EVERY, IMAGES = 8, 40, 240
SECONDS = 8.0  # that a rank may stand still
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT, "USR1": signal.SIGUSR1}
LEFT = {
    0: "done",
    1: "error, one sentence",
    70: "error, traceback",
    85: "asks to be started again",
    86: "asks not to be",
}
Sabotage = Callable[[], Any]  # done in the process, before it trains
Hit = Callable[[list[int]], Any]  # done to the processes, from outside; may return those that must be killed at last


@dataclass(slots=True)
class Fault:
    """What was tried of one kind, and what came of it."""

    tries: int = 0
    same: int = 0  # ended in the bytes of the undisturbed run
    lost: list[int] = field(default_factory=list)  # images that a start repeated
    ended: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # how the processes that were hit ended
    said: str = ""  # the sentence that names it, of the first try that has one
    absent: str = ""  # why it could not be tried


class Campaign:
    """The run, its undisturbed end, and what was tried."""

    def __init__(self, root: Path, seed: int):
        self.root, self.random, self.faults = root, random.Random(seed), defaultdict[str, Fault](Fault)
        self.data, self.run = root / "shapes-64", root / "run"
        self._in_child(self._prepare)
        self.seconds = self._undisturbed(1, "")

    # ---- one process

    def signals(self, tries: int) -> None:
        """Each signal in turn at a random moment of the run, also while it is stopped."""
        names = [*SIGNALS, "STOP"]
        for i in range(tries):
            name = names[i % len(names)]
            self._try(f"SIG{name} at a random moment", hit=lambda pids, name=name: self._signal(pids[0], name))

    def write_points(self) -> None:
        """SIGKILL at every rename and every fsync of the first two saves."""
        for point in range(self._count_points()):
            self._try("SIGKILL at each write of a save", lambda point=point: die_at(point))

    def full_disks(self, tries: int) -> None:
        """At a save, at the log, at whatever is printed; and a real one, for a while and to the end."""
        for _ in range(tries):
            self._try("disk full at a save", lambda: no_room(2), says="was not written")
            self._try("disk full at metrics.jsonl", lambda: small_log(self._step()), says="its lines wait")
            self._try("disk full at what is printed", lambda: at_step(self._step(), unheard))
        kinds = ("disk full for a while", "disk full to the end of the run")
        try:
            self._tmpfs()
        except OSError as error:
            for kind in kinds:
                self.faults[kind].absent = f"no file system of its own: {error.strerror}"
            return
        try:
            for _ in range(tries):
                self._try(kinds[0], hit=lambda pids: self._fill(for_a_while=True), says="lines wait|was not written")
                fill = self.run / "fill"
                self._try(
                    kinds[1], hit=lambda pids: self._fill(for_a_while=False), mend=fill.unlink, limit=IMAGES,
                    overrides=["checkpoint.patience=0"], says="error: .*(was not written|cannot be written)",
                )  # fmt: skip
        finally:
            subprocess.run(["umount", self.run], check=True)

    def no_rights(self, tries: int) -> None:
        """The folder of the run may not be written: from a start on, or from a moment within."""
        for _ in range(tries):
            self._try(
                "folder read-only at a start", without_rights, before=lambda: (self._part(), self._allow(0o555)),
                mend=lambda: self._allow(0o755), says="error: .*cannot be written: Permission denied",
            )  # fmt: skip
            self._try(
                "folder read-only from a moment on", without_rights, hit=lambda pids: self._forbid(),
                mend=lambda: self._allow(0o755), limit=3 * EVERY, says="error: .*cannot be written: Permission denied",
            )  # fmt: skip

    def flipped_bits(self, tries: int) -> None:
        """The run is killed, and a bit of its newest checkpoint flipped."""
        for _ in range(tries):  # the newest is lost as well, so one interval more
            self._try("flipped bit in the newest checkpoint", hit=lambda pids: self._flip(pids[0]), limit=3 * EVERY)

    def second_job(self, tries: int) -> None:
        """The same command while it runs."""
        for _ in range(tries):
            self._try(
                "a second job in the folder", before=self._first_job, mend=self._wait, says="error: .* is in use by"
            )

    def schemas(self, tries: int) -> None:
        """A checkpoint of an older version is continued, one of a newer refused."""
        for _ in range(tries):
            self._try(  # which had no guard: it begins anew, and remembers less at the end
                "checkpoint of the older schema", before=lambda: (self._part(), self._as_schema(1)), but="guard"
            )
            self._try(
                "checkpoint of a newer schema", before=lambda: (self._part(), self._as_schema(3)),
                mend=lambda: self._as_schema(2), says="error: .* has the state schema 3",
            )  # fmt: skip

    def reading(self, tries: int) -> None:
        """A thread that reads ahead fails; a shard is cut short, or taken away, while it is read."""
        copy, threads = self.root / "copy", ["data.workers=2"]

        def again() -> None:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.data, copy)

        own = [f"data.path={copy}", "data.max_damaged=0"]
        for _ in range(tries):
            self._try(
                "a thread that reads ahead fails", lambda: no_memory(self._step()), overrides=threads,
                says="MemoryError",
            )  # fmt: skip
            self._try(
                "a shard cut short while it is read", before=again, overrides=own, hit=lambda pids: self._cut(copy),
                mend=again, says="error: .*records were damaged",
            )  # fmt: skip
            self._try(
                "a shard taken away while it is read", before=again, overrides=own, mend=again,
                hit=lambda pids: self._cut(copy, away=True),
            )  # fmt: skip

    # ---- two ranks

    def ranks(self, tries: int) -> None:
        """One of two ranks sees a NaN, dies, is stopped, or hangs."""
        two = {"ranks": 2, "overrides": [f"train.timeout={SECONDS:g}"]}
        for i in range(tries):
            for name in ("KILL", "STOP"):
                kind = f"one of two ranks {'killed' if name == 'KILL' else 'stopped'}"
                hit, says = self._lose(name, victim=i % 2), rf"rank {i % 2} has given no sign of life"
                self._try(kind, hit=hit, says=says, parallel=("ddp", "fsdp")[i % 2], **two)
            step = self._step()
            self._try("one of two ranks hangs", lambda step=step: on_rank(1, lambda: at_step(step, hang)),
                      says=r"rank 1 has not finished|not finished step", **two)  # fmt: skip
        for _ in range(tries):
            step = self._step()
            self._undisturbed(2, "", lambda step=step: on_rank(0, lambda: bad_loss(step)), name=f"nan{step}")
            self._try(
                "NaN on one of two ranks", lambda step=step: on_rank(1, lambda: bad_loss(step)), ranks=2,
                end=f"nan{step}",
            )  # fmt: skip
            state = json.loads((self.run / "checkpoints" / str(IMAGES) / "state.json").read_text())
            assert state["skipped"] == 1, f"the update with a NaN was not skipped: {state}"

    # ---- how a try goes

    def _try(
        self,
        kind: str,
        sabotage: Sabotage | None = None,
        hit: Hit | None = None,
        *,
        before: Callable[[], Any] | None = None,
        mend: Callable[[], Any] | None = None,
        says: str = "",
        limit: int = 2 * EVERY,
        ranks: int = 1,
        parallel: str = "ddp",
        overrides: Sequence[str] = (),
        end: str = "",
        but: str = "-",
    ) -> None:
        """One fault, then starts without one until the run is done."""
        how = [*overrides, *([f"train.parallel={parallel}"] if ranks > 1 else [])]
        end = end or f"whole{ranks}{parallel if ranks > 1 else ''}"
        if not (self.root / end).exists():
            self._undisturbed(ranks, parallel)
        began = time.monotonic()
        self._clear()
        fault = self.faults[kind]
        fault.tries += 1
        if before:
            before()
        codes = self._start("run", ranks, sabotage, hit, how)
        fault.ended[describe(codes) if any(codes) or self._finished() else "left when asked"] += 1
        said = self._said(says)
        fault.said = fault.said or said
        if says and not said and not self._finished():
            raise AssertionError(f"{kind}: nothing says /{says}/ in\n{self._all_said()}")
        if mend:
            mend()
        calm = [
            override for override in how if not override.startswith("train.timeout")
        ]  # a busy machine starts slowly
        for _ in range(3):
            if self._finished():
                break
            fault.lost.append(max(0, self._reached() - self._saved()))
            assert fault.lost[-1] <= limit, f"{kind}: {fault.lost[-1]} images would be repeated"
            codes = self._start("run", ranks, overrides=calm)
            assert set(codes) == {0}, f"{kind}: started again, it ended with {codes}\n{self._all_said()}"
        same = self._finished() and self._digests("run", but) == self._digests(end, but)
        fault.same += same
        print(f"{time.monotonic() - began:4.0f} s  {kind}{'' if same else ': OTHER BYTES'}", file=sys.stderr)

    def _undisturbed(self, ranks: int, parallel: str, sabotage: Sabotage | None = None, name: str = "") -> float:
        """Train the run to compare with; returns its seconds."""
        start = time.monotonic()
        how = [f"train.parallel={parallel}"] if parallel and ranks > 1 else []
        name = name or f"whole{ranks}{parallel}"
        if not (self.root / name).exists():
            codes = self._start(name, ranks, sabotage, overrides=how)
            assert set(codes) == {0}, f"the undisturbed run ended with {codes}\n{self._all_said()}"
        return time.monotonic() - start

    def _start(
        self,
        name: str,
        ranks: int = 1,
        sabotage: Sabotage | None = None,
        hit: Hit | None = None,
        overrides: Sequence[str] = (),
    ) -> list[int]:
        """The same command once more; the exit code of each rank."""
        (self.root / "said").write_text("")
        pids = self._launch(name, ranks, sabotage, overrides)
        victims = (hit(pids) if hit else None) or []
        codes = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids if pid not in victims}
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return [codes[pid] for pid in pids]

    def _launch(self, name: str, ranks: int, sabotage: Sabotage | None, overrides: Sequence[str]) -> list[int]:
        port, cfg = free_port() if ranks > 1 else 0, self._config(name, tuple(overrides))
        return [self._in_child(lambda rank=rank: self._train(cfg, rank, ranks, port, sabotage), wait=False)
                for rank in range(ranks)]  # fmt: skip

    def _in_child(self, work: Callable[[], Any], wait: bool = True) -> int:
        """Fork: the process that forks must never have started torch's threads."""
        child = os.fork()
        if child:
            if wait:
                assert os.waitpid(child, 0)[1] == 0
            return child
        code = 70
        try:
            work()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException as error:
            from configs.schema import UNWRITABLE, explain

            if isinstance(error, ValueError | FloatingPointError) or getattr(error, "errno", 0) in UNWRITABLE:
                code = 1
                print(f"error: {explain(error, 'stage1')}", file=sys.stderr)
            else:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    @lru_cache  # noqa: B019 - composed once, before the fork: it takes a third of a start
    def _config(self, name: str, overrides: tuple[str, ...]) -> Any:
        from configs.schema import compose

        where = [f"name={name}", f"outputs={self.root}", f"data.path={self.data}", f"train.images={IMAGES}"]
        model = ["model.hidden=32", "model.depth=2", "model.heads=2", "optim.warmup=16", "optim.lr=1e-3"]
        clocks = [f"train.batch_size={BATCH}", "train.log_every=8", "sample.every=1000000", "sample.first=1000000"]
        saves = [f"checkpoint.every={EVERY}", "checkpoint.keep=2", "train.max_restarts=100", "checkpoint.patience=10"]
        return compose("stage1", [*where, *model, *clocks, *saves, *overrides])

    def _train(self, cfg: Any, rank: int, world: int, port: int, sabotage: Sabotage | None) -> None:
        import torch

        from training.run import run

        torch.set_num_threads(1)
        said = os.open(self.root / "said", os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if world > 1:
            there = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
            os.environ |= {key: str(value) for key, value in there.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if sabotage:
            sabotage()
        run(cfg)

    def _prepare(self) -> None:
        from models.autoencoder import AutoencoderConfig
        from prepare.shapes import prepare_shapes

        vae = AutoencoderConfig(path="assets/shapes").build()
        prepare_shapes(self.data, resolution=64, num_images=64, seed=0, vae=vae, two=0)

    # ---- what happens to it

    def _step(self) -> int:
        """A random one, with a save before it and one after."""
        return self.random.randrange(EVERY // BATCH + 2, (IMAGES - EVERY) // BATCH)

    def _signal(self, pid: int, name: str, soon: bool = False) -> None:
        if not soon:
            time.sleep(self.random.uniform(0, 0.9 * self.seconds))
        if name == "STOP":
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.1)
        os.kill(pid, SIGNALS.get(name, signal.SIGKILL))  # one that has ended is there until it is waited for

    def _lose(self, name: str, victim: int) -> Hit:
        """A signal to one rank, once there are steps; a stopped one is killed after the other has ended."""

        def hit(pids: list[int]) -> list[int]:
            self._until(lambda: self._reached() > 0)
            time.sleep(self.random.uniform(0, 0.5 * self.seconds))
            os.kill(pids[victim], signal.SIGSTOP if name == "STOP" else SIGNALS[name])
            return [pids[victim]] if name == "STOP" else []

        return hit

    def _first_job(self) -> None:
        (self.first,) = self._launch("run", 1, None, [])
        self._until(lambda: (self.run / "lock").exists() and (self.run / "lock").stat().st_size > 0)

    def _wait(self) -> None:
        assert os.waitpid(self.first, 0)[1] == 0

    def _part(self) -> None:
        self._start("run", overrides=[f"train.stop_at={IMAGES // 2}"])

    def _as_schema(self, schema: int) -> None:
        as_schema(self.run / "checkpoints" / str(IMAGES // 2), schema)

    def _forbid(self) -> None:
        self._until(lambda: self._saved() > 0 or self._finished())
        time.sleep(self.random.uniform(0, 0.2 * self.seconds))
        self._allow(0o555)

    def _allow(self, mode: int) -> None:
        for folder in (self.run / "checkpoints", self.run):
            folder.chmod(mode)

    def _cut(self, folder: Path, away: bool = False) -> None:
        self._until(lambda: self._reached() > 0)
        shards = [path for path in folder.glob("*.tar") if path.stem.isdigit()]
        for path in shards:
            path.unlink() if away else os.truncate(path, path.stat().st_size // 2)

    def _flip(self, pid: int) -> None:
        self._until(lambda: bool(self._saved()))
        time.sleep(self.random.uniform(0, 0.5 * self.seconds))
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        if len(self._checkpoints()) < 2:
            return  # with the only one gone the run would rightly refuse to begin anew
        newest = max(self._checkpoints(), key=lambda path: int(path.name))
        path = self.random.choice(sorted(newest.rglob("*.safetensors")))
        content = bytearray(path.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)

    def _tmpfs(self) -> None:
        """A file system of the run's own, with room for five checkpoints."""
        whole = sum(path.stat().st_size for path in (self.root / f"whole1/checkpoints/{IMAGES}").rglob("*.*"))
        self._clear()
        self.run.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={5 * whole}", "none", str(self.run)]
        if subprocess.run(command, capture_output=True).returncode:
            raise OSError(errno.EPERM, "mounting one is not permitted here")

    def _fill(self, for_a_while: bool) -> None:
        self._until(lambda: self._saved() > 0)
        time.sleep(self.random.uniform(0, 0.2 * self.seconds))
        with open(self.run / "fill", "wb", buffering=0) as file, suppress(OSError):
            until = time.monotonic() + (0.3 * self.seconds if for_a_while else 100)
            while time.monotonic() < until and not self._ended():
                with suppress(OSError):
                    while file.write(bytes(4096)) == 4096:
                        pass
                time.sleep(0.005)  # what is given free is taken too
        if for_a_while:
            (self.run / "fill").unlink()

    # ---- what can be seen of it

    def _until(self, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + 120
        while not holds() and not self._finished():
            assert time.monotonic() < until, self._all_said()
            time.sleep(0.01)

    def _ended(self) -> bool:
        return "error:" in self._all_said() or self._finished()

    def _clear(self) -> None:
        if self.run.is_mount():
            for path in self.run.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            shutil.rmtree(self.run, ignore_errors=True)

    def _said(self, pattern: str) -> str:
        """The line that has it, with the run's folder as users know it."""
        found = next((line for line in self._all_said().splitlines() if pattern and re.search(pattern, line)), "")
        return found.replace(str(self.root), "outputs").removeprefix("error: ").strip()

    def _all_said(self) -> str:
        return (self.root / "said").read_text()

    def _count_points(self) -> int:
        counter = self.root / "points"
        self._clear()
        self._start("run", sabotage=lambda: watch_writes(lambda number: counter.write_text(str(number))))
        saves = IMAGES // EVERY
        return 2 * int(counter.read_text()) // saves

    def _checkpoints(self) -> list[Path]:
        return [path for path in (self.run / "checkpoints").glob("[0-9]*") if path.name.isdigit()]

    def _saved(self) -> int:
        from models.folder import newest

        found = newest(self.run / "checkpoints", warn=lambda _: None)
        return int(found.name) if found else 0

    def _reached(self) -> int:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        images = 0
        for line in lines:
            with suppress(ValueError):  # half a line: the process ended there
                images = max(images, json.loads(line).get("images", 0))
        return images

    def _finished(self) -> bool:
        return (self.run / "checkpoints" / str(IMAGES)).exists() and self._saved() == IMAGES

    def _digests(self, name: str, but: str) -> set[tuple[str, str, str]]:
        """File, name and hash of each tensor; of an optimizer in parts, either rank may have written what both have."""
        folder, found = self.root / name / "checkpoints" / str(IMAGES), set()
        for path in folder.rglob("*.safetensors"):
            file = "optimizer" if path.parent.name == "optimizer" else path.stem
            if file != but:
                found |= {(file, key, hashlib.sha256(t.tobytes()).hexdigest()) for key, t in load_file(path).items()}
        return found


def watch_writes(tell: Callable[[int], Any]) -> None:
    """Call `tell` with the number of each fsync and rename that is about to be made."""
    count = 0
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)

        def counted(*arguments: Any, real: Any = real, **options: Any) -> Any:
            nonlocal count
            tell(count)
            count += 1
            return real(*arguments, **options)

        setattr(os, name, counted)


def die_at(point: int) -> None:
    """End this process with SIGKILL just before the given write."""
    watch_writes(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == point else None)


def no_room(save: int) -> None:
    """Let no file grow beyond a few bytes while the given save is written."""
    from training.checkpoint import Saver

    def full(real: Callable[..., None], *arguments: Any) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    at_call(Saver, "_publish", save, full)


def small_log(step: int) -> None:
    """Let metrics.jsonl not grow for three lines from a step on: the first of them is cut in the middle."""
    from training.metrics import Journal

    real, count = Journal.write, 0

    def write(journal: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step <= count < step + 3:
            size = os.fstat(journal._file.fileno()).st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + (7 if count == step else 0), limits[1]))
        try:
            real(journal, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    Journal.write = write  # pyright: ignore[reportAttributeAccessIssue]


def no_memory(number: int) -> None:
    """The thread that reads the given batch fails."""
    from data.loader import Batches

    def fail(real: Any, *arguments: Any) -> None:
        raise MemoryError("a thread that reads ahead has none")

    at_call(Batches, "at", number, fail)


def bad_loss(step: int) -> None:
    """The losses of the given step are not finite."""
    import training.run

    def spoil(real: Any, *arguments: Any) -> Any:
        weighted, *others = real(*arguments)
        return weighted * float("nan"), *others

    at_call(training.run, "losses", step, spoil)


def at_step(step: int, act: Callable[[], Any]) -> None:
    """Do something at the beginning of a step."""
    import training.run

    def first(real: Any, *arguments: Any) -> Any:
        act()
        return real(*arguments)

    at_call(training.run, "learning_rate", step, first)


def unheard() -> None:
    """Print to a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def hang() -> None:
    """Never come back."""
    time.sleep(1e6)


def on_rank(rank: int, act: Callable[[], Any]) -> None:
    """Do something on one rank only."""
    if int(os.environ["RANK"]) == rank:
        act()


def at_call(owner: Any, name: str, number: int, instead: Callable[..., Any]) -> None:
    """Replace the call of the given number, counted from 1, of a function by `instead(function, ...)`."""
    real, count = getattr(owner, name), 0

    def called(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return instead(real, *arguments) if count == number else real(*arguments)

    setattr(owner, name, called)


def without_rights() -> None:
    """Obey the permissions of folders, as root too does without its capabilities (Linux's capset)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())


def as_schema(checkpoint: Path, schema: int) -> None:
    """Make a checkpoint look as another version writes it; schema 1 had no guard."""
    from models.folder import sha256

    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"schema": schema}))
    if schema == 1:
        (checkpoint / "guard.safetensors").unlink()
    known = json.loads((checkpoint / "manifest.json").read_text())
    files = {name: checkpoint / name for name in known if (checkpoint / name).exists()}
    manifest = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def describe(codes: Sequence[int]) -> str:
    """How a process ended, or several."""
    names = [
        LEFT.get(code) or (f"killed by {signal.Signals(-code).name}" if code < 0 else f"error {code}") for code in codes
    ]
    return names[0] if len(set(names)) == 1 else "; ".join(f"rank {rank} {name}" for rank, name in enumerate(names))


def table(faults: dict[str, Fault]) -> str:
    """The campaign as a table of Markdown."""
    lines = ["| fault | tries | how it ended | same bytes in the end | steps repeated, most |", "|---|---|---|---|---|"]
    for kind, fault in faults.items():
        if fault.absent:
            lines.append(f"| {kind} | 0 | skipped: {fault.absent} | 0 | 0 |")
            continue
        ended = ", ".join(f"{how}: {count}" for how, count in fault.ended.items())
        lost = max(fault.lost, default=0) // BATCH
        lines.append(f"| {kind} | {fault.tries} | {ended} | {fault.same} | {lost} |")
    return "\n".join(lines)


def sentences(faults: dict[str, Fault]) -> str:
    """What each fault was called, where it was more than a signal."""
    return "\n".join(f"* {kind}: {fault.said}" for kind, fault in faults.items() if fault.said)


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign; ends with an error if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tries", type=int, default=80, help="signals at random moments; all else scales with it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/faults.md", help="the table; empty: only printed")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # once, for all that are forked
    for name in ("configs.schema", "prepare.shapes", "training.run", "diffusers.models.autoencoders.autoencoder_kl"):
        import_module(name)
    started, few = time.monotonic(), max(1, options.tries // 30)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.seed)
        campaign.signals(options.tries)
        if options.tries >= 30:
            campaign.write_points()
        campaign.full_disks(few)
        campaign.no_rights(few)
        campaign.flipped_bits(2 * few)
        campaign.second_job(few)
        campaign.schemas(few)
        campaign.reading(few)
        if options.tries >= 30:
            campaign.ranks(few)
    minutes, tries = (time.monotonic() - started) / 60, sum(fault.tries for fault in campaign.faults.values())
    text = f"{table(campaign.faults)}\n\nWhat was said:\n\n{sentences(campaign.faults)}"
    print(text)
    if options.out:
        about = (
            f"`python benchmarks/faults.py --tries {options.tries}`: {tries} tries in {minutes:.0f} minutes, with a run"
            f" of {IMAGES // BATCH} steps, saved every {EVERY // BATCH}. A signal that came after the end counts as"
            " done; of a second job in the folder, the row says how that one ended."
        )
        Path(options.out).write_text(f"# Faults\n\n{about}\n\n{text}\n")
    if any(fault.same < fault.tries for fault in campaign.faults.values()):
        sys.exit("something was lost: see the column of same bytes")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
