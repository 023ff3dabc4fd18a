"""The clusters while serving: an index each, and which cluster every item is in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.ann import VectorIndex
from engine.core.types import BoolArray, Float32Array, Int32Array, Int64Array


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

    def allow(self, available: BoolArray) -> None:
        """Take note of which rows of the catalogue may be recalled: bool[rows]."""
        for c, members in enumerate(self._members):
            mine = available[members]
            self._forbidden[c] = None if mine.all() else ~mine
            self.room[c] = np.count_nonzero(mine)

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
        self, vectors: Float32Array, pairs: Int64Array, quotas: Int32Array, begins: Int64Array
    ) -> tuple[Int32Array, Int32Array]:
        """Search every cluster for the queries that have a quota there.

        Args:
            vectors: float32[m, d], a query vector per pair.
            pairs: int64[m], query * clusters + cluster, rising.
            quotas: int32[n, clusters], above 0 for these pairs.
            begins: int64[n * clusters + 1], where the answer of each pair begins.

        Returns:
            int32[sum of quotas] rows, best first per pair, and int32[n, clusters], how many of its places each filled.
        """
        found = np.empty(int(begins[-1]), np.int32)
        counts = np.zeros(quotas.size, np.int32)
        of, wanted = pairs % len(self._indexes), quotas.ravel()[pairs]
        for c, (index, members) in enumerate(zip(self._indexes, self._members, strict=True)):
            mine = np.flatnonzero(of == c)
            if mine.size == 0:
                continue
            rows, _ = index.search_masked(vectors[mine], wanted[mine], self._forbidden[c])
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
