"""From what an index found to the answer of a channel: interests merged, triggers looked for. Compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.candidates import CandidateBatch
from engine.core.hashing import spread
from engine.core.query import History
from engine.core.sealed import sealed
from engine.core.select import row_of, select_top, sort_digits, sort_key
from engine.core.types import Float32Array, Int32Array
from engine.models.dense import dense

_BLOCK = 64
"""Candidates whose triggers are looked for together."""


def as_batch(rows: Int32Array, scores: Float32Array, interests: int, k: Int32Array) -> CandidateBatch:
    """Return what was found as an answer without triggers.

    Args:
        rows: int32[n * interests, columns], best first, padded with -1; those of a query's vectors together.
        scores: float32[n * interests, columns].
        interests: vectors per query; an item that several found has the best of its scores.
        k: int32[n], how many at most.
    """
    if interests == 1:
        found = rows >= 0
        offsets = np.zeros(k.size + 1, np.int64)
        np.cumsum(found.sum(1), out=offsets[1:])
        whole = int(offsets[-1])
        return CandidateBatch(rows[found], scores[found], np.full(whole, -1, np.int32), offsets)
    room = sum(k.tolist())
    out_rows, out_scores = np.empty(room, np.int32), np.empty(room, np.float32)
    offsets = np.empty(k.size + 1, np.int64)
    whole = _merge(rows, scores, interests, k, out_rows, out_scores, offsets)
    return CandidateBatch(out_rows[:whole], out_scores[:whole], np.full(whole, -1, np.int32), offsets)


@njit(nogil=True, cache=True)
def _merge(rows, scores, interests, k, out_rows, out_scores, offsets):  # type: ignore[no-untyped-def]
    """Keep each query's k best of what its vectors found, an item once; return how many there are."""
    most = interests * rows.shape[1]
    capacity = 2
    while capacity < 2 * most:
        capacity *= 2
    mask = capacity - 1
    table = np.empty(capacity, np.int32)
    met = np.empty(max(most, 1), np.int32)
    best = np.empty(max(most, 1), np.float32)
    bits = best.view(np.uint32)
    lines = np.empty((2, max(most, 1)), np.uint64)
    keys = lines[0]
    written = 0
    offsets[0] = 0
    for q in range(k.size):
        table[:] = -1
        slots = 0
        for r in range(q * interests, (q + 1) * interests):
            for c in range(rows.shape[1]):
                row = rows[r, c]
                if row < 0:
                    break
                at = spread(row) & mask
                while table[at] != -1 and met[table[at]] != row:
                    at = (at + 1) & mask
                slot = table[at]
                if slot == -1:
                    table[at] = slots
                    met[slots] = row
                    best[slots] = scores[r, c] + np.float32(0)  # -0 has no place of its own
                    slots += 1
                elif scores[r, c] > best[slot]:
                    best[slot] = scores[r, c]
        for slot in range(slots):
            keys[slot] = sort_key(bits[slot], met[slot])
        take = min(slots, k[q])
        if take < slots:
            select_top(keys, slots, take)
        chosen = lines[sort_digits(lines, take, 0)]
        for rank in range(take):
            row = row_of(chosen[take - 1 - rank])
            at = spread(row) & mask
            while met[table[at]] != row:
                at = (at + 1) & mask
            out_rows[written] = row
            out_scores[written] = best[table[at]]
            written += 1
        offsets[q + 1] = written
    return written


def merge_reference(
    rows: Int32Array, scores: Float32Array, interests: int, k: Int32Array
) -> list[list[tuple[int, float]]]:
    """The plain twin of `as_batch`: per query (row, score), best first."""
    answers = []
    for q in range(k.size):
        best: dict[int, float] = {}
        for r in range(q * interests, (q + 1) * interests):
            for row, score in zip(rows[r].tolist(), scores[r].tolist(), strict=True):
                if row >= 0:
                    best[row] = max(best.get(row, -np.inf), score)
        answers.append(sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[: int(k[q])])
    return answers


def nearest_triggers(
    answer: CandidateBatch,
    history: History,
    newest: int,
    vectors: Float32Array,
    place: Int32Array,
    fresh: Float32Array,
) -> None:
    """Set each candidate's trigger to that of the user's newest items whose vector gives the largest inner product.

    Of equals the newer counts; a user without history leaves -1.

    Args:
        answer: its triggers are written.
        history: what each user did, newest first.
        newest: items looked at, at most.
        vectors: float32[items, d], the vectors of rows.
        place: int32[rows] or empty: which row of `fresh` a row has its vector in, -1 where `vectors` holds.
        fresh: float32[m, d].
    """
    if newest and answer.rows.size and history.rows.size:
        _nearest(
            answer.rows, answer.offsets, sealed(history.rows), history.offsets, newest, sealed(vectors), place,
            fresh, answer.triggers,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _vector_of(row, vectors, place, fresh, out):  # type: ignore[no-untyped-def]
    """Copy a row's vector to `out`; False where it has none."""
    if row < place.size and place[row] >= 0:
        source = fresh[place[row]]
        for c in range(out.size):
            out[c] = source[c]
        return True
    if row < vectors.shape[0]:
        given = vectors[row]
        for c in range(out.size):
            out[c] = given[c]
        return True
    return False


@njit(nogil=True, cache=True)
def _nearest(  # type: ignore[no-untyped-def]
    rows, offsets, history, history_offsets, newest, vectors, place, fresh, triggers
):
    # Candidates stand in columns: the products of a block run over all of them at once, and so does the comparison.
    width = vectors.shape[1]
    longest = 0
    for q in range(offsets.size - 1):
        longest = max(longest, min(history_offsets[q + 1] - history_offsets[q], newest))
    mine = np.empty((longest, width), np.float32)
    whose = np.empty(longest, np.int32)
    one = np.empty(width, np.float32)
    turned = np.zeros((width, _BLOCK), np.float32)
    nothing = np.zeros(_BLOCK, np.float32)
    products = np.empty((longest, _BLOCK), np.float32)
    best = np.empty(_BLOCK, np.float32)
    nearest = np.empty(_BLOCK, np.int32)
    for q in range(offsets.size - 1):
        many = 0
        for p in range(history_offsets[q], min(history_offsets[q + 1], history_offsets[q] + newest)):
            if history[p] >= 0 and _vector_of(history[p], vectors, place, fresh, mine[many]):
                whose[many] = history[p]
                many += 1
        if many == 0:
            continue
        for begin in range(offsets[q], offsets[q + 1], _BLOCK):
            end = min(begin + _BLOCK, offsets[q + 1])
            for at in range(begin, end):
                if not _vector_of(rows[at], vectors, place, fresh, one):
                    one[:] = np.float32(0)
                for c in range(width):
                    turned[c, at - begin] = one[c]
            dense(mine[:many], turned, nothing, products[:many])
            for c in range(_BLOCK):
                best[c] = products[0, c]
                nearest[c] = 0
            for j in range(1, many):
                line = products[j]
                for c in range(_BLOCK):
                    closer = line[c] > best[c]
                    best[c] = line[c] if closer else best[c]
                    nearest[c] = j if closer else nearest[c]
            for at in range(begin, end):
                triggers[at] = whose[nearest[at - begin]]


def nearest_triggers_reference(
    answer: CandidateBatch, history: History, newest: int, vectors: Float32Array
) -> list[int]:
    """The plain twin of `nearest_triggers` where nothing is new."""
    triggers = []
    for q in range(answer.offsets.size - 1):
        begin = int(history.offsets[q])
        mine = history.rows[begin : min(int(history.offsets[q + 1]), begin + newest)]
        for row in answer.query(q).rows.tolist():
            near = [float(vectors[row].astype(np.float64) @ vectors[item]) for item in mine.tolist()]
            triggers.append(int(mine[int(np.argmax(near))]) if near else -1)
    return triggers
