"""The neighbour gather: triggers x their neighbour lists -> summed scores -> best k. Heart of every neighbour channel."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.candidates import CandidateBatch
from engine.core.hashing import spread
from engine.core.prefetch import prefetch
from engine.core.select import row_of, select_top, sort_digits, sort_key
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array


def gather_top_k(
    trigger_offsets: Int64Array,
    trigger_rows: Int32Array,
    trigger_weights: Float32Array,
    indptr: AnyArray,
    neighbours: Int32Array,
    similarities: Float32Array,
    last_n: int,
    width: int,
    k: Int32Array,
) -> CandidateBatch:
    """Sum weight x similarity over every trigger's neighbours and keep the k best items per query.

    score(j) = sum over triggers i of weight(i) * sim(i, j); an item reached from several triggers adds up, and its
    trigger is the one that gave most (the earlier of equals).

    Args:
        trigger_offsets: int64[n + 1]; query q's triggers are [trigger_offsets[q], trigger_offsets[q + 1]).
        trigger_rows: int32[t], rows of the neighbour lists; a row outside [0, lists) has no neighbours.
        trigger_weights: float32[t]; a trigger of weight 0 is passed over.
        indptr: int64[lists + 1], where each list begins.
        neighbours: int32[m], item rows; similarities: float32[m]; both best first within a list.
        last_n: how many triggers of a query are used, from the front.
        width: how many neighbours of a list are used, from the front.
        k: int32[n], how many items to keep per query.

    Returns:
        The best items of each query, ties by row; triggers are trigger rows.
    """
    room = sum(k.tolist())  # a batch is short: quicker than a reduction
    rows = np.empty(room, np.int32)
    scores = np.empty(room, np.float32)
    triggers = np.empty(room, np.int32)
    offsets = np.empty(k.size + 1, np.int64)
    total = _gather(
        trigger_offsets, _own(trigger_rows), _own(trigger_weights), indptr, neighbours, similarities, last_n,
        width, k, rows, scores, triggers, offsets,
    )  # fmt: skip
    return CandidateBatch(rows[:total], scores[:total], triggers[:total], offsets)


def _own(array: AnyArray) -> AnyArray:
    """Return a copy of what may not be written, else the array: each form of the kernel takes seconds to compile."""
    return array if array.flags.writeable else array.copy()


_LINE = 16
"""Numbers of 32 bits in a cache line."""


@njit(nogil=True, cache=True)
def _gather(  # type: ignore[no-untyped-def]
    trigger_offsets, trigger_rows, trigger_weights, indptr, neighbours, similarities, last_n, width, k, out_rows,
    out_scores, out_triggers, out_offsets,
):  # fmt: skip
    lists = indptr.size - 1
    # The lists lie anywhere in an index of gigabytes. Where each begins is asked for before any is looked at, and so are
    # the lists of a query before any is read: then the processor waits for many at once.
    for t in range(trigger_offsets[0], trigger_offsets[k.size]):
        i = trigger_rows[t]
        if 0 <= i < lists:
            prefetch(indptr, i)
    most = 1
    for q in range(k.size):
        reached = 0
        for t in range(trigger_offsets[q], min(trigger_offsets[q + 1], trigger_offsets[q] + last_n)):
            i = trigger_rows[t]
            if 0 <= i < lists:
                reached += min(indptr[i + 1] - indptr[i], width)
        most = max(most, reached)
    capacity = 2
    while capacity < 2 * most:
        capacity *= 2
    mask = capacity - 1
    table = np.full(capacity, -1, np.int32)  # hash table: slot of each row met
    reached_rows = np.empty(most, np.int32)
    reached_gains = np.empty(most, np.float32)
    reached_from = np.empty(most, np.int32)
    rows = np.empty(most, np.int32)
    sums = np.empty(most, np.float32)
    best = np.empty(most, np.float32)
    triggers = np.empty(most, np.int32)
    lines = np.empty((2, most), np.uint64)
    keys = lines[0]
    sum_bits = sums.view(np.uint32)
    out_offsets[0] = 0
    written = 0
    for q in range(k.size):
        reached = 0
        slots = 0
        if k[q] > 0:
            for t in range(trigger_offsets[q], min(trigger_offsets[q + 1], trigger_offsets[q] + last_n)):
                i = trigger_rows[t]
                if 0 <= i < lists:
                    for p in range(indptr[i], min(indptr[i + 1], indptr[i] + width), _LINE):
                        prefetch(neighbours, p)
                        prefetch(similarities, p)
            for t in range(trigger_offsets[q], min(trigger_offsets[q + 1], trigger_offsets[q] + last_n)):
                i = trigger_rows[t]
                weight = trigger_weights[t]
                if i < 0 or i >= lists or weight == 0:
                    continue
                for p in range(indptr[i], min(indptr[i + 1], indptr[i] + width)):
                    reached_rows[reached] = neighbours[p]
                    reached_gains[reached] = weight * similarities[p]
                    reached_from[reached] = i
                    reached += 1
            for r in range(reached):
                row = reached_rows[r]
                gain = reached_gains[r]
                at = spread(row) & mask
                while table[at] != -1 and rows[table[at]] != row:
                    at = (at + 1) & mask
                slot = table[at]
                if slot == -1:
                    table[at] = slots
                    rows[slots] = row
                    sums[slots] = gain
                    best[slots] = gain
                    triggers[slots] = reached_from[r]
                    slots += 1
                else:
                    sums[slot] += gain
                    if gain > best[slot]:
                        best[slot] = gain
                        triggers[slot] = reached_from[r]
            for slot in range(slots):
                sums[slot] += np.float32(0)  # a sum of -0 is 0: it has no place of its own below it
                keys[slot] = sort_key(sum_bits[slot], rows[slot])
            take = min(slots, k[q])
            if take < slots:
                select_top(keys, slots, take)
            chosen = lines[sort_digits(lines, take, 0)]
            for rank in range(take):
                row = row_of(chosen[take - 1 - rank])
                at = spread(row) & mask
                while rows[table[at]] != row:
                    at = (at + 1) & mask
                slot = table[at]
                out_rows[written] = row
                out_scores[written] = sums[slot]
                out_triggers[written] = triggers[slot]
                written += 1
            if q + 1 < k.size:
                table[:] = -1
        out_offsets[q + 1] = written
    return written


def gather_top_k_reference(
    trigger_offsets: Int64Array,
    trigger_rows: Int32Array,
    trigger_weights: Float32Array,
    indptr: AnyArray,
    neighbours: Int32Array,
    similarities: Float32Array,
    last_n: int,
    width: int,
    k: Int32Array,
) -> CandidateBatch:
    """The plain NumPy twin of `gather_top_k`: what its tests hold it to."""
    offsets = np.zeros(k.size + 1, np.int64)
    all_rows: list[AnyArray] = []
    all_scores: list[AnyArray] = []
    all_triggers: list[AnyArray] = []
    for q in range(k.size):
        begin = int(trigger_offsets[q])
        end = min(int(trigger_offsets[q + 1]), begin + last_n)
        sums: dict[int, np.float32] = {}
        gains: dict[int, tuple[np.float32, int]] = {}
        for t in range(begin, end if k[q] > 0 else begin):
            i = int(trigger_rows[t])
            if not 0 <= i < indptr.size - 1 or trigger_weights[t] == 0:
                continue
            for p in range(int(indptr[i]), min(int(indptr[i + 1]), int(indptr[i]) + width)):
                row, gain = int(neighbours[p]), np.float32(trigger_weights[t] * similarities[p])
                sums[row] = np.float32(sums.get(row, np.float32(0)) + gain)
                if row not in gains or gain > gains[row][0]:
                    gains[row] = (gain, i)
        rows = np.array(sorted(sums), np.int32)
        scores = np.array([sums[int(row)] for row in rows], np.float32)
        order = np.lexsort((rows, -scores))[: int(k[q])]
        all_rows.append(rows[order])
        all_scores.append(scores[order])
        all_triggers.append(np.array([gains[int(row)][1] for row in rows[order]], np.int32))
        offsets[q + 1] = offsets[q] + order.size
    return CandidateBatch(
        np.concatenate([*all_rows, np.empty(0, np.int32)]).astype(np.int32),
        np.concatenate([*all_scores, np.empty(0, np.float32)]).astype(np.float32),
        np.concatenate([*all_triggers, np.empty(0, np.int32)]).astype(np.int32),
        offsets,
    )
