"""Ranking metrics over lists of catalogue rows, compiled: one pass over all users."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from engine.core.types import Float64Array, RaggedRows


def ranking_metrics(
    lists: RaggedRows, truth: RaggedRows, items: int, cuts: Sequence[int]
) -> dict[str, float]:
    """Return the metrics of ranked lists, means over users, at each cut K.

    recall@K = hits in the first K / |truth|; ndcg@K = DCG / ideal DCG, gains 0 or 1, discount 1 / log2(rank + 1), the
    ideal list being min(K, |truth|) long; hit@K = share of users with a hit; coverage@K = distinct items in anybody's
    first K / items of the catalogue. These are the definitions of the LightGCN and BARS-Match evaluations.

    Args:
        lists: per user the ranked rows.
        truth: per user the rows that should be found; none empty.
        items: rows in the catalogue.
        cuts: the K's.
    """
    ks = np.array(cuts, np.int64)
    sums = np.zeros((3, ks.size))
    shown = np.zeros((ks.size, items), np.bool_)
    _accumulate(lists.rows, lists.offsets, truth.rows, truth.offsets, ks, sums, shown)
    users = max(truth.offsets.size - 1, 1)
    metrics: dict[str, float] = {}
    for at, k in enumerate(cuts):
        for row, name in enumerate(("recall", "ndcg", "hit")):
            metrics[f"{name}@{k}"] = float(sums[row, at] / users)
        metrics[f"coverage@{k}"] = float(shown[at].sum() / max(items, 1))
    return metrics


def hit_matrix(lists: RaggedRows, truth: RaggedRows) -> Float64Array:
    """float64[truth entries]: 1 where the list of the truth's user holds the row, else 0."""
    found = np.zeros(truth.rows.size)
    _find(lists.rows, lists.offsets, truth.rows, truth.offsets, found)
    return found


def overlap_share(lists: RaggedRows, other: RaggedRows) -> float:
    """Return the share of the lists' entries that the other system gave the same user too; 0 for empty lists."""
    found = np.zeros(lists.rows.size)
    _find(other.rows, other.offsets, lists.rows, lists.offsets, found)
    return float(found.mean()) if found.size else 0.0


@njit(nogil=True, cache=True)
def _accumulate(rows, offsets, truth, truth_offsets, ks, sums, shown):  # type: ignore[no-untyped-def]
    deepest = ks.max()
    for u in range(offsets.size - 1):
        first, last = truth_offsets[u], truth_offsets[u + 1]
        size = last - first
        if size == 0:
            continue
        wanted = np.sort(truth[first:last])
        hits = 0
        gain = 0.0
        length = min(offsets[u + 1] - offsets[u], deepest)
        for at in range(length + 1):
            for c in range(ks.size):
                if ks[c] == at or (at == length and ks[c] > length):
                    ideal = 0.0
                    for place in range(min(ks[c], size)):
                        ideal += 1.0 / np.log2(place + 2.0)
                    sums[0, c] += hits / size
                    sums[1, c] += gain / ideal
                    sums[2, c] += hits > 0
            if at < length:
                row = rows[offsets[u] + at]
                for c in range(ks.size):
                    if at < ks[c]:
                        shown[c, row] = True
                place = np.searchsorted(wanted, row)
                if place < size and wanted[place] == row:
                    hits += 1
                    gain += 1.0 / np.log2(at + 2.0)


@njit(nogil=True, cache=True)
def _find(rows, offsets, wanted, wanted_offsets, found):  # type: ignore[no-untyped-def]
    for u in range(offsets.size - 1):
        have = np.sort(rows[offsets[u] : offsets[u + 1]])
        for at in range(wanted_offsets[u], wanted_offsets[u + 1]):
            place = np.searchsorted(have, wanted[at])
            if place < have.size and have[place] == wanted[at]:
                found[at] = 1.0
