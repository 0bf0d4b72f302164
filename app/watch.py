"""A drawing that is watched while it computes, and that stops when nobody watches any more.

It computes in a thread of its own, so that whoever follows it sees the estimate of x0 as it forms, and can leave at any
moment: the running step is then the last.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

PAUSE = 0.25  # s between two glances, and at most from leaving to its being heard
T = TypeVar("T")


class AbandonedError(Exception):
    """Nobody waits for this drawing any more."""


@dataclass(slots=True, kw_only=True)
class Glance:
    """A drawing in progress: steps done of all, seconds so far, estimates of its pictures (b, h, w, 3) uint8."""

    done: int
    total: int
    seconds: float
    previews: np.ndarray

    @property
    def left(self) -> float:
        """Seconds to go at the pace so far."""
        return self.seconds / self.done * (self.total - self.done)


@dataclass(slots=True)
class Watch:
    """Between the thread that draws and whoever follows: news one way, the wish to stop the other way."""

    total: int = 0  # steps of all that is to be drawn
    done: int = 0
    begun: float = field(default_factory=time.monotonic)
    shown: float = 0.0
    left: threading.Event = field(default_factory=threading.Event)
    news: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def over(self, preview: Callable[[Tensor], np.ndarray]) -> Callable[[int, Tensor, Tensor], None]:
        """The `progress` of one `generate`, which counts on from the one before."""

        def progress(step: int, z: Tensor, x0: Tensor) -> None:
            if self.left.is_set():
                raise AbandonedError
            self.done, now = self.done + 1, time.monotonic()
            if now - self.shown >= PAUSE:
                self.shown = now
                total = max(self.total, self.done)  # an adaptive sampler takes the steps that it needs
                self.news.put(Glance(done=self.done, total=total, seconds=now - self.begun, previews=preview(x0)))

        return progress


def follow(draw: Callable[[Watch], T], turn: threading.Lock) -> Iterator[Glance | T | None]:
    """Glances while `draw` computes, None where nothing is new, at last what it returns. Close it to stop.

    It computes when its turn comes. What it raises is raised here.
    """
    watch = Watch()

    def compute() -> None:
        try:
            with turn:
                watch.begun = time.monotonic()
                watch.news.put((draw(watch),))
        except Exception as error:
            watch.news.put(error)

    threading.Thread(target=compute, daemon=True).start()
    try:
        news: Any = None
        while not isinstance(news, tuple):
            try:
                news = watch.news.get(timeout=PAUSE)
            except queue.Empty:
                news = None
            if isinstance(news, Exception):
                raise news
            yield news[0] if isinstance(news, tuple) else news
    finally:
        watch.left.set()
