"""The losses of streaming VQ (Bin et al. 2025, eq. 1, 4, 6 and 11).

The paper compares an example with the items of all examples of its batch. Here the columns are the distinct items of
the batch and `negatives` more of the whole catalogue, so that no item is a column twice, and a narrow batch (a stream in
order of time has few users at a time) still sees the corpus. Logits are corrected by the log of how likely an item is
to be a column (Yi et al. 2019, eq. 3, whose estimate of it is `frequency.py`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable
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


def shared_softmax(
    queries: Tensor, vectors: Tensor, shift: Tensor, masked: BoolArray, own: Int64Array, rewards: Float32Array
) -> Tensor:
    """Return `rewarded_softmax` of the logits queries @ vectors^T + shift, on the CPU.

    Torch's own takes a pass over n m numbers, and new memory, for each of a dozen operations; here the gradient of the
    logits is made in their place (docs/benchmarks.md has what that is worth).

    Args:
        queries: float32[n, d]; vectors: float32[m, d]; shift: float32[m].
        masked: bool[n, m], columns that are left out; the row's own is none of them.
        own: int64[n].
        rewards: float32[n], 0 or more, not all 0.
    """
    weights = rewards / rewards.sum()
    made: Tensor = _SharedSoftmax.apply(queries, vectors, shift, masked, own, weights)
    return made


class _SharedSoftmax(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        queries: Tensor,
        vectors: Tensor,
        shift: Tensor,
        masked: BoolArray,
        own: Int64Array,
        weights: Float32Array,
    ) -> Tensor:
        logits = torch.addmm(shift, queries, vectors.T)
        loss = soften(logits.numpy(), masked, own, weights)
        ctx.save_for_backward(logits, queries, vectors)
        return logits.new_tensor(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, queries, vectors = ctx.saved_tensors
        ones = logits.new_ones(1, logits.shape[0])
        return (
            (logits @ vectors) * gradient, (logits.T @ queries) * gradient, (ones @ logits)[0] * gradient,
            None, None, None,
        )  # fmt: skip


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "nnan"}, error_model="numpy")
def soften(logits, masked, own, weights):  # type: ignore[no-untyped-def]
    """Return sum_r -weights[r] log softmax(logits)[r, own[r]], and write its gradient over the logits.

    exp(x) is 2^k e^f with |f| <= ln 2 / 2 and the series of e^f up to f^6, 2e-7 off at most: that of the C library is
    called number by number, and this is done eight or sixteen at a time.

    Args: as of `shared_softmax`; logits are finite, weights sum to 1.
    """
    n, m = logits.shape
    bits = np.empty(m, np.int32)
    powers = bits.view(np.float32)
    one, half = np.float32(1), np.float32(0.5)
    # ln 2 in two parts, the first of so few bits that k times it is exact.
    log2e, high, low = (
        np.float32(1.4426950408889634),
        np.float32(0.693359375),
        np.float32(-2.1219444005469e-4),
    )
    c6, c5, c4, c3 = np.float32(1 / 720), np.float32(1 / 120), np.float32(1 / 24), np.float32(1 / 6)
    lowest, least = np.float32(-3e38), np.float32(-87)
    loss = 0.0
    for r in range(n):
        line, hit = logits[r], masked[r]
        most = lowest
        for j in range(m):
            x = lowest if hit[j] else line[j]
            line[j] = x
            most = max(most, x)
        mine = line[own[r]]
        for j in range(m):
            x = max(line[j] - most, least)
            k = np.floor(x * log2e + half)
            f = (x - k * high) - k * low
            series = (((c6 * f + c5) * f + c4) * f + c3) * f + half
            line[j] = (series * f + one) * f + one
            bits[j] = (np.int32(k) + np.int32(127)) << np.int32(23)
        total = np.float32(0)
        for j in range(m):
            x = np.float32(0) if hit[j] else line[j] * powers[j]
            line[j] = x
            total += x
        loss += weights[r] * (math.log(total) + most - mine)
        scale = weights[r] / total
        for j in range(m):
            line[j] *= scale
        line[own[r]] -= weights[r]
    return loss


def straight_through(vectors: Tensor, clusters: Tensor) -> Tensor:
    """Return the clusters' vectors, whose gradient the items receive."""
    made: Tensor = vectors + (clusters - vectors).detach()
    return made


def similarity(vectors: Tensor, clusters: Tensor) -> Tensor:
    """Return the mean distance of items from their clusters, which do not move for it (L_sim)."""
    return torch.sqrt(((vectors - clusters.detach()) ** 2).sum(1) + 1e-12).mean()
