"""Popular items: what everybody liked, recent likes counting more. The last resort, so it ranks the whole catalogue."""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
from pydantic import Field

from engine.core.candidates import CandidateBatch
from engine.core.channel import BuildContext, Channel, LoadContext
from engine.core.options import Options
from engine.core.query import QueryBatch
from engine.core.ranking import front
from engine.core.types import Float32Array, Int32Array

SECONDS_PER_DAY = 86_400


class PopularOptions(Options):
    """Options of the popular channel."""

    half_life_days: Annotated[float, Field(gt=0)] = 30.0
    """A like counts half when it is this old; ages are measured from the last event of the data."""


class Popular(Channel):
    """Every item of the catalogue by decayed interest: sum over likes of weight x 2^(-age / half-life).

    Items nobody liked come last, so that the channel runs dry only when the catalogue does.
    """

    Config = PopularOptions

    def __init__(self, config: PopularOptions, rows: Int32Array, scores: Float32Array) -> None:
        super().__init__(config)
        self._rows = rows
        self._scores = scores

    @classmethod
    def build(cls, config: PopularOptions, context: BuildContext) -> None:
        """Write `rows` and `scores`, best first."""
        liked = context.interactions
        context.progress.start("popular", liked.items)
        ages = np.maximum(context.now - liked.timestamps, 0)
        decay = np.exp2(-ages / (config.half_life_days * SECONDS_PER_DAY))
        scores = np.bincount(liked.rows, weights=liked.weights * decay, minlength=liked.items).astype(
            np.float32
        )
        order = np.argsort(-scores, kind="stable").astype(np.int32)
        context.sink.write("rows", order)
        context.sink.write("scores", scores[order])
        context.progress.advance(liked.items)

    @classmethod
    def load(cls, config: PopularOptions, context: LoadContext) -> Self:
        """Map the ranking."""
        return cls(config, context.arrays["rows"], context.arrays["scores"])

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Answer every query with the front of the one ranking."""
        return front(self._rows, self._scores, k)
