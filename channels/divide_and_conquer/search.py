"""The clusters while serving: an index each, which cluster every item is in, and what a query passes over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from engine.ann import VectorIndex
from engine.core.types import BoolArray, Float32Array, Int32Array, Int64Array, RaggedRows


class ClusterSearch:
    """Indexes of the clusters; row r of the catalogue is vector `local` of its cluster's.

    Args:
        indexes: one per cluster, its items in order of their rows.
        clusters: int32[items].
        centres: float32[clusters, d], the mean direction of each cluster's vectors.

    Attributes:
        room: int64[clusters], items of each that may be recalled.
    """

    def __init__(self, indexes: Sequence[VectorIndex], clusters: Int32Array, centres: Float32Array) -> None:
        self._indexes = list(indexes)
        self._centres = centres
        self._clusters = np.array(clusters, np.int32)
        self._members = [np.flatnonzero(clusters == c).astype(np.int32) for c in range(len(indexes))]
        self._local = np.empty(clusters.size, np.int32)
        for members in self._members:
            self._local[members] = np.arange(members.size, dtype=np.int32)
        self.room: Int64Array = np.array([members.size for members in self._members], np.int64)
        self._forbidden: list[BoolArray | None] = [None] * len(self._indexes)
        self._open = self._clusters.copy()  # -1 where the item may not be recalled
        self._marks = np.zeros(self._open.size, np.bool_)

    def allow(self, available: BoolArray) -> None:
        """Take note of which rows of the catalogue may be recalled: bool[rows]."""
        for c, members in enumerate(self._members):
            mine = available[members]
            self._forbidden[c] = None if mine.all() else ~mine
            self.room[c] = np.count_nonzero(mine)
        self._open = np.where(
            available[: self._clusters.size], self._clusters[: available.size], np.int32(-1)
        )
        self._marks = np.zeros(self._open.size, np.bool_)

    def pass_over(self, lists: tuple[RaggedRows, RaggedRows]) -> tuple[RaggedRows, Int64Array]:
        """Return what each query may not have of the rows of two lists, each once; and what that leaves.

        Args:
            lists: rows per query, in any order, of the catalogue or beyond it.

        Returns:
            The rows, and int64[n, clusters]: items of each cluster that a query may still have.
        """
        one, other = lists
        rows = np.empty(one.rows.size + other.rows.size, np.int32)
        offsets = np.zeros(one.offsets.size, np.int64)
        room = np.repeat(self.room[None], offsets.size - 1, 0)
        passed(one.rows, one.offsets, other.rows, other.offsets, self._open, self._marks, rows, offsets, room)
        return RaggedRows(rows[: offsets[-1]], offsets), room

    def add(self, rows: Int32Array, vectors: Float32Array) -> None:
        """Take vectors of rows: one that is in a cluster stays there, a new one goes where the centre is nearest.

        Nearness is the cosine between vector and centre. `allow` must be told again.
        """
        self._grow(int(rows.max(initial=-1)) + 1)
        clusters = self._clusters[rows]
        fresh = np.flatnonzero(clusters < 0)
        clusters[fresh] = (vectors[fresh] @ self._centres.T).argmax(1)
        self._clusters[rows] = clusters
        for c in np.flatnonzero(np.bincount(clusters, minlength=len(self._indexes))).tolist():
            new = rows[fresh[clusters[fresh] == c]]
            self._local[new] = self._members[c].size + np.arange(new.size, dtype=np.int32)
            self._members[c] = np.concatenate([self._members[c], new])
            mine = np.flatnonzero(clusters == c)
            self._indexes[c].add(self._local[rows[mine]], np.ascontiguousarray(vectors[mine]))

    def find(
        self,
        vectors: Float32Array,
        pairs: Int64Array,
        quotas: Int32Array,
        begins: Int64Array,
        without: RaggedRows,
    ) -> tuple[Int32Array, Int32Array]:
        """Search every cluster for the queries that have a quota there.

        Args:
            vectors: float32[m, d], a query vector per pair.
            pairs: int64[m], query * clusters + cluster, rising.
            quotas: int32[n, clusters], above 0 for these pairs.
            begins: int64[n * clusters + 1], where the answer of each pair begins.
            without: what each query passes over, as `pass_over` returned it.

        Returns:
            int32[sum of quotas] rows, best first per pair, and int32[n, clusters], how many of its places each filled.
        """
        found = np.empty(int(begins[-1]), np.int32)
        counts = np.zeros(quotas.size, np.int32)
        of, wanted = pairs % len(self._indexes), quotas.ravel()[pairs]
        n = len(quotas)
        passed_rows = np.empty(without.rows.size, np.int32)
        passed_at = np.zeros(quotas.size + 1, np.int64)
        by_cluster(without.rows, without.offsets, self._open, self._local, quotas, passed_rows, passed_at)
        for c, (index, members) in enumerate(zip(self._indexes, self._members, strict=True)):
            mine = np.flatnonzero(of == c)
            if mine.size == 0:
                continue
            # The pairs of a cluster without a quota have empty lists, so that each list ends where the next one begins.
            ends = np.append(c * n + pairs[mine] // len(self._indexes), (c + 1) * n)
            lists = RaggedRows(passed_rows, passed_at[ends])
            rows, _ = index.search_masked(vectors[mine], wanted[mine], self._forbidden[c], lists)
            got = rows >= 0
            counts[pairs[mine]] = got.sum(1)
            at = begins[pairs[mine]][:, None] + np.arange(rows.shape[1])
            found[at[got]] = members[rows[got]]
        return found, counts.reshape(quotas.shape)

    def _grow(self, rows: int) -> None:
        more = rows - self._clusters.size
        if more > 0:
            more = max(more, self._clusters.size // 4)
            nothing = np.full(more, -1, np.int32)
            self._clusters = np.concatenate([self._clusters, nothing])
            self._local = np.concatenate([self._local, nothing])


@njit(nogil=True, cache=True)
def passed(rows, offsets, others, other_offsets, clusters, marks, found, found_offsets, room):  # type: ignore[no-untyped-def]
    """Write each query's rows of two lists that are in a cluster, each once, and take them off the cluster's room.

    Args:
        rows, offsets: int32[a], int64[n + 1].
        others, other_offsets: int32[b], int64[n + 1].
        clusters: int32[items], -1 for what is not recalled anyway.
        marks: bool[items], all False, and left so.
        found: int32[a + b], filled; found_offsets: int64[n + 1], filled but for the 0 at its front.
        room: int64[n, clusters], changed.
    """
    at = 0
    for q in range(room.shape[0]):
        begin = at
        for p in range(offsets[q], offsets[q + 1]):
            at = _pass(rows[p], clusters, marks, found, at, room[q])
        for p in range(other_offsets[q], other_offsets[q + 1]):
            at = _pass(others[p], clusters, marks, found, at, room[q])
        for p in range(begin, at):
            marks[found[p]] = False
        found_offsets[q + 1] = at


@njit(nogil=True, cache=True, inline="always")
def _pass(row, clusters, marks, found, at, room):  # type: ignore[no-untyped-def]
    if row < 0 or row >= clusters.size or clusters[row] < 0 or marks[row]:
        return at
    marks[row] = True
    found[at] = row
    room[clusters[row]] -= 1
    return at + 1


@njit(nogil=True, cache=True)
def by_cluster(rows, offsets, clusters, local, quotas, found, found_offsets):  # type: ignore[no-untyped-def]
    """Write the number within its cluster of every row, cluster by cluster, where the query has a quota in the cluster.

    Args:
        rows, offsets: int32[m], int64[n + 1].
        clusters, local: int32[items].
        quotas: int32[n, clusters].
        found: int32[m], filled: those of query q and cluster c from found_offsets[c * n + q] on.
        found_offsets: int64[clusters * n + 1], zeros.
    """
    n = quotas.shape[0]
    for q in range(n):
        for p in range(offsets[q], offsets[q + 1]):
            c = clusters[rows[p]]
            if quotas[q, c] > 0:
                found_offsets[c * n + q + 1] += 1
    for pair in range(found_offsets.size - 1):
        found_offsets[pair + 1] += found_offsets[pair]
    places = found_offsets.copy()
    for q in range(n):
        for p in range(offsets[q], offsets[q + 1]):
            c = clusters[rows[p]]
            if quotas[q, c] > 0:
                found[places[c * n + q]] = local[rows[p]]
                places[c * n + q] += 1


def pass_over_reference(
    lists: Sequence[Sequence[int]], clusters: Int32Array, room: Int64Array
) -> tuple[set[int], list[int]]:
    """The plain twin of `passed` for one query: the rows, and what is left of room int64[clusters]."""
    rows = {row for each in lists for row in each if 0 <= row < clusters.size and clusters[row] >= 0}
    left = room.tolist()
    for row in rows:
        left[clusters[row]] -= 1
    return rows, left


def by_cluster_reference(
    lists: Sequence[Sequence[int]], clusters: Int32Array, local: Int32Array, quotas: Int32Array
) -> list[list[int]]:
    """The plain twin of `by_cluster`: per cluster and query its list."""
    return [
        [int(local[row]) for row in mine if clusters[row] == c and quotas[q, c] > 0]
        for c in range(quotas.shape[1])
        for q, mine in enumerate(lists)
    ]
