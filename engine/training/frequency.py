"""How often items come in a stream of impressions, estimated while it passes."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.types import Float64Array, Int32Array


class Intervals:
    """delta of each item: impressions from one of its occurrences to the next (Yi et al. 2019, algorithm 2).

    Theirs counts steps, of a batch each, and hashes items; here impressions are counted, so that the batch's size means
    nothing and items that come in every batch still differ, and each item has a place of its own. A first occurrence is
    taken for one of an item that comes as often as the average one, or as seldom as the stream is long, whichever is
    less often; this and the first intervals are averaged evenly, later ones with weight `rate`.

    Attributes:
        now: impressions so far.
        last: int64[items], when each came last, counted from 1; 0: not yet.
        gap: float64[items], delta.
        seen: int32[items], how often each came, up to 1 / rate.
    """

    def __init__(self, items: int, rate: float = 0.05) -> None:
        self.rate = rate
        self.now = 0
        self.last = np.zeros(items, np.int64)
        self.gap = np.full(items, max(items, 1), np.float64)
        self.seen = np.zeros(items, np.int32)

    def update(self, rows: Int32Array) -> None:
        """Take in int32[n], the items of impressions, in their order."""
        observe(rows, self.now, self.rate, self.last, self.gap, self.seen)
        self.now += int(rows.size)

    def of(self, rows: Int32Array) -> Float64Array:
        """Return float64[n], 1 or more: delta of each item."""
        return np.maximum(self.gap[rows], 1.0)

    def grow(self, items: int) -> None:
        """Make room for items published since; there are `items` now."""
        more = items - self.last.size
        self.last = np.concatenate((self.last, np.zeros(more, np.int64)))
        self.gap = np.concatenate((self.gap, np.full(more, max(items, self.now, 1), np.float64)))
        self.seen = np.concatenate((self.seen, np.zeros(more, np.int32)))


@njit(nogil=True, cache=True)
def observe(rows, now, rate, last, gap, seen):  # type: ignore[no-untyped-def]
    """Take in occurrences, the first of them impression `now` + 1; see `Intervals`."""
    for i in range(rows.size):
        row, at = rows[i], now + i + 1
        if last[row] == 0:
            gap[row] = max(float(at), float(last.size))
            seen[row] = 1
        else:
            if seen[row] * rate < 1.0:
                seen[row] += 1
            share = max(rate, 1.0 / seen[row])
            gap[row] += share * (at - last[row] - gap[row])
        last[row] = at
