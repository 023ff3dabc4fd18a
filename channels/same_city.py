"""Same city: the newest good posts of the city where the user is, and of those where they were.

Source: the recommender course (Wang Shusen, same-city recall): city -> good posts, newest first, for the user's city and
those they lived in.
"""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
from pydantic import Field

from engine.core.candidates import CandidateBatch
from engine.core.channel import BuildContext, Channel, LoadContext
from engine.core.items import ItemColumns
from engine.core.options import Online
from engine.core.postings import (
    NO_KEY,
    PostingLists,
    PostOptions,
    Reading,
    Wanted,
    write_posting_lists,
)
from engine.core.query import QueryBatch
from engine.core.ragged import first_and_others
from engine.core.types import Int32Array


class SameCityOptions(PostOptions):
    """Options of the same-city channel."""

    past_weight: Annotated[float, Field(ge=0, le=1), Online()] = 0.5
    """Weight of the posts of each city where the user was before; 0 leaves those cities out."""


class SameCity(Channel):
    """Recalls from the first city of `LiveState.cities`, and at a lower weight from the others."""

    Config = SameCityOptions
    inline = True

    def __init__(self, config: SameCityOptions, posts: PostingLists, columns: ItemColumns) -> None:
        super().__init__(config)
        self._posts = posts
        self._columns = columns
        self._reading = Reading.of(config)

    @classmethod
    def build(cls, config: SameCityOptions, context: BuildContext) -> None:
        """Write the posting lists of the cities; empty ones where the catalogue has no cities."""
        items, columns = context.interactions.items, context.item_columns
        context.progress.start("same_city", items)
        codes = columns.get("city", np.full(items, NO_KEY, np.int32)).astype(np.int64)
        write_posting_lists(
            context.sink, codes, columns.get("published_at"), lists=int(codes.max(initial=-1)) + 1
        )
        context.progress.advance(items)

    @classmethod
    def load(cls, config: SameCityOptions, context: LoadContext) -> Self:
        """Map the lists."""
        return cls(config, PostingLists.load(context.arrays, context.columns), context.columns)

    def update(self, rows: Int32Array) -> None:
        """Put items into the cities that they are in now."""
        self._posts.update(rows, self._columns.cities[rows].astype(np.int64))

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Read the lists of each user's cities."""
        cities = batch.live.cities
        if not cities.rows.size:
            return CandidateBatch.empty(k.size)
        nothing = np.full(cities.rows.size, -1, np.int32)
        weights = first_and_others(cities, self.config.past_weight)
        wanted = Wanted(cities.offsets, cities.rows.astype(np.int64), weights, nothing)
        return self._posts.read(wanted, self._reading, batch.now, k)
