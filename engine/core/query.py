"""What a channel is asked: a batch of queries as columns, and the plain view of one of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from engine.core.live import LiveState
from engine.core.types import (
    AnyArray,
    BoolArray,
    Float32Array,
    Float64Array,
    Int32Array,
    Int64Array,
    RaggedRows,
)


class History(NamedTuple):
    """What each user of a batch did most recently, newest first; query q owns [offsets[q], offsets[q + 1]).

    Attributes:
        rows: int32[m], catalogue rows; an item at most once per query.
        weights: float32[m], interest scores: the points of the distinct events the user gave the item.
        timestamps: int64[m], seconds since the epoch; 0 where unknown.
        offsets: int64[n + 1].
    """

    rows: Int32Array
    weights: Float32Array
    timestamps: Int64Array
    offsets: Int64Array

    @classmethod
    def empty(cls, size: int) -> History:
        """Return `size` empty histories."""
        return cls(
            np.empty(0, np.int32),
            np.empty(0, np.float32),
            np.empty(0, np.int64),
            np.zeros(size + 1, np.int64),
        )


@dataclass(frozen=True, slots=True)
class QueryBatch:
    """Queries of one scene that go down the pipeline together.

    Attributes:
        user_ids: [n] external ids (int64, or str_); -1 or "" for a guest.
        users: int32[n], rows of the user index; -1 where the index does not know the user.
        history: what each user did.
        excluded: rows that the request forbids.
        now: int64[n], seconds since the epoch, the moment each query speaks of.
        latitude, longitude: float64[n] degrees; NaN where not given.
        cities: the request's city per query; "" where not given.
        devices: the request's device attributes per query.
        live: what the state store knows of the users.
        triggers: rows of the items that each query asks for more like, each once.
    """

    user_ids: AnyArray
    users: Int32Array
    history: History
    excluded: RaggedRows
    now: Int64Array
    latitude: Float64Array
    longitude: Float64Array
    cities: tuple[str, ...]
    devices: tuple[dict[str, str], ...]
    live: LiveState
    triggers: RaggedRows

    def __len__(self) -> int:
        return int(self.users.size)

    @property
    def guests(self) -> BoolArray:
        """bool[n]: True where nobody is named, so that no state is kept."""
        guest: BoolArray = self.user_ids < 0 if self.user_ids.dtype.kind == "i" else self.user_ids == ""
        return guest

    @classmethod
    def plain(
        cls, users: Int32Array, history: History, excluded: RaggedRows | None = None, now: int = 0
    ) -> QueryBatch:
        """Make a batch without context: for evaluation, benchmarks and tests."""
        n = int(users.size)
        return cls(
            user_ids=users.astype(np.int64),
            users=users,
            history=history,
            excluded=excluded if excluded is not None else RaggedRows.empty(n),
            now=np.full(n, now, np.int64),
            latitude=np.full(n, np.nan),
            longitude=np.full(n, np.nan),
            cities=("",) * n,
            devices=({},) * n,
            live=LiveState.empty(n),
            triggers=RaggedRows.empty(n),
        )

    def detached(self) -> QueryBatch:
        """Return a copy in arrays of its own that cannot be written, for whoever may outlive the batch.

        `live.exposure` is left out: it is for filters, and reads what belongs to the batch.
        """
        copy: QueryBatch = _detached(replace(self, live=replace(self.live, exposure=None)))
        return replace(copy, devices=tuple(dict(device) for device in self.devices))

    def trigger_items(self) -> History:
        """Return the triggers in the form of a history, each of weight 1."""
        rows = self.triggers.rows
        return History(
            rows, np.ones(rows.size, np.float32), np.zeros(rows.size, np.int64), self.triggers.offsets
        )

    def alone(self, q: int) -> QueryBatch:
        """Return query q as a batch of its own, without copying columns."""
        mine = slice(int(self.history.offsets[q]), int(self.history.offsets[q + 1]))
        one = slice(q, q + 1)
        return QueryBatch(
            user_ids=self.user_ids[one],
            users=self.users[one],
            history=History(
                self.history.rows[mine],
                self.history.weights[mine],
                self.history.timestamps[mine],
                np.array([0, mine.stop - mine.start], np.int64),
            ),
            excluded=self.excluded.alone(q),
            now=self.now[one],
            latitude=self.latitude[one],
            longitude=self.longitude[one],
            cities=self.cities[one],
            devices=self.devices[one],
            live=self.live.alone(q),
            triggers=self.triggers.alone(q),
        )

    def query(self, q: int) -> Query:
        """Return the plain view of query q: what a per-query plugin sees."""
        part = slice(int(self.history.offsets[q]), int(self.history.offsets[q + 1]))
        return Query(
            user_id=self.user_ids[q].item(),
            user=int(self.users[q]),
            history=self.history.rows[part],
            history_weights=self.history.weights[part],
            history_timestamps=self.history.timestamps[part],
            now=int(self.now[q]),
            latitude=float(self.latitude[q]),
            longitude=float(self.longitude[q]),
            city=self.cities[q],
            device=self.devices[q],
        )


def _detached(value: Any) -> Any:
    """Copy every array in a tree of dataclasses and tuples of names, and seal the copy."""
    if isinstance(value, np.ndarray):
        copy = value.copy()
        copy.flags.writeable = False
        return copy
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_detached(getattr(value, part.name)) for part in fields(value)))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_detached, value))
    return value


@dataclass(frozen=True, slots=True)
class Query:
    """One query, as a per-query plugin sees it. Fields as in `QueryBatch`."""

    user_id: int | str
    user: int
    history: Int32Array
    history_weights: Float32Array
    history_timestamps: Int64Array
    now: int
    latitude: float
    longitude: float
    city: str
    device: dict[str, str] = field(default_factory=dict)
