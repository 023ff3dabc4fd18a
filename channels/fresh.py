"""Fresh items: newest publications first, for users of whom nothing is known."""

from __future__ import annotations

from typing import Self

import numpy as np

from engine.core.candidates import CandidateBatch
from engine.core.channel import BuildContext, Channel, LoadContext
from engine.core.items import ItemColumns
from engine.core.postings import (
    NO_KEY,
    SECONDS_PER_DAY,
    GateOptions,
    PostingLists,
    Reading,
    Wanted,
    write_posting_lists,
)
from engine.core.query import QueryBatch
from engine.core.types import Int32Array, Int64Array


class FreshOptions(GateOptions):
    """Options of the fresh channel."""


class Fresh(Channel):
    """Items by time of publication, newest first; the score is minus the age in days.

    Items of no known publication time are left out; a catalogue without the column gives an empty channel.
    """

    Config = FreshOptions
    inline = True

    def __init__(self, config: FreshOptions, posts: PostingLists, columns: ItemColumns) -> None:
        super().__init__(config)
        self._posts = posts
        self._columns = columns
        # At one half-life a day the score of a list of weight 1 is minus the age in days.
        self._reading = Reading(
            float(SECONDS_PER_DAY), config.min_quality, max_age=config.max_age_days * SECONDS_PER_DAY
        )

    @classmethod
    def build(cls, config: FreshOptions, context: BuildContext) -> None:
        """Write the one posting list."""
        items = context.interactions.items
        context.progress.start("fresh", items)
        published = context.item_columns.get("published_at", np.full(items, -1, np.int64))
        write_posting_lists(context.sink, _dated(published), published, lists=1)
        context.progress.advance(items)

    @classmethod
    def load(cls, config: FreshOptions, context: LoadContext) -> Self:
        """Map the list."""
        return cls(config, PostingLists.load(context.arrays, context.columns), context.columns)

    def update(self, rows: Int32Array) -> None:
        """Put items where their times of publication say."""
        self._posts.update(rows, _dated(self._columns.published_at[rows]))

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Answer every query with the newest items that are published by its time."""
        n = k.size
        wanted = Wanted(
            np.arange(n + 1), np.zeros(n, np.int64), np.ones(n, np.float32), np.full(n, -1, np.int32)
        )
        return self._posts.read(wanted, self._reading, batch.now, k)


def _dated(published: Int64Array) -> Int64Array:
    """int64[n]: list 0 for items of known time, none for the others."""
    return np.where(published >= 0, 0, NO_KEY)
