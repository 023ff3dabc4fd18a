"""The clusters of streaming VQ: which one an item is nearest to, and how they follow their items.

Source: Bin et al. 2025, "Real-time Indexing for Large-scale Recommendation by Streaming Vector Quantization Retriever",
sections 3.3 and 3.6. Of cluster k are kept w_k, a moving sum of its items' vectors, and c_k, the same of their weights;
its vector is e_k = w_k / c_k (eq. 9). An occurrence of item j counts

    weight_j = prod_p (1 + h_jp)^eta_p * delta_j^beta                                                  (eq. 12 and 13)

h_jp its rewards, delta_j the interval between its occurrences. An item goes to the cluster with the least

    ||e_k - v|| * r_k,   r_k = min(s * c_k / mean(c), 1)                                 (eq. 10, disturbance)

so that clusters with few items seem nearer, and dead ones come to life by themselves.

Where this deviates:

- c counts impressions, and the disturbance only draws items to clusters that get few. Neither keeps a cluster from
  holding too many items: those that hardly anybody has seen lie close together, where vectors begin, and by the paper's
  rules they are one cluster (docs/benchmarks.md has the numbers; of the paper's billion items each has been seen). So r_k
  is multiplied by max(n_k / mean(n), 1)^`crowding`, n_k the items that are in the cluster now: a cluster that has more
  than its part seems farther. That is the count in the distance of frequency-sensitive competitive learning (Ahalt et al.
  1990), of items, not of wins, and above the mean only. n follows items as they move, a few at a time (`ROUND`): looked
  at less often, whole clusters swing from one place to another and back, and a cluster that seems near takes all of a
  round.
- With it r of eq. 10 does not fall below `NEAREST`. The candidate stream moves no counter, so that a cluster that counts
  next to nothing would be the nearest of all to each item in turn, from wherever it comes, and crowded or not.
- w and c need not be moving averages: a trainer may say what they are (`Codebook.stand`, `engine/training/members.py`).

Where the paper leaves room:

- A step of the moving averages is a batch, as in VQ-VAE: all items of a batch are assigned by the codebook as it stands,
  then w_k = alpha w_k + (1 - alpha) sum_j weight_j v_j over the batch's occurrences in k, for every k; c_k likewise. The
  clusters without an item in the batch keep their vectors and lose weight, which is what the disturbance looks at.
- A counter does not fall below `FLOOR` of the mean, at which the discount is already all but 0.
- Of equally near clusters the one with the lowest number is taken.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
from numba import njit

from engine.core.errors import ConfigError, SnapshotError
from engine.core.types import Float32Array, Float64Array, Int32Array, Int64Array

BLOCK = 512
"""Clusters whose products are made at once: with `ROWS` rows of them they stay in the nearest cache."""

ROWS = 64
"""Vectors that are compared at once; a multiple of `TERMS`."""

TERMS = 4
"""Rows, and terms of the sums, that `products` takes at once."""

ROUND = 16
"""Items that are put into clusters between two looks at how many each has: one for so many clusters."""

LEAST_ROUND = 16
"""The same, at least."""

NEAREST = 0.2
"""With `crowding`: a cluster that counts little seems so much nearer, at most."""

FLOOR = 1e-6
"""Least counter of a cluster, as a part of the mean counter."""


class Codebook:
    """K clusters, kept by moving averages.

    Attributes:
        sums: float32[K, d], w.
        counts: float32[K], c, above 0.
        vectors: float32[K, d], e; written anew by `update`.
        sizes: int64[K], n, the items in each; kept by `place`.
        decay: alpha.
        boost: s of the disturbance; 0: there is none.
        crowding: how much farther a cluster seems that has more items than the mean; 0: it seems where it is.
    """

    def __init__(
        self,
        sums: Float32Array,
        counts: Float32Array,
        decay: float = 0.99,
        boost: float = 5.0,
        crowding: float = 0.0,
        sizes: Int64Array | None = None,
    ) -> None:
        """Take over w and c, copied.

        Args:
            sums, counts, decay, boost, crowding: as the attributes.
            sizes: int64[K], copied; None: nothing is in a cluster.

        Raises:
            ConfigError: `decay` is not inside (0, 1), or `boost` or `crowding` is below 0.
            SnapshotError: the arrays do not fit each other, or a counter is not above 0.
        """
        if not 0 < decay < 1:
            raise ConfigError(f"a moving average keeps between 0 and 1 of what it was, not {decay}", "decay")
        if not boost >= 0:
            raise ConfigError(f"must be 0 or more, not {boost}", "boost")
        if not crowding >= 0:
            raise ConfigError(f"must be 0 or more, not {crowding}", "crowding")
        if sums.ndim != 2 or not sums.shape[0] or counts.shape != sums.shape[:1]:
            raise SnapshotError(
                f"is {list(counts.shape)} beside sums of {list(sums.shape)}", "codebook.counts"
            )
        if not (np.isfinite(sums).all() and np.isfinite(counts).all() and counts.min() > 0):
            raise SnapshotError("has a sum or a counter that is no number, or a counter of 0", "codebook")
        self.sums = np.array(sums, np.float32, order="C")
        self.counts = np.array(counts, np.float32)
        self.decay, self.boost, self.crowding = decay, boost, crowding
        self.sizes = np.zeros(counts.size, np.int64) if sizes is None else np.array(sizes, np.int64)
        clusters, dimension = self.sums.shape
        blocks = -(-clusters // BLOCK)
        self.vectors = np.empty_like(self.sums)
        # The vectors once more, transposed and in blocks, as the products read them; what fills up the last is far away.
        self._blocks = np.zeros((blocks, -(-dimension // TERMS) * TERMS, BLOCK), np.float32)
        self._halves = np.full((blocks, BLOCK), -np.inf, np.float32)
        self._discounts = np.ones((blocks, BLOCK), np.float32)
        self._renew()

    @classmethod
    def at(
        cls, vectors: Float32Array, decay: float = 0.99, boost: float = 5.0, crowding: float = 0.0
    ) -> Self:
        """Return clusters that stand at float32[K, d], all of the same weight, without items."""
        return cls(vectors, np.ones(vectors.shape[0], np.float32), decay, boost, crowding)

    def __len__(self) -> int:
        return int(self.counts.size)

    def assign(
        self, vectors: Float32Array, pool: ThreadPoolExecutor | None = None, threads: int = 1
    ) -> Int32Array:
        """Return int32[n]: the cluster of each vector.

        A row's answer depends on no other row and not on `threads`.

        Args:
            vectors: float32[n, d].
            pool, threads: where the rows are shared out; None: here.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        chosen = np.empty(vectors.shape[0], np.int32)
        lanes = 1 if pool is None else max(1, min(threads, vectors.shape[0] // ROWS))
        bounds = [vectors.shape[0] * lane // lanes for lane in range(lanes + 1)]

        def lane(at: int) -> None:
            part = slice(bounds[at], bounds[at + 1])
            nearest(vectors[part], self._blocks, self._halves, self._discounts, chosen[part])

        if pool is None or lanes == 1:
            for at in range(lanes):
                lane(at)
        else:
            list(pool.map(lane, range(lanes)))
        return chosen

    def place(
        self,
        vectors: Float32Array,
        rows: Int32Array,
        assignment: Int32Array,
        pool: ThreadPoolExecutor | None = None,
        threads: int = 1,
    ) -> Int32Array:
        """Put items where `assign` says, keeping `sizes`; return int32[n], their clusters.

        Args:
            vectors: float32[n, d].
            rows: int32[n], the items' rows.
            assignment: int32[items], the cluster that each item is in, -1 for none; written.
            pool, threads: as of `assign`.
        """
        chosen = np.empty(rows.size, np.int32)
        step = max(LEAST_ROUND, len(self) // ROUND) if self.crowding else max(rows.size, 1)
        for begin in range(0, rows.size, step):
            part = slice(begin, begin + step)
            chosen[part] = self.assign(vectors[part], pool, threads)
            relocate(rows[part], chosen[part], assignment, self.sizes)
            self._discount()
        return chosen

    def update(self, clusters: Int32Array, vectors: Float32Array, weights: Float32Array) -> None:
        """Let the moving averages take a step, over a batch's occurrences of items.

        Args:
            clusters: int32[n], where each occurrence belongs.
            vectors: float32[n, d].
            weights: float32[n], as `occurrence_weights` makes them.
        """
        move(self.sums, self.counts, clusters, np.ascontiguousarray(vectors), weights, self.decay, FLOOR)
        self._renew()

    def stand(self, sums: Float64Array, counts: Float64Array) -> None:
        """Let the clusters be where somebody says; one that counts nothing stays where it is.

        Args:
            sums, counts: float64[K, d] and float64[K], w and c, some c above 0.
        """
        settle(sums, counts, self.sums, self.counts, FLOOR)
        self._renew()

    def discounts(self) -> Float32Array:
        """Return float32[K]: r of each cluster, 1 where it seems as far as it is."""
        return self._discounts.ravel()[: len(self)].copy()

    def _renew(self) -> None:
        renew(self.sums, self.counts, self.vectors, self._blocks, self._halves)
        self._discount()

    def _discount(self) -> None:
        discount(self.counts, self.sizes, self.boost, self.crowding, self._discounts)


def occurrence_weights(
    rewards: Float32Array, etas: Float64Array, deltas: Float64Array, beta: float
) -> Float32Array:
    """Return float32[n]: prod_p (1 + h_jp)^eta_p * delta_j^beta.

    Args:
        rewards: float32[n, tasks], h, 0 or more.
        etas: float64[tasks].
        deltas: float64[n], intervals, 1 or more.
        beta: exponent of the interval.
    """
    each = np.exp(np.log1p(rewards.astype(np.float64)) @ etas + beta * np.log(deltas))
    return np.asarray(each, np.float32)


def coarse_clusters(vectors: Float32Array, count: int, seed: int = 0, passes: int = 10) -> Int32Array:
    """Return int32[K]: which of at most `count` coarser clusters each cluster is in, by k-means.

    Args:
        vectors: float32[K, d], the clusters.
        count: coarser clusters; where there are not more clusters than that, each is its own.
        seed: of the first centres, which are clusters.
        passes: of k-means.
    """
    clusters = vectors.shape[0]
    if clusters <= count:
        return np.arange(clusters, dtype=np.int32)
    random = np.random.default_rng((seed, 0xC0A5))
    centres = Codebook.at(vectors[np.sort(random.choice(clusters, count, replace=False))], boost=0.0)
    chosen = centres.assign(vectors)
    for _ in range(passes):
        sizes = np.bincount(chosen, minlength=count)
        sums = np.zeros((count, vectors.shape[1]), np.float64)
        np.add.at(sums, chosen, vectors)
        means = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres.vectors)
        centres = Codebook.at(means.astype(np.float32), boost=0.0)
        before, chosen = chosen, centres.assign(vectors)
        if np.array_equal(before, chosen):
            break
    return chosen


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly items are spread over clusters.

    Attributes:
        largest: share of the items that the fullest cluster has.
        spread: 99th percentile of the sizes over their median; infinite where that is 0.
        empty: share of the clusters that have none.
    """

    largest: float
    spread: float
    empty: float


def balance_of(assignment: Int32Array, clusters: int) -> Balance:
    """Return how even int32[items] is, -1 being an item without a cluster."""
    sizes = sizes_of(assignment, clusters)
    middle, high = np.percentile(sizes, (50, 99))
    return Balance(
        float(sizes.max() / max(int(sizes.sum()), 1)),
        float(high / middle) if middle else float("inf"),
        float(np.mean(sizes == 0)),
    )


@njit(nogil=True, cache=True)
def renew(sums, counts, vectors, blocks, halves):  # type: ignore[no-untyped-def]
    """Write e = w / c, and the form of it that `nearest` reads.

    Args:
        sums: float32[K, d]; counts: float32[K].
        vectors: float32[K, d]; blocks: float32[b, d, BLOCK], the same transposed.
        halves: float32[b, BLOCK], -||e||^2 / 2.
    """
    clusters, dimension = sums.shape
    width = blocks.shape[2]
    for k in range(clusters):
        block, column = k // width, k % width
        share = np.float32(1) / counts[k]
        square = np.float32(0)
        for j in range(dimension):
            value = sums[k, j] * share
            vectors[k, j] = value
            blocks[block, j, column] = value
            square += value * value
        halves[block, column] = np.float32(-0.5) * square


@njit(nogil=True, cache=True)
def discount(counts, sizes, boost, crowding, discounts):  # type: ignore[no-untyped-def]
    """Write r of each cluster to float32[b, BLOCK]; the others as of `Codebook`, boost and crowding 0 for none."""
    clusters, width = counts.size, discounts.shape[1]
    weight, items = np.float64(0), 0
    for k in range(clusters):
        weight += counts[k]
        items += sizes[k]
    # Where there are fewer items than clusters one is not a crowd.
    mean = max(items / clusters, 1.0)
    for k in range(clusters):
        r = min(boost * counts[k] * clusters / weight, 1.0) if boost > 0 else 1.0
        if crowding > 0:
            r = max(r, NEAREST) * max(sizes[k] / mean, 1.0) ** crowding
        discounts[k // width, k % width] = np.float32(r)


@njit(nogil=True, cache=True)
def relocate(rows, clusters, assignment, sizes):  # type: ignore[no-untyped-def]
    """Move items, one after the other, to int32[n] clusters; arguments as of `Codebook.place`."""
    for i in range(rows.size):
        before = assignment[rows[i]]
        if before >= 0:
            sizes[before] -= 1
        sizes[clusters[i]] += 1
        assignment[rows[i]] = clusters[i]


def sizes_of(assignment: Int32Array, clusters: int) -> Int64Array:
    """Return int64[clusters]: how many items of int32[items] are in each, -1 being in none."""
    return np.bincount(assignment[assignment >= 0], minlength=clusters).astype(np.int64)


@njit(nogil=True, cache=True)
def nearest(vectors, blocks, halves, discounts, chosen):  # type: ignore[no-untyped-def]
    """Write the cluster of each vector: the least r^2 ||e - v||^2, as ||v||^2 + ||e||^2 - 2 e v.

    Args:
        vectors: float32[n, d]; blocks, halves, discounts: as `renew` writes them, padding at -inf, 1.
        chosen: int32[n], written.
    """
    n, dimension = vectors.shape
    terms, width = blocks.shape[1:]
    part = np.zeros((ROWS, terms), np.float32)
    out = np.empty((ROWS, width), np.float32)
    least = np.empty(ROWS, np.float32)
    squares = np.empty(ROWS, np.float32)
    for begin in range(0, n, ROWS):
        rows = min(ROWS, n - begin)
        for i in range(rows):
            square = np.float32(0)
            for j in range(dimension):
                part[i, j] = vectors[begin + i, j]
                square += part[i, j] * part[i, j]
            squares[i] = square
            least[i] = np.inf
            chosen[begin + i] = 0
        for block in range(blocks.shape[0]):
            # Whole fours of rows: what is behind the last is not read.
            products(part[: (rows + TERMS - 1) // TERMS * TERMS], blocks[block], halves[block], out)
            factors = discounts[block]
            for i in range(rows):
                y, square = out[i], squares[i]
                lowest = lower(y, square, factors)
                if lowest < least[i]:
                    least[i] = lowest
                    for c in range(width):
                        if y[c] == lowest:
                            chosen[begin + i] = block * width + c
                            break


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def lower(y, square, factors):  # type: ignore[no-untyped-def]
    """Turn products into discounted squares of distances, in place, and return the least: no NaN is among them."""
    lowest = np.float32(np.inf)
    for c in range(y.size):
        distance = max(square - np.float32(2) * y[c], np.float32(0)) * (factors[c] * factors[c])
        y[c] = distance
        lowest = min(lowest, distance)
    return lowest


@njit(nogil=True, cache=True, fastmath={"contract"})
def products(x, weight, bias, out):  # type: ignore[no-untyped-def]
    """Set out = x weight + bias, as `dense` does, but with fused additions, for whole fours of rows and terms.

    Every row is summed alike, whatever stands beside it. Fused it takes 0.7 of the time of `dense`, which may not fuse.
    """
    columns = weight.shape[1]
    for r in range(0, x.shape[0], TERMS):
        y0, y1, y2, y3 = out[r], out[r + 1], out[r + 2], out[r + 3]
        x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
        for c in range(columns):
            y0[c] = bias[c]
            y1[c] = bias[c]
            y2[c] = bias[c]
            y3[c] = bias[c]
        for k in range(0, x.shape[1], TERMS):
            w0, w1, w2, w3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
            a0, a1, a2, a3 = x0[k], x0[k + 1], x0[k + 2], x0[k + 3]
            b0, b1, b2, b3 = x1[k], x1[k + 1], x1[k + 2], x1[k + 3]
            c0, c1, c2, c3 = x2[k], x2[k + 1], x2[k + 2], x2[k + 3]
            d0, d1, d2, d3 = x3[k], x3[k + 1], x3[k + 2], x3[k + 3]
            for c in range(columns):
                p, q, s, t = w0[c], w1[c], w2[c], w3[c]
                y0[c] = y0[c] + a0 * p + a1 * q + a2 * s + a3 * t
                y1[c] = y1[c] + b0 * p + b1 * q + b2 * s + b3 * t
                y2[c] = y2[c] + c0 * p + c1 * q + c2 * s + c3 * t
                y3[c] = y3[c] + d0 * p + d1 * q + d2 * s + d3 * t


@njit(nogil=True, cache=True)
def settle(sums, counts, own_sums, own_counts, floor):  # type: ignore[no-untyped-def]
    """Write w and c as `Codebook.stand` takes them over a codebook's own; c no lower than `floor` of the mean."""
    clusters, dimension = own_sums.shape
    total = 0.0
    for k in range(clusters):
        total += counts[k]
    least = np.float32(floor * total / clusters)
    for k in range(clusters):
        if counts[k] > least:
            own_counts[k] = counts[k]
            for j in range(dimension):
                own_sums[k, j] = sums[k, j]
        else:
            kept = least / own_counts[k]
            own_counts[k] = least
            for j in range(dimension):
                own_sums[k, j] *= kept


@njit(nogil=True, cache=True)
def move(sums, counts, clusters, vectors, weights, decay, floor):  # type: ignore[no-untyped-def]
    """Do one step of the moving averages; arguments as of `Codebook.update`."""
    kept, new = np.float32(decay), np.float32(1.0 - decay)
    dimension = sums.shape[1]
    for k in range(counts.size):
        counts[k] *= kept
        for j in range(dimension):
            sums[k, j] *= kept
    for i in range(clusters.size):
        k, weight = clusters[i], new * weights[i]
        counts[k] += weight
        for j in range(dimension):
            sums[k, j] += weight * vectors[i, j]
    total = np.float64(0)
    for k in range(counts.size):
        total += counts[k]
    least = np.float32(floor * total / counts.size)
    for k in range(counts.size):
        if counts[k] < least:
            grown = least / counts[k]
            counts[k] = least
            for j in range(dimension):
                sums[k, j] *= grown
