"""Tables of URLs: the columns of the known sets, every row accounted for, repeats found over all parts, any restart."""

import gzip
import http.server
import json
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare import metadata as module
from prepare.metadata import MetadataConfig, braces, find_tables, known, metadata, repeated, resolve
from prepare.parts import dropped, finished

KNOWN = {  # columns of published sets -> ours
    "LAION-2B": (
        "SAMPLE_ID URL TEXT HEIGHT WIDTH LICENSE NSFW similarity",
        "url=URL caption_alt=TEXT width=WIDTH height=HEIGHT punsafe=NSFW similarity=similarity license=LICENSE",
    ),
    "LAION-2B joined": (
        "URL TEXT WIDTH HEIGHT similarity hash punsafe pwatermark AESTHETIC_SCORE",
        "url=URL caption_alt=TEXT width=WIDTH height=HEIGHT punsafe=punsafe pwatermark=pwatermark"
        " similarity=similarity aesthetic=AESTHETIC_SCORE sha256=hash",
    ),
    "DataComp": (
        "uid url text original_width original_height clip_b32_similarity_score clip_l14_similarity_score face_bboxes"
        " sha256",
        "url=url caption_alt=text width=original_width height=original_height"
        " similarity=clip_l14_similarity_score sha256=sha256",
    ),
    "COYO": (
        "id url text width height image_phash text_length clip_similarity_vitb32 clip_similarity_vitl14"
        " nsfw_score_opennsfw2 nsfw_score_gantman watermark_score aesthetic_score_laion_v2",
        "url=url caption_alt=text width=width height=height punsafe=nsfw_score_opennsfw2 pwatermark=watermark_score"
        " similarity=clip_similarity_vitl14 aesthetic=aesthetic_score_laion_v2",
    ),
    "img2dataset": (
        "url caption key status width height original_width original_height sha256",
        "url=url caption_alt=caption width=original_width height=original_height sha256=sha256",
    ),
}


def parquet(path: Path, **columns: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def rows(folder: Path) -> list[dict]:
    return [row for name in finished(folder)["parts"] for row in pq.read_table(folder / f"{name}.parquet").to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", KNOWN)
def test_columns_of_known_sets(name: str):
    theirs, ours = KNOWN[name]
    assert resolve(theirs.split(), MetadataConfig(), "x") == dict(pair.split("=") for pair in ours.split())


def test_values(tmp_path: Path):
    sha = "AB" * 32
    path = parquet(
        tmp_path / "t.parquet",
        URL=[" http://a.de/1 ", "https://a.de/2", "HTTP://a.de/3", "http://a.de/4"],
        TEXT=["Ein Bär", None, "c", "d"],
        WIDTH=[640.0, float("nan"), -1.0, 3e9],
        HEIGHT=pa.array([480, None, 0, 7], pa.int64()),
        NSFW=["UNLIKELY", "UNSURE", "NSFW", None],
        pwatermark=[0.25, -1.0, float("inf"), 1.0],
        aesthetic=["5.5", "1e1", "high", ""],
        hash=[sha, "12", None, "g" * 64],
        recaption=["long a", "long b", None, "long d"],
    )
    tally = metadata(MetadataConfig(captions={"long": "recaption"}), [path], tmp_path / "metadata")
    assert (tally.given, tally.kept) == (4, 4)
    table = pq.read_table(tmp_path / "metadata/00000.parquet")
    assert table.schema == pa.schema(
        [(name, pa.string()) for name in ("key", "url", "caption_alt", "caption_long")]
        + [("width", pa.int32()), ("height", pa.int32())]
        + [(name, pa.float32()) for name in ("punsafe", "pwatermark", "aesthetic")]
        + [("sha256", pa.string())]
    )
    assert table.to_pydict() == {
        "key": ["000000000", "000000001", "000000002", "000000003"],
        "url": ["http://a.de/1", "https://a.de/2", "HTTP://a.de/3", "http://a.de/4"],
        "caption_alt": ["Ein Bär", None, "c", "d"],
        "caption_long": ["long a", "long b", None, "long d"],
        "width": [640, None, None, None],
        "height": [480, None, None, 7],
        "punsafe": [0.0, 0.5, 1.0, None],
        "pwatermark": [0.25, None, None, 1.0],
        "aesthetic": [5.5, 10.0, None, None],
        "sha256": [sha.lower(), None, None, None],
    }


def test_all_formats_say_the_same(tmp_path: Path):
    url = [f"http://a.de/{i}" for i in range(7)]
    text = ["plain", "with, comma", 'a "quote"', "två\nlines", "", "ü", "last"]
    width = [1, 2, 3, 4, 5, 6, 7]
    paths = [parquet(tmp_path / "t.parquet", url=url, text=text, width=width)]
    quoted = ['"' + one.replace('"', '""') + '"' for one in text]
    as_csv = "\ufeffurl,text,width\n" + "".join(f"{u},{t},{w}\n" for u, t, w in zip(url, quoted, width, strict=True))
    as_json = "\n".join(json.dumps({"url": u, "text": t, "width": w}) for u, t, w in zip(url, text, width, strict=True))
    for name, content in (("t.csv", as_csv), ("t.jsonl", as_json + "\n\n"), ("u.jsonl", as_json)):
        (tmp_path / name).write_text(content, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        paths += [str(tmp_path / name), str(tmp_path / f"{name}.gz")]
    results = []
    for number, path in enumerate(paths):
        metadata(MetadataConfig(), [path], tmp_path / f"m{number}")
        results.append([row | {"caption_alt": row["caption_alt"] or None} for row in rows(tmp_path / f"m{number}")])
    assert results[0][3]["caption_alt"] == "två\nlines"
    assert all(result == results[0] for result in results)


def test_tables_of_text_without_a_line_of_names(tmp_path: Path):
    (tmp_path / "cc12m.tsv").write_text('http://a.de/1\ta "quoted caption\nhttp://a.de/2\tsecond\n')
    config = MetadataConfig(header=["url", "caption"])
    metadata(config, [str(tmp_path / "cc12m.tsv")], tmp_path / "metadata")
    assert [row["caption_alt"] for row in rows(tmp_path / "metadata")] == ['a "quoted caption', "second"]


def test_every_row_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PART", 4)
    first = ["http://a.de/1", None, "ftp://a.de/2", "http://a.de/1 ", "http://a.de/3", "  ", "http:///nohost"]
    second = ["http://a.de/3", "http://a.de/4", "data:image/png;base64,xx", "http://a.de/1"]
    paths = [parquet(tmp_path / f"{i}.parquet", url=urls) for i, urls in enumerate((first, second))]
    tally = metadata(MetadataConfig(max_faults=1), paths, tmp_path / "metadata")
    assert (tally.given, tally.kept, tally.faults) == (11, 3, 5)
    assert tally.dropped == {"no_url": 2, "not_http": 3, "repeated_url": 3}
    assert [(row["key"], row["url"]) for row in rows(tmp_path / "metadata")] == [
        ("000000000", "http://a.de/1"),
        ("000010000", "http://a.de/3"),  # rows go over the ends of tables, and keep their places
        ("000020000", "http://a.de/4"),
    ]
    assert dropped(tmp_path / "metadata", "00001") == {
        "000010001": "no_url",
        "000010002": "not_http",
        "000010003": "repeated_url",
    }


def test_broken_lines_harm_no_other(tmp_path: Path):
    lines = [
        '{"url": "http://a.de/1", "text": "half a pair \\ud83d"}',
        '{"url": "http://a.de/2", "tex',
        "[1, 2]",
        '{"url": 5, "text": ["a"]}',
        "[" * 100_000,
        '{"url": "http://a.de/6", "width": 1' + "0" * 5000 + "}",
        '{"url": "http://a.de/7"}',
    ]
    (tmp_path / "t.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"url": "http://a.de/8", "text": "\xff\xfe"}\n')
    (tmp_path / "t.csv").write_text('url,text\nhttp://a.de/9,x\nhttp://a.de/10\n"a,b\n' + "y" * 200_000 + "\n")
    config = MetadataConfig(max_faults=1)
    tally = metadata(config, [str(tmp_path / "t.jsonl"), str(tmp_path / "t.csv")], tmp_path / "metadata")
    kept = rows(tmp_path / "metadata")
    assert [row["url"].rsplit("/", 1)[1] for row in kept] == ["1", "7", "8", "9"]
    assert kept[0]["caption_alt"].startswith("half a pair ")
    assert tally.dropped["broken_row"] >= 5 and tally.dropped["not_http"] == 1
    assert tally.given == tally.kept + tally.dropped.total()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_broken_line_in_one_of_several_tables(kind: str, tmp_path: Path):
    urls = [[f"http://a.de/{n}/{i}" for i in range(5)] for n in range(3)]
    for n, some in enumerate(urls):
        lines = (
            [json.dumps({"url": url}) for url in some] if kind == "jsonl" else ["url,text", *(f"{u},x" for u in some)]
        )
        lines[3] = "{broken" if n == 1 else lines[3]
        (tmp_path / f"{n}.{kind}").write_text("\n".join(lines))
    tally = metadata(MetadataConfig(), [str(tmp_path)], tmp_path / "metadata")
    assert (tally.kept, tally.dropped) == (14, {"broken_row": 1})


def test_text_that_is_no_utf8_is_mended(tmp_path: Path):
    text = pa.array([b"good", b"b\xe4d"]).view(pa.string())
    pq.write_table(pa.table({"url": ["http://a.de/1", "http://a.de/2"], "text": text}), tmp_path / "t.parquet")
    metadata(MetadataConfig(), [str(tmp_path / "t.parquet")], tmp_path / "metadata")
    assert [row["caption_alt"] for row in rows(tmp_path / "metadata")] == ["good", "b\ufffdd"]


def test_repeated_marks_all_but_the_first():
    values = np.random.default_rng(0).integers(0, 300, 1000).astype(np.uint64)
    seen: set[int] = set()
    expected = [value in seen or bool(seen.add(value)) for value in values.tolist()]
    assert repeated(values).tolist() == expected


def test_a_restart_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PART", 5)
    draw = np.random.default_rng(1)
    urls = [f"http://a.de/{i}" for i in draw.integers(0, 40, 83)]
    paths = [
        parquet(tmp_path / f"{i}.parquet", url=urls[a:b]) for i, (a, b) in enumerate([(0, 13), (13, 14), (14, 83)])
    ]
    whole, parts = tmp_path / "whole" / "metadata", tmp_path / "parts" / "metadata"
    run = partial(metadata, MetadataConfig(), paths)
    expected = run(whole)
    assert expected.kept == len(set(urls))
    for missing in (["00000"], ["00003", "00004", "00009"], ["00016"]):
        run(parts)
        for name in [*missing, "step"]:
            for suffix in (".json", ".parquet", ".dropped.parquet"):
                (parts / f"{name}{suffix}").unlink(missing_ok=True)
        told: list[int] = []
        assert run(parts, tick=told.append) == expected
        assert sum(told) == expected.given
        assert contents(parts) == contents(whole)


def test_what_is_finished_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = parquet(tmp_path / "t.parquet", url=["http://a.de/1"])
    expected = metadata(MetadataConfig(), [path], tmp_path / "metadata")
    monkeypatch.setattr(module, "_batches", None)
    assert metadata(MetadataConfig(), [path], tmp_path / "metadata") == expected
    with pytest.raises(ValueError, match="made with metadata.header="):
        metadata(MetadataConfig(header=["url"]), [path], tmp_path / "metadata")


def test_folders_globs_braces_and_the_web(tmp_path: Path):
    for n in range(12):
        parquet(tmp_path / f"tables/{n:03d}.parquet", url=[f"http://a.de/{n}"])
    (tmp_path / "tables/README.md").write_text("no table")
    folder = str(tmp_path / "tables")
    expected = [f"{n:03d}.parquet" for n in range(12)]
    for path in (folder, f"{folder}/*.parquet", folder + "/{000..011}.parquet", f"file://{folder}/*.parquet"):
        assert [table.file.name for table in find_tables([path])] == expected
    assert braces("{a,b}{9..10}") == ["a9", "a10", "b9", "b10"]
    assert braces("no{thing}") == ["no{thing}"]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/" + "{003..004}.parquet?download=true"
            metadata(MetadataConfig(), [url], tmp_path / "metadata")
        finally:
            server.shutdown()
    assert [row["url"] for row in rows(tmp_path / "metadata")] == ["http://a.de/3", "http://a.de/4"]


def test_tables_of_different_sets_share_a_schema(tmp_path: Path):
    paths = [
        parquet(tmp_path / "a.parquet", URL=["http://a.de/1"], TEXT=["a"], punsafe=[0.5]),
        parquet(tmp_path / "b.parquet", url=["http://a.de/2"], caption=["b"], width=[5]),
    ]
    metadata(MetadataConfig(), paths, tmp_path / "metadata")
    first, second = rows(tmp_path / "metadata")
    assert first == {"key": "000000000", "url": "http://a.de/1", "caption_alt": "a", "width": None, "punsafe": 0.5}
    assert second == {"key": "000000001", "url": "http://a.de/2", "caption_alt": "b", "width": 5, "punsafe": None}


def test_known_prefers_our_own_names():
    about = {"WIDTH": 1, "width": 256, "original_width": 1024, "NSFW": "UNSURE", "TEXT": "t", "caption_long": "l"}
    assert known(about) == {"width": 256, "punsafe": "UNSURE", "caption_alt": "t", "caption_long": "l"}


def test_refusals(tmp_path: Path):
    good = parquet(tmp_path / "t.parquet", url=["http://a.de/1"], text=["a"], image=[b"x"])

    def refused(match: str, *paths: str, **settings):
        with pytest.raises(ValueError, match=match):
            metadata(MetadataConfig(**settings), list(paths), tmp_path / "metadata")

    refused("source.paths=.*none.parquet matches no file", str(tmp_path / "none.parquet"))
    refused(r"source.paths=.*\*.csv matches no file; check the path", str(tmp_path / "*.csv"))
    refused(r"source.paths=\[\] names no table")
    refused("source.paths=nope://x.csv cannot be opened: Protocol not known", "nope://x.csv")
    (tmp_path / "a.png").write_bytes(b"")
    refused("a.png is no table.*pipeline=images", str(tmp_path / "a.png"))
    refused(
        "metadata.columns.url=link is no column of .*; choose one that it has: url, text", good, columns={"url": "link"}
    )
    refused("metadata.captions.long=x is no column of", good, captions={"long": "x"})
    refused("metadata.columns.weight is no column of ours; choose one of url", good, columns={"weight": "w"})
    refused("metadata.captions.Long must be named in small letters", good, captions={"Long": "text"})
    refused("metadata.max_faults=2 is outside 0 to 1", good, max_faults=2)
    pictures = parquet(tmp_path / "p.parquet", image=[b"x"], text=["a"])
    refused("no column of URLs: sought were url, .*it has image, text.*metadata.columns.url.*pipeline=images", pictures)
    empty = parquet(tmp_path / "e.parquet", url=pa.array([], pa.string()))
    refused("e.parquet has no rows; check the tables", empty)
    (tmp_path / "e.csv").write_text("")
    refused("e.csv is empty; leave it out", str(tmp_path / "e.csv"))
    (tmp_path / "d.parquet").write_bytes(Path(good).read_bytes()[:-20])
    refused("d.parquet cannot be read as .parquet .*fetch it again", str(tmp_path / "d.parquet"))
    lines = b"".join(b'{"url": "http://a.de/%d"}\n' % i for i in range(2000))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines)[:-100])
    refused("d.jsonl.gz cannot be read as .jsonl", str(tmp_path / "d.jsonl.gz"))
    bad = parquet(tmp_path / "b.parquet", url=["ftp://a.de/1", "http://a.de/1"])
    refused(r"1 of 2 rows failed \(not_http 1\).*metadata.max_faults=0.1", bad)
