"""Kernels over ragged columns."""

from __future__ import annotations

import numpy as np
from numba import njit


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
