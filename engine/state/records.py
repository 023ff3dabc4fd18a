"""Kernels over the records of a batch's users: from values as they lie in the store to columns."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.exposure import ExposureBits
from engine.core.types import BoolArray, Int64Array
from engine.state.layout import AUTHOR, GONE, ITEM, RECORD, STATE_SUFFIXES
from engine.state.replies import Values

_KINDS = len(STATE_SUFFIXES)
_BYTES = RECORD.itemsize
_RUN = 16


def gathered(
    values: Values, asked: BoolArray, width: int
) -> tuple[Int64Array, Int64Array, ExposureBits, int]:
    """Put the records of all users end to end, kind by kind, and their exposure bits.

    Args:
        values: `width` of each user who was asked for: those of STATE_SUFFIXES, then exposure bits.
        asked: bool[n], who of the batch that is.
        width: values of each.

    Returns:
        offsets: int64[5 n + 1]; the records of kind k (of STATE_SUFFIXES) of user u begin at offsets[k n + u].
        records: int64[3 m], three words each, without the room behind the last one in use.
        The bits, and how many values of records were left out, as they do not consist of whole ones.
    """
    n = asked.size
    records = np.empty(values.content.size // 8, np.int64)
    offsets, owned = np.empty(_KINDS * n + 1, np.int64), np.empty(n + 1, np.int64)
    bits, ends = np.empty(values.content.size, np.uint8), np.empty(len(values) + 1, np.int64)
    damaged = _gather(
        values.content, values.starts, values.sizes, asked, width,
        records.view(np.uint8), records.view(np.uint32), offsets, bits, ends, owned,
    )  # fmt: skip
    words = records[: 3 * int(offsets[-1])]
    return offsets, words, ExposureBits(bits, ends[: int(owned[-1]) + 1], owned), damaged


@njit(nogil=True, cache=True)
def _gather(content, starts, sizes, asked, width, records, kinds, offsets, bits, ends, owned):  # type: ignore[no-untyped-def]
    """Fill the arrays of `gathered`; return how many values are damaged.

    Args:
        content, starts, sizes: of the values.
        asked, width: of `gathered`.
        records, kinds: uint8, uint32: one memory, for the records.
        offsets: int64[5 n + 1], of the records.
        bits, ends, owned: uint8[...], int64[values + 1], int64[n + 1]: as `ExposureBits` takes them.
    """
    n = asked.size
    to = damaged = 0
    for kind in range(_KINDS):
        value = kind
        for u in range(n):
            first = offsets[kind * n + u] = to
            if not asked[u]:
                continue
            start, size = starts[value], sizes[value]
            value += width
            if size > 0 and size % _BYTES:
                damaged += 1
            elif size > 0:
                _copy(content[start : start + size], records[_BYTES * to : _BYTES * to + size])
                to += size // _BYTES
                while to > first and kinds[6 * to - 4] == 0:
                    to -= 1
    offsets[_KINDS * n] = to
    value = found = end = 0
    for u in range(n):
        owned[u] = found
        if not asked[u]:
            continue
        for bit_value in range(value + _KINDS, value + width):
            start, size = starts[bit_value], sizes[bit_value]
            if size > 0:
                _copy(content[start : start + size], bits[end : end + size])
                ends[found] = end
                end += size
                found += 1
        value += width
    owned[n], ends[found] = found, end
    return damaged


@njit(nogil=True, cache=True, inline="always")
def _copy(source, target):  # type: ignore[no-untyped-def]
    # Ten times as fast as numba's own assignment of slices.
    for i in range(source.size):
        target[i] = source[i]


@njit(nogil=True, cache=True)
def newest_first(times, first, n, order, spare):  # type: ignore[no-untyped-def]
    """Put the records [first, first + n) in order: the latest time first, of one time the later record first.

    Args:
        times: int64[...], records of three words, the last of which is the time.
        first, n: which records.
        order: int64[>= n], the record numbers, out.
        spare: int64[>= n], overwritten.
    """
    rising, falling = True, True
    for record in range(first + 1, first + n):
        rising &= times[3 * record + 2] >= times[3 * record - 1]
        falling &= times[3 * record + 2] < times[3 * record - 1]
    # Most were appended as things happened, and so need to be turned round; some as a list that began with the newest.
    for i in range(n):
        order[i] = first + i if falling else first + n - 1 - i
    if rising or falling:
        return
    for start in range(0, n, _RUN):
        for i in range(start + 1, min(start + _RUN, n)):
            record = order[i]
            moment = times[3 * record + 2]
            j = i
            while j > start and times[3 * order[j - 1] + 2] < moment:
                order[j] = order[j - 1]
                j -= 1
            order[j] = record
    width = _RUN
    while width < n:
        for start in range(0, n - width, 2 * width):
            middle, end = start + width, min(start + 2 * width, n)
            if times[3 * order[middle - 1] + 2] >= times[3 * order[middle] + 2]:
                continue
            for i in range(start, middle):
                spare[i] = order[i]
            left, right, to = start, middle, start
            while left < middle:
                if right < end and times[3 * order[right] + 2] > times[3 * spare[left] + 2]:
                    order[to] = order[right]
                    right += 1
                else:
                    order[to] = spare[left]
                    left += 1
                to += 1
        width *= 2


@njit(nogil=True, cache=True)
def merge_histories(  # type: ignore[no-untyped-def]
    offsets, items, kinds, times, point_kinds, points, users, indptr, old_rows, old_weights, old_times,
    recent, keep, rows, weights, timestamps, ends,
):  # fmt: skip
    """Merge the recent actions of users into their histories.

    Args:
        offsets: int64[n + 1]; user u has the records [offsets[u], offsets[u + 1]).
        items: int32[...], the row of each record's item; -1 where it is not known.
        kinds: uint32[...], the records as 6 words each; word 2 is the kind.
        times: int64[...], the records as 3 words each; word 2 is the time.
        point_kinds, points: uint32[p], float32[p]: what a kind is worth.
        users: int32[n], whose histories; -1 for none.
        indptr, old_rows, old_weights, old_times: the histories of all users, newest first, an item once.
        recent: records per user that count, the newest.
        keep: the longest history answered.
        rows, weights, timestamps: int32, float32, int64[n keep], out.
        ends: int64[n + 1], out: where each user's part is.
    """
    most = 1
    for u in range(offsets.size - 1):
        most = max(most, offsets[u + 1] - offsets[u])
    size = 16
    while size < 2 * most:
        size *= 2
    order, spare = np.empty(most, np.int64), np.empty(most, np.int64)
    # Entries of all users stand end to end: what the table holds below a user's first one is another's.
    table, room = np.full(size, -1, np.int32), offsets[-1] - offsets[0]
    live_rows, live_weights, live_times = (
        np.empty(room, np.int32),
        np.empty(room, np.float32),
        np.empty(room, np.int64),
    )
    live = 0
    only = np.empty(keep, np.int64)
    to = ends[0] = 0
    for u in range(offsets.size - 1):
        n = offsets[u + 1] - offsets[u]
        newest_first(times, offsets[u], n, order, spare)
        first = live
        kind, worth = (
            np.uint32(0),
            np.float32(0),
        )  # people do the same again: the last kind's points are at hand
        for i in range(min(n, recent)):
            record = order[i]
            row = items[record]
            if kinds[6 * record + 2] != kind:
                kind, worth = kinds[6 * record + 2], np.float32(0)
                for p in range(point_kinds.size):
                    if point_kinds[p] == kind:
                        worth = points[p]
            if row < 0 or worth <= 0:
                continue
            at = _place(row, first, table, live_rows)
            if table[at] >= first:
                live_weights[table[at]] += worth
            else:
                table[at] = live
                live_rows[live], live_weights[live], live_times[live] = row, worth, times[3 * record + 2]
                live += 1
        # What both have is answered once, as a live entry; `fresh` are the entries that only the history has.
        begin = indptr[users[u]] if users[u] >= 0 else 0
        end = indptr[users[u] + 1] if users[u] >= 0 else 0
        fresh = 0
        in_order = True
        for j in range(begin, end):
            e = table[_place(old_rows[j], first, table, live_rows)]
            if e < first:
                if fresh < keep:
                    only[fresh] = j
                    fresh += 1
                continue
            live_weights[e] = max(live_weights[e], old_weights[j])
            if old_times[j] > live_times[e]:
                live_times[e] = old_times[j]
                in_order = False
        if in_order:
            for i in range(live - first):
                spare[i] = first + i
        else:
            _entries_newest_first(live_times, first, live, spare)
        i = j = 0
        for _ in range(min(keep, live - first + fresh)):
            if i < live - first and (j == fresh or live_times[spare[i]] >= old_times[only[j]]):
                e = spare[i]
                rows[to], weights[to], timestamps[to] = live_rows[e], live_weights[e], live_times[e]
                i += 1
            else:
                rows[to], weights[to], timestamps[to] = (
                    old_rows[only[j]],
                    old_weights[only[j]],
                    old_times[only[j]],
                )
                j += 1
            to += 1
        ends[u + 1] = to


@njit(nogil=True, cache=True, inline="always")
def _place(row, first, table, live_rows):  # type: ignore[no-untyped-def]
    """Return where the entry of a row, `first` or later, stands in the table, or the place where it would."""
    mask = table.size - 1
    at = (np.uint32(row) * np.uint32(0x9E3779B1) >> np.uint32(7)) & np.uint32(mask)
    while table[at] >= first and live_rows[table[at]] != row:
        at = np.uint32(at + 1) & np.uint32(mask)
    return at


@njit(nogil=True, cache=True)
def _entries_newest_first(times, first, end, order):  # type: ignore[no-untyped-def]
    """Sort entries by time, stable: only a history newer than the actions puts some out of their order."""
    for entry in range(first, end):
        j = entry - first
        while j > 0 and times[order[j - 1]] < times[entry]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = entry


@njit(nogil=True, cache=True)
def sort_out(  # type: ignore[no-untyped-def]
    offsets, n, items, authors, tags, places, kinds, values, times, current, most_dislikes, most_follows, most_cities,
    rows, scores, stamps, recalls, bounds,
):  # fmt: skip
    """Sort out leftovers, dislikes, follows and cities.

    Args:
        offsets: int64[5 n + 1]; the records of key k (of STATE_SUFFIXES) of user u begin at offsets[k n + u].
        items, authors, tags, places: int32, what the keys of the records stand for; they begin with the records of
            key 0, 2, 2 and 4.
        kinds, values, times: the records as uint32, float32 and int64.
        current: int32[n], the code of the city where the user is; -1 where not known.
        most_dislikes, most_follows, most_cities: records that count, the newest.
        rows: int32[...], out: leftovers, disliked items, authors and tags, follows, cities, one after another.
        scores, stamps, recalls: of the leftovers, out.
        bounds: int64[6, n + 1], out: offsets of the users in each of the six.
    """
    dislikes, cities = offsets[2 * n], offsets[4 * n]
    most = 1
    for u in range(2 * n, 5 * n):
        most = max(most, offsets[u + 1] - offsets[u])
    order, spare = np.empty(most, np.int64), np.empty(most, np.int64)
    to = start = 0
    bounds[0, 0] = 0
    for u in range(n):
        for record in range(offsets[n + u], offsets[n + u + 1]):
            kind = kinds[6 * record + 2]
            if kind != 0 and kind != GONE and items[record] >= 0:
                rows[to], scores[to], stamps[to] = (
                    items[record],
                    values[6 * record + 3],
                    times[3 * record + 2],
                )
                recalls[to] = np.int32(min(kind - 1, 0x7FFFFFFF))
                to += 1
        bounds[0, u + 1] = to - start
    for part in range(1, 4):
        bounds[part, 0], start = 0, to
        for u in range(n):
            first = offsets[2 * n + u]
            used = offsets[2 * n + u + 1] - first
            newest_first(times, first, used, order, spare)
            for i in range(min(used, most_dislikes)):
                record = order[i]
                kind = kinds[6 * record + 2]
                if kind != part or values[6 * record + 3] <= 0:
                    continue
                if kind == ITEM:
                    row = items[record]
                elif kind == AUTHOR:
                    row = authors[record - dislikes]
                else:
                    row = tags[record - dislikes]
                if row >= 0:
                    rows[to] = row
                    to += 1
            bounds[part, u + 1] = to - start
    bounds[4, 0], start = 0, to
    for u in range(n):
        first = offsets[3 * n + u]
        used = offsets[3 * n + u + 1] - first
        newest_first(times, first, used, order, spare)
        for i in range(min(used, most_follows)):
            row = authors[order[i] - dislikes]
            if values[6 * order[i] + 3] > 0 and row >= 0:
                rows[to] = row
                to += 1
        bounds[4, u + 1] = to - start
    bounds[5, 0], start = 0, to
    for u in range(n):
        if current[u] >= 0:
            rows[to] = current[u]
            to += 1
        first = offsets[4 * n + u]
        used = offsets[4 * n + u + 1] - first
        newest_first(times, first, used, order, spare)
        for i in range(min(used, most_cities)):
            row = places[order[i] - cities]
            if row >= 0 and row != current[u]:
                rows[to] = row
                to += 1
        bounds[5, u + 1] = to - start
