"""The guard skips what it should and nothing else, on all ranks alike, and a resume changes no decision."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from models.folder import publish
from training.guard import FLOOR, Guard, GuardConfig
from training.optim import OptimConfig, build_optimizer, gradient_norm, guarded_step

CPU = torch.device("cpu")


def decide(guard: Guard, losses, norms) -> list[int]:
    """The updates that are skipped."""
    skipped = []
    for update, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        guard.watch(torch.tensor(float(loss)), last=True)
        if guard.veto(torch.tensor(float(norm))).item():
            skipped.append(update)
    return skipped


def by_hand(losses, norms, window, deviations) -> list[int]:
    """The rule once more, in float64 and lists."""
    history, skipped = [], []
    for update, values in enumerate(zip(losses, norms, strict=True)):
        accepted = np.log([kept for kept in history[-window:] if kept is not None]).reshape(-1, 2)
        bad = not np.isfinite(values).all()
        if not bad and len(accepted) >= window / 2:
            limit = accepted.mean(0) + deviations * np.maximum(accepted.std(0), FLOOR)
            bad = bool((np.log(values) > limit).any())
        history.append(None if bad else values)
        if bad:
            skipped.append(update)
    return skipped


def stormy(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and norms with spikes in either and numbers that are not finite, some of them in bursts."""
    rng = np.random.default_rng(0)
    losses, norms = np.exp(0.3 * rng.standard_normal((2, count)) - np.linspace(0, 2, count))
    for values in (losses, norms):
        values[rng.integers(0, count, 40)] *= np.exp(rng.uniform(1.0, 4.0, 40))
        values[rng.integers(0, count, 8)] = rng.choice([math.nan, math.inf], 8)
    start = count // 3
    norms[start : start + 12] = math.nan
    return losses, norms


def test_the_rule_agrees_with_one_written_by_hand():
    losses, norms = stormy(1500)
    for window, deviations in ((32, 4.0), (128, 6.0), (5, 6.0)):
        config = GuardConfig(window=window, deviations=deviations, max_skipped=2)
        expected = by_hand(losses, norms, window, deviations)
        assert len(expected) > 40
        assert decide(Guard(config, CPU), losses, norms) == expected


def test_only_what_is_not_finite_is_skipped_where_deviations_are_null():
    losses, norms = stormy(600)
    odd = np.flatnonzero(~(np.isfinite(losses) & np.isfinite(norms)))
    assert decide(Guard(GuardConfig(deviations=None), CPU), losses, norms) == odd.tolist()


@pytest.mark.parametrize("spread", [0.05, 0.25, 0.5, 1.0])
def test_no_false_alarm_among_lognormal_norms(spread):
    """Six deviations of the values themselves would skip about 1 in 600 of these at a spread of 0.5."""
    rng = np.random.default_rng(1)
    losses, norms = np.exp(spread * rng.standard_normal((2, 4000)))
    assert decide(Guard(GuardConfig(), CPU), losses, norms) == []


def test_no_false_alarm_among_normal_losses_or_constants():
    rng = np.random.default_rng(2)
    assert decide(Guard(GuardConfig(), CPU), 1 + 0.2 * rng.standard_normal(4000), np.full(4000, 0.1)) == []


def test_a_spike_is_found_from_half_a_window_on_and_does_not_hide_the_next():
    norms = np.full(128, 0.7)
    norms[[10, 63]] = 1e-3  # low ones are no spikes, and the window is not half full
    norms[[90, 91, 92]] = 1e4
    early = norms.copy()
    early[40] = 1e4  # too early to be judged: accepted, but one alone does not hide those that follow
    assert decide(Guard(GuardConfig(), CPU), np.ones(128), norms) == [90, 91, 92]
    assert decide(Guard(GuardConfig(), CPU), norms, np.ones(128)) == [90, 91, 92]
    assert decide(Guard(GuardConfig(), CPU), np.ones(128), early) == [90, 91, 92]


def test_the_least_deviation_is_one_percent():
    constant = [3.0] * 100
    assert decide(Guard(GuardConfig(), CPU), [*constant, 3.0 * 1.06], [1.0] * 101) == []
    assert decide(Guard(GuardConfig(), CPU), [*constant, 3.0 * 1.063], [1.0] * 101) == [100]


def test_micro_batches_add_up_to_one_loss():
    """Two halves of a spike are no spike each, and a bad first half is not forgotten."""
    guard = Guard(GuardConfig(), CPU)
    vetoes = []
    for update in range(103):
        first, second = {100: (20.0, 20.0), 101: (math.nan, 0.5)}.get(update, (0.5, 0.5))
        guard.watch(torch.tensor(first), last=False)
        guard.watch(torch.tensor(second), last=True)
        vetoes.append(guard.veto(torch.tensor(1.0)).item())
    assert vetoes == [0.0] * 100 + [1.0, 1.0, 0.0]


def test_the_host_never_waits_for_the_device():
    """On the meta device no number can be read: whatever asked for one would raise."""
    guard = Guard(GuardConfig(), torch.device("meta"))
    for _ in range(3):
        guard.watch(torch.ones((), device="meta"), last=True)
        veto = guard.veto(torch.ones((), device="meta"))
    assert veto.device.type == "meta" and veto.dtype is torch.float32


def test_resumed_it_decides_alike_to_the_last_bit(tmp_path: Path):
    losses, norms = stormy(900)
    straight = Guard(GuardConfig(), CPU)
    expected = decide(straight, losses, norms)
    found, guard = [], Guard(GuardConfig(), CPU)
    for start, end in ((0, 50), (50, 310), (310, 900)):  # the second in the middle of the burst
        found += [start + update for update in decide(guard, losses[start:end], norms[start:end])]
        save_file(guard.tensors(), tmp_path / "guard.safetensors")
        guard = Guard(GuardConfig(), CPU)
        guard.load(load_file(tmp_path / "guard.safetensors"))
    assert found == expected
    assert all(torch.equal(tensor, straight.tensors()[name]) for name, tensor in guard.tensors().items())


@pytest.mark.parametrize("window", [16, 128])
def test_another_window_goes_on_with_the_newest(window):
    """A window of 64, half full from 32 on, becomes one of another length: what follows is as if it always was."""
    losses, norms = stormy(64)[0], np.ones(64)
    losses[40:] = losses[:24]
    before, after = Guard(GuardConfig(window=64), CPU), Guard(GuardConfig(window=window, max_skipped=8), CPU)
    decide(before, losses, norms)
    after.load(before.tensors())
    history = after.tensors()["history"]
    assert history.shape == (4, window)
    kept = min(window, 64)
    assert torch.equal(history[:, -kept:], before.tensors()["history"][:, -kept:])
    assert not history[:, :-kept].any()


def test_over_the_cap_the_run_ends_and_names_the_newest_whole_checkpoint(tmp_path: Path):
    guard = Guard(GuardConfig(window=16, max_skipped=3), CPU)
    decide(guard, [1.0, math.nan, 1.0, 1.0, math.inf, 1.0, math.nan], [1.0] * 7)
    assert guard.check(tmp_path) == {"not_finite": 3, "spikes": 0}
    decide(guard, [1.0] * 8 + [50.0], [1.0] * 9)
    told = r"more than guard.max_skipped=3 \(3 not finite and 1 spikes since the run began\); lower optim.lr: "
    with pytest.raises(FloatingPointError, match=told + "there is no checkpoint yet"):
        guard.check(tmp_path / "checkpoints")

    def write(aside: Path) -> None:
        (aside / "state.json").write_text("{}")

    for images in (8, 16, 24):
        publish(tmp_path / str(images), write)
    (tmp_path / "24" / "state.json").write_text("cut")
    with pytest.raises(FloatingPointError, match=told + f"the same command continues from {tmp_path / '16'}$"):
        guard.check(tmp_path)
    decide(guard, [1.0] * 16, [1.0] * 16)
    assert guard.check(tmp_path) == {"not_finite": 3, "spikes": 1}  # long ago, counted still


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="guard.window=1 is too short for a deviation; choose 2 or more"):
        GuardConfig(window=1, max_skipped=0)
    with pytest.raises(ValueError, match=r"guard.deviations=0.0 must be positive; choose 6, or null"):
        GuardConfig(deviations=0.0)
    with pytest.raises(
        ValueError, match=r"guard.max_skipped=50 is counted over guard.window=20 updates;\s*choose one from 0 to 19"
    ):
        GuardConfig(window=20)


NAN_LOSS, SPIKE, LOST = 3, 80, 90


def one_of_two_ranks(rank: int, folder: str) -> None:
    """Train a linear layer by DDP; one rank alone has a NaN, a spike, and a bad loss that leaves no bad gradient."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    wrapped, free = nn.parallel.DistributedDataParallel(layer), [*layer.parameters()]
    guard, optimizer = Guard(GuardConfig(), CPU), build_optimizer(layer, OptimConfig())
    generator = torch.Generator().manual_seed(rank)
    held = []
    for update in range(100):
        loss = wrapped(torch.randn(8, 4, generator=generator)).sub(3).square().mean()
        loss = loss * {(NAN_LOSS, 1): math.nan, (SPIKE, 0): 1e6}.get((update, rank), 1.0)
        guard.watch(loss * (math.inf if (update, rank) == (LOST, 1) else 1.0), last=True)
        loss.backward()
        before, norm = layer.weight.detach().clone(), gradient_norm(free)
        guarded_step(optimizer, free, 1e-3, 1.0, guard.veto(norm), norm)
        held.append(torch.equal(layer.weight, before))
    tensors = guard.tensors() | {"held": torch.tensor(held), "weight": layer.weight.detach()}
    save_file(tensors, f"{folder}/rank{rank}.safetensors")
    dist.destroy_process_group()


def test_what_one_rank_sees_is_skipped_by_both(tmp_path: Path):
    torch.multiprocessing.spawn(one_of_two_ranks, (str(tmp_path),), nprocs=2)
    one, other = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert one["held"].nonzero().flatten().tolist() == [NAN_LOSS, SPIKE, LOST]
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
