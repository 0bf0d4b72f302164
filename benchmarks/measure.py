"""How long, how much memory, and side by side: ours and the usual way take turns in one run."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


@dataclass(slots=True, kw_only=True)
class Row:
    """One line of a table; `ratio` above 1 is in our favour, and None where there is nothing to compare with."""

    name: str
    ours: float
    usual: float | None = None
    unit: str = "ms"

    @property
    def ratio(self) -> float | None:
        return None if self.usual is None else self.usual / self.ours

    def each(self, count: int) -> "Row":
        """The same for one of so many things that were done at once."""
        return replace(self, ours=self.ours / count, usual=None if self.usual is None else self.usual / count)

    def __str__(self) -> str:
        ours, usual = (f"{x or 0:>12.{3 if (x or 0) < 10 else 1}f} {self.unit:3}" for x in (self.ours, self.usual))
        return f"{self.name:64}{ours}" + ("" if self.ratio is None else f"{usual}{self.ratio:>8.2f}x")


def compare(name: str, ours: Call, usual: Call, rounds: int = 7) -> Row:
    """Median milliseconds of each, measured in turns after one call to warm up."""
    took: dict[str, list[float]] = {"ours": [], "usual": []}
    ours()
    usual()
    for _ in range(rounds):
        for key, call in (("ours", ours), ("usual", usual)):
            took[key].append(seconds(call) * 1e3)
    return Row(name=name, ours=statistics.median(took["ours"]), usual=statistics.median(took["usual"]))


def seconds(call: Call) -> float:
    """How long a call takes, to the end of what it started on the device."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def memory(call: Call) -> tuple[float, float]:
    """MiB of tensors that a call held at most, and those left when it was done, over what there was before.

    On a CPU these are the allocator's own figures, as torch's profiler writes them down: they do not depend on the
    machine or on what else runs on it, as resident memory does; what a library takes for itself is not in them.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        peak, left = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = call()
        recorded: Any = profiler.profiler
        events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        peak = left = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            left += event.nbytes()
            peak = max(peak, left)
    del result  # it was to be alive while it was counted
    return peak / 2**20, left / 2**20
