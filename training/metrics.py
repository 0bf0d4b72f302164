"""What a run says while it goes: `metrics.jsonl`, a progress bar, and wandb or TensorBoard if asked.

Sums stay on the device and are read once per log line, so a step never waits for the host. A full disk ends no run:
lines wait in memory until there is room.
"""

import contextlib
import json
import resource
import secrets
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import FULL
from training.distributed import Ranks

BINS = 10


class LoggerKind(Enum):
    """Where else the numbers go."""

    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """The logger beside metrics.jsonl; wandb works offline too."""

    kind: LoggerKind = LoggerKind.none
    project: str = "triptych"  # of wandb
    offline: bool = False  # wandb writes to the disk alone


class LossSums:
    """Weighted and unweighted loss, and the unweighted one by tenth of the noise time, since the last read."""

    def __init__(self, device: torch.device):
        self._bins = torch.zeros(3, BINS, device=device)  # weighted, unweighted, how many
        self._steps = torch.zeros(2, device=device)  # gradient norm, skipped
        self._counts = [0, 0]  # steps, damaged

    def add_losses(self, weighted: Tensor, unweighted: Tensor, times: Tensor) -> None:
        """One micro-batch: three vectors (b,)."""
        bins = (times * BINS).long().clamp_(max=BINS - 1)
        self._bins.index_add_(1, bins, torch.stack((weighted, unweighted, torch.ones_like(unweighted))))

    def add_damaged(self, count: int) -> None:
        """So many images of a micro-batch could not be read, and taught nothing."""
        self._counts[1] += count

    def add_step(self, norm: Tensor, skipped: Tensor) -> None:
        """One optimizer step: the gradient's norm before clipping, and 1.0 if it was skipped."""
        self._steps += torch.stack((norm.masked_fill(skipped > 0, 0.0), skipped))
        self._counts[0] += 1

    def read(self, ranks: Ranks) -> dict[str, Any]:
        """Means over all ranks since the last read, which starts anew."""
        here = torch.cat((self._bins.flatten(), self._steps, self._steps.new_tensor(self._counts)))
        *bins, norm, skipped, steps, damaged = ranks.sum(here).tolist()
        self._bins.zero_()
        self._steps.zero_()
        self._counts = [0, 0]
        weighted, sums, counts = bins[:BINS], bins[BINS : 2 * BINS], bins[2 * BINS :]
        count, steps = max(sum(counts), 1), max(steps, 1)
        return {
            "loss": sum(weighted) / count,
            "loss_unweighted": sum(sums) / count,
            "loss_bins": [value / number if number else None for value, number in zip(sums, counts, strict=True)],
            "grad_norm": norm / steps,
            "skipped": round(skipped / ranks.world),
            "damaged": round(damaged),
        }


class Journal:
    """Appends to `metrics.jsonl`, forwards to the logger, draws the bar. On ranks other than 0 it is silent."""

    def __init__(self, folder: Path, config: LoggerConfig, ranks: Ranks, name: str, images: int, images_seen: int):
        self._main = ranks.main
        self._backend: Any = None
        self._kind = config.kind
        if not self._main:
            return
        path = folder / "metrics.jsonl"
        _forget_after(path, images_seen)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run
        self._waiting, self._full = b"", False  # what found no room
        if config.kind is LoggerKind.wandb:
            import wandb

            mode = "offline" if config.offline else "online"
            self._backend = wandb.init(
                project=config.project, name=name, id=_wandb_id(folder), dir=folder, mode=mode, resume="allow"
            )
        elif config.kind is LoggerKind.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._backend = SummaryWriter(str(folder / "tensorboard"))
        self._bar = _Bar(name, images, images_seen)

    def write(self, kind: str, images: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if not self._main:
            return
        self._append(json.dumps({"kind": kind, "images": images, **values}) + "\n")
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        for index, value in enumerate(values.get("loss_bins", [])):
            if value is not None:
                numbers[f"{kind}/loss_bin_{index}"] = value
        if self._kind is LoggerKind.wandb:
            self._backend.log({**numbers, "images": images})
        elif self._kind is LoggerKind.tensorboard:
            for key, value in numbers.items():
                self._backend.add_scalar(key, value, images)
        if kind == "train":
            speed = (
                f"{values['images_per_s']:,.1f} images/s  {values['tflops']:.3g} TFLOP/s ({values['peak_share']:.0%})"
            )
            self._bar.describe(f"loss {values['loss']:.4f}  {speed}")
        elif kind == "compile":
            self._bar.say(f"compiled in {values['seconds']:.0f} s")

    def advance(self, images: int) -> None:
        """Move the bar."""
        if self._main:
            self._bar.advance(images)

    def say(self, text: str) -> None:
        """A line for people, above the bar."""
        if self._main:
            self._bar.say(text)

    def close(self) -> None:
        """Finish the bar and the logger."""
        if not self._main:
            return
        self._append("")
        if self._waiting:
            lost = len(self._waiting.splitlines())
            self._bar.say(f"{self._file.name} lacks its last {lost} lines: the disk is full")
        self._bar.close()
        self._file.close()
        if self._kind is LoggerKind.wandb:
            self._backend.finish()
        elif self._kind is LoggerKind.tensorboard:
            self._backend.close()

    def _append(self, line: str) -> None:
        """To metrics.jsonl, after all that waits; where the disk takes half a line, the other half waits."""
        self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._full = False
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self._full:
                self._bar.say(f"{self._file.name}: {error.strerror}; its lines wait in memory until there is room")
            self._full = True


class _Bar:
    """A rich progress bar in a terminal; elsewhere (a log file) a plain line at each description."""

    def __init__(self, name: str, total: int, done: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeLeftColumn

        self._console = Console(highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal
        self._name, self._total, self._done = name, total, done
        self._progress = Progress(
            TextColumn("[bold]{task.fields[name]}"), BarColumn(), MofNCompleteColumn(), TextColumn("images"),
            TimeElapsedColumn(), TextColumn("left"), TimeLeftColumn(), TextColumn("{task.description}"),
            console=self._console, disable=not self._live,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total, completed=done, name=name)
        self._progress.start()

    def advance(self, images: int) -> None:
        self._done += images
        self._progress.advance(self._task, images)

    def describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        if not self._live:
            self._print(f"{self._name}  {self._done:,} of {self._total:,} images  {text}")

    def say(self, text: str) -> None:
        self._print(text, markup=False)

    def _print(self, text: str, markup: bool = True) -> None:
        with contextlib.suppress(OSError):  # printed into a file, on a full disk
            self._console.print(text, markup=markup)

    def close(self) -> None:
        self._progress.stop()


def _wandb_id(folder: Path) -> str:
    """The id of this folder's run: without it, a run that continues would be another one to wandb."""
    path = folder / "wandb-id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def _forget_after(path: Path, images_seen: int) -> None:
    """Drop the lines that a killed run wrote after the checkpoint it now continues from."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["images"] <= images_seen]
    if images_seen == 0:
        kept = []
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept))
    aside.rename(path)


def peak_rss_mb() -> float:
    """Most memory this process ever held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
