"""Lists of numbers per row that are replaced one by one and stay compact: tags of items, bytes of titles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.core.types import AnyArray, Int32Array, Int64Array

_SMALLEST = 1024


class GrowingLists:
    """Row r has data[starts[r] : starts[r] + counts[r]].

    A list that replaces another is written behind all others; where half of `data` belongs to none any more it is
    packed. Arrays are replaced when they grow or are packed: read them from here each time.
    """

    __slots__ = ("_counts", "_data", "_rows", "_starts", "_used", "_wasted")

    def __init__(self, rows: int, dtype: npt.DTypeLike) -> None:
        """Make empty lists for `rows` rows."""
        self._rows = rows
        # Zeros of the system's: rows that are never touched take no memory.
        self._starts: Int64Array = np.zeros(rows, np.int64)
        self._counts: Int32Array = np.zeros(rows, np.int32)
        self._data: AnyArray = np.empty(0, dtype)
        self._used = 0
        self._wasted = 0

    def __len__(self) -> int:
        return self._rows

    @property
    def starts(self) -> Int64Array:
        """int64[n]."""
        return self._starts[: self._rows]

    @property
    def counts(self) -> Int32Array:
        """int32[n]."""
        return self._counts[: self._rows]

    @property
    def data(self) -> AnyArray:
        """The lists' numbers, of the dtype given."""
        return self._data[: self._used]

    def fill(self, offsets: Int64Array, data: AnyArray) -> None:
        """Replace all lists: row r has data[offsets[r] : offsets[r + 1]]."""
        self._data = data.astype(self._data.dtype)
        self._used, self._wasted = data.size, 0
        self.starts[:] = offsets[:-1]
        self.counts[:] = np.diff(offsets)

    def grow(self, rows: int) -> None:
        """Make room for `rows` rows in all; new ones have empty lists."""
        if rows > self._starts.size:
            room = max(rows, self._starts.size * 5 // 4, _SMALLEST)
            self._starts = _wider(self.starts, room)
            self._counts = _wider(self.counts, room)
        self._rows = max(rows, self._rows)

    def put(self, rows: Int32Array, counts: Int32Array, data: AnyArray) -> None:
        """Replace the lists of some rows.

        Args:
            rows: int32[m], each once.
            counts: int32[m], the lengths of their new lists.
            data: [sum of counts], the lists end to end.
        """
        end = self._used + data.size
        if end > self._data.size:
            self._data = _wider(self.data, max(end, self._data.size * 5 // 4, _SMALLEST))
        self._data[self._used : end] = data
        self._wasted += int(self._counts[rows].sum())
        starts = np.cumsum(counts, dtype=np.int64)
        starts -= counts
        self._starts[rows] = starts + self._used
        self._counts[rows] = counts
        self._used = end
        if self._wasted > max(_SMALLEST, self._used // 2):
            self._pack()

    def take(self, row: int) -> AnyArray:
        """Return one row's list."""
        start = int(self._starts[row])
        return self._data[start : start + int(self._counts[row])]

    def _pack(self) -> None:
        ends = np.cumsum(self.counts, dtype=np.int64)
        starts = ends - self.counts
        at = np.arange(int(ends[-1])) + np.repeat(self.starts - starts, self.counts)
        self._data = self._data[at]
        self.starts[:] = starts
        self._used, self._wasted = self._data.size, 0


def _wider(array: AnyArray, room: int) -> AnyArray:
    wider = np.zeros(room, array.dtype)
    wider[: array.size] = array
    return wider
