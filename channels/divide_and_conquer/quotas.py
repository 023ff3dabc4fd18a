"""How many candidates each cluster gives, and in which order they stand together. Compiled.

The paper gives cluster k the quota M p_k^alpha / sum of p^alpha, and leaves rounding and order open. Here places are
given one after the other, the next to the cluster of the largest share / (places it has + 1/2): Webster's method, also
Sainte-Lague's. The quotas then sum to M, and those of a smaller M are contained in those of a larger: the front of an
answer is the answer to a smaller M. Largest remainders do not have this (a cluster can lose a place when there is one
more to give). A cluster that has nothing left gives its places to the others.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.types import Float32Array, Int32Array, Int64Array

LEAST = np.float32(1e-9)
"""A probability below this counts as this."""


@njit(nogil=True, cache=True)
def sharpen(shares, alpha):  # type: ignore[no-untyped-def]
    """Turn every row of float32[n, clusters] into p^alpha / sum of p^alpha, in place; alpha: float32."""
    for q in range(shares.shape[0]):
        row = shares[q]
        total = np.float32(0)
        for c in range(row.size):
            row[c] = np.exp(alpha * np.log(max(row[c], LEAST)))
            total += row[c]
        for c in range(row.size):
            row[c] /= total


@njit(nogil=True, cache=True)
def allot(shares, room, k, quotas):  # type: ignore[no-untyped-def]
    """Set quotas to how many candidates of each cluster a query gets: k in all where there are so many.

    Args:
        shares: float32[n, clusters], above 0.
        room: int64[n, clusters], items that each can give.
        k: int32[n].
        quotas: int32[n, clusters], zeros.
    """
    for q in range(k.size):
        for _ in range(k[q]):
            best = -1
            most = np.float32(-1)
            for c in range(room.shape[1]):
                if quotas[q, c] < room[q, c]:
                    value = shares[q, c] / (np.float32(quotas[q, c]) + np.float32(0.5))
                    if value > most:
                        best, most = c, value
            if best < 0:
                break
            quotas[q, best] += 1


@njit(nogil=True, cache=True)
def interleave(found, begins, counts, shares, rows, scores, offsets):  # type: ignore[no-untyped-def]
    """Write each query's candidates in the order in which the places were given; return how many there are in all.

    The score of the r-th of a cluster, from 0, is share / (r + 1/2). Of equals the lower cluster comes first, and the
    other score is the next smaller number, so that the order of the scores is that of the places.

    Args:
        found: int32[m], per query and cluster what was found, best first.
        begins: int64[n * clusters], where each pair's begin.
        counts: int32[n, clusters], how many there are.
        shares: float32[n, clusters].
        rows, scores: int32[m], float32[m], filled.
        offsets: int64[n + 1], filled.
    """
    n, clusters = shares.shape
    taken = np.empty(clusters, np.int32)
    written = 0
    offsets[0] = 0
    for q in range(n):
        taken[:] = 0
        last = np.float32(np.inf)
        while True:
            best = -1
            most = np.float32(-1)
            for c in range(clusters):
                if taken[c] < counts[q, c]:
                    value = shares[q, c] / (np.float32(taken[c]) + np.float32(0.5))
                    if value > most:
                        best, most = c, value
            if best < 0:
                break
            last = min(most, np.nextafter(last, np.float32(0)))
            rows[written] = found[begins[q * clusters + best] + taken[best]]
            scores[written] = last
            taken[best] += 1
            written += 1
        offsets[q + 1] = written
    return written


def allot_reference(shares: Float32Array, room: Int64Array, k: int) -> list[int]:
    """The plain twin of `allot` for one query: shares float32[clusters], room int64[clusters]."""
    quotas = [0] * room.size
    for _ in range(k):
        values = [
            np.float32(share) / np.float32(has + 0.5) if has < most else np.float32(-1)
            for share, has, most in zip(shares, quotas, room.tolist(), strict=True)
        ]
        if max(values) < 0:
            break
        quotas[int(np.argmax(values))] += 1
    return quotas


def interleave_reference(found: list[list[int]], shares: Float32Array) -> list[tuple[int, float]]:
    """The plain twin of `interleave` for one query: (row, score), best first; found: rows per cluster."""
    scored = [
        (-(np.float32(share) / np.float32(rank + 0.5)), cluster, row)
        for cluster, (mine, share) in enumerate(zip(found, shares, strict=True))
        for rank, row in enumerate(mine)
    ]
    answer, last = [], np.float32(np.inf)
    for value, _, row in sorted(scored, key=lambda each: each[:2]):
        last = min(-value, np.nextafter(last, np.float32(0)))
        answer.append((row, float(last)))
    return answer


def begins_of(quotas: Int32Array) -> Int64Array:
    """int64[n * clusters + 1]: where the candidates of each query and cluster begin, those of a query together."""
    begins = np.zeros(quotas.size + 1, np.int64)
    np.cumsum(quotas.ravel(), out=begins[1:])
    return begins
