"""Exposure: what the user was shown lately is not returned again."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field

from engine.core.candidates import FanOut
from engine.core.channel import LoadContext
from engine.core.errors import StateUnavailableError
from engine.core.filter import Filter
from engine.core.items import ItemColumns
from engine.core.options import Options
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Int64Array


class ExposureOptions(Options):
    """Options of the exposure filter."""

    overfetch: int = Field(default=200, ge=0, le=100_000)
    """Candidates that each channel brings more, at most; fewer where the user was shown fewer items."""


class Exposure(Filter):
    """Removes what the user state says was shown. See engine/core/exposure.py for how it is kept."""

    Config = ExposureOptions
    bounded = False

    def __init__(self, config: ExposureOptions, columns: ItemColumns) -> None:
        super().__init__(config)
        self._columns = columns

    @classmethod
    def load(cls, config: ExposureOptions, context: LoadContext) -> Self:
        """Keep the columns, for the keys of the items."""
        return cls(config, context.columns)

    def overfetch(self, batch: QueryBatch) -> Int64Array | None:
        """Bring as many more as were shown, up to the option: of all that was shown little is recalled again."""
        if batch.live.exposure is None:
            return None
        more: Int64Array = np.minimum(batch.live.exposure.shown(), self.config.overfetch)
        return more

    def keep(self, batch: QueryBatch, candidates: FanOut) -> BoolArray | None:
        """Return True where the user was not shown the candidate.

        Raises:
            StateUnavailableError: the state store did not answer and somebody in the batch is no guest, or what it
                answered cannot be read.
        """
        if not batch.live.available and not batch.guests.all():
            raise StateUnavailableError("what the user was shown could not be read")
        if batch.live.exposure is None:
            return None
        return ~batch.live.exposure.seen(candidates, self._columns.keys)
