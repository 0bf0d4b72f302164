"""Thresholds and lists: each reason at its edge, their order, what is unknown, and one row as a whole table."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare.filter import REASONS, FilterConfig, Unknown, filter_rows, why_not
from prepare.parts import Part, dropped, finished, run_step

NOTHING: dict[str, Any] = {"min_side": 0, "max_aspect": None, "max_unsafe": None, "max_watermark": None}
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "url", "caption_alt", "caption_long", "sha256")]
    + [(name, pa.int32()) for name in ("width", "height")]
    + [(name, pa.float32()) for name in ("punsafe", "pwatermark", "similarity", "aesthetic")]
)
FINE = {
    "url": "https://a.de/1", "caption_alt": "a fine picture", "width": 512, "height": 512, "punsafe": 0.05,
    "pwatermark": 0.1, "similarity": 0.3, "aesthetic": 5.5, "sha256": "0" * 64,
}  # fmt: skip
ALL = FilterConfig(
    min_side=256, min_pixels=300 * 300, max_aspect=3.0, max_unsafe=0.1, max_watermark=0.5, min_similarity=0.2,
    min_aesthetic=4.5, min_caption=3, max_caption=40, banned_words=["awful"], banned_domains=["bad.org"],
    unknown_size=Unknown.drop,
)  # fmt: skip


def step(folder: Path, parts: list[list[dict]], schema: pa.Schema = SCHEMA) -> Path:
    """A finished step with these rows."""

    def work(part: Part) -> None:
        rows = [{"key": f"{part.name}{i:04d}"} | row for i, row in enumerate(parts[int(part.name)])]
        pq.write_table(pa.Table.from_pylist(rows, schema), part.path(".parquet"))
        for _ in rows:
            part.keep()

    run_step(folder, [f"{n:05d}" for n in range(len(parts))], work, recipe={"test": json.dumps(parts, default=str)})
    return folder


def random_rows(count: int, seed: int) -> list[dict]:
    draw = np.random.default_rng(seed)

    def maybe(value: Any) -> Any:
        return None if draw.random() < 0.05 else value

    return [
        {
            "url": maybe(f"https://{draw.choice(['a.de', 'x.bad.org', 'notbad.org'])}/{i}"),
            "caption_alt": maybe(
                " ".join(draw.choice(["an", "awful", "awfully", "good", "picture"], draw.integers(1, 9)))
            ),
            "caption_long": maybe("x" * int(draw.integers(0, 20))),
            "width": maybe(int(draw.integers(200, 1600))),
            "height": maybe(int(draw.integers(200, 1600))),
            "punsafe": maybe(float(draw.random() ** 8)),
            "pwatermark": maybe(float(draw.random() ** 3)),
            "similarity": maybe(float(0.15 + draw.random() / 3)),
            "aesthetic": maybe(float(4 + 3 * draw.random())),
        }
        for i in range(count)
    ]


def plainly(row: dict, config: FilterConfig) -> str | None:
    """The documented rules, one after the other, in the plainest Python."""
    url, width, height = row["url"], row["width"], row["height"]
    captions = [row["caption_alt"] or "", row["caption_long"] or ""]
    if url and (host := url.split("/")[2]) and (host == "bad.org" or host.endswith(".bad.org")):
        return "banned_domain"
    if any("awful" in caption.split() for caption in captions):
        return "banned_word"
    for name, worst, unknown, reason in (
        ("punsafe", config.max_unsafe, "unknown_unsafe", "unsafe"),
        ("pwatermark", config.max_watermark, "unknown_watermark", "watermarked"),
    ):
        if row[name] is None:
            return unknown
        if row[name] > worst:
            return reason
    if width is None or height is None:
        return "unknown_size"
    if min(width, height) < config.min_side:
        return "too_small"
    if width * height < config.min_pixels:
        return "too_few_pixels"
    if config.max_aspect is not None and max(width, height) > config.max_aspect * min(width, height):
        return "too_wide"
    for name, least, unknown, reason in (
        ("similarity", config.min_similarity, "unknown_similarity", "dissimilar"),
        ("aesthetic", config.min_aesthetic, "unknown_aesthetic", "unaesthetic"),
    ):
        if row[name] is None:
            return unknown
        if row[name] < least:
            return reason
    longest = max(map(len, captions))
    return "caption_short" if longest < 3 else "caption_long" if longest > 40 else None


def test_whole_tables_single_rows_and_the_plain_rules_agree(tmp_path: Path):
    config = replace(ALL, min_pixels=500 * 500)
    parts = [random_rows(500, seed) for seed in (1, 2)]
    before = step(tmp_path / "metadata", parts)
    tally = filter_rows(config, before, tmp_path / "filter")
    assert tally.given == 1000 == tally.kept + tally.dropped.total() and tally.faults == 0
    reasons = set()
    for number, rows in enumerate(parts):
        name = f"{number:05d}"
        kept = pq.read_table(tmp_path / f"filter/{name}.parquet")
        ended = dropped(tmp_path / "filter", name)
        assert kept.schema == SCHEMA
        given = pq.read_table(before / f"{name}.parquet").to_pylist()
        assert kept.to_pylist() == [row for row in given if row["key"] not in ended]
        for row, stored in zip(rows, given, strict=True):
            reason = plainly(row, config)
            assert ended.get(stored["key"]) == reason == why_not(row, config)
            reasons.add(reason)
    assert reasons == {None, *REASONS} - {"removed"}


@pytest.mark.parametrize(
    ("reason", "edge", "beyond"),
    [
        ("unsafe", {"punsafe": 0.1}, {"punsafe": 0.1001}),
        ("watermarked", {"pwatermark": 0.5}, {"pwatermark": 0.5001}),
        ("too_small", {"width": 256}, {"width": 255}),
        ("too_few_pixels", {"width": 300, "height": 300}, {"width": 299, "height": 301}),
        ("too_wide", {"width": 1536}, {"width": 1537}),
        ("dissimilar", {"similarity": 0.2}, {"similarity": 0.1999}),
        ("unaesthetic", {"aesthetic": 4.5}, {"aesthetic": 4.4999}),
        ("caption_short", {"caption_alt": "abc"}, {"caption_alt": " ab "}),
        ("caption_long", {"caption_alt": "ü" * 40}, {"caption_alt": "ü" * 41}),
        ("banned_word", {"caption_alt": "awfully_good lawful"}, {"caption_alt": "an_AWFUL, thing"}),
        ("banned_domain", {"url": "http://notbad.org/bad.org"}, {"url": "http://u:p@IMG.Bad.org.:80?x"}),
        ("unknown_size", {"width": 600}, {"width": None}),
        ("unknown_unsafe", {"punsafe": 0}, {"punsafe": math.nan}),
        ("unknown_watermark", {"pwatermark": 0}, {"pwatermark": None}),
        ("unknown_similarity", {"similarity": 1}, {"similarity": None}),
        ("unknown_aesthetic", {"aesthetic": 9}, {"aesthetic": None}),
    ],
)
def test_each_reason_at_its_edge(tmp_path: Path, reason: str, edge: dict, beyond: dict):
    assert why_not(FINE | edge, ALL) is None
    assert why_not(FINE | beyond, ALL) == reason
    filter_rows(ALL, step(tmp_path / "metadata", [[FINE | edge, FINE | beyond]]), tmp_path / "filter")
    assert dropped(tmp_path / "filter", "00000") == {"000000001": reason}


def test_the_first_reason_counts():
    awful = {"punsafe": 1, "pwatermark": 1, "width": 1, "height": 1, "caption_alt": "awful", "url": "http://bad.org/"}
    assert why_not(awful, ALL) == "banned_domain"
    assert why_not(awful | {"url": "http://a.de"}, ALL) == "banned_word"
    assert why_not({"punsafe": 1, "pwatermark": 1, "width": 1, "height": 1}, ALL) == "unsafe"
    assert why_not({"punsafe": 0, "pwatermark": 1, "width": 1, "height": 1}, ALL) == "watermarked"


def test_what_is_unknown():
    assert why_not({}, FilterConfig()) is None  # no table said anything
    assert why_not({"punsafe": None}, FilterConfig()) == "unknown_unsafe"  # a table that scores, but not this row
    assert why_not({"punsafe": None}, FilterConfig(unknown_unsafe=Unknown.keep)) is None
    assert why_not({}, FilterConfig(unknown_unsafe=Unknown.drop)) == "unknown_unsafe"
    assert why_not({"width": 300, "height": None}, FilterConfig()) is None
    assert why_not({}, FilterConfig(unknown_size=Unknown.drop)) == "unknown_size"
    assert why_not({"aesthetic": None}, FilterConfig()) is None  # no threshold, no question
    assert why_not({"aesthetic": None}, FilterConfig(min_aesthetic=5)) == "unknown_aesthetic"


def test_names_and_words_of_laion():
    laion = {"URL": "http://a.de", "TEXT": "t", "WIDTH": 512, "HEIGHT": 512, "NSFW": "UNLIKELY"}
    assert why_not(laion, FilterConfig()) is None
    assert why_not(laion | {"NSFW": "UNSURE"}, FilterConfig()) == "unsafe"
    assert why_not(laion | {"NSFW": "NSFW"}, FilterConfig()) == "unsafe"
    assert why_not(laion | {"WIDTH": "128"}, FilterConfig()) == "too_small"
    assert why_not({"width": 128, "height": 128, "original_width": 999}, FilterConfig()) == "too_small"


def test_phrases_and_letters_of_any_script():
    config = FilterConfig(**NOTHING, banned_words=["hate speech", "größe", "слово", "c3po"])
    for caption in ("pure Hate-Speech!", "GRÖSSE", "(Слово)", "c3po's"):
        assert why_not({"caption_alt": "fine", "caption_long": caption}, config) == "banned_word"
    for caption in ("speech hate", "hate no speech", "größer", "словом", "c3", None, ""):
        assert why_not({"caption_alt": caption}, config) is None


def test_removal_lists(tmp_path: Path):
    first, second = tmp_path / "people.txt", tmp_path / "rights.txt"
    first.write_text("# asked for on 2026-01-02\n" + "AB" * 32 + "\n\n")
    second.write_text("https://A.de/Picture.jpg#top\n")
    config = FilterConfig(removed=[str(first), str(second)])
    rows = [
        {"sha256": "ab" * 32, "url": "http://b.de/1"},
        {"sha256": None, "url": "http://a.de/picture.jpg"},
        {"sha256": "cd" * 32, "url": "http://a.de/picture.jpg?other"},
        {"sha256": "ab" * 31, "url": None},
    ]
    assert [why_not(row, config) for row in rows] == ["removed", "removed", None, None]
    before = step(tmp_path / "metadata", [[FINE | row for row in rows]])
    assert filter_rows(config, before, tmp_path / "filter").dropped == {"removed": 2}
    longer = tmp_path / "longer.txt"  # the recipe holds what the lists say
    longer.write_text(first.read_text() + "cd" * 32)
    with pytest.raises(ValueError, match="made with filter.removed="):
        filter_rows(FilterConfig(removed=[str(longer), str(second)]), before, tmp_path / "filter")


def test_a_part_may_end_empty_and_processes_change_nothing(tmp_path: Path):
    before = step(tmp_path / "metadata", [random_rows(50, 3), [FINE | {"punsafe": 1.0}], random_rows(50, 4)])
    tallies = [filter_rows(FilterConfig(), before, tmp_path / f"{n}/filter", processes=n) for n in (1, 2)]
    assert tallies[0] == tallies[1]
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / f"{n}/filter").iterdir()} for n in (1, 2))
    assert one == two
    empty = pq.read_table(tmp_path / "1/filter/00001.parquet")
    assert len(empty) == 0 and empty.schema == SCHEMA
    assert finished(tmp_path / "1/filter")["parts"] == finished(before)["parts"]


def test_refusals(tmp_path: Path):
    def refused(match: str, **settings: Any):
        with pytest.raises(ValueError, match=match):
            filter_rows(FilterConfig(**settings), before, tmp_path / "filter")

    before = tmp_path / "metadata"
    refused("the step metadata was not run")
    step(before, [[{"url": "http://a.de"}]], pa.schema([("key", pa.string()), ("url", pa.string())]))
    refused("filter.max_aspect=0.5 must be at least 1; it is the longer side divided by the shorter", max_aspect=0.5)
    refused("filter.max_aspect=nan must be at least 1", max_aspect=math.nan)
    refused("filter.min_side=-1 must be at least 0; 0 asks nothing", min_side=-1)
    refused("filter.max_unsafe=2 must lie in 0 to 1; it is a probability; null asks nothing", max_unsafe=2)
    refused("filter.max_watermark=-0.1 must lie in 0 to 1", max_watermark=-0.1)
    refused("filter.min_similarity=28 must lie in -1 to 1; it is a cosine", min_similarity=28)
    refused("filter.max_caption=4 must be at least 5", min_caption=5, max_caption=4)
    refused("filter.banned_words has '--', which is no word", banned_words=["--"])
    refused("filter.banned_domains has 'http://a.de', which is no domain; write it", banned_domains=["http://a.de"])
    refused("filter.removed=.*none.txt cannot be read .*mend the path", removed=[str(tmp_path / "none.txt")])
    (tmp_path / "list.txt").write_text("# note\n12345\n")
    refused("filter.removed=.*list.txt has '12345' in line 2, which is neither", removed=[str(tmp_path / "list.txt")])
    refused("filter.min_aesthetic=5 needs a column aesthetic, which .*metadata.columns.aesthetic", min_aesthetic=5)
    refused("filter.min_similarity=0.3 needs a column similarity", min_similarity=0.3)
