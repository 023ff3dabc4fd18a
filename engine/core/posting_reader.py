"""Reading posting lists, a snapshot's and what changed since, merged by score from their fronts; compiled."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from engine.core.int_table import slot_of
from engine.core.posting_overlay import BLOCK, POINTERS, TIME
from engine.core.prefetch import prefetch
from engine.core.select import sort_digits
from engine.core.types import NO_ROW

_AT, _STOP, _ENTRY, _LEFT = 0, 1, 2, 3
"""Where a cursor in a list has its parts."""


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
def _ties_by_row(order, take, rows):  # type: ignore[no-untyped-def]
    """Put entries of one score in order of row; `order` holds places in `rows` in its low halves."""
    low = np.uint64(0xFFFFFFFF)
    start = 0
    while start < take:
        score = order[start] >> np.uint64(32)
        stop = start + 1
        while stop < order.size and order[stop] >> np.uint64(32) == score:
            stop += 1
        if stop - start > 1:
            tied = np.empty((2, stop - start), np.uint64)
            for i in range(start, stop):
                place = order[i] & low
                tied[0, i - start] = (np.uint64(rows[place]) << np.uint64(32)) | place
            line = sort_digits(tied, stop - start, 32)
            for i in range(start, stop):
                order[i] = tied[line, i - start]
        start = stop


@njit(nogil=True, cache=True, inline="always")
def _next(  # type: ignore[no-untyped-def]
    cursor, moment, min_quality, max_age, base_rows, base_times, entries, moved, blocks, quality
):
    """Return row and time of a list's next valid item, and move the cursor behind it; row -1 where there is none.

    Args:
        cursor: int64[4]: where the snapshot's list goes on and where it ends, the overlay's next entry (-1: none), and
            how many items may still be taken.
        moment, min_quality, max_age, base_rows, base_times, entries, moved, blocks, quality: of `read_lists`.
    """
    at, stop, entry = cursor[_AT], cursor[_STOP], cursor[_ENTRY]
    row, time = np.int32(NO_ROW), np.int64(0)
    while cursor[_LEFT] > 0:
        while (
            at < stop
            and blocks[base_rows[at] >> BLOCK]
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
def read_lists(  # type: ignore[no-untyped-def]
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
        _ties_by_row(order[:found], take, rows)
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
