"""Tables of URLs, in whatever columns their makers chose, into parts of 10,000 rows in ours.

The columns of LAION, Re-LAION, DataComp, COYO and CC12M are known by name (`ALIASES`); `columns` and `captions` name
others. Row i of all tables in their order has the key `f"{i // 10000:05d}{i % 10000:04d}"`, whatever becomes of it.

    key          string    part and row
    url          string    http or https, no two alike
    caption_*    string    caption_alt is the text that came with the picture
    width height int32     pixels, before anybody resized it
    punsafe      float32   0 to 1: how likely it is not safe for work
    pwatermark   float32   0 to 1: how likely it has a watermark
    similarity   float32   cosine of the CLIP embeddings of picture and text
    aesthetic    float32   LAION's scale, 1 to 10
    sha256       string    of the file, in lower case
    license      string

A column is there if some table has it, and null where a row's value is unknown or makes no sense.

Tables are read twice. The first time only the URLs, to count rows and to find those that stood before: of each URL a
64-bit hash is kept, some 13 bytes a row in all while they are sorted. A part is then a function of the tables alone,
whichever parts a run finds done. Among n URLs n^2 / 2^65 are taken for another by mistake: 0.1 in two milliards.
"""

# pyright: reportAttributeAccessIssue=false
# (most functions of pyarrow.compute come into being when it is imported)

import csv
import hashlib
import json
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import TextIOWrapper
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np

from prepare.parts import Part, Tally, finished, run_step
from prepare.sources.files import File, braces, find, short
from prepare.sources.rows import objects, records, table_kind, text_lines

PART = 10_000
# Our name, and theirs in lower case, the best first: `width` beside `original_width` is that of a resized copy.
ALIASES = {
    "url": ("url", "image_url", "img_url"),
    "caption_alt": ("caption", "text", "alt", "alt_text", "top_caption"),
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "punsafe": ("punsafe", "nsfw", "nsfw_score_opennsfw2"),
    "pwatermark": ("pwatermark", "watermark", "watermark_score"),
    "similarity": (
        "similarity", "clip_l14_similarity_score", "clip_similarity_vitl14", "clip_b32_similarity_score",
        "clip_similarity_vitb32",
    ),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2"),
    "sha256": ("sha256", "hash"),
    "license": ("license",),
}  # fmt: skip
SIZES, SCORES = ("width", "height"), ("punsafe", "pwatermark", "similarity", "aesthetic")
NSFW = {"unlikely": 0.0, "unsure": 0.5, "nsfw": 1.0}  # the words in LAION's column
_BROKEN = "\0broken"  # the column that says what is amiss with a line of text
_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?$"


@dataclass(slots=True, kw_only=True)
class MetadataConfig:
    """Which columns to take. Those of the known sets need no word."""

    columns: dict[str, str] = field(default_factory=dict)  # ours -> the table's; -> "" to leave one out
    captions: dict[str, str] = field(default_factory=dict)  # further captions: name -> the table's column
    header: list[str] = field(default_factory=list)  # columns of .csv and .tsv whose first line does not name them
    max_faults: float = 0.1  # share of rows without a usable URL above which the step fails

    def __post_init__(self):
        if unknown := sorted(self.columns.keys() - ALIASES.keys()):
            raise ValueError(
                f"metadata.columns.{unknown[0]} is no column of ours; choose one of {', '.join(ALIASES)},"
                f" or metadata.captions.{unknown[0]} if it holds captions"
            )
        for name in self.captions:
            if not re.fullmatch(r"[a-z0-9]+", name):
                raise ValueError(f"metadata.captions.{name} must be named in small letters and digits, such as long")
        if not 0 <= self.max_faults <= 1:
            raise ValueError(f"metadata.max_faults={self.max_faults} is outside 0 to 1; it is a share of the rows")


def metadata(
    config: MetadataConfig, paths: list[str], folder: Path, *, tick: Callable[[int], None] | None = None
) -> Tally:
    """Make `folder` of the tables at `paths`: .parquet, .jsonl, .csv or .tsv, the texts also with .gz behind.

    A path may be local or any that fsspec opens (https:, s3:, hf:), a folder, and have `*` and braces as in
    `{00000..00127}`. Dropped are broken_row, no_url, not_http (all faults) and repeated_url, the first of which counts.
    A .tsv has no quotes. Raises ValueError if nothing is there, or no URLs are in it.
    """
    tables = find_tables(paths)
    digest = hashlib.sha256(json.dumps([[table.file.name, table.file.size] for table in tables]).encode()).hexdigest()
    recipe = {"columns": config.columns, "captions": config.captions, "header": config.header, "input": digest}
    try:
        names, work = finished(folder)["parts"], _nothing  # spares the first reading
    except ValueError:
        plan = _Plan(config, tables)
        names, work = [f"{n:05d}" for n in range(-(-len(plan.repeated) // PART))], partial(_make, plan)
    return run_step(folder, names, work, recipe=recipe, max_faults=config.max_faults, tick=tick)


@dataclass(slots=True)
class Table:
    """One file: where it is, its kind, and which of its columns we take."""

    file: File
    columns: dict[str, str] = field(default_factory=dict)  # ours -> theirs
    header: list[str] = field(default_factory=list)
    rows: int = 0

    @property
    def kind(self) -> str:
        return table_kind(self.file.name)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The bytes; ValueError if the file turns out to be damaged."""
        import pyarrow as pa

        try:
            with self.file.open(seekable=self.kind == "parquet") as file:
                yield file
        except (pa.ArrowException, EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"source.paths: {self.file.path} cannot be read as .{self.kind} ({short(error)});"
                " fetch it again or leave it out"
            ) from error

    def lines(self, file: IO[bytes]) -> TextIOWrapper:
        """The lines of a table of text."""
        return text_lines(file, self.file.name)


def find_tables(paths: Sequence[str]) -> list[Table]:
    """The files that `paths` mean, in order; ValueError if one means none, or no table."""
    tables = []
    for path in [single for given in paths for single in braces(given)]:
        found = find(path)
        files = [found.file(name) for name in found.files if not found.whole or "/" not in name]
        for file in files:
            if table_kind(file.name):
                tables.append(Table(file))
            elif not found.whole:
                raise ValueError(
                    f"source.paths: {file.path} is no table, which end in .parquet, .jsonl, .csv or .tsv, the texts"
                    " also with .gz; for pictures choose pipeline=images"
                )
    if not tables:
        raise ValueError(f"source.paths={list(paths)} names no table; give at least one .parquet, .jsonl, .csv or .tsv")
    return tables


def resolve(names: Sequence[str], config: MetadataConfig, path: str) -> dict[str, str]:
    """Our columns -> those of a table that has `names`; ValueError if it has no URLs, or lacks one that was named."""
    lower = {name.lower(): name for name in reversed(names)}
    found = {
        ours: next((lower[alias] for alias in aliases if alias in lower), "")
        for ours, aliases in ALIASES.items()
    } | config.columns | {f"caption_{name}": column for name, column in config.captions.items()}  # fmt: skip
    has = ", ".join(names[:40])
    for ours, theirs in found.items():
        if theirs and theirs not in names:
            key = f"columns.{ours}" if ours in config.columns else f"captions.{ours.removeprefix('caption_')}"
            raise ValueError(f"metadata.{key}={theirs} is no column of {path}; choose one that it has: {has}")
    if not found["url"]:
        raise ValueError(
            f"source.paths: {path} has no column of URLs: sought were {', '.join(ALIASES['url'])}, and it has {has};"
            " name it with metadata.columns.url, name the columns of a file without a first line of names with"
            " metadata.header, or choose pipeline=images if the table holds pictures"
        )
    return {ours: theirs for ours, theirs in found.items() if theirs}


def known(about: Mapping[str, Any]) -> dict[str, Any]:
    """What we know by our names of one row that may use theirs; our own name goes before all others."""
    lower = {str(name).lower(): value for name, value in about.items()}
    found = {name: value for name, value in about.items() if name.startswith("caption_")}
    for ours, aliases in ALIASES.items():
        for alias in (ours, *aliases):
            if alias in lower:
                found[ours] = lower[alias]
                break
    return found


def numbers(column: Any, *, words: Mapping[str, float] | None = None) -> Any:
    """A column of anything as float64; null where it is no finite number, nor one of `words`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    elif not is_number(column.type):
        text = pc.utf8_trim_whitespace(pc.utf8_lower(texts(column)))
        for word, number in (words or {}).items():
            text = pc.if_else(pc.equal(text, word), str(number), text)
        column = pc.if_else(pc.match_substring_regex(text, pattern=_NUMBER), text, None)
    column = column.cast(pa.float64(), safe=False)
    return pc.if_else(pc.is_finite(column), column, None)


def is_number(kind: Any) -> bool:
    """Whether a column's type is of numbers."""
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def texts(column: Any) -> Any:
    """A column of anything as strings of sound UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_binary(column.type):
        column = column.cast(pa.binary())
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        column = column.view(pa.string())
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            content = column.view(pa.binary()).to_pylist()
            column = pa.array([None if one is None else one.decode(errors="replace") for one in content], pa.string())
        return column
    return column.cast(pa.string())


class _Plan:
    """What is in which table: their columns, rows, and which URLs repeat an earlier one. Hands out parts in order."""

    def __init__(self, config: MetadataConfig, tables: list[Table]):
        self.tables = tables
        for table in tables:
            table.header = config.header
            table.columns = resolve(_column_names(table), config, table.file.path)
        order = [*ALIASES, *(f"caption_{name}" for name in config.captions)]
        order.sort(key=lambda ours: (ours != "url", not ours.startswith("caption_")))
        self.columns = [ours for ours in order if any(ours in table.columns for table in tables)]
        hashes = array("Q")
        for table in tables:
            for batch in _batches(table, ["url"]):
                hashes.frombytes(_hashes(_urls(batch)).tobytes())
                table.rows += len(batch)
        if not hashes:
            raise ValueError(
                f"source.paths={','.join(table.file.path for table in tables)} has no rows; check the tables"
            )
        self.repeated = repeated(np.frombuffer(hashes, np.uint64))
        self._rows: Iterator[Any] | None = None
        self._next = 0

    def rows(self, number: int) -> Any:
        """The rows of a part, as they lie there; numbers must rise."""
        if self._rows is None:
            self._rows, self._next = self._from(number), number
        for _ in range(number - self._next):
            next(self._rows)
        self._next = number + 1
        return next(self._rows)

    def _from(self, number: int) -> Iterator[Any]:
        import pyarrow as pa

        skip, waiting = number * PART, pa.table({})
        for table in self.tables:
            if skip >= table.rows:
                skip -= table.rows
                continue
            for batch in _batches(table, self.columns):
                cut = min(skip, len(batch))
                skip -= cut
                batch = batch.slice(cut)
                waiting = pa.concat_tables([waiting, batch]) if len(waiting) else batch
                while len(waiting) >= PART:
                    yield waiting.slice(0, PART)
                    waiting = waiting.slice(PART)
        if len(waiting):
            yield waiting


def repeated(values: np.ndarray) -> np.ndarray:
    """Mask of the values that stood earlier in the array; a sixteenth is sorted at a time, to spare memory."""
    again, group = np.zeros(len(values), bool), (values % 16).astype(np.uint8)
    for k in range(16):
        rows = np.flatnonzero(group == k)
        rows = rows[np.argsort(values[rows], kind="stable")]
        again[rows[1:][values[rows[1:]] == values[rows[:-1]]]] = True
    return again


def _make(plan: _Plan, part: Part) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    number = int(part.name)
    table = plan.rows(number).combine_chunks()
    keys = pc.binary_join_element_wise(part.name, pa.array([f"{row:04d}" for row in range(len(table))]), "")
    url = _urls(table)
    again = plan.repeated[number * PART :][: len(table)]
    reason = pc.case_when(
        pc.make_struct(
            table[_BROKEN].is_valid(),
            pc.equal(pc.binary_length(url), 0),
            pc.invert(pc.match_substring_regex(url, pattern=r"(?i)^https?://[^/?#]")),
            pa.array(again),
        ),
        "broken_row", "no_url", "not_http", "repeated_url",
    ).combine_chunks()  # fmt: skip
    going = reason.is_null()
    columns = {"key": keys, "url": url} | {name: table[name] for name in plan.columns if name != "url"}
    pq.write_table(
        pa.table(columns).filter(going), part.path(".parquet"), compression="zstd", use_dictionary=False
    )  # fmt: skip
    ended = pa.table({"key": keys, "reason": reason, "url": url, "broken": table[_BROKEN]}).filter(pc.invert(going))
    for row in ended.to_pylist():
        detail = row["broken"] or ("" if row["reason"] == "repeated_url" else row["url"][:200])
        part.drop(row["key"], row["reason"], detail, fault=row["reason"] != "repeated_url")
    for _ in range(len(table) - len(ended)):
        part.keep()


def _nothing(part: Part) -> None:
    raise AssertionError(f"part {part.name} of a finished step is not made again")


def _urls(table: Any) -> Any:
    import pyarrow.compute as pc

    return pc.utf8_trim_whitespace(pc.fill_null(table["url"], "")).combine_chunks()


def _hashes(url: Any) -> np.ndarray:
    import pyarrow as pa
    from xxhash import xxh3_64_intdigest

    return np.fromiter(map(xxh3_64_intdigest, url.view(pa.binary()).to_pylist()), np.uint64, len(url))


def _batches(table: Table, wanted: Sequence[str]) -> Iterator[Any]:
    """The table bit by bit, in our columns: those of `wanted`, and what is amiss with a row that is broken."""
    import pyarrow as pa

    take = {ours: table.columns[ours] for ours in wanted if ours in table.columns}
    theirs = sorted(set(take.values()))
    with table.open() as file:
        for batch in _parquet(file, theirs) if table.kind == "parquet" else _text(file, table, theirs):
            columns = {}
            for ours in wanted:
                column = batch[take[ours]] if ours in take else pa.nulls(len(batch))
                columns[ours] = _canonical(ours, column)
            broken = batch[_BROKEN] if _BROKEN in batch.column_names else pa.nulls(len(batch))
            yield pa.table(columns | {_BROKEN: broken.cast(pa.string())})


def _canonical(name: str, column: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if name in SIZES:
        pixels = numbers(column)
        sound = pc.and_(pc.greater_equal(pixels, 1), pc.less(pixels, 2**31))
        return pc.if_else(sound, pixels, None).cast(pa.int32(), safe=False)
    if name in SCORES:
        score = numbers(column, words=NSFW if name == "punsafe" else None)
        if name in ("punsafe", "pwatermark"):  # -1 and the like stand for unknown
            score = pc.if_else(pc.and_(pc.greater_equal(score, 0), pc.less_equal(score, 1)), score, None)
        return score.cast(pa.float32(), safe=False)
    text = texts(column)
    if name == "sha256":  # LAION's `hash` is another one
        text = pc.utf8_lower(text)
        return pc.if_else(pc.match_substring_regex(text, pattern="^[0-9a-f]{64}$"), text, None)
    return text


def _parquet(file: IO[bytes], names: list[str]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(file).iter_batches(PART, columns=names, use_threads=False):
        yield pa.table(batch)


def _text(file: IO[bytes], table: Table, names: list[str]) -> Iterator[Any]:
    import pyarrow as pa

    lines = table.lines(file)
    if table.kind == "jsonl":
        found = ((row, None) if isinstance(row, dict) else ({}, row) for row in objects(lines))
        rows = ((*map(row.get, names), problem) for row, problem in found)
    else:
        rows = _csv(lines, table, names)
    while block := list(islice(rows, PART)):
        yield pa.table([_column(values) for values in zip(*block, strict=True)], names=[*names, _BROKEN])


def _csv(lines: TextIOWrapper, table: Table, names: list[str]) -> Iterator[tuple[str | None, ...]]:
    reader = _csv_reader(lines, table)
    header = table.header or next(reader)
    pick = itemgetter(*(header.index(name) for name in names), len(header))
    for row in records(reader, len(header)):
        yield (*(None for _ in names), row) if isinstance(row, str) else pick([*row, None])


def _csv_reader(lines: TextIOWrapper, table: Table) -> Any:
    if table.kind == "tsv":
        return csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(lines)


def _column(values: Sequence[Any]) -> Any:
    """Values of JSON or text as numbers, if all are, or as strings; the empty string is null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        column = pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError):
        column = None
    if column is None or not _is_plain(column.type):  # of several kinds, or half a surrogate pair
        texts = [value if isinstance(value, str) or value is None else repr(value) for value in values]
        column = pa.array([value and value.encode("utf-8", "replace").decode() for value in texts], pa.string())
    return pc.if_else(pc.equal(column, ""), None, column) if pa.types.is_string(column.type) else column


def _column_names(table: Table) -> list[str]:
    """A table's columns; of lines of JSON, those of the first thousand."""
    import pyarrow.parquet as pq

    with table.open() as file:
        if table.kind == "parquet":
            schema = pq.ParquetFile(file).schema_arrow
            return [one.name for one in schema if _is_plain(one.type)]
        lines = table.lines(file)
        if table.kind != "jsonl":
            names = table.header or next(_csv_reader(lines, table), [])
        else:
            some = islice(objects(lines), 1000)
            names = list(dict.fromkeys(name for row in some if isinstance(row, dict) for name in row))
    if not names:
        raise ValueError(f"source.paths: {table.file.path} is empty; leave it out")
    return names


def _is_plain(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return is_number(kind) or _is_binary(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
