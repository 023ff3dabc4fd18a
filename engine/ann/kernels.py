"""The kernels that turn what an index found into an answer: masks, exact products, and the best k."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.core.hashing import spread
from engine.core.select import offer, row_of, select_top, sort_key
from engine.core.types import BoolArray, Float32Array, Int32Array, Int64Array, RaggedRows

LINE = 16
"""float32 in a line of the cache."""

AHEAD = 8
"""Vectors that are asked for before they are compared."""

BLOCK = 1024
"""Vectors compared with every query of a batch before the next are read: 256 KB of 64 dimensions stay in the cache."""


@intrinsic
def prefetch(typingctx: Any, array: Any, row: Any, column: Any) -> Any:
    """Ask for array[row, column]'s line of the cache before it is needed: most of a search is waiting for memory."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tools: Any = cgutils

        mine = context.make_array(signature.args[0])(context, builder, arguments[0])
        shape, strides = (
            tools.unpack_tuple(builder, mine.shape),
            tools.unpack_tuple(builder, mine.strides),
        )
        at = tools.get_item_pointer2(
            context, builder, mine.data, shape, strides, "C", [arguments[1], arguments[2]], wraparound=False
        )
        byte, whole = ir.IntType(8).as_pointer(), ir.IntType(32)
        of = ir.FunctionType(ir.VoidType(), [byte, whole, whole, whole])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], of)
        # To be read, to be kept in all levels of the cache, data.
        builder.call(function, [builder.bitcast(at, byte), whole(0), whole(3), whole(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def product(left, right):  # type: ignore[no-untyped-def]
    """Return the inner product of two float32[d], summed in an order that depends on d alone."""
    total = np.float32(0)
    for i in range(left.size):
        total += left[i] * right[i]
    return total


@njit(nogil=True, cache=True, inline="always")
def bits_of(key):  # type: ignore[no-untyped-def]
    """Return the bits of the float32 in a key of `sort_key`."""
    ordered = np.uint32(key >> np.uint64(32))
    if ordered & np.uint32(0x80000000):
        return np.uint32(ordered & np.uint32(0x7FFFFFFF))
    return np.uint32(~ordered)


@njit(nogil=True, cache=True, inline="always")
def _banned(row, forbidden, table, mask):  # type: ignore[no-untyped-def]
    if row < forbidden.size and forbidden[row]:
        return True
    if mask < 0:
        return False
    at = spread(row) & mask
    while table[at] != -1 and table[at] != row:
        at = (at + 1) & mask
    return table[at] == row


@njit(nogil=True, cache=True)
def answer(  # type: ignore[no-untyped-def]
    queries,
    found,
    found_scores,
    scan,
    vectors,
    replaced,
    grown,
    grown_rows,
    grown_from,
    grown_to,
    forbidden,
    excluded,
    excluded_offsets,
    wanted,
    rows,
    scores,
):
    """Write the best of what was found, of the vectors that are scanned, and of those that came since.

    Returns how many queries got fewer than they want.

    Args:
        queries: float32[n, d].
        found: int32[n, depth], entries that a library found; -1 is none. Entry e below items is row e, and beyond it is
            grown_rows[e - items].
        found_scores: float32[n, depth].
        scan: whether all of `vectors` are compared too.
        vectors: float32[items, d]; row r's.
        replaced: bool[items] or [0]: True where a vector in `grown` has taken the place of the one in `vectors`.
        grown: float32[at least grown_to, d], vectors that came since; grown_rows: int32, their rows, -1 where replaced.
        grown_from, grown_to: which of these are compared.
        forbidden: bool[m]: True where no query may have the row; rows from m on are allowed.
        excluded, excluded_offsets: int32[e], int64[n + 1]: rows that a query may not have.
        wanted: int32[n]: how many each query gets at most.
        rows: int32[n, at least the largest of wanted], changed: best first, ties by lower row, padded with -1.
        scores: float32 of the same shape, changed: padded with -inf.
    """
    n = queries.shape[0]
    items = vectors.shape[0]
    longest = 0
    most = 1
    for q in range(n):
        longest = max(longest, excluded_offsets[q + 1] - excluded_offsets[q])
        most = max(most, wanted[q])
    capacity = 1
    while capacity < 2 * longest:
        capacity *= 2
    mask = capacity - 1 if longest > 0 else -1
    tables = np.full((n, capacity), -1, np.int32)
    keys = np.empty((n, most + max(most, 64)), np.uint64)
    counts = np.zeros(n, np.int64)
    worsts = np.zeros(n, np.uint64)
    score = np.empty(1, np.float32)
    bits = score.view(np.uint32)
    for q in range(n):
        table = tables[q]
        for p in range(excluded_offsets[q], excluded_offsets[q + 1]):
            at = spread(excluded[p]) & mask
            while table[at] != -1 and table[at] != excluded[p]:
                at = (at + 1) & mask
            table[at] = excluded[p]
        keep = wanted[q]
        if keep <= 0:
            continue
        mine = keys[q]
        count = 0
        worst = np.uint64(0)
        for i in range(found.shape[1]):
            row = found[q, i]
            if row < 0:
                continue
            if row >= items:
                row = grown_rows[row - items]
                if row < 0:
                    continue
            elif replaced.size > 0 and replaced[row]:
                continue
            if not _banned(row, forbidden, table, mask):
                score[0] = found_scores[q, i] + np.float32(0)  # -0 becomes 0, which sorts with it
                count, worst = offer(mine, count, keep, worst, sort_key(bits[0], row))
        counts[q] = count
        worsts[q] = worst
    if scan:
        for start in range(0, items, BLOCK):
            for q in range(n):
                if wanted[q] <= 0:
                    continue
                count = counts[q]
                worst = worsts[q]
                for row in range(start, min(items, start + BLOCK)):
                    if replaced.size > 0 and replaced[row]:
                        continue
                    score[0] = product(queries[q], vectors[row]) + np.float32(0)
                    key = sort_key(bits[0], row)
                    if key > worst and not _banned(row, forbidden, tables[q], mask):
                        count, worst = offer(keys[q], count, wanted[q], worst, key)
                counts[q] = count
                worsts[q] = worst
    for start in range(grown_from, grown_to, BLOCK):
        for q in range(n):
            if wanted[q] <= 0:
                continue
            for i in range(start, min(grown_to, start + BLOCK)):
                row = grown_rows[i]
                if row < 0:
                    continue
                score[0] = product(queries[q], grown[i]) + np.float32(0)
                key = sort_key(bits[0], row)
                if key > worsts[q] and not _banned(row, forbidden, tables[q], mask):
                    counts[q], worsts[q] = offer(keys[q], counts[q], wanted[q], worsts[q], key)
    score_bits = scores.view(np.uint32)
    short = 0
    for q in range(n):
        take = min(counts[q], max(wanted[q], 0))
        short += take < wanted[q]
        if take < counts[q]:
            select_top(keys[q], counts[q], take)
        best = keys[q, :take]
        fallen = True
        for i in range(1, take):
            fallen = fallen and best[i - 1] > best[i]
        if not fallen:  # what one library found comes in order
            best[:] = np.sort(best)[::-1]
        for i in range(take):
            key = best[i]
            rows[q, i] = row_of(key)
            ordered = np.uint32(key >> np.uint64(32))
            if ordered & np.uint32(0x80000000):
                score_bits[q, i] = ordered & np.uint32(0x7FFFFFFF)
            else:
                score_bits[q, i] = np.uint32(~ordered)
        for i in range(take, rows.shape[1]):
            rows[q, i] = -1
            scores[q, i] = -np.inf
    return short


def answer_reference(
    queries: Float32Array,
    found: Int32Array,
    found_scores: Float32Array,
    scan: bool,
    vectors: Float32Array,
    replaced: BoolArray,
    grown: Float32Array,
    grown_rows: Int32Array,
    grown_range: tuple[int, int],
    forbidden: BoolArray,
    excluded: RaggedRows,
    wanted: Int32Array,
) -> list[list[tuple[int, float]]]:
    """The plain twin of `answer`: per query its (row, score) pairs, best first."""
    items = len(vectors)
    lists = []
    for q, query in enumerate(queries):
        pairs: dict[int, float] = {}
        for entry, score in zip(found[q].tolist(), found_scores[q].tolist(), strict=True):
            row = entry if entry < items else int(grown_rows[entry - items])
            if row >= 0 and not (entry < items and replaced.size and replaced[entry]):
                pairs[row] = score
        if scan:
            pairs |= {
                row: float(vectors[row] @ query)
                for row in range(items)
                if not (replaced.size and replaced[row])
            }
        for i in range(*grown_range):
            if grown_rows[i] >= 0:
                pairs[int(grown_rows[i])] = float(grown[i] @ query)
        banned = {*np.flatnonzero(forbidden).tolist()}
        banned |= {*excluded.rows[excluded.offsets[q] : excluded.offsets[q + 1]].tolist()}
        allowed = [(row, score) for row, score in pairs.items() if row not in banned]
        lists.append(sorted(allowed, key=lambda pair: (-pair[1], pair[0]))[: max(0, int(wanted[q]))])
    return lists


@njit(nogil=True, cache=True)
def rescore(queries, entries, vectors, grown, scores):  # type: ignore[no-untyped-def]
    """Write the inner products with whole vectors into scores float32[n, depth]; where entries has -1, -inf."""
    items = vectors.shape[0]
    for q in range(queries.shape[0]):
        for i in range(entries.shape[1]):
            if i + AHEAD < entries.shape[1]:
                entry = entries[q, i + AHEAD]
                if entry >= 0 and entry < items:
                    for column in range(0, vectors.shape[1], LINE):
                        prefetch(vectors, entry, column)  # type: ignore[call-arg]
            entry = entries[q, i]
            if entry < 0:
                scores[q, i] = -np.inf
            elif entry < items:
                scores[q, i] = product(queries[q], vectors[entry])
            else:
                scores[q, i] = product(queries[q], grown[entry - items])


def rescore_reference(
    queries: Float32Array, entries: Int32Array, vectors: Float32Array, grown: Float32Array
) -> Float32Array:
    """The plain NumPy twin of `rescore`."""
    both = np.concatenate([vectors, grown])
    scores = np.einsum("qd,qid->qi", queries, both[entries])
    return np.where(entries < 0, np.float32(-np.inf), scores).astype(np.float32)


def share_forbidden(forbidden: BoolArray) -> float:
    """Estimate the share of True from up to 4,096 entries at equal distances: counting a million costs 50 µs."""
    sample = forbidden[:: max(1, forbidden.size // 4096)]
    return float(np.count_nonzero(sample)) / sample.size if sample.size else 0.0


def no_rows(queries: int) -> tuple[Int32Array, Int64Array]:
    """Return rows and offsets of as many empty lists."""
    return np.empty(0, np.int32), np.zeros(queries + 1, np.int64)
