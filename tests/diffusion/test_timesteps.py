import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.stats import norm

from diffusion.schedule import table_times
from diffusion.timesteps import from_table, logit_normal, table_index, trailing_grid, uniform_grid

TABLES = [table_times(), table_times(zero_terminal=True)]


def test_table_law_draws_every_entry_equally_often(uniform):
    table = TABLES[1]
    times, counts = from_table(uniform, table).unique(return_counts=True)
    assert torch.equal(times, table) and (counts == len(uniform) // len(table)).all()
    assert from_table(torch.tensor([1.0]), table) == 1  # u = 1 is outside the domain but not outside the table


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.4)])
def test_logit_normal_has_its_distribution(mean, std):
    u = torch.from_numpy(np.random.default_rng(0).uniform(size=20_000))
    t = np.sort(logit_normal(u, mean, std).numpy())
    cdf = norm.cdf((np.log(t) - np.log1p(-t) - mean) / std)
    assert np.abs(cdf - (np.arange(len(t)) + 0.5) / len(t)).max() < 1.63 / math.sqrt(len(t))  # KS, p = 0.01


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table_index_is_exact_at_entries_monotone_between_and_held_outside(table, dtype):
    table = table.to(dtype)
    torch.testing.assert_close(table_index(table, table), torch.arange(1000, dtype=dtype), atol=1e-4, rtol=0)
    between = table_index(torch.linspace(0, 1, 4001, dtype=dtype), table)
    assert (between.diff() >= 0).all() and between[0] == 0 and between[-1] == 999


def test_table_index_interpolates_log_sigma():
    table = TABLES[0]
    middle = torch.sigmoid((table.logit()[300] + table.logit()[301]) / 2)
    torch.testing.assert_close(table_index(middle[None], table), torch.tensor([300.5], dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 7, 20, 28, 50, 1000])
def test_trailing_grid_is_that_of_diffusers(steps):
    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    expected = torch.cat([TABLES[1][theirs.timesteps], torch.zeros(1, dtype=torch.float64)])
    assert torch.equal(trailing_grid(steps, TABLES[1]), expected)


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match=r"sampler.steps=1001 does not fit a table of 1000 times; choose 1 to 1000"):
        trailing_grid(1001, TABLES[0])
    with pytest.raises(ValueError, match=r"sampler.steps=0"):
        uniform_grid(0)
