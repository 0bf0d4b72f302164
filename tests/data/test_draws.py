"""The seed's decisions: their distributions, their independence, and that no upgrade changes them."""

import numpy as np
import pytest
import torch
from scipy import stats

from data import draws

POSITIONS = np.arange(100_000)
UNIFORM = [0.9366076550487615, 0.13225804743980396, 0.8736115236005279]
ORDER = [1, 5, 6, 3, 0, 7, 2, 4]
NOISE = [[0.125948, -0.1025468], [-0.0033876, -0.4657567]]


def test_hash_is_splitmix64():
    """The first outputs of the published generator for state 0, in numpy and in torch's signed integers."""
    states = np.array([1, 2, 3], np.uint64) * np.uint64(draws._GOLDEN)
    published = np.array([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], np.uint64)
    assert np.array_equal(draws._mix_numpy(states), published)
    signed = torch.from_numpy(states.view(np.int64))
    assert np.array_equal(draws._mix(signed).numpy().view(np.uint64), published)


def test_values_are_pinned():
    """A run of last year must continue: these literals never change."""
    assert draws.uniform(0, "caption", np.arange(3)).tolist() == UNIFORM
    assert draws.order(0, 0, 8).tolist() == ORDER
    assert draws.noise(0, np.array([0, 1]), (2,)).numpy() == pytest.approx(np.array(NOISE), abs=1e-6)


@pytest.mark.parametrize(("seed", "stream"), [(0, "time"), (1, "time"), (2**40, "caption")])
def test_uniform_is_uniform_and_open(seed, stream):
    u = draws.uniform(seed, stream, POSITIONS)
    assert u.dtype == np.float64
    assert u.min() > 0
    assert u.max() < 1
    assert u.mean() == pytest.approx(1 / 2, abs=4 / np.sqrt(12 * len(u)))
    assert u.var() == pytest.approx(1 / 12, rel=0.02)
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 4 / np.sqrt(len(u))


def test_uniform_never_reaches_its_ends(monkeypatch):
    extremes = np.array([0, 2**64 - 1], np.uint64)
    monkeypatch.setattr(draws, "_bits", lambda *_: extremes)
    low, high = draws.uniform(0, "time", np.arange(2))
    assert 0 < low < high < 1


@pytest.mark.parametrize("other", [(0, "drop"), (1, "time"), (0, "time ")])
def test_streams_are_independent(other):
    a, b = draws.uniform(0, "time", POSITIONS), draws.uniform(*other, POSITIONS)
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))
    assert len(np.intersect1d(a, b)) == 0


def test_uniform_depends_on_the_position_alone():
    some = np.array([7, 3, 10**12, 3])
    together = draws.uniform(5, "time", some)
    assert together.tolist() == [draws.uniform(5, "time", some[i : i + 1]).item() for i in range(4)]


def test_noise_row_depends_on_seed_and_position_alone():
    shape = (4, 6, 6)
    together = draws.noise(3, np.array([11, 5, 2**40, 6]), shape)
    assert together.dtype == torch.float32
    for row, position in zip(together, (11, 5, 2**40, 6), strict=True):
        assert torch.equal(row, draws.noise(3, np.array([position]), shape)[0])
    assert not torch.equal(together[1], draws.noise(4, np.array([5]), shape)[0])
    assert not torch.equal(together[1], draws.noise(3, np.array([5]), shape, stream="other")[0])


def test_noise_is_unit_gaussian():
    values = draws.noise(0, np.arange(64), (4, 32, 32)).double().numpy()
    flat, n = values.ravel(), values.size
    for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        assert np.mean(flat**power) == pytest.approx(moment, abs=4 * np.sqrt(spread / n))
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    rows = values.reshape(64, -1)
    bound = 4 / np.sqrt(n / 2)
    assert abs(np.mean(rows[1:] * rows[:-1])) < bound  # neighbouring positions
    assert abs(np.mean(rows[:, 1:] * rows[:, :-1])) < bound  # neighbouring numbers
    half = rows.shape[1] // 2
    assert abs(np.mean(rows[:, :half] * rows[:, half:])) < bound  # the two of one Box-Muller pair
    assert abs(np.mean((rows[:, :half] ** 2 - 1) * (rows[:, half:] ** 2 - 1))) < 2 * bound
    assert len(np.unique(flat)) > 0.95 * n


def test_noise_has_tails():
    """Above 4 sigma as often as a Gaussian; a 24-bit radius would end at 5.8 sigma."""
    beyond = sum((draws.noise(s, np.arange(100), (20_000,)).abs() > 4).sum().item() for s in range(5))
    assert beyond == pytest.approx(10_000_000 * 6.334e-5, rel=0.2)
    largest = np.sqrt(-2 * np.log(0.5 * 2.0**-40))
    assert largest > 7.4


def test_noise_of_an_odd_count():
    assert draws.noise(0, np.arange(3), (1, 5, 1)).shape == (3, 1, 5, 1)


@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_every_epoch_is_a_permutation(n):
    epochs = [draws.order(0, epoch, n) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    if n > 30:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], draws.order(1, 0, n))


def test_order_has_no_preference():
    """Over many epochs, each record is first, last and before each other one as often as chance has it."""
    orders = np.stack([draws.order(0, epoch, 5) for epoch in range(2000)])
    for slot in range(5):
        assert stats.chisquare(np.bincount(orders[:, slot], minlength=5)).pvalue > 1e-4


def test_rows_walk_the_orders_across_epochs():
    n = 7
    expected = np.concatenate([draws.order(9, epoch, n) for epoch in range(4)])
    assert np.array_equal(draws.rows(9, np.arange(4 * n), n), expected)
    scattered = np.array([20, 0, 7, 27, 6])
    assert np.array_equal(draws.rows(9, scattered, n), expected[scattered])
