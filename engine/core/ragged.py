"""Kernels over ragged columns."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.types import Float32Array, RaggedRows


def first_and_others(lists: RaggedRows, others: float) -> Float32Array:
    """float32[m]: 1 for the first entry of each list, `others` for the rest: of cities, where the user is and was."""
    weights = np.full(lists.rows.size, others, np.float32)
    starts = lists.offsets[:-1]
    weights[starts[starts < lists.offsets[1:]]] = 1.0
    return weights


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
