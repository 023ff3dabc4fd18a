"""Fetching ahead changes nothing, wherever it points."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.prefetch import prefetch


@njit
def _sum(array, ahead):
    total = array.dtype.type(0)
    for at in range(array.size):
        prefetch(array, at + ahead)
        total += array[at]
    return total


def test_fetching_ahead_changes_nothing_inside_the_array_or_far_outside_it():
    for dtype in (np.int32, np.int64, np.float32):
        array = np.arange(100, dtype=dtype)
        for ahead in (0, 1, 16, -1000, 1_000_000_000_000):
            assert _sum(array, ahead) == 4950
    sealed = np.arange(3)
    sealed.setflags(write=False)
    assert _sum(sealed, 1) == 3
    assert _sum(np.arange(0), 1) == 0
