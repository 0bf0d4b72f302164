"""Averages keep their widths, and any width can be made of two that were kept."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from training.ema import EMA, EMAConfig, coefficients, combine, gamma_of


def walk(steps: int, width: int = 8, seed: int = 0):
    """A module that takes a random walk."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Linear(width, width, bias=False)
    for _ in range(steps):
        with torch.no_grad():
            net.weight += torch.randn(width, width, generator=generator) / math.sqrt(steps)
        yield net


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.25, None)])
def test_exponents_are_those_of_the_paper_and_have_the_width_asked_for(sigma_rel, gamma):
    found = gamma_of(sigma_rel)
    assert gamma is None or found == pytest.approx(gamma, abs=0.005)
    tau = (np.arange(1_000_000) + 0.5) / 1e6
    density = (found + 1) * tau**found
    mean = (density * tau).mean()
    assert math.sqrt((density * (tau - mean) ** 2).mean()) == pytest.approx(sigma_rel, rel=1e-4)


def test_a_power_function_average_weighs_each_step_by_its_power():
    """beta telescopes: the weight of step i of n is (i^g - (i-1)^g) / n^g with g = gamma + 1."""
    steps, batch, total = 300, 7, None
    ema = EMA(nn.Linear(8, 8, bias=False), EMAConfig(sigma_rel=[0.1]))
    power = gamma_of(0.1) + 1
    for step, net in enumerate(walk(steps), start=1):
        ema.update(net, step * batch, batch)
        part = ((step / steps) ** power - ((step - 1) / steps) ** power) * net.weight.detach().double()
        total = part if total is None else total + part
    assert torch.allclose(ema.profiles["ema_0.100"].weight.double(), total, atol=1e-5)


def test_further_averages_leave_the_main_one_as_it_was():
    one, two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    alone, among = EMA(one, EMAConfig(halflife=100)), EMA(one, EMAConfig(halflife=100, sigma_rel=[0.05, 0.1]))
    for step, two in enumerate(walk(20), start=1):
        alone.update(two, step, 1)
        among.update(two, step, 1)
    assert torch.equal(alone.module.weight, among.module.weight)
    assert list(among.profiles) == ["ema", "ema_0.050", "ema_0.100"]


@pytest.mark.parametrize("wanted", [0.04, 0.075, 0.15, 0.2])
def test_a_width_made_of_two_is_the_one_tracked(tmp_path: Path, wanted):
    steps, batch = 2000, 4
    ema = EMA(nn.Linear(8, 8, bias=False), EMAConfig(sigma_rel=[0.05, 0.1]))
    tracked = EMA(nn.Linear(8, 8, bias=False), EMAConfig(sigma_rel=[wanted]))
    for step, net in enumerate(walk(steps), start=1):
        ema.update(net, step * batch, batch)
        tracked.update(net, step * batch, batch)
        if step % 100 == 0:
            folder = tmp_path / str(step * batch) / "denoiser"
            folder.mkdir(parents=True)
            for name, module in ema.profiles.items():
                save_file(module.state_dict(), folder / f"{name}.safetensors")
    truth, latest = tracked.profiles[f"ema_{wanted:.3f}"].weight, ema.profiles["ema_0.100"].weight
    made = combine(sorted(tmp_path.iterdir()), wanted)["weight"]
    assert made.dtype == torch.float32
    assert (made - truth).norm() < 0.01 * truth.norm()
    assert (made - truth).norm() < 0.05 * (latest - truth).norm(), "nearer than the nearest that was kept"


def test_what_was_kept_is_itself():
    kept = [(1000, 0.05), (1000, 0.1), (2000, 0.05), (2000, 0.1)]
    assert coefficients(kept, 2000, 0.1) == pytest.approx([0, 0, 0, 1], abs=1e-9)
    assert coefficients(kept, 1000, 0.05) == pytest.approx([1, 0, 0, 0], abs=1e-9)


@pytest.mark.parametrize(("count", "wanted"), [(1, 0.2), (2, 0.07), (4, 0.15), (100, 0.03)])
def test_what_is_summed_is_an_average(count, wanted):
    kept = [(1000 * (i + 1), width) for i in range(count) for width in (0.05, 0.1)]
    assert sum(coefficients(kept, 1000 * count, wanted)) == pytest.approx(1, abs=1e-8)


def test_bad_widths_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ema.sigma_rel=\[0.3\] is outside 0.001 to 0.28; choose widths such as 0.05"):
        EMAConfig(sigma_rel=[0.3])
    with pytest.raises(ValueError, match=r"ema.sigma_rel=\[0.1, 0.1001\] has a width twice to three digits"):
        EMAConfig(sigma_rel=[0.1, 0.1001])
    with pytest.raises(ValueError, match="holds no average that can be combined; train with ema.sigma_rel"):
        combine([tmp_path], 0.1)
    (tmp_path / "10" / "denoiser").mkdir(parents=True)
    save_file({"weight": torch.ones(1)}, tmp_path / "10" / "denoiser" / "ema_0.100.safetensors")
    with pytest.raises(ValueError, match="images=20 is not within the 10 images of the averages kept"):
        combine([tmp_path / "10"], 0.1, images=20)
