"""Which items are on which path: posting lists of the build, mapped, and what was published since beside them.

A path that has items has a *place*, its position in `codes`; triggers are places, which fit an int32 where codes do not.

What an item is ranked by lies where the lists have it, once for each of its paths: a beam reads whole paths, so that
memory is read in order, where rows of a table in the catalogue's order would be waited for one by one. It is in bytes, so
that three of them take less than one of floats (`engine/ann/lists.py` has how).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.growing_lists import GrowingLists
from engine.core.sealed import sealed
from engine.core.types import AnyArray, BoolArray, Float32Array, Int8Array, Int32Array, Int64Array

DENSE_UP_TO = 1 << 22
"""A lattice of so many paths has a table of the place of each, 16 MiB; of a larger one places are searched for."""


def invert(assignment: Int64Array) -> tuple[Int64Array, Int64Array, Int32Array]:
    """Turn the paths of items into the items of paths.

    Args:
        assignment: int64[items, J], codes of each item's paths; -1 where it has fewer.

    Returns:
        int64[P], the codes that have an item, rising; int64[P + 1], where the list of each begins; int32[...], the items
        of each, rising.
    """
    rows, columns = np.nonzero(assignment >= 0)
    codes, place, counts = np.unique(assignment[rows, columns], return_inverse=True, return_counts=True)
    offsets = np.zeros(codes.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    order = np.argsort(place, kind="stable")
    return codes.astype(np.int64), offsets, rows[order].astype(np.int32)


class PathLists:
    """The items of every path, those that were published since the build included.

    Args:
        paths: how many the lattice has.
        codes, offsets, rows: as `invert` makes them.
        vectors, scales, bias: int8[t, e rounded up to 16], float32[t] and float32[t], what each of `rows` is ranked by,
            in their order.
    """

    def __init__(
        self,
        paths: int,
        codes: Int64Array,
        offsets: Int64Array,
        rows: Int32Array,
        vectors: Int8Array,
        scales: Float32Array,
        bias: Float32Array,
    ) -> None:
        self.codes: Int64Array = sealed(codes)
        self._offsets, self._rows = sealed(offsets), sealed(rows)
        self._ranked = sealed(vectors), sealed(scales), sealed(bias)
        self._table: Int32Array = np.empty(0, np.int32)
        if paths <= DENSE_UP_TO:
            self._table = np.full(paths, -1, np.int32)
            self._table[codes] = np.arange(codes.size, dtype=np.int32)
        self._added = GrowingLists(codes.size, np.int32)

    def places(self, codes: Int64Array) -> Int32Array:
        """int32[...]: the places of paths, -1 of one that has no item in the build."""
        at = np.searchsorted(self.codes, codes)
        found = np.zeros(codes.shape, np.bool_)
        inside = at < self.codes.size
        found[inside] = self.codes[at[inside]] == codes[inside]
        return np.where(found, at, -1).astype(np.int32)

    def move(self, row: int, before: Int32Array, after: Int32Array) -> None:
        """Take an item that the build did not know from the lists of some places to those of others."""
        left = np.setdiff1d(before, after)
        came = np.setdiff1d(after, before)
        lists = [part[part != row] for part in map(self._added.take, left.tolist())]
        lists += [np.append(part, np.int32(row)) for part in map(self._added.take, came.tolist())]
        if lists:
            counts = np.array([part.size for part in lists], np.int32)
            self._added.put(np.concatenate((left, came)), counts, np.concatenate(lists))

    @property
    def state(self) -> tuple[AnyArray, ...]:
        """What kernels read lists from; it holds until the next move."""
        added = self._added
        return (
            self._table, self.codes, self._offsets, self._rows, *self._ranked, added.starts, added.counts, added.data,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def place_of(code, table, codes):  # type: ignore[no-untyped-def]
    """Return the place of a path, or -1."""
    if table.size:
        return np.int64(table[code])
    low, high = 0, codes.size
    while low < high:
        middle = (low + high) // 2
        if codes[middle] < code:
            low = middle + 1
        else:
            high = middle
    return np.int64(low) if low < codes.size and codes[low] == code else np.int64(-1)


def reach_reference(
    assignment: Int64Array,
    paths: Int64Array,
    logs: Float32Array,
    available: BoolArray,
    excluded: set[int],
) -> list[tuple[int, int, float]]:
    """What is on the paths of one query, plainly: (row, code of its path, log), in order of the paths, an item once."""
    found: dict[int, tuple[int, int, float]] = {}
    for code, log in zip(paths.tolist(), logs.tolist(), strict=True):
        for row in np.flatnonzero((assignment == code).any(1)).tolist():
            if available[row] and row not in excluded and row not in found:
                found[row] = (row, code, log)
    return list(found.values())
