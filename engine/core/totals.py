"""What a user's history adds up to: the authors, or the tags, of what they liked, heaviest first."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.hashing import spread
from engine.core.query import History
from engine.core.select import row_of, select_top, sort_key
from engine.core.types import Float32Array, Int32Array, Int64Array, RaggedRows


def heaviest_codes(
    history: History,
    now: Int64Array,
    starts: Int64Array | None,
    counts: Int32Array | None,
    codes: Int32Array,
    most: int,
    half_life: float = 0.0,
    max_age: float = 0.0,
    known: RaggedRows | None = None,
    known_weight: float = 0.0,
) -> tuple[RaggedRows, Float32Array]:
    """Return the codes that weigh most in each query's history.

    weight(c) = sum over the items of the history that have code c of interest x 2^(-age / half_life); ages are not
    below 0, and that of an event without a time is 0.

    Args:
        history: of the queries.
        now: int64[n], seconds since the epoch.
        starts, counts: int64[items], int32[items]; item r has codes[starts[r] : starts[r] + counts[r]]. None for both:
            item r has the one code codes[r].
        codes: int32; -1 for none.
        most: codes kept per query.
        half_life: seconds; 0 for no decay.
        max_age: seconds; what is older does not count; 0 for no limit.
        known: codes that weigh `known_weight` besides, such as the authors that the user follows; None for none.
        known_weight: above 0 where `known` is given.

    Returns:
        The codes, heaviest first, of equals the lower; and float32[m], their weights.
    """
    if known is None:
        known = RaggedRows.empty(now.size)
    if starts is None or counts is None:
        starts, counts = np.empty(0, np.int64), np.empty(0, np.int32)
    if counts.size:
        total = int(counts[history.rows].sum()) + known.rows.size
    else:
        total = history.rows.size + known.rows.size
    if not total:
        return RaggedRows.empty(now.size), np.empty(0, np.float32)
    room = min(total, most * now.size)
    found = np.empty(room, np.int32)
    weights = np.empty(room, np.float32)
    offsets = np.empty(now.size + 1, np.int64)
    size = _heaviest(
        history.offsets, history.rows, history.weights, history.timestamps, now, starts, counts, codes, most,
        half_life, max_age, known.offsets, known.rows, np.float32(known_weight), total, found, weights, offsets,
    )  # fmt: skip
    return RaggedRows(found[:size], offsets), weights[:size]


@njit(nogil=True, cache=True, inline="always")
def _add(code, weight, table, slots, found, sums):  # type: ignore[no-untyped-def]
    """Add to a code's sum; returns how many codes there are now."""
    mask = table.size - 1
    at = spread(code) & mask
    while table[at] != -1 and found[table[at]] != code:
        at = (at + 1) & mask
    if table[at] == -1:
        table[at] = slots
        found[slots] = code
        sums[slots] = weight
        return slots + 1
    sums[table[at]] += weight
    return slots


@njit(nogil=True, cache=True)
def _heaviest(  # type: ignore[no-untyped-def]
    offsets, rows, interest, times, now, starts, counts, codes, most, half_life, max_age, known_offsets, known,
    known_weight, total, out_codes, out_weights, out_offsets,
):  # fmt: skip
    capacity = 2
    while capacity < 2 * total:
        capacity *= 2
    table = np.full(capacity, -1, np.int32)
    found = np.empty(total + 1, np.int32)
    sums = np.empty(total + 1, np.float32)
    keys = np.empty(total + 1, np.uint64)
    sum_bits = sums.view(np.uint32)
    out_offsets[0] = 0
    written = 0
    for q in range(now.size):
        slots = 0
        for p in range(known_offsets[q], known_offsets[q + 1]):
            if known[p] >= 0:
                slots = _add(known[p], known_weight, table, slots, found, sums)
        for p in range(offsets[q], offsets[q + 1]):
            age = max(now[q] - times[p], 0) if times[p] > 0 else 0
            if max_age > 0 and age > max_age:
                continue
            weight = interest[p]
            if half_life > 0:
                weight = np.float32(weight * 2.0 ** (-age / half_life))
            row = rows[p]
            if counts.size:
                for c in range(starts[row], starts[row] + counts[row]):
                    if codes[c] >= 0:
                        slots = _add(codes[c], weight, table, slots, found, sums)
            elif codes[row] >= 0:
                slots = _add(codes[row], weight, table, slots, found, sums)
        for slot in range(slots):
            keys[slot] = sort_key(sum_bits[slot], found[slot])
        take = min(slots, most)
        if take < slots:
            select_top(keys, slots, take)
        best = np.sort(keys[:take])
        for rank in range(take):
            code = row_of(best[take - 1 - rank])
            at = spread(code) & (capacity - 1)
            while found[table[at]] != code:
                at = (at + 1) & (capacity - 1)
            out_codes[written] = code
            out_weights[written] = sums[table[at]]
            written += 1
        if q + 1 < now.size:
            table[:] = -1
        out_offsets[q + 1] = written
    return written


def heaviest_codes_reference(
    history: History,
    now: Int64Array,
    starts: Int64Array | None,
    counts: Int32Array | None,
    codes: Int32Array,
    most: int,
    half_life: float = 0.0,
    max_age: float = 0.0,
    known: RaggedRows | None = None,
    known_weight: float = 0.0,
) -> list[list[tuple[int, float]]]:
    """The plain twin of `heaviest_codes`: (code, weight) pairs per query."""
    lists: list[list[tuple[int, float]]] = []
    for q in range(now.size):
        sums: dict[int, np.float32] = {}
        if known is not None:
            for code in known.rows[known.offsets[q] : known.offsets[q + 1]].tolist():
                sums[code] = np.float32(sums.get(code, np.float32(0)) + np.float32(known_weight))
        for p in range(int(history.offsets[q]), int(history.offsets[q + 1])):
            row, time = int(history.rows[p]), int(history.timestamps[p])
            age = max(int(now[q]) - time, 0) if time > 0 else 0
            if max_age and age > max_age:
                continue
            weight = history.weights[p]
            if half_life:
                weight = np.float32(weight * 2.0 ** (-age / half_life))
            if starts is None or counts is None:
                mine = codes[row : row + 1].tolist()
            else:
                mine = codes[int(starts[row]) : int(starts[row]) + int(counts[row])].tolist()
            for code in mine:
                if code >= 0:
                    sums[code] = np.float32(sums.get(code, np.float32(0)) + weight)
        best = sorted(sums.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
        lists.append([(code, float(weight)) for code, weight in best])
    return lists
