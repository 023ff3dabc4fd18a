"""Training examples of histories in windows: every item of a user but the oldest is a label once in an epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.core.interactions import Interactions
from engine.core.types import BoolArray, Float32Array, Int64Array
from engine.training.batches import Batch


class Windows:
    """Histories cut into windows of at most `length` items, each item of which predicts a later one, all in one pass.

    `Sequences` takes the newest items of a user only, as a recommender of the next item is asked about these. Here a user
    with a long history teaches with all of it: where the windows of such a user begin is drawn in each epoch, so that no
    item is always the first of its window, which has no past.

    Args:
        interactions: what is learnt.
        weights: float32[entries]: how much each entry counts.
        examples: bool[entries] or None: which are positives.
        length: items of a window, at most.
        horizon: the label is drawn among this many next items, as many as there are; 1: the next.
        size: labels per batch, about.
        seed: of the order and the windows.
    """

    def __init__(
        self,
        interactions: Interactions,
        weights: Float32Array,
        examples: BoolArray | None,
        length: int,
        horizon: int,
        size: int,
        seed: int,
    ) -> None:
        self._matrix, self._length, self._horizon, self._size, self._seed = (
            interactions, length, horizon, size, seed,
        )  # fmt: skip
        self._weights = weights if examples is None else np.where(examples, weights, np.float32(0))
        counts = interactions.user_counts()
        learnt = np.append(0, np.cumsum(self._weights > 0))
        oldest = np.maximum(interactions.indptr[1:] - 1, interactions.indptr[:-1])
        some = learnt[oldest] > learnt[interactions.indptr[:-1]]
        self._users = np.flatnonzero(some & (counts > 1))
        self._counts = counts

    def batches(self, epoch: int) -> int:
        """Return how many batches the epoch has."""
        return int(self._plan(epoch)[3].size - 1)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        users, firsts, lengths, cuts = self._plan(number)
        for at in range(cuts.size - 1):
            part = slice(int(cuts[at]), int(cuts[at + 1]))
            random = np.random.default_rng((self._seed, number, at))
            yield self._batch(users[part], firsts[part], lengths[part], random)

    def _plan(self, epoch: int) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
        """Return each window's user, oldest item (0 is the user's oldest) and length, and where batches begin."""
        random = np.random.default_rng((self._seed, epoch))
        length, users = self._length, self._users
        inputs = self._counts[users] - 1
        # The first window of a long history is cut short, by a number of items drawn for the epoch.
        short = np.where(inputs > length, random.integers(0, length, users.size), 0)
        windows = (inputs + short + length - 1) // length
        owners = np.repeat(np.arange(users.size), windows)
        number = np.arange(owners.size) - np.repeat(np.cumsum(windows) - windows, windows)
        begins = number * length - short[owners]
        ends = np.minimum(begins + length, inputs[owners])
        begins = np.maximum(begins, 0)
        order = random.permutation(owners.size)
        lengths = (ends - begins)[order]
        ends = np.cumsum(lengths)
        batch = (ends - 1) // self._size
        cuts = np.append(np.flatnonzero(np.diff(batch, prepend=-1)), owners.size).astype(np.int64)
        return users[owners[order]], begins[order], lengths, cuts

    def _batch(
        self, users: Int64Array, firsts: Int64Array, lengths: Int64Array, random: np.random.Generator
    ) -> Batch:
        order = np.argsort(-lengths, kind="stable")  # rectangles over sequences have little padding
        users, firsts, lengths = users[order], firsts[order], lengths[order]
        offsets = np.zeros(users.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # Newest first in the matrix, oldest first here.
        newest = np.repeat(self._matrix.indptr[users], lengths)
        age = np.repeat(self._counts[users] - 1 - firsts + offsets[:-1], lengths) - np.arange(
            int(offsets[-1])
        )
        ahead = np.ones(age.size, np.int64)
        if self._horizon > 1:
            ahead += random.integers(0, np.minimum(age, self._horizon))
        targets = newest + age - ahead
        rows = self._matrix.rows
        return Batch(
            users.astype(np.int32), rows[newest + age] + np.int32(1), offsets, rows[targets],
            self._weights[targets], targets,
        )  # fmt: skip
