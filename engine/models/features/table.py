"""Tables of encoded rows: written, read again, and some of their rows taken."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numba import njit

from engine.core.channel import SnapshotSink
from engine.core.sealed import sealed
from engine.core.types import NO_ROW, AnyArray, Int32Array, Int64Array
from engine.models.encoded import Encoded, EncodedUsers, Multi


def save_encoded(sink: SnapshotSink, prefix: str, encoded: Encoded) -> None:
    """Write the arrays `prefix.codes`, `.numbers`, `.multi.<i>.codes` and `.multi.<i>.offsets`."""
    sink.write(f"{prefix}.codes", encoded.codes)
    sink.write(f"{prefix}.numbers", encoded.numbers)
    for at, many in enumerate(encoded.multi):
        sink.write(f"{prefix}.multi.{at}.codes", many.codes)
        sink.write(f"{prefix}.multi.{at}.offsets", many.offsets)


def load_encoded(arrays: Mapping[str, AnyArray], prefix: str) -> Encoded:
    """Return what `save_encoded` wrote."""
    multi: list[Multi] = []
    while f"{prefix}.multi.{len(multi)}.codes" in arrays:
        at = len(multi)
        multi.append(Multi(arrays[f"{prefix}.multi.{at}.codes"], arrays[f"{prefix}.multi.{at}.offsets"]))
    return Encoded(arrays[f"{prefix}.codes"], tuple(multi), arrays[f"{prefix}.numbers"])


def take_encoded(table: Encoded, rows: Int32Array) -> Encoded:
    """Return some rows of a table of encoded rows; -1, and what lies beyond the table, has nothing known.

    Args:
        table: [t] encoded rows.
        rows: int32[n].
    """
    codes = np.zeros((rows.size, table.codes.shape[1]), np.int32)
    numbers = np.zeros((rows.size, table.numbers.shape[1]), np.float32)
    if codes.shape[1] or numbers.shape[1]:
        _take(sealed(table.codes), sealed(table.numbers), sealed(rows), codes, numbers)
    if not table.multi:
        return Encoded(codes, (), numbers)
    known = np.where((rows >= 0) & (rows < len(table)), rows, NO_ROW)
    multi = tuple(Multi(*_take_many(many.codes, many.offsets, known)) for many in table.multi)
    return Encoded(codes, multi, numbers)


def take_users(users: EncodedUsers, rows: Int64Array) -> EncodedUsers:
    """Return some rows of encoded users, int64[n], what they did included."""
    own = take_encoded(users, rows.astype(np.int32))
    return EncodedUsers(own.codes, own.multi, own.numbers, users.sequence[rows], users.lengths[rows])


@njit(nogil=True, cache=True)
def _take(codes, numbers, rows, out_codes, out_numbers):  # type: ignore[no-untyped-def]
    """Copy rows of a table; of those outside it say that every number is missing."""
    for r in range(rows.size):
        row = rows[r]
        if 0 <= row < codes.shape[0]:
            for c in range(codes.shape[1]):
                out_codes[r, c] = codes[row, c]
            for c in range(numbers.shape[1]):
                out_numbers[r, c] = numbers[row, c]
        else:
            for c in range(1, numbers.shape[1], 2):
                out_numbers[r, c] = np.float32(1)


def _take_many(codes: Int32Array, offsets: Int64Array, rows: AnyArray) -> tuple[Int32Array, Int64Array]:
    safe = np.maximum(rows, 0)
    counts = (
        np.where(rows >= 0, offsets[safe + 1] - offsets[safe], 0)
        if offsets.size > 1
        else np.zeros(rows.size, np.int64)
    )
    ends = np.zeros(rows.size + 1, np.int64)
    np.cumsum(counts, out=ends[1:])
    starts = offsets[safe] if offsets.size > 1 else np.zeros(rows.size, np.int64)
    at = np.arange(int(ends[-1])) + np.repeat(starts - ends[:-1], counts)
    taken: Int32Array = codes[at]
    return taken, ends
