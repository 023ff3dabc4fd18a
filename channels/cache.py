"""Cache: what an earlier fine ranking of the same user thought good and nobody showed them.

Source: the recommender course (Wang Shusen, cache recall): a ranking scores hundreds of posts and shows a few dozen; the
first of the rest are tried again. Posts leave when they were shown, when newer ones push them out (both are the state
store's business), after 10 recalls, and after 3 days; those that few people saw may stay longer.
"""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
from numba import njit
from pydantic import Field

from engine.core.candidates import CandidateBatch
from engine.core.channel import BuildContext, Channel, LoadContext
from engine.core.live import Leftovers
from engine.core.options import Online, Options
from engine.core.query import QueryBatch
from engine.core.types import Int32Array, Int64Array
from engine.core.writable import writable

SECONDS_PER_DAY = 86_400


class CacheOptions(Options):
    """Options of the cache channel."""

    max_recalls: Annotated[int, Field(ge=1), Online()] = 10
    """An item leaves when it was recalled this often."""

    max_days: Annotated[float, Field(gt=0), Online()] = 3.0
    """An item leaves so long after the ranking."""

    patient_days: Annotated[float, Field(gt=0), Online()] = 7.0
    """The same for an item of low interest, where that is longer."""

    low_interest: Annotated[int, Field(ge=0), Online()] = 10
    """An item is of low interest while fewer users than this liked it in the release; 0: none is."""


class Cache(Channel):
    """Recalls leftovers: those of the newest ranking first, within one ranking those it scored best.

    Scores of two rankings were given to different requests and do not compare, while the newer ranking knew more of the
    user. The channel's own score is minus the place in that order.
    """

    Config = CacheOptions
    inline = True
    counts_recalls = True

    def __init__(self, config: CacheOptions, counts: Int32Array) -> None:
        super().__init__(config)
        self._counts = counts

    @classmethod
    def build(cls, config: CacheOptions, context: BuildContext) -> None:
        """Write how many users like each item."""
        items = context.interactions.items
        context.progress.start("cache", items)
        context.sink.write("counts", context.interactions.item_counts().astype(np.int32))
        context.progress.advance(items)

    @classmethod
    def load(cls, config: CacheOptions, context: LoadContext) -> Self:
        """Map the counts."""
        return cls(config, writable(context.arrays["counts"]))

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Take what has not left the cache."""
        leftovers, config = batch.live.leftovers, self.config
        if not leftovers.rows.size:
            return CandidateBatch.empty(k.size)
        room = min(sum(k.tolist()), leftovers.rows.size)
        rows = np.empty(room, np.int32)
        scores = np.empty(room, np.float32)
        offsets = np.empty(k.size + 1, np.int64)
        total = _leftovers(
            leftovers.offsets, leftovers.rows, leftovers.scores, leftovers.timestamps, leftovers.recalls,
            self._counts, batch.now, k, config.max_recalls, config.max_days * SECONDS_PER_DAY,
            max(config.patient_days, config.max_days) * SECONDS_PER_DAY, config.low_interest, rows, scores, offsets,
        )  # fmt: skip
        return CandidateBatch(rows[:total], scores[:total], np.full(total, -1, np.int32), offsets)


@njit(nogil=True, cache=True)
def _leftovers(  # type: ignore[no-untyped-def]
    offsets, rows, ranks, times, recalls, counts, now, k, max_recalls, max_age, patient_age, low, out_rows, out_scores,
    out_offsets,
):  # fmt: skip
    longest = 0
    for q in range(k.size):
        longest = max(longest, offsets[q + 1] - offsets[q])
    order = np.empty(longest, np.int64)
    out_offsets[0] = 0
    written = 0
    for q in range(k.size):
        found = 0
        for p in range(offsets[q], offsets[q + 1]):
            row = rows[p]
            liked = counts[row] if row < counts.size else 0
            age = now[q] - times[p]
            if recalls[p] >= max_recalls or age > (patient_age if liked < low else max_age):
                continue
            at = found  # by insertion: what the store returns is in order but for the scores of one ranking
            while at > 0:
                other = order[at - 1]
                if times[other] > times[p] or (
                    times[other] == times[p]
                    and (ranks[other] > ranks[p] or (ranks[other] == ranks[p] and rows[other] < row))
                ):
                    break
                order[at] = other
                at -= 1
            order[at] = p
            found += 1
        for place in range(min(found, k[q])):
            out_rows[written] = rows[order[place]]
            out_scores[written] = -place
            written += 1
        out_offsets[q + 1] = written
    return written


def leftovers_reference(
    leftovers: Leftovers, counts: Int32Array, now: Int64Array, k: Int32Array, config: CacheOptions
) -> list[list[int]]:
    """The plain twin: the rows that each query gets."""
    lists: list[list[int]] = []
    for q in range(k.size):
        mine = []
        for p in range(int(leftovers.offsets[q]), int(leftovers.offsets[q + 1])):
            row, time = int(leftovers.rows[p]), int(leftovers.timestamps[p])
            low = (counts[row] if row < counts.size else 0) < config.low_interest
            days = max(config.max_days, config.patient_days if low else 0)
            if leftovers.recalls[p] < config.max_recalls and now[q] - time <= days * SECONDS_PER_DAY:
                mine.append((-time, -float(leftovers.scores[p]), row))
        lists.append([row for _, _, row in sorted(mine)][: int(k[q])])
    return lists
