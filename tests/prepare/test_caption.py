"""Captioning, against a server that reads every request strictly and misbehaves when told to."""

import dataclasses
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import shapes
from prepare import caption as module
from prepare.caption import PROMPTS, CaptionConfig, caption, check, clean, repeats
from prepare.parts import Tally, run_step
from prepare.sources import Sample
from tests.prepare.captioner import LOOP, Asked, Captioner, describe

ONE = {"short": "Describe {alt} in a sentence."}
NOW = {"backoff": 0.01, "timeout": 5.0, "patience": 0.5}


def picture(index: int, size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.fromarray(shapes.render(shapes.scene(0, index), size)).save(file, "PNG")
    return file.getvalue()


class Pictures:
    """A source of parts with so many scenes each; `changes` replaces samples by their number in the first part."""

    digest = "pictures"

    def __init__(self, *counts: int, changes: dict[int, dict[str, Any]] | None = None):
        self.names = [f"{part:05d}" for part in range(len(counts))]
        self._counts, self._changes, self.num_read = counts, changes or {}, 0

    def read(self, name: str) -> Iterator[Sample]:
        for row in range(self._counts[int(name)]):
            self.num_read += 1
            key, captions = f"{name}{row:04d}", {"alt": f"scene {row}"}
            sample = Sample(key=key, image=picture(10_000 * int(name) + row), captions=captions, about={})
            yield dataclasses.replace(sample, **(self._changes.get(row, {}) if int(name) == 0 else {}))


def make(folder: Path, server: Captioner, source: Any, *, left_out: Path | None = None, **changes) -> Tally:
    options: dict[str, Any] = (
        {"url": server.url, "model": server.model, "prompts": ONE, "concurrency": 8} | NOW | changes
    )
    try:
        return caption(CaptionConfig(**options), source, folder, left_out=left_out)
    finally:
        assert not server.wrong


def lines(folder: Path, name: str = "00000") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def rows(folder: Path, kind: str, name: str = "00000") -> dict[str, tuple[str, str]]:
    path = folder / f"{name}.{kind}.parquet"
    return {row["key"]: (row["reason"], row["detail"]) for row in pq.read_table(path).to_pylist()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def numbers(server: Captioner) -> dict[str, int]:
    """Of the scenes by what was asked about them: prompts hold the alt text, "scene 7"."""
    return Counter(asked.prompt.split()[2] for asked in server.asked)


def at_scene(*numbers: int, how: str):
    """Misbehave at these scenes alone."""
    prompts = {ONE["short"].replace("{alt}", f"scene {number}") for number in numbers}
    return lambda asked: how if asked.prompt in prompts else None


def first(how: str, times: int = 1):
    """Misbehave at the first requests."""
    left = iter([how] * times)
    return lambda asked: next(left, None)


# --- what is asked and what is written ------------------------------------------------------------------------


def test_every_picture_gets_its_captions(tmp_path):
    source = Pictures(5, 3)
    prompts = {"short": "In brief, knowing {alt}:", "long": 'At length, as {"text": "..."}:'}
    with Captioner(extra={"top_p": 0.9}) as server:
        tally = make(tmp_path, server, source, prompts=prompts, temperature=0.5, seed=7, extra={"top_p": 0.9})
    assert tally == Tally(given=8, kept=8)
    assert server.trials == 1
    told: dict[str, dict[str, str]] = {}
    for asked in server.asked:
        name = "long" if asked.prompt == prompts["long"] else "short"
        told.setdefault(asked.digest, {})[name] = describe(asked.picture, asked.prompt)
        assert asked.fields == {
            "model": server.model, "temperature": 0.5, "seed": 7, "max_tokens": 512, "top_p": 0.9,
        }  # fmt: skip
    assert len(server.asked) == 16
    assert len(told) == 8
    assert {asked.prompt for asked in server.asked} == {prompts["long"]} | {
        f"In brief, knowing scene {row}:" for row in range(5)
    }
    for name, count in (("00000", 5), ("00001", 3)):
        made = lines(tmp_path, name)
        assert [line["key"] for line in made] == [f"{name}{row:04d}" for row in range(count)]
        assert all(line["model"] == server.model and line["captions"] in told.values() for line in made)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.json", "00000.jsonl", "00001.json", "00001.jsonl", "step.json",
    ]  # fmt: skip


def test_captions_say_what_is_on_the_picture(tmp_path):
    """The whole way: the reader of data/shapes.py, behind the server, sees each scene in what it is sent."""
    with Captioner() as server:
        make(tmp_path, server, Pictures(6))
    for row, line in enumerate(lines(tmp_path)):
        for thing in shapes.scene(0, row).things:
            assert f"a {thing.size} {thing.colour} {thing.shape}" in line["captions"]["short"]


def test_pictures_travel_small_and_upright(tmp_path):
    tall = Image.fromarray(np.repeat(np.repeat(shapes.render(shapes.scene(0, 0), 64), 30, 0), 10, 1))
    file = io.BytesIO()
    exif = tall.getexif()
    exif[0x0112] = 6
    tall.save(file, "JPEG", exif=exif)
    with Captioner(max_side=256) as server:
        make(tmp_path, server, Pictures(2, changes={1: {"image": file.getvalue()}}), max_side=256)
    sizes = sorted(Image.open(io.BytesIO(asked.picture)).size for asked in server.asked)
    assert sizes == [(64, 64), (256, 85)]  # 640 x 1920, turned; and one that was small already


def test_default_prompts_are_asked(tmp_path):
    with Captioner() as server:
        make(tmp_path, server, Pictures(1), prompts=CaptionConfig().prompts)
    assert {asked.prompt for asked in server.asked} == set(PROMPTS.values())
    assert list(lines(tmp_path)[0]["captions"]) == ["long", "short"]


def test_the_order_of_answers_does_not_matter(tmp_path):
    chance = random.Random(0)
    for name in ("a", "b"):
        misbehave = at_scene(5, 11, how="refusal")
        with Captioner(delay=lambda asked: chance.uniform(0, 0.05), misbehave=misbehave) as server:
            make(tmp_path / name, server, Pictures(30))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert server.peak > 1


@pytest.mark.parametrize("concurrency", [1, 7])
def test_so_many_at_a_time(tmp_path, concurrency):
    source = Pictures(4 * concurrency + 10)
    ahead = []

    def delay(asked: Asked) -> float:
        ahead.append(source.num_read - server.finished)
        return 0.03

    with Captioner(delay=delay) as server:
        make(tmp_path, server, source, concurrency=concurrency)
    assert server.peak == concurrency
    assert max(ahead) <= concurrency  # pictures in memory


# --- rows that end or are noted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "reason", "asked"),
    [
        ("400", "http_400", 1),
        ("empty", "empty", 1),
        ("...", "empty", 1),
        ("<think>What is it?</think>", "empty", 1),
        ("refusal", "refused", 1),
        ("filtered", "refused", 1),
        ("loop", "repetitive", 1),
        ("cut", "cut", 2),
        ("long", "too_long", 1),
        ("garbage", "nonsense", 3),
        ("html", "nonsense", 3),
        ("bare", "nonsense", 3),
        ("500", "http_500", 3),
        ("307", "http_307", 1),
        ("drop", "unreachable", 3),
    ],
)
@pytest.mark.parametrize("required", [False, True])
def test_a_picture_without_a_caption(tmp_path, how, reason, asked, required):
    with Captioner(misbehave=at_scene(3, how=how), delay=lambda asked: 0.002) as server:
        tally = make(tmp_path, server, Pictures(40), required=required, retries=2, concurrency=4)
    assert tally.given == 40
    assert tally.faults == 1
    assert (tally.dropped if required else tally.noted) == {reason: 1}
    (found,) = rows(tmp_path, "dropped" if required else "noted").items()
    assert found[0] == "000000003"
    assert found[1][0] == reason
    assert found[1][1].startswith(f"short: {reason}")
    assert [line["key"] for line in lines(tmp_path)] == [
        f"00000{row:04d}" for row in range(40) if not (required and row == 3)
    ]
    assert [line["key"] for line in lines(tmp_path) if not line["captions"]] == ([] if required else ["000000003"])
    assert numbers(server) == {str(row): asked if row == 3 else 1 for row in range(40)}


def test_a_caption_of_two(tmp_path):
    """One prompt refused: the other's caption is kept, and the row noted, required or not."""
    misbehave = lambda asked: "refusal" if asked.prompt == "B" else None  # noqa: E731
    with Captioner(misbehave=misbehave) as server:
        tally = make(tmp_path, server, Pictures(2), prompts={"b": "B", "a": "A"}, required=True, max_faults=1.0)
    assert (tally.kept, tally.noted) == (2, {"refused": 2})
    assert [list(line["captions"]) for line in lines(tmp_path)] == [["a"], ["a"]]


def test_no_answer_in_time(tmp_path):
    with Captioner(misbehave=at_scene(3, how="hang")) as server:
        tally = make(tmp_path, server, Pictures(10), timeout=0.3, retries=1)
    assert tally.noted == {"timeout": 1}
    assert rows(tmp_path, "noted") == {"000000003": ("timeout", "short: timeout after 0.3 s")}
    assert numbers(server)["3"] == 2


def test_a_cut_answer_is_asked_for_at_twice_the_length(tmp_path):
    with Captioner(misbehave=lambda asked: "cut" if asked.max_tokens < 20 else None) as server:
        assert make(tmp_path, server, Pictures(3), max_tokens=10) == Tally(given=3, kept=3)
    assert sorted(asked.max_tokens for asked in server.asked) == [10] * 3 + [20] * 3


def test_pictures_that_cannot_be_sent(tmp_path):
    changes: dict[int, dict[str, Any]] = {
        0: {"image": None, "problem": "http_404"},
        2: {"image": b"no picture at all"},
        3: {"image": picture(3)[:200]},
        4: {"image": picture(4, size=128)},
        6: {"key": "000000001"},
    }
    with Captioner() as server:
        tally = make(tmp_path, server, Pictures(7, changes=changes), max_faults=1.0, max_pixels=64 * 64)
    assert tally.kept == 2
    assert tally.faults == 5
    assert tally.dropped == {
        "http_404": 1, "not_an_image": 1, "broken": 1, "too_many_pixels": 1, "duplicate_key": 1,
    }  # fmt: skip
    assert [line["key"] for line in lines(tmp_path)] == ["000000001", "000000005"]
    assert numbers(server) == {"1": 1, "5": 1}


def test_what_was_left_out_is_not_asked_about(tmp_path):
    def dedup(part):
        for row in range(6):
            if row in (1, 4):
                part.drop(f"{part.name}{row:04d}", "duplicate")
            else:
                part.keep()

    before = run_step(tmp_path / "dedup", ["00000"], dedup, recipe={"threshold": 1})
    with Captioner() as server:
        tally = make(tmp_path / "captions", server, Pictures(6), left_out=tmp_path / "dedup")
        assert tally.given == before.kept == 4
        assert numbers(server).keys() == set("0235")
        with pytest.raises(ValueError, match="captions was made with caption.left_out=.*, not None"):
            make(tmp_path / "captions", server, Pictures(6))
        with pytest.raises(ValueError, match="the step nothing was not run"):
            make(tmp_path / "others", server, Pictures(6), left_out=tmp_path / "nothing")


def test_too_many_faults(tmp_path):
    with Captioner(misbehave=at_scene(0, 1, how="refusal")) as server:
        make(tmp_path / "a", server, Pictures(10))
        with pytest.raises(ValueError, match=r"caption: 2 of 10 rows failed \(refused 2\), more than caption.max_f"):
            make(tmp_path / "b", server, Pictures(10), max_faults=0.1)


# --- tries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["500", "503", "garbage", "html", "bare", "drop", "hang"])
def test_what_passes_is_tried_again(tmp_path, how):
    with Captioner(misbehave=first(how, 3)) as server:
        assert make(tmp_path, server, Pictures(6), timeout=0.5) == Tally(given=6, kept=6)
    assert len(server.asked) == 9


def test_a_server_that_is_busy_says_when(tmp_path):
    with Captioner(misbehave=first("429")) as server:
        assert make(tmp_path, server, Pictures(1)) == Tally(given=1, kept=1)
        before, after = (asked.at for asked in server.asked)
    assert 1 <= after - before < 1.5


def test_waits_grow_and_are_capped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.2)
    with Captioner(misbehave=first("429")) as server:
        make(tmp_path / "a", server, Pictures(1))
    assert server.asked[1].at - server.asked[0].at < 0.5
    with Captioner(misbehave=first("500", 4)) as server:
        make(tmp_path / "b", server, Pictures(1), backoff=0.04)
    times = [asked.at for asked in server.asked]
    for at, least in enumerate((0.02, 0.04, 0.08, 0.16)):
        assert least <= times[at + 1] - times[at] < 2 * least + 0.1


def test_retry_after_in_all_its_forms():
    assert module._retry_after("7") == 7
    assert module._retry_after("") == module._retry_after("soon") == module._retry_after("-3") == 0
    assert module._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert module._retry_after("Wed, 21 Oct 2225 07:28:00 GMT") > 1e9


# --- the server -----------------------------------------------------------------------------------------------


def test_no_server(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    config = CaptionConfig(url=f"http://127.0.0.1:{port}/v1", model="some/vlm")
    message = rf"caption.url={config.url} cannot be reached .*; start one with `vllm serve some/vlm --port {port}`"
    source: Any = Pictures(1)
    with pytest.raises(ValueError, match=message):
        caption(config, source, tmp_path / "captions")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"model": "other"}, "caption.model=other is not a model of caption.url=.*, which has tiny-vlm: choose"),
        ({}, {"model": ""}, "caption.model= is not .* which has tiny-vlm: .*`vllm serve MODEL --port"),
        ({"models": lambda: _status(404)}, {"model": ""}, "caption.model= is not .* does not say what it has: name it"),
        ({"models": lambda: _status(404)}, {"model": "other"}, "caption.model=other at .* picture .http_404 The model"),
        ({"models": lambda: _status(503)}, {}, "is not an OpenAI-compatible server that is ready: .* 503 .*end in /v1"),
        ({"models": lambda: _status(200)}, {}, "is not an OpenAI-compatible server that is ready"),
        ({"key": "sk-right"}, {}, "caption.url=.* wants another API key .401 .*caption.key_env, which is empty"),
        ({"trial": "400"}, {}, "caption.model=tiny-vlm at .* did not take a test picture .http_400 .*model that sees"),
        ({"trial": "307"}, {}, "did not take a test picture .http_307"),
        ({}, {"key_env": "NOT_THERE"}, "caption.key_env=NOT_THERE must name an environment variable .*; export it"),
    ],
)  # fmt: skip
def test_a_server_that_will_not_do(tmp_path, options, changes, message):
    trial = options.pop("trial", None)
    with Captioner(**options) as server:
        server.trial = trial
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "captions", server, Pictures(3), **changes)
    assert not list(tmp_path.iterdir())
    assert not server.asked


def _status(status: int):
    from aiohttp import web

    return web.Response(text="<html>hello</html>", status=status)


def test_a_server_without_a_list_of_models(tmp_path):
    with Captioner(models=lambda: _status(404)) as server:
        assert make(tmp_path, server, Pictures(2)).kept == 2


def test_a_finished_step_needs_no_server(tmp_path):
    with Captioner() as server:
        made = make(tmp_path, server, Pictures(3))
    before = files(tmp_path)
    assert make(tmp_path, server, Pictures(3)) == made
    with pytest.raises(ValueError, match="was made with .*model=tiny-vlm, not other"):
        make(tmp_path, server, Pictures(3), model="other")
    assert files(tmp_path) == before


def test_a_server_that_dies(tmp_path):
    """After some patience the step ends; when the server is back it goes on with what is missing."""
    with Captioner() as server:
        make(tmp_path / "whole", server, Pictures(30))
    with Captioner(die_after=17) as server:
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"could not be reached for caption.patience=0.5 s .*keeps the captions"):
            make(tmp_path / "halves", server, Pictures(30))
        assert 0.5 < time.monotonic() - began < 5
        left = {path.name for path in (tmp_path / "halves").iterdir()}
        assert left == {"step.json", "00000.journal"}
        server.revive()
        make(tmp_path / "halves", server, Pictures(30))
    assert files(tmp_path / "halves") == files(tmp_path / "whole")
    assert numbers(server).keys() == {str(row) for row in range(30)}
    assert len(server.asked) <= 30 + 8


def test_a_server_that_is_away_for_a_while(tmp_path):
    import threading

    with Captioner(die_after=5) as server:
        away = threading.Timer(1.0, server.revive)
        away.start()
        assert make(tmp_path, server, Pictures(20), patience=30.0, retries=1) == Tally(given=20, kept=20)
        away.join()


@pytest.mark.parametrize("how", ["hang", "500", "400", "empty"])
def test_a_server_that_fails_every_picture(tmp_path, monkeypatch, how):
    """It ends the step soon, and none of the pictures is held to have no caption."""
    monkeypatch.setattr(module, "IN_A_ROW", 10)
    misbehave = lambda asked: how if len(server.asked) > 12 else None  # noqa: E731
    with Captioner(misbehave=misbehave) as server:
        with pytest.raises(ValueError, match=r"the last 10 pictures got no caption \(the last: short: .*keeps the cap"):
            make(tmp_path, server, Pictures(60), timeout=0.2, retries=0)
        assert len(server.asked) < 12 + 10 + 9
        server.misbehave = lambda asked: None
        assert make(tmp_path, server, Pictures(60)) == Tally(given=60, kept=60)


@pytest.mark.parametrize(("how", "count"), [("500", 10), ("empty", 3)])
def test_a_part_is_not_finished_without_captions(tmp_path, how, count):
    """Some pictures without an answer, or all without a caption: the next run must find them open."""
    with Captioner(misbehave=first(how, 3)) as server:
        with pytest.raises(ValueError, match=f"3 of the {count} pictures of part 00000 could not be .*max_faults=0.2"):
            make(tmp_path, server, Pictures(count), retries=0)
        assert not (tmp_path / "00000.jsonl").exists()
        assert make(tmp_path, server, Pictures(count)) == Tally(given=count, kept=count)
    assert len(server.asked) == count + 3


# --- the key --------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_never_kept(tmp_path, monkeypatch, caplog, capfd):
    """Not even where the server repeats it in an error."""
    secret = "sk-0123456789abcdef"
    monkeypatch.setenv("CAPTION_TEST_KEY", f" {secret}\n")
    caplog.set_level(0)

    def misbehave(asked: Asked) -> str | None:
        if asked.prompt.endswith("scene 2."):
            server.key = f"{secret}-changed"
        return None

    with Captioner(key=secret, misbehave=misbehave) as server:
        options = {"key_env": "CAPTION_TEST_KEY", "concurrency": 1, "prompts": {"short": "Describe {alt}."}}
        tally = make(tmp_path, server, Pictures(4), max_faults=1.0, **options)
        assert tally.noted == {"http_401": 1}
        assert rows(tmp_path, "noted") == {"000000003": ("http_401", "short: http_401 Invalid API key: Bearer ***")}
        with pytest.raises(ValueError, match="401 Invalid API key: Bearer ....; .*which is CAPTION_TEST_KEY") as error:
            make(tmp_path / "again", server, Pictures(4), **options)
    said = str(error.value) + caplog.text + "".join(capfd.readouterr())
    assert secret not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


# --- restarts -------------------------------------------------------------------------------------------------


def program(folder: Path, url: str) -> None:
    """What is killed below: a step of two parts."""
    options = CaptionConfig(url=url, model="tiny-vlm", prompts=ONE, concurrency=4, backoff=0.01)
    source: Any = Pictures(20, 40)
    caption(options, source, folder)


def test_killed_and_restarted(tmp_path):
    """kill -9, twice, within parts: the same bytes in the end, and only what was on its way is asked again."""
    misbehave = at_scene(6, 13, how="refusal")
    with Captioner(misbehave=misbehave, delay=lambda asked: 0.02) as server:
        program(tmp_path / "whole", server.url)
        server.asked.clear()
        for stop in (11, 40):
            command = (
                f"from tests.prepare.test_caption import *; program(Path({str(tmp_path / 'killed')!r}), {server.url!r})"
            )
            process = subprocess.Popen([sys.executable, "-c", command], cwd=Path(__file__).parents[2])
            while len(server.asked) < stop and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert list((tmp_path / "killed").glob("*.journal"))
            while server.running:
                time.sleep(0.01)
        program(tmp_path / "killed", server.url)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    asked = Counter(asked.digest for asked in server.asked)
    assert sum(asked.values()) <= len(asked) + 2 * 4
    assert len(asked) == 60


@pytest.mark.parametrize(
    "torn", [lambda whole: whole[:-1], lambda whole: whole[:-20], lambda whole: whole + bytes(50) + b"\n"]
)
def test_half_a_line_of_the_journal_is_dropped(tmp_path, torn):
    """Such as a kill leaves, or a power cut; what follows it is written on a line of its own."""
    with Captioner() as server:
        make(tmp_path / "whole", server, Pictures(8))
        journal = tmp_path / "cut" / "00000.journal"
        for more in (4, 2):
            server.die_after = len(server.asked) + more
            with pytest.raises(ValueError, match="could not be reached"):
                make(tmp_path / "cut", server, Pictures(8), concurrency=1, patience=0.1)
            content = journal.read_bytes()
            journal.write_bytes(torn(content))
            server.revive()
        assert [json.loads(line)["key"][-1] for line in content.splitlines()] == list("012345"[: content.count(b"\n")])
        server.asked.clear()
        make(tmp_path / "cut", server, Pictures(8))
    assert set("67") <= numbers(server).keys() <= set("4567")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_journal_left_behind_is_removed(tmp_path):
    """By the next call, where a kill came between the part's end and the removal."""
    with Captioner() as server:
        make(tmp_path, server, Pictures(2))
        (tmp_path / "00000.journal").write_bytes(b"{}\n")
        make(tmp_path, server, Pictures(2))
    assert not list(tmp_path.glob("*.journal"))
    assert len(server.asked) == 2


# --- answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  A dog\n\nruns.\t ", "A dog runs."),
        ("A dog.<|im_end|>\n<|im_start|>user\nAnd now?", "A dog."),
        ("<|im_start|>assistant\nA dog.</s>", "A dog."),
        ("[INST] A dog.", "A dog."),
        ("A dog.<end_of_turn>", "A dog."),
        ("ASSISTANT: **Caption:** A *red* dog", "A red dog"),
        ("# A dog\n* runs `fast`\n- and far", "A dog runs fast and far"),
        ("```text\nA dog.\n```", "A dog."),
        ("A [dog](http://x.example/y) and ![a cat](z.png).", "A dog and a cat."),
        ("Sure! Here's a description of the picture:\n\nA dog.", "A dog."),
        ("Here\u2019s one: A dog.", "A dog."),
        ("<think>Is it a cat?\nNo.</think>\n\nA dog.", "A dog."),
        ("It is not a cat.</think>A dog.", "A dog."),
        ("<think>Is it", ""),
        ('"A dog."', "A dog."),
        ("\u201cA dog.\u201d", "A dog."),
        ('"Stop" and "Go" are on "signs"', '"Stop" and "Go" are on "signs"'),
        ("A\x00 d\x1bog\u200b\ufeff\u202e\ud800.", "A dog."),
        ("A\u2028dog\u00a0runs", "A dog runs"),
        # what is to stay
        ("2 * 3 * 4 is on it, 5*6 too, and snake_case__name", "2 * 3 * 4 is on it, 5*6 too, and snake_case__name"),
        ("Here is a dog that runs, and a cat.", "Here is a dog that runs, and a cat."),
        ("A caption: words under a photo, 3 < 4 > 2", "A caption: words under a photo, 3 < 4 > 2"),
        ("犬が走る。👩\u200d👩\u200d👧 naïve café", "犬が走る。👩\u200d👩\u200d👧 naïve café"),
    ],
)  # fmt: skip
def test_answers_become_plain(text, plain):
    assert clean(text) == plain
    assert clean(plain) == plain


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I'm sorry, I can't describe people.", "refused"),
        ("I\u2019m really sorry, but no.", "refused"),
        ("I cannot see an image.", "refused"),
        ("As an AI language model, I have no eyes.", "refused"),
        ("Unfortunately, I am blind.", "refused"),
        ("Please provide an image.", "refused"),
        ("No image was provided.", "refused"),
        ("**I am unable to help.**", "refused"),
        (LOOP, "repetitive"),
        ("very " * 30, "repetitive"),
        ("aaaaaaaaaa" * 10, "repetitive"),
        ("a dog a dog a dog a dog a dog", "repetitive"),
        ("一只狗在公园里跑。" * 20, "repetitive"),
        ("A street with houses and shops. " + "On the left is a tree. On the right is a tree. " * 4, "repetitive"),
        ("A quiet street in rain. " + "There is a man with a hat. There is a man with a bag. " * 5, "repetitive"),
        (" \n ", "empty"),
        ("!?", "empty"),
        ("word " * 10 + "x" * 5, "repetitive"),
    ],
)
def test_answers_that_are_no_captions(text, reason):
    with pytest.raises(module._Failed) as failed:
        check(text, "stop", 3000)
    assert failed.value.reason == reason


def test_captions_are_not_mistaken_for_something_else():
    texts = [text for index in range(300) for text in shapes.captions(shapes.scene(1, index, two=0.7), 1, index)]
    texts += [
        'A man in a sorry state sits on a bench; his sign reads "I can\'t go on".',
        "Sorry! is the name of the board game that lies open on a table.",
        "A poster reads SALE SALE SALE SALE SALE above a window with coats, hats, gloves and scarves in winter.",
        "Two cats, two dogs and two birds: a white cat and a black cat, a white dog and a black dog, a white bird and "
        "a black bird, each of them on a cushion of its own.",
        "An image of no image: an empty frame on a white wall.",
        "七只猫坐在墙上。远处是一座山。",
        *PROMPTS.values(),
        " ".join(module.__doc__.replace("`", "").split()),  # pyright: ignore[reportOptionalMemberAccess]
    ]
    for text in texts:
        assert check(text, "stop", 3000) == text
        assert not repeats(text)


# --- settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "caption.url=127.0.0.1:8000 must be the address of a server, such as http://"),
        ({"url": "http://h/v1?key=1"}, "caption.url=.* must be the address of a server"),
        ({"url": "http://h:port/v1"}, "caption.url=.* must be the address of a server"),
        ({"url": "http://me:secret@h/v1"}, "caption.url must not hold a user or password; .* caption.key_env"),
        ({"prompts": {}}, "caption.prompts={} asks for nothing; give a name and a prompt"),
        ({"prompts": {"short": " "}}, "caption.prompts.short=' ' must be a prompt"),
        ({"prompts": {"alt": "Describe."}}, "caption.prompts.alt='Describe.' must be .* under a name other than alt"),
        ({"prompts": {"short": "Use {text}."}}, "caption.prompts.short holds {text}, which is unknown; only {alt}"),
        ({"max_side": 32}, "caption.max_side=32 must be at least 64; 768 is the default"),
        ({"max_pixels": 0}, "caption.max_pixels=0 must be at least 1"),
        ({"max_tokens": 0}, "caption.max_tokens=0 must be at least 1; 512 is the default"),
        ({"max_chars": 0}, "caption.max_chars=0 must be at least 1"),
        ({"concurrency": 0}, "caption.concurrency=0 must be at least 1; 64 is the default"),
        ({"temperature": -1.0}, "caption.temperature=-1.0 must be at least 0"),
        ({"retries": -1}, "caption.retries=-1 must be at least 0"),
        ({"backoff": float("nan")}, "caption.backoff=nan must be at least 0"),
        ({"patience": -1.0}, "caption.patience=-1.0 must be at least 0"),
        ({"timeout": 0.0}, "caption.timeout=0.0 must be more than 0 seconds; 120.0 is the default"),
        ({"max_faults": 1.5}, "caption.max_faults=1.5 is a share, from 0 to 1; 0.2 is the default"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        CaptionConfig(**changes)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "https://api.example.com/openai/v1/", "http://gpu_1:30000"])
def test_addresses_that_will_do(url):
    assert CaptionConfig(url=url).url == url


def test_which_settings_make_another_set(tmp_path):
    """Those that change captions do; how they are asked for does not."""
    with Captioner() as server:
        make(tmp_path, server, Pictures(1))
        make(tmp_path, server, Pictures(1), concurrency=3, timeout=9.0, retries=1, patience=1.0, max_faults=0.5)
        other = {"prompts": {"short": "Other."}, "max_side": 64, "temperature": 1.0, "max_tokens": 9, "seed": 1}
        other |= {"extra": {"top_k": 1}, "max_chars": 9, "max_pixels": 9, "required": True}
        for key, value in other.items():
            with pytest.raises(ValueError, match=f"was made with .*.{key}="):
                make(tmp_path, server, Pictures(1), **{key: value})
    assert os.listdir(tmp_path)
