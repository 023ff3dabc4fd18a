"""Top-K rows of X D X^T: the builder's kernel behind ItemCF and UserCF, and the neighbour lists they write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numba import njit

from engine.core.blocks import over_blocks
from engine.core.candidates import CandidateBatch
from engine.core.channel import Progress, SnapshotSink
from engine.core.gather import gather_top_k
from engine.core.query import History
from engine.core.select import drain, offer, sort_key
from engine.core.types import AnyArray, Float32Array, Float64Array, Int32Array, Int64Array
from engine.core.writable import writable

BLOCKS_PER_THREAD = 48
"""Enough that threads end together and the bar moves; few enough that starting one costs nothing."""


@dataclass(frozen=True, slots=True)
class SparseRows:
    """A sparse matrix by rows; row r owns [indptr[r], indptr[r + 1]).

    Attributes:
        indptr: int64[rows + 1].
        columns: int32[entries].
        values: float32[entries], positive.
    """

    indptr: Int64Array
    columns: Int32Array
    values: Float32Array

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.indptr.size - 1)


@dataclass(frozen=True, slots=True)
class NeighbourBlock:
    """The neighbour lists of a range of rows: lengths int32[rows], then rows and similarities end to end."""

    lengths: Int32Array
    neighbours: Int32Array
    similarities: Float32Array


@dataclass(frozen=True, slots=True)
class NeighbourLists:
    """Neighbour lists as loaded from a snapshot: best first within each list."""

    indptr: Int64Array
    neighbours: Int32Array
    similarities: Float32Array

    @classmethod
    def load(cls, arrays: Mapping[str, AnyArray]) -> NeighbourLists:
        """Take the three arrays that `write_neighbour_lists` wrote."""
        return cls(*(writable(arrays[name]) for name in ("indptr", "neighbours", "similarities")))

    def recall(
        self, history: History, last_n: int, top_k: int, half_life: float, k: Int32Array
    ) -> CandidateBatch:
        """Gather over the lists of what each user liked last; see `gather_top_k`.

        Args:
            history: the triggers, newest first, and their weights.
            last_n: triggers used per query.
            top_k: neighbours used per trigger.
            half_life: a trigger counts half for every so many newer ones; 0 for all alike.
            k: int32[n], how many items to keep per query.
        """
        weights = history.weights
        if half_life:
            place = np.arange(history.rows.size) - np.repeat(history.offsets[:-1], np.diff(history.offsets))
            weights = (weights * np.exp2(-place / half_life)).astype(np.float32)
        return gather_top_k(
            history.offsets,
            history.rows,
            weights,
            self.indptr,
            self.neighbours,
            self.similarities,
            last_n,
            top_k,
            k,
        )


def write_neighbour_lists(sink: SnapshotSink, blocks: Iterable[NeighbourBlock]) -> None:
    """Stream neighbour lists into a snapshot as CSR, so that the whole index is never in memory."""
    lengths: list[Int32Array] = []
    with (
        sink.appender("neighbours", np.int32) as neighbours,
        sink.appender("similarities", np.float32) as similarities,
    ):
        for block in blocks:
            lengths.append(block.lengths)
            neighbours.append(block.neighbours)
            similarities.append(block.similarities)
    indptr = np.zeros(sum(part.size for part in lengths) + 1, np.int64)
    if lengths:
        np.cumsum(np.concatenate(lengths), out=indptr[1:])
    sink.write("indptr", indptr)


def balanced_blocks(cost: Int64Array, threads: int) -> list[tuple[int, int]]:
    """Cut rows into ranges of about equal cost.

    Args:
        cost: int64[rows], steps of work each row takes.
        threads: how many cores will share the ranges.
    """
    if cost.size == 0:
        return []
    running = np.cumsum(cost + 1)
    targets = np.linspace(0, running[-1], threads * BLOCKS_PER_THREAD + 1)[1:-1]
    cuts = np.unique(np.concatenate(([0], np.searchsorted(running, targets), [cost.size])))
    return list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))


def product_cost(indptr: Int64Array, columns: Int32Array, transposed_indptr: Int64Array) -> Int64Array:
    """int64[rows]: multiplications that each row of X X^T takes, for X and X^T given by where their rows begin."""
    cost = np.zeros(indptr.size - 1, np.int64)
    _product_cost(indptr, columns, transposed_indptr, cost)
    return cost


@njit(nogil=True, cache=True)
def _product_cost(indptr, columns, transposed_indptr, cost):  # type: ignore[no-untyped-def]
    for r in range(cost.size):
        for p in range(indptr[r], indptr[r + 1]):
            cost[r] += transposed_indptr[columns[p] + 1] - transposed_indptr[columns[p]]


def top_k_products(
    matrix: SparseRows,
    transposed: SparseRows,
    inner: Float32Array,
    target_scale: Float32Array,
    shrinkage: float,
    keep: int,
    finish: Finish,
    threads: int,
    progress: Progress,
    task: str,
) -> Iterable[NeighbourBlock]:
    """Yield, block by block, the largest entries of each row of X D X^T after scaling.

    s(i, j) = dot(i, j) * n / (n + shrinkage) / target(j), j != i, with dot(i, j) = sum over c of x_ic d_c x_jc and n
    how many columns i and j share; the best `keep` of a row then go through `finish`. Rows are summed with a dense
    accumulator (Gustavson 1978); memory besides the inputs is, per thread, 8 bytes a row (12 with shrinkage) and the
    output of two blocks.

    Args:
        matrix: X, float32 values.
        transposed: X^T.
        inner: float32[columns], the diagonal of D.
        target_scale: float32[rows], divisors.
        shrinkage: columns in common at which a similarity counts half; 0 for no shrinkage.
        keep: how many entries per row.
        finish: what happens to a row's list once it is cut.
        threads: cores to use.
        progress, task: where to report, under which name.
    """
    keep = min(keep, matrix.rows)
    inverse = (1.0 / target_scale).astype(np.float32)
    cost = product_cost(matrix.indptr, matrix.columns, transposed.indptr)

    def work(begin: int, end: int) -> NeighbourBlock:
        lengths = np.zeros(end - begin, np.int32)
        neighbours = np.empty(keep * (end - begin), np.int32)
        similarities = np.empty(keep * (end - begin), np.float32)
        total = _top_k_products(
            matrix.indptr, matrix.columns, matrix.values, transposed.indptr, transposed.columns, transposed.values,
            inner, inverse, np.float32(shrinkage), keep, begin, end, lengths, neighbours, similarities,
        )  # fmt: skip
        kept = similarities[:total].copy()
        finish(begin, lengths, kept)
        return NeighbourBlock(lengths, neighbours[:total].copy(), kept)

    return over_blocks(work, balanced_blocks(cost, threads), threads, progress, task)


@dataclass(frozen=True, slots=True)
class Finish:
    """What happens to a row's neighbour list after it is cut to the best: (s / its sum) ^ amplification / source.

    Attributes:
        normalize: divide each list by its sum first, so that every trigger has the same say.
        amplification: exponent.
        source_scale: float32[rows], divisors applied last.
    """

    normalize: bool
    amplification: float
    source_scale: Float32Array

    def __call__(self, begin: int, lengths: Int32Array, similarities: Float32Array) -> None:
        """Change the lists of rows begin, begin + 1, ... in place."""
        owner = np.repeat(np.arange(lengths.size), lengths)
        if self.normalize:
            sums = np.bincount(owner, weights=similarities, minlength=lengths.size)
            similarities /= sums[owner].astype(np.float32)
        if self.amplification != 1.0:
            np.power(similarities, np.float32(self.amplification), out=similarities)
        similarities /= self.source_scale[begin : begin + lengths.size][owner]


@njit(nogil=True, cache=True, inline="always")
def buffer_size(keep):  # type: ignore[no-untyped-def]
    """Room in a selection buffer: cut back seldom, yet small enough for the first cache."""
    return keep + max(keep, 128)


@njit(nogil=True, cache=True)
def _top_k_products(  # type: ignore[no-untyped-def]
    indptr, columns, values, t_indptr, t_columns, t_values, inner, inverse, shrinkage, keep, begin, end,
    lengths, neighbours, similarities,
):  # fmt: skip
    rows = indptr.size - 1
    zero = np.float32(0)
    sums = np.zeros(rows, np.float32)
    shared = np.zeros(rows if shrinkage > zero else 1, np.float32)
    touched = np.empty(
        rows + 1, np.uint32
    )  # one more, so that the branch-free append below may write past the end
    keys = np.empty(buffer_size(keep), np.uint64)
    cell = np.empty(1, np.float32)
    bits = cell.view(np.uint32)
    written = np.int64(0)  # a literal would have `drain` compiled twice
    for i in range(begin, end):
        count = np.uint64(0)
        for p in range(indptr[i], indptr[i + 1]):
            c = columns[p]
            factor = values[p] * inner[c]
            for r in range(np.uint64(t_indptr[c]), np.uint64(t_indptr[c + 1])):
                j = np.uint32(t_columns[r])  # unsigned: a signed index costs a wrap-around check each time
                before = sums[j]
                touched[count] = j
                count += np.uint64(before == zero)
                sums[j] = before + factor * t_values[r]
            if shrinkage > zero:
                for r in range(np.uint64(t_indptr[c]), np.uint64(t_indptr[c + 1])):
                    shared[np.uint32(t_columns[r])] += np.float32(1)
        sums[i] = zero  # an item is no neighbour of its own; skipped below, like every zero
        size = np.int64(0)
        worst = np.uint64(0)
        least = zero
        for at in range(count):
            j = touched[at]
            value = sums[j]
            sums[j] = zero
            score = value * inverse[j]
            if shrinkage > zero:
                score *= shared[j] / (shared[j] + shrinkage)
                shared[j] = zero
            if score >= least and value > zero:
                cell[0] = score
                size, worst = offer(keys, size, keep, worst, sort_key(bits[0], j))
                bits[0] = np.uint32(worst >> np.uint64(32)) & np.uint32(0x7FFFFFFF)
                least = cell[0]
        lengths[i - begin] = min(size, keep)
        written = drain(keys, size, keep, neighbours, similarities, written)
    return written


def power(base: Float64Array, exponent: float) -> Float32Array:
    """float32: base^exponent, with 1 where the base is 0 (an empty row, which has no products to scale)."""
    return np.power(np.where(base > 0, base, 1.0), exponent).astype(np.float32)


def top_k_products_reference(
    dense: AnyArray,
    inner: Float32Array,
    target_scale: Float32Array,
    shrinkage: float,
    keep: int,
    finish: Finish,
) -> list[list[tuple[int, float]]]:
    """The plain NumPy twin of `top_k_products` on a dense X, in float64: (row, similarity) pairs per row."""
    products = (dense * inner) @ dense.T
    shared = (dense != 0).astype(float) @ (dense != 0).T
    lists: list[list[tuple[int, float]]] = []
    for i in range(products.shape[0]):
        scored = products[i] / target_scale
        if shrinkage:
            scored = scored * shared[i] / (shared[i] + shrinkage)
        others = [j for j in range(products.shape[0]) if j != i and products[i, j] > 0]
        best = sorted(others, key=lambda j: (-scored[j], j))[:keep]
        total = sum(scored[j] for j in best) if finish.normalize else 1.0
        divisor = float(finish.source_scale[i])
        lists.append([(j, float((scored[j] / total) ** finish.amplification / divisor)) for j in best])
    return lists
