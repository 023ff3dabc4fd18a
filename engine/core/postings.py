"""Posting lists: the items of an author, a cell, a city, newest first; a snapshot's, and over them what changed since.

A row stands in one list at most. The snapshot is CSR. What `update` says of a row goes into the overlay: a skip list
per list (Pugh 1990) in arrays that grow, so that items which come in any order of time still read newest first at
O(log n) an insertion. From then on the snapshot's own entry of that row no longer counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Self

import numpy as np
from numba import njit
from pydantic import Field

from engine.core.candidates import CandidateBatch
from engine.core.channel import SnapshotSink
from engine.core.int_table import IntTable, slot_of
from engine.core.items import ItemColumns
from engine.core.options import Online, Options
from engine.core.types import (
    NO_ROW,
    AnyArray,
    BoolArray,
    Float32Array,
    Int32Array,
    Int64Array,
    RaggedRows,
)

SECONDS_PER_DAY = 86_400
NO_KEY = -1
"""The key of a row that stands in no list."""

LEVELS = 8
"""Of a skip list; one node in 8 reaches the next level, so 8 levels serve 8^8 entries."""

TIME, LIST, POINTERS = 1, 2, 3
"""Where an entry of the overlay has its parts; the row stands first."""

_BATCH = 4096


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


@dataclass(frozen=True, slots=True)
class Reading:
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
        # which is all that reading needs to know and stays in the cache.
        self._latest = np.full(len(columns), NO_ROW, np.int32)
        self._moved = np.zeros((len(columns) + 7) // 8, np.uint8)
        # An entry is row, time, list (-1: none) and a pointer per level, side by side, as reading goes from one to the
        # next all over the memory. Its name, and a pointer to it, is where it begins.
        self._entries = np.empty(0, np.int64)
        self._used = 0
        self._numbers = IntTable()  # key -> number of its list in the overlay
        self._heads = np.empty(0, np.int32)  # where a list's first pointers begin in `_entries`
        gone = np.flatnonzero(~columns.available).astype(np.int32)
        if gone.size:
            self.update(gone, np.full(gone.size, NO_KEY, np.int64))

    @classmethod
    def load(cls, arrays: Mapping[str, AnyArray], columns: ItemColumns) -> Self:
        """Map the lists of a snapshot."""
        return cls(
            arrays["posts.keys"], arrays["posts.indptr"], arrays["posts.rows"], arrays["posts.times"], columns
        )

    @property
    def bytes_in_memory(self) -> int:
        """What the overlay takes."""
        mine = (self._latest, self._moved, self._entries, self._heads, *self._numbers.arrays)
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
        keys = np.where(self._columns.available[rows], keys, NO_KEY)
        times = self._columns.published_at[rows]
        for start in range(0, rows.size, _BATCH):
            part = slice(start, start + _BATCH)
            self._place(rows[part], self._numbers_of(keys[part]), times[part])

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
            rows, lists, times, self._latest, self._moved, self._entries, self._heads, self._used
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
        columns = self._columns
        room = sum(k.tolist())
        rows = np.empty(room, np.int32)
        scores = np.empty(room, np.float32)
        triggers = np.empty(room, np.int32)
        offsets = np.empty(k.size + 1, np.int64)
        total = _read(
            wanted.offsets, wanted.keys, wanted.weights, wanted.triggers, now, k, float(reading.half_life),
            reading.min_quality, reading.max_age, reading.lists, reading.per_list, reading.lead, reading.thin,
            *self._base, *self._numbers.arrays, self._heads, self._entries, self._moved, columns.quality, rows,
            scores, triggers, offsets,
        )  # fmt: skip
        return CandidateBatch(rows[:total], scores[:total], triggers[:total], offsets)


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
def _place(rows, lists, times, latest, moved, entries, heads, used):  # type: ignore[no-untyped-def]
    before = np.empty(LEVELS, np.int64)
    for i in range(rows.size):
        row = rows[i]
        entry = np.int64(latest[row])
        if entry < 0:
            entry = np.int64(used)
            latest[row] = entry
            moved[row >> 3] |= np.uint8(1 << (row & 7))
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


@njit(nogil=True, cache=True)
def _read(  # type: ignore[no-untyped-def]
    offsets, wanted, weights, list_triggers, now, k, half_life, min_quality, max_age, lists, per_list, lead, thin,
    base_keys, indptr, base_rows, base_times, table_keys, table_values, heads, entries, moved, quality,
    out_rows, out_scores, out_triggers, out_offsets,
):  # fmt: skip
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
    begins = np.empty(most, np.int64)
    ends = np.empty(most, np.int64)
    order = np.empty(room, np.uint64)
    spare = np.empty(room, np.uint64)
    counts = np.empty((4, 256), np.int32)
    rows = np.empty(room, np.int32)
    scores = np.empty(room, np.float32)
    triggers = np.empty(room, np.int32)
    score_bits = scores.view(np.uint32)
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
            # The lists lie anywhere: looking at all of them first, where nothing waits for what is found, lets the
            # processor fetch many at once.
            touched = np.uint64(0)
            for p in range(begin, end):
                begins[p - begin], ends[p - begin] = _range_of(wanted[p], base_keys, indptr)
            for p in range(begin, end if lead == 0 else min(end, begin + lead)):
                for at in range(begins[p - begin], min(ends[p - begin], begins[p - begin] + each)):
                    touched += np.uint64(base_rows[at]) + np.uint64(base_times[at] & 1)
            spare[0] = touched
            for p in range(begin, end):
                key = wanted[p]
                if thin and p - begin == lead and found >= thin:
                    break
                if key < 0 or weights[p] <= 0:
                    continue
                if end - begin > 1 and places[slot_of(key, table, places)] != p - begin:
                    continue
                log = math.log2(np.float64(weights[p]))  # of a float32 it would be a float32
                limit = max(each, thin) if p - begin < lead else each
                at = begins[p - begin]
                stop = ends[p - begin]
                if at < stop and base_times[at] > moment:
                    low = at
                    high = stop
                    while low < high:
                        middle = (low + high) // 2
                        if base_times[middle] > moment:
                            low = middle + 1
                        else:
                            high = middle
                    at = low
                entry = np.int64(-1)
                number = table_values[slot_of(key, table_keys, table_values)]
                if number >= 0:
                    entry = entries[heads[number]]
                taken = 0
                while taken < limit:
                    while at < stop and (moved[base_rows[at] >> 3] >> (base_rows[at] & 7)) & 1:
                        at += 1
                    if entry >= 0 and (
                        at >= stop
                        or entries[entry + TIME] > base_times[at]
                        or (entries[entry + TIME] == base_times[at] and entries[entry] < base_rows[at])
                    ):
                        row = np.int32(entries[entry])
                        time = entries[entry + TIME]
                        entry = entries[entry + POINTERS]
                    elif at < stop:
                        row = base_rows[at]
                        time = base_times[at]
                        at += 1
                    else:
                        break
                    if max_age > 0 and moment - time > max_age:
                        break  # and so is all that follows
                    if time > moment:
                        continue
                    if min_quality > 0 and not quality[row] >= min_quality:
                        continue
                    rows[found] = row
                    scores[found] = np.float32(log - (moment - time) / half_life)
                    triggers[found] = list_triggers[p]
                    found += 1
                    taken += 1
        for slot in range(found):
            bits = score_bits[slot]  # as an integer that rises from the best score to the worst
            falling = bits if bits & np.uint32(0x80000000) else ~bits & np.uint32(0x7FFFFFFF)
            order[slot] = (np.uint64(falling) << np.uint64(32)) | np.uint64(slot)
        _sort(order[:found], spare[:found], counts)
        take = min(found, k[q])
        _ties_by_row(order[:found], take, rows, spare, counts)
        for rank in range(take):
            best = np.int64(order[rank] & np.uint64(0xFFFFFFFF))
            out_rows[written + rank] = rows[best]
            out_scores[written + rank] = scores[best]
            out_triggers[written + rank] = triggers[best]
        written += take
        out_offsets[q + 1] = written
    return written


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
