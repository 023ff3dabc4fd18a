"""Kernels over the records of a batch's users: from values as they lie in the store to columns."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.int_table import slot_of
from engine.data.live import find_keys
from engine.state.layout import GONE, ITEM, RECORD, STATE_SUFFIXES, TOPIC

_KINDS = len(STATE_SUFFIXES)
_BYTES = RECORD.itemsize
_RUN = 16


@njit(nogil=True, cache=True)
def read_histories(  # type: ignore[no-untyped-def]
    content, starts, sizes, asked, width, values, table, key_keys, key_rows, new_keys, new_rows,
    point_kinds, points, users, indptr, old_rows, old_weights, old_times, recent, keep,
    rows, weights, timestamps, ends, spans, owned,
):  # fmt: skip
    """Read the recent actions of a batch's users, merge them into their histories, and find their exposure bits.

    Args:
        content, starts, sizes: of `Values`: `width` of each user who was asked for, those of STATE_SUFFIXES, then
            exposure bits.
        asked: bool[n], who of the batch that is.
        width: values of each.
        values, table, key_keys, key_rows, new_keys, new_rows: `LiveIds.key_tables` of the items.
        point_kinds, points, users, indptr, old_rows, old_weights, old_times, recent, keep, rows, weights, timestamps:
            as `merge_histories` takes them.
        ends: int64[n + 1], out: as there; the last one is -1, and no history is answered, where there is no action.
        spans: int64[..., 2], out: first byte and bytes of the exposure bits.
        owned: int64[n + 1], out: whose they are, as `ExposureBits` takes them.

    Returns:
        How many values of records are damaged, as they do not consist of whole ones; of those `collect` reads nothing.
    """
    n = asked.size
    value = found = damaged = 0
    for u in range(n):
        owned[u] = found
        if asked[u]:
            for at in range(value, value + _KINDS):
                damaged += sizes[at] > 0 and sizes[at] % _BYTES != 0
            for at in range(value + _KINDS, value + width):
                if sizes[at] > 0:
                    spans[found, 0], spans[found, 1] = starts[at], sizes[at]
                    found += 1
            value += width
    owned[n] = found
    offsets, words = collect(content, starts, sizes, asked, width, 0, 1)
    m = offsets[n]
    if m == 0:
        ends[n] = -1
        return damaged
    keys, items = np.empty(m, np.int64), np.empty(m, np.int32)
    for record in range(m):
        keys[record] = words[3 * record]
    find_keys(keys, values, table, key_keys, key_rows, new_keys, new_rows, items)
    merge_histories(
        offsets, items, words.view(np.uint32), words, point_kinds, points,
        users, indptr, old_rows, old_weights, old_times, recent, keep, rows, weights, timestamps, ends,
    )  # fmt: skip
    return damaged


@njit(nogil=True, cache=True)
def collect(content, starts, sizes, asked, width, first, last):  # type: ignore[no-untyped-def]
    """Put the records of some kinds end to end, kind by kind.

    Args:
        content, starts, sizes, asked, width: of `read_histories`.
        first, last: kinds [first, last), as STATE_SUFFIXES counts them.

    Returns:
        offsets: int64[(last - first) n + 1]; the records of kind `first` + k of user u begin at offsets[k n + u].
        words: int64[...], three words each, without the room behind the last one in use; more than those in use.
    """
    n = asked.size
    room = 0
    for value in range(0, sizes.size, width):
        for at in range(value + first, value + last):
            room += max(sizes[at], 0)
    words = np.empty(room // 8 + 3, np.int64)
    records, kinds = words.view(np.uint8), words.view(np.uint32)
    offsets = np.empty((last - first) * n + 1, np.int64)
    to = 0
    for kind in range(first, last):
        value = kind
        for u in range(n):
            begin = offsets[(kind - first) * n + u] = to
            if not asked[u]:
                continue
            start, size = starts[value], sizes[value]
            value += width
            if size > 0 and size % _BYTES == 0:
                _copy(content[start : start + size], records[_BYTES * to : _BYTES * to + size])
                to += size // _BYTES
                while to > begin and kinds[6 * to - 4] == 0:
                    to -= 1
    offsets[(last - first) * n] = to
    return offsets, words


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
    size = 16  # sparse, so that most searches end at the first place
    while size < 8 * most:
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
            e = table[at]
            if e >= first:
                live_weights[e] += worth
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
        mine = live - first
        if in_order and mine and (fresh == 0 or live_times[live - 1] >= old_times[only[0]]):
            # As a rule all that was done since the release was built is newer than all that it knows.
            head = min(keep, mine)
            for i in range(head):
                rows[to + i] = live_rows[first + i]
                weights[to + i] = live_weights[first + i]
                timestamps[to + i] = live_times[first + i]
            to += head
            for i in range(min(fresh, keep - head)):
                j = only[i]
                rows[to], weights[to], timestamps[to] = old_rows[j], old_weights[j], old_times[j]
                to += 1
            ends[u + 1] = to
            continue
        if in_order:
            for i in range(mine):
                spare[i] = first + i
        else:
            _entries_newest_first(live_times, first, live, spare)
        i = j = 0
        for _ in range(min(keep, mine + fresh)):
            if i < mine and (j == fresh or live_times[spare[i]] >= old_times[only[j]]):
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
    content, starts, sizes, asked, width,
    values, table, key_keys, key_rows, new_keys, new_rows,
    author_values, author_table, author_keys, author_rows, new_author_keys, new_author_rows,
    tag_keys, tag_codes, city_keys, city_codes, current, most_dislikes, most_follows, most_cities,
    rows, scores, stamps, recalls, bounds,
):  # fmt: skip
    """Read and sort out leftovers, dislikes, follows and cities.

    Args:
        content, starts, sizes, asked, width: of `read_histories`.
        values, table, key_keys, key_rows, new_keys, new_rows: `LiveIds.key_tables` of the items.
        author_values, author_table, author_keys, author_rows, new_author_keys, new_author_rows: of the authors.
        tag_keys, tag_codes, city_keys, city_codes: `IntTable.arrays` of tags and cities.
        current: int32[n], the code of the city where the user is; -1 where not known.
        most_dislikes, most_follows, most_cities: records that count, the newest.
        rows: int32[...], out: leftovers, disliked items, authors and tags, follows, cities, one after another.
        scores, stamps, recalls: of the leftovers, out.
        bounds: int64[6, n + 1], out: offsets of the users in each of the six.
    """
    n = asked.size
    offsets, times = collect(content, starts, sizes, asked, width, 1, _KINDS)
    kinds, floats = times.view(np.uint32), times.view(np.float32)
    dislikes, follows, cities, m = offsets[n], offsets[2 * n], offsets[3 * n], offsets[4 * n]
    keys, found = np.empty(m, np.int64), np.empty(m, np.int32)
    for record in range(m):
        keys[record] = times[3 * record]
    find_keys(
        keys[:dislikes], values, table, key_keys, key_rows, new_keys, new_rows, found[:dislikes]
    )  # fmt: skip
    find_keys(
        keys[follows:cities], author_values, author_table, author_keys, author_rows, new_author_keys, new_author_rows,
        found[follows:cities],
    )  # fmt: skip
    for record in range(cities, m):
        found[record] = city_codes[slot_of(keys[record], city_keys, city_codes)]
    which, wanted = np.empty(follows - dislikes, np.int64), np.empty(follows - dislikes, np.int64)
    answers = np.empty(follows - dislikes, np.int32)
    for part in range(ITEM, TOPIC):
        count = 0
        for record in range(dislikes, follows):
            which[count], wanted[count] = record, keys[record]
            count += kinds[6 * record + 2] == part
        if part == ITEM:
            find_keys(
                wanted[:count], values, table, key_keys, key_rows, new_keys, new_rows, answers[:count]
            )  # fmt: skip
        else:
            find_keys(
                wanted[:count], author_values, author_table, author_keys, author_rows, new_author_keys,
                new_author_rows, answers[:count],
            )  # fmt: skip
        for i in range(count):
            found[which[i]] = answers[i]
    for record in range(dislikes, follows):
        if kinds[6 * record + 2] == TOPIC:
            found[record] = tag_codes[slot_of(keys[record], tag_keys, tag_codes)]
    most = 1
    for u in range(n, 4 * n):
        most = max(most, offsets[u + 1] - offsets[u])
    order, spare = np.empty(most, np.int64), np.empty(most, np.int64)
    to = start = 0
    bounds[0, 0] = 0
    for u in range(n):
        for record in range(offsets[u], offsets[u + 1]):
            kind = kinds[6 * record + 2]
            if kind != 0 and kind != GONE and found[record] >= 0:
                rows[to], scores[to], stamps[to] = (
                    found[record],
                    floats[6 * record + 3],
                    times[3 * record + 2],
                )
                recalls[to] = np.int32(min(kind - 1, 0x7FFFFFFF))
                to += 1
        bounds[0, u + 1] = to - start
    for part in range(1, 4):
        bounds[part, 0], start = 0, to
        for u in range(n):
            first = offsets[n + u]
            used = offsets[n + u + 1] - first
            newest_first(times, first, used, order, spare)
            for i in range(min(used, most_dislikes)):
                record = order[i]
                kind = kinds[6 * record + 2]
                if kind != part or floats[6 * record + 3] <= 0:
                    continue
                if found[record] >= 0:
                    rows[to] = found[record]
                    to += 1
            bounds[part, u + 1] = to - start
    bounds[4, 0], start = 0, to
    for u in range(n):
        first = offsets[2 * n + u]
        used = offsets[2 * n + u + 1] - first
        newest_first(times, first, used, order, spare)
        for i in range(min(used, most_follows)):
            row = found[order[i]]
            if floats[6 * order[i] + 3] > 0 and row >= 0:
                rows[to] = row
                to += 1
        bounds[4, u + 1] = to - start
    bounds[5, 0], start = 0, to
    for u in range(n):
        if current[u] >= 0:
            rows[to] = current[u]
            to += 1
        first = offsets[3 * n + u]
        used = offsets[3 * n + u + 1] - first
        newest_first(times, first, used, order, spare)
        for i in range(min(used, most_cities)):
            row = found[order[i]]
            if row >= 0 and row != current[u]:
                rows[to] = row
                to += 1
        bounds[5, u + 1] = to - start
