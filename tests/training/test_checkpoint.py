"""A checkpoint holds the state of its moment whatever happens meanwhile, and nothing that is good is ever lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models.folder
import training.checkpoint
from diffusion.objective import ObjectiveConfig
from inference.description import Description, SamplerConfig
from models.autoencoder import AutoencoderConfig
from models.folder import clean, fault, hold, newest, publish, sha256, write_safetensors
from models.pixart import PixArtConfig
from models.weights import load_denoiser
from training.checkpoint import (
    CheckpointConfig,
    Saver,
    TrainState,
    optimizer_tensors,
    prune,
    read_guard,
    read_state,
    resume,
)

CONFIG = {"seed": 0, "model": {"hidden": 32}}
DESCRIPTION = Description(
    objective=ObjectiveConfig(),
    sampler=SamplerConfig(),
    vae=AutoencoderConfig(path="assets/shapes"),
    text=None,
    resolution=64,
    num_classes=None,
)


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return PixArtConfig(hidden=32, depth=1, heads=2, text_dim=16).build()


class Training:
    """A denoiser, two averages and AdamW, moved by random gradients."""

    def __init__(self, seed: int = 0):
        self.denoiser, self.ema, self.second = small(seed), small(seed), small(seed)
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=1e-2)
        self.state = TrainState()
        self.guard = {"guard/norms": torch.rand(8)}

    @torch.no_grad()
    def step(self, images: int = 10) -> None:
        for parameter in self.denoiser.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        for average, weight in ((self.ema, 0.1), (self.second, 0.5)):
            torch._foreach_lerp_(list(average.parameters()), list(self.denoiser.parameters()), weight)
        self.state.images_seen += images
        self.state.step += 1

    @property
    def emas(self) -> dict[str, nn.Module]:
        return {"ema": self.ema, "ema_0.100": self.second}

    def tensors(self) -> dict[str, Tensor]:
        networks = {"model": self.denoiser, **self.emas}
        weights = {f"{name}/{key}": t for name, net in networks.items() for key, t in net.state_dict().items()}
        return {k: t.clone() for k, t in (weights | optimizer_tensors(self.denoiser, self.optimizer)).items()}

    def save(self, saver: Saver) -> None:
        saver.save(self.state, self.denoiser, self.emas, self.optimizer, self.guard, DESCRIPTION, CONFIG)

    def resume(self, folder: Path, say: Callable[[str], None] = print) -> bool:
        found = resume(folder, self.denoiser, self.emas, self.optimizer, CONFIG, say)
        self.state = found or self.state
        return found is not None


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def saver(folder: Path, say: Callable[[str], None] = print, **values) -> Saver:
    return Saver(folder, CheckpointConfig(**{"every": 10, "patience": 0, **values}), say)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writers wait for it before the first byte."""
    event = threading.Event()
    real = training.checkpoint.write_safetensors

    def late(path: Path, tensors: dict[str, Tensor]) -> str:
        assert event.wait(20)
        return real(path, tensors)

    monkeypatch.setattr(training.checkpoint, "write_safetensors", late)
    return event


def test_what_is_saved_is_the_moment_of_the_save_though_training_goes_on(tmp_path, gate):
    training_ = Training()
    training_.step()
    with saver(tmp_path) as writer:
        then = training_.tensors()
        training_.save(writer)
        training_.step()
        training_.guard["guard/norms"].zero_()
        assert not (tmp_path / "10").exists(), "the loop did not wait for the disk"
        gate.set()
    other = Training(seed=1)
    assert other.resume(tmp_path)
    assert (other.state.images_seen, other.state.step) == (10, 1)
    assert equal(other.tensors(), then)
    assert read_guard(tmp_path / "10")["guard/norms"].count_nonzero() == 8
    published = load_denoiser(tmp_path / "10" / "denoiser", "ema_0.100")
    assert all(torch.equal(t, then[f"ema_0.100/{key}"]) for key, t in published.state_dict().items())


def test_background_and_foreground_write_the_same_files_and_buffers_are_used_again(tmp_path):
    training_, first = Training(), None
    with saver(tmp_path / "a") as one, saver(tmp_path / "b", background=False) as two:
        for _ in range(3):
            training_.step()
            training_.save(one)
            training_.save(two)
            memory = {key: buffer.data_ptr() for key, buffer in one._buffers.items()}
            first = first or memory
            assert memory == first
    for step in ("20", "30"):
        manifests = [json.loads((tmp_path / side / step / "manifest.json").read_text()) for side in "ab"]
        assert manifests[0] == manifests[1]
        assert fault(tmp_path / "a" / step) is None


def test_the_next_save_waits_for_the_one_before_and_meets_its_error(tmp_path, gate, monkeypatch):
    training_ = Training()
    training_.step()
    writer = saver(tmp_path)
    training_.save(writer)
    training_.step()
    threading.Timer(0.2, gate.set).start()
    started = time.perf_counter()
    training_.save(writer)
    assert time.perf_counter() - started > 0.1
    writer.wait()
    assert names(tmp_path) == ["10", "20"]

    def broken(path: Path, tensors: dict[str, Tensor]) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(training.checkpoint, "write_safetensors", broken)
    training_.step()
    training_.save(writer)
    with pytest.raises(OSError, match="Input/output error"):
        training_.save(writer)
    assert names(tmp_path) == ["10", "20"]


def test_a_full_disk_in_the_midst_of_a_save_is_said_and_counted_and_ends_only_the_last(tmp_path, monkeypatch):
    said, training_ = [], Training()
    writer = saver(tmp_path, said.append)
    training_.step()
    training_.save(writer)
    writer.wait()
    real, room = os.write, 20_000

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        room -= len(data)
        return real(descriptor, data)

    monkeypatch.setattr(models.folder.os, "write", write)
    training_.step()
    training_.save(writer)
    training_.step()
    writer._join()
    assert writer.missed == 1
    assert said == [f"{tmp_path}/20 was not written: No space left on device"]
    assert names(tmp_path) == ["10"]
    training_.save(writer)
    with pytest.raises(ValueError, match="30 was not written: No space left on device"):
        writer.wait()
    monkeypatch.undo()
    training_.step()
    training_.save(writer)
    writer.wait()
    assert names(tmp_path) == ["10", "40"]


def test_too_little_room_is_one_sentence_before_the_first_step_and_at_each_save(tmp_path, monkeypatch):
    training_, said = Training(), []
    usage = shutil.disk_usage(tmp_path)
    writer = saver(tmp_path / "new" / "checkpoints", said.append)
    writer.check(training_.denoiser, training_.emas, training_.optimizer)
    needed = 5 * sum(p.numel() * 4 for p in training_.denoiser.parameters())  # weights, two averages, two moments
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    with pytest.raises(
        ValueError, match=r"checkpoint needs 0\.\d MB, but .* has 0\.\d MB free; make room there, lower"
    ):
        writer.check(training_.denoiser, training_.emas, training_.optimizer)
    training_.step()
    training_.save(writer)
    writer._join()
    assert writer.missed == 1
    assert "checkpoints/10 was not written: checkpoint needs" in said[0]
    assert not writer.folder.exists()


def test_the_last_save_waits_for_room(tmp_path, monkeypatch):
    usage, training_, said = shutil.disk_usage(tmp_path), Training(), []
    monkeypatch.setattr(training.checkpoint, "RETRY", 0.1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    training_.step()
    with saver(tmp_path, said.append, patience=20) as writer:
        training_.save(writer)
        threading.Timer(0.4, monkeypatch.undo).start()
    assert writer.missed == len(said) > 1
    assert names(tmp_path) == ["10"]


def test_pruning_keeps_the_newest_the_multiples_and_above_all_the_newest_that_is_whole(tmp_path):
    training_ = Training()
    with saver(tmp_path / "checkpoints", keep=2, keep_every=40, snapshot_every=30) as writer:
        for _ in range(9):
            training_.step()
            training_.save(writer)
    assert names(tmp_path / "checkpoints") == ["40", "80", "90"]
    assert names(tmp_path / "snapshots") == ["30", "60", "90"]
    snapshot = tmp_path / "snapshots" / "30"
    assert fault(snapshot) is None
    assert names(snapshot / "denoiser") == ["config.json", "ema.safetensors", "ema_0.100.safetensors"]
    for broken in ("90", "80"):
        (tmp_path / "checkpoints" / broken / "optimizer.safetensors").write_bytes(b"flipped")
    prune(tmp_path / "checkpoints", 1, None)
    assert newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "40"


def test_a_broken_checkpoint_is_written_again_when_its_images_are_seen_again(tmp_path):
    training_, said = Training(), []
    training_.step()
    with saver(tmp_path) as writer:
        training_.save(writer)
    (tmp_path / "10" / "guard.safetensors").write_bytes(b"flipped")
    with saver(tmp_path, said.append) as writer:
        training_.save(writer)
    assert said == [f"{tmp_path}/10 is broken and is written again"]
    assert fault(tmp_path / "10") is None
    assert names(tmp_path) == ["10"]


def test_a_checkpoint_of_schema_1_is_read_and_one_of_a_newer_is_refused(tmp_path):
    old = Training()
    old.step()
    old.state.seconds = 1.5

    def write(aside: Path) -> None:
        (aside / "denoiser").mkdir()
        save_file(old.denoiser.state_dict(), aside / "denoiser" / "model.safetensors")
        save_file(old.ema.state_dict(), aside / "denoiser" / "ema.safetensors")
        save_file(optimizer_tensors(old.denoiser, old.optimizer), aside / "optimizer.safetensors")
        state = {"schema": 1, "images_seen": 10, "step": 1, "skipped": 0, "damaged": 0, "seconds": 1.5}
        (aside / "state.json").write_text(json.dumps(state))
        (aside / "config.json").write_text(json.dumps(CONFIG))

    publish(tmp_path / "10", write)
    new = Training(seed=1)
    state = resume(tmp_path, new.denoiser, {"ema": new.ema}, new.optimizer, CONFIG, print)
    assert state == old.state
    assert read_guard(tmp_path / "10") == {}
    wanted = {key: t for key, t in old.tensors().items() if not key.startswith("ema_")}
    assert equal({key: t for key, t in new.tensors().items() if not key.startswith("ema_")}, wanted)
    with pytest.raises(ValueError, match="ema.sigma_rel has 0.100, but .* was trained without that average"):
        new.resume(tmp_path)
    (tmp_path / "10" / "state.json").write_text(json.dumps({"schema": 3}))
    with pytest.raises(ValueError, match="10 has the state schema 3, and this version reads up to 2; continue with"):
        read_state(tmp_path / "10")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0}, "checkpoint.every=100000 and checkpoint.keep=0 must be positive"),
        ({"every": 10, "keep_every": 25}, "keep_every=25 is not a multiple of checkpoint.every=10; choose 20, or null"),
        ({"every": 10, "snapshot_every": 4}, "snapshot_every=4 is not a multiple of checkpoint.every=10; choose 10"),
        ({"patience": -1}, "checkpoint.patience=-1 is negative; choose 0 not to wait"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**values)


def test_files_are_those_of_safetensors_hashed_on_the_way_with_the_permissions_of_the_umask(tmp_path):
    tensors = {f"layer.{i}": torch.randn(3, i) for i in range(12)} | {"é": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    digest = write_safetensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == sha256(tmp_path / "ours")
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    kinds = (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.int64)
    mixed = {str(kind): torch.randn(3, 4).T.to(kind) for kind in kinds}
    write_safetensors(tmp_path / "mixed", mixed)
    assert equal(load_file(tmp_path / "mixed"), {key: t.contiguous() for key, t in mixed.items()})


def test_what_killed_writers_leave_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".10.0123abcd.tmp" / "denoiser").mkdir(parents=True)
    (tmp_path / ".tmpA1b2C3").write_text("half a safetensors file")
    (tmp_path / ".20.parts.tmp").mkdir()
    (tmp_path / "10").mkdir()
    (tmp_path / "notes.txt").touch()
    clean(tmp_path)
    assert names(tmp_path) == ["10", "notes.txt"]


HOLDER = """
import sys, time, os
from pathlib import Path
from models.folder import hold
with hold(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker that outlives its parent
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(20)
"""


def test_two_jobs_do_not_share_a_folder_and_a_killed_one_leaves_it(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert first.stdout
    try:
        assert first.stdout.readline() == "held\n"
        message = f"{folder} is in use by process {first.pid} on {os.uname().nodename}; wait for it or stop it, or give"
        with pytest.raises(ValueError, match=message), hold(folder):
            pass
        first.kill()
        first.wait()
        with hold(folder):  # its orphaned worker does not count
            assert (folder / "lock").read_text().startswith(f"process {os.getpid()} on")
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    with hold(folder):
        pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    said = []
    monkeypatch.setattr(models.folder.fcntl, "lockf", refuse)
    with hold(tmp_path, said.append):
        pass
    assert said == [f"{tmp_path} cannot be locked against a second job (Function not implemented): start only one"]
