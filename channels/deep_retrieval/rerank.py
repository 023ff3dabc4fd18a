"""The small ranker: of what the paths hold, the items of the largest u . w_v + b_v. Compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from channels.deep_retrieval.lists import sealed
from engine.core.candidates import CandidateBatch
from engine.core.select import row_of, select_top, sort_key
from engine.core.types import BoolArray, Float32Array, Int32Array, Int64Array


class Ranker:
    """The item vectors and biases of the softmax, and those of what was published since the build.

    Args:
        vectors: float32[items, e], mapped.
        bias: float32[items].
    """

    def __init__(self, vectors: Float32Array, bias: Float32Array) -> None:
        self._vectors, self._bias = sealed(vectors), sealed(bias)
        self._fresh = np.empty((0, vectors.shape[1]), np.float32)
        self._fresh_bias = np.empty(0, np.float32)

    def put(self, rows: Int32Array, vectors: Float32Array, bias: Float32Array) -> None:
        """Take vectors float32[m, e] and biases float32[m] of items that the build did not know, each once."""
        at = rows - len(self._vectors)
        most = int(at.max(initial=-1)) + 1
        if most > self._fresh_bias.size:
            room = max(most, self._fresh_bias.size * 5 // 4, 1024)
            wider = np.zeros((room, vectors.shape[1]), np.float32)
            wider[: len(self._fresh)] = self._fresh
            self._fresh = wider
            self._fresh_bias = np.append(self._fresh_bias, np.zeros(room - self._fresh_bias.size, np.float32))
        self._fresh[at], self._fresh_bias[at] = vectors, bias

    def rank(
        self,
        users: Float32Array,
        k: Int32Array,
        found: tuple[Int32Array, Int32Array, Float32Array, Int64Array],
        hidden: BoolArray | None,
        rerank: bool,
    ) -> CandidateBatch:
        """Return the best k of what was found for each query.

        Args:
            users: float32[m, e], vectors of the queries whose k is above 0, in order.
            k: int32[n].
            found: rows, places, logs and offsets, as `PathLists.reach` gives them.
            hidden: bool[t], what of it is left out; None: nothing.
            rerank: whether the ranker's score counts; else the log of the probability of the path.
        """
        room = sum(k.tolist())
        rows, places = np.empty(room, np.int32), np.empty(room, np.int32)
        scores = np.empty(room, np.float32)
        offsets = np.empty(k.size + 1, np.int64)
        if hidden is None:
            hidden = np.empty(0, np.bool_)
        whole = _rank(
            users, k, *found, hidden, self._vectors, self._bias, self._fresh, self._fresh_bias, rerank, rows,
            scores, places, offsets,
        )  # fmt: skip
        return CandidateBatch(rows[:whole], scores[:whole], places[:whole], offsets)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _product(user, table, row):  # type: ignore[no-untyped-def]
    """Return the inner product of float32[e] and a row of float32[n, e], in whatever order the compiler sums fastest.

    It is the same order for every row of every batch. What costs is waiting for the rows, which lie anywhere in memory:
    with a few wide instructions per row the processor waits for many rows at once.
    """
    total = np.float32(0)
    for c in range(user.size):
        total += user[c] * table[row, c]
    return total


@njit(nogil=True, cache=True)
def _rank(  # type: ignore[no-untyped-def]
    users, k, found_rows, found_places, found_logs, found_offsets, hidden, vectors, bias, fresh, fresh_bias, rerank,
    rows, scores, places, offsets,
):  # fmt: skip
    longest = 1
    for q in range(k.size):
        longest = max(longest, found_offsets[q + 1] - found_offsets[q])
    keys, sorting = np.empty(longest, np.uint64), np.empty(longest, np.uint64)
    values = np.empty(longest, np.float32)
    at_of = np.empty(longest, np.int64)
    bits = values.view(np.uint32)
    items = vectors.shape[0]
    written = 0
    m = 0
    offsets[0] = 0
    for q in range(k.size):
        if k[q] > 0:
            count = 0
            for p in range(found_offsets[q], found_offsets[q + 1]):
                if hidden.size and hidden[p]:
                    continue
                at_of[count] = p
                count += 1
            if rerank:
                user = users[m]
                for c in range(count):
                    row = found_rows[at_of[c]]
                    if row < items:
                        values[c] = _product(user, vectors, row) + bias[row]
                    else:
                        values[c] = _product(user, fresh, row - items) + fresh_bias[row - items]
            else:
                for c in range(count):
                    values[c] = found_logs[at_of[c]]
            for c in range(count):
                values[c] += np.float32(0)  # -0 has no place of its own
                keys[c] = sort_key(bits[c], found_rows[at_of[c]])
                sorting[c] = keys[c]
            take = min(count, k[q])
            if take < count:
                select_top(sorting, count, take)
            chosen = np.sort(sorting[:take])
            for c in range(count):
                if take and keys[c] >= chosen[0]:
                    low, high = 0, take - 1
                    while low < high:
                        middle = (low + high) // 2
                        if chosen[middle] < keys[c]:
                            low = middle + 1
                        else:
                            high = middle
                    to = written + take - 1 - low
                    rows[to] = row_of(keys[c])
                    scores[to] = values[c]
                    places[to] = found_places[at_of[c]]
            written += take
            m += 1
        offsets[q + 1] = written
    return written


def rank_reference(
    user: Float32Array, vectors: Float32Array, bias: Float32Array, rows: Int32Array, k: int
) -> list[tuple[int, float]]:
    """The plain twin of `Ranker.rank` where it reranks, of one query, in float64: (row, score), best first."""
    scores = vectors[rows].astype(np.float64) @ user + bias[rows]
    order = np.lexsort((rows, -scores))[:k]
    return [(int(rows[at]), float(scores[at])) for at in order]
