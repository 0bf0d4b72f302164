"""Records of finished shards by number, read straight out of the tars at the offsets their index knows.

Each array is read by one positioned read into the batch that will hold it, and compared with its checksum: nothing
is mapped, so memory stays flat, and a file that shrinks under a run is a damaged record and not the end of the process.
What is damaged is named and left to the caller to count; it is never replaced by another record.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from data.files import sha256
from data.shards import SCHEMA, checksum
from data.texts import ORDER, TextLayout, caption_hash

AGAIN = "copy it again from its source, or prepare the data set again with --overwrite"


class DamagedError(ValueError):
    """A record whose bytes are not those that were written."""


@dataclass(slots=True, kw_only=True)
class Bucket:
    """All records of one size: pixels, and the shape (c, h, w) of their latents."""

    height: int
    width: int
    shape: tuple[int, ...]
    count: int


@dataclass(slots=True)
class Texts:
    """Text states of some captions, as stored, with zeros where they are shorter than the longest."""

    states: np.ndarray  # (b, n, d) float16 or int8
    scale: np.ndarray | None  # (b, n, d/g) float16
    mask: np.ndarray | None  # (b, n) bool
    pooled: np.ndarray | None  # (b, p) float16
    damaged: list[str | None]  # what is wrong with each


class ShardReader:
    """Records of a finished set by number: `len`, `record(row)`, `read(name, rows, outs)` and `texts(captions)`.

    Files are opened when first needed, in whatever process needs them, so a reader may be forked or pickled.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False):
        """Open a set and check that every file is there and has its size and, with `verify`, its SHA-256.

        Raises ValueError that names the folder or file which is missing, damaged or too new.
        """
        self.folder = Path(folder)
        self.index = self._read_index()
        self._check(verify)
        self.fields: list[str] = self.index["fields"]
        self.text = TextLayout(**self.index["text"]) if self.index["text"] else None
        self.buckets = [Bucket(**bucket | {"shape": tuple(bucket["shape"])}) for bucket in self.index["buckets"]]
        self._records = np.asarray(np.load(self.folder / "records.npy", mmap_mode="r", allow_pickle=False))
        if self.text:
            self._texts = np.asarray(np.load(self.folder / "texts.npy", mmap_mode="r", allow_pickle=False))
            self._keys = self._texts["caption"].copy()  # in one piece, or each search would copy it
        # each holds a file descriptor, which is closed when its file is dropped
        self._file = lru_cache(maxsize=256)(partial(_open, self.folder))

    def __reduce__(self):
        return ShardReader, (self.folder,)

    def __len__(self) -> int:
        return self.index["count"]

    @property
    def num_classes(self) -> int | None:
        """Classes of the set, if every record has one."""
        return self.index["extra"].get("num_classes")

    def rows_of(self, bucket: int) -> np.ndarray:
        """The numbers (n,) of the records of a bucket, in order."""
        if len(self.buckets) == 1:
            return np.arange(len(self))
        return np.flatnonzero(self._records["bucket"] == bucket)

    def record(self, row: int) -> dict[str, Any]:
        """A record's JSON; raises DamagedError."""
        (found,), (wrong,) = self.records(np.array([row]))
        if wrong:
            raise DamagedError(wrong)
        return found

    def records(self, rows: np.ndarray) -> tuple[list[dict[str, Any]], list[str | None]]:
        """The JSON of records (b,), and what is wrong with each, if anything; that of a damaged one is empty."""
        found: list[dict[str, Any]] = [{} for _ in rows]
        wrong: list[str | None] = [None] * len(rows)
        at = self._records[rows][["shard", "json", "json_bytes", "json_check"]].tolist()
        for i, (shard, start, size, check) in enumerate(at):
            content = bytearray(size)
            if self._fill([content], shard, ".tar", start) and checksum(content) == check:
                found[i] = json.loads(content.decode())
            else:
                wrong[i] = f"{self.place(rows[i])}: its JSON differs from its checksum"
        return found, wrong

    def read(self, name: str, rows: np.ndarray, outs: Sequence[np.ndarray]) -> list[str | None]:
        """Read an array of each of the records (b,) into its float16 `outs`; what is wrong with each, if anything.

        The array of a damaged record is zeros.
        """
        at = self._records[rows]
        shards, starts, checks = at["shard"].tolist(), at[name].tolist(), at[f"{name}_check"].tolist()
        wrong: list[str | None] = [None] * len(rows)
        for i, out in enumerate(outs):
            if not self._fill([out], shards[i], ".tar", starts[i]) or checksum(out) != checks[i]:
                wrong[i] = f"{self.place(rows[i])}: its {name} differs from its checksum"
                out[:] = 0
        return wrong

    def texts(self, captions: list[str]) -> Texts:
        """Text states of captions (b,); ValueError for one that the set does not hold."""
        assert self.text
        layout = self.text
        keys = np.array([caption_hash(caption) for caption in captions], np.uint64)
        rows = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        at = self._texts[rows]
        if (absent := np.flatnonzero(at["caption"] != keys)).size:
            raise ValueError(
                f"{self.folder} holds no text states of the caption {captions[absent[0]]!r};"
                " prepare the data set again, or set data.text_states=false"
            )
        b, longest = len(captions), int(at["end"].max(initial=1))
        groups = layout.width // layout.group
        states = np.empty((b, longest, layout.width), layout.dtype)
        scale = np.empty((b, longest, groups), np.float16) if layout.dtype == "int8" else None
        pooled = np.empty((b, layout.pooled), np.float16) if layout.pooled else None
        mask = np.empty((b, layout.length), np.bool_) if layout.masked else None
        wrong: list[str | None] = [None] * b
        for i, (shard, start, check, tokens) in enumerate(at[["shard", "start", "check", "tokens"]].tolist()):
            rows = {"scale": None if scale is None else scale[i], "states": states[i]}
            whole = {"pooled": None if pooled is None else pooled[i], "mask": None if mask is None else mask[i]}
            parts = {name: row[:tokens] for name, row in rows.items() if row is not None}
            parts |= {name: row for name, row in whole.items() if row is not None}
            ordered = [parts[name] for name in ORDER if name in parts]
            if not self._fill(ordered, shard, ".text.tar", start) or checksum(*ordered) != check:
                wrong[i] = f"{self.folder}/{shard:05d}.text.tar: the states of {captions[i]!r} are damaged"
                tokens = 0
                for row in ordered:
                    row[...] = 0
            here = None if mask is None else mask[i, :longest]
            for row in (rows["states"], rows["scale"]):
                if row is None:
                    continue
                if here is not None and not here[:tokens].all():  # several encoders, padding behind each one's tokens
                    row[here] = row[:tokens].copy()
                    row[~here] = 0
                else:
                    row[tokens:] = 0
        return Texts(states, scale, None if mask is None else mask[:, :longest], pooled, wrong)

    def advise(self, rows: np.ndarray) -> None:
        """Let the kernel fetch what will be read of some records soon, all at once."""
        if not hasattr(os, "posix_fadvise"):
            return
        at = self._records[rows]
        sizes = [2 * int(np.prod(bucket.shape)) for bucket in self.buckets]
        for shard, bucket, start in zip(at["shard"].tolist(), at["bucket"], at["latent"].tolist(), strict=True):
            file = self._file(shard, ".tar")
            if file:
                os.posix_fadvise(file.fileno(), start, sizes[bucket], os.POSIX_FADV_WILLNEED)

    def place(self, row: int) -> str:
        """Where a record lies, in words."""
        at = self._records[row]
        first = np.searchsorted(self._records["shard"], at["shard"])
        return f"{self.folder}/{at['shard']:05d}.tar, record {row - first}"

    def _fill(self, outs: Sequence[Any], shard: int, suffix: str, start: int) -> bool:
        """Read as many bytes as `outs` take together; False if they could not all be had."""
        try:
            file = self._file(shard, suffix)
            return bool(file) and os.preadv(file.fileno(), outs, start) == sum(memoryview(out).nbytes for out in outs)
        except OSError:
            return False

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        if not path.exists():
            state = "was not finished: it has no index.json" if self.folder.exists() else "does not exist"
            raise ValueError(
                f"data.path={self.folder} {state}; prepare it with `python scripts/prepare.py shapes`,"
                " or as docs/data.md says"
            )
        try:
            index = json.loads(path.read_bytes())
            schema = int(index["schema"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); copy or prepare the data set again") from error
        if schema > SCHEMA:
            raise ValueError(f"{path} has schema {schema}, but this version reads up to {SCHEMA}; update Triptych")
        if schema < SCHEMA:
            raise ValueError(f"{path} has schema {schema}, from an older version; prepare the data set again")
        return index

    def _check(self, verify: bool) -> None:
        tables = self.index["tables"]
        files = tables | {f"{s['name']}{suffix}": f for s in self.index["shards"] for suffix, f in s["files"].items()}
        for name, known in files.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing; {AGAIN}")
            if path.stat().st_size != known["bytes"]:
                raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {known['bytes']}; {AGAIN}")
        to_hash = files if verify else tables  # a wrong table would be read as nonsense
        with ThreadPoolExecutor() as pool:
            for name, digest in zip(to_hash, pool.map(sha256, (self.folder / name for name in to_hash)), strict=True):
                if digest != files[name]["sha256"]:
                    raise ValueError(f"{self.folder / name} is damaged: its SHA-256 is not that of index.json; {AGAIN}")


def _open(folder: Path, shard: int, suffix: str) -> FileIO | None:
    try:
        return FileIO(folder / f"{shard:05d}{suffix}")
    except OSError:
        return None
