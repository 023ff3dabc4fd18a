"""Age: what was published too long ago is not returned."""

from __future__ import annotations

from typing import Self

import numpy as np
from numba import njit
from pydantic import Field

from engine.core.candidates import FanOut
from engine.core.channel import LoadContext
from engine.core.filter import Filter
from engine.core.items import ItemColumns
from engine.core.options import Options
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Int64Array


class AgeOptions(Options):
    """Options of the age filter."""

    max_days: float = Field(default=90.0, gt=0)
    """Items published longer ago, seen from the query's moment, are removed."""

    keep_unknown: bool = True
    """Whether items stay whose time of publication is not known."""

    overfetch: int = Field(default=100, ge=0, le=100_000)
    """Candidates that each channel brings more, to make up for what is removed."""


class Age(Filter):
    """Removes items that are older than a limit. A query of no moment (0) sees items of every age."""

    Config = AgeOptions
    bounded = False

    def __init__(self, config: AgeOptions, columns: ItemColumns) -> None:
        super().__init__(config)
        self._columns = columns
        self._seconds = round(config.max_days * 86_400)

    @classmethod
    def load(cls, config: AgeOptions, context: LoadContext) -> Self:
        """Keep the columns."""
        return cls(config, context.columns)

    def overfetch(self, batch: QueryBatch) -> Int64Array:
        """Bring the option's number more: how many of a channel's items are old nobody counts."""
        return np.full(len(batch), self.config.overfetch, np.int64)

    def keep(self, batch: QueryBatch, candidates: FanOut) -> BoolArray:
        """Return True where the candidate is young enough."""
        published_at = self._columns.published_at
        return young_enough(candidates, batch.now, published_at, self._seconds, self.config.keep_unknown)


def young_enough(
    candidates: FanOut, now: Int64Array, published_at: Int64Array, seconds: int, keep_unknown: bool
) -> BoolArray:
    """Return bool[m]: True where a candidate is at most so old.

    Args:
        candidates: the fan-out.
        now: int64[queries], seconds since the epoch; 0 or less: every age will do.
        published_at: int64[items], seconds since the epoch; negative where not known.
        seconds: the largest age.
        keep_unknown: what to say where the time is not known.
    """
    keep = np.empty(candidates.rows.size, np.bool_)
    _young_enough(candidates.rows, candidates.offsets, now, published_at, seconds, keep_unknown, keep)
    return keep


@njit(nogil=True, cache=True)
def _young_enough(rows, segments, now, published_at, seconds, keep_unknown, keep):  # type: ignore[no-untyped-def]
    for s in range(segments.size - 1):
        moment = now[s % now.size]
        for p in range(segments[s], segments[s + 1]):
            time = published_at[rows[p]]
            if time < 0:
                keep[p] = keep_unknown
            else:
                keep[p] = moment <= 0 or moment - time <= seconds


def young_enough_reference(
    candidates: FanOut, now: Int64Array, published_at: Int64Array, seconds: int, keep_unknown: bool
) -> BoolArray:
    """The plain NumPy twin of `young_enough`."""
    moment, time = now[candidates.query_of_candidate()], published_at[candidates.rows]
    return np.where(time < 0, keep_unknown, (moment <= 0) | (moment - time <= seconds))
