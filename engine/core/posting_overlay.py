"""What changed since a snapshot's posting lists were written: a skip list per list (Pugh 1990), in arrays that grow.

Items that come in any order of time still read newest first, at O(log n) an insertion.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.hashing import GOLDEN, scrambled
from engine.core.int_table import IntTable
from engine.core.types import NO_ROW, AnyArray, Int32Array, Int64Array

LEVELS = 8
"""Of a skip list; one node in 8 reaches the next level, so 8 levels serve 8^8 entries."""

TIME, LIST, POINTERS = 1, 2, 3
"""Where an entry has its parts; the row stands first."""

BLOCK = 10
"""Rows of a block, as a power of two."""

_BATCH = 4096


class PostingOverlay:
    """The entries of rows that changed, by list. Changed and read on one thread."""

    def __init__(self, items: int) -> None:
        """Begin without entries.

        Args:
            items: rows in the catalogue.
        """
        # The entry of each row, -1 where the snapshot's own counts; and a bit per row that says whether it has an entry,
        # which is all that reading needs to know. A byte per block of rows says whether one of them has: as a rule none
        # has, and these bytes stay in the cache.
        self._latest = np.full(items, NO_ROW, np.int32)
        self._moved = np.zeros((items + 7) // 8, np.uint8)
        self._blocks = np.zeros((items >> BLOCK) + 1, np.bool_)
        # An entry is row, time, list (-1: none) and a pointer per level, side by side, as reading goes from one to the
        # next all over the memory. Its name, and a pointer to it, is where it begins.
        self._entries = np.empty(0, np.int64)
        self._used = 0
        self._numbers = IntTable()  # key -> number of its list
        self._heads = np.empty(0, np.int32)  # where a list's first pointers begin in `_entries`

    @property
    def arrays(self) -> tuple[AnyArray, ...]:
        """What `read_lists` reads; replaced when they grow."""
        return (*self._numbers.arrays, self._heads, self._entries, self._moved, self._blocks)

    @property
    def bytes_in_memory(self) -> int:
        """What it takes."""
        return sum(array.nbytes for array in (self._latest, *self.arrays))

    def put(self, rows: Int32Array, keys: Int64Array, times: Int64Array, items: int) -> None:
        """Put rows where they stand now.

        Args:
            rows: int32[m].
            keys: int64[m], the list of each; below 0 for none.
            times: int64[m], seconds since the epoch.
            items: rows in the catalogue now.
        """
        if items > self._latest.size:
            self._latest = _grown(self._latest, items, NO_ROW)
            # As many as `_latest` has room for: that alone says when both grow.
            self._moved = _grown(self._moved, (self._latest.size + 7) // 8)
            self._blocks = _grown(self._blocks, (self._latest.size >> BLOCK) + 1)
        for start in range(0, rows.size, _BATCH):
            part = slice(start, start + _BATCH)
            lists = self._numbers_of(keys[part])
            self._entries = _grown(self._entries, self._used + lists.size * (POINTERS + LEVELS))
            self._used = _place(
                rows[part], lists, times[part], self._latest, self._moved, self._blocks, self._entries, self._heads,
                self._used,
            )  # fmt: skip

    def _numbers_of(self, keys: Int64Array) -> Int32Array:
        """int32[m]: the number of each key's list, made where there is none; -1 for no key."""
        numbers = self._numbers.get(keys)
        unknown = np.flatnonzero((numbers < 0) & (keys >= 0))
        if not unknown.size:
            return numbers
        new = list(dict.fromkeys(keys[unknown].tolist()))
        first = len(self._numbers)
        self._numbers.put(np.array(new, np.int64), np.arange(first, first + len(new), dtype=np.int32))
        end = self._used + LEVELS * len(new)
        self._heads = _grown(self._heads, first + len(new))
        self._heads[first : first + len(new)] = np.arange(self._used, end, LEVELS)
        self._entries = _grown(self._entries, end)
        self._entries[self._used : end] = NO_ROW
        self._used = end
        return self._numbers.get(keys)


def _grown(array: AnyArray, size: int, fill: int = 0) -> AnyArray:
    if size <= array.size:
        return array
    wider: AnyArray = np.full(max(size, array.size * 5 // 4, 1024), fill, array.dtype)
    wider[: array.size] = array
    return wider


@njit(nogil=True, cache=True, inline="always")
def _height(row):  # type: ignore[no-untyped-def]
    """How many levels a row's entry reaches: its hash decides, so runs repeat."""
    z = scrambled((np.uint64(row) + np.uint64(1)) * np.uint64(GOLDEN))
    height = 1
    while height < LEVELS and z & np.uint64(7) == np.uint64(0):
        z >>= np.uint64(3)
        height += 1
    return height


@njit(nogil=True, cache=True)
def _search(head, row, time, entries, before):  # type: ignore[no-untyped-def]
    """Note per level where the pointer stands that leads past (time, row) in newest-first order."""
    at = np.int64(head)
    for level in range(LEVELS - 1, -1, -1):
        entry = entries[at + level]
        while entry >= 0 and (
            entries[entry + TIME] > time or (entries[entry + TIME] == time and entries[entry] < row)
        ):
            at = entry + POINTERS
            entry = entries[at + level]
        before[level] = at + level


@njit(nogil=True, cache=True)
def _place(rows, lists, times, latest, moved, blocks, entries, heads, used):  # type: ignore[no-untyped-def]
    """Move the entries of rows to where they stand now, and make those that are missing; returns `used` behind them."""
    before = np.empty(LEVELS, np.int64)
    for i in range(rows.size):
        row = rows[i]
        entry = np.int64(latest[row])
        if entry < 0:
            entry = np.int64(used)
            latest[row] = entry
            moved[row >> 3] |= np.uint8(1 << (row & 7))
            blocks[row >> BLOCK] = True
            entries[entry] = row
            entries[entry + LIST] = NO_ROW
            used += POINTERS + _height(row)
        elif entries[entry + LIST] == lists[i] and entries[entry + TIME] == times[i]:
            continue
        if entries[entry + LIST] >= 0:
            _search(heads[entries[entry + LIST]], row, entries[entry + TIME], entries, before)
            for level in range(_height(row)):
                entries[before[level]] = entries[entry + POINTERS + level]
        entries[entry + LIST] = lists[i]
        entries[entry + TIME] = times[i]
        if lists[i] >= 0:
            _search(heads[lists[i]], row, times[i], entries, before)
            for level in range(_height(row)):
                entries[entry + POINTERS + level] = entries[before[level]]
                entries[before[level]] = entry
    return used
