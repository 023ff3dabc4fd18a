"""The losses of streaming VQ (Bin et al. 2025, eq. 1, 4, 6 and 11).

The paper compares an example with the items of all examples of its batch. Here the columns are the distinct items of
the batch and `negatives` more of the whole catalogue, so that no item is a column twice, and a narrow batch (a stream in
order of time has few users at a time) still sees the corpus. Logits are corrected by the log of how likely an item is
to be a column (Yi et al. 2019, eq. 3, whose estimate of it is `frequency.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.core.types import BoolArray, Float32Array, Float64Array, Int32Array, Int64Array


def column_logs(deltas: Float64Array, batch: int, drawn: int, items: int) -> Float32Array:
    """Return float32[m]: the log of each item's probability to be among the columns.

    Args:
        deltas: float64[m], impressions between two of the item's occurrences.
        batch: impressions of the step.
        drawn: items drawn evenly besides.
        items: of the catalogue.
    """
    # 1 - (1 - 1 / delta)^batch (1 - 1 / items)^drawn, by logs: the first is small for rare items.
    missed = batch * np.log1p(-1.0 / np.maximum(deltas, 1.0 + 1e-9))
    if drawn and items > 1:
        missed = missed + drawn * np.log1p(-1.0 / items)
    return np.asarray(np.log(np.maximum(-np.expm1(missed), 1e-12)), np.float32)


def own_items(users: Int32Array, columns: Int64Array, count: int) -> BoolArray:
    """Return bool[n, count]: which columns are other items that the row's own user has in the batch.

    Args:
        users: int32[n], -1: nobody that is known, who has no other items.
        columns: int64[n], the column of each row's item.
        count: columns.
    """
    masked = np.zeros((users.size, count), np.bool_)
    mark_own(users, columns, np.argsort(users, kind="stable"), masked)
    return masked


def mask_histories(sequence: Int32Array, codes: Int64Array, columns: Int64Array, masked: BoolArray) -> None:
    """Add to bool[n, m] the columns of the items in each user's history, but for the row's own.

    A history's items are what a query resembles most; to compare the user with them would teach it not to.

    Args:
        sequence: int32[n, t], codes of items, 0 is padding.
        codes: int64[m], of the columns; 0 is any number of items without one.
        columns: int64[n], the column of each row's item.
        masked: changed in place.
    """
    if not sequence.size:
        return
    places = np.full(max(int(codes.max()), int(sequence.max())) + 1, -1, np.int32)
    places[codes] = np.arange(codes.size, dtype=np.int32)
    places[0] = -1
    mark_read(np.ascontiguousarray(sequence), places, columns, masked)


@njit(nogil=True, cache=True)
def mark_read(sequence, places, columns, masked):  # type: ignore[no-untyped-def]
    """Do what `mask_histories` does; places: int32[codes], the column of each code, -1: none."""
    for row in range(sequence.shape[0]):
        for at in range(sequence.shape[1]):
            column = places[sequence[row, at]]
            if column >= 0 and column != columns[row]:
                masked[row, column] = True


@njit(nogil=True, cache=True)
def mark_own(users, columns, order, masked):  # type: ignore[no-untyped-def]
    """Write what `own_items` returns; order: int64[n], rows by user."""
    begin = 0
    while begin < order.size:
        user = users[order[begin]]
        end = begin + 1
        while end < order.size and users[order[end]] == user:
            end += 1
        if user >= 0:
            for a in range(begin, end):
                row = order[a]
                for b in range(begin, end):
                    masked[row, columns[order[b]]] = True
                masked[row, columns[row]] = False
        begin = end


def rewarded_softmax(logits: Tensor, own: Tensor, rewards: Tensor) -> Tensor:
    """Return the mean of -log softmax(logits)[row, own[row]], rows weighted by their rewards.

    Args:
        logits: float32[n, m], masked columns at -inf.
        own: int64[n].
        rewards: float32[n], not all 0.
    """
    return (F.cross_entropy(logits, own, reduction="none") * rewards).sum() / rewards.sum()


def straight_through(vectors: Tensor, clusters: Tensor) -> Tensor:
    """Return the clusters' vectors, whose gradient the items receive."""
    made: Tensor = vectors + (clusters - vectors).detach()
    return made


def similarity(vectors: Tensor, clusters: Tensor) -> Tensor:
    """Return the mean distance of items from their clusters, which do not move for it (L_sim)."""
    return torch.sqrt(((vectors - clusters.detach()) ** 2).sum(1) + 1e-12).mean()
