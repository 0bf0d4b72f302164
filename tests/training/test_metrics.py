"""What a run tells the loggers beside metrics.jsonl."""

import errno
import json
import sys
from io import FileIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.base import Cond
from training.distributed import Ranks
from training.evaluate import draw_grid
from training.flops import flops_per_image
from training.metrics import Journal, LoggerConfig
from training.run import run


def test_a_run_that_continues_is_one_run_to_wandb(config, monkeypatch):
    begun, logged = [], []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(log=logged.append, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    overrides = ("logger=wandb", "logger.offline=true", "train.images=32", "evaluate.count=0")
    run(config("stage1", *overrides, "train.stop_at=16"))
    run(config("stage1", *overrides))
    assert begun[0] == begun[1]
    assert (begun[0]["mode"], begun[0]["resume"], begun[0]["name"]) == ("offline", "allow", "run")
    losses = [line["images"] for line in logged if "train/loss" in line]
    assert losses == [8, 16, 24, 32]
    run(config("stage1", *overrides, name="another"))
    assert begun[2]["id"] != begun[0]["id"]


def test_every_line_says_how_fast_it_was(config):
    cfg = config("stage1", "train.images=32", "evaluate.count=0")
    run(cfg)
    lines = [json.loads(line) for line in (cfg.folder / "metrics.jsonl").read_text().splitlines()]
    (device,) = [line for line in lines if line["kind"] == "device"]
    assert device["source"] == "measured"
    side = 64 // 8  # of the latent: the embedded autoencoder's factor is 8
    flops = flops_per_image(
        cfg.model.build(), (cfg.model.in_channels, side, side), Cond(class_id=torch.zeros(1).long())
    )
    for line in lines:
        if line["kind"] == "train":
            assert line["tflops"] == pytest.approx(line["images_per_s"] * flops / 1e12)
            assert line["peak_share"] == pytest.approx(line["tflops"] / device["peak_tflops"])


class Full(FileIO):
    """A file on a disk that takes `room` bytes more."""

    room = 0

    def write(self, data) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = super().write(data[: self.room])
        self.room -= taken
        return taken


def journal(folder: Path) -> Journal:
    made = Journal(folder, LoggerConfig(), Ranks(0, 1, torch.device("cpu")), "run", 100, 0)
    made._file.close()
    made._file = Full(folder / "metrics.jsonl", "ab")
    return made


def test_lines_for_which_the_disk_is_full_wait_and_are_written_whole(tmp_path, capsys):
    log = journal(tmp_path)
    log._file.room = 30
    for images in (1, 2, 3):
        log.write("sample", images, {"path": "x" * 20})
    assert (tmp_path / "metrics.jsonl").stat().st_size == 30
    log._file.room = 1000
    log.write("sample", 4, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [1, 2, 3, 4]
    log._file.room = 0
    for images in (5, 6):
        log.write("sample", images, {})
    log.close()
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl: No space left on device; its lines wait in memory until there is room") == 2
    assert "metrics.jsonl lacks its last 2 lines: the disk is full" in said


def test_other_errors_of_the_log_are_errors(tmp_path, monkeypatch):
    log = journal(tmp_path)
    monkeypatch.setattr(Full, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        log.write("sample", 1, {})


def test_a_picture_for_which_the_disk_is_full_ends_no_run(tmp_path, monkeypatch, capsys):
    pipeline = SimpleNamespace(generate=lambda *_, **__: torch.zeros(2, 8, 8, 3, dtype=torch.uint8).numpy())
    asked, path = SimpleNamespace(captions=["a", "b"], class_ids=None), tmp_path / "samples" / "1.png"
    assert draw_grid(pipeline, asked, 0, path)["tile"] == 8  # pyright: ignore[reportArgumentType]
    assert path.exists()

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    draw_grid(pipeline, asked, 0, path.with_name("2.png"))  # pyright: ignore[reportArgumentType]
    assert [one.name for one in path.parent.iterdir()] == ["1.png"]
    assert "2.png was not written: No space left on device; the run goes on without it" in capsys.readouterr().err
