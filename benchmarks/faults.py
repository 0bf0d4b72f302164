"""A campaign of faults against one small run: whatever befalls it, the same command ends in the same bytes.

    make faults                              120 tries and more, about five minutes; writes benchmarks/faults.md
    python benchmarks/faults.py --tries 12   a bounded one, as the tests run it

One run is trained undisturbed. Then it is trained again and again in a folder of its own, and each time something
happens to it: a signal at a random moment, a kill at a write of a save, a full disk, flipped bits in the newest
checkpoint. It is started again until it is done. An outcome is good if weights, averages and optimizer state of the
last checkpoint are those of the undisturbed run, bit for bit, and if no start repeated more than the images between two
saves and those trained while a save was on its way to the disk: less than two intervals, as a save waits for the one
before. In so small a run a save takes as long as several steps. Processes are forked from one that has imported
everything, so that a start takes little time.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

EVERY, IMAGES = 40, 240
FILES = ("denoiser/model.safetensors", "denoiser/ema.safetensors", "optimizer.safetensors", "guard.safetensors")
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT, "USR1": signal.SIGUSR1}


@dataclass(slots=True)
class Fault:
    """What was tried of one kind, and what came of it."""

    tries: int = 0
    same: int = 0  # ended in the bytes of the undisturbed run
    lost: list[int] = field(default_factory=list)  # images that a start repeated
    ended: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # how the process that was hit ended


class Campaign:
    """The run, its undisturbed end, and what was tried."""

    def __init__(self, root: Path, seed: int):
        self.root, self.random, self.faults = root, random.Random(seed), defaultdict(Fault)
        self.data = root / "shapes-64"
        self._prepare()
        self.seconds = self._undisturbed()

    def signals(self, tries: int) -> None:
        """Each signal in turn at a random moment of the run, also while it is stopped."""
        names = [*SIGNALS, "STOP"]
        for i in range(tries):
            name = names[i % len(names)]
            self._try(f"SIG{name}", lambda: None, lambda pid, name=name: self._hit(pid, name))

    def write_points(self) -> None:
        """SIGKILL at every rename and every fsync of the first two saves."""
        for point in range(self._count_points()):
            self._try("SIGKILL at a write of a save", lambda point=point: die_at(point), lambda pid: None)

    def full_disk(self, tries: int) -> None:
        """No file may grow while the second save is written; then there is room again."""
        for _ in range(tries):
            self._try("disk full at a save", lambda: no_room(2), lambda pid: None)

    def flipped_bits(self, tries: int) -> None:
        """The run is killed, and a bit of its newest checkpoint flipped."""
        for _ in range(tries):
            self._try("flipped bit in the newest checkpoint", lambda: None, self._flip)

    def _prepare(self) -> None:
        from models.autoencoder import AutoencoderConfig
        from prepare.shapes import prepare_shapes

        if os.fork() == 0:  # in a child: the process that forks must not have started torch's threads
            vae = AutoencoderConfig(path="assets/shapes").build()
            prepare_shapes(self.data, resolution=64, num_images=64, seed=0, vae=vae, two=0)
            os._exit(0)
        os.wait()

    def _undisturbed(self) -> float:
        start = time.monotonic()
        assert self._start("whole") == 0, "the undisturbed run did not end well"
        self.end = self._digests("whole")
        return time.monotonic() - start

    def _try(self, kind: str, sabotage: Callable[[], None], hit: Callable[[int], Any]) -> None:
        """One fault, then starts without one until the run is done."""
        shutil.rmtree(self.root / "run", ignore_errors=True)
        fault = self.faults[kind]
        fault.tries += 1
        code = self._start("run", sabotage, hit)
        fault.ended[describe(code)] += 1
        for _ in range(3):
            if self._finished():
                break
            reached, saved = self._reached(), self._saved()
            fault.lost.append(max(0, reached - saved))
            limit = (
                3 * EVERY if kind.startswith("flipped") else 2 * EVERY
            )  # there the newest checkpoint is lost as well
            assert fault.lost[-1] < limit, f"{kind}: {fault.lost[-1]} images would be repeated"
            code = self._start("run")
            assert code == 0, f"{kind}: the second start ended with {code}"
        fault.same += self._digests("run") == self.end

    def _start(
        self, name: str, sabotage: Callable[[], None] | None = None, hit: Callable[[int], Any] | None = None
    ) -> int:
        child = os.fork()
        if child == 0:
            try:
                os._exit(self._train(name, sabotage))
            except SystemExit as ended:
                os._exit(int(ended.code or 0))
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                os._exit(70)
        if hit:
            hit(child)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _train(self, name: str, sabotage: Callable[[], None] | None) -> int:
        import torch

        from configs.schema import compose
        from training.run import run

        torch.set_num_threads(1)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        where = [f"name={name}", f"outputs={self.root}", f"data.path={self.data}", f"train.images={IMAGES}"]
        model = ["model.hidden=32", "model.depth=2", "model.heads=2", "optim.warmup=16", "optim.lr=1e-3"]
        clocks = ["train.batch_size=8", "train.log_every=8", "sample.every=1000000", "sample.first=1000000"]
        saves = [f"checkpoint.every={EVERY}", "checkpoint.keep=2", "train.max_restarts=100", "checkpoint.patience=10"]
        cfg = compose("stage1", [*where, *model, *clocks, *saves])
        if sabotage:
            sabotage()
        run(cfg)
        return 0

    def _hit(self, pid: int, name: str) -> None:
        time.sleep(self.random.uniform(0, 1.1 * self.seconds))
        try:
            if name == "STOP":
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)
            else:
                os.kill(pid, SIGNALS[name])
        except ProcessLookupError:
            pass  # it was done before

    def _flip(self, pid: int) -> None:
        while not self._saved() and not self._finished():
            time.sleep(0.01)
        time.sleep(self.random.uniform(0, 0.5 * self.seconds))
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        newest = max(self._checkpoints("run"), key=lambda path: int(path.name))
        if len(self._checkpoints("run")) < 2:
            return  # with the only one gone the run would rightly refuse to begin anew
        path = newest / self.random.choice(FILES)
        content = bytearray(path.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)

    def _count_points(self) -> int:
        counter = self.root / "points"

        def note(number: int) -> None:
            counter.write_text(str(number))

        def count() -> None:
            watch_writes(note)

        shutil.rmtree(self.root / "run", ignore_errors=True)
        self._start("run", count)
        saves = IMAGES // EVERY
        return 2 * int(counter.read_text()) // saves

    def _checkpoints(self, name: str) -> list[Path]:
        return [path for path in (self.root / name / "checkpoints").glob("[0-9]*") if path.name.isdigit()]

    def _saved(self) -> int:
        from models.folder import newest

        found = newest(self.root / "run/checkpoints", warn=lambda _: None)
        return int(found.name) if found else 0

    def _reached(self) -> int:
        path = self.root / "run/metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        images = 0
        for line in lines:
            try:
                images = max(images, json.loads(line).get("images", 0))
            except ValueError:
                continue  # half a line: the process ended there
        return images

    def _finished(self) -> bool:
        return (self.root / "run/checkpoints" / str(IMAGES)).exists() and self._saved() == IMAGES

    def _digests(self, name: str) -> list[str]:
        folder = self.root / name / "checkpoints" / str(IMAGES)
        return [hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in FILES]


def watch_writes(tell: Callable[[int], None]) -> None:
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

    real, count = Saver._publish, 0

    def publish(*arguments: Any) -> None:
        nonlocal count
        count += 1
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if count == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    Saver._publish = publish  # pyright: ignore[reportAttributeAccessIssue]


def describe(code: int) -> str:
    """How a process ended."""
    known = {0: "done, or left when asked", 85: "left at a step, asks to be started again"}
    return known.get(code) or (f"killed by {signal.Signals(-code).name}" if code < 0 else f"error {code}")


def table(faults: dict[str, Fault]) -> str:
    """The campaign as a table of Markdown."""
    lines = [
        "| fault | tries | how the process ended | same bytes in the end | images repeated, most |",
        "|---|---|---|---|---|",
    ]
    for kind, fault in faults.items():
        ended = ", ".join(f"{how}: {count}" for how, count in fault.ended.items())
        lines.append(f"| {kind} | {fault.tries} | {ended} | {fault.same} | {max(fault.lost, default=0)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign; ends with an error if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tries", type=int, default=90, help="signals at random moments, besides all else")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/faults.md", help="the table; empty: only printed")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # once, for all that are forked
    for name in ("configs.schema", "prepare.shapes", "training.run", "diffusers.models.autoencoders.autoencoder_kl"):
        import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.seed)
        campaign.signals(options.tries)
        few = max(1, options.tries // 30)
        if options.tries >= 30:
            campaign.write_points()
        campaign.full_disk(few)
        campaign.flipped_bits(2 * few)
    text = table(campaign.faults)
    print(text)
    if options.out:
        about = f"`python benchmarks/faults.py --tries {options.tries}`: a run of {IMAGES} images, saved every {EVERY}."
        Path(options.out).write_text(f"# Faults\n\n{about}\n\n{text}\n")
    if any(fault.same < fault.tries for fault in campaign.faults.values()):
        sys.exit("something was lost: see the column of same bytes")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
