"""Ranks that share a model train as one process does; where one is lost, all end soon and say which."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.base import Cond
from models.ccdit import CCDiTConfig
from models.layers import Checkpointing
from training import watch
from training.distributed import Parallel, Ranks, session, sharded, shares, synchronised, twin
from training.restart import AGAIN, STUCK, Stuck, check_progress, exit_code, note_exit, note_start
from training.sharded import local, whole
from training.speed import Compile, compile_denoiser

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 3, 8


def denoiser() -> Any:
    """A small network whose first outputs are not zero, with sides that two ranks cannot halve."""
    torch.manual_seed(0)
    made = CCDiTConfig(hidden=36, depth=2, heads=3, patch_size=2, in_channels=3, base_size=8, num_classes=4).build()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    x, target = torch.randn(2, BATCH, 3, 8, 8, generator=draw)
    return x, torch.rand(BATCH, generator=draw) * 999, torch.randint(4, (BATCH,), generator=draw), target


def train(ranks: Ranks, parallel: Parallel, micro: int, **how: Any) -> tuple[dict[str, Tensor], Any]:
    """The loop's arithmetic: (losses, norms and weights, whole; the network)."""
    dtype, checkpointing = how.get("dtype", torch.float32), how.get("checkpointing", Checkpointing.none)
    net = denoiser()
    net.checkpoint(checkpointing)
    ranks.shard(net, parallel, dtype)
    if "compile" in how:  # traced through autograd too, without the C++ that the default back-end writes
        torch.compile = partial(torch.compile, backend="aot_eager")
        compile_denoiser(net, how["compile"])
    free = list(net.parameters())
    optimizer = torch.optim.AdamW(
        free, lr=1e-2, eps=1e-2, fused=True
    )  # eps: rounding must not steer where the gradient is 0
    wrapped = ranks.wrap(net, parallel, dtype)
    share, losses, norms = BATCH // ranks.world, [], []
    for step in range(STEPS):
        total = torch.zeros(())
        rows = torch.arange(ranks.rank * share, (ranks.rank + 1) * share).split(share // micro)
        for index, part in enumerate(rows):
            x, t, label, target = (tensor[part] for tensor in batch_of(step))
            with (
                synchronised(wrapped, index == micro - 1),
                torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16),
            ):
                pred = wrapped(x, t, Cond(class_id=label))
                loss = (pred.float() - target).square().mean((1, 2, 3)).sum()
                (loss / share).backward()
            total += loss.detach() / BATCH
        norm = whole(nn.utils.get_total_norm([p.grad for p in free if p.grad is not None]))
        nn.utils.clip_grads_with_norm_(free, 1.0, norm)
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(ranks.sum(total))
        norms.append(norm)
    weights = {name: whole(parameter).detach().clone() for name, parameter in net.named_parameters()}
    return weights | {"loss": torch.stack(losses), "norm": torch.stack(norms)}, net


def copies(ranks: Ranks, net: Any) -> dict[str, Tensor]:
    """What a twin of a trained network is, computes, and becomes as an average."""
    average = twin(net).eval().requires_grad_(False)
    assert sharded(average) == sharded(net)
    assert all(mine.data_ptr() != theirs.data_ptr() for mine, theirs in zip(shares(average), shares(net), strict=True))
    same = torch.tensor(all(torch.equal(a, b) for a, b in zip(shares(average), shares(net), strict=True)))
    with torch.no_grad():
        x, t, label, _ = batch_of(9)
        picture = average(x, t, Cond(class_id=label))
        for parameter in net.parameters():
            local(parameter).add_(1.0)
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 0.25)
    first = next(iter(average.state_dict().values()))
    return {"same": same, "picture": picture, "average": whole(first).clone()}


SCENES: dict[str, tuple[Parallel, int, dict[str, Any]]] = {
    "ddp-1": (Parallel.ddp, 1, {}),
    "ddp-2": (Parallel.ddp, 2, {}),
    "fsdp-1": (Parallel.fsdp, 1, {}),
    "fsdp-2": (Parallel.fsdp, 2, {}),
    "hsdp-1": (Parallel.hsdp, 1, {}),
    "hsdp-2": (Parallel.hsdp, 2, {}),
    "fsdp-full": (Parallel.fsdp, 2, {"checkpointing": Checkpointing.full}),
    "fsdp-selective": (Parallel.fsdp, 1, {"checkpointing": Checkpointing.selective}),
    "ddp-bf16": (Parallel.ddp, 1, {"dtype": torch.bfloat16}),
    "fsdp-bf16": (Parallel.fsdp, 1, {"dtype": torch.bfloat16}),
    "fsdp-compiled": (Parallel.fsdp, 2, {"compile": Compile.blocks}),
}


def perform(rank: int, world: int, per_node: int, port: int, out: str, names: list[str]) -> None:
    """One rank of a few scenes; rank 0 writes what came of each."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with session(timeout=120) as ranks:
        for name in names:
            parallel, micro, how = SCENES[name]
            found, net = train(ranks, parallel, micro, **how)
            held = sum(tensor.numel() for tensor in shares(net)) / sum(p.numel() for p in net.parameters())
            found |= copies(ranks, net) | {"held": torch.tensor(held)}
            if ranks.main:
                save_file({key: value.contiguous() for key, value in found.items()}, f"{out}/{name}.safetensors")
        assert ranks.any(rank == 1)
        assert not ranks.any(False)
        assert ranks.largest(rank) == world - 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def play(out: Path, world: int, per_node: int, names: list[str]) -> dict[str, dict[str, Tensor]]:
    mp.spawn(perform, args=(world, per_node, free_port(), str(out), names), nprocs=world)
    return {name: load_file(out / f"{name}.safetensors") for name in names}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Every scene on two ranks."""
    return play(tmp_path_factory.mktemp("two"), 2, 2, list(SCENES))


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    """One process."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    found, net = train(ranks, Parallel.ddp, 1)
    return found | copies(ranks, net)


@pytest.mark.parametrize("name", [name for name in SCENES if "bf16" not in name])
def test_two_ranks_train_as_one(one, two, name):
    for key in one:
        torch.testing.assert_close(two[name][key], one[key], rtol=1e-4, atol=2e-5, msg=lambda text, key=key: key + text)
    assert two[name]["same"]
    if name.startswith("fsdp"):
        assert two[name]["held"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.slow
def test_two_copies_of_two_shares_train_as_one(one, tmp_path):
    """Two nodes of two ranks, each node with a copy."""
    for name, found in play(tmp_path, 4, 2, ["hsdp-1", "hsdp-2"]).items():
        for key in one:
            torch.testing.assert_close(found[key], one[key], rtol=1e-4, atol=2e-5, msg=f"{name} {key}")
        assert found["same"]
        assert found["held"] == pytest.approx(0.5, abs=0.03)


def test_blocks_gathered_in_bfloat16_compute_what_autocast_does(one, two):
    ddp, fsdp = two["ddp-bf16"], two["fsdp-bf16"]
    assert fsdp["blocks.0.attn.qkv.weight"].dtype is torch.float32
    for key in ("loss", "norm"):
        torch.testing.assert_close(fsdp[key], ddp[key], rtol=3e-3, atol=0)
    assert (fsdp["loss"] - one["loss"]).abs().max() > 0  # it was not float32 all along


def steps(folder: Path, fault: str, timeout: float) -> None:
    """One rank of a run that does nothing but steps; `fault` comes over rank 1 after some of them."""
    with session(timeout, folder) as ranks:
        ranks.advance(0)
        for step in range(1, 1000):
            if step == 3 and fault == "alone" and ranks.main:
                with ranks.alone():
                    time.sleep(1.5 * timeout)
            if step == 4 and ranks.rank == 1:
                if fault == "hangs":
                    time.sleep(1000)
                if fault == "raises":
                    raise ValueError("rank 1 has a disk of its own, and it is full")
            if step == 5 and fault == "alone":
                break
            ranks.sum(torch.ones(1))
            (folder / f"step{ranks.rank}").write_text(str(step))
            ranks.advance(step)
            time.sleep(0.05)
            if ranks.leaving():
                break
        code = ranks.exit_code()
    note_exit(folder, code)
    raise SystemExit(code)


class Pair:
    """Two ranks as processes of their own."""

    def __init__(self, folder: Path, fault: str = "never", timeout: float = 5, ranks: tuple[int, ...] = (0, 1)):
        self.folder = folder
        call = f"from tests.training.test_distributed import *; steps(Path({str(folder)!r}), {fault!r}, {timeout})"
        common = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", call], env=os.environ | common | {"RANK": str(rank)}, cwd=ROOT,
                stderr=subprocess.PIPE, text=True,
            )
            for rank in ranks
        ]  # fmt: skip

    def started(self) -> "Pair":
        """Wait for the first steps."""
        until = time.monotonic() + 60
        while not all((self.folder / f"step{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < until, [p.communicate()[1] for p in self.processes if p.poll() is not None]
            time.sleep(0.05)
        return self

    def end(self, rank: int, limit: float = 60) -> tuple[int, str]:
        """Exit code and stderr of one."""
        _, stderr = self.processes[rank].communicate(timeout=limit)
        return self.processes[rank].returncode, stderr

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "lost"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGSTOP, 0)])
def test_a_lost_rank_ends_the_other_with_its_name(tmp_path, number, lost):
    with Pair(tmp_path).started() as pair:
        pair.processes[lost].send_signal(number)
        begun = time.monotonic()
        code, stderr = pair.end(1 - lost)
        assert time.monotonic() - begun < 5 + 10
    assert code == AGAIN
    assert_said(stderr, rf"rank {lost} has given no sign of life for \d+ s.*start the same command again")
    stacks = (tmp_path / "stacks" / f"rank{1 - lost}.txt").read_text()
    assert "test_distributed.py" in stacks
    assert "(most recent call first)" in stacks
    assert (tmp_path / "exit_code").read_text() == "85\n"


def assert_said(text: str, pattern: str) -> None:
    assert re.search(pattern, text, re.S), text


@pytest.mark.slow
def test_a_rank_that_hangs_ends_both_and_the_lines_say_where(tmp_path):
    with Pair(tmp_path, "hangs") as pair:
        (one, said), (two, _) = pair.end(0), pair.end(1)
    assert one == two == AGAIN
    assert_said(said, r"not finished step 4 for [5-9] s: .*rank 1 at tests/training/test_distributed.py:\d+ \(steps\)")
    assert_said(said, r"rank 0 at training/distributed.py:\d+ \(sum\)")
    assert "time.sleep" not in said
    assert all("in steps" in (tmp_path / "stacks" / f"rank{rank}.txt").read_text() for rank in (0, 1))


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_other_and_is_named(tmp_path):
    with Pair(tmp_path, "raises", timeout=60) as pair:
        begun = time.monotonic()
        (one, said), (two, own) = pair.end(0), pair.end(1)
        assert time.monotonic() - begun < 50
    assert one == two == 1
    assert "rank 1 failed: ValueError: rank 1 has a disk of its own, and it is full" in said
    assert "ValueError: rank 1 has a disk of its own" in own


@pytest.mark.slow
def test_work_of_one_rank_may_take_longer_than_a_step(tmp_path):
    with Pair(tmp_path, "alone", timeout=5) as pair:
        assert [pair.end(rank)[0] for rank in (0, 1)] == [0, 0]
    assert not (tmp_path / "stacks").exists()


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(tmp_path):
    with Pair(tmp_path, timeout=3, ranks=(0,)) as pair:
        code, said = pair.end(0)
    assert code == 1
    assert "rank 1 of 2 did not come within train.timeout=3 s; look at its log" in said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 0)])
def test_a_signal_to_one_rank_lets_all_leave_at_the_same_step(tmp_path, number, code):
    with Pair(tmp_path, timeout=30).started() as pair:
        pair.processes[1].send_signal(number)
        assert [pair.end(rank)[0] for rank in (0, 1)] == [code, code]
    assert (tmp_path / "step0").read_text() == (tmp_path / "step1").read_text()
    assert (tmp_path / "exit_code").read_text() == f"{code}\n"


@pytest.mark.slow
def test_a_second_signal_leaves_at_once():
    script = (
        "import signal, time\nfrom training.distributed import session\n"
        "with session() as ranks:\n"
        "    print('ready', flush=True)\n"
        "    for _ in range(300): time.sleep(0.1); ranks.asked and print('asked', flush=True)\n"
    )
    for launched in ({}, {"TORCHELASTIC_RUN_ID": "x"}):
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=os.environ | launched, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "asked\n"
        if launched:  # the terminal's Ctrl-C comes a second time, from the launcher
            process.send_signal(signal.SIGINT)
            time.sleep(2.2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
        assert process.returncode == -signal.SIGTERM


def test_a_full_disk_does_not_change_the_exit_code(tmp_path, capsys):
    (tmp_path / "file").write_text("where no folder can be made")
    note_exit(tmp_path / "file" / "run", AGAIN)
    assert "exit_code was not written: Not a directory; it would be 85" in capsys.readouterr().err


def test_exit_codes():
    assert exit_code(signal.SIGTERM) == exit_code(signal.SIGUSR1) == AGAIN == 85
    assert exit_code(signal.SIGINT) == exit_code(0) == 0
    ranks = Ranks(0, 1, torch.device("cpu"), asked=signal.SIGUSR1)
    assert ranks.exit_code() == 0
    assert ranks.leaving()
    assert ranks.exit_code() == AGAIN


def test_starts_without_progress_are_counted_and_end(tmp_path, capsys):
    assert [note_start(tmp_path, images) for images in (0, 0, 0, 64, 64, 128)] == [0, 1, 2, 0, 1, 0]
    assert json.loads((tmp_path / "starts.json").read_text()) == {"images_seen": 128, "count": 0}
    counts = [note_start(tmp_path, 128) for _ in range(4)]
    for count in counts[:3]:
        check_progress(tmp_path, 128, count, max_restarts=3)
    with pytest.raises(Stuck, match=r"started 5 times from 128 images and saw none, over train.max_restarts=3") as left:
        check_progress(tmp_path, 128, counts[3], max_restarts=3)
    assert left.value.code == STUCK == 86
    assert str(left.value) in capsys.readouterr().err
    assert (tmp_path / "exit_code").read_text() == "86\n"
    assert note_start(tmp_path, 128) == 0


def test_hsdp_needs_more_than_one_rank_a_node(monkeypatch):
    ranks = Ranks(0, 4, torch.device("cpu"))
    for local_world in ("1", "3"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world)
        with pytest.raises(ValueError, match=rf"train.parallel=hsdp .* of 4 ranks {local_world} run .* or choose fsdp"):
            ranks.mesh(Parallel.hsdp)
    net = nn.Linear(2, 2)
    assert Ranks(0, 1, torch.device("cpu")).wrap(net, Parallel.fsdp) is net
    assert Ranks(0, 1, torch.device("cpu")).wrap(net) is net


def test_ranks_without_a_meeting_point_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT are not set.*start them with torchrun"),
        session(),
    ):
        pass


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 2], "ranks 0 and 2"), ([0, 1, 2, 5, 6, 7], "ranks 0, 1, 2, 5 and 2 more")],
)
def test_ranks_are_named(ranks, text):
    assert watch.named(ranks) == text
