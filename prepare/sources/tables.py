"""Tables with a column of pictures, or of their paths: `part_size` rows a part.

A part of a table of text reads the rows before it too, without looking at them: some seconds a gigabyte.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from prepare.sources.files import File, Found, is_local, short, together
from prepare.sources.rows import count_rows, read_rows, table_kind
from prepare.sources.sample import Opened, Sample, clean, is_caption, make_sample

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes")
PATH_COLUMNS = ("image_path", "file_name", "path", "filepath", "file_path", "filename")
URL_COLUMNS = ("url", "URL", "image_url", "img_url")
SOME = 32  # rows that tell what is in the columns


@dataclass(slots=True)
class Columns:
    """Which columns are taken."""

    image: str
    captions: list[str]
    about: list[str]


@dataclass(slots=True)
class Table:
    """`count` rows of a table from `first` on."""

    file: File
    columns: Columns
    first: int
    count: int

    def read(self, name: str) -> Iterator[Sample]:
        wanted = [self.columns.image, *self.columns.captions, *self.columns.about]
        rows = enumerate(islice(read_rows(self.file, self.first, wanted), self.count))
        make = lambda row: row_sample(f"{name}{row[0]:04d}", row[1], self.columns, self.beside)  # noqa: E731
        return together(make, rows, self.file.system)

    def beside(self, path: str) -> tuple[bytes | None, str]:
        """The picture at a path relative to the table. A table of somewhere else may not name what lies elsewhere."""
        system, folder = self.file.system, self.file.path.rpartition("/")[0]
        if "://" in path or (not is_local(system) and (path.startswith("/") or ".." in path.split("/"))):
            return None, "outside"
        return File(system, os.path.join(folder, path)).content()


def row_sample(
    key: str, row: dict[str, Any] | None, columns: Columns, beside: Callable[[str], tuple[bytes | None, str]]
) -> Sample:
    """The sample of a row; `beside` reads the picture at a path that it names."""
    if row is None:
        return Sample(key, None, {}, {}, "row_broken")
    value, problem = row.get(columns.image), ""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        value, problem = beside(value)
    image = value if isinstance(value, bytes) and value else None
    problem = problem or ("no_image" if image is None else "")
    fields = {name: row.get(name) for name in (*columns.captions, *columns.about)}
    return make_sample(key, image, problem, {}, fields, columns.captions)


def open_tables(
    path: str, found: Found, names: list[str], image: str | None, captions: list[str], part_size: int
) -> Opened:
    """Those of the files that are tables, with the columns of the first; ValueError if they have no pictures."""
    tables = [found.file(name) for name in names]
    totals = list(together(partial(_count, path), tables, found.system))
    full = [(file, total) for file, total in zip(tables, totals, strict=True) if total]
    if not full:
        raise ValueError(f"source.paths={path} is a table without rows; check what wrote it")
    columns = choose_columns(path, islice(read_rows(full[0][0]), SOME), image, captions)
    parts = [
        Table(file, columns, first, min(part_size, total - first))
        for file, total in full
        for first in range(0, total, part_size)
    ]
    return Opened("tables", parts, [(clean(file.name), file.size) for file in tables])


def _count(path: str, file: File) -> int:
    """How many rows a table has; ValueError if it is none."""
    try:
        return count_rows(file)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"source.paths={path} holds {file.name}, which cannot be read as .{table_kind(file.name)}"
            f" ({short(error)}); fetch it again or leave it out"
        ) from error


def choose_columns(path: str, rows: Iterable[dict[str, Any] | None], image: str | None, captions: list[str]) -> Columns:
    """Which columns to take, by the first rows; ValueError, naming those there are, if that is not to be seen."""
    some = [row for row in rows if row]
    kinds = {name: "null" for row in some for name in row}
    kinds |= {name: _kind(value) for row in some for name, value in row.items() if value is not None}
    there = ", ".join(kinds) or "none"
    for key, name in [("image", image or ""), *(("captions", name) for name in captions)]:
        if name and name not in kinds:
            raise ValueError(f"source.{key}={name} is no column of {path}; choose from those there are: {there}")
    image = image or next(_image_columns(kinds), None)
    urls = [name for name in URL_COLUMNS if name in kinds]
    if image and any(str(row.get(image)).startswith(("http://", "https://")) for row in some):
        urls, image = [image], None
    if image is None and urls:
        raise ValueError(
            f"source.paths={path} has pictures by address alone, in the column {urls[0]}, and sources are not"
            " downloaded; use pipeline=web, whose steps download them first"
        )
    if image is None:
        raise ValueError(
            f"source.paths={path} has no column of images or of their paths that is known by its name; give"
            f" source.image= one of those there are: {there}"
        )
    known = [name for name, kind in kinds.items() if is_caption(name) and kind in ("text", "texts", "null")]
    captions = captions or [name for name in known if name != image]
    plain = [name for name, kind in kinds.items() if kind in ("text", "scalar", "null")]
    return Columns(image, captions, [name for name in plain if name not in (image, *captions)])


def _kind(value: Any) -> str:
    if isinstance(value, bytes) or (isinstance(value, dict) and value.keys() <= {"bytes", "path"}):
        return "picture"
    if isinstance(value, list | dict):
        return "texts"
    return "text" if isinstance(value, str) else "scalar"


def _image_columns(kinds: dict[str, str]) -> Iterator[str]:
    """Columns that may hold the picture, the likeliest first."""
    pictures = [name for name, kind in kinds.items() if kind == "picture"]
    yield from (name for name in IMAGE_COLUMNS if name in pictures)
    yield from pictures if len(pictures) == 1 else ()
    yield from (name for name in PATH_COLUMNS + IMAGE_COLUMNS if kinds.get(name) == "text")
