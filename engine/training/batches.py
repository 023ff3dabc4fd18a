"""Training examples from the interest matrix: pairs with histories, or whole sequences.

The order of an epoch is a function of (seed, epoch), and what is drawn inside a batch of (seed, epoch, batch): nothing
else has to be kept for a run to go on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numba import njit

from engine.core.interactions import Interactions
from engine.core.types import BoolArray, Float32Array, Int32Array, Int64Array


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples, and what their users did. Pairs have one example per history, sequences one per entry of it.

    Attributes:
        users: int32[n], user rows, a history each.
        history: int32[t], item codes (row + 1), oldest first, end to end.
        offsets: int64[n + 1].
        positives: int32[m], item rows; m = n for pairs, m = t for sequences (the item after each entry).
        weights: float32[m]; 0 is not learnt.
        entries: int64[m], where each positive stands in the interest matrix.
        tasks: int32[n], the task of each history, where the towers have prompts.
    """

    users: Int32Array
    history: Int32Array
    offsets: Int64Array
    positives: Int32Array
    weights: Float32Array
    entries: Int64Array
    tasks: Int32Array | None = None


class Pairs:
    """(user, liked item) examples in shuffled epochs; the liked item is never in its own history.

    Args:
        interactions: what is learnt.
        weights: float32[entries]: how much each entry counts.
        examples: bool[entries] or None: which are positives.
        length: newest items of a history; 0 makes none.
        past: histories are what is older than the positive; else all other items of the user.
        keep: float32[entries] or None: the probability that an entry is in an epoch (down-sampling of hot items).
        size: examples per batch.
        seed: of the order and the sampling.
        in_order: epochs run by time, oldest first, instead of shuffled (incremental updates).
    """

    def __init__(
        self,
        interactions: Interactions,
        weights: Float32Array,
        examples: BoolArray | None,
        length: int,
        past: bool,
        keep: Float32Array | None,
        size: int,
        seed: int,
        in_order: bool = False,
    ) -> None:
        self._matrix, self._weights, self._length, self._past = interactions, weights, length, past
        self._keep, self._size, self._seed, self._in_order = keep, size, seed, in_order
        learnt = weights > 0 if examples is None else examples & (weights > 0)
        self._entries = np.flatnonzero(learnt)
        self._owners = np.repeat(np.arange(interactions.users, dtype=np.int32), interactions.user_counts())

    def batches(self, epoch: int) -> int:
        """Return how many batches the epoch has."""
        return math.ceil(self._plan(epoch).size / self._size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        order = self._plan(number)
        for begin in range(0, order.size, self._size):
            yield self._batch(order[begin : begin + self._size], number)

    def _plan(self, epoch: int) -> Int64Array:
        random = np.random.default_rng((self._seed, epoch))
        entries = self._entries
        if self._keep is not None:
            entries = entries[random.random(entries.size, np.float32) < self._keep[entries]]
        if self._in_order:
            return entries[np.argsort(self._matrix.timestamps[entries], kind="stable")]
        return random.permutation(entries)

    def _batch(self, entries: Int64Array, epoch: int) -> Batch:
        users = self._owners[entries]
        begins, ends = self._matrix.indptr[users], self._matrix.indptr[users + 1]
        offsets = np.zeros(entries.size + 1, np.int64)
        if self._length:
            lengths = ends - entries - 1 if self._past else ends - begins - 1
            np.cumsum(np.minimum(lengths, self._length), out=offsets[1:])
        history = np.empty(int(offsets[-1]), np.int32)
        draw = np.uint64(self._seed * 1_000_003 + epoch)
        fill_histories(self._matrix.rows, begins, ends, entries, offsets, self._past, draw, history)
        return Batch(users, history, offsets, self._matrix.rows[entries], self._weights[entries], entries)


class ByUser(Pairs):
    """Pairs in shuffled epochs in which those of a user stand side by side, in one batch; `size` counts users."""

    def batches(self, epoch: int) -> int:
        """Return how many batches the epoch has."""
        return math.ceil(self._first(self._plan(epoch)).size / self._size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        order = self._plan(number)
        begins = self._first(order)[:: self._size].tolist()
        for begin, end in pairwise([*begins, order.size]):
            yield self._batch(order[begin:end], number)

    def _plan(self, epoch: int) -> Int64Array:
        entries = super()._plan(epoch)
        place = np.random.default_rng((self._seed, epoch, 1)).permutation(self._matrix.users)
        return entries[np.argsort(place[self._owners[entries]], kind="stable")]

    def _first(self, entries: Int64Array) -> Int64Array:
        """int64[users]: where the pairs of each user begin."""
        return np.flatnonzero(np.diff(self._owners[entries], prepend=-1))


class Sequences:
    """Whole sequences: every entry predicts the next item of its user, all in one pass (Kang and McAuley 2018, 3.5).

    Of a user with more than `length` + 1 items the newest are taken. Within a batch the longest come first, so that
    rectangles over sequences have little padding. Users with fewer than two items teach nothing and are left out.

    Args: as `Pairs`; `size` is users per batch.
    """

    def __init__(
        self,
        interactions: Interactions,
        weights: Float32Array,
        examples: BoolArray | None,
        length: int,
        keep: Float32Array | None,
        size: int,
        seed: int,
    ) -> None:
        self._matrix, self._length, self._keep, self._size, self._seed = (
            interactions, length, keep, size, seed,
        )  # fmt: skip
        self._weights = weights if examples is None else np.where(examples, weights, np.float32(0))
        lengths = np.minimum(interactions.user_counts() - 1, length)
        learnt = np.zeros(interactions.users, np.bool_)
        any_learnt(interactions.indptr, lengths, self._weights, learnt)
        self._lengths, self._users = lengths, np.flatnonzero(learnt).astype(np.int32)

    def batches(self, epoch: int) -> int:
        """Return how many batches the epoch has."""
        del epoch
        return math.ceil(self._users.size / self._size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        random = np.random.default_rng((self._seed, number))
        order = random.permutation(self._users)
        weights = self._weights
        if self._keep is not None:
            weights = np.where(random.random(weights.size, np.float32) < self._keep, weights, np.float32(0))
        for begin in range(0, order.size, self._size):
            yield self._batch(order[begin : begin + self._size], weights)

    def _batch(self, users: Int32Array, weights: Float32Array) -> Batch:
        users = users[np.argsort(-self._lengths[users], kind="stable")]
        lengths = self._lengths[users]
        offsets = np.zeros(users.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # Newest first in the matrix, oldest first here: entry j of a user's sequence is the one at begin + length - j.
        targets = np.repeat(self._matrix.indptr[users] + lengths + offsets[:-1], lengths)
        targets -= np.arange(targets.size) + 1
        return Batch(
            users, self._matrix.rows[targets + 1] + np.int32(1), offsets, self._matrix.rows[targets],
            weights[targets], targets,
        )  # fmt: skip


def by_task(batch: Batch, clusters: Int32Array, prompts: int, every: bool) -> Batch:
    """Return the batch with each history once per task that it has something to learn of.

    Task k, a cluster, learns the positives of the cluster; task `prompts`, the intent, learns all. Pairs have both. Of
    sequences, whose history runs through the tower once for all its positives, each has as many copies as there are
    clusters among these, cut behind the last that counts, the others weighing nothing.

    Args:
        batch: without tasks.
        clusters: int32[items].
        prompts: how many clusters there are.
        every: whether these are sequences.
    """
    n, of = batch.users.size, clusters[batch.positives]
    if not every:
        whose, tasks = np.tile(np.arange(n), 2), np.concatenate([of, np.full(n, prompts, np.int32)])
        lengths = np.diff(batch.offsets)[whose]
    else:
        owners = np.repeat(np.arange(n), np.diff(batch.offsets))
        learnt = np.flatnonzero(batch.weights)
        needed = np.zeros((n, prompts + 1), np.int64)
        for task in (of[learnt], np.full(learnt.size, prompts)):
            # Where a place is written to more than once the last counts, which is the furthest.
            needed[owners[learnt], task] = learnt + 1 - batch.offsets[owners[learnt]]
        cells = np.flatnonzero(needed)
        cells = cells[np.argsort(-needed.ravel()[cells], kind="stable")]
        whose, tasks, lengths = cells // (prompts + 1), cells % (prompts + 1), needed.ravel()[cells]
    offsets = np.zeros(whose.size + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    tokens = np.arange(int(offsets[-1])) + np.repeat(batch.offsets[whose] - offsets[:-1], lengths)
    tasks = tasks.astype(np.int32)
    if not every:
        positives, weights, entries = batch.positives[whose], batch.weights[whose], batch.entries[whose]
    else:
        positives, entries = batch.positives[tokens], batch.entries[tokens]
        asked = np.repeat(tasks, lengths)
        counts = (asked == prompts) | (asked == of[tokens])
        weights = np.where(counts, batch.weights[tokens], np.float32(0))
    return Batch(batch.users[whose], batch.history[tokens], offsets, positives, weights, entries, tasks)


@njit(nogil=True, cache=True)
def fill_histories(rows, begins, ends, entries, offsets, past, draw, history):  # type: ignore[no-untyped-def]
    """Write each example's history, oldest first, as item codes.

    The history ends just before the positive (`past`), or is the user's list around it: where that is longer than what is
    wanted, a stretch from a place drawn by a hash of the entry and `draw`, running round at the end.
    """
    for e in range(entries.size):
        wanted = offsets[e + 1] - offsets[e]
        if past:
            for j in range(wanted):
                history[offsets[e] + wanted - 1 - j] = rows[entries[e] + 1 + j] + 1
            continue
        others = ends[e] - begins[e] - 1
        start = np.int64(0)
        if others > wanted:
            h = (np.uint64(entries[e]) + np.uint64(draw)) * np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(29)
            h *= np.uint64(0xBF58476D1CE4E5B9)
            start = np.int64((h >> np.uint64(33)) % np.uint64(others))
        for j in range(wanted):
            other = (start + j) % others
            at = begins[e] + other
            if at >= entries[e]:
                at += 1
            history[offsets[e] + wanted - 1 - j] = rows[at] + 1


@njit(nogil=True, cache=True)
def any_learnt(indptr, lengths, weights, learnt):  # type: ignore[no-untyped-def]
    """Mark the users of whose newest `lengths` entries one has a weight above 0."""
    for u in range(lengths.size):
        for p in range(indptr[u], indptr[u] + lengths[u]):
            if weights[p] > 0:
                learnt[u] = True
                break


def keep_probabilities(interactions: Interactions, threshold: float) -> Float32Array | None:
    """Return float32[entries]: min(1, sqrt(threshold / share)) of each entry's item; None where all are kept.

    share is the item's part of all entries: the sub-sampling of frequent words of Mikolov et al. 2013, eq. 5.
    """
    if threshold <= 0:
        return None
    shares = interactions.item_counts() / max(interactions.entries, 1)
    with np.errstate(divide="ignore"):
        kept = np.minimum(1.0, np.sqrt(threshold / shares)).astype(np.float32)
    return np.asarray(kept[interactions.rows], np.float32)
