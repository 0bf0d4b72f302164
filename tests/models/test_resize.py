"""Other sizes: the same function wherever that is claimed, and a start that can be trained."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import layers, resize
from models.account import Account
from models.base import Cond
from models.resize import spread
from models.surgery import gap, transfer
from tests.models.test_surgery import CCDIT, MMDIT, PIXART, TIMES, UNET, stirred

DUAL = replace(MMDIT, dual=1)
WINDOWS = replace(PIXART, kv_compression=2, kv_blocks=[1, 2])
LEVELS = replace(UNET, channels=[16, 32, 32], depths=[1, 1, 0], heads=[2, 4, 4])


def given(rows: int = 2) -> Cond:
    """Something to read for every network."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(rows, 3, 12, dtype=torch.float64, generator=generator)
    pooled = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
    return Cond(text=text, pooled=pooled, class_id=torch.arange(rows), size_ids=torch.full((rows, 1), 64.0))


def resized(config, **sizes) -> tuple[nn.Module, nn.Module, Account]:
    torch.manual_seed(0)
    source, target = stirred(config.build()), replace(config, **sizes).build().double()
    return source, target, transfer(source, target)


def difference(source: nn.Module, target: nn.Module, cond: Cond | None = None) -> float:
    cond = cond or given()
    return float(gap(source, target, cond, cond, TIMES[1:4:2], (2, 4, 8, 8), torch.Generator().manual_seed(1)).max())


def gradients(denoiser: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, wanted = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64, generator=generator)
    F.mse_loss(denoiser(x, TIMES[1:3], given()), wanted).backward()
    return {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (2, 5), (3, 4), (6, 12), (12, 28), (28, 12), (5, 2)])
def test_blocks_are_spread_evenly_with_both_ends_in_place(old: int, new: int):
    chosen = spread(old, new)
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (0, old - 1)
    counts = [chosen.count(i) for i in set(chosen)]
    if new >= old:
        assert set(chosen) == set(range(old))
        assert max(counts[:-1], default=0) - min(counts[:-1], default=0) <= 1
    else:
        assert len(set(chosen)) == new


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        *((config, {"depth": depth}) for config in (CCDIT, PIXART, MMDIT) for depth in (4, 7)),
        (replace(CCDIT, depth=1), {"depth": 2}),
        (replace(MMDIT, depth=1), {"depth": 3}),  # the only block's text was keys and values
        (MMDIT, {"dual": 2}),
        (DUAL, {"depth": 5, "dual": 1}),
        (replace(MMDIT, dual=2), {"depth": 5, "dual": 4}),
        (WINDOWS, {"depth": 5, "kv_blocks": [2, 4]}),
        *((UNET, {"layers": layers}) for layers in (3, 4, 5)),
        (replace(UNET, layers=1), {"layers": 3}),
        (replace(UNET, layers=3), {"layers": 4}),
        (UNET, {"depths": [2, 3]}),
        (UNET, {"middle_depth": 3}),
        (LEVELS, {"layers": 3, "depths": [1, 2, 1], "middle_depth": 2}),
    ],
    ids=str,
)
def test_deeper_is_the_same_function_and_learns(config, sizes):
    source, target, account = resized(config, **sizes)
    assert difference(source, target) < 1e-12
    reached = gradients(target)
    silent = [name for kind in ("zeroed", "identity") for name in account.names(kind)]
    assert all(reached[name].any() for name in silent if "text" not in name)  # text's first moves the picture's
    assert silent or config is MMDIT or not account.names("duplicated")


@pytest.mark.parametrize("config", [CCDIT, PIXART, DUAL], ids=lambda config: type(config).__name__)
def test_shallower_keeps_blocks_as_they_are_and_names_the_dropped(config):
    source, target, account = resized(replace(config, depth=5), depth=3)
    ours, theirs = target.state_dict(), source.state_dict()
    for j, i in enumerate([0, 2, 4]):
        part = [name for name in ours if name.startswith(f"blocks.{j}.") and ".modulation" not in name]
        assert all(torch.equal(ours[name], theirs[name.replace(f"blocks.{j}.", f"blocks.{i}.")]) for name in part)
    assert {name.split(".")[1] for name in account.names("dropped")} == {"1", "3"}
    assert any("depth shrinks" in note for note in account.notes)


def test_shallower_unet():
    source, target, account = resized(replace(UNET, layers=3, depths=[0, 2]), layers=2, depths=[0, 1])
    ours, theirs = target.state_dict(), source.state_dict()
    for ours_at, theirs_at in {
        "down.0.res.1": "down.0.res.2",
        "up.1.res.1": "up.1.res.2",
        "up.1.res.2": "up.1.res.3",
    }.items():
        assert torch.equal(ours[f"{ours_at}.conv2.weight"], theirs[f"{theirs_at}.conv2.weight"])
    assert not account.names("initialised")


@pytest.mark.parametrize("config", [UNET, LEVELS])
@pytest.mark.parametrize("factor", [2, 3])
def test_wider_unet_is_the_same_function(config, factor: int):
    """Times 2 the waves of time are the same to the bit; times 3 their frequencies differ in float32's last one."""
    sizes = {name: [factor * n for n in getattr(config, name)] for name in ("channels", "heads")}
    source, target, account = resized(config, **sizes)
    assert difference(source, target) < (1e-12 if factor == 2 else 1e-6)
    assert {entry.kind for entry in account.entries} == {"copied", "widened"}


TRANSFORMERS = pytest.mark.parametrize("config", [CCDIT, PIXART, DUAL, WINDOWS], ids=["CCDiT", "PixArt", "MMDiT", "kv"])


@TRANSFORMERS
@pytest.mark.parametrize("factor", [2, 3])
def test_wider_transformer_is_the_same_function_but_for_positions(config, factor: int, monkeypatch):
    source, target, _ = resized(config, hidden=32 * factor, heads=4 * factor)
    assert 1e-4 < difference(source, target) < 0.05
    monkeypatch.setattr(layers, "positions", lambda *_: torch.zeros((), dtype=torch.float64))
    assert difference(source, target) < 1e-12


@TRANSFORMERS
def test_reading_old_waves_alone_makes_the_gap_small(config, monkeypatch):
    near = difference(*resized(config, hidden=64, heads=8)[:2])
    monkeypatch.setattr(resize, "READS_WAVES", re.compile("none"))  # shares instead
    shares = difference(*resized(config, hidden=64, heads=8)[:2])
    chance = difference(stirred(config.build()), stirred(replace(config, hidden=64, heads=8).build(), seed=1))
    assert 3 * near < shares < chance


@pytest.mark.parametrize(
    ("config", "sizes", "names"),
    [
        (CCDIT, {"hidden": 64, "heads": 8}, ["blocks.1.mlp.fc1", "blocks.1.modulation"]),
        (
            UNET,
            {"channels": [32, 64], "heads": [4, 8]},
            ["down.1.res.0.conv1", "middle.attn.0.proj_in"],
        ),
    ],
)
def test_copies_part_at_the_first_step(config, sizes, names):
    """Adam follows the gradient's direction: twins with parallel gradients would stay twins."""
    _, target, _ = resized(config, **sizes)
    reached = gradients(target)
    for name in names:
        rows = reached[f"{name}.weight"].flatten(1).unflatten(0, (-1, 2))
        cosines = F.cosine_similarity(rows[:, 0], rows[:, 1])
        assert (cosines.abs() < 1 - 1e-6).double().mean() > 0.9


@pytest.mark.parametrize(
    ("config", "embed", "head"), [(CCDIT, "patch_embed", "final.linear"), (UNET, "conv_in", "conv_out")]
)
def test_another_autoencoder_renews_both_ends(config, embed: str, head: str):
    source, target, account = resized(config, in_channels=16)
    assert account.names("initialised") == [f"{head}.weight", f"{head}.bias"]
    assert account.names("redrawn") == [f"{embed}.weight"]
    assert len(account.names("copied")) == len(account.entries) - 5
    assert any("in_channels 4 -> 16" in line for line in account.summary())
    old, new = (net.state_dict()[f"{embed}.weight"] for net in (source, target))
    torch.testing.assert_close(*(k.square().sum((1, 2, 3)) for k in (new, old)))  # variances of tokens of white noise
    assert torch.linalg.matrix_rank(new.flatten(1)) == min(len(new), new[0].numel())  # every direction is seen


def test_other_classes_start_as_none():
    source, target, account = resized(CCDIT, num_classes=9)
    null = Cond()
    assert difference(source, target, null) == 0
    assert torch.equal(target.class_embedding.weight, source.class_embedding.weight[-1:].expand(10, -1))
    assert any("num_classes 5 -> 9" in note for note in account.notes)


def test_all_at_once_from_ccdit(monkeypatch):
    """Class, depth, width and patches in one transfer: at the anchor only positions are not as they were."""
    source = stirred(CCDIT.build())
    sizes = {"hidden": 64, "heads": 8, "depth": 5}
    pixart = replace(PIXART, patch_size=4, base_size=16, **sizes).build().double()
    mmdit = replace(MMDIT, dual=2, **sizes).build().double()
    masked = given()
    masked.text_mask = torch.zeros(2, 3, dtype=torch.bool)
    at = torch.tensor([0.5])
    for target, cond in ((pixart, given()), (mmdit, masked)):
        transfer(source, target)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "positions", lambda *_: torch.zeros((), dtype=torch.float64))
            assert gap(source, target, Cond(), cond, at, (2, 4, 8, 8)) < 1e-12
        assert gap(source, target, Cond(), cond, at, (2, 4, 8, 8)) < 0.05
