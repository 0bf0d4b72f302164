"""Which rows are worth downloading: thresholds on what a table says, lists of what must not be there.

A row is dropped for the first of these that holds; where the value is not known, `unknown_*` says what happens.

    removed             its URL or SHA-256 is in a removal list (of data subjects, of rights holders)
    banned_domain       its URL is of a banned domain, or of one below
    banned_word         one of its captions has a banned word or phrase, in any case, whatever parts its words
    unknown_unsafe      unsafe          punsafe > max_unsafe
    unknown_watermark   watermarked     pwatermark > max_watermark
    unknown_size        too_small       min(width, height) < min_side
                        too_few_pixels  width height < min_pixels
                        too_wide        max(width, height) > max_aspect min(width, height)
    unknown_similarity  dissimilar      similarity < min_similarity
    unknown_aesthetic   unaesthetic     aesthetic < min_aesthetic
    caption_short       the longest caption has fewer than min_caption characters
    caption_long        the longest caption has more than max_caption characters

Rows keep their key and part. `why_not` asks the same about a single row, for sources that have no table.
"""

# pyright: reportAttributeAccessIssue=false
# (most functions of pyarrow.compute come into being when it is imported)

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from prepare.metadata import NSFW, is_number, known, numbers, texts
from prepare.parts import Part, Tally, finished, run_step

REASONS = (
    "removed", "banned_domain", "banned_word", "unknown_unsafe", "unsafe", "unknown_watermark", "watermarked",
    "unknown_size", "too_small", "too_few_pixels", "too_wide", "unknown_similarity", "dissimilar", "unknown_aesthetic",
    "unaesthetic", "caption_short", "caption_long",
)  # fmt: skip
_WORD = re.compile(r"[^\W_]+")


class Unknown(Enum):
    """What becomes of a row whose value is not known."""

    keep = "keep"
    drop = "drop"
    scored = "scored"  # dropped if its table has the column, and so could have said; kept if the table never says


@dataclass(slots=True, kw_only=True)
class FilterConfig:
    """Thresholds; None or an empty list asks nothing. What the defaults ask is what most would regret not asking."""

    min_side: int = 256  # of the shorter side, in pixels: the first resolution trained at; less would be enlarged
    min_pixels: int = 0  # width x height, for sets that go by area; min_side already asks for its square
    max_aspect: float | None = 3.0  # longer side / shorter side: what is beyond are banners, and a crop loses most
    unknown_size: Unknown = Unknown.keep  # the download measures it

    # LAION's scores spread over all of 0 to 1. 0.1 is what Stable Diffusion 2 was trained with; it also drops what
    # LAION's words call UNSURE (0.5). Sets without scores (CC12M, DataComp) were cleaned by their makers or were not:
    # choose unknown_unsafe=drop to refuse their rows.
    max_unsafe: float | None = 0.1
    unknown_unsafe: Unknown = Unknown.scored

    max_watermark: float | None = 0.5  # as Stable Diffusion 1.2 and later: more likely with a watermark than without
    min_similarity: float | None = None  # LAION asked for 0.28 (ViT-B/32) itself; other sets use other models
    min_aesthetic: float | None = None  # 4.5 to 5 for pretraining, 6 and more for the last step
    unknown_score: Unknown = Unknown.scored  # of watermark, similarity and aesthetic, where a threshold is set

    min_caption: int = 0  # characters; 0 as captions may be written later
    max_caption: int | None = None  # characters; long alt texts are mostly keywords
    banned_words: list[str] = field(default_factory=list)  # words or phrases
    banned_domains: list[str] = field(default_factory=list)  # example.com also bans img.example.com
    removed: list[str] = field(default_factory=list)  # files, local or remote, with a SHA-256 or a URL a line

    def __post_init__(self):
        for name in ("min_side", "min_pixels", "min_caption"):
            _check(name, getattr(self, name), least=0, way="0 asks nothing")
        _check("max_aspect", self.max_aspect, least=1, way="it is the longer side divided by the shorter")
        _check("max_unsafe", self.max_unsafe, least=0, most=1, way="it is a probability; null asks nothing")
        _check("max_watermark", self.max_watermark, least=0, most=1, way="it is a probability; null asks nothing")
        _check("min_similarity", self.min_similarity, least=-1, most=1, way="it is a cosine; null asks nothing")
        _check("max_caption", self.max_caption, least=max(self.min_caption, 1), way="null asks nothing")
        for word in self.banned_words:
            if not _words(word):
                raise ValueError(f"filter.banned_words has {word!r}, which is no word; leave it out")
        for domain in self.banned_domains:
            if not re.fullmatch(r"[^\s/:@?#]+", domain.strip(".")):
                raise ValueError(
                    f"filter.banned_domains has {domain!r}, which is no domain; write it without scheme, port or path,"
                    " such as example.com"
                )


def filter_rows(
    config: FilterConfig, before: Path, folder: Path, *, processes: int = 1, tick: Callable[[int], None] | None = None
) -> Tally:
    """Make `folder` of the rows of `before`, a finished step with tables, that nothing speaks against.

    Raises ValueError if a threshold that has no default is set and `before` has not its column.
    """
    done = finished(before)
    recipe = {one.name: getattr(config, one.name) for one in fields(config)} | {"input": done["digest"]}
    recipe = {key: value.value if isinstance(value, Unknown) else value for key, value in recipe.items()}
    recipe["removed"] = [_removal_list(path).digest for path in config.removed]  # what they say, not where they are
    _check_columns(config, before / f"{done['parts'][0]}.parquet")
    work = partial(_make, config, before)
    return run_step(folder, done["parts"], work, recipe=recipe, processes=processes, tick=tick)


def why_not(about: Mapping[str, Any], config: FilterConfig) -> str | None:
    """The reason to drop one row, or None; `about` has its columns by our names, or by LAION's and the like.

    Its width and height go before an original_width and original_height. Takes some 0.3 ms.
    """
    import pyarrow as pa

    row = {name: pa.array([_plain(value)]) for name, value in known(about).items()}
    number = first_reason(pa.table({"key": [""]} | row), config)[0]
    return REASONS[number] if number < len(REASONS) else None


def first_reason(table: Any, config: FilterConfig) -> np.ndarray:
    """Of each row, the number of the first of REASONS that holds, or their count if none does."""
    holds = _holds(table, config)
    first = np.full(len(table), len(REASONS), np.uint8)
    for number in reversed(range(len(REASONS))):
        if REASONS[number] in holds:
            first[holds[REASONS[number]]] = number
    return first


def _holds(table: Any, config: FilterConfig) -> dict[str, np.ndarray]:
    """Masks by reason, of the reasons that are asked about."""
    holds = {}
    captions = [table[name] for name in table.column_names if name.startswith("caption_")]
    if config.removed:
        holds["removed"] = _is_removed(table, config.removed)
    if config.banned_domains and "url" in table.column_names:
        holds["banned_domain"] = _is_banned(table["url"], config.banned_domains)
    if config.banned_words:
        holds["banned_word"] = _has_word(captions, len(table), config.banned_words)
    if config.max_unsafe is not None:
        punsafe = _score(table, "punsafe")
        holds["unknown_unsafe"] = _is_unknown(table, "punsafe", punsafe, config.unknown_unsafe)
        holds["unsafe"] = punsafe > config.max_unsafe
    if config.max_watermark is not None:
        pwatermark = _score(table, "pwatermark")
        holds["unknown_watermark"] = _is_unknown(table, "pwatermark", pwatermark, config.unknown_score)
        holds["watermarked"] = pwatermark > config.max_watermark
    if config.min_similarity is not None:
        similarity = _score(table, "similarity")
        holds["unknown_similarity"] = _is_unknown(table, "similarity", similarity, config.unknown_score)
        holds["dissimilar"] = similarity < config.min_similarity
    if config.min_aesthetic is not None:
        aesthetic = _score(table, "aesthetic")
        holds["unknown_aesthetic"] = _is_unknown(table, "aesthetic", aesthetic, config.unknown_score)
        holds["unaesthetic"] = aesthetic < config.min_aesthetic
    width, height = _score(table, "width", np.float64), _score(table, "height", np.float64)
    short, long = np.minimum(width, height), np.maximum(width, height)  # nan if either is unknown
    holds["unknown_size"] = _is_unknown(table, "width", short, config.unknown_size)
    holds["too_small"] = short < config.min_side
    holds["too_few_pixels"] = width * height < config.min_pixels
    if config.max_aspect is not None:
        holds["too_wide"] = long > config.max_aspect * short
    if config.min_caption or config.max_caption is not None:
        length = _longest(captions, len(table))
        holds["caption_short"] = length < config.min_caption
        holds["caption_long"] = length > (np.inf if config.max_caption is None else config.max_caption)
    return holds


def _make(config: FilterConfig, before: Path, part: Part) -> None:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(before / f"{part.name}.parquet").read(use_threads=False)
    first = first_reason(table, config)
    kept = first == len(REASONS)
    pq.write_table(table.filter(kept), part.path(".parquet"), compression="zstd", use_dictionary=False)
    ended = table["key"].filter(~kept)  # by which `before` tells their values
    part.drop_all(ended.to_pylist(), [REASONS[number] for number in first[~kept].tolist()])
    part.keep(int(kept.sum()))


def _plain(value: Any) -> float | str | None:
    return float(value) if isinstance(value, int | float) else None if value is None else str(value)


def _score(table: Any, name: str, dtype: type = np.float32) -> np.ndarray:
    """A column as numbers, nan where nothing is known."""
    if name not in table.column_names:
        return np.full(len(table), np.nan, dtype)
    column = table[name]
    if not is_number(column.type):
        column = numbers(column, words=NSFW if name == "punsafe" else None)
    values = column.to_numpy(zero_copy_only=False).astype(dtype)
    return np.where(np.isfinite(values), values, np.nan)


def _is_unknown(table: Any, name: str, values: np.ndarray, choice: Unknown) -> np.ndarray:
    drop = choice is Unknown.drop or (choice is Unknown.scored and name in table.column_names)
    return np.isnan(values) & drop


def _longest(captions: list[Any], num_rows: int) -> np.ndarray:
    """Characters of each row's longest caption."""
    import pyarrow.compute as pc

    lengths = [
        pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(texts(caption))), 0).to_numpy() for caption in captions
    ]
    return np.max([np.zeros(num_rows, np.int32), *lengths], axis=0)


def _has_word(captions: list[Any], num_rows: int, banned: list[str]) -> np.ndarray:
    """Whether the words of a banned word or phrase follow each other in one of the captions."""
    phrases = {" ".join(_words(one)) for one in banned}
    heads = {phrase.split()[0] for phrase in phrases}
    lengths = {phrase.count(" ") + 1 for phrase in phrases}
    found = np.zeros(num_rows, bool)
    for caption in captions:
        for row, text in enumerate(texts(caption).to_pylist()):
            words = _words(text or "")
            if not heads.isdisjoint(words):
                runs = (" ".join(words[i : i + length]) for i in range(len(words)) for length in lengths)
                found[row] |= not phrases.isdisjoint(runs)
    return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _is_banned(url: Any, domains: list[str]) -> np.ndarray:
    """Whether the host is one of the domains, or below one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    banned = {domain.strip(".").lower() for domain in domains}
    host = pc.extract_regex(texts(url), pattern=r"(?i)^[a-z]+://(?:[^/?#]*@)?(?P<host>[^/?#:@]+)")
    host = pc.struct_field(host, "host")
    host = (host.combine_chunks() if isinstance(host, pa.ChunkedArray) else host).dictionary_encode()
    levels = [(one or "").lower().rstrip(".").split(".") for one in host.dictionary.to_pylist()]
    is_banned = [any(".".join(level[first:]) in banned for first in range(len(level))) for level in levels]
    return np.array([*is_banned, False])[pc.fill_null(host.indices, len(levels)).to_numpy()]


def _is_removed(table: Any, paths: list[str]) -> np.ndarray:
    removed = np.zeros(len(table), bool)
    for path in paths:
        listed = _removal_list(path)
        for name, form, values in (("sha256", str.lower, listed.hashes), ("url", _bare, listed.urls)):
            if values and name in table.column_names:
                column = texts(table[name]).to_pylist()
                removed |= np.fromiter((form(one or "") in values for one in column), bool, len(column))
    return removed


@dataclass(slots=True)
class RemovalList:
    """What must not be used, by SHA-256 of the file and by URL; the digest is of the list's bytes."""

    digest: str
    hashes: set[str] = field(default_factory=set)
    urls: set[str] = field(default_factory=set)


@cache
def _removal_list(path: str) -> RemovalList:
    import fsspec

    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            content = file.read()
    except (OSError, EOFError, ImportError) as error:
        raise ValueError(f"filter.removed={path} cannot be read ({error}); mend the path") from error
    removal = RemovalList(hashlib.sha256(content).hexdigest())
    for number, line in enumerate(content.decode("utf-8-sig", "replace").splitlines(), 1):
        entry = line.strip()
        if re.fullmatch("[0-9a-fA-F]{64}", entry):
            removal.hashes.add(entry.lower())
        elif re.match("(?i)https?://", entry):
            removal.urls.add(_bare(entry))
        elif entry and not entry.startswith("#"):
            raise ValueError(
                f"filter.removed={path} has {entry[:80]!r} in line {number}, which is neither a SHA-256 in"
                " hexadecimal nor a URL with http; write one of these a line, and # before what is for readers"
            )
    return removal


def _bare(url: str) -> str:
    """A URL without scheme, fragment and case: a list that removes too much is better than one that misses."""
    return url.split("://", 1)[-1].split("#", 1)[0].rstrip("/").lower()


def _check(name: str, value: float | None, *, least: float, most: float = float("inf"), way: str) -> None:
    if value is not None and not least <= value <= most:
        rule = f"be at least {least}" if most == float("inf") else f"lie in {least} to {most}"
        raise ValueError(f"filter.{name}={value} must {rule}; {way}")


def _check_columns(config: FilterConfig, path: Path) -> None:
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    for key, column in (("min_similarity", "similarity"), ("min_aesthetic", "aesthetic")):
        if getattr(config, key) is not None and column not in names:
            raise ValueError(
                f"filter.{key}={getattr(config, key)} needs a column {column}, which {path.parent} has not;"
                f" name the table's with metadata.columns.{column}, or choose filter.{key}=null"
            )
