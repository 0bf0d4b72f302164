"""What a run says while it goes: `metrics.jsonl`, a progress bar, and wandb or TensorBoard if asked.

Sums stay on the device and are read once per log line, so a step never waits for the host.
"""

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
    project: str = "triptych"
    offline: bool = False


class LossSums:
    """Weighted and unweighted loss, and the unweighted one by tenth of the noise time, since the last read."""

    def __init__(self, device: torch.device):
        # weighted sum, unweighted sum, count, gradient norm sum, skipped, steps, damaged; then sums and counts by bin
        self._sums = torch.zeros(7 + 2 * BINS, device=device)

    def add_losses(self, weighted: Tensor, unweighted: Tensor, times: Tensor) -> None:
        """One micro-batch: three vectors (b,)."""
        bins = (times * BINS).long().clamp(max=BINS - 1)
        self._sums[0] += weighted.sum()
        self._sums[1] += unweighted.sum()
        self._sums[2] += len(times)
        self._sums[7 : 7 + BINS].index_add_(0, bins, unweighted)
        self._sums[7 + BINS :].index_add_(0, bins, torch.ones_like(unweighted))

    def add_damaged(self, count: int) -> None:
        """So many images of a micro-batch could not be read, and taught nothing."""
        self._sums[6] += count

    def add_step(self, norm: Tensor, skipped: Tensor) -> None:
        """One optimizer step: the gradient's norm before clipping, and 1.0 if it was skipped."""
        self._sums[3] += torch.where(skipped > 0, 0.0, norm)
        self._sums[4] += skipped
        self._sums[5] += 1

    def read(self, ranks: Ranks) -> dict[str, Any]:
        """Means over all ranks since the last read, which starts anew."""
        total = ranks.sum(self._sums.clone()).tolist()
        self._sums.zero_()
        count, steps = max(total[2], 1), max(total[5], 1)
        sums, counts = total[7 : 7 + BINS], total[7 + BINS :]
        return {
            "loss": total[0] / count,
            "loss_unweighted": total[1] / count,
            "loss_bins": [value / number if number else None for value, number in zip(sums, counts, strict=True)],
            "grad_norm": total[3] / steps,
            "skipped": round(total[4] / ranks.world),
            "damaged": round(total[6]),
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
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open for the whole run
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
        self._file.write(json.dumps({"kind": kind, "images": images, **values}) + "\n")
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
        self._bar.close()
        self._file.close()
        if self._kind is LoggerKind.wandb:
            self._backend.finish()
        elif self._kind is LoggerKind.tensorboard:
            self._backend.close()


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
            self._console.print(f"{self._name}  {self._done:,} of {self._total:,} images  {text}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

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
