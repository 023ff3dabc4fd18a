"""The event log as arrays, and the interest matrix made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numba import njit

from engine.core.errors import ConfigError, DatasetError
from engine.core.interactions import Interactions
from engine.core.types import NO_ROW, BoolArray, Float32Array, Int32Array, Int64Array, UInt8Array
from engine.data.catalogue import Catalogue
from engine.data.columns import numbers
from engine.data.dataset import Dataset
from engine.data.form import SPLITS, file_name
from engine.data.ids import IdIndex

_FILE = file_name("interactions")
_MOST_KINDS = 255
_MOST_SCORED_KINDS = 64


@dataclass(frozen=True, slots=True)
class EventLog:
    """Everything that users did, one entry per event, in the order of the file.

    Attributes:
        users: int32[events], user rows.
        items: int32[events], item rows.
        kinds: uint8[events], positions in `kind_names`.
        kind_names: the kinds of event, each once.
        timestamps: int64[events], seconds since the epoch; zeros where the data set has none.
        timed: whether the data set has timestamps.
        splits: uint8[events], positions in `SPLITS` (train, tune, test), or None where the data set has none.
        ratings: float32[events], NaN where missing, or None where the data set has none.
        user_count, item_count: how many users and items the catalogue has.
    """

    users: Int32Array
    items: Int32Array
    kinds: UInt8Array
    kind_names: tuple[str, ...]
    timestamps: Int64Array
    timed: bool
    splits: UInt8Array | None
    ratings: Float32Array | None
    user_count: int
    item_count: int

    def __len__(self) -> int:
        return int(self.users.size)

    @classmethod
    def read(cls, dataset: Dataset, catalogue: Catalogue) -> Self:
        """Read the interactions of a data set. Memory: the log, 17 to 22 bytes an event, and one batch.

        Raises:
            DatasetError: if an event's user or item is not in the catalogue, if there are more than 255 kinds
                of event, or if the file cannot be read.
        """
        n = dataset.rows["interactions"]
        timed, split, rated = (dataset.has("interactions", name) for name in ("timestamp", "split", "rating"))
        log = cls(
            users=np.empty(n, np.int32),
            items=np.empty(n, np.int32),
            kinds=np.empty(n, np.uint8),
            kind_names=(),
            timestamps=np.zeros(n, np.int64),
            timed=timed,
            splits=np.empty(n, np.uint8) if split else None,
            ratings=np.empty(n, np.float32) if rated else None,
            user_count=len(catalogue.users),
            item_count=len(catalogue.items),
        )
        kind_codes: dict[str, int] = {}
        split_codes = {name: code for code, name in enumerate(SPLITS)}
        wanted = {"timestamp": timed, "split": split, "rating": rated}
        columns = ["user_id", "item_id", "event", *(name for name, there in wanted.items() if there)]
        start = 0
        for batch in dataset.batches("interactions", columns):
            part = slice(start, start + batch.num_rows)
            if part.stop > n:
                break
            log.users[part] = _rows(catalogue.users, batch, "user_id")
            log.items[part] = _rows(catalogue.items, batch, "item_id")
            log.kinds[part] = _codes(batch.column("event"), kind_codes)
            if timed:
                log.timestamps[part] = numbers(batch.column("timestamp").cast(pa.int64()))
            if log.splits is not None:
                log.splits[part] = _codes(batch.column("split"), split_codes)
            if log.ratings is not None:
                log.ratings[part] = numbers(batch.column("rating").cast(pa.float64(), safe=False))
            start = part.stop
        if start != n:
            raise DatasetError("has changed since the data set was opened", _FILE)
        return replace(log, kind_names=tuple(kind_codes))

    def counts_by_kind(self, where: BoolArray | None = None) -> dict[str, int]:
        """Return how many events of each kind there are, of all or of those where bool[events] is true."""
        kinds = self.kinds if where is None else self.kinds[where]
        counts = np.bincount(kinds, minlength=len(self.kind_names)).tolist()
        return dict(zip(self.kind_names, counts, strict=True))


def interest_matrix(
    log: EventLog,
    points: Mapping[str, float],
    where: BoolArray | None = None,
    min_rating: float | None = None,
) -> Interactions:
    """Return who liked what: one entry per (user, item) with an event that earns points.

    An entry weighs the sum of the points of the distinct kinds of event that the user gave the item, and has
    the time of the last of them. Per user, entries stand newest first; of two events at one time the later in
    the file is the newer. `ignored_events` says what was left out.

    Work is linear in the events, but for users whose events are not in rising order of time: theirs are
    sorted. Memory while it works: 20 bytes an event that counts (24 from 2^31 events on) and 16 an entry, 1
    or 2 bytes an event of the log, 24 a user, 8 an item. 16 bytes an entry remain.

    Args:
        log: the events.
        points: points by kind of event; a kind that is absent or has 0 points counts for nothing.
        where: bool[events], the events to look at; None for all.
        min_rating: events with a lower rating count for nothing; those without a rating are not judged by it.

    Returns:
        The matrix, of the catalogue's shape; without entries if no event counts.

    Raises:
        ConfigError: if points are negative or not finite, or more than 64 kinds of event have points.
    """
    scored = _scored_kinds(log, points)
    counted = _counted(log, scored, where, min_rating)
    starts = np.zeros(log.user_count + 1, np.int64)
    _count_by_user(log.users, counted, starts[1:])
    busiest = int(starts.max())
    np.cumsum(starts, out=starts)
    order = np.empty(int(starts[-1]), np.int32 if len(log) < 2**31 else np.int64)
    _sort_by_user(log.users, counted, starts[:-1].copy(), order)

    bit_of_kind = np.zeros(_MOST_KINDS + 1, np.uint8)
    bit_of_kind[scored] = np.arange(scored.size)
    bit_points = np.array([points[log.kind_names[kind]] for kind in scored.tolist()], np.float64)
    indptr = np.zeros(log.user_count + 1, np.int64)
    rows = np.empty(order.size, np.int32)
    weights = np.empty(order.size, np.float32)
    timestamps = np.empty(order.size, np.int64)
    place = np.full(log.item_count, -1, np.int64)
    entries = _merge(
        (order, starts, busiest),
        (log.items, log.kinds, log.timestamps),
        (bit_of_kind, bit_points, place),
        (indptr, rows, weights, timestamps),
    )
    return Interactions(
        users=log.user_count,
        items=log.item_count,
        indptr=indptr,
        rows=rows[:entries].copy(),
        weights=weights[:entries].copy(),
        timestamps=timestamps[:entries].copy(),
    )


def ignored_events(
    log: EventLog,
    points: Mapping[str, float],
    where: BoolArray | None = None,
    min_rating: float | None = None,
) -> dict[str, int]:
    """Return how many events `interest_matrix` leaves out for want of points or rating, by kind; no zeros.

    Args and errors are those of `interest_matrix`; events outside `where` are not spoken of.
    """
    left_out = ~_counted(log, _scored_kinds(log, points), where, min_rating)
    if where is not None:
        left_out &= where
    return {kind: count for kind, count in log.counts_by_kind(left_out).items() if count}


def _rows(index: IdIndex, batch: Any, column: str) -> Int32Array:
    rows = index.rows(batch.column(column))
    unknown = int(np.count_nonzero(rows == NO_ROW))
    if unknown:
        raise DatasetError(f"{unknown:,} ids are not in the catalogue, which is of other data", _FILE, column)
    return rows


def _codes(values: Any, codes: dict[str, int]) -> UInt8Array:
    """Return uint8[n], the code of each string; strings not met before get the next code in `codes`."""
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    indices = encoded.indices.to_numpy(zero_copy_only=False)
    names = encoded.dictionary.to_pylist()
    table = np.zeros(len(names), np.uint8)
    # A dictionary may name values that no row has.
    for at in np.flatnonzero(np.bincount(indices, minlength=len(names))).tolist():
        code = codes.setdefault(names[at], len(codes))
        if code >= _MOST_KINDS:
            raise DatasetError(f"holds more than {_MOST_KINDS} kinds of event", _FILE, "event")
        table[at] = code
    coded: UInt8Array = table[indices]
    return coded


def _scored_kinds(log: EventLog, points: Mapping[str, float]) -> Int64Array:
    """Return the codes of the kinds that earn points, by name: sums must not depend on the file's order."""
    for kind, value in points.items():
        if not (np.isfinite(value) and value >= 0):
            raise ConfigError(f"points must be finite and not negative, not {value}", f"points.{kind}")
    scored = sorted((name, code) for code, name in enumerate(log.kind_names) if points.get(name, 0) > 0)
    if len(scored) > _MOST_SCORED_KINDS:
        raise ConfigError(f"at most {_MOST_SCORED_KINDS} kinds of event may have points", "points")
    return np.array([code for _, code in scored], np.int64)


def _counted(
    log: EventLog, scored: Int64Array, where: BoolArray | None, min_rating: float | None
) -> BoolArray:
    """bool[events]: which events earn points."""
    earns = np.zeros(_MOST_KINDS + 1, np.bool_)
    earns[scored] = True
    counted: BoolArray = earns[log.kinds]
    if where is not None:
        counted &= where
    if min_rating is not None and log.ratings is not None:
        # NaN, no rating, is not less than anything.
        counted &= ~(log.ratings < min_rating)
    return counted


@njit(nogil=True, cache=True)
def _count_by_user(users, counted, counts):  # type: ignore[no-untyped-def]
    for event in range(users.size):
        if counted[event]:
            counts[users[event]] += 1


@njit(nogil=True, cache=True)
def _sort_by_user(users, counted, cursor, order):  # type: ignore[no-untyped-def]
    """Counting sort of the events that count; the file's order is kept within a user."""
    for event in range(users.size):
        if counted[event]:
            order[cursor[users[event]]] = event
            cursor[users[event]] += 1


@njit(nogil=True, cache=True)
def _sort(events, ages, spare_events, spare_ages, size):  # type: ignore[no-untyped-def]
    """Stable merge sort of the first `size` events by age; returns whichever array holds the result.

    np.argsort would do, but takes numba seconds to compile.
    """
    width = 1
    while width < size:
        for low in range(0, size, 2 * width):
            middle, high = min(low + width, size), min(low + 2 * width, size)
            left, right = low, middle
            for k in range(low, high):
                if left < middle and (right == high or ages[left] <= ages[right]):
                    taken = left
                    left += 1
                else:
                    taken = right
                    right += 1
                spare_events[k], spare_ages[k] = events[taken], ages[taken]
        events, spare_events = spare_events, events
        ages, spare_ages = spare_ages, ages
        width *= 2
    return events


@njit(nogil=True, cache=True)
def _merge(sorting, log, scratch, out):  # type: ignore[no-untyped-def]
    """Make one entry of each user's events with one item; return how many entries there are.

    Going through a user's events from the newest on, the first of an item is its newest, and the entries come
    out in order. `place` remembers where an item's entry is; one before the user's first is another user's.
    """
    order, starts, busiest = sorting
    items, kinds, event_times = log
    bit_of_kind, bit_points, place = scratch
    indptr, rows, weights, timestamps = out
    events = np.empty(busiest, order.dtype)
    ages = np.empty(busiest, np.int64)
    spare_events, spare_ages = np.empty_like(events), np.empty_like(ages)
    seen = np.empty(busiest, np.uint64)
    one = np.uint64(1)
    entry = 0
    for user in range(indptr.size - 1):
        size = starts[user + 1] - starts[user]
        sorted_already = True
        for k in range(size):
            events[k] = order[starts[user + 1] - 1 - k]
            ages[k] = -event_times[events[k]]
            sorted_already &= k == 0 or ages[k - 1] <= ages[k]
        newest_first = events if sorted_already else _sort(events, ages, spare_events, spare_ages, size)
        begin = entry
        for k in range(size):
            event = newest_first[k]
            at = place[items[event]]
            if at < begin:
                at = entry
                place[items[event]] = at
                rows[at] = items[event]
                timestamps[at] = event_times[event]
                seen[at - begin] = 0
                entry += 1
            seen[at - begin] |= one << np.uint64(bit_of_kind[kinds[event]])
        for at in range(begin, entry):
            weight = 0.0
            for bit in range(bit_points.size):
                if seen[at - begin] & (one << np.uint64(bit)):
                    weight += bit_points[bit]
            weights[at] = weight
        indptr[user + 1] = entry
    return entry
