"""The mean of rows of a table per list of codes, weighted or not, with a gradient that has each row once."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx, once_differentiable
from torch.nn import functional as F  # noqa: N812

from engine.core.types import Float32Array, Int64Array


def pooled(
    table: nn.Embedding,
    codes: Tensor,
    offsets: Int64Array,
    weights: Tensor | None = None,
    exponent: float = 1.0,
) -> Tensor:
    """Return float32[n, width]: the mean of table[codes[offsets[r]:offsets[r + 1]]]; zeros for an empty list.

    Where the table wants sparse gradients, torch's own would have a row per code: for histories that is most of a step's
    time. This one has a row per distinct code (docs/training.md has the measurement).

    Args:
        table: of embeddings.
        codes: int64[m]; offsets: int64[n + 1].
        weights: float32[rows], a constant factor of each row; None: all are 1.
        exponent: with weights, the sum of k rows is divided by k^exponent.
    """
    lengths = np.diff(offsets)
    power = 1.0 if weights is None else exponent
    scales = np.maximum(lengths, 1).astype(np.float64) ** -power
    if table.sparse and torch.is_grad_enabled():
        mean: Tensor = _Pooled.apply(table.weight, codes, offsets, weights, scales.astype(np.float32))
        return mean
    return _bags(table.weight, codes, offsets, weights, scales.astype(np.float32))


def _bags(
    table: Tensor, codes: Tensor, offsets: Int64Array, weights: Tensor | None, scales: Float32Array
) -> Tensor:
    starts = torch.as_tensor(offsets[:-1], device=codes.device)
    if weights is None:
        return F.embedding_bag(codes, table, starts, mode="mean")
    each = torch.from_numpy(np.repeat(scales, np.diff(offsets))).to(codes.device)
    return F.embedding_bag(codes, table, starts, mode="sum", per_sample_weights=weights[codes] * each)


class _Pooled(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        table: Tensor,
        codes: Tensor,
        offsets: Int64Array,
        weights: Tensor | None,
        scales: Float32Array,
    ) -> Tensor:
        ctx.shape, ctx.codes, ctx.offsets = table.shape, codes, offsets
        ctx.weights, ctx.scales = weights, scales
        return _bags(table, codes, offsets, weights, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, (rows, width) = ctx.codes.numpy(), ctx.shape
        most = min(codes.size, rows)
        touched, sums = np.empty(most, np.int64), np.empty((most, width), np.float32)
        weights = np.empty(0, np.float32) if ctx.weights is None else ctx.weights.numpy()
        count = scatter_sums(
            codes,
            ctx.offsets,
            gradient.contiguous().numpy(),
            ctx.scales,
            weights,
            np.full(rows, -1, np.int32),
            touched,
            sums,
        )
        indices = torch.from_numpy(touched[:count]).unsqueeze(0)
        values = torch.from_numpy(sums[:count])
        made = torch.sparse_coo_tensor(indices, values, (rows, width), check_invariants=False)
        return made, None, None, None, None


@njit(nogil=True, cache=True)
def scatter_sums(codes, offsets, gradient, scales, weights, slots, touched, sums):  # type: ignore[no-untyped-def]
    """Add gradient[r] * scales[r] * weights[c] to the sum of each code c of list r; return how many codes there are.

    Args:
        codes: int64[m]; offsets: int64[n + 1]; gradient: float32[n, width]; scales: float32[n].
        weights: float32[rows]; empty: all are 1.
        slots: int32[rows], all -1; touched: int64[most], filled with the codes; sums: float32[most, width], likewise.
    """
    width = gradient.shape[1]
    count = 0
    part = np.empty(width, np.float32)
    for r in range(offsets.size - 1):
        if offsets[r + 1] == offsets[r]:
            continue
        for j in range(width):
            part[j] = gradient[r, j] * scales[r]
        for p in range(offsets[r], offsets[r + 1]):
            code = codes[p]
            weight = weights[code] if weights.size else np.float32(1)
            slot = slots[code]
            if slot < 0:
                slots[code] = count
                touched[count] = code
                for j in range(width):
                    sums[count, j] = part[j] * weight
                count += 1
            else:
                for j in range(width):
                    sums[slot, j] += part[j] * weight
    return count
