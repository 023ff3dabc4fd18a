"""Availability: what was taken down, or is not published yet, is not returned."""

from __future__ import annotations

from typing import Self

import numpy as np
from numba import njit
from pydantic import Field

from engine.core.candidates import FanOut
from engine.core.channel import LoadContext
from engine.core.filter import Filter
from engine.core.items import NEVER, ItemColumns
from engine.core.options import Options
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Int64Array


class AvailabilityOptions(Options):
    """Options of the availability filter."""

    overfetch: int = Field(default=20, ge=0, le=100_000)
    """Candidates that each channel brings more, to make up for what is removed."""


class Availability(Filter):
    """Removes items that were taken down, and those published after the moment that the query speaks of.

    An item whose time is not known counts as published, and a query of no moment (0) sees what is yet to come.
    """

    Config = AvailabilityOptions
    bounded = False

    def __init__(self, config: AvailabilityOptions, columns: ItemColumns) -> None:
        super().__init__(config)
        self._columns = columns

    @classmethod
    def load(cls, config: AvailabilityOptions, context: LoadContext) -> Self:
        """Keep the columns."""
        return cls(config, context.columns)

    def overfetch(self, batch: QueryBatch) -> Int64Array:
        """Bring the option's number more: how many of a channel's items are gone nobody counts."""
        return np.full(len(batch), self.config.overfetch, np.int64)

    def keep(self, batch: QueryBatch, candidates: FanOut) -> BoolArray:
        """Return True where the candidate can be had at the query's moment."""
        return to_be_had(candidates, batch.now, self._columns.visible_from)


def to_be_had(candidates: FanOut, now: Int64Array, visible_from: Int64Array) -> BoolArray:
    """Return bool[m]: True where a candidate is available and published.

    Args:
        candidates: the fan-out.
        now: int64[queries], seconds since the epoch; 0 or less: published at any time will do.
        visible_from: int64[items], as in `ItemColumns`.
    """
    keep = np.empty(candidates.rows.size, np.bool_)
    _to_be_had(candidates.rows, candidates.offsets, now, visible_from, keep)
    return keep


@njit(nogil=True, cache=True)
def _to_be_had(rows, segments, now, visible_from, keep):  # type: ignore[no-untyped-def]
    for s in range(segments.size - 1):
        moment = now[s % now.size]
        if moment <= 0:
            moment = np.int64(NEVER - 1)
        for p in range(segments[s], segments[s + 1]):
            keep[p] = visible_from[np.uint32(rows[p])] <= moment


def to_be_had_reference(candidates: FanOut, now: Int64Array, visible_from: Int64Array) -> BoolArray:
    """The plain NumPy twin of `to_be_had`."""
    moment = np.where(now <= 0, NEVER - 1, now)[candidates.query_of_candidate()]
    visible: BoolArray = visible_from[candidates.rows] <= moment
    return visible
