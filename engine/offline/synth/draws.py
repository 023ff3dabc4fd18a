"""Drawing at random inside kernels: a stream of numbers per seed, and choices by cumulative weight."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.hashing import GOLDEN, scrambled
from engine.core.types import AnyArray, Float64Array, Int64Array


@njit(nogil=True, cache=True, inline="always")
def mixed(one, other):  # type: ignore[no-untyped-def]
    """uint64 from two: the seed of a stream of its own, or a draw that is the same whenever it is made again."""
    mine = scrambled(np.uint64(one) + np.uint64(GOLDEN))
    return scrambled(mine ^ (np.uint64(other) * np.uint64(0xD1B54A32D192ED03)))


@njit(nogil=True, cache=True, inline="always")
def unit(word):  # type: ignore[no-untyped-def]
    """float64 in [0, 1) of the upper 53 bits."""
    return np.float64(word >> np.uint64(11)) / 9007199254740992.0


@njit(nogil=True, cache=True, inline="always")
def draw(state):  # type: ignore[no-untyped-def]
    """The next float64 in [0, 1) of a splitmix64 stream; `state` is uint64[1]."""
    state[0] += np.uint64(GOLDEN)
    return unit(scrambled(state[0]))


@njit(nogil=True, cache=True)
def pick(cumulative, begin, end, share):  # type: ignore[no-untyped-def]
    """The entry of [begin, end) where a share of their weight falls; entry i has cumulative[i] to cumulative[i + 1]."""
    low, size = np.uint64(begin), np.uint64(end - begin)
    target = cumulative[begin] + share * (cumulative[end] - cumulative[begin])
    one = np.uint64(1)
    while size > one:
        # Without a branch: which half it is cannot be foretold.
        half = size >> one
        low += half * np.uint64(cumulative[low + half] <= target)
        size -= half
    return np.int64(low)


def pick_many(
    cumulative: Float64Array, begin: AnyArray | int, end: AnyArray | int, share: Float64Array
) -> Int64Array:
    """Return `pick` of many: int64[n]; the twin of the kernel in NumPy."""
    target = cumulative[begin] + share * (cumulative[end] - cumulative[begin])
    found: Int64Array = np.clip(
        np.searchsorted(cumulative, target, side="right") - 1, begin, np.subtract(end, 1)
    )
    return found


def cumulated(weights: AnyArray) -> Float64Array:
    """float64[n + 1]: the sum of the weights before each entry, and of all."""
    sums = np.zeros(weights.size + 1)
    np.cumsum(weights, out=sums[1:])
    return sums
