"""Posting lists: the items of an author, a cell, a city, newest first; a snapshot's, and over them what changed since.

A row stands in one list at most. The snapshot is CSR. What `update` says of a row goes into the overlay: a skip list
per list (Pugh 1990) in arrays that grow, so that items which come in any order of time still read newest first at
O(log n) an insertion. From then on the snapshot's own entry of that row no longer counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from numba import njit
from pydantic import Field

from engine.core.candidates import CandidateBatch
from engine.core.channel import SnapshotSink
from engine.core.int_table import IntTable, slot_of
from engine.core.items import ItemColumns
from engine.core.options import Online, Options
from engine.core.prefetch import prefetch
from engine.core.types import (
    NO_ROW,
    AnyArray,
    BoolArray,
    Float32Array,
    Int32Array,
    Int64Array,
    RaggedRows,
)
from engine.core.writable import writable

SECONDS_PER_DAY = 86_400
NO_KEY = -1
"""The key of a row that stands in no list."""

LEVELS = 8
"""Of a skip list; one node in 8 reaches the next level, so 8 levels serve 8^8 entries."""

TIME, LIST, POINTERS = 1, 2, 3
"""Where an entry of the overlay has its parts; the row stands first."""

_AT, _STOP, _ENTRY, _LEFT = 0, 1, 2, 3
"""Where a cursor in a list has its parts."""

_BATCH = 4096
_BLOCK = 10
"""Rows of a block, as a power of two."""


class GateOptions(Options):
    """Which items of a posting list may be recalled."""

    min_quality: Annotated[float, Field(ge=0, le=1), Online()] = 0.0
    """Items of lower quality, or of none that is known, are left out; 0 lets all pass."""

    max_age_days: Annotated[float, Field(ge=0), Online()] = 0.0
    """Older items, and those of no known time, are left out; 0 lets all pass."""


class PostOptions(GateOptions):
    """Options of a channel that weighs posting lists against each other."""

    half_life_days: Annotated[float, Field(gt=0), Online()] = 7.0
    """An item scores one less for every so many days of age: as much as half the weight of its list."""


class Wanted(NamedTuple):
    """The lists that a batch asks for; query q owns [offsets[q], offsets[q + 1]).

    Attributes:
        offsets: int64[n + 1].
        keys: int64[m]; a key asked twice by a query counts once, with its larger weight.
        weights: float32[m]; a list of weight 0 is passed over.
        triggers: int32[m], the trigger of what is recalled from the list.
    """

    offsets: Int64Array
    keys: Int64Array
    weights: Float32Array
    triggers: Int32Array

    @classmethod
    def alike(cls, lists: RaggedRows) -> Wanted:
        """Ask for lists whose keys are rows of an index, all of weight 1, each its own trigger."""
        return cls(
            lists.offsets, lists.rows.astype(np.int64), np.ones(lists.rows.size, np.float32), lists.rows
        )


class Reading(NamedTuple):
    """How lists are read.

    Attributes:
        half_life: seconds in which an item's score falls by one.
        min_quality, max_age: what is left out; as in `GateOptions`, but the age in seconds.
        lists: how many lists of a query are read, from the front; 0 for all.
        per_list: newest items taken of each list; 0 for as many as are asked for.
        lead, thin: after the first `lead` lists of a query the others are read only where those gave fewer than `thin`
            items; 0 for always.
    """

    half_life: float
    min_quality: float = 0.0
    max_age: float = 0.0
    lists: int = 0
    per_list: int = 0
    lead: int = 0
    thin: int = 0

    @classmethod
    def of(
        cls, options: PostOptions, lists: int = 0, per_list: int = 0, lead: int = 0, thin: int = 0
    ) -> Self:
        """Return the reading that a channel's options ask for."""
        return cls(
            options.half_life_days * SECONDS_PER_DAY,
            options.min_quality,
            options.max_age_days * SECONDS_PER_DAY,
            lists,
            per_list,
            lead,
            thin,
        )


def write_posting_lists(
    sink: SnapshotSink, keys: Int64Array, published: Int64Array | None, lists: int = 0
) -> None:
    """Write the posting lists of a catalogue.

    Args:
        sink: where they go: `posts.keys`, `posts.indptr`, `posts.rows`, `posts.times`.
        keys: int64[items], the list of each row; `NO_KEY` for none.
        published: int64[items], seconds since the epoch, -1 where unknown; None: unknown for all.
        lists: keys are below it and number the lists themselves; 0: keys are any numbers from 0.
    """
    times = np.full(keys.size, -1, np.int64) if published is None else published
    rows = np.flatnonzero(keys >= 0)
    rows = rows[np.lexsort((rows, -times[rows], keys[rows]))]
    ordered = keys[rows]
    if lists:
        starts = np.searchsorted(ordered, np.arange(lists + 1))
        distinct = np.empty(0, np.int64)
    else:
        first = np.flatnonzero(
            np.concatenate((np.ones(min(ordered.size, 1), np.bool_), np.diff(ordered) != 0))
        )
        starts = np.concatenate((first, [ordered.size]))
        distinct = ordered[first]
    sink.write("posts.keys", distinct.astype(np.int64))
    sink.write("posts.indptr", starts.astype(np.int64))
    sink.write("posts.rows", rows.astype(np.int32))
    sink.write("posts.times", times[rows].astype(np.int64))


class PostingLists:
    """Newest-first lists of a snapshot with an overlay. Changed and read on one thread."""

    def __init__(
        self, keys: Int64Array, indptr: Int64Array, rows: Int32Array, times: Int64Array, columns: ItemColumns
    ) -> None:
        """Take what `write_posting_lists` wrote.

        Args:
            keys: int64[lists], rising; empty where keys number the lists.
            indptr: int64[lists + 1].
            rows, times: int32[m], int64[m], newest first within a list; of one time the lower row first.
            columns: the live columns.
        """
        self._base = (keys, indptr, rows, times)
        self._columns = columns
        # The entry of each row, -1 where the snapshot's own counts; and a bit per row that says whether it has an entry,
        # which is all that reading needs to know. A byte per block of rows says whether one of them has: as a rule none
        # has, and these bytes stay in the cache.
        self._latest = np.full(len(columns), NO_ROW, np.int32)
        self._moved = np.zeros((len(columns) + 7) // 8, np.uint8)
        self._blocks = np.zeros((len(columns) >> _BLOCK) + 1, np.bool_)
        # An entry is row, time, list (-1: none) and a pointer per level, side by side, as reading goes from one to the
        # next all over the memory. Its name, and a pointer to it, is where it begins.
        self._entries = np.empty(0, np.int64)
        self._used = 0
        self._numbers = IntTable()  # key -> number of its list in the overlay
        self._heads = np.empty(0, np.int32)  # where a list's first pointers begin in `_entries`
        self._arrays: tuple[AnyArray, ...] = self._now()
        gone = np.flatnonzero(~columns.available).astype(np.int32)
        if gone.size:
            self.update(gone, np.full(gone.size, NO_KEY, np.int64))

    @classmethod
    def load(cls, arrays: Mapping[str, AnyArray], columns: ItemColumns) -> Self:
        """Map the lists of a snapshot."""
        keys, indptr, rows, times = (
            writable(arrays[f"posts.{name}"]) for name in ("keys", "indptr", "rows", "times")
        )
        return cls(keys, indptr, rows, times, columns)

    @property
    def bytes_in_memory(self) -> int:
        """What the overlay takes."""
        mine = (self._latest, self._moved, self._blocks, self._entries, self._heads, *self._numbers.arrays)
        return sum(array.nbytes for array in mine)

    def update(self, rows: Int32Array, keys: Int64Array) -> None:
        """Put rows where they stand now; time and availability are read from the live columns.

        Args:
            rows: int32[m].
            keys: int64[m], the list of each; `NO_KEY` for none.
        """
        if len(self._columns) > self._latest.size:
            self._latest = _grown(self._latest, len(self._columns), NO_ROW)
            # As many as `_latest` has room for: that alone says when both grow.
            self._moved = _grown(self._moved, (self._latest.size + 7) // 8)
            self._blocks = _grown(self._blocks, (self._latest.size >> _BLOCK) + 1)
        keys = np.where(self._columns.available[rows], keys, NO_KEY)
        times = self._columns.published_at[rows]
        for start in range(0, rows.size, _BATCH):
            part = slice(start, start + _BATCH)
            self._place(rows[part], self._numbers_of(keys[part]), times[part])
        self._arrays = self._now()

    def _now(self) -> tuple[AnyArray, ...]:
        """Return what `_read` reads, put together once a change and not once a batch."""
        return (*self._base, *self._numbers.arrays, self._heads, self._entries, self._moved, self._blocks)

    def _numbers_of(self, keys: Int64Array) -> Int32Array:
        """int32[m]: the overlay's list of each key, made where there is none; -1 for `NO_KEY`."""
        numbers = self._numbers.get(keys)
        unknown = np.flatnonzero((numbers < 0) & (keys >= 0))
        if not unknown.size:
            return numbers
        new = list(dict.fromkeys(keys[unknown].tolist()))
        first = len(self._numbers)
        self._numbers.put(np.array(new, np.int64), np.arange(first, first + len(new), dtype=np.int32))
        end = self._used + LEVELS * len(new)
        self._heads = _grown(self._heads, first + len(new))
        self._heads[first : first + len(new)] = np.arange(self._used, end, LEVELS)
        self._entries = _grown(self._entries, end)
        self._entries[self._used : end] = NO_ROW
        self._used = end
        return self._numbers.get(keys)

    def _place(self, rows: Int32Array, lists: Int32Array, times: Int64Array) -> None:
        self._entries = _grown(self._entries, self._used + rows.size * (POINTERS + LEVELS))
        self._used = _place(
            rows,
            lists,
            times,
            self._latest,
            self._moved,
            self._blocks,
            self._entries,
            self._heads,
            self._used,
        )

    def read(self, wanted: Wanted, reading: Reading, now: Int64Array, k: Int32Array) -> CandidateBatch:
        """Return the best k items of each query's lists.

        Of each list the newest valid items are taken: published by now, within the gates; one that was taken down stands
        in no list, as `update` has heard of it. An item's score is log2(weight of its list) - age / half-life, which is
        the logarithm of weight x 2^(-age / half-life): that itself would be 0 in float32 for all that is older than 149
        half-lives. An unknown time is that of the epoch.

        Args:
            wanted: which lists.
            reading: how.
            now: int64[n], seconds since the epoch, which ages are measured from.
            k: int32[n].

        Returns:
            The best items of each query, ties by row; triggers are those of the lists.
        """
        room = sum(k.tolist())
        rows = np.empty(room, np.int32)
        scores = np.empty(room, np.float32)
        triggers = np.empty(room, np.int32)
        offsets = np.empty(k.size + 1, np.int64)
        arguments: tuple[Any, ...] = (
            *wanted, now, k, *reading, *self._arrays, self._columns.quality, rows, scores, triggers, offsets,
        )  # fmt: skip
        total = _read(*arguments)
        if total < room:
            rows, scores, triggers = rows[:total], scores[:total], triggers[:total]
        return CandidateBatch(rows, scores, triggers, offsets)


def _grown(array: AnyArray, size: int, fill: int = 0) -> AnyArray:
    if size <= array.size:
        return array
    wider: AnyArray = np.full(max(size, array.size * 5 // 4, 1024), fill, array.dtype)
    wider[: array.size] = array
    return wider


@njit(nogil=True, cache=True, inline="always")
def _height(row):  # type: ignore[no-untyped-def]
    """How many levels a row's entry reaches: its hash (splitmix64's finisher) decides, so runs repeat."""
    z = (np.uint64(row) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    height = 1
    while height < LEVELS and z & np.uint64(7) == np.uint64(0):
        z >>= np.uint64(3)
        height += 1
    return height


@njit(nogil=True, cache=True)
def _search(head, row, time, entries, before):  # type: ignore[no-untyped-def]
    """Note per level where the pointer stands that leads past (time, row) in newest-first order."""
    at = np.int64(head)
    for level in range(LEVELS - 1, -1, -1):
        entry = entries[at + level]
        while entry >= 0 and (
            entries[entry + TIME] > time or (entries[entry + TIME] == time and entries[entry] < row)
        ):
            at = entry + POINTERS
            entry = entries[at + level]
        before[level] = at + level


@njit(nogil=True, cache=True)
def _place(rows, lists, times, latest, moved, blocks, entries, heads, used):  # type: ignore[no-untyped-def]
    before = np.empty(LEVELS, np.int64)
    for i in range(rows.size):
        row = rows[i]
        entry = np.int64(latest[row])
        if entry < 0:
            entry = np.int64(used)
            latest[row] = entry
            moved[row >> 3] |= np.uint8(1 << (row & 7))
            blocks[row >> _BLOCK] = True
            entries[entry] = row
            entries[entry + LIST] = NO_ROW
            used += POINTERS + _height(row)
        elif entries[entry + LIST] == lists[i] and entries[entry + TIME] == times[i]:
            continue
        if entries[entry + LIST] >= 0:
            _search(heads[entries[entry + LIST]], row, entries[entry + TIME], entries, before)
            for level in range(_height(row)):
                entries[before[level]] = entries[entry + POINTERS + level]
        entries[entry + LIST] = lists[i]
        entries[entry + TIME] = times[i]
        if lists[i] >= 0:
            _search(heads[lists[i]], row, times[i], entries, before)
            for level in range(_height(row)):
                entries[entry + POINTERS + level] = entries[before[level]]
                entries[before[level]] = entry
    return used


@njit(nogil=True, cache=True)
def _range_of(key, keys, indptr):  # type: ignore[no-untyped-def]
    """Return where a key's list begins and ends in the snapshot."""
    at = key
    if keys.size:
        at = np.searchsorted(keys, key)
        if at == keys.size or keys[at] != key:
            return 0, 0
    if at < 0 or at >= indptr.size - 1:
        return 0, 0
    return indptr[at], indptr[at + 1]


@njit(nogil=True, cache=True)
def _sort(keys, spare, counts):  # type: ignore[no-untyped-def]
    """Sort by the high 32 bits, stably: by radix, as comparisons that come out at random cost three times that."""
    n = keys.size
    if n <= 24:
        for i in range(1, n):
            key = keys[i]
            j = i
            while j > 0 and keys[j - 1] >> np.uint64(32) > key >> np.uint64(32):
                keys[j] = keys[j - 1]
                j -= 1
            keys[j] = key
        return
    # Loops, because numba takes seconds to compile the assignment of a slice.
    for digit in range(4):
        for value in range(256):
            counts[digit, value] = 0
    for i in range(n):
        high = keys[i] >> np.uint64(32)
        for digit in range(4):
            counts[digit, (high >> np.uint64(8 * digit)) & np.uint64(255)] += 1
    source = keys
    target = spare
    passes = 0
    for digit in range(4):
        shift = np.uint64(32 + 8 * digit)
        starts = counts[digit]
        if starts[(keys[0] >> shift) & np.uint64(255)] == n:
            continue  # all alike
        total = 0
        for value in range(256):
            total, starts[value] = total + starts[value], total
        for i in range(n):
            value = (source[i] >> shift) & np.uint64(255)
            target[starts[value]] = source[i]
            starts[value] += 1
        source, target = target, source
        passes += 1
    if passes % 2:
        for i in range(n):
            keys[i] = spare[i]


@njit(nogil=True, cache=True)
def _ties_by_row(order, take, rows, spare, counts):  # type: ignore[no-untyped-def]
    """Put entries of one score in order of row; `order` holds places in `rows` in its low halves."""
    low = np.uint64(0xFFFFFFFF)
    start = 0
    while start < take:
        score = order[start] >> np.uint64(32)
        stop = start + 1
        while stop < order.size and order[stop] >> np.uint64(32) == score:
            stop += 1
        if stop - start > 1:
            for i in range(start, stop):
                slot = order[i] & low
                order[i] = (np.uint64(rows[slot]) << np.uint64(32)) | slot
            _sort(order[start:stop], spare[: stop - start], counts)
        start = stop


@njit(nogil=True, cache=True, inline="always")
def _next(  # type: ignore[no-untyped-def]
    cursor, moment, min_quality, max_age, base_rows, base_times, entries, moved, blocks, quality
):
    """Return row and time of a list's next valid item, and move the cursor behind it; row -1 where there is none.

    Args:
        cursor: int64[4]: where the snapshot's list goes on and where it ends, the overlay's next entry (-1: none), and
            how many items may still be taken.
        moment, min_quality, max_age, base_rows, base_times, entries, moved, blocks, quality: of `_read`.
    """
    at, stop, entry = cursor[_AT], cursor[_STOP], cursor[_ENTRY]
    row, time = np.int32(NO_ROW), np.int64(0)
    while cursor[_LEFT] > 0:
        while (
            at < stop
            and blocks[base_rows[at] >> _BLOCK]
            and (moved[base_rows[at] >> 3] >> (base_rows[at] & 7)) & 1
        ):
            at += 1
        if entry >= 0 and (
            at >= stop
            or entries[entry + TIME] > base_times[at]
            or (entries[entry + TIME] == base_times[at] and entries[entry] < base_rows[at])
        ):
            row, time = np.int32(entries[entry]), entries[entry + TIME]
            entry = entries[entry + POINTERS]
        elif at < stop:
            row, time = base_rows[at], base_times[at]
            at += 1
        else:
            break
        if max_age > 0 and moment - time > max_age:
            break  # and so is all that follows
        if time <= moment and (min_quality == 0 or quality[row] >= min_quality):
            cursor[_AT], cursor[_ENTRY] = at, entry
            cursor[_LEFT] -= 1
            return row, time
    cursor[_LEFT] = 0
    return np.int32(NO_ROW), time


@njit(nogil=True, cache=True, inline="always")
def _sink(heap, size, at, key):  # type: ignore[no-untyped-def]
    """Put a key into a heap, the least on top, at a place that is free or below it."""
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        child += child + 1 < size and heap[child + 1] < heap[child]
        if key <= heap[child]:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = key


@njit(nogil=True, cache=True)
def _read(  # type: ignore[no-untyped-def]
    offsets, wanted, weights, list_triggers, now, k, half_life, min_quality, max_age, lists, per_list, lead, thin,
    base_keys, indptr, base_rows, base_times, table_keys, table_values, heads, entries, moved, blocks, quality,
    out_rows, out_scores, out_triggers, out_offsets,
):  # fmt: skip
    """Merge the lists of each query: a list falls in score from its front, so no more of it is read than is answered."""
    most = 1
    room = 1
    for q in range(k.size):
        asked = offsets[q + 1] - offsets[q]
        if lists:
            asked = min(asked, lists)
        each = min(per_list, k[q]) if per_list else k[q]
        most = max(most, asked)
        room = max(room, asked * each + lead * thin)
    capacity = 2
    while capacity < 2 * most:
        capacity *= 2
    # Of each distinct key of a query the place of its largest weight.
    table = np.full(capacity, -1, np.int64)
    places = np.empty(capacity, np.int32)
    cursors = np.empty((most, 4), np.int64)
    cursor = np.empty(4, np.int64)
    logs = np.empty(most, np.float64)
    # The next item of each list, and the lists by its score.
    next_rows = np.empty(most, np.int32)
    next_scores = np.empty(most, np.float32)
    next_bits = next_scores.view(np.uint32)
    heap = np.empty(most, np.uint64)
    low = np.uint64(0xFFFFFFFF)
    order = np.empty(room, np.uint64)
    spare = np.empty(room, np.uint64)
    counts = np.empty((4, 256), np.int32)
    rows = np.empty(room, np.int32)
    scores = np.empty(room, np.float32)
    triggers = np.empty(room, np.int32)
    out_offsets[0] = 0
    written = 0
    for q in range(k.size):
        begin = offsets[q]
        end = offsets[q + 1]
        if lists:
            end = min(end, begin + lists)
        found = 0
        if k[q] > 0 and end > begin:
            if end - begin > 1:
                table[:] = -1
                places[:] = -1
                for p in range(begin, end):
                    at = slot_of(wanted[p], table, places)
                    if places[at] < 0 or weights[p] > weights[begin + places[at]]:
                        table[at] = wanted[p]
                        places[at] = p - begin
            each = min(per_list, k[q]) if per_list else k[q]
            moment = now[q]
            # The lists lie anywhere: asking for all of them first lets the processor wait for many at once.
            if not base_keys.size:
                for p in range(begin, end):
                    prefetch(indptr, wanted[p])
            for p in range(begin, end):
                first, stop = _range_of(wanted[p], base_keys, indptr)
                cursors[p - begin, _AT], cursors[p - begin, _STOP] = first, stop
                if first < stop:
                    prefetch(base_rows, first)
                    prefetch(base_times, first)
            size = 0
            for p in range(begin, end):
                mine = p - begin
                if thin and mine == lead and _counted(
                    cursors[:lead], thin, cursor, moment, min_quality, max_age, base_rows, base_times, entries, moved,
                    blocks, quality,
                ) >= thin:  # fmt: skip
                    break
                key = wanted[p]
                alone = end - begin == 1 or places[slot_of(key, table, places)] == mine
                cursors[mine, _LEFT] = 0
                if key < 0 or weights[p] <= 0 or not alone:
                    continue
                at, stop = cursors[mine, _AT], cursors[mine, _STOP]
                if at < stop and base_times[at] > moment:
                    high = stop
                    while at < high:
                        middle = (at + high) // 2
                        if base_times[middle] > moment:
                            at = middle + 1
                        else:
                            high = middle
                    cursors[mine, _AT] = at
                number = table_values[slot_of(key, table_keys, table_values)]
                cursors[mine, _ENTRY] = entries[heads[number]] if number >= 0 else -1
                cursors[mine, _LEFT] = max(each, thin) if mine < lead else each
                logs[mine] = math.log2(np.float64(weights[p]))  # of a float32 it would be a float32
                heap[size] = mine
                size += 1
            # First all lists begin; then, time and again, the best item is taken and its list goes on.
            begun = filled = 0
            while begun < size or filled:
                beginning = begun < size
                if beginning:
                    mine = np.int64(heap[begun])
                    begun += 1
                else:
                    # Of those that score as the last one does, too, all are needed: the row decides between them.
                    if found >= k[q] and heap[0] >> np.uint64(32) != order[found - 1] >> np.uint64(32):
                        break
                    mine = np.int64(heap[0] & low)
                    rows[found], scores[found] = next_rows[mine], next_scores[mine]
                    triggers[found] = list_triggers[begin + mine]
                    order[found] = heap[0] & ~low | np.uint64(found)
                    found += 1
                row, time = _next(
                    cursors[mine], moment, min_quality, max_age, base_rows, base_times, entries, moved, blocks, quality,
                )  # fmt: skip
                key = np.uint64(0)
                if row >= 0:
                    next_rows[mine] = row
                    next_scores[mine] = np.float32(logs[mine] - (moment - time) / half_life)
                    key = _falling(next_bits[mine]) << np.uint64(32) | np.uint64(mine)
                if beginning:
                    heap[filled] = key
                    filled += row >= 0
                    if begun == size:
                        for at in range(filled // 2 - 1, -1, -1):
                            _sink(heap, filled, at, heap[at])
                elif row >= 0:
                    _sink(heap, filled, 0, key)
                else:
                    filled -= 1
                    _sink(heap, filled, 0, heap[filled])
        take = min(found, k[q])
        _ties_by_row(order[:found], take, rows, spare, counts)
        for rank in range(take):
            best = np.int64(order[rank] & low)
            out_rows[written + rank] = rows[best]
            out_scores[written + rank] = scores[best]
            out_triggers[written + rank] = triggers[best]
        written += take
        out_offsets[q + 1] = written
    return written


@njit(nogil=True, cache=True, inline="always")
def _falling(bits):  # type: ignore[no-untyped-def]
    """Return an integer that rises as a score falls, from the score's bits."""
    return np.uint64(bits if bits & np.uint32(0x80000000) else ~bits & np.uint32(0x7FFFFFFF))


@njit(nogil=True, cache=True)
def _counted(  # type: ignore[no-untyped-def]
    cursors, enough, cursor, moment, min_quality, max_age, base_rows, base_times, entries, moved, blocks, quality
):  # fmt: skip
    """Return how many valid items some lists have, or `enough` where there are more; `cursor` is overwritten."""
    count = 0
    for mine in range(cursors.shape[0]):
        cursor[:] = cursors[mine]
        row = np.int32(0)
        while row >= 0 and count < enough:
            row, _ = _next(
                cursor, moment, min_quality, max_age, base_rows, base_times, entries, moved, blocks, quality
            )
            count += row >= 0
    return count


def read_reference(
    keys: Int64Array,
    published: Int64Array,
    available: BoolArray,
    quality: Float32Array,
    wanted: Wanted,
    reading: Reading,
    now: Int64Array,
    k: Int32Array,
) -> CandidateBatch:
    """The plain twin of `PostingLists.read`, without any structure: every item as it stands now is looked at.

    Args:
        keys, published, available, quality: [items], as they stand now.
        wanted, reading, now, k: as in `PostingLists.read`.
    """
    offsets = np.zeros(k.size + 1, np.int64)
    answers: list[tuple[float, int, int]] = []
    for q in range(k.size):
        begin, end = int(wanted.offsets[q]), int(wanted.offsets[q + 1])
        end = min(end, begin + reading.lists) if reading.lists else end
        found: list[tuple[float, int, int]] = []
        each = min(reading.per_list, int(k[q])) if reading.per_list else int(k[q])
        for p in range(begin, end if k[q] > 0 else begin):
            key, place = int(wanted.keys[p]), p - begin
            if reading.thin and place == reading.lead and len(found) >= reading.thin:
                break
            same = [other for other in range(begin, end) if wanted.keys[other] == key]
            if (
                key < 0
                or p != max(same, key=lambda other: (wanted.weights[other], -other))
                or wanted.weights[p] <= 0
            ):
                continue
            ages = now[q] - published
            valid = (keys == key) & available & (ages >= 0)
            if reading.max_age:
                valid &= ages <= reading.max_age
            if reading.min_quality:
                valid &= quality >= reading.min_quality
            members = np.flatnonzero(valid)
            newest = members[np.lexsort((members, ages[members]))].tolist()
            for row in newest[: max(each, reading.thin) if place < reading.lead else each]:
                log = math.log2(wanted.weights[p])
                score = float(np.float32(log - int(ages[row]) / reading.half_life))
                found.append((score, row, int(wanted.triggers[p])))
        best = sorted(found, key=lambda each: (-each[0], each[1]))[: int(k[q])]
        answers += best
        offsets[q + 1] = offsets[q] + len(best)
    return CandidateBatch(
        np.array([row for _, row, _ in answers], np.int32),
        np.array([score for score, _, _ in answers], np.float32),
        np.array([trigger for _, _, trigger in answers], np.int32),
        offsets,
    )
