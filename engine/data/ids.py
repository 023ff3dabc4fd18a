"""External ids and the catalogue rows that stand for them inside.

An index carries an open-addressing hash table, read by compiled code, because every request looks ids up: a
table costs two cache misses, binary search one per halving. The table is stored with the ids, so that the
worker processes of a server share one copy of it through the page cache. String ids are stored at the width
of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit

from engine.core.channel import SnapshotSink
from engine.core.errors import DatasetError
from engine.core.types import NO_ROW, AnyArray, BoolArray, Int32Array, Int64Array
from engine.core.writable import writable
from engine.data.columns import string_parts

IdKind: TypeAlias = Literal["int64", "string"]
"""What the ids of a data set are."""

MAX_ID_BYTES = 256
"""The longest string id, in UTF-8 bytes: an index stores every id at the width of the longest."""

MAX_ROWS = 2**31 - 1


class IdIndex:
    """A set of external ids, each with an int32 row; rows are in rising id order (strings: by UTF-8 bytes).

    Immutable, and safe to use from several threads.
    """

    __slots__ = ("_numbers", "_table", "_values")

    def __init__(self, values: AnyArray, table: Int32Array | None = None) -> None:
        """Wrap arrays that are known to be right; `of` makes them from any ids.

        Args:
            values: int64[n] rising and not negative, or S[n] rising.
            table: int32[power of two], the hash table of their rows; built when not given.
        """
        # Whether mapped or not, of one kind: one compiled form of the kernels serves both.
        self._values = writable(values)
        self._table = writable(_build_table(values) if table is None else table)
        self._numbers: Int64Array = self._values if self.kind == "int64" else writable(np.empty(0, np.int64))

    @classmethod
    def of(cls, values: Any, file: str = "ids", column: str = "") -> Self:
        """Return the index of some ids; duplicates are welcome.

        Args:
            values: integers or strings: a NumPy array, a pyarrow array (chunked or not), or a list.
            file, column: where they come from, for the error.

        Raises:
            DatasetError: on a negative or missing id, and on a string that is empty, longer than
                `MAX_ID_BYTES` or holds a NUL byte.
        """
        kind = _kind_of(values)
        unique = _sorted_strings(values, file, column) if kind == "string" else _sorted_integers(values)
        if kind == "int64" and unique.size and unique[0] < 0:
            raise DatasetError(f"ids must be 0 or more, found {unique[0]}", file, column)
        if unique.size > MAX_ROWS:
            raise DatasetError(
                f"{unique.size:,} ids are more than the {MAX_ROWS:,} that rows can number", file, column
            )
        return cls(unique)

    def __reduce__(self) -> tuple[type[Self], tuple[AnyArray, Int32Array]]:
        # Through the constructor: what it derives need not be pickled.
        return type(self), (self._values, self._table)

    @property
    def kind(self) -> IdKind:
        """Whether ids are integers or strings."""
        return "int64" if self._values.dtype.kind == "i" else "string"

    def __len__(self) -> int:
        return int(self._values.size)

    @property
    def tables(self) -> tuple[AnyArray, Int32Array]:
        """The ids in rising order and the hash table of their rows; of integers, for `find_integers`."""
        return self._values, self._table

    @property
    def numbers(self) -> Int64Array:
        """int64[n]: the ids in rising order; of strings none."""
        return self._numbers

    def rows(self, ids: Any) -> Int32Array:
        """Return int32[n]: the row of each id; -1 (`NO_ROW`) for an id that the index does not hold.

        Args:
            ids: n ids of the index's kind: a NumPy array, a pyarrow array (chunked or not), or a list.

        Raises:
            TypeError: if they are of the other kind.
        """
        if self.kind == "int64":
            wanted = _int64(ids)
            rows = np.empty(wanted.size, np.int32)
            find_integers(self._values, self._table, wanted, rows)
            return rows
        if not len(ids):
            return np.empty(0, np.int32)
        offsets, data = string_parts(_strings(ids))
        rows = np.empty(offsets.size - 1, np.int32)
        _find_strings(_cells(self._values), self._table, offsets, data, rows)
        return rows

    def encoded(self, rows: Int32Array) -> AnyArray:
        """Return ids as they go on the wire: int64[n], or for strings uint8[n, width], UTF-8 ended by zeros."""
        taken = self._values[rows]
        if self.kind == "int64":
            return taken
        return taken.view(np.uint8).reshape(taken.size, taken.dtype.itemsize)

    def ids(self, rows: Int32Array) -> AnyArray:
        """Return the external ids of some rows, each in [0, len): int64[n], or str_[n]."""
        taken = self._values[rows]
        return taken if self.kind == "int64" else np.char.decode(taken, "utf-8")

    def save(self, sink: SnapshotSink, prefix: str) -> None:
        """Write the arrays `prefix.ids` and `prefix.table`."""
        sink.write(f"{prefix}.ids", self._values)
        sink.write(f"{prefix}.table", self._table)

    @classmethod
    def load(cls, arrays: Mapping[str, AnyArray], prefix: str) -> Self:
        """Return what `save` wrote; the arrays are used as they are, mapped."""
        return cls(arrays[f"{prefix}.ids"], arrays[f"{prefix}.table"])


def valid_string_ids(values: Any) -> BoolArray:
    """bool[n]: which pyarrow strings may be ids: not empty, at most `MAX_ID_BYTES` long, no NUL byte."""
    return _valid(*string_parts(values))


def _kind_of(values: Any) -> IdKind:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return "int64" if pa.types.is_integer(values.type) else "string"
    if isinstance(values, np.ndarray):
        return "string" if values.dtype.kind in "USOT" else "int64"
    return "string" if len(values) and isinstance(values[0], str) else "int64"


def _int64(values: Any) -> Int64Array:
    """Integers as int64; a missing one, and one beyond int64, become negative: never an id."""
    if isinstance(values, np.ndarray) and values.dtype == np.int64:
        return np.ascontiguousarray(values)
    if isinstance(values, pa.Array | pa.ChunkedArray):
        if not pa.types.is_integer(values.type):
            raise TypeError(f"integer ids expected, got {values.type}")
        filled: AnyArray = values.cast(pa.int64(), safe=False).fill_null(NO_ROW).to_numpy()
        return filled
    array = np.asarray(values)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"integer ids expected, got {array.dtype}")
    return array.astype(np.int64)


def _strings(values: Any) -> Any:
    """Strings as a pyarrow array; a missing one becomes "" later: never an id."""
    array = values
    if not isinstance(values, pa.Array | pa.ChunkedArray):
        # Only a list needs the type said; NumPy's bytes become pyarrow's binary.
        array = pa.array(values) if isinstance(values, np.ndarray) else pa.array(values, pa.large_string())
    if not len(array) or not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        return array.cast(pa.large_string())
    raise TypeError(f"string ids expected, got {array.type}")


def _sorted_integers(values: Any) -> Int64Array:
    # Not np.unique: it hashes integers since NumPy 2.3, which takes a second for a million of them.
    ordered = np.sort(_int64(values))
    first = np.ones(ordered.size, np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    unique: Int64Array = ordered[first]
    return unique


def _sorted_strings(values: Any, file: str, column: str) -> AnyArray:
    offsets, data = string_parts(pc.unique(_strings(values)))
    bad = np.count_nonzero(~_valid(offsets, data))
    if bad:
        rule = f"1 to {MAX_ID_BYTES} bytes of UTF-8 without a NUL"
        raise DatasetError(f"string ids must be {rule}; {bad:,} are not", file, column)
    width = int(np.diff(offsets).max(initial=1))
    cells = np.zeros((offsets.size - 1, width), np.uint8)
    _pad(offsets, data, cells)
    return np.sort(cells.reshape(-1).view(f"S{width}"))


def _valid(offsets: Int64Array, data: npt.NDArray[np.uint8]) -> BoolArray:
    lengths = np.diff(offsets)
    valid: BoolArray = (lengths > 0) & (lengths <= MAX_ID_BYTES)
    nuls = np.flatnonzero(data == 0)
    valid[np.searchsorted(offsets, nuls, side="right") - 1] = False
    return valid


def _cells(values: AnyArray) -> npt.NDArray[np.uint8]:
    """The bytes of S{width}[n] as uint8[n, width], without copying."""
    return values.view(np.uint8).reshape(values.size, values.dtype.itemsize)


def _build_table(values: AnyArray) -> Int32Array:
    # At least half of the slots stay empty, so that a search ends after one or two of them.
    table = np.full(1 << max(1, int(2 * values.size - 1).bit_length()), NO_ROW, np.int32)
    if values.dtype.kind == "i":
        _fill_integers(values, table)
    else:
        _fill_strings(_cells(values), table)
    return table


# Where the search for an id starts is part of the snapshot format, as the table is: a change of the two
# functions below needs a new format number.


@njit(nogil=True, cache=True)
def _slot(value, table):  # type: ignore[no-untyped-def]
    h = np.uint64(value)
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.int64((h ^ (h >> np.uint64(32))) & np.uint64(table.size - 1))


@njit(nogil=True, cache=True)
def _slot_of_string(data, length, table):  # type: ignore[no-untyped-def]
    h = np.uint64(0xCBF29CE484222325)
    for b in range(length):
        h = (h ^ np.uint64(data[b])) * np.uint64(0x100000001B3)
    return _slot(h, table)


@njit(nogil=True, cache=True)
def _fill_integers(values, table):  # type: ignore[no-untyped-def]
    for row in range(values.size):
        at = _slot(values[row], table)
        while table[at] >= 0:
            at = (at + 1) & (table.size - 1)
        table[at] = row


@njit(nogil=True, cache=True)
def _fill_strings(cells, table):  # type: ignore[no-untyped-def]
    for row in range(cells.shape[0]):
        length = 0
        while length < cells.shape[1] and cells[row, length] != 0:
            length += 1
        at = _slot_of_string(cells[row], length, table)
        while table[at] >= 0:
            at = (at + 1) & (table.size - 1)
        table[at] = row


@njit(nogil=True, cache=True)
def find_integers(values, table, ids, rows):  # type: ignore[no-untyped-def]
    """Find the rows of integer ids.

    Args:
        values, table: int64[n], int32[power of two]: of the index.
        ids: int64[m], what to look for.
        rows: int32[m], out: -1 for what is not there.
    """
    # Rounds: the first slot of all, then the next slot of those that met another id, ... No branch depends on what is
    # read, so the cache misses overlap and no branch is guessed wrong.
    mask = table.size - 1
    left = np.empty(ids.size, np.int32)
    for k in range(ids.size):
        rows[k] = table[_slot(ids[k], table)]
    many = 0
    if values.size > 0:
        for k in range(ids.size):
            left[many] = k
            many += (rows[k] >= 0) & (values[max(rows[k], 0)] != ids[k])
    step = 0
    while many > 0:
        step += 1
        again = 0
        for i in range(many):
            k = left[i]
            rows[k] = table[(_slot(ids[k], table) + step) & mask]
            left[again] = k
            again += (rows[k] >= 0) & (values[max(rows[k], 0)] != ids[k])
        many = again


@njit(nogil=True, cache=True)
def _find_strings(cells, table, offsets, data, rows):  # type: ignore[no-untyped-def]
    for k in range(rows.size):
        rows[k] = -1
        wanted = data[offsets[k] : offsets[k + 1]]
        if not 0 < wanted.size <= cells.shape[1]:
            continue
        at = _slot_of_string(wanted, wanted.size, table)
        while table[at] >= 0:
            if _equal(cells[table[at]], wanted):
                rows[k] = table[at]
                break
            at = (at + 1) & (table.size - 1)


@njit(nogil=True, cache=True)
def _equal(cell, wanted):  # type: ignore[no-untyped-def]
    """Whether a cell, padded with NULs, holds the bytes wanted; a NUL among those is never an id."""
    for b in range(wanted.size):
        if wanted[b] == 0 or cell[b] != wanted[b]:
            return False
    return wanted.size == cell.size or cell[wanted.size] == 0


@njit(nogil=True, cache=True)
def _pad(offsets, data, cells):  # type: ignore[no-untyped-def]
    for k in range(cells.shape[0]):
        for b in range(offsets[k + 1] - offsets[k]):
            cells[k, b] = data[offsets[k] + b]
