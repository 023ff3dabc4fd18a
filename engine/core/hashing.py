"""The hash of the open-addressing tables that kernels keep rows in."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, inline="always")
def spread(row):  # type: ignore[no-untyped-def]
    """Spread rows over a table (Knuth's multiplicative hash, high bits folded down); mask the result to its size."""
    h = np.uint32(row) * np.uint32(2654435761)
    return np.int64(np.uint32(h ^ (h >> np.uint32(15))))
