"""Which record each position of a run shows: a pure function of (seed, position), with buckets and several data sets.

A run is a row of chunks of `chunk` images; all images of a chunk have one size, so that they fit in one tensor. Every
data set s has n_sb records in bucket b. Each of these lists is shown in an endless stream, a new permutation an epoch:

    record = order(seed, epoch, n_sb)[i],    epoch, i = divmod(place in the stream, n_sb).

Streams are dealt by whole-number quotas q_sb, which are n_sb itself, or w_s N n_sb / n_s where the sets have weights:

    of a bucket's slots, s gets q_sb in every Q_b = sum_s q_sb, as evenly spread as whole numbers allow;
    round r of the run has ceil((r + 1) Q_b / c) - ceil(r Q_b / c) chunks of bucket b, in an order drawn from (seed, r).

So no record is left out, and none is shown again before all others of its list. A round is an epoch, rounded up to
whole chunks: what is over counts towards the next. Without buckets and with one set, position p shows record
order(seed, p // n)[p % n]. Neither processes nor micro-batches occur, so any number of them sees the same.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from data import draws


class Plan:
    """The plan of a run over data sets of so many records in each bucket."""

    def __init__(self, seed: int, counts: Sequence[Sequence[int]], weights: Sequence[float] | None, chunk: int):
        """`counts[s][b]` records of set s in bucket b, 0 where it has none; `weights[s]` shares of the images."""
        self._given = seed, counts, weights, chunk
        self._seed, self._chunk = seed, chunk
        self._counts = np.array(counts, np.int64)
        self._quotas = _quotas(self._counts, weights)
        self._totals = self._quotas.sum(0)
        self._round = lru_cache(maxsize=2)(self._begin_round)  # a batch may lie across two

    def __reduce__(self):
        return Plan, self._given

    @property
    def shares(self) -> list[float]:
        """The sets' shares of the images."""
        return (self._quotas.sum(1) / self._quotas.sum()).tolist()

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Set, bucket and number in the bucket, (b,) each, of the records that positions (b,) show."""
        positions = np.asarray(positions, np.int64)
        buckets, slots = self._slots(positions)
        sets, rows = np.zeros_like(slots), np.zeros_like(slots)
        for bucket in np.unique(buckets):
            here = buckets == bucket
            sets[here], rows[here] = self._deal(int(bucket), slots[here])
        return sets, buckets, rows

    def _slots(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bucket of each position, and its place among all slots of that bucket."""
        if len(self._totals) == 1:
            return np.zeros_like(positions), positions
        chunks, within = np.divmod(positions, self._chunk)
        buckets, ordinals = np.empty_like(chunks), np.empty_like(chunks)
        for number in np.unique(chunks):
            here = chunks == number
            first, labels, counted = self._round(self._round_of(int(number)))
            buckets[here], ordinals[here] = labels[number - first], counted[number - first]
        return buckets, ordinals * self._chunk + within

    def _round_of(self, number: int) -> int:
        """The round that the run's chunk lies in."""
        turn = number * self._chunk // int(self._totals.sum())  # none is shorter than an epoch, so it is no later one
        while self._begins(turn).sum() > number:
            turn -= 1
        return turn

    def _begin_round(self, turn: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The round's first chunk; the bucket of each of its chunks, and how many of that bucket came before it."""
        begins, ends = self._begins(turn), self._begins(turn + 1)
        labels = np.repeat(np.arange(len(begins)), ends - begins)
        turns = draws.order(self._seed, turn, len(labels), "buckets")
        labels, counted = labels[turns], np.empty_like(labels)
        for bucket, begin in enumerate(begins):
            mine = np.flatnonzero(labels == bucket)
            counted[mine] = begin + np.arange(len(mine))
        return int(begins.sum()), labels, counted

    def _begins(self, turn: int) -> np.ndarray:
        """How many chunks of each bucket come before a round."""
        return -(-turn * self._totals // self._chunk)

    def _deal(self, bucket: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Set and record of a bucket's slots: one set after the other takes its even share of what is left."""
        sets, rows = np.empty_like(slots), np.empty_like(slots)
        left, open_ = int(self._totals[bucket]), np.ones(len(slots), bool)
        place = slots.copy()
        for which, quota in enumerate(self._quotas[:, bucket].tolist()):
            if not quota:
                continue
            before = place * quota // left  # slots that went to this set before
            taken = open_ & ((place + 1) * quota // left > before)
            sets[taken] = which
            rows[taken] = self._records(which, bucket, before[taken])
            place = np.where(open_ & ~taken, place - before, place)
            open_ &= ~taken
            left -= quota
        return sets, rows

    def _records(self, which: int, bucket: int, places: np.ndarray) -> np.ndarray:
        count = int(self._counts[which, bucket])
        name = "" if self._quotas.size == 1 else f"{which}/{bucket}"
        return draws.rows(self._seed, places, count, name)


def _quotas(counts: np.ndarray, weights: Sequence[float] | None) -> np.ndarray:
    if weights is None:
        return counts
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    exact = shares[:, None] * counts.sum() * counts / counts.sum(1, keepdims=True)
    return np.where(counts > 0, np.maximum(np.rint(exact), 1), 0).astype(np.int64)
