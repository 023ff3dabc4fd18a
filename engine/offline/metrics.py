"""Ranking metrics over lists of catalogue rows, compiled: one pass over all users."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from engine.core.interactions import Interactions
from engine.core.types import BoolArray, Float64Array, RaggedRows

HEAD = 5
"""One in so many items is popular; what is behind is the long tail."""

MEANS = ("recall", "ndcg", "hit", "precision", "f")
"""The metrics that are means over users."""


def ranking_metrics(
    lists: RaggedRows, truth: RaggedRows, items: int, cuts: Sequence[int]
) -> dict[str, float]:
    """Return the metrics of ranked lists, means over users, at each cut K.

    recall@K = hits in the first K / |truth|; ndcg@K = DCG / ideal DCG, gains 0 or 1, discount 1 / log2(rank + 1), the
    ideal list being min(K, |truth|) long; hit@K = share of users with a hit; coverage@K = distinct items in anybody's
    first K / items of the catalogue. These are the definitions of the LightGCN and BARS-Match evaluations.
    precision@K = hits in the first K / K, however short the list; f@K = 2 P R / (P + R) of each user, 0 without a hit.
    These are the definitions of TDM (Zhu et al. 2018) and Deep Retrieval (Gao et al. 2021, section 4.1).

    Args:
        lists: per user the ranked rows.
        truth: per user the rows that should be found; none empty.
        items: rows in the catalogue.
        cuts: the K's.
    """
    ks = np.array(cuts, np.int64)
    sums = np.zeros((len(MEANS), ks.size))
    shown = np.zeros((ks.size, items), np.bool_)
    _accumulate(lists.rows, lists.offsets, truth.rows, truth.offsets, ks, sums, shown)
    users = max(truth.offsets.size - 1, 1)
    metrics: dict[str, float] = {}
    for at, k in enumerate(cuts):
        for row, name in enumerate(MEANS):
            metrics[f"{name}@{k}"] = float(sums[row, at] / users)
        metrics[f"coverage@{k}"] = float(shown[at].sum() / max(items, 1))
    return metrics


def long_tail(learnt: Interactions) -> BoolArray:
    """Return bool[items]: False for the fifth of the items that most users like, of equals the lower rows; else True."""
    head = np.argsort(-learnt.item_counts(), kind="stable")[: learnt.items // HEAD]
    tail = np.ones(learnt.items, np.bool_)
    tail[head] = False
    return tail


def tail_recall(
    lists: RaggedRows, truth: RaggedRows, tail: BoolArray, cuts: Sequence[int]
) -> dict[str, float]:
    """Return `tail@K`: recall@K of the truth that is in the long tail, a mean over the users who have such; 0 for none.

    Args: as `ranking_metrics`; tail: bool[items], as `long_tail` returns it.
    """
    which = tail[truth.rows]
    offsets = np.concatenate(([0], np.cumsum(which, dtype=np.int64)))[truth.offsets]
    counts = np.diff(offsets)
    owners = np.repeat(np.arange(counts.size), counts)
    found: dict[str, float] = {}
    for k in cuts:
        lengths = np.minimum(lists.lengths, k)
        ends = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=ends[1:])
        at = np.arange(int(ends[-1])) + np.repeat(lists.offsets[:-1] - ends[:-1], lengths)
        hits = hit_matrix(RaggedRows(lists.rows[at], ends), RaggedRows(truth.rows[which], offsets))
        of_users = np.bincount(owners, hits, counts.size)[counts > 0] / counts[counts > 0]
        found[f"tail@{k}"] = float(of_users.mean()) if of_users.size else 0.0
    return found


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
                    sums[3, c] += hits / ks[c]
                    # 2 P R / (P + R), where P = hits / K and R = hits / size.
                    sums[4, c] += 2.0 * hits / (ks[c] + size)
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
