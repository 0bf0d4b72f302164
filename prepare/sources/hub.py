"""Any other data set that the library datasets can stream, as datasets:NAME or datasets:NAME:SPLIT: a part a shard."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prepare.sources.files import File, file_system, short
from prepare.sources.sample import Opened, Sample
from prepare.sources.tables import Columns, choose_columns, row_sample


@dataclass(slots=True)
class Shard:
    """Shard `index` of `of`."""

    path: str
    split: str
    index: int
    of: int
    columns: Columns

    def read(self, name: str) -> Iterator[Sample]:
        for row, values in enumerate(_dataset(self.path, self.split).shard(self.of, self.index)):
            yield row_sample(f"{name}{row:04d}", values, self.columns, _content)


def _content(path: str) -> tuple[bytes | None, str]:
    return File(*file_system(path)).content()  # anywhere: as the library found it


def open_dataset(path: str, image: str | None, captions: list[str]) -> Opened:
    """The data set's first split, or the one named; ValueError if the library cannot stream it."""
    name, _, split = path.removeprefix("datasets:").partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"source.paths={path} needs the library datasets; pip install datasets") from error
    try:
        known = datasets.load_dataset_builder(name).config.data_files or {}
        split = split or ("train" if "train" in known or not known else str(next(iter(known))))
        data = _dataset(name, split)
        some = [dict(row) for row in data.take(1)]
    except Exception as error:  # as many kinds as there are ways to lack a data set
        raise ValueError(
            f"source.paths={path} cannot be opened with the library datasets ({type(error).__name__}: {short(error)});"
            " check its name and split"
        ) from error
    if not some:
        raise ValueError(f"source.paths={path} is a data set without rows; choose another split")
    columns, of = choose_columns(path, some, image, captions), data.num_shards
    shards = [Shard(name, split, index, of, columns) for index in range(of)]
    return Opened(f"datasets:{split}", shards, [_name_and_size(url) for url in known.get(split, [])])


def _name_and_size(url: str) -> tuple[str, int | None]:
    """On the Hub the revision is in the name; of a file here, the size tells."""
    return (os.path.basename(url), os.path.getsize(url)) if os.path.exists(url) else (url, None)


@lru_cache(maxsize=4)
def _dataset(path: str, split: str) -> Any:
    """The streamed data set, with pictures as they are stored."""
    import datasets

    data = datasets.load_dataset(path, split=split, streaming=True)
    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data
