"""From the clusters' scores to the items that the ranking step reads: a merge of all lists, in chunks. Compiled.

Source: Bin et al. 2025 (arXiv 2501.08695), section 3.4 and appendix A. An item's key is the score of its cluster plus its
bias. A max-heap holds the lists by the keys of their heads; of the list on top a whole chunk is taken, then it goes back
with the key of what is its head now.

Here there is no heap, and the order is the same. The keys of a list never rise, so what a heap pops is all chunks in
order of the keys of their first items, and of few of them: those whose key is at least a bound. It is drawn from a
sample of the heads of lists so that about as many reach it as the queries before had use for, and falls where that is
too high: it says how long a merge takes, never what it finds. The chunks are written down and sorted by their digits; so
none waits for the one before, and what is read next is known. What a request excludes is stepped over as though it were
in no list, and a chunk is 8 of the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from channels.streaming_vq.lists import ClusterLists, next_entry, row_at
from engine.ann.kernels import prefetch
from engine.ann.lists import in_bytes
from engine.core.bounds import bound_of, reaching
from engine.core.hashing import spread
from engine.core.sealed import sealed
from engine.core.select import sort_digits, sort_key
from engine.core.types import BoolArray, Float32Array, Int64Array, RaggedRows
from engine.models.tiles import multiply

_ask: Any = prefetch  # to a type checker a call of an intrinsic never returns

CHUNK = 8
"""Items of a list that are taken at once (appendix A)."""

ENTER = 1.5
"""Clusters that are looked into, for each whose chunks were needed before: the bound is estimated."""

_SAMPLE = 512
"""Clusters that the bound is estimated from."""

_LOWEST = np.float32(np.finfo(np.float32).min)
"""A bound that all clusters reach but those without items, whose heads are -inf."""

_TILE = 64
"""Clusters whose products are made together: their vectors stay in the nearest cache for all queries of a batch."""


class Scorer:
    """The clusters' scores u . e_k, of vectors in bytes: whole, those of many clusters fit into no near cache.

    Args:
        vectors: float32[K, d], copied as bytes.
    """

    def __init__(self, vectors: Float32Array) -> None:
        clusters, width = vectors.shape
        padded = np.zeros((-(-clusters // _TILE) * _TILE, width), np.float32)
        padded[:clusters] = vectors
        codes, scales = in_bytes(padded)
        self._tiles = sealed(np.ascontiguousarray(codes.reshape(-1, _TILE, width).transpose(0, 2, 1)))
        self._scales = sealed(scales)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return int(self._tiles.nbytes + self._scales.nbytes)

    def scores(self, users: Float32Array) -> Float32Array:
        """float32[m, K rounded up to 64]: the scores of all clusters for m vectors; what fills up the last has 0.

        A row's scores do not depend on the other rows.
        """
        out = np.empty((users.shape[0], self._tiles.shape[0] * _TILE), np.float32)
        _score(users, self._tiles, self._scales, out)
        return out


@njit(nogil=True, cache=True)
def _score(users, tiles, scales, out):  # type: ignore[no-untyped-def]
    nothing = np.zeros(_TILE, np.float32)
    block = np.empty((users.shape[0], _TILE), np.float32)
    for t in range(tiles.shape[0]):
        multiply(users, tiles[t], nothing, block)
        for q in range(users.shape[0]):
            for c in range(_TILE):
                out[q, t * _TILE + c] = block[q, c] * scales[t * _TILE + c]


class Found:
    """What a merge found for a batch, query after query; it holds until the next one.

    Attributes:
        slots, clusters: int32[t].
        scores: float32[t], cluster score plus bias.
        offsets: int64[n + 1].
    """

    def __init__(self) -> None:
        self.slots, self.clusters = np.empty(0, np.int32), np.empty(0, np.int32)
        self.scores = np.empty(0, np.float32)
        self.offsets: Int64Array = np.zeros(1, np.int64)


class Merger:
    """Merges the lists of clusters; what it writes into is made once, and larger when a batch needs it.

    Args:
        lists: of the clusters.
        chunk: items of a list that are taken at once.
    """

    def __init__(self, lists: ClusterLists, chunk: int = CHUNK) -> None:
        self._lists, self._chunk = lists, chunk
        self._found = Found()
        self._passed = np.empty(lists.clusters, np.int32)
        self._starts, self._order = np.empty((0, 3), np.int32), np.empty((2, 0), np.uint64)
        # Clusters that a query has use for, for each chunk that is wanted.
        self._used = np.ones(1)

    def merge(self, scores: Float32Array, asked: BoolArray, most: int, excluded: RaggedRows) -> Found:
        """Return the first `most` items of the merged lists of each query that is asked.

        Args:
            scores: float32[m, K or more], of the queries that are asked, in order; finite.
            asked: bool[n], which of the batch these are.
            most: items per query.
            excluded: what each query of the batch forbids.
        """
        found = self._found
        needed = scores.shape[0] * most
        if needed > found.slots.size:
            found.slots, found.clusters = np.empty(needed, np.int32), np.empty(needed, np.int32)
            found.scores = np.empty(needed, np.float32)
        found.offsets = np.empty(asked.size + 1, np.int64)
        while True:
            arguments = (
                scores, asked, most, self._chunk, self._lists.heads, *self._lists.state, sealed(excluded.rows),
                excluded.offsets, self._used, self._passed, self._starts, self._order, found.slots, found.clusters,
                found.scores, found.offsets,
            )  # fmt: skip
            chunks = _merge(*arguments)
            if chunks <= len(self._starts):
                return found
            room = chunks * 5 // 4
            self._starts, self._order = np.empty((room, 3), np.int32), np.empty((2, room), np.uint64)


@njit(nogil=True, cache=True)
def _bound(keys, wanted, sample):  # type: ignore[no-untyped-def]
    """Return a number that about `wanted` clusters' keys reach; `_LOWEST`: all of them that have items."""
    step = max(1, keys.size // _SAMPLE)
    count = 0
    for k in range(0, keys.size, step):
        if keys[k] >= _LOWEST:
            sample[count] = keys[k]
            count += 1
    take = max(1, wanted // step)
    return bound_of(sample, count, take) if take < count else _LOWEST


@njit(nogil=True, cache=True)
def _merge(  # type: ignore[no-untyped-def]
    scores, asked, most, chunk, heads, offsets, rows, base_biases, touched, blocks, ints, floats,
    excluded, excluded_offsets, used, passed, starts, order, out_slots, out_clusters, out_scores, out_offsets,
):  # fmt: skip
    """Return how many chunks there is room needed for; only where there is as much is everything written."""
    clusters = heads.size
    column, pairs = base_biases.reshape(-1, 1), ints.reshape(-1, 2)
    sample, keys = np.empty(2 * _SAMPLE, np.float32), np.empty(clusters, np.float32)
    one = np.empty(1, np.float32)
    bits = one.view(np.uint32)
    longest = 0
    for q in range(asked.size):
        longest = max(longest, excluded_offsets[q + 1] - excluded_offsets[q])
    capacity = 2
    while capacity < 2 * longest:
        capacity *= 2
    mask = capacity - 1
    banned = np.empty(capacity, np.int32)
    m = 0
    written = 0
    out_offsets[0] = 0
    for q in range(asked.size):
        if not asked[q]:
            out_offsets[q + 1] = written
            continue
        forbids = excluded_offsets[q + 1] > excluded_offsets[q]
        if forbids:
            banned[:] = -1
            for p in range(excluded_offsets[q], excluded_offsets[q + 1]):
                at = spread(excluded[p]) & mask
                while banned[at] != -1 and banned[at] != excluded[p]:
                    at = (at + 1) & mask
                banned[at] = excluded[p]
        line = scores[m]
        m += 1
        whole = most // chunk + 1
        wanted = int(ENTER * used[0] * whole) + 16
        for k in range(clusters):
            keys[k] = line[k] + heads[k]
        count = reach = 0
        while True:
            bound = _bound(keys, wanted, sample)
            reach = reaching(keys, 0, clusters, bound, passed)
            # The lists lie anywhere in memory: all are on their way before the first is read.
            room = 0
            for i in range(reach):
                k = passed[i]
                if touched[k]:
                    room += (blocks[k, 1] + blocks[k, 2]) // chunk + 1
                    _ask(pairs, blocks[k, 0], 0)
                    _ask(pairs, blocks[k, 0] + blocks[k, 1], 0)
                else:
                    room += (offsets[k + 1] - offsets[k]) // chunk + 1
                    _ask(column, offsets[k], 0)
                    _ask(column, offsets[k] + 2 * chunk, 0)
            if room > starts.shape[0]:
                return room
            count = total = 0
            for i in range(reach):
                mine = np.int64(passed[i])
                score = line[mine]
                if (
                    touched[mine] and not forbids and blocks[mine, 1] == 0
                ):  # a short list, in one run without marks
                    begin, last = blocks[mine, 0], blocks[mine, 2]
                    for at in range(0, last, chunk):
                        one[0] = score + floats[2 * (begin + at) + 1] + np.float32(0)
                        if one[0] < bound:
                            break
                        starts[count, 0], starts[count, 1], starts[count, 2] = mine, 0, at
                        order[0, count] = ~sort_key(bits[0], count)
                        count += 1
                        total += min(chunk, last - at)
                    continue
                if touched[mine] or forbids:
                    count, total = _chunks(
                        mine, score, bound, chunk, offsets, rows, base_biases, touched, blocks, ints, floats, forbids,
                        banned, mask, starts, order[0], count, total, one, bits,
                    )  # fmt: skip
                    continue
                last = offsets[mine + 1]
                for at in range(offsets[mine], last, chunk):
                    one[0] = score + base_biases[at] + np.float32(0)  # -0 has no place of its own
                    if one[0] < bound:
                        break
                    starts[count, 0], starts[count, 1], starts[count, 2] = mine, at, 0
                    order[0, count] = ~sort_key(bits[0], count)
                    count += 1
                    total += min(chunk, last - at)
            if total >= most or bound == _LOWEST:
                break
            wanted *= 2
        line_of = order[sort_digits(order, count, 32)]
        end = written + most
        needed = 0
        for i in range(count):
            needed += 1
            place = np.int64(line_of[i] & np.uint64(0xFFFFFFFF))
            mine, here, beside = (
                np.int64(starts[place, 0]),
                np.int64(starts[place, 1]),
                np.int64(starts[place, 2]),
            )
            score = line[mine]
            if not touched[mine] and not forbids:
                few = min(chunk, offsets[mine + 1] - here, end - written)
                for j in range(few):
                    out_slots[written + j], out_clusters[written + j] = here + j, mine
                    out_scores[written + j] = score + base_biases[here + j]
                written += few
            elif touched[mine] and not forbids and blocks[mine, 1] == 0:
                begin = blocks[mine, 0] + beside
                few = min(chunk, blocks[mine, 2] - beside, end - written)
                for j in range(few):
                    out_slots[written + j], out_clusters[written + j] = ints[2 * (begin + j)], mine
                    out_scores[written + j] = score + floats[2 * (begin + j) + 1]
                written += few
            else:
                taken = 0
                while taken < chunk and written < end:
                    slot, bias, here, beside, from_list = _next(
                        mine, here, beside, offsets, rows, base_biases, touched, blocks, ints, floats
                    )
                    if slot < 0:
                        break
                    if not (forbids and _is_in(banned, mask, row_at(slot, rows))):
                        out_slots[written], out_clusters[written], out_scores[written] = (
                            slot,
                            mine,
                            score + bias,
                        )
                        written += 1
                        taken += 1
                    if from_list:
                        here += 1
                    else:
                        beside += 1
            if written == end:
                break
        if count:
            used[0] += (np.float64(reach) * needed / count / whole - used[0]) / 8
        out_offsets[q + 1] = written
    return 0


@njit(nogil=True, cache=True, inline="always")
def _next(k, at, beside, offsets, rows, base_biases, touched, blocks, ints, floats):  # type: ignore[no-untyped-def]
    """As `next_entry`, of a cluster that may have no block: then `at` is a slot."""
    if touched[k]:
        return next_entry(at, beside, blocks[k], ints, floats, rows)
    if at < offsets[k + 1]:
        return np.int64(at), base_biases[at], at, beside, True
    return np.int64(-1), np.float32(0), at, beside, True


@njit(nogil=True, cache=True)
def _chunks(  # type: ignore[no-untyped-def]
    k, score, bound, chunk, offsets, rows, base_biases, touched, blocks, ints, floats, forbids, banned, mask, starts,
    order, count, total, one, bits,
):  # fmt: skip
    """Add the chunks of a cluster whose keys reach the bound; return chunks and items there are with them.

    One that the bound cuts off may be counted with fewer items than it has.
    """
    at, beside = np.int64(0) if touched[k] else offsets[k], np.int64(0)
    taken = 0
    while True:
        slot, bias, at, beside, from_list = _next(
            k, at, beside, offsets, rows, base_biases, touched, blocks, ints, floats
        )
        if slot < 0:
            return count, total
        if not (forbids and _is_in(banned, mask, row_at(slot, rows))):
            if taken % chunk == 0:
                one[0] = score + bias + np.float32(0)
                if one[0] < bound:
                    return count, total
                starts[count, 0], starts[count, 1], starts[count, 2] = k, at, beside
                order[count] = ~sort_key(bits[0], count)
                count += 1
            taken += 1
            total += 1
        if from_list:
            at += 1
        else:
            beside += 1


@njit(nogil=True, cache=True)
def _is_in(table, mask, row):  # type: ignore[no-untyped-def]
    at = spread(row) & mask
    while table[at] != -1 and table[at] != row:
        at = (at + 1) & mask
    return table[at] == row


def merge_reference(
    scores: Float32Array, lists: Sequence[Sequence[tuple[int, float]]], most: int, chunk: int = CHUNK
) -> list[tuple[int, int, float]]:
    """The plain twin of `Merger.merge`, of one query: (row, cluster, key) in order, all clusters in the heap at once.

    Args:
        scores: float32[K].
        lists: per cluster (row, bias), best first, without what is masked.
        most, chunk: as of `Merger`.
    """

    def key(k: int, at: int) -> float:
        return float(np.float32(scores[k]) + np.float32(lists[k][at][1]))

    heap = [(-key(k, 0), k, 0) for k in range(len(lists)) if lists[k]]
    heapq.heapify(heap)
    found: list[tuple[int, int, float]] = []
    while heap and len(found) < most:
        _, k, at = heapq.heappop(heap)
        until = min(at + chunk, len(lists[k]))
        found += [(lists[k][place][0], k, key(k, place)) for place in range(at, until)]
        if until < len(lists[k]):
            heapq.heappush(heap, (-key(k, until), k, until))
    return found[:most]


def sort_reference(
    scores: Float32Array, lists: Sequence[Sequence[tuple[int, float]]], most: int
) -> list[tuple[int, int, float]]:
    """What the merge stands in for: the items of all clusters sorted; the same as the merge in chunks of 1."""
    keys = [
        (-float(np.float32(scores[k]) + np.float32(bias)), k, at, row)
        for k, mine in enumerate(lists)
        for at, (row, bias) in enumerate(mine)
    ]
    return [(row, k, -key) for key, k, _, row in sorted(keys)[:most]]
