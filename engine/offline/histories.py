"""What users did, newest items of each, while a stream of events passes: tables, which are quick to copy.

A row of the tables is a user, in the order in which they were met. Its entries stand in order of time, each item once, as
it was done last.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numba import njit

from engine.core.types import AnyArray, Int32Array, Int64Array

Done: TypeAlias = tuple[list[int], list[int]]
"""What a user did: times, rising, and item rows."""

_ROOM = 256
"""Users that there is room for at first."""


class Histories:
    """The newest items of each user that events or questions have named."""

    def __init__(self, length: int, stored: Callable[[int], tuple[Int64Array, Int32Array]]) -> None:
        """Begin with nobody.

        Args:
            length: items of a user that are kept, the newest; 0: nothing is.
            stored: returns what a user had done before the stream, by number: times, rising, and item rows.
        """
        self._stored = stored
        self._slots: dict[int, int] = {}
        self._times = np.zeros((_ROOM, length), np.int64)
        self._rows = np.zeros((_ROOM, length), np.int32)
        self._counts = np.zeros(_ROOM, np.int32)
        # Compiled now, not when the first events wait for it.
        self.remember([], [], [])
        self.before([], [], 0)

    def remember(self, users: Sequence[int], items: Sequence[int], times: Sequence[int]) -> None:
        """Take in what users did, in the order in which it is told.

        Args:
            users: numbers of users, 0 or more.
            items: item rows.
            times: seconds since the epoch; what is older than the same item's last time changes nothing.
        """
        if self._times.shape[1]:
            slots = self._slots_of(users)
            insert_done(
                slots, np.array(items, np.int32), np.array(times, np.int64), self._times, self._rows, self._counts
            )  # fmt: skip

    def before(
        self, users: Sequence[int], times: Sequence[int], length: int
    ) -> tuple[Int32Array, Int32Array]:
        """Return what users had done before some moments.

        Args:
            users: n numbers of users.
            times: n moments, seconds since the epoch; what was done at the moment itself is not before it.
            length: newest items of each, at most.

        Returns:
            int32[n, length], codes (row + 1), right-aligned, newest last, 0 is padding; int32[n], how many they are.
        """
        sequence, lengths = np.zeros((len(users), length), np.int32), np.zeros(len(users), np.int32)
        if self._times.shape[1]:
            slots = self._slots_of(users)
            newest_before(
                slots, np.array(times, np.int64), self._times, self._rows, self._counts, sequence, lengths
            )  # fmt: skip
        return sequence, lengths

    def state(self) -> dict[str, AnyArray]:
        """Return all that it knows, a copy: `users` int64[m], and of each a row of `times`, `rows` and `counts`."""
        met = len(self._slots)
        return {
            "users": np.fromiter(self._slots, np.int64, met),
            "times": self._times[:met].copy(),
            "rows": self._rows[:met].copy(),
            "counts": self._counts[:met].copy(),
        }

    def restore(self, state: Mapping[str, AnyArray]) -> None:
        """Become what `state` returned; ValueError where it is of another length."""
        if state["times"].shape[1] != self._times.shape[1]:
            raise ValueError(
                f"histories of {state['times'].shape[1]} items, and {self._times.shape[1]} are kept"
            )
        self._slots = {user: slot for slot, user in enumerate(state["users"].tolist())}
        self._times, self._rows, self._counts = (
            np.array(state[name]) for name in ("times", "rows", "counts")
        )

    def _slots_of(self, users: Sequence[int]) -> Int64Array:
        """Return int64[n], the rows of the tables; whoever is new there is asked for what they had done before."""
        slots = self._slots
        for user in users:
            if user not in slots:
                slot = slots[user] = len(slots)
                if slot >= self._counts.size:
                    self._grow()
                times, rows = self._stored(user)
                count = min(times.size, self._times.shape[1])
                self._times[slot, :count] = times[times.size - count :]
                self._rows[slot, :count] = rows[rows.size - count :]
                self._counts[slot] = count
        return np.array([slots[user] for user in users], np.int64)

    def _grow(self) -> None:
        room = max(_ROOM, 2 * self._counts.size)
        for name in ("_times", "_rows", "_counts"):
            before: AnyArray = getattr(self, name)
            wider = np.zeros((room, *before.shape[1:]), before.dtype)
            wider[: before.shape[0]] = before
            setattr(self, name, wider)


@njit(nogil=True, cache=True)
def insert_done(slots, items, moments, times, rows, counts):  # type: ignore[no-untyped-def]
    """Put items into the histories of users, one after the other; twin of `inserted`.

    Args:
        slots, items, moments: int64[n], int32[n] and int64[n].
        times, rows, counts: int64 and int32[users, length], int32[users]; changed in place.
    """
    length = times.shape[1]
    for i in range(slots.size):
        slot, item, moment = slots[i], items[i], moments[i]
        count = counts[slot]
        at = 0
        while at < count and rows[slot, at] != item:
            at += 1
        if at < count:  # once, as it was done last
            if times[slot, at] >= moment:
                continue
            count -= 1
            for j in range(at, count):
                times[slot, j], rows[slot, j] = times[slot, j + 1], rows[slot, j + 1]
        place = count
        while place > 0 and times[slot, place - 1] > moment:
            place -= 1
        if count == length:  # the oldest gives way, which may be this one
            if place > 0:
                place -= 1
                for j in range(place):
                    times[slot, j], rows[slot, j] = times[slot, j + 1], rows[slot, j + 1]
                times[slot, place], rows[slot, place] = moment, item
        else:
            for j in range(count, place, -1):
                times[slot, j], rows[slot, j] = times[slot, j - 1], rows[slot, j - 1]
            times[slot, place], rows[slot, place] = moment, item
            count += 1
        counts[slot] = count


@njit(nogil=True, cache=True)
def newest_before(slots, moments, times, rows, counts, sequence, lengths):  # type: ignore[no-untyped-def]
    """Set what users had done before some moments; twin of `done_before`.

    Args:
        slots, moments: int64[n].
        times, rows, counts: as `insert_done` has them.
        sequence, lengths: int32[n, length] of zeros, int32[n]; changed in place.
    """
    length = sequence.shape[1]
    for i in range(slots.size):
        slot = slots[i]
        end = counts[slot]
        while end > 0 and times[slot, end - 1] >= moments[i]:
            end -= 1
        many = min(end, length)
        for j in range(many):
            sequence[i, length - many + j] = rows[slot, end - many + j] + 1
        lengths[i] = many


def inserted(done: Done, item: int, moment: int, length: int) -> Done:
    """Return a user's history with one more item: what `insert_done` does, in plain lists."""
    times, rows = list(done[0]), list(done[1])
    if item in rows:
        at = rows.index(item)
        if times[at] >= moment:
            return times, rows
        del times[at], rows[at]
    place = bisect_right(times, moment)
    times.insert(place, moment)
    rows.insert(place, item)
    return times[-length:], rows[-length:]


def done_before(done: Done, moment: int, length: int) -> list[int]:
    """Return the codes of the newest items before a moment: what `newest_before` sets, in plain lists."""
    end = bisect_left(done[0], moment)
    return [row + 1 for row in done[1][max(0, end - length) : end]]
