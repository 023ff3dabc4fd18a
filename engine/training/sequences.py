"""The encoders of a history as torch modules: mean, attention, GRU, SASRec, multi-interest extraction.

Sequences come packed, the items of all users end to end without padding, so that no layer works on padding. Only
attention, GRU and multi-interest extraction need a rectangle: attention makes one per group of users of about the same
length, and the causal mask keeps its padding (behind the newest item) from every real position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engine.core.types import Int64Array
from engine.models.spec import ModelSpec
from engine.training.layers import dropped, linear, table_of
from engine.training.pooling import pooled
from engine.training.tensors import Packed

NORM_EPS = 1e-8

GROUP_FILL = 0.8
GROUP_STEP = 8
"""A group of sequences ends where the next one is below this part of the longest, and this many items shorter."""


class SequenceEncoder(nn.Module):
    """The encoders of a history; one of their parts is there, as the kind says."""

    def __init__(self, spec: ModelSpec, dropout: float) -> None:
        super().__init__()
        sequence = spec.sequence
        self.kind, self.width, self.dropout = sequence.kind, sequence.width, dropout
        self.items = None if spec.tied_feature is not None else table_of(spec.items + 1, sequence.width)
        self.exponent = sequence.length_exponent
        if sequence.weighted:
            self.register_buffer("weights", torch.ones(spec.items + 1))
        # At first a prompt changes nothing: every task begins as the one tower without prompts.
        self.prompts = nn.Parameter(torch.ones(spec.prompts + 1, self.width)) if spec.prompts else None
        if self.kind == "attention":
            self.query = nn.Parameter(torch.randn(self.width) / math.sqrt(self.width))
        elif self.kind == "gru":
            self.gru = nn.GRU(self.width, self.width, batch_first=True)
        elif self.kind == "sasrec":
            self.positions = table_of(sequence.length, self.width)
            self.blocks = nn.ModuleList(
                _Block(self.width, sequence.heads, dropout) for _ in range(sequence.blocks)
            )
            self.norm = nn.LayerNorm(self.width, eps=NORM_EPS)
        elif self.kind == "comirec":
            self.hidden = linear(self.width, 4 * self.width, bias=False)
            self.heads = linear(4 * self.width, sequence.interests, bias=False)

    def weigh(self, counts: Int64Array, exponent: float) -> None:
        """Set the weights of a weighted mean from int64[items], how many users like each item."""
        weights = np.maximum(counts, 1).astype(np.float64) ** -exponent
        self.get_buffer("weights")[1:] = torch.from_numpy(weights.astype(np.float32))

    def forward(
        self,
        history: Packed,
        tied: nn.Embedding | None,
        every: bool,
        tasks: Tensor | None,
        which: Int64Array | None = None,
    ) -> Tensor:
        """Return a vector per history, interest or position; the arguments are those of `UserTower.forward`."""
        table = tied if self.items is None else self.items
        if table is None:
            raise ValueError("the sequence shares the item tower's table: give it")
        if every and self.kind not in ("gru", "sasrec"):
            raise ValueError(f"{self.kind} has no vector per position")
        prompts = None if self.prompts is None or tasks is None else self.prompts[tasks]
        if self.kind == "mean":
            weights = dict(self.named_buffers()).get("weights")
            mean = pooled(table, history.codes, history.offsets, weights, self.exponent)
            return mean if prompts is None else mean * prompts
        if prompts is not None:
            lengths = torch.as_tensor(history.lengths, device=prompts.device)
            prompts = prompts.repeat_interleave(lengths, 0)
        if self.kind == "sasrec":
            return self._sasrec(history, table, every, prompts, which)
        embedded = table(history.codes)
        if prompts is not None:
            embedded = embedded * prompts
        if self.kind == "gru":
            states = self._gru(embedded, history, every)
            return states if which is None else states[_index(which, states.device)]
        padded, real = _padded(embedded, history)
        return self._attention(padded, real) if self.kind == "attention" else self._interests(padded, real)

    def _attention(self, padded: Tensor, real: Tensor) -> Tensor:
        logits = (padded @ self.query) / math.sqrt(self.width)
        logits = logits.masked_fill(~real, -math.inf)
        zero = logits.new_zeros(logits.shape[0], 1)  # the zero vector's logit; its value adds nothing
        weights = torch.softmax(torch.cat([logits, zero], 1), 1)[:, :-1]
        return (weights.unsqueeze(1) @ padded).squeeze(1)

    def _interests(self, padded: Tensor, real: Tensor) -> Tensor:
        logits = self.heads(torch.tanh(self.hidden(padded))).transpose(1, 2)
        logits = logits.masked_fill(~real.unsqueeze(1), torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, 2) * real.unsqueeze(1)
        return (weights @ padded).reshape(-1, self.width)

    def _gru(self, embedded: Tensor, history: Packed, every: bool) -> Tensor:
        lengths = history.lengths
        present = np.flatnonzero(lengths)
        if not present.size:
            return embedded.new_zeros(0 if every else lengths.size, self.width)
        plan = _rows_by_time(lengths[present], history.offsets[present], embedded.device)
        states, _ = self.gru(nn.utils.rnn.PackedSequence(embedded[plan.order], plan.batch_sizes))
        if every:
            return states.data[plan.inverse]
        last = torch.as_tensor(history.offsets[1:][present] - 1, device=embedded.device)
        whole = states.data[plan.inverse[last]]
        if present.size == lengths.size:
            return whole
        at = torch.as_tensor(present, device=embedded.device)
        return embedded.new_zeros(lengths.size, self.width).index_copy(0, at, whole)

    def _sasrec(
        self,
        history: Packed,
        table: nn.Embedding,
        every: bool,
        prompts: Tensor | None,
        which: Int64Array | None,
    ) -> Tensor:
        lengths, device = history.lengths, table.weight.device
        plan = _plan(lengths, history.offsets)
        order = None if plan.order is None else _index(plan.order, device)
        x = table(history.codes if order is None else history.codes[order]) * math.sqrt(self.width)
        if prompts is not None:
            x = x * (prompts if order is None else prompts[order])
        x = x + self.positions(_index(plan.ages, device))
        x = dropped(x, self.dropout, self.training)
        # Of the last block only rows that are read matter: for the others there are keys and values.
        read = None
        if which is not None:
            read = _index(which if plan.inverse is None else plan.inverse[which], device)
        for block in self.blocks[:-1]:
            x = block(x, plan)
        x = self.blocks[-1](x, plan, read)
        if read is not None:
            return self.norm(x)
        if every:
            x = x if plan.inverse is None else x[_index(plan.inverse, device)]
            return self.norm(x)
        present = np.flatnonzero(lengths)
        last = history.offsets[1:][present] - 1
        last = last if plan.inverse is None else plan.inverse[last]
        whole = self.norm(x[_index(last, device)])
        if present.size == lengths.size:
            return whole
        return whole.new_zeros(lengths.size, self.width).index_copy(0, _index(present, device), whole)


class _Attention(nn.Module):
    """Causal multi-head attention over packed sequences, parameters as `nn.MultiheadAttention` has them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, plan: _Plan, read: Tensor | None = None) -> Tensor:
        """Return float32[t, width], or of the rows `read` alone."""
        width = x.shape[1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        # One gather and one split for all groups: slicing each out would make its gradient as large as the whole.
        if read is None:
            projected = F.linear(x, weight, bias)
        else:
            asked = F.linear(x[read], weight[:width], bias[:width])
            asked = x.new_zeros(x.shape).index_copy(0, read, asked)
            projected = torch.cat([asked, F.linear(x, weight[width:], bias[width:])], 1)
        if plan.cells is not None:
            projected = projected.index_select(0, _index(plan.cells, x.device))
        made = []
        for part, (users, longest) in zip(
            projected.split([users * longest for users, longest in plan.groups]), plan.groups, strict=True
        ):
            q, k, v = part.view(users, longest, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            made.append(out.transpose(1, 2).reshape(-1, width))
        whole = torch.cat(made) if len(made) != 1 else made[0]
        real = None if plan.real is None else _index(plan.real, x.device)
        if read is not None:
            real = read if real is None else real[read]
        return self.out_proj(whole if real is None else whole.index_select(0, real))


class _Block(nn.Module):
    """One block of SASRec, norms before its parts. The weights of the attention are not dropped, only its output."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = _Attention(width, heads)
        self.feed_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.inner = linear(width, width)
        self.outer = linear(width, width)

    def forward(self, x: Tensor, plan: _Plan, read: Tensor | None = None) -> Tensor:
        """Return float32[t, width], or of the rows `read` alone."""
        attended = self.attention(self.attention_norm(x), plan, read)
        x = (x if read is None else x[read]) + dropped(attended, self.dropout, self.training)
        inner = dropped(F.relu(self.inner(self.feed_norm(x))), self.dropout, self.training)
        return x + dropped(self.outer(inner), self.dropout, self.training)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How packed tokens become rectangles, one per group of users, and back.

    Attributes:
        order: the order of the tokens in which the longest sequences come first; None: they come so.
        inverse: of the order.
        ages: int64[t], how many newer tokens each token's user has, in that order.
        groups: (users, longest) of each rectangle.
        cells: the token of each cell of all rectangles end to end; None: the tokens are the cells.
        real: the cell of each token; None likewise.
    """

    order: Int64Array | None
    inverse: Int64Array | None
    ages: Int64Array
    groups: tuple[tuple[int, int], ...]
    cells: Int64Array | None
    real: Int64Array | None


def _plan(lengths: Int64Array, offsets: Int64Array) -> _Plan:
    order = None
    if np.any(lengths[1:] > lengths[:-1]):
        users = np.argsort(-lengths, kind="stable")
        starts, lengths = offsets[users], lengths[users]
        order = _ranges(starts, lengths)
    lengths = lengths[: int(np.count_nonzero(lengths))]
    ends = np.cumsum(lengths)
    tokens = int(ends[-1]) if ends.size else 0
    ages = np.repeat(ends, lengths) - 1 - np.arange(tokens)
    groups, cells, real, at, before = [], [], [], 0, 0
    while at < lengths.size:
        longest = int(lengths[at])
        # Lengths fall, so that a group is a stretch of users.
        shortest = min(GROUP_FILL * longest, longest - GROUP_STEP)
        stop = int(np.searchsorted(-lengths, -shortest, side="right"))
        groups.append((stop - at, longest))
        column, mine = np.arange(longest), lengths[at:stop, None]
        # Padding, behind the newest, may be any token: no real one looks ahead, and what it gives is not read.
        cells.append(((ends[at:stop, None] - mine) + np.minimum(column, mine - 1)).ravel())
        real.append(np.flatnonzero((column < mine).ravel()) + before)
        before += (stop - at) * longest
        at = stop
    padded = before > tokens
    inverse = None
    if order is not None:
        inverse = np.empty_like(order)
        inverse[order] = np.arange(order.size)
    return _Plan(
        order, inverse, ages, tuple(groups),
        np.concatenate(cells) if padded else None, np.concatenate(real) if padded else None,
    )  # fmt: skip


def _ranges(starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """Return the ranges [start, start + length) end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    ranges: Int64Array = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return ranges


@dataclass(frozen=True, slots=True)
class _ByTime:
    """Tokens in the order that torch's packed sequences have: the first of every sequence, longest first, and so on."""

    order: Tensor
    inverse: Tensor
    batch_sizes: Tensor


def _rows_by_time(lengths: Int64Array, starts: Int64Array, device: torch.device) -> _ByTime:
    users = np.argsort(-lengths, kind="stable")
    steps = np.arange(int(lengths[users[0]]))
    sizes = np.searchsorted(-lengths[users], -steps, side="left")  # users with more than `step` items
    rank = _ranges(np.zeros(steps.size, np.int64), sizes)
    order = starts[users][rank] + np.repeat(steps, sizes)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    return _ByTime(_index(order, device), _index(inverse, device), torch.as_tensor(sizes))


def _padded(embedded: Tensor, history: Packed) -> tuple[Tensor, Tensor]:
    """Return float32[n, longest, width], left-aligned, and bool[n, longest]: which cells are real."""
    lengths = history.lengths
    longest = int(lengths.max(initial=0))
    cells = _ranges(np.arange(lengths.size) * longest, lengths)
    padded = embedded.new_zeros(lengths.size * longest, embedded.shape[1])
    padded = padded.index_copy(0, _index(cells, embedded.device), embedded)
    real = np.arange(longest) < lengths[:, None]
    return padded.view(lengths.size, longest, -1), torch.as_tensor(real, device=embedded.device)


def _index(array: Int64Array, device: torch.device) -> Tensor:
    return torch.as_tensor(array, device=device)
