"""Rows of .parquet, .jsonl, .csv and .tsv, the texts also gzipped; one that is broken does not stop the rest."""

import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from itertools import islice
from typing import IO, Any, cast

from prepare.sources.files import File, short

KINDS = ("parquet", "jsonl", "csv", "tsv")
BATCH = 32  # rows of parquet decoded at once, which may hold pictures


def table_kind(name: str) -> str:
    """Which of KINDS a file is by its name; nothing if it is no table."""
    found = re.search(r"\.(?:(parquet)|(jsonl|ndjson|csv|tsv)(?:\.gz)?)$", name.lower())
    return (found[1] or found[2]).replace("ndjson", "jsonl") if found else ""


def read_rows(file: File, first: int = 0, columns: list[str] | None = None) -> Iterator[dict[str, Any] | None]:
    """Rows from the number `first` on, None for those that are broken; of parquet, `columns` alone."""
    kind = table_kind(file.name)
    if kind == "parquet":
        yield from _parquet_rows(file, first, columns)
        return
    with file.open() as stream:
        lines = text_lines(stream, file.name)
        if kind == "jsonl":
            header, found = [], objects(islice(filter(str.strip, lines), first, None))
        else:
            reader = csv.reader(lines, delimiter="\t" if kind == "tsv" else ",")
            header = next(reader, [])
            found = islice(records(reader, len(header)), first, None)
        for row in found:
            if isinstance(row, str) or "\ufffd" in str(row):  # of another shape, or not UTF-8
                yield None
            else:
                yield dict(zip(header, map(_number, row), strict=True)) if isinstance(row, list) else row


def count_rows(file: File) -> int:
    """How many rows `read_rows` gives."""
    if table_kind(file.name) != "parquet":
        return sum(1 for _ in read_rows(file))
    import pyarrow.parquet as pq

    with file.open(seekable=True) as stream:
        return pq.ParquetFile(stream).metadata.num_rows


def text_lines(stream: IO[bytes], name: str) -> TextIOWrapper:
    """The lines of a table of text, unpacked; U+FFFD stands where they are not UTF-8."""
    unpacked = cast(IO[bytes], gzip.GzipFile(fileobj=stream)) if name.lower().endswith(".gz") else stream
    return TextIOWrapper(unpacked, "utf-8-sig", errors="replace", newline="")


def objects(lines: Iterable[str]) -> Iterator[dict[str, Any] | str]:
    """The JSON object of each line, or what is amiss with it."""
    for line in lines:
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield short(error)
        else:
            yield row if isinstance(row, dict) else "a line that is no object"


def records(reader: Iterator[list[str]], width: int) -> Iterator[list[str] | str]:
    """Records of a csv.reader that have `width` fields; of any other, what is amiss with it."""
    while True:
        try:
            for row in reader:
                if row:
                    yield row if len(row) == width else f"{len(row)} fields, not {width}"
            return
        except csv.Error as error:  # the reader goes on behind it
            yield str(error)


def _number(text: str) -> str | int | float:
    """A number in a table of text as such, if it is written as JSON writes them."""
    if not re.fullmatch(r"-?(0|[1-9]\d{0,17})(\.\d{1,17})?(e[+-]?\d\d?)?", text):
        return text
    return json.loads(text)


def _parquet_rows(file: File, first: int, columns: list[str] | None) -> Iterator[dict[str, Any] | None]:
    import pyarrow.parquet as pq

    with file.open(seekable=True) as stream:
        table = pq.ParquetFile(stream, buffer_size=1 << 20)
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if first < count:
                yield from islice(_group_rows(table, group, count, columns), first, None)
            first = max(first - count, 0)


def _group_rows(table: Any, group: int, count: int, columns: list[str] | None) -> Iterator[dict[str, Any] | None]:
    """Rows of a row group; where its bytes are broken, the rest of it is None."""
    import pyarrow as pa

    done = 0
    try:
        for batch in table.iter_batches(batch_size=BATCH, row_groups=[group], columns=columns):
            for index in range(batch.num_rows):
                done += 1
                try:
                    row = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
                except ValueError:  # such as words that are not UTF-8
                    row = None
                yield row
    except (pa.ArrowInvalid, OSError) as error:
        if type(error) not in (pa.ArrowInvalid, OSError) or getattr(error, "errno", None):
            raise  # the connection or the disk, not the file
    yield from [None] * (count - done)
