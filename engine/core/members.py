"""Which candidates are in a query's list of rows: the kernel behind every filter that knows its rows."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.candidates import FanOut
from engine.core.hashing import spread
from engine.core.types import BoolArray, Int8Array, Int32Array, Int64Array


def not_members(candidates: FanOut, rows: Int32Array, offsets: Int64Array) -> BoolArray:
    """Return bool[m]: True where a candidate is not in its own query's list.

    Args:
        candidates: the fan-out.
        rows: int32[t], the lists end to end; offsets: int64[queries + 1].
    """
    keep = np.empty(candidates.rows.size, np.bool_)
    _not_members(candidates.rows, candidates.offsets, candidates.queries, rows, offsets, keep)
    return keep


@njit(nogil=True, cache=True)
def _not_members(candidates, segments, queries, rows, offsets, keep):  # type: ignore[no-untyped-def]
    longest = 0
    for q in range(queries):
        longest = max(longest, offsets[q + 1] - offsets[q])
    capacity = 2
    while capacity < 2 * longest:
        capacity *= 2
    mask = capacity - 1
    table = np.full(capacity, -1, np.int32)
    channels = (segments.size - 1) // queries
    for q in range(queries):
        if offsets[q] == offsets[q + 1]:
            for c in range(channels):
                keep[segments[c * queries + q] : segments[c * queries + q + 1]] = True
            continue
        for p in range(offsets[q], offsets[q + 1]):
            at = spread(rows[p]) & mask
            while table[at] != -1 and table[at] != rows[p]:
                at = (at + 1) & mask
            table[at] = rows[p]
        for c in range(channels):
            for p in range(segments[c * queries + q], segments[c * queries + q + 1]):
                at = spread(candidates[p]) & mask
                while table[at] != -1 and table[at] != candidates[p]:
                    at = (at + 1) & mask
                keep[p] = table[at] == -1
        if q + 1 < queries:
            table[:] = -1


def not_members_reference(candidates: FanOut, rows: Int32Array, offsets: Int64Array) -> BoolArray:
    """The plain NumPy twin of `not_members`."""
    owner = candidates.query_of_candidate()
    keep = np.ones(candidates.rows.size, np.bool_)
    for q in range(candidates.queries):
        mine = owner == q
        keep[mine] = ~np.isin(candidates.rows[mine], rows[offsets[q] : offsets[q + 1]])
    return keep


def drop(
    keep: BoolArray,
    removed_by: Int8Array,
    stays: BoolArray,
    candidates: FanOut,
    number: int,
    removed: Int32Array,
) -> None:
    """Remove the candidates where `stays` is False.

    Args:
        keep: bool[m], changed: False where removed.
        removed_by: int8[m], changed: `number` where removed now.
        stays: bool[m].
        candidates: the fan-out.
        number: of the filter that says so.
        removed: int32[filters, queries], changed: grows by how many candidates of each query went from kept to removed.
    """
    _drop(keep, removed_by, stays, candidates.offsets, number, removed)


@njit(nogil=True, cache=True)
def _drop(keep, removed_by, stays, offsets, number, removed):  # type: ignore[no-untyped-def]
    queries = removed.shape[1]
    for s in range(offsets.size - 1):
        for p in range(offsets[s], offsets[s + 1]):
            if keep[p] and not stays[p]:
                keep[p] = False
                removed_by[p] = number
                removed[number, s % queries] += 1
