"""Shards: encoded pictures in plain WebDataset tars, with an index that says what must be there.

    NAME.tar        members KEY.latent.npy (float16), where stored KEY.flip.npy and KEY.std.npy, and KEY.json
    NAME.text.tar   members HASH.safetensors of each caption, where stored, once a shard: see data/texts.py
    records.npy     a row a record: shard, bucket, where its JSON and its arrays start, and a checksum of each
    texts.npy       a row a caption, sorted by the hash of its words: shard, where its arrays start, checksum
    index.json      schema, counts, bytes and SHA-256 of every file, buckets, latent statistics, autoencoder

Any tar tool or WebDataset reader can use the tars alone. But a tar cut between two members reads without an
error, with records silently gone; only the index knows. It is therefore written last, when all else is safely on
the disk: where there is an `index.json`, the set is whole. Nothing in it is a pickle. `data/reader.py` reads it.

A shard may hold pictures of several sizes: a bucket is all records of one size, whichever shards they lie in.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

from data.files import sync
from data.texts import TEXTS, TextLayout, caption_hash

SCHEMA = 2
FIELDS = ("latent", "flip", "std")  # arrays a record may have, all of one shape; the first is always there
RECORDS = np.dtype(
    [("shard", "<i4"), ("bucket", "<i4"), ("json", "<i8"), ("json_bytes", "<i4"), ("json_check", "<u4")]
    + [column for name in FIELDS for column in ((name, "<i8"), (f"{name}_check", "<u4"))]
)


def checksum(*contents: Any) -> int:
    """32 bits of the XXH3 hash of some bytes, in one piece or several: what is read again is compared with it."""
    if len(contents) == 1:
        return xxh3_64_intdigest(contents[0]) & 0xFFFFFFFF
    digest = xxh3_64()
    for content in contents:
        digest.update(content)
    return digest.intdigest() & 0xFFFFFFFF


@dataclass(slots=True, kw_only=True)
class Table:
    """What a shard holds, and where: its rows of `records.npy` and `texts.npy`, and its part of `index.json`."""

    name: str
    records: np.ndarray  # (n,) RECORDS; `bucket` counts in `buckets` below
    texts: np.ndarray  # (m,) TEXTS
    buckets: list[dict[str, Any]]  # height, width in pixels, shape of the latents, count
    fields: list[str]
    captions: dict[str, int]  # how many records have one of each name
    files: dict[str, dict[str, Any]]  # bytes and SHA-256 by suffix
    text: dict[str, Any] | None  # a TextLayout
    sums: list[list[float]]  # over records, of each channel's mean and mean square in the latent

    def save(self, path: Path) -> None:
        """As .npz, without a pickle: the arrays, and all else as JSON."""
        about = {k: getattr(self, k) for k in ("name", "buckets", "fields", "captions", "files", "text", "sums")}
        with open(path, "wb") as file:
            content = np.frombuffer(json.dumps(about).encode(), np.uint8)
            np.savez(file, records=self.records, texts=self.texts, about=content)


def load_table(path: Path) -> Table:
    """What `Table.save` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return Table(records=arrays["records"], texts=arrays["texts"], **json.loads(arrays["about"].tobytes()))


class Shard:
    """One tar of records being written, and the tar of their text states; both hashed on their way to the disk."""

    def __init__(self, path: Path, text_path: Path | None = None, *, number: int, text: TextLayout | None = None):
        self._number, self._layout = number, text
        self._tar, self._text_tar = _Tar(path), _Tar(text_path) if text_path else None
        self._rows: list[tuple[int, ...]] = []
        self._texts: list[tuple[int, ...]] = []
        self._known: set[int] = set()
        self._buckets: dict[tuple[int, int], dict[str, Any]] = {}
        self._fields: list[str] = []
        self._captions: Counter[str] = Counter()
        self._sums: Any = 0.0

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.abandon()
        if self._text_tar:
            self._text_tar.abandon()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, record: dict[str, Any], *, size: tuple[int, int], **arrays: np.ndarray) -> None:
        """Append one record: its JSON, the picture's (height, width) in pixels, `latent` (c, h, w) and further FIELDS.

        `record["captions"]` are its captions by name. Floats are stored as float16. Every record must have the same
        arrays, those of one size the same shape.
        """
        fields = [name for name in FIELDS if name in arrays]
        shapes = {arrays[name].shape for name in fields}
        bucket = self._buckets.setdefault(
            size,
            {"number": len(self._buckets), "height": size[0], "width": size[1], "shape": list(next(iter(shapes), ()))},
        )
        wanted = [tuple(bucket["shape"])]
        if set(arrays) != set(fields) or "latent" not in arrays or fields != (self._fields or fields):
            raise ValueError(
                f"record {len(self)} has the arrays {sorted(arrays)}, but the set needs {self._fields or 'a latent'}"
            )
        if list(shapes) != wanted:
            raise ValueError(
                f"record {len(self)} of {size} has arrays of {sorted(shapes)}, but those before had {wanted}"
            )
        self._fields = fields
        key = f"{self._number:05d}{len(self):05d}"
        places = {}
        for name in fields:
            array = storable(name, arrays[name])
            places[name] = (self._tar.add(f"{key}.{name}.npy", array), checksum(array))
            if name == "latent":
                exact = array.astype(np.float64)
                self._sums = self._sums + np.stack([exact.mean((1, 2)), (exact**2).mean((1, 2))])
        text = json.dumps(record, ensure_ascii=False).encode()
        start = self._tar.add(f"{key}.json", text)
        row = (self._number, bucket["number"], start, len(text), checksum(text))
        self._rows.append(row + tuple(n for name in FIELDS for n in places.get(name, (-1, 0))))
        bucket["count"] = bucket.get("count", 0) + 1
        self._captions.update(record["captions"].keys())

    def add_text(
        self, caption: str, states: np.ndarray, pooled: np.ndarray | None = None, mask: np.ndarray | None = None
    ) -> None:
        """Append the text states (n, d) of a caption, with its pooled vector (p,); one stored before is left out.

        Where the layout is masked, only the tokens that `mask` (n,) marks are stored; without one, all n are read.
        """
        assert self._layout and self._text_tar, "a shard without a text layout holds no text states"
        key = caption_hash(caption)
        if key in self._known:
            return
        self._known.add(key)
        content, begin, tokens, end = self._layout.pack(states, pooled, mask)
        start = self._text_tar.add(f"{key:016x}.safetensors", content) + begin
        self._texts.append((key, self._number, start, checksum(content[begin:]), tokens, end))

    def finish(self, path: Path | None = None) -> Table:
        """End the tars, put them on the disk, and return what they hold, saved at `path` if given."""
        files = {".tar": self._tar.finish()}
        if self._text_tar:
            files[".text.tar"] = self._text_tar.finish()
        buckets = [{k: bucket[k] for k in ("height", "width", "shape", "count")} for bucket in self._buckets.values()]
        table = Table(
            name=f"{self._number:05d}",
            records=np.array(self._rows, RECORDS),
            texts=np.array(self._texts, TEXTS),
            buckets=buckets,
            fields=self._fields,
            captions=dict(self._captions),
            files=files,
            text=asdict(self._layout) if self._layout else None,
            sums=np.asarray(self._sums).tolist() if self._rows else [],
        )
        if path:
            table.save(path)
        return table


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
        text: TextLayout | None = None,
        extra: dict[str, Any] | None = None,
        shard_size: int = 10_000,
        overwrite: bool = False,
    ):
        """Open `folder` for at most `shard_size` records a tar; clears what an interrupted writer left there.

        Raises ValueError if shards are there already, unless `overwrite`, which deletes them first.
        """
        self.folder = Path(folder)
        self._about = {"resolution": resolution, "vae": vae, "extra": extra or {}}
        self._text, self._shard_size = text, shard_size
        self._shard: Shard | None = None
        self._tables: list[Table] = []
        self._clear(overwrite)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.close()
        finally:
            self._discard()

    def add(self, record: dict[str, Any], *, size: tuple[int, int] | None = None, **arrays: np.ndarray) -> None:
        """Append one record, as `Shard.add`; its size is by default the square of the set's resolution."""
        if self._shard and len(self._shard) == self._shard_size:
            self._finish_shard()
        if self._tables and arrays.keys() != set(self._tables[0].fields):
            raise ValueError(f"a record has the arrays {sorted(arrays)}, but the set needs {self._tables[0].fields}")
        self._open_shard().add(record, size=size or (self._about["resolution"],) * 2, **arrays)

    def add_text(
        self, caption: str, states: np.ndarray, pooled: np.ndarray | None = None, mask: np.ndarray | None = None
    ) -> None:
        """Append the text states of a caption of the record added last, as `Shard.add_text`."""
        self._open_shard().add_text(caption, states, pooled, mask)

    def close(self) -> dict[str, Any]:
        """Finish the last shard, give all files their names, the index last, and return the index."""
        self._finish_shard()
        if not self._tables:
            raise ValueError(f"no record was added, so {self.folder} would be an empty set")
        return write_index(self.folder, self._tables, **self._about)

    def _open_shard(self) -> Shard:
        if not self._shard:
            number = len(self._tables)
            tar, texts = (self.folder / f"{number:05d}{suffix}.tmp" for suffix in (".tar", ".text.tar"))
            self._shard = Shard(tar, texts if self._text else None, number=number, text=self._text)
        return self._shard

    def _finish_shard(self) -> None:
        if self._shard:
            self._tables.append(self._shard.finish())
            self._shard = None

    def _clear(self, overwrite: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        index, shards = self.folder / "index.json", sorted(self.folder.glob("[0-9]*.tar"))
        if (index.exists() or shards) and not overwrite:
            raise ValueError(f"{self.folder} already holds shards; choose another folder or pass --overwrite")
        index.unlink(missing_ok=True)  # first: if we are killed here, what is left must not be taken for a set
        for old in (*shards, *(self.folder / name for name in ("records.npy", "texts.npy", "offsets.npy"))):
            old.unlink(missing_ok=True)
        self._discard()
        sync(self.folder)

    def _discard(self) -> None:
        """Delete whatever has not got its final name."""
        if self._shard:
            self._shard.__exit__()
            self._shard = None
        for pattern in ("[0-9]*.tar.tmp", "records.npy.tmp", "texts.npy.tmp", "index.json.tmp"):
            for unfinished in self.folder.glob(pattern):
                unfinished.unlink()


def write_index(
    folder: Path,
    tables: Iterable[Table],
    *,
    resolution: int,
    vae: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Make `records.npy`, `texts.npy` and, last, `index.json` of shards that are whole; returns the index.

    Where shards repeat a caption, the first counts. Raises ValueError if there is no record in any of them.
    """
    tables = list(tables)
    full = [table for table in tables if len(table.records)]
    if not full:
        raise ValueError(f"no record was added, so {folder} would be an empty set")
    if any((table.fields, table.text) != (full[0].fields, full[0].text) for table in full):
        raise ValueError(f"the shards of {folder} hold different arrays or text states; prepare the set again")
    buckets: dict[tuple[int, int], dict[str, Any]] = {}
    rows = []
    for table in full:
        numbers = np.array([_number_of(bucket, buckets) for bucket in table.buckets])
        records = table.records.copy()
        records["bucket"] = numbers[records["bucket"]]
        rows.append(records)
    records = np.concatenate(rows)
    texts = np.concatenate([table.texts for table in full])
    texts = texts[np.unique(texts["caption"], return_index=True)[1]]
    mean, square = np.sum([table.sums for table in full], axis=0) / len(records)
    contents = {"records.npy": npy(records)} | ({"texts.npy": npy(texts)} if full[0].text else {})
    index = {
        "schema": SCHEMA,
        "count": len(records),
        "bytes": sum(file["bytes"] for table in tables for file in table.files.values()),
        "resolution": resolution,
        "vae": vae,
        "extra": extra or {},
        "fields": full[0].fields,
        "captions": dict(sum((Counter(table.captions) for table in full), Counter())),
        "text": full[0].text,
        "buckets": list(buckets.values()),
        "latent_mean": mean.tolist(),
        "latent_std": np.sqrt(np.maximum(square - mean**2, 0)).tolist(),
        "tables": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
        "shards": [{"name": table.name, "count": len(table.records), "files": table.files} for table in tables],
    }
    contents["index.json"] = json.dumps(index, indent=1, ensure_ascii=False).encode()
    for name, content in contents.items():
        _write(folder / f"{name}.tmp", content)
    tars = [f"{table.name}{suffix}" for table in tables for suffix in table.files]
    for name in (*tars, *contents):
        if name == "index.json":
            sync(folder)
        if (folder / f"{name}.tmp").exists():  # a step of the preparation names its tars itself
            os.replace(folder / f"{name}.tmp", folder / name)
    sync(folder)
    return index


def _number_of(bucket: dict[str, Any], buckets: dict[tuple[int, int], dict[str, Any]]) -> int:
    """The place of a shard's bucket among those of the set, which takes it in."""
    size = bucket["height"], bucket["width"]
    known = buckets.setdefault(size, bucket | {"count": 0})
    if known["shape"] != bucket["shape"]:
        raise ValueError(f"pictures of {size} have latents of {known['shape']} and of {bucket['shape']}")
    known["count"] += bucket["count"]
    return list(buckets).index(size)


class _Tar:
    """A tar being written; its bytes are counted and hashed on their way."""

    def __init__(self, path: Path):
        self._sha256 = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115
        target: Any = self  # a tar only needs to write and tell
        self._tar = tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def write(self, content: bytes) -> int:
        self._sha256.update(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell()

    def add(self, name: str, content: bytes | np.ndarray) -> int:
        """Append one member; returns where its bytes, of an array its data, start."""
        body = content if isinstance(content, bytes) else npy(content)
        member = tarfile.TarInfo(name)  # its defaults are mtime 0, uid 0, mode 0644
        member.size = len(body)
        start = self.tell() + tarfile.BLOCKSIZE  # in USTAR the header is always one block
        self._tar.addfile(member, io.BytesIO(body))
        return start if isinstance(content, bytes) else start + len(body) - content.nbytes

    def finish(self) -> dict[str, Any]:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self.tell()
        self._file.close()
        return {"bytes": size, "sha256": self._sha256.hexdigest()}

    def abandon(self) -> None:
        with suppress(OSError):  # on a full disk, closing fails again
            self._file.close()


def storable(name: str, array: np.ndarray) -> np.ndarray:
    """The array in C order as float16; ValueError if a value is not finite there."""
    with np.errstate(over="ignore"):  # said below
        stored = np.ascontiguousarray(array, "<f2")
    if not np.isfinite(stored).all():
        raise ValueError(f"field {name} has values that are not finite in float16; check what encoded it")
    return stored


def npy(array: np.ndarray) -> bytes:
    """The array as a .npy file."""
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
