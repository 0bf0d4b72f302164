"""The plan: every record once an epoch, every chunk of one size, sets by their shares; whoever asks, from wherever."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from data import draws
from data.plan import Plan

SEVERAL = [[37, 0, 5, 1], [11, 8, 0, 64]]  # two sets, four sizes; each lacks one


def found(plan: Plan, positions) -> list[tuple[int, int, int]]:
    return list(zip(*(array.tolist() for array in plan(np.asarray(positions))), strict=True))


@pytest.mark.parametrize("seed", [0, 5])
def test_one_set_of_one_size_is_a_permutation_an_epoch(seed):
    rows = [row for *_, row in found(Plan(seed, [[37]], None, 8), range(100))]
    assert rows == draws.rows(seed, np.arange(100), 37).tolist()


@pytest.mark.parametrize("chunk", [1, 2, 6, 64, 1000])
@pytest.mark.parametrize("weights", [None, [1, 1], [0.9, 0.1]])
def test_chunks_have_one_size(chunk, weights):
    _, sizes, _ = Plan(1, SEVERAL, weights, chunk)(np.arange(chunk * 50))
    assert (sizes.reshape(-1, chunk) == sizes[::chunk, None]).all()


@pytest.mark.parametrize("chunk", [1, 2, 6, 20])
def test_no_record_is_left_out_or_comes_again_before_the_others(chunk):
    """Of every list of records, each run of its length shows all of it: the order is epochs, put end to end."""
    shown = found(Plan(3, SEVERAL, None, chunk), range(20 * 126))
    for one, size in itertools.product(range(2), range(4)):
        rows = [row for *place, row in shown if place == [one, size]]
        count = SEVERAL[one][size]
        assert (len(rows) > 0) == (count > 0)
        for first in range(0, len(rows) - count + 1, max(count, 1)):
            assert sorted(rows[first : first + count]) == list(range(count))


@pytest.mark.parametrize("chunk", [1, 2, 6, 20])
def test_an_epoch_is_an_epoch_but_for_whole_chunks(chunk):
    """After n images all n records were shown, up to one chunk a size that is still open."""
    total = int(np.sum(SEVERAL))
    plan = Plan(3, SEVERAL, None, chunk)
    for epochs in (1, 2, 7):
        end = epochs * total + 4 * chunk
        times = Counter(found(plan, range(end)))
        assert len(times) == total
        assert min(times.values()) >= epochs
        assert sum(times.values()) - epochs * total <= 4 * chunk


def test_epochs_and_rounds_are_in_another_order():
    plan = Plan(3, [[300, 200]], None, 4)
    sizes = plan(np.arange(2000))[1][::4].reshape(4, -1)
    assert len({tuple(row) for row in sizes.tolist()}) == 4
    assert (sizes == 0).mean() == 0.6
    rows = [row for _, size, row in found(plan, range(2000)) if size == 0]
    assert rows[:300] != rows[300:600]


def test_sizes_are_shuffled_among_each_other():
    """Runs of one size are as long as chance makes them, not as long as the bucket."""
    sizes = Plan(3, [[5000, 5000]], None, 1)(np.arange(10_000))[1]
    assert np.abs(np.diff(sizes)).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("chunk", [8, 64])
def test_sets_have_their_shares_of_every_batch(chunk):
    """Whatever their sizes: within a chunk the shares are whole numbers around the exact ones."""
    sets, _, rows = Plan(0, [[1000], [37], [5]], [0.5, 0.3, 0.2], chunk)(np.arange(64 * 200))
    counts = np.stack([np.bincount(part, minlength=3) for part in sets.reshape(-1, chunk)])
    assert np.abs(counts - np.array([0.5, 0.3, 0.2]) * chunk).max() < 2
    assert np.bincount(sets) / len(sets) == pytest.approx([0.5, 0.3, 0.2], abs=1e-3)
    assert sorted(rows[sets == 1][37:74]) == list(range(37))  # a small set has its own epochs


def test_weights_hold_over_sizes_too():
    """A set's pictures keep the proportions of their sizes."""
    sets, sizes, _ = Plan(0, [[600, 400], [0, 50]], [0.25, 0.75], 4)(np.arange(40_000))
    assert np.mean(sets == 1) == pytest.approx(0.75, abs=0.005)
    assert np.mean(sizes[sets == 0] == 0) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
def test_a_position_is_the_same_however_it_is_asked_for(weights):
    plan, rng = Plan(9, SEVERAL, weights, 6), np.random.default_rng(0)
    whole = np.stack(plan(np.arange(3000)))
    for _ in range(30):
        some = rng.integers(0, 3000, rng.integers(1, 50))
        fresh = pickle.loads(pickle.dumps(plan)) if rng.random() < 0.5 else plan
        assert np.array_equal(np.stack(fresh(some)), whole[:, some])


def test_far_positions_are_found_at_once():
    plan = Plan(0, [[10**6, 3 * 10**5, 7]], None, 256)
    far = 10**12 // 256 * 256
    sizes = plan(np.arange(far, far + 256 * 40))[1]
    assert (sizes.reshape(-1, 256) == sizes[::256, None]).all()
