"""From a table of URLs to training, with real parts: a hostile server, a captioner, the tiny encoders, 20 steps.

Every row of the table is accounted for, and a preparation that is killed over and over ends in the same bytes.
"""

import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.schema import compose, compose_preparation
from data import shapes
from data.loader import Batches, DataConfig, open_shards
from data.reader import ShardReader
from prepare.parts import dropped, finished
from prepare.pipeline import Step, prepare, report
from tests.prepare.captioner import Asked, Captioner, describe
from tests.prepare.hostile import Hostile, tagged
from training.run import run

ROWS = 500
TROUBLE = {  # paths of the hostile server, and what is to be said of them
    "/to/private": "refused_address",
    "/to/metadata": "refused_address",
    "/to/loopback": "refused_address",
    "/to/file": "refused_scheme",
    "/to/loop": "too_many_redirects",
    "/endless/chunked": "too_many_bytes",
    "/endless/length": "too_many_bytes",
    "/bomb.png": "too_many_pixels",
    "/missing.jpg": "http_404",
    "/slow.jpg": "timeout",
    "/page.jpg": "not_an_image",
    "/cut.jpg": "body_cut",
    "/flat.png": "zero_size",
    tagged("noai"): "robots",
}
SIZES = [(96, 96), (128, 96), (96, 128), (144, 96)]  # width, height


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def drawn(index: int) -> Image.Image:
    return Image.fromarray(shapes.render(shapes.scene(0, index), 96)).resize(SIZES[index % 4])


def odd_pictures() -> dict[str, tuple[bytes, str]]:
    """Files that a server gives as pictures and that nobody can train on, and what is to be said of them."""
    whole, first, second = encoded(drawn(901), "JPEG"), drawn(902), drawn(903)
    deep = Image.fromarray(np.arange(96 * 96, dtype=np.uint16).reshape(96, 96))
    return {
        "/cut-inside.jpg": (whole[: len(whole) // 2], "broken"),
        "/cmyk.jpg": (encoded(first.convert("CMYK"), "JPEG"), "cmyk"),
        "/deep.png": (encoded(deep, "PNG"), "sixteen_bit"),
        "/moving.png": (encoded(first, "PNG", save_all=True, append_images=[second]), "animated"),
    }


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The servers, and a table of 500 rows, of which some 430 lead to a picture."""
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    pictures, rows, fates = {}, [], Counter()
    odd = odd_pictures()

    def row(url: str, fate: str, index: int, **about: Any) -> None:
        fates[fate] += 1
        alt = shapes.captions(shapes.scene(0, index), 0, index)["short"]
        rows.append({"URL": url, "TEXT": alt, "WIDTH": 640, "HEIGHT": 480, "punsafe": 0.01, "pwatermark": 0.1} | about)

    with Hostile(pictures, drip=1.0) as server:
        for path, fate in TROUBLE.items():
            row(server.url(path), fate, len(rows))
        for path, (content, fate) in odd.items():
            server.pictures[path] = content
            row(server.url(path), fate, len(rows))
        row("ftp://example.com/a.jpg", "not_http", 0)
        row("", "no_url", 0)
        for i in range(10):
            row(server.url(f"/unsafe/{i}.jpg"), "unsafe", i, punsafe=0.9)
            row(server.url(f"/small/{i}.jpg"), "too_small", i, WIDTH=40)
        for i in range(12):  # the same picture under another address
            server.pictures[f"/copy/{i}.jpg"] = encoded(drawn(i), "JPEG")
            row(server.url(f"/copy/{i}.jpg"), "duplicate", i)
        for i in range(ROWS - len(rows) - 5):
            suffix = list(kinds)[i % 3] if i >= 12 else "jpg"
            server.pictures[f"/good/{i}.{suffix}"] = encoded(drawn(i), kinds[suffix])
            row(server.url(f"/good/{i}.{suffix}"), "kept", i)
        for i in range(5):
            row(server.url(f"/good/{20 + i}.{list(kinds)[(20 + i) % 3]}"), "repeated_url", i)
        random.Random(0).shuffle(rows)
        table = tmp_path_factory.mktemp("web") / "table.parquet"
        pq.write_table(pa.Table.from_pylist(rows), table)

        def refuse(asked: Asked) -> str | None:  # a few pictures, whatever is asked about them
            return "refusal" if int(asked.digest, 16) % 40 == 0 else None

        with Captioner(describe, misbehave=refuse) as captioner:
            yield {"table": table, "server": server, "captioner": captioner, "fates": fates}
            assert not captioner.wrong


def options(web: dict[str, Any], out: Path) -> list[str]:
    server, captioner = web["server"], web["captioner"]
    return [
        f"out={out}",
        f"source.paths=[{web['table']}]",
        "steps=[metadata,filter,download,dedup,caption,encode]",
        "metadata.captions={}",
        f"download.allow_hosts=['{server.host}:{server.port}']",
        "download.timeout=1.5",
        "download.retries=0",
        "download.max_bytes=1000000",
        "download.backoff=0.05",
        "dedup.distance=null",
        f"caption.url={captioner.url}",
        f"caption.model={captioner.model}",
        "caption.concurrency=16",
        "caption.retries=1",
        "encode.resolutions=[64]",
        "encode.flip=true",
        "encode.text_states=int8",
    ]


@pytest.fixture(scope="module")
def prepared(web, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("prepared") / "set"
    return out, prepare(compose_preparation(options(web, out)))


def test_every_row_is_accounted_for(web, prepared):
    out, about = prepared
    steps = {step["step"]: step for step in about["steps"]}
    assert list(steps) == ["metadata", "filter", "images", "dedup", "captions", "64"]
    assert steps["metadata"]["given"] == ROWS
    names = list(steps)
    for before, after in pairwise(names):
        assert steps[after]["given"] == steps[before]["kept"]
    ended = sum((Counter(step["dropped"]) for step in steps.values()), Counter())
    assert ended + Counter(kept=steps["64"]["kept"]) == web["fates"]
    keys = [key for name in names for key in dropped(out / name, "00000")]
    reader = ShardReader(out / "64", verify=True)
    keys += [reader.record(row)["key"] for row in range(len(reader))]
    assert sorted(keys) == [f"{row:09d}" for row in range(ROWS)]
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(about))


def test_nothing_was_taken_that_should_not_be(web, prepared):
    server = web["server"]
    assert max(server.sent[path] for path in ("/endless/chunked", "/endless/length")) < 20_000_000
    assert server.asked("/unsafe/3.jpg") == server.asked("/small/3.jpg") == 0  # filtered before anything was fetched


def test_records_hold_what_was_found(web, prepared):
    """Pictures, their words, old and new, and the states of those words."""
    out, _ = prepared
    reader = ShardReader(out / "64")
    assert {(bucket.height, bucket.width) for bucket in reader.buckets} >= {(64, 64), (48, 80), (80, 48)}
    assert reader.index["captions"]["alt"] == len(reader)
    refused = finished(out / "captions")["tally"]["noted"]
    assert sum(refused.values()) >= 1  # these go on with their alt text
    assert reader.index["captions"]["long"] >= len(reader) - sum(refused.values())
    record = reader.record(0)
    assert record["captions"]["long"].startswith("A")
    assert record["original_size"] in [[height, width] for width, height in SIZES]
    config = DataConfig(path=str(out / "64"), resolution=64, flip=True, text_states=True)
    sizes = {"batch_size": 8, "micro_batch": 8}
    for batch in Batches(config, open_shards(config), 0, start=0, stop=800, **sizes).loader():
        assert batch.valid.all()


def test_a_run_trains_on_it(prepared, tmp_path):
    out, _ = prepared
    where = ["name=run", f"outputs={tmp_path}", "data=shards", f"data.path={out / '64'}", "data.resolution=64"]
    data = ["data.workers=0", "data.flip=true", "data.text_states=true", "data.caption_weights={alt: 0.2, long: 0.8}"]
    clocks = ["train.images=160", "train.batch_size=8", "train.log_every=8", "sample.every=100000", "sample.first=160"]
    model = [
        "model=pixart_tiny",
        "model.hidden=32",
        "model.depth=2",
        "model.heads=2",
        "model.patch_size=2",
        "sampler.steps=2",
    ]
    run(compose("stage3", [*where, *data, *clocks, *model]))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 20
    assert np.isfinite(losses).all()
    assert (tmp_path / "run/samples/000000160.png").exists()


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_command_again_does_nothing(web, prepared):
    out, about = prepared
    before, asked = contents(out), len(web["server"].requests)
    assert prepare(compose_preparation(options(web, out))) == about
    assert contents(out) == before
    assert len(web["server"].requests) == asked


def test_one_step_at_a_time(web, prepared, tmp_path):
    config = compose_preparation(options(web, tmp_path / "set"))
    with pytest.raises(ValueError, match=r"the step filter was not run: .*; run it first"):
        prepare(config, Step.download)
    for step in (Step.metadata, Step.filter):
        prepare(config, step)
    assert [step["step"] for step in report(config)["steps"]] == ["metadata", "filter"]
    changed = compose_preparation([*options(web, tmp_path / "set"), "filter.max_unsafe=0.5"])
    with pytest.raises(
        ValueError, match=r"was made with filter.max_unsafe=0.1, not 0.5; choose another out=, or delete"
    ):
        prepare(changed)


@pytest.mark.slow
def test_killed_in_every_step_and_started_again(web, prepared, tmp_path):
    """SIGKILL at a random moment of each step; what comes out is the undisturbed set, to the byte."""
    whole, out = prepared[0], tmp_path / "set"
    command = [sys.executable, "scripts/prepare.py", "run", *options(web, out)]
    rng, killed = random.Random(0), []
    for name in ("metadata", "filter", "images", "dedup", "captions", "64"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (out / name / "step.json").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, {"images": 1.0, "captions": 1.5, "64": 1.5}.get(name, 0.05)))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -9, process.stderr.read().decode() if process.stderr else ""
        killed.append(name if "digest" not in (out / name / "step.json").read_text() else None)
    assert sum(name is not None for name in killed) >= 3, killed  # and not just after it was done
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mine, theirs = contents(out), contents(whole)
    assert mine.pop("config.yaml")
    assert {name: digest for name, digest in mine.items() if name != "report.json"} == {
        name: digest for name, digest in theirs.items() if name != "report.json"
    }


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["steps=[encode,dedup]"],
            r"steps=\['encode', 'dedup'\] must name each step once, in the order metadata, filter",
        ),
        (["steps=[]"], r"steps=\[\] must name each step once"),
        (["steps=[metadata,encode]"], "metadata reads tables of URLs for download to fetch; name both, or neither"),
        (["processes=0"], "processes=0 must be at least 1"),
        (["source.paths=[]"], "source.paths is empty; name a table of URLs"),
        (["filter.max_aspect=0.5"], "filter.max_aspect=0.5"),
        (["dedup.distance=99"], "dedup.distance=99"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        compose_preparation(["out=x", "source.paths=[x.parquet]", *changes])
    assert "\n" not in str(error.value)


def test_command_says_one_sentence(tmp_path):
    def said(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "scripts/prepare.py", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        return done.stderr.strip()

    out = f"out={tmp_path / 'set'}"
    assert said("run", out, "filter.max_unsave=1", "source.paths=[x]").startswith(
        "prepare.py: filter.max_unsave is not a key of prepare; did you mean filter.max_unsafe?"
    )
    nothing = said("run", out, f"source.paths=[{tmp_path}/none.parquet]")
    assert "none.parquet" in nothing
    assert "\n" not in nothing
