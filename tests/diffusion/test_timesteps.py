import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.integrate import cumulative_simpson

from diffusion.schedule import table_times
from diffusion.timesteps import (
    MODE_SCALES,
    Grid,
    cosmap,
    from_table,
    logit_normal,
    mode,
    ramp,
    share,
    stratified,
    table_grid,
    table_index,
    uniform_grid,
)

TABLES = [table_times(), table_times(zero_terminal=True)]
INNER = np.linspace(1e-5, 1 - 1e-5, 200_001)
LAWS = {
    "logit_normal": lambda u: logit_normal(u, -0.5, 1.4),
    "mode": lambda u: mode(u, 1.29),
    "mode, ends": lambda u: mode(u, -0.7),
    "cosmap": cosmap,
}


def printed_logit_normal(t, mean=-0.5, std=1.4):
    logit = np.log(t / (1 - t))
    return np.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi) * t * (1 - t))


def printed_cosmap(t):
    return 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2)


def printed_mode(scale):
    """The density |du/dt| of t = f(u), by inverting the printed f, which falls from 1 to 0."""
    u = np.linspace(0, 1, 400_001)
    f = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    return lambda t: -np.gradient(np.interp(t, f[::-1], u[::-1]), t)


PRINTED = {
    "logit_normal": printed_logit_normal,
    "mode": printed_mode(1.29),
    "mode, ends": printed_mode(-0.7),
    "cosmap": printed_cosmap,
}


def ks(times, density):
    """Kolmogorov and Smirnov's distance in units of its bound at p = 0.01, from a density on (0, 1)."""
    t = np.sort(np.asarray(times))
    cdf = np.interp(t, INNER, cumulative_simpson(density(INNER), x=INNER, initial=0))
    n = len(t)
    return np.abs(cdf - (np.arange(n) + 0.5) / n).max() / (1.63 / np.sqrt(n))


def test_table_law_draws_every_entry_equally_often(uniform):
    table = TABLES[1]
    times, counts = from_table(uniform, table).unique(return_counts=True)
    assert torch.equal(times, table) and (counts == len(uniform) // len(table)).all()
    assert from_table(torch.tensor([1.0]), table) == 1  # u = 1 is outside the domain but not outside the table


@pytest.mark.parametrize("name", LAWS)
def test_laws_have_their_printed_densities(name):
    u = torch.from_numpy(np.random.default_rng(0).uniform(size=20_000))
    assert ks(LAWS[name](u), PRINTED[name]) < 1
    assert ks(LAWS[name](u), lambda t: np.ones_like(t)) > 3  # the test can tell


@pytest.mark.parametrize("name", LAWS)
def test_laws_rise_from_0_to_1(name):
    t = LAWS[name](torch.linspace(0, 1, 10_001, dtype=torch.float64))
    assert (t.diff() > 0).all() and (t[0], t[-1]) == (0, 1)


@pytest.mark.parametrize("scale", MODE_SCALES)
def test_mode_rises_up_to_the_printed_bounds_and_no_further(scale):
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    assert (mode(u, scale).diff() > -1e-12).all()
    assert not (mode(u, 1.1 * scale).diff() > -1e-12).all()


@pytest.mark.parametrize("batch", [1, 8, 48])
def test_a_stratified_batch_has_one_number_in_each_share(batch):
    generator = torch.Generator().manual_seed(0)
    positions, u = torch.arange(5 * batch), torch.rand(5 * batch, dtype=torch.float64, generator=generator)
    numbers = stratified(u, positions, batch)
    for one in numbers.split(batch):
        assert (one * batch).long().sort().values.tolist() == list(range(batch))
    torch.testing.assert_close((numbers * batch) % 1, u)  # spread evenly inside its share
    parts = [stratified(part, where, batch) for part, where in zip(u.split(4), positions.split(4), strict=True)]
    assert torch.equal(torch.cat(parts), numbers)


@pytest.mark.parametrize("name", LAWS)
def test_share_is_where_a_law_stays_in_range(name):
    law = LAWS[name]
    first, last = share(law, 0.2, 0.7)
    ends = law(torch.tensor([first, last], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.2, 0.7], dtype=torch.float64), atol=1e-12, rtol=0)
    assert share(law, 0.0, 1.0) == (0, 1)


def test_share_of_a_table_is_that_of_its_entries():
    table = torch.arange(10, dtype=torch.float64) / 10
    assert share(lambda u: from_table(u, table), 0.2, 0.55) == pytest.approx((0.2, 0.6), abs=1e-15)
    first, last = share(lambda u: from_table(u, table), 0.21, 0.29)
    assert last - first < 1e-15
    for nothing in ((0.95, 1.0), (-2.0, -1.0)):
        first, last = share(lambda u: from_table(u, table), *nothing)
        assert first > last


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


@pytest.mark.parametrize("steps", [2, 7, 20, 28, 50, 199, 999])
@pytest.mark.parametrize("kind", [Grid.trailing, Grid.leading, Grid.linspace])
def test_table_grids_are_those_of_diffusers(kind, steps):
    theirs = DDIMScheduler(timestep_spacing=kind.name, steps_offset=1)
    theirs.set_timesteps(steps)
    expected = torch.cat([TABLES[1][theirs.timesteps], torch.zeros(1, dtype=torch.float64)])
    assert torch.equal(table_grid(kind, steps, TABLES[1]), expected)


@pytest.mark.parametrize("kind", [Grid.trailing, Grid.linspace])
def test_one_step_starts_from_the_noisiest_time(kind):
    assert table_grid(kind, 1, TABLES[1]).tolist() == [1, 0]


def test_ramps_are_those_of_edm_and_of_equal_ratios():
    karras, exponential = ramp(Grid.karras, 9, 14.6, 0.03), ramp(Grid.exponential, 9, 14.6, 0.03)
    roots, ratios = karras ** (1 / 7), exponential.log()
    for even, values in ((roots, karras), (ratios, exponential)):
        torch.testing.assert_close(even.diff(), even.diff().mean().expand(8))
        torch.testing.assert_close(values[[0, -1]], torch.tensor([14.6, 0.03], dtype=torch.float64))
    torch.testing.assert_close(ramp(Grid.karras, 9, 14.6, 0.03, rho=1.0), torch.linspace(14.6, 0.03, 9).double())


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match=r"sampler.steps=1001 does not fit a table of 1000 times; choose 1 to 1000"):
        table_grid(Grid.trailing, 1001, TABLES[0])
    with pytest.raises(ValueError, match=r"sampler.steps=1000 does not fit a table of 1000 times; choose 1 to 999"):
        table_grid(Grid.leading, 1000, TABLES[0])
    with pytest.raises(ValueError, match=r"sampler.steps=0"):
        uniform_grid(0)
