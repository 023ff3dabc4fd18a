"""The last step: of what was ranked for each query the best. Compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from channels.streaming_vq.lists import row_at
from channels.streaming_vq.merge import Found
from engine.core.bounds import bound_of, reaching
from engine.core.candidates import CandidateBatch
from engine.core.sealed import sealed
from engine.core.select import row_of, sort_digits, sort_key
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
    longest = 1
    for q in range(k.size):
        longest = max(longest, found_offsets[q + 1] - found_offsets[q])
    values, at = np.empty(longest, np.float32), np.empty(longest, np.int32)
    bits, passed = values.view(np.uint32), np.empty(longest, np.int32)
    keys = np.empty((2, longest), np.uint64)
    written = 0
    offsets[0] = 0
    for q in range(k.size):
        count = 0
        if k[q] > 0:
            for p in range(found_offsets[q], found_offsets[q + 1]):
                values[count] = scores[p] + np.float32(0)  # -0 has no place of its own
                at[count] = p
                count += not (hidden.size and hidden[p])
        take = min(int(k[q]), count)
        if take > 0:
            bound = bound_of(values, count, take) if take < count else np.float32(-np.inf)
            reached = reaching(values, 0, count, bound, passed)
            for i in range(reached):
                keys[0, i] = ~sort_key(bits[passed[i]], passed[i])
            line = sort_digits(keys, reached, 32)
            last = written + take - 1
            for rank in range(reached):
                i = row_of(~keys[line, rank])
                row = row_at(slots[at[i]], rows)
                to = written + rank
                if to > last:
                    # As good as the last that is taken: of these the lowest rows are.
                    to = last
                    if values[i] != out_scores[to]:
                        break
                    if row > out_rows[to]:
                        continue
                while to > written and out_scores[to - 1] == values[i] and out_rows[to - 1] > row:
                    out_rows[to], out_clusters[to] = out_rows[to - 1], out_clusters[to - 1]
                    out_scores[to] = out_scores[to - 1]
                    to -= 1
                out_rows[to], out_clusters[to], out_scores[to] = row, clusters[at[i]], values[i]
            written += take
        offsets[q + 1] = written
    return written
