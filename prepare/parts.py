"""How every step of the preparation works: part by part, each whole or not there, and no row without an account.

A step makes a folder. Of each part of its input, which has a name such as 00017, it leaves there

    NAME<suffix>            what it made, in one file or several
    NAME.dropped.parquet    key, reason and detail of every row that ended here, if any did
    NAME.noted.parquet      the same of rows that go on, but not as they should
    NAME.json               how many rows were given, kept and dropped; bytes and SHA-256 of the files

The last is written last, when the others are safely on the disk: where it is, the part is whole. `step.json` says what
the step was asked to do, and in the end the sum over all parts. A step that was killed goes on with the parts it
lacks; since a part depends on its input and the recipe alone, it ends in the same bytes.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from data.files import sha256, sync

ENOUGH = 200  # rows after which a share of faults says something


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of rows: given = kept + dropped; `failed` are those of all that nobody asked for."""

    given: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    noted: Counter[str] = field(default_factory=Counter)  # kept, but with something amiss: by reason
    failed: Counter[str] = field(default_factory=Counter)  # dropped or noted through a fault: by reason

    def __post_init__(self):
        self.dropped, self.noted, self.failed = Counter(self.dropped), Counter(self.noted), Counter(self.failed)

    @property
    def faults(self) -> int:
        """How many rows did not come out as they should have."""
        return self.failed.total()

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        about = {name: getattr(self, name) for name in self.__slots__}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in about.items()}

    def __iadd__(self, other: "Tally") -> "Tally":
        self.given += other.given
        self.kept += other.kept
        self.dropped += other.dropped
        self.noted += other.noted
        self.failed += other.failed
        return self


class Part:
    """One part being made. `path` names its files; `keep`, `note` and `drop` account for its rows."""

    def __init__(self, folder: Path, name: str, tick: Callable[[int], None] | None = None):
        self.folder, self.name, self.tally = folder, name, Tally()
        self._tick = tick
        self._suffixes: list[str] = []
        self._dropped: list[tuple[str, str, str]] = []
        self._noted: list[tuple[str, str, str]] = []

    def path(self, suffix: str) -> Path:
        """Where to write NAME + suffix, such as `.tar`: under a name that `commit` changes into the real one."""
        if suffix not in self._suffixes:
            self._suffixes.append(suffix)
        return self.folder / f"{self.name}{suffix}.tmp"

    def keep(self, count: int = 1) -> None:
        """So many rows go on to the next step."""
        self.tally.kept += count
        self._given(count)

    def note(self, key: str, reason: str, detail: str = "") -> None:
        """One row goes on, though something that was wanted of it could not be had: a fault."""
        self.tally.noted[reason] += 1
        self.tally.failed[reason] += 1
        self._noted.append((key, reason, detail))
        self.keep()

    def drop(self, key: str, reason: str, detail: str = "", *, fault: bool = False) -> None:
        """One row ends here. Reasons are few and fixed; `detail` is free. A fault is what nobody wished for."""
        self.tally.dropped[reason] += 1
        if fault:
            self.tally.failed[reason] += 1
        self._dropped.append((key, reason, detail))
        self._given(1)

    def drop_all(self, keys: Sequence[str], reasons: Sequence[str]) -> None:
        """`drop` for many rows at once, none of them a fault and without details."""
        self.tally.dropped.update(reasons)
        self._dropped.extend(zip(keys, reasons, repeat(""), strict=False))
        self._given(len(keys))

    def commit(self) -> Tally:
        """Give all files their names, and the part its account."""
        for suffix, rows in ((".dropped.parquet", self._dropped), (".noted.parquet", self._noted)):
            if rows:
                write_table(self.path(suffix), ["key", "reason", "detail"], sorted(rows))
        files = {}
        for suffix in self._suffixes:
            path = self.path(suffix)
            files[suffix] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            sync(path)
            os.replace(path, self.folder / f"{self.name}{suffix}")
        write_json(self.folder / f"{self.name}.json", self.tally.plain() | {"files": files})
        return self.tally

    def _given(self, count: int) -> None:
        self.tally.given += count
        if self._tick:
            self._tick(count)


def run_step(
    folder: Path,
    names: Sequence[str],
    work: Callable[[Part], None],
    *,
    recipe: dict[str, Any],
    title: str | None = None,
    max_faults: float = 1.0,
    processes: int = 1,
    tick: Callable[[int], None] | None = None,
) -> Tally:
    """Make every part of `names` that `folder` lacks, with `work(part)`, and return the sum over all.

    `recipe` is all that the result depends on, in JSON: a folder made by another one is refused. `title` is the
    step's name in what is said to the user, where it is not the folder's. With `processes`
    above 1, `work` must be picklable. Under torchrun each rank makes its share. `tick` is told how many rows were
    done, those found done included. Raises ValueError when more than `max_faults` of the rows are faults; the parts
    that were made stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    title = title or folder.name
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    recipe = json.loads(json.dumps(recipe))
    if not names:
        raise ValueError(f"{title} has nothing to work on: its input is empty; check source.paths")
    if _is_finished(folder, recipe, title):
        total = Tally(**finished(folder)["tally"])
        if tick:
            tick(total.given)
        return total
    with _alone(folder, rank):
        if rank == 0:
            for stale in folder.glob("*.tmp") if world == 1 else ():
                stale.unlink()
            write_json(folder / "step.json", {"recipe": recipe})
        total, missing = Tally(), []
        for name in names[rank::world]:
            if (done := account(folder, name)) is None:
                missing.append(name)
            else:
                total += done
                if tick:
                    tick(done.given)
        for tally in _made(folder, missing, work, processes, tick):
            total += tally
            _check_faults(folder, title, total, max_faults, ENOUGH)
        if rank == 0:
            _conclude(folder, names, recipe, title, max_faults)
        while not _is_finished(folder, recipe, title):  # for the first rank; when one fails, torchrun ends all
            time.sleep(0.2)
    return Tally(**finished(folder)["tally"])


def _conclude(folder: Path, names: Sequence[str], recipe: dict[str, Any], title: str, max_faults: float) -> None:
    """Sum up all parts, which other ranks may still be making, and write that down."""
    total, digest = Tally(), hashlib.sha256()
    for name in names:
        while (done := account(folder, name)) is None:
            time.sleep(0.2)
        total += done
        digest.update((folder / f"{name}.json").read_bytes())
    _check_faults(folder, title, total, max_faults, 1)
    about = {"recipe": recipe, "tally": total.plain(), "parts": list(names), "digest": digest.hexdigest()}
    write_json(folder / "step.json", about)


@contextmanager
def _alone(folder: Path, rank: int) -> Iterator[None]:
    """Hold the folder against another process that makes the same step; the lock ends with the process."""
    if rank:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is being made by another process; wait for it to end, or choose another out="
            ) from error
        yield
    finally:
        os.close(handle)


def finished(folder: Path) -> dict[str, Any]:
    """`step.json` of a step that is done: recipe, tally, parts, digest; ValueError if it is not."""
    path = folder / "step.json"
    about = json.loads(path.read_bytes()) if path.exists() else {}
    if "digest" not in about:
        state = "was not finished" if about else "was not run"
        raise ValueError(f"the step {folder.name} {state}: {path} is not complete; run it first")
    return about


def account(folder: Path, name: str) -> Tally | None:
    """What became of a part's rows, or None if the part is not whole."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    about = json.loads(path.read_bytes())
    for suffix, known in about.pop("files").items():
        file = folder / f"{name}{suffix}"
        if not file.exists() or file.stat().st_size != known["bytes"]:
            return None
    return Tally(**about)


def dropped(folder: Path, name: str) -> dict[str, str]:
    """Key and reason of the rows of a part that a finished step dropped."""
    import pyarrow.parquet as pq

    path = folder / f"{name}.dropped.parquet"
    if not path.exists():
        return {}
    table = pq.read_table(path, columns=["key", "reason"])
    return dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))


def write_table(path: Path, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    """A parquet file of strings; the bytes depend on the rows alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [pa.array([row[i] for row in rows], pa.string()) for i in range(len(columns))]
    pq.write_table(pa.table(arrays, names=list(columns)), path, compression="zstd")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole, safe against a power cut."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def _made(
    folder: Path, names: list[str], work: Callable[[Part], None], processes: int, tick: Callable[[int], None] | None
) -> Iterator[Tally]:
    if processes <= 1 or len(names) <= 1:
        for name in names:
            yield _make(folder, work, name, tick)
        return
    spawn = multiprocessing.get_context("spawn")  # after a fork, threads of torch and of pyarrow may be stuck
    with ProcessPoolExecutor(min(processes, len(names)), mp_context=spawn) as pool:
        jobs = [pool.submit(partial(_make, folder, work), name) for name in names]
        try:
            for job in as_completed(jobs):
                tally = job.result()
                if tick:
                    tick(tally.given)
                yield tally
        finally:
            for job in jobs:
                job.cancel()


def _make(folder: Path, work: Callable[[Part], None], name: str, tick: Callable[[int], None] | None = None) -> Tally:
    part = Part(folder, name, tick)
    try:
        work(part)
        return part.commit()
    except BaseException:
        for unfinished in folder.glob(f"{name}[._]*.tmp"):
            unfinished.unlink()
        raise


def _is_finished(folder: Path, recipe: dict[str, Any], title: str) -> bool:
    """Whether the folder holds all of just this; ValueError if it holds something else."""
    path = folder / "step.json"
    if not path.exists():
        return False
    about = json.loads(path.read_bytes())
    for key in sorted(recipe.keys() | about["recipe"].keys()):
        held, asked = about["recipe"].get(key), recipe.get(key)
        if held != asked:
            raise ValueError(
                f"{folder} was made with {title}.{key}={str(held)[:80]}, not {str(asked)[:80]};"
                f" choose another out=, or delete {folder} and what was made of it"
            )
    return "digest" in about


def _check_faults(folder: Path, title: str, tally: Tally, most: float, enough: int) -> None:
    if tally.given >= enough and tally.faults > most * tally.given:
        worst = ", ".join(f"{reason} {count:,}" for reason, count in tally.failed.most_common(3))
        raise ValueError(
            f"{title}: {tally.faults:,} of {tally.given:,} rows failed ({worst}), more than"
            f" {title}.max_faults={most}; see {folder}/*.dropped.parquet, mend the cause or raise the share"
        )
