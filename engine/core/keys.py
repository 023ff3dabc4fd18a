"""The 64-bit key that stands for an external id wherever the state store keeps one.

An int64 id is its own key. A string's key is the FNV-1a hash (64 bit, Fowler, Noll and Vo) of its UTF-8 bytes with the
top bit cleared, so that keys are never negative and state needs no variable-length ids. Two strings share a key with a
chance of n^2 / 2^64 among n of them: 1 in 18 million for a million items; such a pair is one item to the user state.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numba import njit

from engine.core.types import Int64Array, UInt8Array

FNV_OFFSET = 0xCBF29CE484222325
FNV_PRIME = 0x100000001B3
TOP_BIT = 0x7FFFFFFFFFFFFFFF


def key_of(id_: int | str) -> int:
    """Return the key of one id."""
    if isinstance(id_, int):
        return id_
    h = FNV_OFFSET
    for byte in id_.encode():
        h = ((h ^ byte) * FNV_PRIME) & 0xFFFFFFFFFFFFFFFF
    return h & TOP_BIT


def keys_of(ids: Iterable[int | str]) -> Int64Array:
    """Return int64[n]: the key of each id."""
    return np.array([key_of(id_) for id_ in ids], np.int64)


def keys_of_cells(cells: UInt8Array) -> Int64Array:
    """Return int64[n]: the keys of strings given as uint8[n, width], UTF-8 ended by zeros."""
    keys = np.empty(cells.shape[0], np.int64)
    _keys_of_cells(np.ascontiguousarray(cells), keys)
    return keys


@njit(nogil=True, cache=True)
def _keys_of_cells(cells, keys):  # type: ignore[no-untyped-def]
    for i in range(cells.shape[0]):
        h = np.uint64(FNV_OFFSET)
        for b in range(cells.shape[1]):
            if cells[i, b] == 0:
                break
            h = (h ^ np.uint64(cells[i, b])) * np.uint64(FNV_PRIME)
        keys[i] = np.int64(h & np.uint64(TOP_BIT))
