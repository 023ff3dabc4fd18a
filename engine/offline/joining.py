"""From events to impressions: what was shown, joined with what its user did with it soon after.

An exposure is an impression, and so is an action on something that nobody reported as shown. It waits until the stream is
`label_seconds` past it; what its user does with the item until then are its rewards. All of it is a function of the event
log alone, never of the clock: who reads the log again forms the same impressions in the same order.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.models.streaming_options import Task
from engine.state.events import SHOWN
from engine.state.layout import kind_of

PATIENCE = 60
"""Seconds of the stream that an impression which is due waits for others to be learnt with."""

Done: TypeAlias = tuple[list[int], list[int]]
"""What a user did: times, rising, and item rows."""


@dataclass(frozen=True, slots=True)
class Impressions:
    """Impressions in the order in which they became due.

    Attributes:
        users: int64[n], numbers of users as `Joiner.take` was given them.
        items: int32[n], item rows.
        rewards: float32[n, tasks].
        timestamps: int64[n], when it was shown, seconds since the epoch.
        sequence: int32[n, length], codes (row + 1) of what the user had done before, right-aligned, newest last.
        lengths: int32[n].
    """

    users: Int64Array
    items: Int32Array
    rewards: Float32Array
    timestamps: Int64Array
    sequence: Int32Array
    lengths: Int32Array

    def __len__(self) -> int:
        return int(self.items.size)


class Joiner:
    """Joins exposures with the actions that follow them.

    Attributes:
        until: how far the stream is: the latest time of an event, seconds since the epoch.
        refused: events left out because their reward cannot be: the newest one's complaint, and how many there were.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        interest: Mapping[str, float],
        label_seconds: int,
        length: int,
        stored: Callable[[int], tuple[Int64Array, Int32Array]],
    ) -> None:
        """Begin with nothing.

        Args:
            tasks: of the model; one without kinds is rewarded by every kind that earns points.
            interest: points per kind; what earns some goes into the user's history.
            label_seconds: how long an impression waits for its rewards.
            length: newest items of a history.
            stored: returns what a user had done before the stream, by number: times, rising, and item rows.
        """
        liked = [kind for kind, points in interest.items() if points > 0]
        self._tasks = tuple(task.name for task in tasks)
        self._rewards: dict[int, list[tuple[int, bool]]] = {}
        for at, task in enumerate(tasks):
            for kind in task.kinds or liked:
                self._rewards.setdefault(kind_of(kind), []).append((at, task.reward == "log_value"))
        self._liked = frozenset(kind_of(kind) for kind in liked)
        self._wait = label_seconds
        self._length = length
        self._kept = 2 * length
        self._stored = stored
        self._done: dict[int, Done] = {}
        # (user, item) -> [when it was shown, reward of each task]. When each is due, with its number: a heap of those
        # that are not, and in their order those that are.
        self._pending: dict[tuple[int, int], list[float]] = {}
        self._due: list[tuple[int, int, int, int]] = []
        self._ready: deque[tuple[int, int, int, int]] = deque()
        self._number = 0
        self.until = 0
        self.refused: tuple[str, int] = ("", 0)

    def __len__(self) -> int:
        """How many impressions wait."""
        return len(self._pending)

    def take(
        self,
        users: Int64Array,
        items: Int32Array,
        kinds: AnyArray,
        values: Float32Array,
        times: Int64Array,
        written: Int64Array,
    ) -> None:
        """Take in the events of one entry of the log: the next ones.

        Args:
            users: int64[n], a number per user, 0 or more, the same each time.
            items: int32[n], item rows; an item that is not known is -1 and its event is left out.
            kinds: uint32[n], `SHOWN` or the kind of an action.
            values: float32[n], seconds watched; NaN not known.
            times: int64[n], seconds since the epoch, as the event says.
            written: int64[n], when it came into the log, seconds since the epoch: no event is believed to be later.
        """
        rewards_of, liked, pending = self._rewards, self._liked, self._pending
        columns = (
            users.tolist(), items.tolist(), kinds.tolist(), values.tolist(), np.minimum(times, written).tolist(),
        )  # fmt: skip
        for user, item, kind, value, time in zip(*columns, strict=True):
            if time > self.until:
                self.until = time
            if item < 0:
                continue
            if kind == SHOWN:
                if (user, item) not in pending:
                    self._begin(user, item, time)
                continue
            rewards = rewards_of.get(kind)
            if rewards is not None:
                if value < 0 or value == math.inf:
                    self._refuse(rewards[0][0], user, item, value)
                    continue
                waiting = pending.get((user, item))
                if waiting is None:
                    waiting = self._begin(user, item, time)
                if time <= waiting[0] + self._wait:
                    for task, logged in rewards:
                        h = 1.0 if not logged else 0.0 if math.isnan(value) else math.log1p(value)
                        waiting[1 + task] = max(waiting[1 + task], h)
            if kind in liked:
                self._remember(user, item, time)
        while self._due and self._due[0][0] < self.until:
            self._ready.append(heapq.heappop(self._due))

    def _begin(self, user: int, item: int, time: int) -> list[float]:
        waiting = self._pending[user, item] = [time, *(0.0 for _ in self._tasks)]
        heapq.heappush(self._due, (time + self._wait, self._number, user, item))
        self._number += 1
        return waiting

    def _remember(self, user: int, item: int, time: int) -> None:
        times, rows = self._history(user)
        if item in rows:  # once, as it was done last
            at = rows.index(item)
            if times[at] >= time:
                return
            del times[at], rows[at]
        insort(times, time)
        rows.insert(bisect_left(times, time + 1) - 1, item)
        if len(rows) > self._kept:
            del times[0], rows[0]

    def _history(self, user: int) -> Done:
        done = self._done.get(user)
        if done is None:
            times, rows = self._stored(user)
            done = self._done[user] = (times[-self._kept :].tolist(), rows[-self._kept :].tolist())
        return done

    def _refuse(self, task: int, user: int, item: int, value: float) -> None:
        text = (
            f"the reward of task {self._tasks[task]!r} must come of a value of 0 or more, and an action of user number "
            f"{user} with item row {item} has {value}"
        )
        self.refused = (text, self.refused[1] + 1)

    def give(self, size: int, rest: bool = False) -> Impressions | None:
        """Return the `size` impressions that have been due longest, and forget them.

        None while there are fewer, unless one has been due for `PATIENCE` seconds of the stream: then those there are.

        Args:
            size: how many.
            rest: return what there is, and what is not due yet, too: nothing will follow.
        """
        if rest:
            self._ready.extend(sorted(self._due))
            self._due = []
        if not self._ready:
            return None
        if len(self._ready) < size and not rest and self.until - self._ready[0][0] < PATIENCE:
            return None
        taken = [self._ready.popleft() for _ in range(min(size, len(self._ready)))]
        waiting = [self._pending.pop((user, item)) for _, _, user, item in taken]
        sequence = np.zeros((len(taken), self._length), np.int32)
        lengths = np.zeros(len(taken), np.int32)
        if self._length:
            for at, ((_, _, user, _), (shown, *_)) in enumerate(zip(taken, waiting, strict=True)):
                times, rows = self._history(user)
                end = bisect_left(times, shown)
                mine = rows[max(0, end - self._length) : end]
                if mine:
                    sequence[at, -len(mine) :] = mine
                    lengths[at] = len(mine)
            places = np.arange(self._length) >= self._length - lengths[:, None]
            sequence[places] += 1
        return Impressions(
            np.array([user for _, _, user, _ in taken], np.int64),
            np.array([item for *_, item in taken], np.int32),
            np.array([each[1:] for each in waiting], np.float32),
            np.array([each[0] for each in waiting], np.int64),
            sequence,
            lengths,
        )

    def state(self) -> dict[str, Any]:
        """Return all that it knows, in plain values, a copy."""
        return {
            "pending": [(user, item, *values) for (user, item), values in self._pending.items()],
            "due": list(self._due),
            "ready": list(self._ready),
            "done": {user: (list(times), list(rows)) for user, (times, rows) in self._done.items()},
            "number": self._number,
            "until": self.until,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` returned."""
        self._pending = {(user, item): list(values) for user, item, *values in state["pending"]}
        self._due = [tuple(each) for each in state["due"]]
        self._ready = deque(tuple(each) for each in state["ready"])
        self._done = dict(state["done"])
        self._number, self.until = state["number"], state["until"]
