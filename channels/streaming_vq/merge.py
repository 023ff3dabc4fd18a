"""From the clusters' scores to the items that the ranking step reads: a merge of all lists, in chunks. Compiled.

Source: Bin et al. 2025 (arXiv 2501.08695), section 3.4 and appendix A. An item's key is the score of its cluster plus its
bias. A max-heap holds the lists by the keys of their heads; of the list on top a whole chunk is taken, then it goes back
with the key of what is its head now.

Where this does more than the paper says:

- Most of the clusters never come to the top, so not all are put into the heap: only those whose head's key is at least a
  bound, drawn from a sample so that about `ENTER` times as many pass as are popped. All others stand below the bound, so
  that popping is exact while the top is not below it; where it is, the bound falls and the next ones enter.
- What a request excludes is stepped over as though it were in no list, and a chunk is 8 of the others. The key by which a
  list entered may be that of such an item, and too high: then the list goes back with its true one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numba import njit

from channels.streaming_vq.lists import ClusterLists, next_entry, row_at, sealed
from engine.ann.kernels import bits_of, prefetch
from engine.core.hashing import spread
from engine.core.select import row_of, select_top, sort_key
from engine.core.types import BoolArray, Float32Array, Int64Array, RaggedRows

CHUNK = 8
"""Items of a list that are taken at once (appendix A)."""

ENTER = 1.5
"""Clusters that enter the heap at first, for each chunk of the list that is wanted."""

_SAMPLE = 512
"""Clusters that the bound is estimated from."""

_LOWEST = np.float32(np.finfo(np.float32).min)
"""A bound that all clusters reach but those without items, whose heads are -inf."""

_TILE = 64
"""Clusters whose products are made together: their vectors stay in the nearest cache for all queries of a batch."""


class Scorer:
    """The clusters' scores u . e_k.

    Args:
        vectors: float32[K, d], copied.
    """

    def __init__(self, vectors: Float32Array) -> None:
        clusters, width = vectors.shape
        padded = np.zeros((-(-clusters // _TILE) * _TILE, width), np.float32)
        padded[:clusters] = vectors
        self._tiles = sealed(np.ascontiguousarray(padded.reshape(-1, _TILE, width).transpose(0, 2, 1)))

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return int(self._tiles.nbytes)

    def scores(self, users: Float32Array) -> Float32Array:
        """float32[m, K rounded up to 64]: the scores of all clusters for m vectors; what fills up the last has 0.

        A row's scores do not depend on the other rows.
        """
        out = np.empty((users.shape[0], self._tiles.shape[0] * _TILE), np.float32)
        _score(users, self._tiles, out)
        return out


@njit(nogil=True, cache=True, fastmath={"contract"})
def _score_tile(user, tile, y):  # type: ignore[no-untyped-def]
    """Set y = user tile. Products and sums are fused, the same way for every query: there is one form of this loop."""
    terms, width = tile.shape
    for c in range(width):
        y[c] = np.float32(0)
    whole = terms - terms % 8
    for k in range(0, whole, 8):
        w0, w1, w2, w3 = tile[k], tile[k + 1], tile[k + 2], tile[k + 3]
        w4, w5, w6, w7 = tile[k + 4], tile[k + 5], tile[k + 6], tile[k + 7]
        a0, a1, a2, a3 = user[k], user[k + 1], user[k + 2], user[k + 3]
        a4, a5, a6, a7 = user[k + 4], user[k + 5], user[k + 6], user[k + 7]
        for c in range(_TILE):
            y[c] = (
                y[c] + a0 * w0[c] + a1 * w1[c] + a2 * w2[c] + a3 * w3[c] + a4 * w4[c] + a5 * w5[c] + a6 * w6[c]
                + a7 * w7[c]
            )  # fmt: skip
    for k in range(whole, terms):
        w0, a0 = tile[k], user[k]
        for c in range(_TILE):
            y[c] += a0 * w0[c]


@njit(nogil=True, cache=True)
def _score(users, tiles, out):  # type: ignore[no-untyped-def]
    for t in range(tiles.shape[0]):
        for q in range(users.shape[0]):
            _score_tile(users[q], tiles[t], out[q, t * _TILE : (t + 1) * _TILE])


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
        self._cursors = np.empty((lists.clusters, 2), np.int32)
        self._heap = np.empty(lists.clusters + 1, np.uint64)

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
        arguments = (
            scores, asked, most, self._chunk, self._lists.heads, *self._lists.state, sealed(excluded.rows),
            excluded.offsets, self._cursors, self._heap, found.slots, found.clusters, found.scores, found.offsets,
        )  # fmt: skip
        _merge(*arguments)
        return found


@njit(nogil=True, cache=True)
def _sift(heap, count, at):  # type: ignore[no-untyped-def]
    """Let the entry at a place of a max-heap of `count` sink to where it belongs."""
    key = heap[at]
    heap[count] = np.uint64(0)  # so that the last one's missing sibling is the lesser
    child = 2 * at + 1
    while child < count:
        child += np.int64(heap[child + 1] > heap[child])  # no branch: nobody could guess it
        if heap[child] <= key:
            break
        heap[at] = heap[child]
        at = child
        child = 2 * at + 1
    heap[at] = key


@njit(nogil=True, cache=True)
def _bound(line, heads, wanted, sample, one, bits):  # type: ignore[no-untyped-def]
    """Return a number that about `wanted` clusters' keys reach; `_LOWEST`: all of them that have items."""
    clusters = heads.size
    if wanted >= clusters:
        return _LOWEST
    step = max(1, clusters // _SAMPLE)
    count = 0
    for k in range(0, clusters, step):
        one[0] = line[k] + heads[k]
        sample[count] = sort_key(bits[0], 0)
        count += 1
    take = max(1, wanted // step)
    if take >= count:
        return _LOWEST
    select_top(sample, count, take)
    bits[0] = bits_of(sample[take - 1])
    return one[0]


@njit(nogil=True, cache=True)
def _merge(  # type: ignore[no-untyped-def]
    scores, asked, most, chunk, heads, offsets, rows, base_biases, touched, blocks, ints, floats,
    excluded, excluded_offsets, cursors, heap, out_slots, out_clusters, out_scores, out_offsets,
):  # fmt: skip
    clusters = heads.size
    column, pairs = base_biases.reshape(-1, 1), ints.reshape(-1, 2)
    sample = np.empty(2 * _SAMPLE, np.uint64)
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
        wanted = int(ENTER * (most // chunk + 1)) + 16
        bound, entered = np.float32(np.inf), False
        count = 0
        end = written + most
        while written < end:
            one[0] = np.float32(0)
            if count:
                bits[0] = bits_of(heap[0])
            if not entered or ((count == 0 or one[0] < bound) and bound > _LOWEST):
                above = bound
                bound = _bound(line, heads, wanted, sample, one, bits)
                if entered and not bound < above:
                    bound = _LOWEST
                wanted *= 4
                entered = True
                for k in range(clusters):
                    key = line[k] + heads[k]
                    if key >= bound and key < above:
                        one[0] = key
                        heap[count] = sort_key(bits[0], k)
                        cursors[k, 0] = cursors[k, 1] = 0
                        count += 1
                        # Its first chunk is on its way while the others enter.
                        if touched[k]:
                            prefetch(pairs, blocks[k, 0], 0)  # type: ignore[call-arg]
                            prefetch(pairs, blocks[k, 0] + blocks[k, 1], 0)
                        else:
                            prefetch(column, offsets[k], 0)  # type: ignore[call-arg]
                for at in range(count // 2 - 1, -1, -1):
                    _sift(heap, count, at)
                continue
            if count == 0:
                break
            top = heap[0]
            mine = np.int64(row_of(top))
            score = line[mine]
            taken = 0
            key = np.uint64(0)
            if not touched[mine]:
                at, last = offsets[mine] + cursors[mine, 0], offsets[mine + 1]
                while at < last:
                    if not (forbids and _is_in(banned, mask, rows[at])):
                        one[0] = score + base_biases[at]
                        if taken == 0 or taken == chunk:
                            key = sort_key(bits[0], mine)
                            if taken == chunk or key < top:
                                break
                        out_slots[written], out_clusters[written], out_scores[written] = at, mine, one[0]
                        written += 1
                        taken += 1
                        if written == end:
                            break
                    at += 1
                cursors[mine, 0] = at - offsets[mine]
                there = at < last
            elif blocks[mine, 1] == 0:
                at, last = blocks[mine, 0] + cursors[mine, 0], blocks[mine, 0] + blocks[mine, 2]
                while at < last:
                    slot = ints[2 * at]
                    if not (forbids and _is_in(banned, mask, row_at(slot, rows))):
                        one[0] = score + floats[2 * at + 1]
                        if taken == 0 or taken == chunk:
                            key = sort_key(bits[0], mine)
                            if taken == chunk or key < top:
                                break
                        out_slots[written], out_clusters[written], out_scores[written] = slot, mine, one[0]
                        written += 1
                        taken += 1
                        if written == end:
                            break
                    at += 1
                cursors[mine, 0] = at - blocks[mine, 0]
                there = at < last
            else:
                at, beside = np.int64(cursors[mine, 0]), np.int64(cursors[mine, 1])
                there = False
                while True:
                    slot, bias, at, beside, from_list = next_entry(
                        at, beside, blocks[mine], ints, floats, rows
                    )
                    if slot < 0:
                        break
                    if not (forbids and _is_in(banned, mask, row_at(slot, rows))):
                        one[0] = score + bias
                        if taken == 0 or taken == chunk:
                            key = sort_key(bits[0], mine)
                            if taken == chunk or key < top:
                                there = True
                                break
                        out_slots[written], out_clusters[written], out_scores[written] = slot, mine, one[0]
                        written += 1
                        taken += 1
                        if written == end:
                            break
                    if from_list:
                        at += 1
                    else:
                        beside += 1
                cursors[mine, 0], cursors[mine, 1] = at, beside
            if there:
                heap[0] = key
            else:
                count -= 1
                heap[0] = heap[count]
            if count:
                _sift(heap, count, 0)
        out_offsets[q + 1] = written


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
