"""Losses over scores that are already divided by the temperature.

Notation: s is the score of an example's positive, s_j those of its negatives (columns), sigma the logistic function,
w the weight of an example. Every loss is sum(w * loss) / sum(w). A negative that is masked (an item that the user has,
or one that does not exist) has no part in any of them. `tests/engine/training/test_losses.py` holds each to plain
loops.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable
from torch.nn import functional as F  # noqa: N812

from engine.core.types import Int32Array, Int64Array

FULL_SOFTMAX_ITEMS = 100_000
"""Largest catalogue that `full_softmax` and `user_softmax` are done over."""

USER_CELLS = 1 << 23
"""Scores that the softmax by users holds at once: 32 MB. Larger chunks add up the items' gradients less often."""

CHUNK_CELLS = 1 << 20
"""Scores that the full softmax holds at once: 4 MB, about what stays in a core's cache."""


def softmax(positive: Tensor, negatives: Tensor, masked: Tensor | None, weights: Tensor) -> Tensor:
    """Return InfoNCE, the sampled softmax: -s + log(exp(s) + sum_j exp(s_j)).

    With logQ the caller has taken log Q(item) off every score before. Sources: van den Oord et al. 2018 (InfoNCE); with
    in-batch negatives and logQ Yi et al. 2019.

    Args:
        positive: float32[n].
        negatives: float32[n, m].
        masked: bool[n, m]: True has no part; None: all have.
        weights: float32[n].
    """
    if masked is not None:
        negatives = negatives.masked_fill(masked, -math.inf)
    # -s + log(exp(s) + sum exp(s_j)) = softplus(log sum exp(s_j) - s)
    return _mean(F.softplus(torch.logsumexp(negatives, 1) - positive), weights)


def bce(positive: Tensor, negatives: Tensor, masked: Tensor | None, weights: Tensor) -> Tensor:
    """Return binary cross-entropy with each negative as an example of its own: -log sigma(s) - sum_j log sigma(-s_j).

    The course's pointwise training, one positive to two or three negatives. Args as `softmax`.
    """
    return _mean(F.softplus(-positive) + _sum(F.softplus(negatives), masked), weights)


def gbce(
    positive: Tensor,
    negatives: Tensor,
    masked: Tensor | None,
    weights: Tensor,
    calibration: float,
    items: int,
) -> Tensor:
    """Return generalised BCE: -beta log sigma(s) - sum_j log sigma(-s_j).

    beta = a (t (1 - 1/a) + 1/a), a = m / (items - 1) the share of the items that is sampled, t the calibration: it takes
    back the overconfidence that few negatives teach (Petrov and Macdonald 2023, gSASRec). Its negatives are meant to be
    uniform (`popularity_power = 0`).

    Args: as `softmax`; items: size of the catalogue.
    """
    share = min(negatives.shape[1] / max(items - 1, 1), 1.0)
    beta = share * (calibration * (1 - 1 / share) + 1 / share)
    return _mean(beta * F.softplus(-positive) + _sum(F.softplus(negatives), masked), weights)


def nce(
    positive: Tensor, negatives: Tensor, masked: Tensor | None, weights: Tensor, shift: Tensor | float = 0.0,
    shifts: Tensor | float = 0.0,
) -> Tensor:  # fmt: skip
    """Return noise contrastive estimation: -log sigma(s - b) - sum_j log sigma(-(s_j - b_j)), b = log(m Q(item)).

    b is the log of how often the item is expected among the m negatives (Gutmann and Hyvarinen 2010; Mnih and Teh
    2012). Without b it is the negative sampling of Mikolov et al. 2013, which is `bce`.

    Args: as `softmax`; shift: float32[n], shifts: float32[n, m] or [m].
    """
    return bce(positive - shift, negatives - shifts, masked, weights)


def hinge(
    positive: Tensor, negatives: Tensor, masked: Tensor | None, weights: Tensor, margin: float
) -> Tensor:
    """Return the triplet hinge loss: the mean over j of max(0, s_j + margin - s) (Huang et al. 2020)."""
    return _mean(_average(F.relu(negatives - positive.unsqueeze(1) + margin), masked), weights)


def logistic(positive: Tensor, negatives: Tensor, masked: Tensor | None, weights: Tensor) -> Tensor:
    """Return the triplet logistic loss: the mean over j of log(1 + exp(s_j - s)).

    It is BPR's -log sigma(s - s_j) (Rendle et al. 2009, section 4.1).
    """
    return _mean(_average(F.softplus(negatives - positive.unsqueeze(1)), masked), weights)


def full_softmax(
    queries: Tensor, items: Tensor, positives: Tensor, weights: Tensor, temperature: float
) -> Tensor:
    """Return the cross-entropy over all items: -s + log sum over all i of exp(q . v_i / temperature).

    Scores exist in chunks of `CHUNK_CELLS` only: forward computes a chunk's loss and its gradients before the next, so
    that the memory does not grow with examples times items, and nothing is computed twice.

    Args:
        queries: float32[n, d].
        items: float32[items, d], the vectors of the whole catalogue.
        positives: int64[n], item rows.
        weights: float32[n].
        temperature: what scores are divided by.
    """
    loss: Tensor = _FullSoftmax.apply(queries, items, positives, weights / weights.sum(), 1 / temperature)
    return loss


class _FullSoftmax(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, queries: Tensor, items: Tensor, positives: Tensor, weights: Tensor, scale: float
    ) -> Tensor:
        rows = max(CHUNK_CELLS // max(items.shape[0], 1), 16)
        total = queries.new_zeros(())
        learns = any(ctx.needs_input_grad)
        by_query = torch.empty_like(queries) if learns else queries
        by_item = torch.zeros_like(items)
        buffer = queries.new_empty(min(rows, queries.shape[0]), items.shape[0])
        for begin in range(0, queries.shape[0], rows):
            part = queries[begin : begin + rows] * scale
            target, weight = (
                positives[begin : begin + rows].unsqueeze(1),
                weights[begin : begin + rows].unsqueeze(1),
            )
            scores = torch.mm(part, items.T, out=buffer[: part.shape[0]])
            scores = torch.softmax(scores, 1, out=scores)
            # The share of the positive can round to 0: its log is cut at about -87, its gradient is right all the same.
            right = scores.gather(1, target).clamp_min_(torch.finfo(scores.dtype).tiny)
            total -= (right.log_() * weight).sum()
            if learns:
                # d loss / d scores = w (softmax - one at the positive)
                scores.mul_(weight).scatter_add_(1, target, -weight)
                torch.mm(scores, items, out=by_query[begin : begin + rows])
                by_item.addmm_(scores.T, part)
        ctx.save_for_backward(by_query.mul_(scale) if learns else by_query, by_item)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_query, by_item = ctx.saved_tensors
        return by_query * gradient, by_item * gradient, None, None, None


def user_softmax(
    queries: Tensor,
    items: Tensor,
    shifts: Tensor,
    own: tuple[Int64Array, Int32Array],
    scores: Tensor,
    ends: Int64Array,
    weights: Tensor,
) -> Tensor:
    """Return the cross-entropy over all items where the likes of a user share their negatives.

    -s + log(exp(s) + Z_u), Z_u the sum over all items that user u does not have of exp(q_u . v_i + shift_i): computed
    once for all likes of u, and `full_softmax` computes it for each. Scores exist in chunks of whole users.

    Args:
        queries: float32[users, d], divided by the temperature.
        items: float32[items, d], the vectors of the whole catalogue.
        shifts: float32[items], log of how much each counts as a negative.
        own: int64[users + 1] and int32[k]: which items each user has.
        scores: float32[n], s of each like, those of a user side by side.
        ends: int64[users + 1]: user u has scores[ends[u]:ends[u + 1]].
        weights: float32[n].
    """
    loss: Tensor = _UserSoftmax.apply(queries, items, shifts, own, scores, ends, weights / weights.sum())
    return loss


class _UserSoftmax(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        queries: Tensor,
        items: Tensor,
        shifts: Tensor,
        own: tuple[Int64Array, Int32Array],
        scores: Tensor,
        ends: Int64Array,
        weights: Tensor,
    ) -> Tensor:
        step = max(USER_CELLS // max(items.shape[0], 1), 16)
        users, device = queries.shape[0], queries.device
        total = queries.new_zeros(())
        by_query, by_score = torch.empty_like(queries), torch.empty_like(scores)
        by_item = torch.zeros_like(items)
        counted = shifts.exp()
        weighted = items * counted.unsqueeze(1)
        # Items by users: with the long side first the products take about half the time.
        buffer = queries.new_empty(items.shape[0] * min(step, users))
        tiny = torch.finfo(queries.dtype).tiny
        for begin in range(0, users, step):
            end = min(begin + step, users)
            part = queries[begin:end]
            cells = buffer[: items.shape[0] * (end - begin)].view(items.shape[0], end - begin)
            torch.mm(items, part.T, out=cells)
            mine = np.diff(own[0][begin : end + 1])
            column = np.repeat(np.arange(end - begin), mine)
            row = own[1][own[0][begin] : own[0][end]].astype(np.int64)
            cells[torch.from_numpy(row).to(device), torch.from_numpy(column).to(device)] = -math.inf
            # A user who has all items has no negative: the top must be a number even so.
            top = cells.amax(0).clamp_min_(torch.finfo(cells.dtype).min)
            cells.sub_(top).exp_()
            sums = (cells.T @ counted).clamp_min_(tiny)
            logs = sums.log() + top
            likes = slice(int(ends[begin]), int(ends[end]))
            owners = torch.from_numpy(np.repeat(np.arange(end - begin), np.diff(ends[begin : end + 1])))
            owners = owners.to(device)
            ahead = logs[owners] - scores[likes]
            total += (F.softplus(ahead) * weights[likes]).sum()
            pull = torch.sigmoid(ahead) * weights[likes]
            by_score[likes] = -pull
            # d loss / d score of a negative = its share of Z_u times the pull of all likes of u
            share = (sums.new_zeros(end - begin).index_add_(0, owners, pull) / sums).unsqueeze(1)
            torch.mm(cells.T, weighted, out=by_query[begin:end])
            by_query[begin:end].mul_(share)
            by_item.addmm_(cells, part * share)
        by_item.mul_(counted.unsqueeze(1))
        ctx.save_for_backward(by_query, by_item, by_score)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_query, by_item, by_score = ctx.saved_tensors
        return by_query * gradient, by_item * gradient, None, None, by_score * gradient, None, None


def shared_softmax(
    queries: Tensor,
    shared: Tensor,
    shifts: Tensor,
    masked: Tensor,
    owners: Tensor | None,
    own: Tensor,
    weights: Tensor,
) -> Tensor:
    """Return `softmax` where most negatives are shared by the batch, a chunk of scores at a time as `full_softmax`.

    Args:
        queries: float32[n, d], divided by the temperature.
        shared: float32[m, d], the vectors of the shared negatives.
        shifts: float32[m], taken off their scores: log Q, or zeros.
        masked: bool[users, m]: which shared negatives a user has.
        owners: int64[n], the row of `masked` of each example; None: row n is example n's.
        own: float32[n, 1 + c]: the score of the positive, then those of the example's own negatives; -inf has no part.
        weights: float32[n].
    """
    loss: Tensor = _SharedSoftmax.apply(queries, shared, shifts, masked, owners, own, weights / weights.sum())
    return loss


class _SharedSoftmax(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        queries: Tensor,
        shared: Tensor,
        shifts: Tensor,
        masked: Tensor,
        owners: Tensor | None,
        own: Tensor,
        weights: Tensor,
    ) -> Tensor:
        mine, columns = own.shape[1], own.shape[1] + shared.shape[0]
        rows = max(CHUNK_CELLS // columns, 16)
        total = queries.new_zeros(())
        by_query, by_item, by_own = torch.empty_like(queries), torch.zeros_like(shared), torch.empty_like(own)
        buffer = queries.new_empty(min(rows, queries.shape[0]), columns)
        for begin in range(0, queries.shape[0], rows):
            part = slice(begin, begin + rows)
            scores = buffer[: queries[part].shape[0]]
            scores[:, :mine] = own[part]
            torch.addmm(shifts, queries[part], shared.T, beta=-1, out=scores[:, mine:])
            scores[:, mine:].masked_fill_(masked[part] if owners is None else masked[owners[part]], -math.inf)
            torch.softmax(scores, 1, out=scores)
            weight = weights[part].unsqueeze(1)
            total -= (scores[:, :1].clamp_min(torch.finfo(scores.dtype).tiny).log_() * weight).sum()
            scores.mul_(weight)
            by_own[part] = scores[:, :mine]
            torch.mm(scores[:, mine:], shared, out=by_query[part])
            by_item.addmm_(scores[:, mine:].T, queries[part])
        by_own[:, 0] -= weights
        ctx.save_for_backward(by_query, by_item, by_own)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_query, by_item, by_own = ctx.saved_tensors
        return by_query * gradient, by_item * gradient, None, None, None, by_own * gradient, None


def _sum(values: Tensor, masked: Tensor | None) -> Tensor:
    return values.sum(1) if masked is None else values.masked_fill(masked, 0.0).sum(1)


def _average(values: Tensor, masked: Tensor | None) -> Tensor:
    if masked is None:
        return values.mean(1)
    return values.masked_fill(masked, 0.0).sum(1) / (~masked).sum(1).clamp(min=1)


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum()
