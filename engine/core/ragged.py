"""Kernels over ragged columns."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.types import Float32Array, Int32Array, RaggedRows


def first_and_others(lists: RaggedRows, others: float) -> Float32Array:
    """float32[m]: 1 for the first entry of each list, `others` for the rest: of cities, where the user is and was."""
    weights = np.full(lists.rows.size, others, np.float32)
    starts = lists.offsets[:-1]
    weights[starts[starts < lists.offsets[1:]]] = 1.0
    return weights


def alone_first(first: Int32Array) -> RaggedRows:
    """Return lists of nothing but the row that `put_first` would put first."""
    return put_first(RaggedRows.empty(first.size), first)


def put_first(lists: RaggedRows, first: Int32Array) -> RaggedRows:
    """Return the lists, each with one row at its front, which stands nowhere else in it then.

    Args:
        lists: of n queries.
        first: int32[n]; a negative one leaves its list as it is.
    """
    rows, offsets = np.empty(lists.rows.size + first.size, np.int32), np.empty(first.size + 1, np.int64)
    _put_first(lists.rows, lists.offsets, first, rows, offsets)
    return RaggedRows(rows[: int(offsets[-1])], offsets)


@njit(nogil=True, cache=True)
def _put_first(rows, offsets, first, out_rows, out_offsets):  # type: ignore[no-untyped-def]
    to = out_offsets[0] = 0
    for q in range(first.size):
        if first[q] >= 0:
            out_rows[to] = first[q]
            to += 1
        for at in range(offsets[q], offsets[q + 1]):
            if first[q] < 0 or rows[at] != first[q]:
                out_rows[to] = rows[at]
                to += 1
        out_offsets[q + 1] = to


@njit(nogil=True, cache=True)
def take_lists(indptr, rows):  # type: ignore[no-untyped-def]
    """Return where the lists of `rows` stand, end to end: int64[n + 1] offsets and int64[m] positions; -1 is empty."""
    offsets = np.zeros(rows.size + 1, np.int64)
    for q in range(rows.size):
        length = indptr[rows[q] + 1] - indptr[rows[q]] if rows[q] >= 0 else 0
        offsets[q + 1] = offsets[q] + length
    positions = np.empty(offsets[-1], np.int64)
    for q in range(rows.size):
        if rows[q] >= 0:
            start = indptr[rows[q]]
            for i in range(offsets[q + 1] - offsets[q]):
                positions[offsets[q] + i] = start + i
    return offsets, positions
