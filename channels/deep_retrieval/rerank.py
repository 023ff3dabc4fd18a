"""The small ranker: of what the paths hold, the items of the largest u . w_v + b_v. Compiled.

What costs is a pass over what the paths hold, in bytes and in order of the lists. Whether an item lies on several of the
paths, is taken down or excluded, is looked up for the best few hundred alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from channels.deep_retrieval.lists import PathLists, place_of
from engine.ann.kernels import prefetch
from engine.core.bounds import bound_of, reaching
from engine.core.candidates import CandidateBatch
from engine.core.hashing import spread
from engine.core.sealed import sealed
from engine.core.select import row_of, sort_digits, sort_key
from engine.core.types import BoolArray, Float32Array, Int32Array, Int64Array, RaggedRows
from engine.models.tiles import product

_ask: Any = prefetch  # to a type checker a call of an intrinsic never returns

_SPARE = 1.1
"""Entries that are looked at, for each that queries before had use for."""


class Ranker:
    """Ranks what is on paths: by what the lists hold of the items, or what was put here of those published since.

    Args:
        items: of the build.
        dimension: e, of the users' vectors.
    """

    def __init__(self, items: int, dimension: int) -> None:
        self._items = items
        self._fresh = np.empty((0, dimension), np.float32)
        self._fresh_bias = np.empty(0, np.float32)
        # Entries of lists that it took for each item found: it says how long a query takes, never what it finds.
        self._taken = np.ones(1)

    def put(self, rows: Int32Array, vectors: Float32Array, bias: Float32Array) -> None:
        """Take vectors float32[m, e] and biases float32[m] of items that the build did not know, each once."""
        at = rows - self._items
        most = int(at.max(initial=-1)) + 1
        if most > self._fresh_bias.size:
            room = max(most, self._fresh_bias.size * 5 // 4, 1024)
            wider = np.zeros((room, vectors.shape[1]), np.float32)
            wider[: len(self._fresh)] = self._fresh
            self._fresh = wider
            self._fresh_bias = np.append(self._fresh_bias, np.zeros(room - self._fresh_bias.size, np.float32))
        self._fresh[at], self._fresh_bias[at] = vectors, bias

    def best(
        self,
        users: Float32Array,
        paths: Int64Array,
        logs: Float32Array,
        k: Int32Array,
        lists: PathLists,
        available: BoolArray,
        excluded: RaggedRows,
        rerank: bool,
    ) -> CandidateBatch:
        """Return the best k items on the paths of each query, every item once; triggers are places.

        An item's trigger is the likeliest of its paths that are searched.

        Args:
            users: float32[m, e], vectors of the queries whose k is above 0, in order.
            paths: int64[m, B], their codes, and logs: float32[m, B], likeliest first.
            k: int32[n].
            lists: of the paths.
            available: bool[rows], False where an item was taken down.
            excluded: what each query of the batch forbids.
            rerank: whether the ranker's score counts; else the log of the probability of the path.
        """
        room = sum(k.tolist())
        rows, places = np.empty(room, np.int32), np.empty(room, np.int32)
        scores = np.empty(room, np.float32)
        offsets = np.empty(k.size + 1, np.int64)
        arguments = (
            users, paths, logs, k, *lists.state, self._items, self._fresh, self._fresh_bias, available,
            sealed(excluded.rows), excluded.offsets, rerank, self._taken, rows, scores, places, offsets,
        )  # fmt: skip
        whole = _best(*arguments)
        return CandidateBatch(rows[:whole], scores[:whole], places[:whole], offsets)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _product(user, table, row):  # type: ignore[no-untyped-def]
    """Return the inner product of float32[e] and a row of float32[n, e], in whatever order the compiler sums fastest.

    It is the same order for every row of every batch.
    """
    total = np.float32(0)
    for c in range(user.size):
        total += user[c] * table[row, c]
    return total


@njit(nogil=True, cache=True)
def _find(met, mask, row):  # type: ignore[no-untyped-def]
    """Return where a row stands in an open-addressing table of int32, or the empty place where it would (-1)."""
    at = spread(row) & mask
    while met[at] != -1 and met[at] != row:
        at = (at + 1) & mask
    return at


@njit(nogil=True, cache=True)
def _sorted(lines, count):  # type: ignore[no-untyped-def]
    """As `sort_digits`, of all bits; the lower half is read only where two upper ones, the scores, are equal."""
    here = sort_digits(lines, count, 32)
    for i in range(1, count):
        if lines[here, i - 1] >> np.uint64(32) == lines[here, i] >> np.uint64(32):
            lines[0, :count] = lines[here, :count]
            return sort_digits(lines, count, 0)
    return here


@njit(nogil=True, cache=True)
def _best(  # type: ignore[no-untyped-def]
    users, paths, logs, k, table, codes, offsets, listed, ranked, scales, biases, starts, counts, added, items,
    fresh, fresh_bias, available, excluded, excluded_offsets, rerank, taken, rows, scores, places, out_offsets,
):  # fmt: skip
    width = users.shape[1]
    beam = paths.shape[1]
    column, numbers, levels = listed.reshape(-1, 1), scales.reshape(-1, 1), biases.reshape(-1, 1)
    flags, lattice, starting = available.reshape(-1, 1), table.reshape(-1, 1), offsets.reshape(-1, 1)
    place_at = np.empty(paths.shape, np.int64)
    # What lies anywhere in memory is on its way before the first of it is read: here, and again further down.
    if table.size:
        for m in range(paths.shape[0]):
            for b in range(beam):
                _ask(lattice, paths[m, b], 0)
    for m in range(paths.shape[0]):
        for b in range(beam):
            place = place_of(paths[m, b], table, codes)
            place_at[m, b] = place
            if place >= 0:
                _ask(starting, place, 0)
    longest = forbidden = 1
    m = 0
    for q in range(k.size):
        if k[q] <= 0:
            continue
        entries = 0
        for b in range(beam):
            place = place_at[m, b]
            if place >= 0:
                entries += offsets[place + 1] - offsets[place]
                if added.size:  # what nobody published costs no look into memory
                    entries += counts[place]
        longest = max(longest, entries)
        forbidden = max(forbidden, excluded_offsets[q + 1] - excluded_offsets[q])
        m += 1
    capacity = 2
    while capacity < 2 * (longest + forbidden):
        capacity *= 2
    met, at_of = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
    values, row_at, of = (
        np.empty(longest, np.float32),
        np.empty(longest, np.int32),
        np.empty(longest, np.int32),
    )
    passed = np.empty(longest, np.int32)
    keys = np.empty((2, longest), np.uint64)
    bits = values.view(np.uint32)
    user = np.zeros(ranked.shape[1], np.float32)
    written = 0
    m = 0
    out_offsets[0] = 0
    for q in range(k.size):
        wanted = np.int64(k[q])
        if wanted > 0:
            whole = users[m]
            user[:width] = whole
            for b in range(beam):
                place = place_at[m, b]
                if place >= 0:
                    _ask(column, offsets[place], 0)
                    if rerank:
                        _ask(ranked, offsets[place], 0)
                        _ask(numbers, offsets[place], 0)
                        _ask(levels, offsets[place], 0)
            n = 0
            for b in range(beam):
                place = place_at[m, b]
                if place < 0:
                    continue
                begin, end = offsets[place], offsets[place + 1]
                if rerank:
                    # The items of the next path are on their way while those of this one are compared.
                    after = place_at[m, b + 1] if b + 1 < beam else np.int64(-1)
                    ahead, until = (offsets[after], offsets[after + 1]) if after >= 0 else (begin, begin)
                    for i in range(begin, end):
                        if ahead < until:
                            _ask(ranked, ahead, 0)
                            ahead += 1
                        values[n] = product(user, ranked, i) * scales[i] + biases[i]
                        row_at[n], of[n] = listed[i], b
                        n += 1
                else:
                    for i in range(begin, end):
                        values[n], row_at[n], of[n] = logs[m, b], listed[i], b
                        n += 1
                if added.size:
                    for i in range(starts[place], starts[place] + counts[place]):
                        at = np.int64(added[i]) - items
                        values[n] = _product(whole, fresh, at) + fresh_bias[at] if rerank else logs[m, b]
                        row_at[n], of[n] = added[i], b
                        n += 1
            # An item may be there several times: more than the best are looked at.
            several = int(_SPARE * taken[0] * wanted) + 16
            while True:
                bound = bound_of(values, n, several) if several < n else np.float32(-np.inf)
                reached = reaching(values, 0, n, bound, passed)
                for i in range(reached):
                    _ask(flags, row_at[passed[i]], 0)
                forbids = excluded_offsets[q + 1] - excluded_offsets[q]
                size = 2
                while size < 2 * (reached + forbids):
                    size *= 2
                mask = size - 1
                met[:size] = -1
                # What is excluded counts as met already.
                for p in range(excluded_offsets[q], excluded_offsets[q + 1]):
                    met[_find(met, mask, excluded[p])] = excluded[p]
                found = 0
                for i in range(reached):
                    row = row_at[passed[i]]
                    at = _find(met, mask, row)
                    if met[at] == -1:
                        met[at] = row
                        at_of[at] = passed[found] = passed[i]
                        found += available[row]
                if found >= wanted or bound == np.float32(-np.inf):
                    break
                several *= 4
            if found:
                taken[0] += (reached / found - taken[0]) / 8
            for i in range(found):
                entry = passed[i]
                values[entry] += np.float32(0)  # -0 has no place of its own
                keys[0, i] = ~sort_key(bits[entry], row_at[entry])
            best = keys[_sorted(keys, found)]
            take = found if found < wanted else wanted
            for rank in range(take):
                row = row_of(~best[rank])
                entry = at_of[_find(met, mask, row)]
                rows[written], scores[written] = row, values[entry]
                places[written] = place_at[m, of[entry]]
                written += 1
            m += 1
        out_offsets[q + 1] = written
    return written


def first_of(found: CandidateBatch, hidden: BoolArray, k: Int32Array) -> CandidateBatch:
    """Return the first k of what was found for each query that are not hidden, bool[t]."""
    kept = np.flatnonzero(~hidden)
    before = np.searchsorted(kept, found.offsets)
    counts = np.minimum(np.diff(before), k)
    offsets = np.zeros(k.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    kept = kept[np.arange(offsets[-1]) + np.repeat(before[:-1] - offsets[:-1], counts)]
    return CandidateBatch(found.rows[kept], found.scores[kept], found.triggers[kept], offsets)


def rank_reference(
    user: Float32Array, vectors: Float32Array, bias: Float32Array, rows: Int32Array, k: int
) -> list[tuple[int, float]]:
    """The plain twin of `Ranker.best` where it reranks, of one query, in float64: (row, score), best first."""
    scores = vectors[rows].astype(np.float64) @ user + bias[rows]
    order = np.lexsort((rows, -scores))[:k]
    return [(int(rows[at]), float(scores[at])) for at in order]
