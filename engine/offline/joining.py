"""From events to impressions: what was shown, joined with what its user did with it soon after.

An exposure is an impression, and so is an action on something that nobody reported as shown. It waits until the stream is
`label_seconds` past it; what its user does with the item until then are its rewards. All of it is a function of the event
log alone, never of the clock: who reads the log again forms the same impressions in the same order.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.models.streaming_options import Task
from engine.offline.histories import Histories
from engine.state.events import SHOWN
from engine.state.layout import kind_of

PATIENCE = 60
"""Seconds of the stream that an impression which is due waits for others to be learnt with."""

Waiting: TypeAlias = tuple[float, ...]
"""When an impression was shown, and the reward of each task so far."""

Due: TypeAlias = tuple[int, int, int, int]
"""When an impression is due, its number, its user and its item row."""

_PACKED_AT_ONCE = 1000
"""Impressions packed between two chances for another thread to go on: a millisecond or two."""


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
        self._histories = Histories(2 * length, stored)
        # (user, item) -> what waits, and never a part of it changed: a copy of the dict is a copy of all. When each is
        # due: a heap of those that are not, and in their order those that are.
        self._pending: dict[tuple[int, int], Waiting] = {}
        self._due: list[Due] = []
        self._ready: deque[Due] = deque()
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
        done: list[tuple[int, int, int]] = []
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
                    raised = list(waiting)
                    for task, logged in rewards:
                        h = 1.0 if not logged else 0.0 if math.isnan(value) else math.log1p(value)
                        raised[1 + task] = max(raised[1 + task], h)
                    pending[user, item] = tuple(raised)
            if kind in liked:
                done.append((user, item, time))
        if done:
            self._histories.remember(*zip(*done, strict=True))
        while self._due and self._due[0][0] < self.until:
            self._ready.append(heapq.heappop(self._due))

    def _begin(self, user: int, item: int, time: int) -> Waiting:
        waiting = self._pending[user, item] = (time, *(0.0 for _ in self._tasks))
        heapq.heappush(self._due, (time + self._wait, self._number, user, item))
        self._number += 1
        return waiting

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
        users, shown = [user for _, _, user, _ in taken], [int(each[0]) for each in waiting]
        sequence, lengths = self._histories.before(users, shown, self._length)
        return Impressions(
            np.array(users, np.int64),
            np.array([item for *_, item in taken], np.int32),
            np.array([each[1:] for each in waiting], np.float32),
            np.array(shown, np.int64),
            sequence,
            lengths,
        )

    def state(self) -> JoinerState:
        """Return all that it knows, a copy, made quickly; the joiner may go on meanwhile."""
        return JoinerState(
            dict(self._pending), list(self._due), list(self._ready),
            self._histories.state(), len(self._tasks), self._number, self.until,
        )  # fmt: skip

    def restore(self, packed: Mapping[str, AnyArray]) -> None:
        """Become what `state` returned, packed; ValueError or KeyError where it is of another joiner."""
        waiting, rewards = packed["waiting"].tolist(), packed["rewards"].tolist()
        if packed["rewards"].shape[1:] != (len(self._tasks),):
            raise ValueError(
                f"rewards of shape {list(packed['rewards'].shape)}, and {len(self._tasks)} tasks"
            )
        self._pending = {
            (user, item): (shown, *each)
            for (_, _, user, item, shown), each in zip(waiting, rewards, strict=True)
        }
        named: list[Due] = [(due, number, user, item) for due, number, user, item, _ in waiting]
        count, self._number, self.until = packed["place"].tolist()
        self._due, self._ready = named[:count], deque(named[count:])
        self._histories.restore(packed)


@dataclass(frozen=True, slots=True)
class JoinerState:
    """What a joiner knew at a moment.

    Attributes:
        pending, due, ready: as the joiner has them.
        histories: of the users, tables.
        tasks: how many.
        number: of the next impression.
        until: how far the stream was.
    """

    pending: Mapping[tuple[int, int], Waiting]
    due: Sequence[Due]
    ready: Sequence[Due]
    histories: Mapping[str, AnyArray]
    tasks: int
    number: int
    until: int

    def packed(self) -> dict[str, AnyArray]:
        """Return it as arrays: the tables of the histories; `waiting` int64[n, 5], when each impression is due, its
        number, user, item and when it was shown, first the heap; `rewards` float64[n, tasks]; and `place` int64[3].

        Takes as long as many impressions wait, in small steps: for a thread beside the one that trains.
        """
        every = [*self.due, *self.ready]
        waiting, rewards = np.empty((len(every), 5), np.int64), np.empty((len(every), self.tasks), np.float64)
        for start in range(0, len(every), _PACKED_AT_ONCE):
            part = every[start : start + _PACKED_AT_ONCE]
            found = [self.pending[user, item] for _, _, user, item in part]
            stop = start + len(part)
            waiting[start:stop, :4] = part
            waiting[start:stop, 4] = [each[0] for each in found]
            rewards[start:stop] = [each[1:] for each in found]
        return {
            **self.histories,
            "waiting": waiting,
            "rewards": rewards,
            "place": np.array([len(self.due), self.number, self.until], np.int64),
        }
