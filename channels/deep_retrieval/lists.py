"""Which items are on which path: posting lists of the build, mapped, and what was published since beside them.

A path that has items has a *place*, its position in `codes`; triggers are places, which fit an int32 where codes do not.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.growing_lists import GrowingLists
from engine.core.hashing import spread
from engine.core.types import AnyArray, BoolArray, Float32Array, Int32Array, Int64Array, RaggedRows

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
    """

    def __init__(self, paths: int, codes: Int64Array, offsets: Int64Array, rows: Int32Array) -> None:
        self.codes: Int64Array = sealed(codes)
        self._offsets, self._rows = sealed(offsets), sealed(rows)
        self._table: Int32Array = np.empty(0, np.int32)
        if paths <= DENSE_UP_TO:
            self._table = np.full(paths, -1, np.int32)
            self._table[codes] = np.arange(codes.size, dtype=np.int32)
        self._added = GrowingLists(codes.size, np.int32)
        # Made once, and larger when a batch needs it: a request costs no memory.
        self._found_rows, self._found_places = np.empty(0, np.int32), np.empty(0, np.int32)
        self._found_logs = np.empty(0, np.float32)

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

    def reach(
        self,
        paths: Int64Array,
        logs: Float32Array,
        asked: BoolArray,
        available: BoolArray,
        excluded: RaggedRows,
    ) -> tuple[Int32Array, Int32Array, Float32Array, Int64Array]:
        """Return what is on the paths of each query, every item once, on the likeliest of its paths.

        Args:
            paths: int64[m, B], codes, and logs: float32[m, B], of the queries that are asked, in order.
            asked: bool[n], which of the batch these are.
            available: bool[rows], False where an item was taken down.
            excluded: what each query of the batch forbids.

        Returns:
            int32[t] rows, int32[t] places, float32[t] logs and int64[n + 1] offsets; in order of the paths. They hold
            until the next call.
        """
        offsets = np.empty(asked.size + 1, np.int64)
        while True:
            needed = _reach(
                paths, logs, asked, self._table, self.codes, self._offsets, self._rows, self._added.starts,
                self._added.counts, self._added.data, available, sealed(excluded.rows), excluded.offsets,
                self._found_rows, self._found_places, self._found_logs, offsets,
            )  # fmt: skip
            if needed <= self._found_rows.size:
                break
            room = needed * 5 // 4
            self._found_rows, self._found_places = np.empty(room, np.int32), np.empty(room, np.int32)
            self._found_logs = np.empty(room, np.float32)
        return self._found_rows, self._found_places, self._found_logs, offsets


def sealed(array: AnyArray) -> AnyArray:
    """A read-only view: of each kernel one form is compiled."""
    view = array.view()
    view.flags.writeable = False
    return view


@njit(nogil=True, cache=True)
def _place_of(code, table, codes):  # type: ignore[no-untyped-def]
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


@njit(nogil=True, cache=True)
def _reach(  # type: ignore[no-untyped-def]
    paths, logs, asked, table, codes, offsets, rows, starts, counts, added, available, excluded, excluded_offsets,
    out_rows, out_places, out_logs, out_offsets,
):  # fmt: skip
    """Return how much room the members of all paths need; only where there is as much is anything written."""
    beam = paths.shape[1]
    places = np.empty((paths.shape[0], beam), np.int64)
    needed = longest = 0
    m = 0
    for q in range(asked.size):
        if not asked[q]:
            continue
        mine = excluded_offsets[q + 1] - excluded_offsets[q]
        for b in range(beam):
            place = _place_of(paths[m, b], table, codes)
            places[m, b] = place
            if place >= 0:
                size = offsets[place + 1] - offsets[place]
                if added.size:  # what nobody published costs no look into memory
                    size += counts[place]
                needed += size
                mine += size
        longest = max(longest, mine)
        m += 1
    if needed > out_rows.size:
        return needed
    capacity = 2
    while capacity < 2 * longest:
        capacity *= 2
    mask = capacity - 1
    met = np.empty(capacity, np.int32)
    written = 0
    m = 0
    out_offsets[0] = 0
    for q in range(asked.size):
        if asked[q]:
            met[:] = -1
            # What is excluded counts as met already.
            for p in range(excluded_offsets[q], excluded_offsets[q + 1]):
                row = excluded[p]
                at = spread(row) & mask
                while met[at] != -1 and met[at] != row:
                    at = (at + 1) & mask
                met[at] = row
            # The lists lie anywhere in memory: copying them out first, without a branch on what they hold, lets the
            # processor wait for many of them at once.
            reached = written
            for b in range(beam):
                place = places[m, b]
                if place < 0:
                    continue
                for i in range(offsets[place], offsets[place + 1]):
                    out_rows[reached] = rows[i]
                    out_places[reached] = b
                    reached += 1
                if added.size:
                    for i in range(starts[place], starts[place] + counts[place]):
                        out_rows[reached] = added[i]
                        out_places[reached] = b
                        reached += 1
            for i in range(written, reached):
                row, b = out_rows[i], out_places[i]
                at = spread(row) & mask
                while met[at] != -1 and met[at] != row:
                    at = (at + 1) & mask
                fresh = met[at] == -1
                met[at] = row
                if fresh and available[row]:
                    out_rows[written] = row
                    out_places[written] = places[m, b]
                    out_logs[written] = logs[m, b]
                    written += 1
            m += 1
        out_offsets[q + 1] = written
    return needed


def reach_reference(
    assignment: Int64Array,
    paths: Int64Array,
    logs: Float32Array,
    available: BoolArray,
    excluded: set[int],
) -> list[tuple[int, int, float]]:
    """The plain twin of `PathLists.reach`, of one query: (row, code of its path, log), in order of the paths."""
    found: dict[int, tuple[int, int, float]] = {}
    for code, log in zip(paths.tolist(), logs.tolist(), strict=True):
        for row in np.flatnonzero((assignment == code).any(1)).tolist():
            if available[row] and row not in excluded and row not in found:
                found[row] = (row, code, log)
    return list(found.values())
