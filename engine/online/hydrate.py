"""Hydrate: turn parsed requests into the batch that channels see. Ids become rows, histories are read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from engine.core.items import ItemColumns
from engine.core.query import History, QueryBatch
from engine.core.types import NO_ROW, AnyArray, Float32Array, Int32Array, Int64Array, RaggedRows
from engine.data.ids import IdIndex
from engine.data.live import LiveIds
from engine.online.request import RecentItems, Request
from engine.state.history import UserState, no_leftovers


class Hydrated(NamedTuple):
    """The batch, and what its requests named that the catalogue does not know.

    Attributes:
        batch: the batch.
        unknown: int32[4, n], the fields of UnknownIds in their order: 1 where it does not know the user; how many recent
            items it does not know, or have an event without points; how many excluded items, and how many triggers.
        leftovers: `UserRead.leftovers`.
    """

    batch: QueryBatch
    unknown: Int32Array
    leftovers: Callable[[int], bytes] = no_leftovers


class Hydrator:
    """Looks ids up in the catalogue and reads the user state."""

    def __init__(
        self,
        items: LiveIds,
        users: IdIndex,
        state: UserState,
        authors: LiveIds | None = None,
        columns: ItemColumns | None = None,
    ) -> None:
        """Take what ids are looked up in.

        Args:
            items, users, authors: the indexes; no authors where none are known.
            state: where users are read from.
            columns: know the cities; None: no city is known.
        """
        self._columns = columns
        self._item_index = items
        self._user_index = users
        self._author_index = authors
        self._state = state
        self._guest: int | str = -1 if users.kind == "int64" else ""

    @property
    def items(self) -> int:
        """Rows in the catalogue."""
        return len(self._item_index)

    @property
    def authors(self) -> int | None:
        """Rows in the index of authors; None where there is none."""
        return None if self._author_index is None else len(self._author_index)

    @property
    def users(self) -> int:
        """Rows in the index of users."""
        return len(self._user_index)

    def __call__(self, requests: Sequence[Request], meanwhile: Callable[[], None] | None = None) -> Hydrated:
        """Make the batch of these requests.

        Args:
            requests: one or more.
            meanwhile: called while the state store works.
        """
        n = len(requests)
        # A guest's stand-in (-1, or the empty string) is no id, so the index answers "unknown".
        user_ids = np.array([self._guest if r.user_id is None else r.user_id for r in requests])
        read_users = self._state.ask(user_ids)
        users = self._user_index.rows(user_ids)
        unknown = np.zeros((4, n), np.int32)
        recent = excluding = triggered = False
        for q, (user, request) in enumerate(zip(users.tolist(), requests, strict=True)):
            if user < 0 and request.user_id is not None:
                unknown[0, q] = 1
            recent |= request.recent is not None
            excluding |= request.excluded is not None
            triggered |= request.triggers is not None
        now = np.array([r.now for r in requests], np.int64)
        cities = self._city_codes(requests)
        if meanwhile is not None:
            meanwhile()
        known = read_users(users, now, cities)
        history = known.history
        if recent:
            history = self._with_recent(history, requests, unknown[1])
        excluded = triggers = RaggedRows.empty(n)
        if excluding:
            excluded = self._rows([r.excluded for r in requests], unknown[2])
        if triggered:
            triggers = _each_once(self._rows([r.triggers for r in requests], unknown[3]))
            excluded = _end_to_end(excluded, triggers)  # more like an item is not the item
        batch = QueryBatch(
            user_ids=user_ids,
            users=users,
            history=history,
            excluded=excluded,
            now=now,
            latitude=np.array([r.latitude for r in requests], np.float64),
            longitude=np.array([r.longitude for r in requests], np.float64),
            cities=tuple([r.city for r in requests]),
            devices=tuple([r.device for r in requests]),
            live=known.live,
            triggers=triggers,
        )
        return Hydrated(batch, unknown, known.leftovers)

    def _rows(self, given: Sequence[AnyArray | None], unknown: Int32Array) -> RaggedRows:
        """Look up the items that each request names."""
        lists: list[Int32Array] = []
        for q, ids in enumerate(given):
            rows = np.empty(0, np.int32)
            if ids is not None:
                rows = self._item_index.rows(ids)
                known = rows >= 0
                unknown[q] = rows.size - np.count_nonzero(known)
                rows = rows[known]
            lists.append(rows)
        return RaggedRows.of(lists)

    def _city_codes(self, requests: Sequence[Request]) -> Int32Array:
        codes = {} if self._columns is None else self._columns.city_codes
        return np.array([codes.get(r.city, NO_ROW) if r.city else NO_ROW for r in requests], np.int32)

    def _with_recent(self, stored: History, requests: Sequence[Request], unknown: Int32Array) -> History:
        parts: list[tuple[Int32Array, Float32Array, Int64Array]] = []
        for q, request in enumerate(requests):
            mine = slice(int(stored.offsets[q]), int(stored.offsets[q + 1]))
            rows, weights, times = stored.rows[mine], stored.weights[mine], stored.timestamps[mine]
            if request.recent is not None:
                given = self._item_index.rows(request.recent.ids)
                unknown[q] = np.count_nonzero(given < 0) + request.recent.passed_over
                rows, weights, times = combine(given, request.recent, rows, weights, times)
            parts.append((rows, weights, times))
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([rows.size for rows, _, _ in parts], out=offsets[1:])
        return History(
            np.concatenate([rows for rows, _, _ in parts]).astype(np.int32, copy=False),
            np.concatenate([weights for _, weights, _ in parts]).astype(np.float32, copy=False),
            np.concatenate([times for _, _, times in parts]).astype(np.int64, copy=False),
            offsets,
        )


def _each_once(ragged: RaggedRows) -> RaggedRows:
    lists = [list(dict.fromkeys(part.tolist())) for part in _lists(ragged)]
    return RaggedRows.of([np.array(part, np.int32) for part in lists])


def _end_to_end(one: RaggedRows, other: RaggedRows) -> RaggedRows:
    """Return each list of `one` with that of `other` behind it."""
    pairs = zip(_lists(one), _lists(other), strict=True)
    return RaggedRows.of([np.concatenate(pair) for pair in pairs])


def _lists(ragged: RaggedRows) -> list[Int32Array]:
    return [ragged.rows[a:b] for a, b in pairwise(ragged.offsets.tolist())]


def combine(
    given: Int32Array, recent: RecentItems, rows: Int32Array, weights: Float32Array, times: Int64Array
) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Put what the caller gave in front of what is stored; each item stays once, where it first stands.

    A given item weighs the sum of the points of its distinct events; one that is stored too weighs the larger of the
    two, because the stored points do not say which events they count.

    Args:
        given: int32[m], rows of recent.ids; -1 where unknown, which is left out.
        recent: the caller's items.
        rows, weights, times: the stored history.
    """
    known = given >= 0
    # One entry per (item, kind), first occurrence kept, then the points of an item's kinds add up.
    pairs = np.stack((given[known].astype(np.int64), recent.kinds[known]), axis=1)
    _, first = np.unique(pairs, axis=0, return_index=True)
    positions = np.flatnonzero(known)[np.sort(first)]
    unique_rows, lead, inverse = np.unique(given[positions], return_index=True, return_inverse=True)
    points = np.bincount(inverse, weights=recent.points[positions], minlength=unique_rows.size).astype(
        np.float32
    )
    order = np.argsort(lead, kind="stable")
    front_rows = unique_rows[order]
    front_weights = points[order]
    front_times = recent.timestamps[positions[lead[order]]]
    if recent.override:
        return front_rows, front_weights, front_times
    if rows.size and front_rows.size:
        at = np.searchsorted(unique_rows, rows)
        at[at == unique_rows.size] = 0
        repeated = unique_rows[at] == rows
        rank = np.empty(order.size, np.int64)
        rank[order] = np.arange(order.size)
        np.maximum.at(front_weights, rank[at[repeated]], weights[repeated])
        rows, weights, times = rows[~repeated], weights[~repeated], times[~repeated]
    return (
        np.concatenate((front_rows, rows)),
        np.concatenate((front_weights, weights)),
        np.concatenate((front_times, times)),
    )
