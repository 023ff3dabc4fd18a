"""The clusters of streaming VQ as the means of the items that are in them now.

By the paper a cluster is a moving average of what came (`engine/models/codebook.py`, eq. 7 to 9 and 12). That average
still has in it what left the cluster, and each item as it was when it came: with few items a cluster, in a model that
moves as fast as one pass over a stream needs, e stands where its items were. Here each item has one part in the average
of its cluster, which it takes along when it moves and which is written anew whenever the item is looked at:

    w_k = sum a_j v_j,  c_k = sum a_j  over the items in k,  a_j = (1 + h_j)^eta delta_j^(beta - 1)

v_j as it was last seen by either stream. a_j is what the paper's average gives the item in the long run: each occurrence
counts (1 + h)^eta delta^beta, and there are 1 / delta of them an impression. docs/benchmarks.md has what it is worth.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numba import njit

from engine.core.types import AnyArray, Float32Array, Float64Array, Int32Array
from engine.models.codebook import Codebook


class Members:
    """What each item adds to its cluster.

    Attributes:
        sums, counts: float64[K, d] and float64[K], w and c.
        vectors: float32[n, d], v as it was last seen.
        weights: float64[n], a; 0: it is in no cluster.
        clusters: int32[n], where; -1: nowhere.
        rewards: float64[n], the moving mean of (1 + h)^eta; 0: not shown yet.
    """

    def __init__(self, items: int, clusters: int, dimension: int) -> None:
        self.sums, self.counts = np.zeros((clusters, dimension)), np.zeros(clusters)
        self.vectors = np.zeros((items, dimension), np.float32)
        self.weights, self.rewards = np.zeros(items), np.zeros(items)
        self.clusters = np.full(items, -1, np.int32)

    def begin(self, codebook: Codebook, assignment: Int32Array) -> None:
        """Take over clusters of which only w and c are known.

        Until an item is looked at it stands where its cluster does, with an even share of its c: so the clusters are
        where they were, and become the means of their items one item at a time.

        Args:
            codebook: of w and c.
            assignment: int32[n], -1 for none.
        """
        placed = np.flatnonzero(assignment >= 0)
        mine = assignment[placed]
        self.clusters[placed], self.vectors[placed] = mine, codebook.vectors[mine]
        self.weights[placed] = (codebook.counts / np.maximum(codebook.sizes, 1))[mine]
        self.counts = np.bincount(mine, self.weights[placed], len(codebook)).astype(np.float64)
        self.sums = self.counts[:, None] * codebook.vectors

    def reward(self, rows: Int32Array, counted: Float32Array, rate: float) -> None:
        """Take in impressions: int32[n] items, float32[n] (1 + h)^eta; `rate`: weight of the newest."""
        follow(rows, counted, rate, self.rewards)

    def put(
        self,
        rows: Int32Array,
        clusters: Int32Array,
        vectors: Float32Array,
        rates: Float64Array,
        codebook: Codebook,
    ) -> None:
        """Give items their parts where they are now, and set the clusters to their means.

        Args:
            rows, clusters: int32[n], distinct items.
            vectors: float32[n, d].
            rates: float64[n], delta^(beta - 1).
            codebook: of the clusters.
        """
        weights = rates * np.maximum(self.rewards[rows], 1.0)
        exchange(
            rows, clusters, np.ascontiguousarray(vectors), weights,
            self.sums, self.counts, self.vectors, self.weights, self.clusters,
        )  # fmt: skip
        codebook.stand(self.sums, self.counts)

    def grow(self, items: int) -> None:
        """Make room for items published since; there are `items` now."""
        more = items - self.clusters.size
        self.vectors = np.concatenate((self.vectors, np.zeros((more, self.vectors.shape[1]), np.float32)))
        self.weights = np.concatenate((self.weights, np.zeros(more)))
        self.rewards = np.concatenate((self.rewards, np.zeros(more)))
        self.clusters = np.concatenate((self.clusters, np.full(more, -1, np.int32)))

    def state(self) -> dict[str, AnyArray]:
        """Return what `load` takes: the arrays themselves."""
        return {
            "sums": self.sums, "counts": self.counts, "vectors": self.vectors, "weights": self.weights,
            "clusters": self.clusters, "rewards": self.rewards,
        }  # fmt: skip

    def load(self, state: Mapping[str, AnyArray]) -> None:
        """Go on from a state, whose arrays become its own; KeyError where one is missing."""
        self.sums, self.counts = state["sums"], state["counts"]
        self.vectors, self.weights = state["vectors"], state["weights"]
        self.clusters, self.rewards = state["clusters"], state["rewards"]


@njit(nogil=True, cache=True)
def follow(rows, counted, rate, means):  # type: ignore[no-untyped-def]
    """Move float64[items] means, 0 for none yet, by float32[n] values of int32[n] items, in their order."""
    for i in range(rows.size):
        row, value = rows[i], float(counted[i])
        means[row] = value if means[row] == 0.0 else means[row] + rate * (value - means[row])


@njit(nogil=True, cache=True)
def exchange(rows, clusters, vectors, weights, sums, counts, held, shares, places):  # type: ignore[no-untyped-def]
    """Take the parts of items out of the sums where they are and add what they are now.

    Args:
        rows, clusters: int32[n]; vectors: float32[n, d]; weights: float64[n].
        sums, counts, held, shares, places: `Members.sums`, `counts`, `vectors`, `weights` and `clusters`, written.
    """
    dimension = sums.shape[1]
    for i in range(rows.size):
        row, new, weight = rows[i], clusters[i], weights[i]
        old, share = places[row], shares[row]
        if old >= 0:
            counts[old] -= share
            for j in range(dimension):
                sums[old, j] -= share * held[row, j]
        counts[new] += weight
        for j in range(dimension):
            held[row, j] = vectors[i, j]
            sums[new, j] += weight * vectors[i, j]
        places[row], shares[row] = new, weight
