"""A watch over ranks: where one stands still or is gone, all end soon, with its name, and with their stacks on disk.

A collective waits for every rank. If one never comes, the others hang until the group's own time-out, half an hour
later, which names no one. So each rank writes a beat (a count, its step, and the line where its main thread stands)
every few seconds into the store that the group was made with, from a thread that goes on while the main one waits in a
collective. Rank 0 reads all beats and the others read rank 0's, so that the cost does not grow with the square of the
world; nothing is added to a step.

    no new beat of a rank for `timeout` seconds              it was killed or stopped, or its machine is gone
    beats, but the slowest step stays for `timeout` seconds  it hangs; the lines say where
    a rank failed                                            the others would wait for it

Who finds one of these writes the verdict into the store, and all ranks end by it.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from training.restart import AGAIN, note_exit

GRACE = 5.0  # seconds in which a rank may still end by itself after another has failed
ROOT = Path(__file__).parents[1]
STORE_ERRORS = (dist.DistError, RuntimeError)


class Watch:
    """Beats for this rank, looks at the others, and ends this process where there is a verdict.

    `store` is a connection of its own: one that is shared would block while the main thread waits in it. `kept` says
    that the launcher keeps it, which outlives the ranks.
    """

    def __init__(self, rank: int, world: int, store: dist.Store, folder: Path | None, timeout: float, kept: bool):
        self.step = -1  # the last one that was finished; -1: there is no hurry yet
        self.alone = False  # within work that the others wait for, however long
        self._rank, self._world, self._store, self._folder, self._timeout = rank, world, store, folder, timeout
        self._interval = min(5.0, timeout / 5)
        self._kept, self._main, self._count, self._done = kept, threading.get_ident(), 0, threading.Event()
        self._beats: dict[int, Beat] = {}
        self._heard = self._moved = time.monotonic()
        self._slowest = -1
        self._beat()

    def start(self) -> None:
        """To be called when every rank has made its watch."""
        for loop in (self._talk, self._listen):
            threading.Thread(target=loop, name="watch", daemon=True).start()

    def stop(self) -> None:
        """No more beats, and no verdict any more."""
        self._done.set()

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank ends by an error."""
        with contextlib.suppress(*STORE_ERRORS):
            self._decide(f"rank {self._rank} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", 1)

    def blame(self) -> None:
        """After a collective broke: end this process with the name of who is gone; returns if all are there."""
        self._timeout = min(self._timeout, 3 * self._interval)  # with a connection lost, silence says enough
        self._done.wait(2 * self._timeout + GRACE)

    def _talk(self) -> None:
        while not self._done.wait(self._interval):
            with contextlib.suppress(*STORE_ERRORS):  # `_listen` hears that nothing came
                self._beat()
                self._look()

    def _listen(self) -> None:
        """Whether the store answers: a thread of its own, since one that asks a stopped process waits for ever."""
        last = time.monotonic()
        while not self._done.wait(self._interval):
            now = time.monotonic()
            if now - last > 2 * self._interval + 1:  # this process was itself asleep, and maybe all were
                self._heard = self._moved = now
                for beat in list(self._beats.values()):
                    beat.at = now
            last = now
            if now - self._heard > self._timeout:
                self._unanswered(now - self._heard)

    def _beat(self) -> None:
        self._count += 1
        place = where(sys._current_frames().get(self._main))
        self._store.set(f"beat/{self._rank}", json.dumps([self._count, self.step, self.alone, place]))

    def _look(self) -> None:
        ranks = range(self._world) if self._rank == 0 else [0]
        verdict, *texts = self._store.multi_get(["verdict", *(f"beat/{rank}" for rank in ranks)])
        self._heard = now = time.monotonic()
        if verdict != b"none":
            self._obey(*json.loads(verdict))
        for rank, text in zip(ranks, texts, strict=True):
            if rank not in self._beats or self._beats[rank].text != text:
                self._beats[rank] = Beat(text, now)
        if silent := [rank for rank, beat in self._beats.items() if now - beat.at > self._timeout]:
            self._decide(self._silence(silent), AGAIN)
        elif self._rank == 0 and (late := self._late(now)):
            self._decide(late, AGAIN)

    def _late(self, now: float) -> str:
        """The sentence on a step that does not end, or nothing."""
        beats = self._beats.values()
        slowest = min(beat.step for beat in beats)
        if slowest != self._slowest or slowest < 0 or any(beat.alone for beat in beats):
            self._slowest, self._moved = slowest, now
        if now - self._moved <= self._timeout:
            return ""
        behind = [rank for rank, beat in self._beats.items() if beat.step == slowest]
        verb = "has" if len(behind) == 1 else "have"
        return (
            f"{named(behind)} {verb} not finished step {slowest + 1} for {now - self._moved:.0f} s: {self._places()};"
            f" {self._advice()}, with a larger train.timeout if a step may take so long"
        )

    def _silence(self, silent: list[int]) -> str:
        beat = self._beats[silent[0]]
        since, verb = time.monotonic() - beat.at, "has" if len(silent) == 1 else "have"
        return (
            f"{named(silent)} {verb} given no sign of life for {since:.0f} s, last after step {max(beat.step, 0)} at"
            f" {beat.place}: killed, stopped, or the machine is gone; {self._advice()}"
        )

    def _unanswered(self, since: float) -> None:
        """The store is kept by the launcher, or by rank 0 where there is none."""
        keeper = "the launcher of the ranks" if self._kept else "rank 0"
        self._obey(
            f"{keeper} has given no sign of life for {since:.0f} s: killed, stopped, or the machine is gone;"
            f" {self._advice()}",
            AGAIN,
            self._rank,
        )

    def _advice(self) -> str:
        stacks = f"the stacks are in {self._folder / 'stacks'}; " if self._folder else ""
        return f"{stacks}start the same command again"

    def _places(self) -> str:
        """Which ranks stand where, the fewest first: who is alone somewhere is the likely cause."""
        at: dict[str, list[int]] = defaultdict(list)
        for rank, beat in self._beats.items():
            at[beat.place].append(rank)
        groups = sorted(at.items(), key=lambda item: len(item[1]))[:4]
        return ", ".join(f"{named(ranks)} at {place}" for place, ranks in groups)

    def _decide(self, sentence: str, code: int) -> None:
        """Only the first verdict counts."""
        self._store.compare_set("verdict", "none", json.dumps([sentence, code, self._rank]))

    def _obey(self, sentence: str, code: int, by: int) -> None:
        if code != AGAIN and self._done.wait(0 if by == self._rank else GRACE):
            return
        if self._done.is_set() or (by == self._rank and code != AGAIN):
            return  # all has ended well, or its own error is on its way out, with a traceback
        self._dump()
        if by == self._rank or (self._rank == 0 and code != AGAIN):
            print(f"\n{sentence}", file=sys.stderr)
            note_exit(self._folder, code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _dump(self) -> None:
        """Where every thread of this process stands."""
        if self._folder is None:
            return faulthandler.dump_traceback(sys.stderr)
        path = self._folder / "stacks" / f"rank{self._rank}.txt"
        with contextlib.suppress(OSError):  # a full disk must not keep this process from its end
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file)


class Beat:
    """What a rank last said, and when it was heard here."""

    def __init__(self, text: bytes, at: float):
        self.text, self.at = text, at
        _, self.step, self.alone, self.place = json.loads(text)


def where(frame: FrameType | None) -> str:
    """The innermost line of ours in a stack, as `training/run.py:181 (_run)`."""
    frames = list(_outwards(frame))
    ours = (f for f in frames if _own(f.f_code.co_filename))
    found = next(ours, frames[0] if frames else None)
    if found is None:
        return "an unknown line"
    path = Path(found.f_code.co_filename)
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return f"{name}:{found.f_lineno} ({found.f_code.co_name})"


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _own(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def named(ranks: Iterable[int]) -> str:
    """`rank 1`, `ranks 0 and 3`, `ranks 0, 1, 2, 3 and 60 more`."""
    first, rest = (listed := [str(rank) for rank in ranks])[:4], len(listed) - 4
    if len(listed) == 1:
        return f"rank {listed[0]}"
    head, tail = (first, f"{rest} more") if rest > 0 else (first[:-1], first[-1])
    return f"ranks {', '.join(head)} and {tail}"
