"""A hash table from int64 keys to int32 values that grows: for what becomes known while serving."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.types import NO_ROW, Int32Array, Int64Array

_SMALLEST = 16


class IntTable:
    """int64 -> int32 (0 or more), open addressing. Not safe to change while another thread looks things up."""

    __slots__ = ("_count", "_keys", "_values")

    def __init__(self) -> None:
        self._keys = np.zeros(_SMALLEST, np.int64)
        self._values = np.full(_SMALLEST, NO_ROW, np.int32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def arrays(self) -> tuple[Int64Array, Int32Array]:
        """The table's keys and values, for `slot_of` in kernels; replaced when it grows."""
        return self._keys, self._values

    def get(self, keys: Int64Array) -> Int32Array:
        """Return int32[n]: the value of each key (int64[n]); -1 where it has none."""
        found = np.empty(keys.size, np.int32)
        _get(self._keys, self._values, keys, found)
        return found

    def put(self, keys: Int64Array, values: Int32Array) -> None:
        """Give each key (int64[n]) its value (int32[n], 0 or more); the last of one key counts."""
        size = self._keys.size
        while size < 2 * (self._count + keys.size):
            size *= 2
        if size > self._keys.size:
            used = self._values >= 0
            old_keys, old_values = self._keys[used], self._values[used]
            self._keys, self._values = np.zeros(size, np.int64), np.full(size, NO_ROW, np.int32)
            _put(self._keys, self._values, old_keys, old_values)
        self._count += _put(self._keys, self._values, keys, values)


@njit(nogil=True, cache=True, inline="always")
def slot_of(key, keys, values):  # type: ignore[no-untyped-def]
    """Return where a key stands in the table, or the free place where it would."""
    h = np.uint64(key)
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    mask = np.uint64(keys.size - 1)
    at = (h ^ (h >> np.uint64(32))) & mask
    while values[at] >= 0 and keys[at] != key:
        at = (at + np.uint64(1)) & mask
    return at


@njit(nogil=True, cache=True)
def _get(keys, values, wanted, found):  # type: ignore[no-untyped-def]
    for i in range(wanted.size):
        found[i] = values[slot_of(wanted[i], keys, values)]


@njit(nogil=True, cache=True)
def _put(keys, values, new_keys, new_values):  # type: ignore[no-untyped-def]
    added = 0
    for i in range(new_keys.size):
        at = slot_of(new_keys[i], keys, values)
        added += values[at] < 0
        keys[at] = new_keys[i]
        values[at] = new_values[i]
    return added
