"""Download the images of tables of URLs, into the layout that img2dataset made common:

    NAME.tar          KEY.jpg, .png or .webp, the bytes as they were served; KEY.json; KEY.txt, the caption
    NAME.parquet      one row for every row given, with `status` and `error_message`
    NAME_stats.json   how many of each status, without its times: a part must come out the same when made again

Nothing is decoded or re-encoded here. The header says what format and how large a picture is, and what is no picture
is left out; whether the pixels are whole shows when they are encoded. Links rot: for old tables of the web, a loss of
a quarter is usual. Answers come in any order; they lie in a nameless file until all are there, and then go into the
tar in the order of keys. So memory holds the pictures that are under way, never a part.
"""

import asyncio
import hashlib
import io
import json
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from prepare.fetch import Client, FetchConfig, FetchError
from prepare.parts import Part, Tally, finished, run_step, write_json

FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with further ones behind it
LARGEST = 178_956_970  # pixels; Pillow opens nothing larger
WISHED = {"robots", "too_small"}  # left out as asked; every other reason is a fault
UNREADABLE = {"not_an_image", "zero_size", "too_many_pixels", "too_small"}  # came whole: img2dataset's failed_to_resize
KNOWN = ("punsafe", "pwatermark", "similarity", "aesthetic", "license")  # of the table, repeated beside the picture


@dataclass(slots=True, kw_only=True)
class DownloadConfig(FetchConfig):
    """What to take, besides how to fetch it."""

    max_pixels: int = 2**26  # 8192 x 8192
    min_side: int = 0  # px of the shorter side, as it came
    verify_hash: bool = False  # leave out what is no longer the file whose `sha256` the table has
    # Links rot, in some tables most of them; that nearly nothing came means that the network or the table is at fault.
    max_faults: float = 0.9

    def __post_init__(self):
        FetchConfig.__post_init__(self)  # with slots, super() finds the class before it had them
        if not 1 <= self.max_pixels <= LARGEST:
            raise ValueError(
                f"download.max_pixels={self.max_pixels} is outside 1 to {LARGEST}; 67108864 is 8192 x 8192"
            )
        if self.min_side < 0:
            raise ValueError(f"download.min_side={self.min_side} must not be negative; choose 0 to take every size")
        if not 0 <= self.max_faults <= 1:
            raise ValueError(f"download.max_faults={self.max_faults} is a share; choose from 0, none, to 1, all")


@dataclass(slots=True)
class Picture:
    """What came for a row, and where it lies in the spool."""

    suffix: str
    width: int
    height: int
    sha256: str
    offset: int = 0
    length: int = 0


def download(
    config: DownloadConfig,
    before: Path,
    folder: Path,
    *,
    tick: Callable[[int], None] | None = None,
    processes: int = 1,
) -> Tally:
    """Fetch the `url` of every row of `before`/NAME.parquet (key, url, caption_*, ...) into `folder`.

    Each process has `config.concurrency` connections. Raises ValueError if `before` is not finished, if `folder` was
    made otherwise, or if too many rows failed. What only says how to ask (timeouts, retries) is not in the recipe.
    """
    about = finished(before)
    decisive = ("max_bytes", "max_pixels", "min_side", "verify_hash", "respect_robots")
    recipe = {key: getattr(config, key) for key in decisive} | {"allow_hosts": sorted(config.allow_hosts)}
    return run_step(
        folder,
        about["parts"],
        partial(_download, config, before),
        recipe=recipe | {"input": about["digest"]},
        title="download",
        max_faults=config.max_faults,
        processes=processes,
        tick=tick,
    )


def _download(config: DownloadConfig, before: Path, part: Part) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(before / f"{part.name}.parquet").sort_by("key")
    rows = table.to_pylist()
    with tempfile.TemporaryFile(dir=part.folder) as spool:  # without a name: it goes with the process
        results = asyncio.run(_fetch_all(config, rows, part, spool))
        with tarfile.open(part.path(".tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, result in zip(rows, results, strict=True):
                if isinstance(result, Picture):
                    _add(tar, row, result, spool)
    _write_table(part, table, rows, results)
    _write_stats(part, results)


async def _fetch_all(config: DownloadConfig, rows: list[dict[str, Any]], part: Part, spool: IO[bytes]) -> list[Any]:
    """For each row its Picture, or the reason why there is none."""
    async with Client(config) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(_fetch(config, client, row, part, spool)) for row in rows]
    return [task.result() for task in tasks]


async def _fetch(
    config: DownloadConfig, client: Client, row: dict[str, Any], part: Part, spool: IO[bytes]
) -> Picture | str:
    try:
        body = await client.get(row["url"] or "")
        picture = _examine(body, config, row.get("sha256"))
    except FetchError as failure:  # which holds on to all that was fetched: only its reason may stay
        part.drop(row["key"], failure.reason, failure.detail, fault=failure.reason not in WISHED)
        return failure.reason
    picture.offset, picture.length = spool.seek(0, io.SEEK_END), len(body)
    spool.write(body)
    part.keep()
    return picture


def _examine(body: bytearray, config: DownloadConfig, sha256: str | None) -> Picture:
    """What a header says of its picture; raises FetchError if it is none, or one that is not wanted."""
    suffix, width, height = _header(body)
    if width * height > config.max_pixels:
        raise FetchError("too_many_pixels", f"{width} x {height} pixels are more than {config.max_pixels:,}")
    digest = hashlib.sha256(body).hexdigest()
    if config.verify_hash and sha256 and sha256.lower() != digest:
        raise FetchError("hash_differs", f"is {digest}, was {sha256}")
    if min(width, height) < config.min_side:
        raise FetchError("too_small", f"{width} x {height}")
    return Picture(suffix, width, height, digest)


def _header(body: bytearray) -> tuple[str, int, int]:
    """Suffix, width and height, by what the file begins with; its name and its type as served say little."""
    from PIL import Image

    if not body:
        raise FetchError("zero_size", "the file has 0 bytes")
    if body[:8] == b"\x89PNG\r\n\x1a\n" and b"\0\0\0\0" in (body[16:20], body[20:24]):
        raise FetchError("zero_size", "0 pixels")  # of which Pillow says only that it is no picture
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            with Image.open(io.BytesIO(body), formats=["JPEG", "PNG", "WEBP"]) as image:
                return FORMATS[image.format or ""], *image.size
    except Image.DecompressionBombError as error:
        raise FetchError("too_many_pixels", str(error)) from error
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        raise FetchError("not_an_image", f"begins with {bytes(body[:16])!r}") from error


def _add(tar: tarfile.TarFile, row: dict[str, Any], picture: Picture, spool: IO[bytes]) -> None:
    spool.seek(picture.offset)
    about = json.dumps(_about(row, picture), ensure_ascii=False, indent=4)
    for suffix, content in (
        (picture.suffix, spool.read(picture.length)),
        ("json", about.encode()),
        ("txt", _caption(row).encode()),
    ):
        member = tarfile.TarInfo(f"{row['key']}.{suffix}")  # of nobody, in 1970
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def _about(row: dict[str, Any], picture: Picture) -> dict[str, Any]:
    """KEY.json: img2dataset's fields, and what else the table knew."""
    captions = _captions(row)
    known = {key: row[key] for key in KNOWN if row.get(key) is not None and row[key] == row[key]}  # not NaN
    return (
        {"url": row["url"], "caption": _caption(row), "key": row["key"]}
        | _outcome(picture)
        | ({"captions": captions} if len(captions) > 1 else {})
        | known
    )


def _outcome(result: Picture | str) -> dict[str, Any]:
    """The fields that img2dataset has of every row, whatever became of it."""
    picture = result if isinstance(result, Picture) else None
    width, height = (picture.width, picture.height) if picture else (None, None)
    return {
        "status": _status(result),
        "error_message": None if isinstance(result, Picture) else result,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}" if picture else None,
        "sha256": picture.sha256 if picture else None,
    }


def _status(result: Picture | str) -> str:
    if isinstance(result, Picture):
        return "success"
    return "failed_to_resize" if result in UNREADABLE else "failed_to_download"


def _captions(row: dict[str, Any]) -> dict[str, str]:
    return {name.removeprefix("caption_"): text for name, text in row.items() if name.startswith("caption_") and text}


def _caption(row: dict[str, Any]) -> str:
    """The one for .txt: the alt text, else the first there is."""
    captions = _captions(row)
    return captions.get("alt") or next(iter(captions.values()), "")


def _write_table(part: Part, table: Any, rows: list[dict[str, Any]], results: list[Any]) -> None:
    """NAME.parquet: what is new of each row, and the columns of the table that nothing new replaces."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = ("width", "height", "original_width", "original_height")
    columns = {"url": table["url"], "caption": pa.array([_caption(row) for row in rows], pa.string())}
    columns |= {"key": table["key"]}
    outcomes = [_outcome(result) for result in results]
    for key in _outcome(""):
        columns[key] = pa.array([outcome[key] for outcome in outcomes], pa.int32() if key in sizes else pa.string())
    columns |= {name: table[name] for name in table.column_names if name not in columns}
    pq.write_table(pa.table(columns), part.path(".parquet"), compression="zstd")


def _write_stats(part: Part, results: list[Any]) -> None:
    statuses = Counter(map(_status, results))
    stats = {
        "count": len(results),
        "successes": statuses["success"],
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        "status_dict": Counter("success" if isinstance(result, Picture) else result for result in results),
    }
    write_json(part.path("_stats.json"), stats)
