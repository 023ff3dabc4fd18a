"""Hashes in kernels: of the open-addressing tables that they keep rows in, and of 64 bits where all must count."""

from __future__ import annotations

import numpy as np
from numba import njit

GOLDEN = 0x9E3779B97F4A7C15
"""What splitmix64 adds between two numbers."""

FIRST_MIX, SECOND_MIX = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The factors of its finisher."""


@njit(nogil=True, cache=True, inline="always")
def spread(row):  # type: ignore[no-untyped-def]
    """Spread rows over a table (Knuth's multiplicative hash, high bits folded down); mask the result to its size."""
    h = np.uint32(row) * np.uint32(2654435761)
    return np.int64(np.uint32(h ^ (h >> np.uint32(15))))


@njit(nogil=True, cache=True, inline="always")
def scrambled(z):  # type: ignore[no-untyped-def]
    """The finisher of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST_MIX)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND_MIX)
    return z ^ (z >> np.uint64(31))
