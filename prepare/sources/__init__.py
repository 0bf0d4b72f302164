"""Captioned pictures as they lie, so that nobody converts anything by hand.

`open_source` looks at what the paths name, local or through fsspec (http, s3, hf, memory), and divides it into parts:

    tars       what img2dataset wrote, and any other WebDataset                               a part a tar
    folders    name.jpg + name.txt, name.caption, name.json; metadata.jsonl, .csv, .parquet   `part_size` of them a part
    tables     .parquet, .jsonl, .csv, .tsv with a column of images or of their paths         `part_size` rows a part
    datasets:  any other data set that the library can stream                                 a part a shard of it

A part yields its samples in a fixed order, each under a key of its own. What cannot be had is a sample too, with a
`problem` and without an image: nothing ends silently, and one broken row does not stop the rest. Only a connection
that breaks within a tar or a table raises, since its rows are there, and another run has them.

Captions have names. Files `name.txt` and `name.caption` and columns such as caption, text, TEXT or alt_text are `alt`;
any other is called as its column, without caption_ or _caption. Several under one name are alt, alt_2, alt_3. What
else is said of a picture in plain numbers and words is `about` it.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from prepare.sources.files import AT_ONCE, braces, find, join, suffix
from prepare.sources.hub import Shard, open_dataset
from prepare.sources.pictures import Folder, is_metadata, open_folder
from prepare.sources.rows import KINDS, table_kind
from prepare.sources.sample import OTHER_PICTURES, PICTURES, Opened, Sample
from prepare.sources.tables import Table, open_tables
from prepare.sources.tars import Tar, open_tars

__all__ = ["Sample", "Source", "SourceConfig", "open_source"]

Part = Tar | Folder | Table | Shard  # light and picklable
ARCHIVES = (".tar", ".tar.gz", ".tgz")


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    """Where captioned pictures are. Braces ({00000..00012}.tar) and globs are expanded; several paths join in order."""

    paths: list[str] = field(default_factory=list)  # files, folders, globs or addresses
    captions: list[str] = field(default_factory=list)  # columns, JSON fields or extensions; empty: those known
    image: str | None = None  # the column of images, or of their paths; None: one of those known
    part_size: int = 10_000  # pictures or rows of a part, where the source has no parts of its own

    def __post_init__(self):
        if self.part_size < 1:
            raise ValueError(f"source.part_size={self.part_size} must be at least 1; 10000 is usual")


@dataclass(slots=True)
class Source:
    """What `open_source` found: names of the parts, and a digest of all that they consist of."""

    names: list[str]
    digest: str
    parts: list[Part] = field(repr=False)

    def read(self, name: str) -> Iterator[Sample]:
        """The samples of one part, always in the same order; of a key that comes again, the second is key#2."""
        counts: dict[str, int] = {}
        for sample in self.parts[self.names.index(name)].read(name):
            key = sample.key
            while sample.key in counts:
                counts[key] += 1
                sample.key = f"{key}#{counts[key]}"
            counts[sample.key] = 1
            yield sample


def open_source(config: SourceConfig) -> Source:
    """Find what the paths name and divide it into parts, without reading pictures.

    Of tars and folders only names and sizes are looked at, of tables the first rows too; .jsonl, .csv and .tsv are
    read through once, to count their rows. Raises ValueError if a path is not a source of pictures.
    """
    paths = [expanded for path in config.paths for expanded in braces(path)]
    if not paths:
        raise ValueError("source.paths=[] names no pictures; give tars, folders or tables, such as [pictures/*.tar]")
    with ThreadPoolExecutor(AT_ONCE) as pool:  # over the network, each look is a request
        found = list(pool.map(partial(_open, config=config), paths))
    if config.image and all(opened.kind in ("tars", "folder") for opened in found):
        raise ValueError(f"source.image={config.image} chooses a column, and source.paths are no tables; leave it out")
    parts: list[Part] = [part for opened in found for part in opened.parts]
    if config.captions:
        _check_captions(config.captions, parts)
    recipe = [[opened.kind, opened.files] for opened in found]
    recipe.append([config.captions, config.image, config.part_size])
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return Source([f"{number:05d}" for number in range(len(parts))], digest, parts)


def _open(path: str, config: SourceConfig) -> Opened:
    """What one path consists of."""
    if path.startswith("datasets:"):
        return open_dataset(path, config.image, config.captions)
    found = find(path)
    tars = [name for name in found.files if name.lower().endswith(ARCHIVES)]
    pictures = [name for name in found.files if suffix(name) in PICTURES + OTHER_PICTURES]
    tables = [name for name in found.files if table_kind(name)]
    others = tars or [name for name in tables if not is_metadata(name)]
    if pictures and others:
        raise ValueError(
            f"source.paths={path} holds both pictures ({pictures[0]}) and others in a tar or table ({others[0]}), and"
            f" may be only one of them; name those that you want, such as {join(path, '*.' + suffix(others[0]))}"
        )
    if tars:
        return open_tars(found, tars, config.captions)
    if pictures:
        return open_folder(path, config.captions, config.part_size)
    if tables:
        return open_tables(path, found, tables, config.image, config.captions, config.part_size)
    wrong = "is of an unsupported kind" if len(found.files) == 1 else "holds no pictures"
    known = ", ".join((*ARCHIVES, *PICTURES, *KINDS))
    raise ValueError(f"source.paths={path} {wrong}; give one of {known}, or a folder of them")


def _check_captions(captions: list[str], parts: list[Part]) -> None:
    """ValueError if the first samples of tars or folders have nothing of what `source.captions` names."""
    beside = [part for part in parts if isinstance(part, Tar | Folder)]
    some = list(islice((sample for part in beside for sample in part.read("")), 100))
    if beside and not any(sample.captions for sample in some):
        there = ", ".join(dict.fromkeys(name for sample in some for name in sample.about))
        raise ValueError(
            f"source.captions={captions} names nothing that the first pictures have; give the extension of files beside"
            f" them, or a field of their JSON, where these are: {there or 'none'}"
        )
