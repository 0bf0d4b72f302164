"""Folders of pictures, with name.txt, name.caption or name.json beside them: `part_size` of them a part.

The library datasets' imagefolder is one too: metadata.jsonl, .csv or .parquet with a row a picture, by `file_name`.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from prepare.sources.files import File, Found, find, join, suffix, together
from prepare.sources.rows import read_rows, table_kind
from prepare.sources.sample import OTHER_PICTURES, PICTURES, TEXTS, Group, Opened, Sample, clean


@dataclass(slots=True)
class Folder:
    """`count` pictures of a folder from `first` on. The list of files is not carried along: it is made again."""

    path: str
    listing: str  # digest of the list
    first: int
    count: int
    captions: list[str]

    def read(self, name: str) -> Iterator[Sample]:
        album = _album(self.path, self.listing, tuple(self.captions))
        names = album.names[self.first : self.first + self.count]
        return together(partial(album.sample, captions=self.captions), names, album.found.system)


@dataclass(slots=True)
class Album:
    """Pictures of a folder, sorted, with the rows of its metadata tables; None for a row that is broken."""

    found: Found  # with all that lies beside the pictures and belongs to them
    rows: dict[str, dict[str, Any] | None]
    names: list[str]
    stems: Counter[str]

    @property
    def listing(self) -> str:
        listed = [list(self.found.files.items()), self.names]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def sample(self, name: str, captions: list[str]) -> Sample:
        """The picture `name`, read, with all that belongs to it."""
        if (row := self.rows.get(name, {})) is None:
            return Sample(clean(name), None, {}, {}, "row_broken")
        stem, own, files = name.rpartition(".")[0], suffix(name), self.found.files
        group = Group(clean(stem if self.stems[stem] == 1 else name), {}, row)
        if name not in files or own not in PICTURES:
            group.problem = "missing_file" if name not in files else "unsupported_format"
            return group.sample(captions)
        for wanted in dict.fromkeys((own, *TEXTS, "json", *captions)):
            beside = name if wanted == own else f"{stem}.{wanted}"
            if beside in files:
                content, problem = self.found.file(beside).content()
                group.problem = group.problem or problem
                if content is not None:
                    group.files[wanted] = content
        return group.sample(captions)


def open_folder(path: str, captions: list[str], part_size: int) -> Opened:
    """The pictures at `path`."""
    album = _scan(path, captions)
    listing, total = album.listing, len(album.names)
    parts = [
        Folder(path, listing, first, min(part_size, total - first), captions) for first in range(0, total, part_size)
    ]
    return Opened("folder", parts, [(listing, None)])


@lru_cache(maxsize=4)
def _album(path: str, listing: str, captions: tuple[str, ...]) -> Album:
    """The folder as it was when it was opened; ValueError if it is so no more."""
    album = _scan(path, list(captions))
    if album.listing != listing:
        raise ValueError(
            f"source.paths={path} has changed since it was opened; let it be while it is read and run again"
        )
    return album


def _scan(path: str, captions: list[str]) -> Album:
    """All pictures that a folder, a glob or a single path names, and the files that belong to them."""
    found = find(path)
    beside = found.files if found.whole else _beside(found) | found.files
    tables = sorted(filter(is_metadata, beside))
    rows: dict[str, dict[str, Any] | None] = {}
    for table in tables:
        rows |= _metadata(File(found.system, join(found.root, table)), table)
    pictures = {name for name in found.files if suffix(name) in PICTURES + OTHER_PICTURES}
    if found.whole:  # of a glob, the other rows are not asked for
        pictures |= rows.keys()
    stems = Counter(name.rpartition(".")[0] for name in pictures)
    words = {f"{stem}.{suffix}" for stem in stems for suffix in (*TEXTS, "json", *captions)}
    files = {name: beside[name] for name in sorted(beside.keys() & {*pictures, *words, *tables})}
    return Album(Found(found.system, found.root, files, found.whole), rows, sorted(pictures), stems)


def _beside(found: Found) -> dict[str, int | None]:
    """What lies in the folders of the files found: a glob of pictures leaves out their captions."""
    folders = {join(found.root, name).rpartition("/")[0] for name in found.files}
    listed = [
        about for folder in folders for about in found.system.ls(folder, detail=True) if about["type"] != "directory"
    ]
    return {about["name"][len(found.root) :].lstrip("/"): about.get("size") for about in listed}


def _metadata(file: File, table: str) -> dict[str, dict[str, Any] | None]:
    """Rows of an imagefolder's table by the name of their file; what is no such row, by its number in the table."""
    folder, rows = os.path.dirname(table), {}
    for number, row in enumerate(read_rows(file), 1):
        name = (row or {}).pop("file_name", None)
        named = isinstance(name, str)
        rows[os.path.normpath(os.path.join(folder, name)) if named else f"{table}:{number}"] = row if named else None
    return rows


def is_metadata(name: str) -> bool:
    """Whether a table describes the pictures beside it."""
    return bool(re.fullmatch(r"(.*/)?metadata\.\w+(\.gz)?", name) and table_kind(name))
