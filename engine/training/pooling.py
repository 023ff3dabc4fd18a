"""The mean of rows of a table per list of codes, with a gradient that has each row once."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx, once_differentiable
from torch.nn import functional as F  # noqa: N812

from engine.core.types import Int64Array


def pooled(table: nn.Embedding, codes: Tensor, offsets: Int64Array) -> Tensor:
    """Return float32[n, width]: the mean of table[codes[offsets[r]:offsets[r + 1]]]; zeros for an empty list.

    Where the table wants sparse gradients, torch's own would have a row per code: for histories that is most of a step's
    time. This one has a row per distinct code (docs/training.md has the measurement).
    """
    if table.sparse and torch.is_grad_enabled():
        mean: Tensor = _Pooled.apply(table.weight, codes, offsets)
        return mean
    starts = torch.as_tensor(offsets[:-1], device=codes.device)
    return F.embedding_bag(codes, table.weight, starts, mode="mean")


class _Pooled(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, codes: Tensor, offsets: Int64Array) -> Tensor:
        ctx.shape, ctx.codes, ctx.offsets = weight.shape, codes, offsets
        return F.embedding_bag(codes, weight, torch.from_numpy(offsets[:-1]), mode="mean")

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, (rows, width) = ctx.codes.numpy(), ctx.shape
        most = min(codes.size, rows)
        touched, sums = np.empty(most, np.int64), np.empty((most, width), np.float32)
        count = scatter_means(
            codes,
            ctx.offsets,
            gradient.contiguous().numpy(),
            np.full(rows, -1, np.int32),
            touched,
            sums,
        )
        indices = torch.from_numpy(touched[:count]).unsqueeze(0)
        values = torch.from_numpy(sums[:count])
        return torch.sparse_coo_tensor(indices, values, (rows, width), check_invariants=False), None, None


@njit(nogil=True, cache=True)
def scatter_means(codes, offsets, gradient, slots, touched, sums):  # type: ignore[no-untyped-def]
    """Add gradient[r] / length of r to the sum of each code of list r; return how many distinct codes there are.

    Args:
        codes: int64[m]; offsets: int64[n + 1]; gradient: float32[n, width].
        slots: int32[rows], all -1; touched: int64[most], filled with the codes; sums: float32[most, width], likewise.
    """
    width = gradient.shape[1]
    count = 0
    part = np.empty(width, np.float32)
    for r in range(offsets.size - 1):
        length = offsets[r + 1] - offsets[r]
        if length == 0:
            continue
        for j in range(width):
            part[j] = gradient[r, j] / np.float32(length)
        for p in range(offsets[r], offsets[r + 1]):
            code = codes[p]
            slot = slots[code]
            if slot < 0:
                slots[code] = count
                touched[count] = code
                for j in range(width):
                    sums[count, j] = part[j]
                count += 1
            else:
                for j in range(width):
                    sums[slot, j] += part[j]
    return count
