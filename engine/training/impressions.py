"""What streaming VQ learns: impressions with rewards, in order of time, and what users had done by then. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numba import njit

from engine.core.errors import BuildError
from engine.core.interactions import Interactions
from engine.core.types import Float32Array, Int32Array, Int64Array
from engine.models.encoded import Encoded, EncodedUsers
from engine.models.features import take_encoded


@dataclass(frozen=True, slots=True)
class ImpressionBatch:
    """Impressions of a step, in order of time.

    Attributes:
        users: int32[n], user rows; -1 is nobody that the build knew. Whoever has the same row is the same user: what
            somebody was shown in a batch is no negative of the other items that the same user was shown.
        encoded: the n users as they were before the event; `sequence` holds up to `VqSpec.read` items, codes of items
            published since the build may be among them and are passed over. `context.hour` is set from `timestamps`.
        items: int32[n], item rows.
        rewards: float32[n, tasks], h, 0 or more: 0 is an impression that the task's users made nothing of.
        timestamps: int64[n], seconds since the epoch.
    """

    users: Int32Array
    encoded: EncodedUsers
    items: Int32Array
    rewards: Float32Array
    timestamps: Int64Array

    def __len__(self) -> int:
        return int(self.items.size)

    def check(self, items: int, tasks: tuple[str, ...]) -> None:
        """Raise BuildError where the parts do not fit each other, or hold what cannot be.

        Args:
            items: item rows there are.
            tasks: their names.
        """
        n = len(self)
        sizes = (self.users.size, len(self.encoded), self.rewards.shape[0], self.timestamps.size)
        if not n or any(size != n for size in sizes):
            raise BuildError(f"a batch of {n} items has users, features, rewards and times of {sizes}")
        if n and not 0 <= int(self.items.min()) <= int(self.items.max()) < items:
            raise BuildError(f"a batch has item row {int(self.items.max())}, and there are {items:,} items")
        check_rewards(self.rewards, tasks)


@dataclass(frozen=True, slots=True)
class ImpressionLog:
    """Impressions of a whole log, oldest first.

    Attributes: as of `ImpressionBatch`, without what users are encoded as.
    """

    users: Int32Array
    items: Int32Array
    rewards: Float32Array
    timestamps: Int64Array

    def __len__(self) -> int:
        return int(self.items.size)

    @classmethod
    def of(cls, users: Int32Array, items: Int32Array, rewards: Float32Array, timestamps: Int64Array) -> Self:
        """Sort impressions by time; those of one second by user, and stay in order otherwise."""
        order = np.lexsort((users, timestamps))
        return cls(
            users[order].astype(np.int32), items[order].astype(np.int32),
            rewards[order].astype(np.float32), timestamps[order].astype(np.int64),
        )  # fmt: skip

    @classmethod
    def of_positives(cls, interactions: Interactions, weights: Float32Array) -> Self:
        """Take every entry of an interest matrix for an impression whose one reward is its weight; 0 leaves it out."""
        owners = np.repeat(np.arange(interactions.users, dtype=np.int32), interactions.user_counts())
        there = weights > 0
        return cls.of(
            owners[there], interactions.rows[there], weights[there][:, None], interactions.timestamps[there]
        )

    def shuffled(self, random: np.random.Generator) -> ImpressionLog:
        """Return the impressions in another order; each is still of its time, with the history of then."""
        order = random.permutation(len(self))
        return ImpressionLog(
            self.users[order], self.items[order], self.rewards[order], self.timestamps[order]
        )

    def batches(
        self, size: int, interactions: Interactions, users: Encoded, length: int, begin: int = 0
    ) -> Iterator[ImpressionBatch]:
        """Yield the impressions from the one at `begin` on, `size` at a time.

        Args:
            size: of a batch; the last has the rest.
            interactions: what the users liked, of which each sees what is older than the impression.
            users: the features of all users.
            length: items of a history, the newest.
            begin: the first impression.
        """
        for start in range(begin, len(self), size):
            part = slice(start, start + size)
            rows = self.users[part]
            sequence = np.zeros((rows.size, length), np.int32)
            lengths = np.zeros(rows.size, np.int32)
            histories_before(
                interactions.indptr, interactions.rows, interactions.timestamps, rows, self.timestamps[part],
                sequence, lengths,
            )  # fmt: skip
            known = take_encoded(users, rows)
            encoded = EncodedUsers(known.codes, known.multi, known.numbers, sequence, lengths)
            yield ImpressionBatch(rows, encoded, self.items[part], self.rewards[part], self.timestamps[part])


def check_rewards(rewards: Float32Array, tasks: tuple[str, ...]) -> None:
    """Raise BuildError where a reward is below 0 or no number, or there is not one per task."""
    if rewards.ndim != 2 or rewards.shape[1] != len(tasks):
        raise BuildError(
            f"rewards of shape {list(rewards.shape)} are given for the {len(tasks)} tasks {', '.join(tasks)}"
        )
    wrong = ~(np.isfinite(rewards) & (rewards >= 0))
    if wrong.any():
        row, task = np.argwhere(wrong)[0]
        raise BuildError(
            f"the reward of task {tasks[task]!r} must be a number of 0 or more, and impression {row} has "
            f"{rewards[row, task]}"
        )


@njit(nogil=True, cache=True)
def histories_before(indptr, rows, timestamps, users, times, sequence, lengths):  # type: ignore[no-untyped-def]
    """Write the newest items that each user liked before a time, as codes right-aligned.

    Args:
        indptr, rows, timestamps: of an interest matrix, newest first.
        users: int32[n]; times: int64[n]: what is of this second or later is left out.
        sequence: int32[n, t], zeros; lengths: int32[n].
    """
    length = sequence.shape[1]
    for r in range(users.size):
        if users[r] < 0:
            continue
        low, high = indptr[users[r]], indptr[users[r] + 1]
        end = high
        while low < high:
            middle = (low + high) // 2
            if timestamps[middle] < times[r]:
                high = middle
            else:
                low = middle + 1
        count = min(end - low, length)
        lengths[r] = count
        for j in range(count):
            sequence[r, length - 1 - j] = rows[low + j] + 1
