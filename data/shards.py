"""Shards: encoded pictures in plain WebDataset tars, with an index that says what must be there.

    00000.tar 00001.tar ...   members KEY.latent.npy (float16), KEY.json and, if stored, KEY.{text,mask,pooled}.npy
    offsets.npy               (n, 3 + fields) int64: shard, start and length of the JSON, start of each array
    index.json                schema, counts, bytes and SHA-256 of every file, fields, latent statistics, autoencoder

Any tar tool or WebDataset reader can use the tars alone. But a tar cut between two members reads without an
error, with records silently gone; only the index knows. It is therefore written last, when all else is safely on
the disk: where there is an `index.json`, the set is whole. The reader maps the tars into memory, slices arrays
straight out of them and unpickles nothing.
"""

import hashlib
import io
import json
import math
import mmap
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SCHEMA = 1


class ShardWriter:
    """Write records in order, then the index; used as a context manager, which finishes only if nothing failed.

    Files bear the suffix `.tmp` until the last record is on the disk, so an unfinished set is never taken for a
    whole one. The bytes depend on the records alone: the same records give the same hashes.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resolution: int,
        vae: dict[str, Any],
        extra: dict[str, Any] | None = None,
        shard_size: int = 10_000,
        overwrite: bool = False,
    ):
        """Open `folder` for at most `shard_size` records a tar; clears what an interrupted writer left there.

        Raises ValueError if shards are there already, unless `overwrite`, which deletes them first.
        """
        self.folder = Path(folder)
        self._about = {"resolution": resolution, "vae": vae, "extra": extra or {}}
        self._shard_size = shard_size
        self._shard: _Shard | None = None
        self._shards: list[dict[str, Any]] = []
        self._fields: dict[str, dict[str, Any]] = {}
        self._offsets: list[list[int]] = []
        self._sum: Any = 0.0  # of each latent's mean and mean square, by channel, in float64
        self._square: Any = 0.0
        self._clear(overwrite)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.close()
        finally:
            self._discard()

    def add(self, record: dict[str, Any], **arrays: np.ndarray) -> None:
        """Append one record: its JSON, `latent` (c, h, w), and optionally `text`, `mask` and `pooled`.

        Floats are stored as float16. Every record must have the same arrays with the same shapes.
        """
        stored = {name: _storable(name, arrays[name]) for name in sorted(arrays)}
        fields = {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in stored.items()}
        if "latent" not in fields or fields != (self._fields or fields):
            needed = self._fields or "a latent"
            raise ValueError(f"record {len(self._offsets)} has the arrays {fields}, but the set needs {needed}")
        self._fields = fields
        self._shard = shard = self._shard or _Shard(self.folder, len(self._shards))
        key = f"{len(self._offsets):09d}"
        text = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
        starts = [shard.add(f"{key}.{name}.npy", _npy(array)) for name, array in stored.items()]
        self._offsets.append([len(self._shards), shard.add(f"{key}.json", text), len(text), *starts])
        latent = stored["latent"].astype(np.float64)
        self._sum = self._sum + latent.mean((1, 2))
        self._square = self._square + (latent**2).mean((1, 2))
        shard.count += 1
        if shard.count == self._shard_size:
            self._finish_shard()

    def close(self) -> dict[str, Any]:
        """Finish the last shard, give all files their names, the index last, and return the index."""
        if not self._offsets:
            raise ValueError(f"no record was added, so {self.folder} would be an empty set")
        self._finish_shard()
        offsets, count = _npy(np.asarray(self._offsets, "<i8")), len(self._offsets)
        mean = self._sum / count
        index = {
            "schema": SCHEMA,
            "count": count,
            "bytes": sum(shard["bytes"] for shard in self._shards),
            **self._about,
            "fields": self._fields,
            "latent_mean": mean.tolist(),
            "latent_std": np.sqrt(np.maximum(self._square / count - mean**2, 0)).tolist(),
            "offsets": {"bytes": len(offsets), "sha256": hashlib.sha256(offsets).hexdigest()},
            "shards": self._shards,
        }
        _write(self.folder / "offsets.npy.tmp", offsets)
        _write(self.folder / "index.json.tmp", json.dumps(index, indent=1, ensure_ascii=False).encode())
        for name in (*(shard["name"] for shard in self._shards), "offsets.npy"):
            os.replace(self.folder / f"{name}.tmp", self.folder / name)
        _sync_folder(self.folder)
        os.replace(self.folder / "index.json.tmp", self.folder / "index.json")
        _sync_folder(self.folder)
        return index

    def _finish_shard(self) -> None:
        if self._shard:
            self._shards.append(self._shard.finish())
            self._shard = None

    def _clear(self, overwrite: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        index, shards = self.folder / "index.json", sorted(self.folder.glob("[0-9]*.tar"))
        if (index.exists() or shards) and not overwrite:
            raise ValueError(f"{self.folder} already holds shards; choose another folder or pass --overwrite")
        index.unlink(missing_ok=True)  # first: if we are killed here, what is left must not be taken for a set
        for old in (*shards, self.folder / "offsets.npy"):
            old.unlink(missing_ok=True)
        self._discard()
        _sync_folder(self.folder)

    def _discard(self) -> None:
        """Delete whatever has not got its final name."""
        if self._shard:
            self._shard.abandon()
            self._shard = None
        for pattern in ("[0-9]*.tar.tmp", "offsets.npy.tmp", "index.json.tmp"):
            for unfinished in self.folder.glob(pattern):
                unfinished.unlink()


class _Shard:
    """One tar being written as `NUMBER.tar.tmp`, hashed on its way to the disk."""

    def __init__(self, folder: Path, number: int):
        self.name = f"{number:05d}.tar"
        self.count = 0
        self._sha256 = hashlib.sha256()
        self._file = open(folder / f"{self.name}.tmp", "wb")  # noqa: SIM115
        target: Any = self  # a tar only needs to write and tell
        self._tar = tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def write(self, content: bytes) -> int:
        self._sha256.update(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell()

    def add(self, name: str, content: bytes) -> int:
        """Append one member; returns where its content starts."""
        member = tarfile.TarInfo(name)  # its defaults are mtime 0, uid 0, mode 0644
        member.size = len(content)
        start = self.tell() + tarfile.BLOCKSIZE  # in USTAR the header is always one block
        self._tar.addfile(member, io.BytesIO(content))
        return start

    def finish(self) -> dict[str, Any]:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self.tell()
        self._file.close()
        return {"name": self.name, "count": self.count, "bytes": size, "sha256": self._sha256.hexdigest()}

    def abandon(self) -> None:
        with suppress(OSError):  # on a full disk, closing fails again
            self._file.close()


class ShardReader:
    """Records of a finished set by number: `len`, `record(row)` and `array(name, rows)`.

    Tars are mapped when first needed, in whatever process needs them, so a reader may be forked or pickled.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False):
        """Open a set and check that every file is there and has its size and, with `verify`, its SHA-256.

        Raises ValueError that names the folder or file which is missing, damaged or too new.
        """
        self.folder = Path(folder)
        self.index = self._read_index()
        self._check(verify)
        self._offsets = np.load(self.folder / "offsets.npy", allow_pickle=False)
        self._columns = {name: 3 + i for i, name in enumerate(self.fields)}
        self._map = lru_cache(maxsize=256)(partial(_map, self.folder))  # each map holds a file descriptor
        self._layout = {name: self._read_layout(name) for name in self.fields}

    def __reduce__(self):
        return ShardReader, (self.folder,)

    def __len__(self) -> int:
        return self.index["count"]

    @property
    def fields(self) -> dict[str, dict[str, Any]]:
        """Stored arrays by name, each with its dtype and the shape of one record."""
        return self.index["fields"]

    @property
    def num_classes(self) -> int | None:
        """Number of class labels, or None if not every record has one."""
        return self.index["extra"].get("num_classes")

    def record(self, row: int) -> dict[str, Any]:
        """The JSON of one record: `captions`, and `class_id` where it has one."""
        shard, start, length = self._offsets[row, :3].tolist()
        return json.loads(self._map(shard)[start : start + length])

    def array(
        self, name: str, rows: np.ndarray, dtype: npt.DTypeLike | None = None, picks: np.ndarray | None = None
    ) -> np.ndarray:
        """Arrays of the records `rows` (b,), copied as `dtype` or else as stored: (b, *shape).

        With `picks` (b,) only that entry of each record's first axis is read: (b, *shape[1:]).
        """
        header, stored = self._layout[name]
        shape = self.fields[name]["shape"]
        starts = self._offsets[rows, self._columns[name]] + header
        if picks is not None:
            shape = shape[1:]
            starts = starts + picks * math.prod(shape) * stored.itemsize
        count = math.prod(shape)
        found = np.empty((len(rows), *shape), dtype or stored)
        for out, shard, start in zip(found, self._offsets[rows, 0].tolist(), starts.tolist(), strict=True):
            out[...] = np.frombuffer(self._map(shard), stored, count, start).reshape(shape)
        return found

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        if not path.exists():
            state = "was not finished: it has no index.json" if self.folder.exists() else "does not exist"
            raise ValueError(f"data.path={self.folder} {state}; prepare it with `python scripts/prepare.py shapes`")
        try:
            index = json.loads(path.read_bytes())
            schema = int(index["schema"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); copy or prepare the data set again") from error
        if schema > SCHEMA:
            raise ValueError(f"{path} has schema {schema}, but this version reads up to {SCHEMA}; update Triptych")
        return index

    def _check(self, verify: bool) -> None:
        files = {"offsets.npy": self.index["offsets"]} | {shard["name"]: shard for shard in self.index["shards"]}
        again = "copy it again from its source, or prepare the data set again with --overwrite"
        for name, known in files.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing; {again}")
            if path.stat().st_size != known["bytes"]:
                raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {known['bytes']}; {again}")
        to_hash = files if verify else ["offsets.npy"]  # which is small, and a wrong one would be read as nonsense
        with ThreadPoolExecutor() as pool:
            for name, digest in zip(to_hash, pool.map(_sha256, (self.folder / name for name in to_hash)), strict=True):
                if digest != files[name]["sha256"]:
                    raise ValueError(f"{self.folder / name} is damaged: its SHA-256 is not that of index.json; {again}")

    def _read_layout(self, name: str) -> tuple[int, np.dtype]:
        """Length of the .npy header and dtype of a field, read once: records share shape and dtype."""
        shard, start = self._offsets[0, [0, self._columns[name]]].tolist()
        content = io.BytesIO(self._map(shard)[start : start + 1024])
        np.lib.format.read_magic(content)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
        known = self.fields[name]
        if fortran or list(shape) != known["shape"] or dtype.name != known["dtype"]:
            raise ValueError(f"{self.folder}: field {name} is {dtype.name} {shape}, but index.json says {known}")
        return content.tell(), dtype


def _map(folder: Path, shard: int) -> mmap.mmap:
    with open(folder / f"{shard:05d}.tar", "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _storable(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.bool_:
        return array
    with np.errstate(over="ignore"):  # said below
        stored = np.asarray(array, "<f2")
    if not np.isfinite(stored).all():
        raise ValueError(f"field {name} has values that are not finite in float16; check what encoded it")
    return stored


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
