"""Encoding: each latent is that of its picture, nothing is lost unaccounted for, and the bytes are always the same."""

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import fit, nearest
from data.decode import MAX_PIXELS, decode
from data.files import sha256
from data.reader import ShardReader
from data.shards import load_table
from models.autoencoder import AutoencoderConfig
from models.text import TextConfig
from prepare import encode as module
from prepare.encode import EncodeConfig, TextStates, encode, sizes
from prepare.filter import FilterConfig
from prepare.parts import Part, dropped, finished, run_step
from prepare.sources import Sample, SourceConfig, open_source

ASSETS = str(Path(__file__).parents[2] / "assets/shapes")
VAE, TEXT = AutoencoderConfig(path=ASSETS), TextConfig(path=ASSETS)


def row(key: str, image: bytes | None, captions: Any = None, about: Any = None, problem: str = "") -> Sample:
    return Sample(key, image, {"alt": "a red circle"} if captions is None else captions, about or {}, problem)


@dataclass(slots=True)
class Rows:
    """As `prepare.sources.Source`: the rows of each part. With `bomb`, a file, its process is killed in part 00001."""

    parts: dict[str, list[Sample]]
    bomb: str = ""

    @property
    def names(self) -> list[str]:
        return list(self.parts)

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.parts).encode()).hexdigest()

    def read(self, name: str) -> Iterator[Sample]:
        for number, sample in enumerate(self.parts[name]):
            if self.bomb and not Path(self.bomb).exists() and (name, number) == ("00001", 5):
                Path(self.bomb).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield deepcopy(sample)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Soft coloured blobs: what resizing hardly changes."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


ODD = [
    file(picture(64, 64)),
    file(picture(100, 130, 1), "JPEG"),
    file(picture(60, 120, 2).resize((300, 150)), "WEBP"),
    file(picture(140, 100, 3), exif=turned()),
    file(picture(128, 90, 4).quantize(32)),
    file(picture(90, 128, 5).convert("L"), "JPEG"),
    file(picture(99, 101, 6).convert("RGBA").rotate(30)),  # transparent corners
    file(picture(70, 270, 7), "JPEG"),
    file(picture(270, 70, 8), "JPEG"),
]


def rows(part: int, count: int = 20) -> list[Sample]:
    found = []
    for n in range(count):
        captions = {"alt": f"a {('red', 'blue')[n % 2]} circle", "long": f"picture {n % 7} of part {part}"}
        about = {"url": f"https://example.com/{n}", "aesthetic_score": 5.5, "width": 1} if n % 3 else {}
        found.append(row(f"{part:05d}{n:04d}", ODD[(n * 5 + part) % len(ODD)], captions, about))
    return found


SOURCE = Rows({f"{part:05d}": rows(part) for part in range(3)})


def make(folder: Path, source: Any = SOURCE, *, resolution: int = 64, **options: Any) -> Any:
    config = {name: options.pop(name) for name in list(options) if name in EncodeConfig.__dataclass_fields__}
    options = {"vae": VAE} | options
    return encode(EncodeConfig(**{"batch": 4, "step": 8} | config), source, folder, resolution=resolution, **options)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def latents(reader: ShardReader, name: str = "latent") -> list[np.ndarray]:
    found: list[np.ndarray] = [np.empty(0)] * len(reader)
    for number, bucket in enumerate(reader.buckets):
        for row in reader.rows_of(number):
            found[row] = np.empty(bucket.shape, np.float16)
            assert reader.read(name, np.array([row]), [found[row]]) == [None]
    return found


def pixels_of(content: bytes, step: int = 8) -> torch.Tensor:
    image = decode(content)
    array, _ = fit(image, nearest(image.height, image.width, sizes(EncodeConfig(step=step), 64, 8)))
    return torch.from_numpy(array)[None].permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: read only."""
    folder = tmp_path_factory.mktemp("encode") / "64"
    told: list[int] = []
    tally = make(folder, flip=True, std=True, text=TEXT, text_states=TextStates.float16, tick=told.append)
    assert (tally.given, tally.kept, sum(told)) == (60, 60, 60)
    return folder


# --- what the shards hold -----------------------------------------------------------------------------------


def test_latents_are_the_autoencoder_s_of_the_same_pixels(made):
    reader, vae = ShardReader(made, verify=True), VAE.build()
    arrays = {name: latents(reader, name) for name in ("latent", "flip", "std")}
    given = [sample for part in SOURCE.parts.values() for sample in part]
    for n, sample in enumerate(given):
        assert sample.image
        pixels = pixels_of(sample.image)
        mean, std = vae.moments(pixels)
        for name, expected in {"latent": mean, "flip": vae.encode(pixels.flip(-1)), "std": std}.items():
            assert arrays[name][n] == pytest.approx(expected[0].numpy(), abs=4e-3, rel=2e-3), (name, n)


def test_records_are_in_order_and_say_what_they_are(made):
    reader = ShardReader(made)
    given = [sample for part in SOURCE.parts.values() for sample in part]
    for n, sample in enumerate(given):
        record, image = reader.record(n), decode(sample.image)
        bucket = nearest(image.height, image.width, sizes(EncodeConfig(step=8), 64, 8))
        known = {"aesthetic": 5.5, "url": sample.about["url"]} if sample.about else {}
        assert record == known | {
            "key": sample.key,
            "captions": sample.captions,
            "original_size": [image.height, image.width],
            "crop": list(fit(image, bucket)[1]),
        }
    sizes_seen = {(bucket.height, bucket.width) for bucket in reader.buckets}
    assert {(64, 64), (56, 72), (32, 120), (120, 32)} <= sizes_seen
    assert reader.index["vae"]["id"] == VAE.build().info()["id"]
    assert reader.num_classes is None


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_text_states_are_those_of_each_caption_once(made, tmp_path, dtype):
    folder = made
    if dtype == "int8":
        folder = tmp_path / "64"
        make(folder, text=TEXT, text_states=TextStates.int8)
    reader, text = ShardReader(folder, verify=True), TEXT.build()
    captions = sorted(
        {caption for part in SOURCE.parts.values() for sample in part for caption in sample.captions.values()}
    )
    found, (states, mask, pooled) = reader.texts(captions), text.encode(captions)
    longest = found.states.shape[1]
    assert np.array_equal(found.mask, mask[:, :longest])
    assert not mask[:, longest:].any()
    shown = found.states.astype(np.float32)
    bound: Any = 2e-3 * np.abs(states.numpy()).max()
    if dtype == "int8":
        group = shown.shape[2] // found.scale.shape[2]
        shown *= np.repeat(found.scale.astype(np.float32), group, 2)
        bound = 0.51 * np.repeat(found.scale.astype(np.float32), group, 2)  # half a step of the group
    expected = np.where(found.mask[..., None], states[:, :longest], 0)
    assert (np.abs(shown - expected) <= bound + 1e-4).all()
    assert found.pooled == pytest.approx(pooled.numpy(), abs=5e-3, rel=2e-3)
    for name, part in SOURCE.parts.items():
        distinct = {caption for sample in part for caption in sample.captions.values()}
        assert len(load_table(folder / f"{name}.npz").texts) == len(distinct) < 2 * len(part)


def test_without_buckets_all_are_squares(tmp_path):
    make(tmp_path / "64", buckets=False)
    reader = ShardReader(tmp_path / "64")
    assert [(bucket.height, bucket.width, bucket.count) for bucket in reader.buckets] == [(64, 64, 60)]


def test_classes_are_counted_where_all_have_one(tmp_path):
    part = [row(str(n), ODD[0], {}, {"class_id": n % 4}) for n in range(6)]
    make(tmp_path / "a", Rows({"00000": part}), uncaptioned=True)
    reader = ShardReader(tmp_path / "a")
    assert reader.num_classes == 4
    assert [reader.record(n)["class_id"] for n in range(6)] == [0, 1, 2, 3, 0, 1]
    make(tmp_path / "b", Rows({"00000": [*part, row("last", ODD[0], {}, {"class_id": "cat"})]}), uncaptioned=True)
    assert ShardReader(tmp_path / "b").num_classes is None


# --- what is left out, and why ------------------------------------------------------------------------------


def png16() -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64 * 385))) + chunk(b"IEND", b"")


FAULTS = {
    "broken": ODD[1][: len(ODD[1]) // 2],
    "not_an_image": b"<html>",
    "animated": file(picture(64, 64), save_all=True, append_images=[picture(64, 64, 1)]),
    "cmyk": file(picture(64, 64).convert("CMYK"), "JPEG"),
    "sixteen_bit": png16(),
    "too_many_pixels": file(Image.new("RGB", (600, 600))),
    "zero_size": b"",
}
UNASKED = {"too_wide": file(picture(64, 300)), "too_small": file(picture(63, 64))}


def test_every_fault_is_counted_by_name(tmp_path):
    bad = [row(reason, content) for reason, content in (FAULTS | UNASKED).items()]
    bad += [row("no_caption", ODD[0], {"alt": "  "}), row("http_404", None, problem="http_404"), row("none", None)]
    mixed = [sample for pair in zip(bad, rows(0, len(bad)), strict=True) for sample in pair]
    tally = make(tmp_path / "64", Rows({"00000": mixed}), max_pixels=300_000, max_faults=0.5)
    reasons = {sample.key: sample.key for sample in bad} | {"none": "no_image"}
    assert dropped(tmp_path / "64", "00000") == reasons
    assert tally.dropped == Counter(reasons.values())
    assert (tally.given, tally.kept, tally.faults) == (len(mixed), len(bad), len(FAULTS) + 2)
    reader = ShardReader(tmp_path / "64", verify=True)
    assert [reader.record(n)["key"] for n in range(len(reader))] == [sample.key for sample in rows(0, len(bad))]
    with pytest.raises(ValueError, match=r"9 of 24 rows failed .* more than encode.max_faults=0.1"):
        make(tmp_path / "strict", Rows({"00000": mixed}), max_pixels=300_000)


def test_small_pictures_are_enlarged_when_asked(tmp_path):
    source = Rows({"00000": [row("small", UNASKED["too_small"])]})
    assert make(tmp_path / "64", source, upscale=True).kept == 1
    with pytest.raises(ValueError, match=r"64b has no pictures: of 1 none was kept \(too_small 1\)"):
        make(tmp_path / "64b", source)


def test_what_is_amiss_with_the_words_is_noted(tmp_path):
    tally = make(tmp_path / "64", Rows({"00000": [row("odd", ODD[0], about={"amiss": "caption_not_utf8"}), *rows(0)]}))
    assert (tally.kept, tally.noted, tally.faults) == (21, {"caption_not_utf8": 1}, 1)


def test_a_folder_of_pictures_is_a_source(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n, content in enumerate(ODD):
        (pictures / f"{n}.png").write_bytes(content)
        (pictures / f"{n}.txt").write_text(f"caption {n}\n")
    make(tmp_path / "64", open_source(SourceConfig(paths=[str(pictures)], part_size=4)))
    reader = ShardReader(tmp_path / "64", verify=True)
    assert [reader.record(n)["captions"] for n in range(len(ODD))] == [{"alt": f"caption {n}"} for n in range(len(ODD))]
    assert len(reader.index["shards"]) == 3


def test_a_part_may_be_empty(tmp_path):
    parts = {"00000": [row("small", UNASKED["too_small"])], "00001": rows(1), "00002": []}
    make(tmp_path / "64", Rows(parts), text=TEXT, text_states=TextStates.float16)
    assert len(ShardReader(tmp_path / "64", verify=True)) == 20


def drop_some(keys: list[str], part: Part) -> None:
    for key in keys:
        part.drop(key, "duplicate")


def write_captions(lines: dict[str, dict[str, str]], part: Part) -> None:
    text = "".join(json.dumps({"key": key, "captions": c, "model": "m"}) + "\n" for key, c in lines.items())
    part.path(".jsonl").write_text(text)
    part.drop("000000003", "broken")


def test_duplicates_are_skipped_and_written_captions_added(tmp_path):
    source = Rows({"00000": [*rows(0, 6), row("bare", ODD[0], {})]})
    gone = ["000000001", "000000004"]
    run_step(tmp_path / "dedup", source.names, partial(drop_some, gone), recipe={})
    with pytest.raises(ValueError, match="the step captions was not run"):
        make(tmp_path / "64", source, captions=tmp_path / "captions")
    lines = {"000000000": {"short": "of the model", "alt": "better"}, "bare": {"short": "bare"}}
    run_step(tmp_path / "captions", source.names, partial(write_captions, lines), recipe={})
    tally = make(tmp_path / "64", source, left_out=tmp_path / "dedup", captions=tmp_path / "captions")
    assert (tally.given, tally.kept) == (4, 4)
    reader = ShardReader(tmp_path / "64")
    captions = {record["key"]: record["captions"] for record in map(reader.record, range(4))}
    assert captions["000000000"] == rows(0)[0].captions | lines["000000000"]
    assert captions["bare"] == {"short": "bare"}
    assert list(captions) == ["000000000", "000000002", "000000005", "bare"]
    recipe = finished(tmp_path / "64")["recipe"]
    assert recipe["left_out"] == finished(tmp_path / "dedup")["digest"]
    assert recipe["captions"] == finished(tmp_path / "captions")["digest"]


def test_filters_ask_the_source_and_else_the_file(tmp_path):
    removed = tmp_path / "removed.txt"
    removed.write_text(hashlib.sha256(ODD[3]).hexdigest() + "\n")
    part = [
        row("kept", ODD[1]),
        row("unsafe", ODD[1], about={"punsafe": 0.9}),
        row("too_small", ODD[0]),  # 64 pixels, which only its header says
        row("said", ODD[0], about={"width": 500, "height": 500}),
        row("banned_word", ODD[1], {"alt": "a secret thing"}),
        row("removed", ODD[3]),
    ]
    filters = FilterConfig(min_side=90, banned_words=["secret"], removed=[str(removed)])
    tally = make(tmp_path / "64", Rows({"00000": part}), filters=filters)
    ended = ("unsafe", "too_small", "banned_word", "removed")
    assert dropped(tmp_path / "64", "00000") == {key: key for key in ended}
    assert (tally.kept, tally.faults) == (2, 0)


# --- always the same bytes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(made, tmp_path):
    options = {"flip": True, "std": True, "text": TEXT, "text_states": TextStates.float16}
    told: list[int] = []
    make(tmp_path / "64", processes=2, tick=told.append, **options)
    assert hashes(tmp_path / "64") == hashes(made)
    assert sum(told) == 60


@pytest.mark.slow
def test_a_killed_step_ends_in_the_same_bytes(tmp_path):
    """Killed by SIGKILL in the middle of the second of three parts, then run again."""
    program = f"""
from pathlib import Path
from tests.prepare.test_encode import SOURCE, Rows, make
make(Path({str(tmp_path / "killed")!r}), Rows(SOURCE.parts, bomb={str(tmp_path / "bomb")!r}))
"""
    command = [sys.executable, "-c", program]
    first = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert {path.name for path in (tmp_path / "killed").glob("00*.tar*")} == {"00000.tar", "00001.tar.tmp"}
    began = (tmp_path / "killed/00000.tar").stat().st_mtime_ns
    again = Rows(SOURCE.parts)
    make(tmp_path / "killed", again)
    assert (tmp_path / "killed/00000.tar").stat().st_mtime_ns == began
    make(tmp_path / "whole", again)
    whole = hashes(tmp_path / "whole")
    assert hashes(tmp_path / "killed") == whole
    (tmp_path / "killed/index.json").unlink()  # killed before the index was there
    make(tmp_path / "killed", again)
    assert hashes(tmp_path / "killed") == whole


def test_a_finished_set_is_left_alone_and_no_other_put_over_it(made):
    options = {"flip": True, "std": True, "text": TEXT, "text_states": TextStates.float16}
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert make(made, **options).kept == 60
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    for change, message in (
        ({"flip": False}, "encode.flip=True, not False"),
        ({"step": 16}, r"encode.buckets=\[\[32, 128\].*, not"),
        ({"text_states": TextStates.int8}, "encode.text_states=.*'float16'.*, not .*'int8'"),
        ({"batch": 5}, "encode.batch=4, not 5"),
        ({"source": Rows({"00000": rows(0)})}, "encode.input="),
        ({"filters": FilterConfig()}, "encode.filters=None, not"),
    ):
        with pytest.raises(ValueError, match=message):
            make(made, **options | change)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batches_keep_the_order_and_what_waits_is_bounded(monkeypatch, batch):
    monkeypatch.setattr(module, "WINDOW", 60)
    draw = np.random.default_rng(batch)
    shapes = [(8 * int(n), 8) for n in draw.choice(6, 500, p=[0.5, 0.3, 0.17, 0.01, 0.01, 0.01])]
    pictures = [module._Picture(key=str(n), size=size) for n, size in enumerate(shapes)]
    for n in draw.choice(500, 50, replace=False):
        pictures[n].reason = "too_small"
    taken, batches = [], []

    def incoming() -> Iterator[Any]:
        for picture in pictures:
            taken.append(picture)
            yield picture

    def add_latents(group: list[Any]) -> None:
        batches.append(len(group))
        assert len({picture.size for picture in group}) == 1
        for picture in group:
            assert picture.waits
            picture.arrays = {"latent": np.zeros(1)}

    given = []
    for picture in module._batched(incoming(), add_latents, batch):
        assert not picture.waits
        given.append(picture)
        assert len(taken) - len(given) <= 60
    assert given == pictures
    assert max(batches) == batch
    assert np.mean(batches) > 0.7 * batch  # what is rare does not break the batches of what is not


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolutions": []}, r"encode.resolutions=\[\] must be one or several"),
        ({"resolutions": [64, 64]}, r"encode.resolutions=\[64, 64\] must be one or several different"),
        ({"step": 0}, "encode.step=0 must be at least 1"),
        ({"max_aspect": 0.5}, "encode.max_aspect=0.5 is below 1"),
        ({"max_pixels": 10**9}, "encode.max_pixels=1000000000 must be within 1 to 89478485"),
        ({"batch": 0}, "encode.batch=0 must be at least 1"),
        ({"max_faults": 1.5}, "encode.max_faults=1.5 is a share"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        EncodeConfig(**changes)


@pytest.mark.parametrize(
    ("config", "resolution", "message"),
    [
        ({"step": 12}, 64, "encode.step=12 is not a multiple of 8, the autoencoder's factor; choose for instance 16"),
        ({"step": 24}, 64, "encode.resolutions has 64, which is not a multiple of 24, encode.step; .* instance 72"),
        ({"step": None}, 100, "encode.resolutions has 100, which is not a multiple of 16, encode.step; .* 96"),
        ({"buckets": False}, 100, "has 100, which is not a multiple of 8, the autoencoder's factor; .* 96"),
        ({"text_states": TextStates.int8}, 64, "encode.text_states=int8 needs text encoders"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, config, resolution, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "set", resolution=resolution, **config)
    assert not (tmp_path / "set").exists()


def test_steps_that_nobody_chose():
    """64 from 512 px on, an eighth below, at least two cells, and always a divisor of the resolution."""
    chosen = {64: 16, 128: 16, 256: 32, 320: 32, 336: 16, 512: 64, 768: 64, 960: 64, 1024: 64}
    for resolution, step in chosen.items():
        buckets = sizes(EncodeConfig(), resolution, 8)
        assert (resolution, resolution) in buckets
        assert np.gcd.reduce(np.array(buckets).ravel()) % step == 0
        assert buckets == sizes(EncodeConfig(step=step), resolution, 8)
    assert sizes(EncodeConfig(buckets=False), 64, 8) == [(64, 64)]


def test_the_defaults_are_those_of_decoding():
    assert EncodeConfig().max_pixels == MAX_PIXELS
    assert module.PILLOW_LIMIT == Image.MAX_IMAGE_PIXELS
