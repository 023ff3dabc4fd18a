"""Where negatives come from, how often each is drawn, and which of them the user likes after all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from engine.core.errors import BuildError
from engine.core.interactions import Interactions
from engine.core.types import BoolArray, Float32Array, Float64Array, Int32Array, Int64Array


class AliasTable:
    """Draws i with probability weights[i] / sum(weights) in constant time (Vose 1991).

    Args:
        weights: float64[n], 0 or more, one above 0.
    """

    def __init__(self, weights: Float64Array) -> None:
        total = float(weights.sum())
        if not total > 0:
            raise BuildError("no item has a weight above 0: there is nothing to draw negatives from")
        self.probabilities: Float64Array = weights / total
        self._cut = np.ones(weights.size)
        self._alias = np.arange(weights.size, dtype=np.int32)
        fill_alias(self.probabilities * weights.size, self._cut, self._alias)

    def draw(self, random: np.random.Generator, shape: int | tuple[int, ...]) -> Int32Array:
        """Return int32[shape] drawn independently."""
        at = random.integers(0, self._cut.size, shape, np.int32)
        return np.where(random.random(shape) < self._cut[at], at, self._alias[at]).astype(
            np.int32, copy=False
        )


@njit(nogil=True, cache=True)
def fill_alias(scaled, cut, alias):  # type: ignore[no-untyped-def]
    """Fill an alias table from probabilities times n; `cut` comes as ones, `alias` as 0, 1, ..."""
    n = scaled.size
    small = np.empty(n, np.int32)
    large = np.empty(n, np.int32)
    smalls = larges = 0
    for i in range(n):
        if scaled[i] < 1.0:
            small[smalls] = i
            smalls += 1
        else:
            large[larges] = i
            larges += 1
    while smalls and larges:
        smalls -= 1
        s, g = small[smalls], large[larges - 1]
        cut[s] = scaled[s]
        alias[s] = g
        scaled[g] -= 1.0 - scaled[s]
        if scaled[g] < 1.0:
            larges -= 1
            small[smalls] = g
            smalls += 1


class ClusterNegatives:
    """Draws negatives from the cluster of the positive, by popularity inside it: hard ones that share its theme.

    Args:
        clusters: int32[items], 0 or more.
        weights: float64[items].
    """

    def __init__(self, clusters: Int32Array, weights: Float64Array) -> None:
        self._clusters = clusters
        self._items = np.argsort(clusters, kind="stable").astype(np.int32)
        # A little for everyone: a cluster without popularity can still be drawn from.
        self._ends = np.cumsum(weights[self._items] + weights.sum() * 1e-12)
        self._starts = np.zeros(int(clusters.max(initial=-1)) + 2, np.int64)
        np.cumsum(np.bincount(clusters), out=self._starts[1:])

    def draw(self, random: np.random.Generator, positives: Int32Array, count: int) -> Int32Array:
        """Return int32[n, count]; the positive itself can be among them (it is masked as an item the user has)."""
        of = self._clusters[positives]
        bounds = np.concatenate([[0.0], self._ends])
        low, high = bounds[self._starts[of]], bounds[self._starts[of + 1]]
        drawn = low[:, None] + random.random((positives.size, count)) * (high - low)[:, None]
        at = np.searchsorted(self._ends, drawn, side="right")
        # Rounding must not carry a draw over the end of its cluster.
        at = np.clip(at, self._starts[of][:, None], self._starts[of + 1][:, None] - 1)
        drawn_items: Int32Array = self._items[at]
        return drawn_items


class RejectNegatives:
    """Draws negatives from what ranking threw out for the user: retrieved, then judged not good enough.

    Args:
        rejects: users x items.
    """

    def __init__(self, rejects: Interactions) -> None:
        self._rejects = rejects

    def draw(
        self, random: np.random.Generator, users: Int32Array, count: int
    ) -> tuple[Int32Array, BoolArray]:
        """Return int32[n, count], and bool[n]: which users have rejects (the rows of the others mean nothing)."""
        begins, counts = self._rejects.indptr[users], self._rejects.user_counts()[users]
        at = begins[:, None] + (random.random((users.size, count)) * counts[:, None]).astype(np.int64)
        found = counts > 0
        rows = np.zeros((users.size, count), np.int32)
        rows[found] = self._rejects.rows[at[found]]
        return rows, found


class StreamingFrequency:
    """Estimates how often an item comes in a batch while the batches pass (Yi et al. 2019, algorithm 2).

    B[i], a moving average of the steps between two batches that have item i, gives the probability 1 / B[i]. An item seen
    for the first time has the number of steps so far.

    Args:
        items: how many.
        rate: weight of the newest gap.
    """

    def __init__(self, items: int, rate: float = 0.05) -> None:
        self.rate = rate
        self.last = np.zeros(items, np.int64)
        self.gap = np.zeros(items, np.float64)
        self.step = 0

    def update(self, rows: Int32Array) -> None:
        """Take in the positives of a batch (an item counts once)."""
        self.step += 1
        self.gap[rows] = np.where(
            self.last[rows] == 0,
            self.step,
            (1 - self.rate) * self.gap[rows] + self.rate * (self.step - self.last[rows]),
        )
        self.last[rows] = self.step

    def probabilities(self, rows: Int32Array) -> Float64Array:
        """Return float64[n]: the estimated probability that a batch has each item."""
        return 1.0 / np.maximum(self.gap[rows], 1.0)


@dataclass(frozen=True, slots=True)
class Owned:
    """Which items a user has: the accidental hits among negatives.

    Attributes:
        indptr: int64[users + 1].
        rows: int32[entries], rising within a user.
        slots: int32[items], scratch, all -1 between two calls.
    """

    indptr: Int64Array
    rows: Int32Array
    slots: Int32Array

    @classmethod
    def of(cls, interactions: Interactions) -> Owned:
        """Return the items of every user."""
        rows = interactions.rows.copy()
        sort_rows(interactions.indptr, rows)
        return cls(interactions.indptr, rows, np.full(interactions.items, -1, np.int32))

    def lists(self, users: Int32Array) -> tuple[Int64Array, Int32Array]:
        """Return int64[n + 1] and int32[k]: user n has the second's [first[n], first[n + 1])."""
        begins, ends = self.indptr[users], self.indptr[users + 1]
        offsets = np.zeros(users.size + 1, np.int64)
        np.cumsum(ends - begins, out=offsets[1:])
        at = np.arange(int(offsets[-1])) + np.repeat(begins - offsets[:-1], ends - begins)
        return offsets, self.rows[at]

    def own(self, users: Int32Array, rows: Int32Array) -> BoolArray:
        """Return bool[n, count]: whether user n has rows[n, count]."""
        hits = np.zeros(rows.shape, np.bool_)
        mark_own(self.indptr, self.rows, users, rows, hits)
        return hits

    def shared(self, users: Int32Array, rows: Int32Array) -> BoolArray:
        """Return bool[n, count]: whether user n has rows[count], the negatives of the whole batch."""
        hits = np.zeros((users.size, rows.size), np.bool_)
        mark_shared(self.indptr, self.rows, users, rows, self.slots, np.empty(rows.size, np.int32), hits)
        return hits


@njit(nogil=True, cache=True)
def sort_rows(indptr, rows):  # type: ignore[no-untyped-def]
    """Sort each user's rows in place."""
    for u in range(indptr.size - 1):
        rows[indptr[u] : indptr[u + 1]].sort()


@njit(nogil=True, cache=True)
def mark_own(indptr, sorted_rows, users, rows, hits):  # type: ignore[no-untyped-def]
    """Set hits[n, c] where users[n] has rows[n, c]: a binary search each."""
    for n in range(users.size):
        begin, end = indptr[users[n]], indptr[users[n] + 1]
        for c in range(rows.shape[1]):
            low, high = begin, end
            while low < high:
                middle = (low + high) >> 1
                if sorted_rows[middle] < rows[n, c]:
                    low = middle + 1
                else:
                    high = middle
            hits[n, c] = low < end and sorted_rows[low] == rows[n, c]


@njit(nogil=True, cache=True)
def mark_shared(indptr, mine, users, rows, slots, chain, hits):  # type: ignore[no-untyped-def]
    """Set hits[n, c] where users[n] has rows[c]; linear in the items of the users.

    `slots` int32[items] (all -1 before and after) has the last column of each item, `chain` int32[columns] the one
    before.
    """
    for c in range(rows.size):
        chain[c] = slots[rows[c]]
        slots[rows[c]] = c
    for n in range(users.size):
        for p in range(indptr[users[n]], indptr[users[n] + 1]):
            c = slots[mine[p]]
            while c >= 0:
                hits[n, c] = True
                c = chain[c]
    for c in range(rows.size):
        slots[rows[c]] = -1


def log_expected(counts_and_probabilities: list[tuple[int, Float64Array]]) -> Float32Array:
    """Return log of how often each item is expected among the shared negatives of a batch.

    Args:
        counts_and_probabilities: per source how many it draws, and float64[n], the probability of each item per draw.
    """
    expected = sum(count * probabilities for count, probabilities in counts_and_probabilities)
    return np.log(np.maximum(expected, 1e-30)).astype(np.float32)
