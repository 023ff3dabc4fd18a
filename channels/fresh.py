"""Fresh items: newest publications first, for users of whom nothing is known."""

from __future__ import annotations

from typing import Self

import numpy as np

from engine.core.candidates import CandidateBatch
from engine.core.channel import BuildContext, Channel, LoadContext
from engine.core.options import Options
from engine.core.query import QueryBatch
from engine.core.ranking import front
from engine.core.types import Float32Array, Int32Array


class Fresh(Channel):
    """Items by time of publication, newest first; the score is minus the age in days at the build.

    Items of no known publication time are left out; a catalogue without the column gives an empty channel.
    """

    def __init__(self, config: Options, rows: Int32Array, scores: Float32Array) -> None:
        super().__init__(config)
        self._rows = rows
        self._scores = scores

    @classmethod
    def build(cls, config: Options, context: BuildContext) -> None:
        """Write `rows` and `scores`, newest first."""
        del config
        published = context.item_columns.get("published_at")
        context.progress.start("fresh", context.interactions.items)
        known = np.flatnonzero(published >= 0) if published is not None else np.empty(0, np.int64)
        times = published[known] if published is not None else np.empty(0, np.int64)
        order = np.argsort(-times, kind="stable")
        context.sink.write("rows", known[order].astype(np.int32))
        context.sink.write("scores", ((times[order] - context.now) / 86_400).astype(np.float32))
        context.progress.advance(context.interactions.items)

    @classmethod
    def load(cls, config: Options, context: LoadContext) -> Self:
        """Map the ranking."""
        return cls(config, context.arrays["rows"], context.arrays["scores"])

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Answer every query with the front of the one ranking."""
        return front(self._rows, self._scores, k)
