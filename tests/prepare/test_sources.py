"""The same pictures in every form are the same samples; what is broken is counted; what cannot be is refused."""

import csv
import functools
import gzip
import http.server
import io
import json
import os
import pickle
import re
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prepare.sources import Sample, Source, SourceConfig, files, open_source, pictures, tars

NUM = 7


def picture(seed: int, form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


PICTURES = [picture(seed) for seed in range(NUM)]
CAPTIONS = [
    {"alt": f"alt {i}, \u201cquoted\u201d", "short": f"short {i}", "long": f"a long one\nof lines {i}"}
    for i in range(NUM)
]


def source(*paths: object, **config: Any) -> Source:
    return open_source(SourceConfig(paths=[str(path) for path in paths], **config))


def read(*paths: object, **config: Any) -> list[Sample]:
    opened = source(*paths, **config)
    return [sample for name in opened.names for sample in opened.read(name)]


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def plain_members(first: int = 0, last: int = NUM) -> dict[str, bytes]:
    """As img2dataset writes them."""
    members = {}
    for i in range(first, last):
        about = {"url": f"https://a/{i}", "caption": CAPTIONS[i]["alt"], "key": f"{i:09d}", "status": "success"}
        about |= {"width": 8, "error_message": None, "exif": "{}", "nested": {"a": 1}}
        members[f"{i:09d}.jpg"] = PICTURES[i]
        members[f"{i:09d}.txt"] = CAPTIONS[i]["alt"].encode()
        members[f"{i:09d}.json"] = json.dumps(about).encode()
    return members


# Every form of the same pictures


def as_tar(folder: Path) -> str:
    members = {}
    for i, captions in enumerate(CAPTIONS):
        members |= {f"{i}.jpg": PICTURES[i], f"{i}.json": json.dumps({"captions": captions, "n": i}).encode()}
    write_tar(folder / "00000.tar", members)
    return str(folder / "00000.tar")


def as_gzipped_tar(folder: Path) -> str:
    members = {}
    for i, captions in enumerate(CAPTIONS):
        about = {"caption": captions["alt"], "caption_short": captions["short"], "long": captions["long"], "n": i}
        members |= {f"{i}.jpg": PICTURES[i], f"{i}.json": json.dumps(about).encode()}
    return str(write_tar(folder / "a.tar.gz", members, "w:gz"))


def as_folder(folder: Path) -> str:
    for i, captions in enumerate(CAPTIONS):
        (folder / f"{i}.jpg").write_bytes(PICTURES[i])
        (folder / f"{i}.txt").write_text(captions["alt"])
        rest = {"short_caption": captions["short"], "long": captions["long"], "n": i}
        (folder / f"{i}.json").write_text(json.dumps(rest))
    return str(folder)


def as_imagefolder(kind: str, folder: Path) -> str:
    rows = []
    (folder / "sub").mkdir()
    for i, captions in enumerate(CAPTIONS):
        (folder / f"sub/{i}.jpg").write_bytes(PICTURES[i])
        rows.append({"file_name": f"sub/{i}.jpg", "text": captions["alt"], "n": i} | without_alt(captions))
    write_table(folder / f"metadata.{kind}", rows)
    return str(folder)


def as_bytes(folder: Path) -> str:
    rows = [{"image": PICTURES[i], "TEXT": c["alt"], "n": i} | without_alt(c) for i, c in enumerate(CAPTIONS)]
    write_table(folder / "a.parquet", rows, row_group_size=3)
    return str(folder / "a.parquet")


def as_struct(folder: Path) -> str:
    rows = [
        {"picture_of_it": {"bytes": PICTURES[i], "path": None}, "captions": c, "n": i} for i, c in enumerate(CAPTIONS)
    ]
    write_table(folder / "train-00000-of-00001.parquet", rows)
    return str(folder)


def as_paths(kind: str, folder: Path) -> str:
    rows = []
    for i, captions in enumerate(CAPTIONS):
        (folder / f"{i}.jpg").write_bytes(PICTURES[i])
        rows.append({"image_path": f"{i}.jpg", "alt_text": captions["alt"], "n": i} | without_alt(captions))
    write_table(folder / f"t.{kind}", rows)
    return str(folder / f"t.{kind}")


def as_dataset(folder: Path) -> str:
    as_struct(folder)
    return f"datasets:{folder}:train"


def without_alt(captions: dict[str, str]) -> dict[str, str]:
    return {f"caption_{name}": text for name, text in captions.items() if name != "alt"}


def write_table(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


FORMS: dict[str, Callable[[Path], str]] = {
    "tar": as_tar,
    "gzipped tar": as_gzipped_tar,
    "folder": as_folder,
    "parquet of bytes": as_bytes,
    "parquet of the Hub": as_struct,
    "datasets": as_dataset,
}
FORMS |= {f"imagefolder {kind}": functools.partial(as_imagefolder, kind) for kind in ("jsonl", "csv", "parquet")}
FORMS |= {f"paths {kind}": functools.partial(as_paths, kind) for kind in ("jsonl", "csv", "tsv", "parquet")}


def content(samples: list[Sample]) -> list[Any]:
    return [(sample.image, sample.captions, sample.about["n"], sample.problem) for sample in samples]


EXPECTED = [(PICTURES[i], CAPTIONS[i], i, "") for i in range(NUM)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form: str, tmp_path: Path):
    path = FORMS[form](tmp_path)
    whole = read(path)
    assert content(whole) == EXPECTED
    assert len({sample.key for sample in whole}) == NUM
    divided = source(path, part_size=3)
    back = pickle.loads(pickle.dumps(divided))
    assert back.digest == divided.digest != source(path).digest
    parts = [list(back.read(name)) for name in back.names]
    assert content([sample for part in parts for sample in part]) == EXPECTED
    if "tar" not in form and form != "datasets":
        assert divided.names == ["00000", "00001", "00002"]
        assert [len(part) for part in parts] == [3, 3, 1]


def test_keys_of_rows_are_made_of_part_and_row(tmp_path: Path):
    opened = source(as_bytes(tmp_path), part_size=3)
    assert [sample.key for sample in opened.read("00001")] == ["000010000", "000010001", "000010002"]


@pytest.mark.parametrize("form", ["folder", "parquet of bytes"])
def test_reads_in_a_spawned_process(form: str, tmp_path: Path):
    opened = source(FORMS[form](tmp_path), part_size=4)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert content(pool.submit(read_part, opened, "00001").result()) == EXPECTED[4:]


def read_part(opened: Source, name: str) -> list[Sample]:
    return list(opened.read(name))


def test_a_source_of_a_big_folder_is_light(tmp_path: Path):
    for i in range(500):
        (tmp_path / f"{i}.jpg").touch()
    assert len(pickle.dumps(source(tmp_path))) < 1000


# Over fsspec


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's file server, with range requests as the usual servers answer them."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and path.is_file():
            whole = path.read_bytes()
            first, last = int(asked[1]), min(int(asked[2] or len(whole)), len(whole) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.write(whole[first : last + 1])
        else:
            super().do_GET()


class NoRanges(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # at 5, as usual, a connection made at once with others may wait a second


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[type], str]]:
    servers = []

    def start(handler: Any) -> str:
        server = Server(("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("form", ["tar", "gzipped tar", "folder", "imagefolder jsonl", "parquet of bytes", "paths csv"])
def test_over_http(form: str, tmp_path: Path, serve: Callable[[type], str]):
    path = FORMS[form](tmp_path)
    url = serve(Ranges) + "/" + (Path(path).name if path != str(tmp_path) else "")
    assert content(read(url, part_size=3)) == EXPECTED


@pytest.mark.parametrize("form", ["tar", "folder", "paths jsonl"])
def test_over_http_without_ranges(form: str, tmp_path: Path, serve: Callable[[type], str]):
    path = FORMS[form](tmp_path)
    url = serve(NoRanges) + "/" + (Path(path).name if path != str(tmp_path) else "")
    assert content(read(url, part_size=3)) == EXPECTED


def test_big_files_over_http_without_ranges(tmp_path: Path, serve: Callable[[type], str]):
    """More than is asked for at a time: one request serves tars and tables of text, and parquet is refused."""
    noise = [np.random.default_rng(i).bytes(3 << 20) for i in range(4)]
    write_tar(tmp_path / "a.tar", {f"{i}.jpg": noise[i] for i in range(4)})
    write_table(tmp_path / "a.parquet", [{"image": noise[i]} for i in range(4)])
    rows = [{"path": f"{i}.jpg", "text": noise[i][: 1 << 20].hex()} for i in range(4)]
    write_table(tmp_path / "a.jsonl", rows)
    url = serve(NoRanges)
    assert [s.image for s in read(url + "/a.tar")] == noise
    assert [s.captions["alt"] for s in read(url + "/a.jsonl", part_size=1)] == [row["text"] for row in rows]
    with pytest.raises(
        ValueError,
        match=r"source.paths=http.*holds a.parquet, which cannot be read as .parquet .*range requests.*fetch it",
    ):
        source(url + "/a.parquet")
    assert [s.image for s in read(serve(Ranges) + "/a.parquet", part_size=3)] == noise


def test_braces_and_globs_over_http(tmp_path: Path, serve: Callable[[type], str]):
    for i in range(3):
        write_tar(tmp_path / f"{i:05d}.tar", plain_members(2 * i, 2 * i + 2))
    url = serve(Ranges)
    assert [s.image for s in read(url + "/{00000..00002}.tar")] == PICTURES[:6]
    assert [s.image for s in read(url + "/*.tar")] == PICTURES[:6]


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"datasets"}))
def test_in_memory(form: str, tmp_path: Path):
    path = FORMS[form](tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), f"/{tmp_path.name}", recursive=True)
    try:
        url = f"memory://{tmp_path.name}" + path.removeprefix(str(tmp_path))
        assert content(read(url, part_size=3)) == EXPECTED
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)


def test_a_lost_connection_is_no_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The rows behind it are there, and another run has them."""

    class Lost(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise ConnectionResetError("reset by peer")
            return super().read(size)

    memory = fsspec.filesystem("memory")
    memory.pipe("/lost/a.tar", Path(as_tar(tmp_path)).read_bytes())
    opened = source("memory://lost/a.tar")
    monkeypatch.setattr(type(memory), "open", lambda self, path, mode: Lost(self.cat_file(path)))
    with pytest.raises(ConnectionResetError):
        list(opened.read("00000"))


def test_pictures_are_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    as_folder(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/shaky", recursive=True)
    opened = source("memory://shaky")
    whole, asked = type(memory).cat_file, Counter()

    def shaky(self: Any, path: str, *arguments: Any) -> bytes:
        asked[path] += 1
        if asked[path] == 1 or path.endswith("3.jpg"):
            raise ConnectionResetError("reset by peer")
        return whole(self, path, *arguments)

    monkeypatch.setattr(type(memory), "cat_file", shaky)
    monkeypatch.setattr(files, "PAUSES", (0.0,))
    samples = list(opened.read("00000"))
    assert content(samples[:3]) + content(samples[4:]) == EXPECTED[:3] + EXPECTED[4:]
    assert samples[3].problem == "unreachable"


# Tars


def test_img2dataset(tmp_path: Path):
    members = plain_members()
    write_tar(tmp_path / "00000.tar", members)
    write_table(tmp_path / "00000.parquet", [{"url": "u", "caption": "c", "key": "k"}])
    (tmp_path / "00000_stats.json").write_text("{}")
    samples = read(tmp_path)
    assert [(s.key, s.image, s.captions) for s in samples[:NUM]] == [
        (f"{i:09d}", PICTURES[i], {"alt": CAPTIONS[i]["alt"]}) for i in range(NUM)
    ]
    about = {"url": "https://a/3", "key": "000000003", "status": "success", "width": 8, "exif": "{}"}
    assert samples[3].about == about


def test_tars_are_grouped_as_webdataset_groups_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    from webdataset.tariterators import group_by_keys, tar_file_expander

    members = {
        "a/one.jpg": PICTURES[0],
        "a/one.txt": b"one",
        "a.b/two.seg.png": PICTURES[1],
        "a.b/two.JPG": PICTURES[2],
        "a.b/two.cls": b"3",
        "noext": b"",
        "__meta__/x.txt": b"",
        "three.0.png": b"",
        "three.png": PICTURES[3],
    }
    path = write_tar(tmp_path / "a.tar", members)
    with open(path, "rb") as file:
        theirs = [
            (group["__key__"], group.get("jpg") or group.get("png"))
            for group in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
        ]
    assert theirs == [("a/one", PICTURES[0]), ("a.b/two", PICTURES[2]), ("three", PICTURES[3])]
    assert [(s.key, s.image) for s in read(path)] == theirs


def test_junk_in_tars_is_passed_over(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [("d", tarfile.DIRTYPE), ("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE)]:
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
        for name, kind in [("e.jpg", tarfile.CHRTYPE), ("f.jpg", tarfile.FIFOTYPE)]:
            header = tarfile.TarInfo(name)
            header.type = kind
            tar.addfile(header)
        for name in ("._x.jpg", "__MACOSX/x.jpg", "./d/x.jpg", ".hidden/x.jpg"):
            header = tarfile.TarInfo(name)
            header.size = len(PICTURES[0])
            tar.addfile(header, io.BytesIO(PICTURES[0]))
    assert read(path) == [Sample("d/x", PICTURES[0], {}, {})]


def test_broken_groups_are_counted(tmp_path: Path):
    members = {
        "a.jpg": PICTURES[0],
        "a.json": b"{broken",
        "b.txt": b"no picture",
        "c.jpg": PICTURES[1],
        "c.txt": b"\xff\xfe",
        "d.gif": b"GIF89a",
        "a.txt": b"too late",
        "e.jpg": PICTURES[2],
        "e.txt": b"fine",
        "f.json": b"[" * 100_000,
        "g.jpg": PICTURES[3],
        "g.json": b'{"caption": "lone \\ud800", "wide": 1e999, "big": 99999999999999999999, "x": "\\udfff"}',
    }
    samples = read(write_tar(tmp_path / "a.tar", members))
    assert [(s.key, s.problem, s.image is not None) for s in samples] == [
        ("a", "", True),
        ("b", "no_image", False),
        ("c", "", True),
        ("d", "unsupported_format", False),
        ("a#2", "repeated_key", False),
        ("e", "", True),
        ("f", "no_image", False),
        ("g", "", True),
    ]
    assert (samples[0].about, samples[2].about) == ({"amiss": "json_broken"}, {"amiss": "caption_not_utf8"})
    assert samples[-1].captions == {"alt": "lone ?"}
    assert samples[-1].about == {"x": "?"}


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 1000)
    members = {"a.jpg": bytes(1001), "a.txt": b"a", "b.jpg": bytes(1000)}
    samples = read(write_tar(tmp_path / "a.tar", members))
    assert [(s.key, s.problem, len(s.image or b"")) for s in samples] == [("a", "too_large", 0), ("b", "", 1000)]


def test_keys_are_unique_within_a_part(tmp_path: Path):
    """So that what is dropped by its key later is no other picture."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, name in enumerate(["a.jpg", "a.txt", "a.jpg", "a.txt", "b.jpg", "a.jpg", "a#2.jpg"]):
            header = tarfile.TarInfo(name)
            header.size = len(PICTURES[number]) if "jpg" in name else 1
            tar.addfile(header, io.BytesIO(PICTURES[number] if "jpg" in name else b"1"))
    samples = read(tmp_path / "a.tar")
    problems = {"a": "", "a#2": "repeated_key", "b": "", "a#3": "repeated_key", "a#2#2": ""}
    assert {s.key: s.problem for s in samples} == problems
    assert (samples[0].image, samples[0].captions) == (PICTURES[0], {"alt": "1"})
    for folder, names in {"c": ["1.jpg", "1.png", "1.jpg.png"], "d": ["1.jpg"]}.items():
        (tmp_path / folder).mkdir()
        for number, name in enumerate(names):
            (tmp_path / folder / name).write_bytes(PICTURES[number])
    opened = source(tmp_path / "c", tmp_path / "d")
    parts = [[(s.key, s.problem) for s in opened.read(name)] for name in opened.names]
    assert parts == [[("1.jpg", ""), ("1.jpg#2", ""), ("1.png", "")], [("1", "")]]


def test_a_header_that_claims_terabytes_is_not_believed(tmp_path: Path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    path = tmp_path / "a.tar"
    whole = write_tar(path, plain_members(0, 2)).read_bytes()
    path.write_bytes(whole[: whole.rstrip(b"\0").__len__() // 512 * 512 + 512] + header.tobuf() + bytes(10240))
    assert [s.problem for s in read(path)] == ["", "tar_cut"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_cut_anywhere_is_counted_and_gives_nothing_half(suffix: str, tmp_path: Path):
    """At every 512 bytes and between: whole samples, exactly as they are, and then one that says that it was cut."""
    path = write_tar(tmp_path / f"a{suffix}", plain_members(0, 3), "w:gz" if suffix == ".tar.gz" else "w")
    content, whole = path.read_bytes(), read(path)
    assert [s.problem for s in whole] == ["", "", ""]
    end = len(content.rstrip(b"\0")) if suffix == ".tar" else len(content) - 40  # then zeros follow, and a checksum
    step = 256 if suffix == ".tar" else 13
    numbers = set()
    for size in [*range(0, end, step), *range(100, end, 3 * step)]:
        path.write_bytes(content[:size])
        *before, last = read(path)
        assert (last.key, last.image, last.problem) == (path.name, None, "tar_cut")
        assert before == whole[: len(before)]
        numbers.add(len(before))
    assert numbers >= {0, 1, 2}


def test_the_end_needs_two_blocks_of_zeros(tmp_path: Path):
    path = write_tar(tmp_path / "a.tar", plain_members(0, 2))
    content = path.read_bytes()
    end = -(-len(content.rstrip(b"\0")) // 512) * 512
    problems = {}
    for blocks in (0, 1, 2):
        path.write_bytes(content[: end + 512 * blocks])
        problems[blocks] = [s.problem for s in read(path)]
    assert problems == {0: ["", "tar_cut"], 1: ["", "tar_cut"], 2: ["", ""]}
    path.write_bytes(content[:end] + b"rubbish" * 1000)
    assert [s.problem for s in read(path)] == ["", "tar_cut"]


def test_what_is_no_tar(tmp_path: Path):
    (tmp_path / "a.tar").write_text("<html>Not found</html>" * 100)
    write_tar(tmp_path / "b.tar", plain_members(0, 1))
    assert [(s.key, s.problem) for s in read(tmp_path)] == [("a.tar", "not_a_tar"), ("000000000", "")]


# Captions


@pytest.mark.parametrize(
    ("files", "captions"),
    [
        ({"txt": "one\ntwo\r\n\n three "}, {"alt": "one", "alt_2": "two", "alt_3": "three"}),
        ({"txt": '["one", "two\\nlines"]'}, {"alt": "one", "alt_2": "two\nlines"}),
        ({"txt": "[sic] no list"}, {"alt": "[sic] no list"}),
        ({"txt": "\ufeffone", "caption": "two"}, {"alt": "one", "alt_2": "two"}),
        ({"txt": "one", "json": '{"caption": "one"}'}, {"alt": "one"}),
        ({"txt": "one\ntwo", "json": '{"caption": "one\\ntwo"}'}, {"alt": "one\ntwo"}),
        (
            {"txt": "one", "json": '{"caption": "two", "captions": ["one", "three"]}'},
            {"alt": "one", "alt_2": "two", "alt_3": "three"},
        ),
        ({"json": '{"captions": {"short": "s", "long": ["l", "m"]}}'}, {"short": "s", "long": "l", "long_2": "m"}),
        ({"json": '{"caption": null, "caption_similarity": 0.3}'}, {}),
        ({"txt": " \n "}, {}),
        ({}, {}),
    ],
)
@pytest.mark.parametrize("form", ["tar", "folder"])
def test_captions(files: dict[str, str], captions: dict[str, str], form: str, tmp_path: Path):
    members = {"a.jpg": PICTURES[0]} | {f"a.{suffix}": text.encode() for suffix, text in files.items()}
    if form == "tar":
        path = write_tar(tmp_path / "a.tar", members)
    else:
        path = tmp_path
        for name, content in members.items():
            (path / name).write_bytes(content)
    (sample,) = read(path)
    assert (sample.image, sample.captions, sample.problem) == (PICTURES[0], captions, "")
    if "similarity" in files.get("json", ""):
        assert sample.about == {"caption_similarity": 0.3}


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_captions_can_be_chosen(form: str, tmp_path: Path):
    members = {
        "a.jpg": PICTURES[0],
        "a.txt": b"tags",
        "a.long.txt": b"long",
        "a.json": b'{"caption": "web", "florence": "fine", "n": 1}',
    }
    path = tmp_path
    for name, content in members.items():
        (path / name).write_bytes(content)
    if form == "tar":
        (path / "sub").mkdir()
        path = write_tar(tmp_path / "sub/a.tar", members)
    (sample,) = read(path, captions=["long.txt", "florence"])
    assert sample.captions == {"long": "long", "florence": "fine"}
    assert sample.about == {"caption": "web", "n": 1}
    with pytest.raises(
        ValueError, match=r"source.captions=\['longer'\] names nothing.*extension of files.*: caption, florence, n$"
    ):
        read(path, captions=["longer"])


def test_columns_can_be_chosen(tmp_path: Path):
    rows = [
        {
            "img_a": PICTURES[0],
            "img_b": PICTURES[1],
            "caption": "c",
            "blip": ["b", "d"],
            "vector": [1.0, 2.0],
            "ok": True,
        }
    ]
    path = write_table(tmp_path / "a.parquet", rows)
    assert read(path, image="img_b", captions=["blip"]) == [
        Sample("000000000", PICTURES[1], {"blip": "b", "blip_2": "d"}, {"caption": "c", "ok": True})
    ]


# Folders


def test_folders_are_sorted_and_keys_are_unique(tmp_path: Path):
    names = ["b/1.jpg", "b/1.png", "B/2.webp", "a.b.jpg", "\u00e9.jpeg", "10.JPG", "9.jpg"]
    for hidden in (".git/x.jpg", "b/._1.jpg", "__MACOSX/b/1.jpg"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).touch()
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PICTURES[i])
    (tmp_path / "a.b.txt").write_text("dotted")
    (tmp_path / "b/1.caption").write_text("both")
    (tmp_path / "c.gif").touch()
    samples = read(tmp_path)
    keys = ["10", "9", "B/2", "a.b", "b/1.jpg", "b/1.png", "c", "\u00e9"]
    assert [s.key for s in samples] == keys
    assert [s.captions.get("alt") for s in samples] == [None, None, None, "dotted", "both", "both", None, None]
    assert [s.problem for s in samples] == [""] * 6 + ["unsupported_format", ""]
    assert [s.key for s in read(tmp_path / "*.jpg")] == ["9", "a.b"]
    assert [s.key for s in read(tmp_path / "[bB]")] == ["B/2", "b/1.jpg", "b/1.png"]
    assert read(tmp_path / "a.b.jpg")[0].captions == {"alt": "dotted"}
    assert source(tmp_path / "9*").digest != source(tmp_path / "a*").digest
    before = source(tmp_path / "9*").digest
    (tmp_path / "b/other.jpg").touch()
    (tmp_path / "notes.txt").touch()
    assert source(tmp_path / "9*").digest == before
    (tmp_path / "9.txt").write_text("new")
    assert source(tmp_path / "9*").digest != before


def test_links_are_followed_once_and_broken_ones_counted(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.jpg").write_bytes(PICTURES[0])
    (tmp_path / "linked").symlink_to("real")
    (tmp_path / "real/up").symlink_to("..")
    (tmp_path / "l.jpg").symlink_to("real/a.jpg")
    (tmp_path / "n.jpg").symlink_to("nowhere")
    (tmp_path / "o.jpg").symlink_to("o.jpg")
    assert [(s.key, s.problem) for s in read(tmp_path / "*.jpg")] == [
        ("l", ""),
        ("n", "missing_file"),
        ("o", "unreadable"),
    ]
    assert [(s.key, s.problem) for s in read(tmp_path)] == [
        ("l", ""),
        ("linked/a", ""),
        ("n", "missing_file"),
        ("o", "unreadable"),
        ("real/a", ""),
    ]


def test_a_picture_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, system = as_folder(tmp_path), type(fsspec.filesystem("file"))
    plain = system.cat_file

    def refuse(self: Any, name: str, *arguments: Any) -> bytes:
        if name.endswith("2.jpg"):
            raise PermissionError(13, "Permission denied", name)
        return plain(self, name, *arguments)

    monkeypatch.setattr(system, "cat_file", refuse)
    samples = read(path)
    assert [s.problem for s in samples] == ["", "", "unreadable", "", "", "", ""]
    assert samples[2].captions == CAPTIONS[2]


def test_names_that_are_not_utf8(tmp_path: Path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(PICTURES[0])
    (sample,) = read(tmp_path)
    assert (sample.key, sample.image) == ("?", PICTURES[0])


def test_a_folder_that_changes_is_refused(tmp_path: Path):
    opened = source(as_folder(tmp_path))
    assert len(list(opened.read("00000"))) == NUM
    pictures._album.cache_clear()  # as in another process
    (tmp_path / "0.jpg").unlink()
    with pytest.raises(ValueError, match=r"source.paths=\S+ has changed since it was opened; .* run again"):
        list(opened.read("00000"))


def test_imagefolder_as_the_library_reads_it(tmp_path: Path):
    import datasets

    path = as_imagefolder("csv", tmp_path)
    theirs: Any = datasets.load_dataset("imagefolder", data_dir=path, split="train", cache_dir=str(tmp_path / ".cache"))
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    expected = [(Path(row["image"]["path"]).read_bytes(), row["text"], row["n"]) for row in theirs]
    assert [(s.image, s.captions["alt"], s.about["n"]) for s in read(path)] == expected


def test_rows_and_pictures_of_an_imagefolder_that_lack_each_other(tmp_path: Path):
    as_imagefolder("jsonl", tmp_path)
    (tmp_path / "sub/0.jpg").unlink()
    (tmp_path / "sub/extra.jpg").write_bytes(PICTURES[0])
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write('\n{broken\n{"file_name": "../../secret.jpg", "text": "t"}\n')
    found = {s.key: s.problem for s in read(tmp_path)}
    assert found.pop("metadata.jsonl:8") == "row_broken"
    assert found.pop("../../secret") == "missing_file"
    assert found.pop("sub/0") == "missing_file"
    assert found == {f"sub/{name}": "" for name in [*map(str, range(1, NUM)), "extra"]}


# Tables


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_texts_may_be_gzipped(kind: str, tmp_path: Path):
    path = Path(as_paths(kind, tmp_path))
    packed = tmp_path / f"t.{kind}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert content(read(packed, part_size=3)) == EXPECTED
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"holds t.{kind}.gz, which cannot be read as .{kind} .*; fetch it again"):
        source(packed)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_broken_rows_do_not_stop_the_rest(kind: str, tmp_path: Path):
    path = Path(as_paths(kind, tmp_path))
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "2.jpg").mkdir()
    expected = ["", "missing_file", "unreadable", "", "", "", ""]
    if kind == "jsonl":
        lines = path.read_text().split("\n")
        path.write_text("\n".join([*lines[:4], "", "{broken", '"no object"', '{"image_path": 3}', *lines[4:]]))
        expected[4:4] = ["row_broken", "row_broken", "no_image"]
    elif kind == "csv":
        with open(path, "a") as file:
            file.write(f'too,few\n\n"{"x" * 200_000}",1,2,3,4\n0.jpg,a,1,b,c\n')
        path.write_bytes(path.read_bytes() + b"0.jpg,\xff,1,b,c\n")
        expected += ["row_broken", "row_broken", "", "row_broken"]
    for part_size in (2, 3, 10):
        assert [s.problem for s in read(path, part_size=part_size)] == expected


def test_a_broken_page_of_parquet_ends_its_row_group_alone(tmp_path: Path):
    rows = [{"image": picture(seed, "PNG"), "text": f"t{seed}"} for seed in range(12)]
    path = write_table(tmp_path / "a.parquet", rows, row_group_size=4, compression="zstd", use_dictionary=False)
    begin = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[begin + 10 : begin + 500] = b"\xff" * 490
    path.write_bytes(content)
    for part_size in (12, 5):
        samples = read(path, part_size=part_size)
        assert [s.problem for s in samples] == [""] * 4 + ["row_broken"] * 4 + [""] * 4
        assert [s.image for s in samples[8:]] == [row["image"] for row in rows[8:]]


def test_words_that_are_not_utf8_break_one_row(tmp_path: Path):
    texts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffc")]
    )
    pq.write_table(pa.table({"image": pa.array(PICTURES[:3]), "text": texts}), tmp_path / "a.parquet")
    assert [s.problem for s in read(tmp_path / "a.parquet")] == ["", "row_broken", ""]


def test_a_table_from_elsewhere_names_no_file_here(tmp_path: Path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(PICTURES[0])
    rows = [{"image_path": name} for name in (str(secret), "../secret.jpg", f"file://{secret}", "in.jpg")]
    table = "\n".join(map(json.dumps, rows)).encode()
    memory = fsspec.filesystem("memory")
    memory.pipe({"/away/t/a.jsonl": table, "/away/t/in.jpg": PICTURES[1], "/away/secret.jpg": PICTURES[2]})
    assert [s.problem for s in read("memory://away/t/a.jsonl")] == ["outside", "outside", "outside", ""]
    (tmp_path / "t").mkdir()
    (tmp_path / "t/a.jsonl").write_bytes(table)
    assert [s.problem for s in read(tmp_path / "t/a.jsonl")] == ["", "", "outside", "missing_file"]


# Several paths, the digest


def test_several_paths_join_in_order(tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    write_tar(tmp_path / "a/00000.tar", plain_members(4, 6))
    write_tar(tmp_path / "a/00001.tar", plain_members(0, 1))
    opened = source(tmp_path / "a/{00001,00000}.tar", as_folder(tmp_path / "b"), as_bytes(tmp_path / "c"), part_size=4)
    assert opened.names == ["00000", "00001", "00002", "00003", "00004", "00005"]
    images = [sample.image for name in opened.names for sample in opened.read(name)]
    assert images == [PICTURES[0], *PICTURES[4:6], *PICTURES, *PICTURES]
    assert next(opened.read("00005")).key == "000050000"


@pytest.mark.parametrize("form", ["tar", "folder", "parquet of bytes", "paths csv", "datasets"])
def test_the_digest_is_of_names_and_sizes(form: str, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (source(FORMS[form](tmp_path / name)).digest for name in ("a", "b"))
    assert first == second  # wherever it lies and whenever it was written
    for path in (tmp_path / "b").iterdir():
        os.utime(path, (1, 1))
    again = str(tmp_path / "b") if form in ("folder", "datasets") else FORMS[form](tmp_path / "b")
    again = f"datasets:{again}" if form == "datasets" else again
    assert source(again).digest == first
    assert source(again, part_size=3).digest != first
    file = max((tmp_path / "b").iterdir())
    file.write_bytes(file.read_bytes() + b"\n") if form != "parquet of bytes" else write_table(file, [{"image": b"1"}])
    if form != "datasets":
        assert source(again).digest != first


# Refusals


def test_refusals_of_paths(tmp_path: Path):
    as_folder(tmp_path)
    write_table(tmp_path / "empty.csv", [{"image_path": "x"}]).write_text("image_path,text\n")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "a.xls").touch()
    (tmp_path / "bad.parquet").write_text("no parquet at all")
    (tmp_path / "void").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").touch()
    (tmp_path / "notes/b.md").touch()
    for paths, message in {
        (): r"source.paths=\[\] names no pictures; give tars, folders or tables",
        ("nowhere/*.tar",): r"source.paths=\S+nowhere/\*.tar matches no file; check the path",
        ("{00000..00002}.tar",): r"source.paths=\S+00000.tar matches no file",
        ("{00000..}}.tar",): r"source.paths=\S+{00000..}}.tar matches no file; .* quote \* and braces",
        ("void",): r"source.paths=\S+void matches no file",
        ("a.xls",): r"source.paths=\S+a.xls is of an unsupported kind; give one of .tar, .*, parquet, jsonl, csv, tsv",
        ("notes",): r"source.paths=\S+notes holds no pictures; give one of",
        ("empty.csv",): r"source.paths=\S+empty.csv is a table without rows",
        ("empty.parquet",): r"source.paths=\S+empty.parquet is a table without rows",
        ("none.jsonl",): r"source.paths=\S+none.jsonl is a table without rows",
        ("bad.parquet",): r"source.paths=\S+ holds bad.parquet, which cannot be read as .parquet .*; fetch it again",
        ("",): r"source.paths=\S+ holds both pictures \(0.jpg\) and .* table \(bad.parquet\).*\*.parquet",
    }.items():
        with pytest.raises(ValueError, match=message):
            source(*(tmp_path / path for path in paths))
    write_tar(tmp_path / "x.tar", {})
    with pytest.raises(
        ValueError, match=r"source.paths=\S+ holds both pictures \(0.jpg\) and .* tar .*\(x.tar\).*/\*.tar"
    ):
        source(tmp_path)
    with pytest.raises(
        ValueError, match=r"source.image=jpg chooses a column, and source.paths are no tables; leave it out"
    ):
        source(tmp_path / "x.tar", image="jpg")
    with pytest.raises(ValueError, match=r"source.part_size=0 must be at least 1; 10000 is usual"):
        SourceConfig(part_size=0)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_refusals_of_tables(kind: str, tmp_path: Path):
    path = write_table(tmp_path / f"a.{kind}", [{"url": "https://a/b.jpg", "caption": "c", "n": 1}])
    with pytest.raises(ValueError, match=r"pictures by address alone, in the column url, .*; use pipeline=web"):
        source(path)
    write_table(path, [{"image": "https://a/b.jpg", "caption": "c"}])
    with pytest.raises(ValueError, match=r"pictures by address alone, in the column image, .*; use pipeline=web"):
        source(path)
    with pytest.raises(ValueError, match=r"pictures by address alone, in the column image, .*; use pipeline=web"):
        source(path, image="image")
    write_table(path, [{"photo": "b.jpg", "caption": "c"}])
    with pytest.raises(
        ValueError, match=r"source.paths=\S+ has no column of images .*source.image= .*: photo, caption$"
    ):
        source(path)
    with pytest.raises(ValueError, match=r"source.image=foto is no column of \S+; .*there are: photo, caption$"):
        source(path, image="foto")
    with pytest.raises(ValueError, match=r"source.captions=texts is no column of \S+; .*there are: photo, caption$"):
        source(path, image="photo", captions=["texts"])
    assert [s.problem for s in read(path, image="photo")] == ["missing_file"]


def test_refusals_of_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"source.paths=http://127.0.0.1:1/a.tar matches no file \(.*Connect call failed"
    ):
        source("http://127.0.0.1:1/a.tar")
    with pytest.raises(ValueError, match=r"source.paths=foo://a.tar cannot be opened: Protocol not known: foo; use"):
        source("foo://a.tar")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_walk", refuse)
        with pytest.raises(
            ValueError, match=r"source.paths=/elsewhere/a.tar cannot be read \(denied\); check your rights to it"
        ):
            source("/elsewhere/a.tar")
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"source.paths=s3://bucket/a.tar cannot be opened: Install s3fs to access S3"):
        source("s3://bucket/a.tar")
    with pytest.raises(ValueError, match=r"source.paths=datasets:\S+ cannot be opened .*; check its name and split"):
        source(f"datasets:{tmp_path}/nowhere")
    as_struct(tmp_path)
    with pytest.raises(
        ValueError, match=r"source.paths=datasets:\S+:tst cannot be opened .*tst.*; check its name and split"
    ):
        source(f"datasets:{tmp_path}:tst")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"source.paths=datasets:x needs the library datasets; pip install datasets"):
        source("datasets:x")


def refuse(*_: Any) -> None:
    raise PermissionError("denied")


def test_nothing_is_run_by_a_path(tmp_path: Path):
    with pytest.raises(ValueError, match=r"source.paths=pipe:touch \S+ matches no file"):
        source(f"pipe:touch {tmp_path}/run.tar")
    assert not list(tmp_path.iterdir())
