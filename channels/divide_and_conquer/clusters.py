"""How a corpus is cut: by a column, or by spherical k-means on item vectors that only the likes give.

The paper clusters word2vec vectors of items. Those factorise which items are liked by the same users, nearly (Levy and
Goldberg 2014); here that is done directly: the leading singular vectors of the normalised matrix of likes, as spectral
co-clustering takes them (Dhillon 2001). No training, no hyper-parameter that would have to be searched, the same
each time, and a pass over the log costs a sum per like.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from channels.divide_and_conquer.options import MOST_CLUSTERS, DivideAndConquerOptions
from channels.two_tower.bundle import keys_of_items
from channels.two_tower.examples import column_clusters
from channels.two_tower.likers import item_sums
from channels.two_tower.start import OTHER_TOWERS
from engine.core.channel import BuildContext
from engine.core.errors import BuildError, ConfigError
from engine.core.interactions import Interactions
from engine.core.types import Float32Array, Int32Array
from engine.models.features import moved_codes
from engine.models.spec import ModelSpec

PASSES = 8
"""Multiplications by the matrix and its transpose: after these the leading directions stand."""

SPARE = 8
"""Directions beyond those wanted that are multiplied besides (Halko et al. 2011, section 4.2)."""

STARTS = 8
"""Times that k-means begins; the best cut is taken."""

ROUNDS = 50
"""Rounds of k-means at most."""

BLOCK = 65_536
"""Items compared with the centres at once."""


def clusters_of(config: DivideAndConquerOptions, context: BuildContext) -> tuple[Int32Array, int]:
    """Return int32[items], the cluster of each item, and how many there are.

    In an update items stay in the cluster that they were in, as the prompts are learnt for these; what is new goes to the
    cluster that is nearest by who likes it.

    Raises:
        ConfigError: the column is not there, or does not make between two and `MOST_CLUSTERS` clusters.
        BuildError: the last model has another number of clusters.
    """
    liked = context.interactions
    kept, count = _kept(context)
    if config.cluster:
        codes = column_clusters(config, context)
        if kept is None:
            return _compact(codes, config.cluster)
        kept = _of_the_same_string(kept, codes)
    elif kept is None:
        seed = config.training.seed
        return k_means(directions(liked, config.clusters, seed), config.clusters, seed)
    elif count != min(config.clusters, context.previous["clusters"].size if context.previous else 0):
        raise BuildError(OTHER_TOWERS.format(channel="divide_and_conquer", what="clusters"))
    if (kept >= 0).all():
        return kept, count
    points = directions(liked, count, config.training.seed)
    known = np.flatnonzero(kept >= 0)
    sums = np.zeros((count, points.shape[1]), np.float32)
    add_rows(points[known], kept[known], sums)
    return np.where(kept >= 0, kept, nearest(points, unit(sums))[0]).astype(np.int32), count


def _kept(context: BuildContext) -> tuple[Int32Array | None, int]:
    """Return int32[items], the last model's cluster of each item (-1: it had none), or None; and their number."""
    if context.previous is None or "clusters" not in context.previous:
        return None, 0
    before = np.concatenate(([-1], context.previous["clusters"])).astype(np.int32)
    code = moved_codes(keys_of_items(context), context.previous["item_keys"])
    return before[code[1:]], ModelSpec.model_validate_json(bytes(context.previous["spec"])).prompts


def _compact(codes: Int32Array, column: str) -> tuple[Int32Array, int]:
    used, clusters = np.unique(codes, return_inverse=True)
    if not 2 <= used.size <= MOST_CLUSTERS:
        raise ConfigError(
            f"the column {column!r} makes {used.size:,} clusters, missing values being one; "
            f"2 to {MOST_CLUSTERS} are possible",
            "cluster",
        )
    return clusters.astype(np.int32), int(used.size)


def _of_the_same_string(kept: Int32Array, codes: Int32Array) -> Int32Array:
    """Put new items where an old one of the same string is, and old ones whose string changed likewise."""
    of = np.full(int(codes.max(initial=0)) + 1, -1, np.int32)
    pairs, counts = np.unique(np.stack([codes, kept], 1)[kept >= 0], axis=0, return_counts=True)
    for code, cluster in pairs[np.argsort(counts, kind="stable")].tolist():
        of[code] = cluster  # the cluster that most of them are in comes last
    return of[codes]


def directions(liked: Interactions, width: int, seed: int) -> Float32Array:
    """Return float32[items, width], rows of length 1, or 0 for an item that nobody likes.

    The leading right singular vectors of D_u^-1/2 A D_i^-1/2, each item's divided by the root of its D; D are the
    numbers of likes plus their mean, so that items of few likes have no directions of their own (Amini et al. 2013).
    By subspace iteration from random vectors (Halko et al. 2011, algorithm 4.4).
    """
    width = max(1, min(width, liked.items, liked.users))
    columns = min(width + SPARE, liked.items)
    of_user, of_item = (_scale(counts) for counts in (liked.user_counts(), liked.item_counts()))
    x = np.random.default_rng(seed).standard_normal((liked.items, columns), np.float32)
    by_user = np.empty((liked.users, columns), np.float32)
    for number in range(PASSES + 1):
        user_sums(liked.indptr, liked.rows, np.linalg.qr(x)[0] * of_item, by_user)
        by_user *= of_user
        if number < PASSES:
            x = np.zeros((liked.items, columns), np.float32)
            item_sums(liked.indptr, liked.rows, by_user * of_user, x)
            x *= of_item
    _, vectors = np.linalg.eigh(by_user.T.astype(np.float64) @ by_user)
    leading = vectors[:, ::-1][:, :width].astype(np.float32)
    points = unit(np.ascontiguousarray((np.linalg.qr(x)[0] @ leading) * of_item))
    points[liked.item_counts() == 0] = 0
    return points


def _scale(counts: np.typing.NDArray[np.integer]) -> Float32Array:
    """float32[n, 1]: 1 / sqrt(count + mean count)."""
    scale: Float32Array = (1 / np.sqrt(counts + max(float(counts.mean()), 1e-9))).astype(np.float32)[:, None]
    return scale


@njit(nogil=True, cache=True)
def user_sums(indptr, rows, x, out):  # type: ignore[no-untyped-def]
    """Set out[u] to the sum of x[row] over the rows of user u; x: float32[items, c], out: float32[users, c]."""
    for u in range(indptr.size - 1):
        y = out[u]
        for c in range(y.size):
            y[c] = np.float32(0)
        for p in range(indptr[u], indptr[u + 1]):
            row = x[rows[p]]
            for c in range(y.size):
                y[c] += row[c]


@njit(nogil=True, cache=True)
def add_rows(x, to, out):  # type: ignore[no-untyped-def]
    """Add x[r] to out[to[r]]; x: float32[n, c], to: int32[n], out: float32[k, c]."""
    for r in range(to.size):
        row, y = x[r], out[to[r]]
        for c in range(y.size):
            y[c] += row[c]


def unit(x: Float32Array) -> Float32Array:
    """Return the rows at length 1; zeros stay zeros."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    scaled: Float32Array = x / np.maximum(lengths, np.float32(1e-12))
    return scaled


def nearest(points: Float32Array, centres: Float32Array) -> tuple[Int32Array, Float32Array]:
    """Return int32[n], the centre of the largest product with each point, the first of equals; and float32[n], that."""
    which, products = np.empty(len(points), np.int32), np.empty(len(points), np.float32)
    for begin in range(0, len(points), BLOCK):
        part = slice(begin, begin + BLOCK)
        scores = points[part] @ centres.T
        which[part] = scores.argmax(1)
        products[part] = scores.max(1)
    return which, products


def k_means(points: Float32Array, count: int, seed: int) -> tuple[Int32Array, int]:
    """Return int32[n], the cluster of each point, and how many there are: fewer than asked for where points are fewer.

    Spherical k-means (Dhillon and Modha 2001): centres are directions and nearness the cosine; they begin as k-means++
    draws them (Arthur and Vassilvitskii 2007), and one that is left without points begins anew at the point that is
    furthest from its own. Clusters are numbered by size, the largest 0.

    Args:
        points: float32[n, c], rows of length 1, or 0.
        count: clusters.
        seed: of the first centres.
    """
    random = np.random.default_rng((seed, 0xC1))
    count = min(count, len(points))
    cuts = [_cut(points, count, random) for _ in range(STARTS)]
    clusters, _ = max(cuts, key=lambda cut: float(cut[1].sum(dtype=np.float64)))
    sizes = np.bincount(clusters, minlength=count)
    place = np.empty(count, np.int32)
    place[np.argsort(-sizes, kind="stable")] = np.arange(count, dtype=np.int32)
    return place[clusters], count


def _cut(points: Float32Array, count: int, random: np.random.Generator) -> tuple[Int32Array, Float32Array]:
    """Return the clusters of one start, and the product of each point with its centre."""
    chosen = [int(random.integers(len(points)))]
    near = points @ points[chosen[0]]
    for _ in range(1, count):
        weights = np.maximum(1 - near.astype(np.float64), 0)
        weights[chosen] = 0
        total = weights.sum()
        free = np.setdiff1d(np.arange(len(points)), chosen)
        chosen.append(int(random.choice(len(points), p=weights / total) if total > 0 else free[0]))
        near = np.maximum(near, points @ points[chosen[-1]])
    centres = points[chosen]
    clusters, products = nearest(points, centres)
    for _ in range(ROUNDS):
        sums = np.zeros_like(centres)
        add_rows(points, clusters, sums)
        centres = unit(sums)
        empty = np.flatnonzero(np.bincount(clusters, minlength=count) == 0)
        centres[empty] = points[np.argsort(products, kind="stable")[: empty.size]]
        before = clusters
        clusters, products = nearest(points, centres)
        if np.array_equal(before, clusters):
            break
    return clusters, products
