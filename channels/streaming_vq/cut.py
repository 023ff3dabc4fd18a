"""The last step: of what was ranked for each query the best. Compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from channels.streaming_vq.lists import row_at, sealed
from channels.streaming_vq.merge import Found
from engine.core.candidates import CandidateBatch
from engine.core.select import offer, row_of, sort_key
from engine.core.types import BoolArray, Float32Array, Int32Array


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
def _best(  # type: ignore[no-untyped-def]
    slots, clusters, found_offsets, scores, k, rows, hidden, out_rows, out_scores, out_clusters, offsets
):
    most = longest = 1
    for q in range(k.size):
        most = max(most, min(np.int64(k[q]), found_offsets[q + 1] - found_offsets[q]))
        longest = max(longest, found_offsets[q + 1] - found_offsets[q])
    buffer = np.empty(4 * most + 16, np.uint64)
    bits = scores.view(np.uint32)
    written = 0
    offsets[0] = 0
    for q in range(k.size):
        begin, end = found_offsets[q], found_offsets[q + 1]
        take = min(np.int64(k[q]), end - begin)
        if take > 0:
            keys = buffer[: 4 * take + 16]
            count, worst = 0, np.uint64(0)
            for p in range(begin, end):
                if hidden.size and hidden[p]:
                    continue
                scores[p] += np.float32(0)  # -0 has no place of its own
                # The row is looked up where the score may do: most do not.
                if sort_key(bits[p], 0) > worst:
                    count, worst = offer(keys, count, take, worst, sort_key(bits[p], row_at(slots[p], rows)))
            chosen = np.sort(keys[:count])
            take = min(take, count)
            least = chosen[count - take] if take else np.uint64(0)
            for p in range(begin, end):
                if take == 0 or sort_key(bits[p], 0) < least or (hidden.size and hidden[p]):
                    continue
                key = sort_key(bits[p], row_at(slots[p], rows))
                if key < least:
                    continue
                low, high = count - take, count - 1
                while low < high:
                    middle = (low + high) // 2
                    if chosen[middle] < key:
                        low = middle + 1
                    else:
                        high = middle
                to = written + count - 1 - low
                out_rows[to] = row_of(key)
                out_scores[to] = scores[p]
                out_clusters[to] = clusters[p]
            written += take
        offsets[q + 1] = written
    return written
