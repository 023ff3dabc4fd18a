"""The last step: of what was ranked for each query the best. Compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from channels.streaming_vq.lists import row_at
from channels.streaming_vq.merge import Found
from engine.core.candidates import CandidateBatch
from engine.core.sealed import sealed
from engine.core.select import row_of, select_top, sort_key
from engine.core.types import BoolArray, Float32Array, Int32Array

_SAMPLE = 512
"""Scores that the least one of the best is estimated from."""


def best(
    found: Found, scores: Float32Array, k: Int32Array, rows: Int32Array, hidden: BoolArray | None
) -> CandidateBatch:
    """Return the k best of what was found for each query, of equal scores the lower rows; the trigger is the cluster.

    Args:
        found: of the merge.
        scores: float32[t or more], finite.
        k: int32[n].
        rows: int32[items], the rows of slots.
        hidden: bool[t], what is left out; None: nothing.
    """
    room = sum(k.tolist())
    out_rows, out_clusters = np.empty(room, np.int32), np.empty(room, np.int32)
    out_scores = np.empty(room, np.float32)
    offsets = np.empty(k.size + 1, np.int64)
    if hidden is None:
        hidden = np.empty(0, np.bool_)
    whole = _best(
        found.slots, found.clusters, found.offsets, scores, k, sealed(rows), hidden, out_rows, out_scores,
        out_clusters, offsets,
    )  # fmt: skip
    return CandidateBatch(out_rows[:whole], out_scores[:whole], out_clusters[:whole], offsets)


@njit(nogil=True, cache=True)
def _threshold(scores, begin, end, take, sample):  # type: ignore[no-untyped-def]
    """Return a key of a score that about 1.5 x `take` of scores[begin:end] reach, from a sample; 0: no such."""
    step = (end - begin) // sample.size
    if step < 2:
        return np.uint64(0)
    bits = scores.view(np.uint32)
    for at in range(sample.size):
        sample[at] = sort_key(bits[begin + at * step], 0)
    wanted = (3 * take // 2) // step + 4
    if wanted >= sample.size:
        return np.uint64(0)
    select_top(sample, sample.size, wanted)
    # The lowest key of that score: (score, position) keys are compared with it.
    return sample[wanted - 1] & np.uint64(0xFFFFFFFF00000000)


@njit(nogil=True, cache=True)
def _best(  # type: ignore[no-untyped-def]
    slots, clusters, found_offsets, scores, k, rows, hidden, out_rows, out_scores, out_clusters, offsets
):
    longest = 1
    for q in range(k.size):
        longest = max(longest, found_offsets[q + 1] - found_offsets[q])
    keys = np.empty(longest, np.uint64)
    sample = np.empty(_SAMPLE, np.uint64)
    bits = scores.view(np.uint32)
    written = 0
    offsets[0] = 0
    for q in range(k.size):
        begin, end = found_offsets[q], found_offsets[q + 1]
        take = min(np.int64(k[q]), end - begin)
        if take > 0:
            for p in range(begin, end):
                scores[p] += np.float32(0)  # -0 has no place of its own
            least = _threshold(scores, begin, end, take, sample) if hidden.size == 0 else np.uint64(0)
            while True:
                # Keys of score and position: a row is looked up for what is returned alone.
                count = 0
                for p in range(begin, end):
                    key = sort_key(bits[p], np.int32(p - begin))
                    keys[count] = key
                    count += key >= least and not (hidden.size and hidden[p])
                if count >= take or least == 0:
                    break
                least = np.uint64(0)
            take = min(take, count)
            if 0 < take < count:
                select_top(keys, count, take)
                worst = keys[0]
                for at in range(1, take):
                    worst = min(worst, keys[at])
                _prefer_low_rows(keys, count, take, worst >> np.uint64(32), begin, slots, rows)
            chosen = np.sort(keys[:take])
            for rank in range(take):
                p = begin + row_of(chosen[take - 1 - rank])
                row = row_at(slots[p], rows)
                to = written + rank
                while to > written and out_scores[to - 1] == scores[p] and out_rows[to - 1] > row:
                    out_rows[to], out_clusters[to] = out_rows[to - 1], out_clusters[to - 1]
                    out_scores[to] = out_scores[to - 1]
                    to -= 1
                out_rows[to], out_clusters[to], out_scores[to] = row, clusters[p], scores[p]
            written += take
        offsets[q + 1] = written
    return written


@njit(nogil=True, cache=True)
def _prefer_low_rows(keys, count, take, worst, begin, slots, rows):  # type: ignore[no-untyped-def]
    """Where some with the worst score that is taken are left out, see to it that those with the lowest rows are in."""
    tied = 0
    for at in range(take, count):
        tied += keys[at] >> np.uint64(32) == worst
    if tied == 0:
        return
    for at in range(take, count):
        if keys[at] >> np.uint64(32) != worst:
            continue
        highest, most = -1, row_at(slots[begin + row_of(keys[at])], rows)
        for place in range(take):
            if keys[place] >> np.uint64(32) == worst:
                row = row_at(slots[begin + row_of(keys[place])], rows)
                if row > most:
                    highest, most = place, row
        if highest >= 0:
            keys[at], keys[highest] = keys[highest], keys[at]
