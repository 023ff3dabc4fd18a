"""Popular items: what everybody liked, recent likes counting more; overall, or by city or category of the user.

The overall ranking is the last resort, so it holds the whole catalogue.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field

from engine.core.candidates import CandidateBatch
from engine.core.channel import BuildContext, Channel, LoadContext
from engine.core.gather import gather_top_k
from engine.core.items import ItemColumns
from engine.core.options import Online, Options
from engine.core.query import QueryBatch
from engine.core.ragged import first_and_others
from engine.core.ranking import front
from engine.core.totals import heaviest_codes
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.core.writable import writable

SECONDS_PER_DAY = 86_400


class PopularOptions(Options):
    """Options of the popular channel."""

    half_life_days: Annotated[float, Field(gt=0)] = 30.0
    """A like counts half when it is this old; ages are measured from the last event of the data."""

    by: Literal["all", "city", "category"] = "all"
    """`all`: one ranking for everybody. `city`: one per city. `category`: one per tag."""

    kept: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Items kept per city or tag; the ranking for everybody is never cut."""

    groups: Annotated[int, Field(ge=1, le=1000), Online()] = 5
    """Cities, or tags, asked for: the first cities of the user, or the tags of most interest in their history."""

    past_weight: Annotated[float, Field(ge=0, le=1), Online()] = 0.5
    """Weight of each city where the user was before."""


class Popular(Channel):
    """Items by decayed interest: sum over likes of weight x 2^(-age / half-life).

    For everybody: all items, those nobody liked last, so that the channel runs dry only when the catalogue does. By city
    or category: items somebody liked, scores times the weight of the user's city or tag; an item of several adds up.
    """

    Config = PopularOptions
    inline = True

    def __init__(self, config: PopularOptions, arrays: dict[str, AnyArray], columns: ItemColumns) -> None:
        super().__init__(config)
        self._rows: Int32Array = writable(arrays["rows"])
        self._scores: Float32Array = writable(arrays["scores"])
        self._indptr: Int64Array = writable(arrays["indptr"])
        self._columns = columns

    @classmethod
    def build(cls, config: PopularOptions, context: BuildContext) -> None:
        """Write the rankings, best first: `indptr`, `rows`, `scores`."""
        liked = context.interactions
        context.progress.start("popular", liked.items)
        ages = np.maximum(context.now - liked.timestamps, 0)
        decay = np.exp2(-ages / (config.half_life_days * SECONDS_PER_DAY))
        scores = np.bincount(liked.rows, weights=liked.weights * decay, minlength=liked.items).astype(
            np.float32
        )
        if config.by == "all":
            rows = np.argsort(-scores, kind="stable")
            indptr = np.array([0, rows.size])
        else:
            members, groups = _members(config.by, context)
            indptr, rows = _ranked(members, groups, scores, config.kept)
        context.sink.write("indptr", indptr.astype(np.int64))
        context.sink.write("rows", rows.astype(np.int32))
        context.sink.write("scores", scores[rows])
        context.progress.advance(liked.items)

    @classmethod
    def load(cls, config: PopularOptions, context: LoadContext) -> Self:
        """Map the rankings."""
        return cls(config, dict(context.arrays), context.columns)

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Answer every query with the front of the one ranking, or of its user's."""
        config, columns = self.config, self._columns
        if config.by == "all":
            return front(self._rows, self._scores, k)
        if config.by == "city":
            groups = batch.live.cities
            weights = first_and_others(groups, config.past_weight)
        else:
            groups, weights = heaviest_codes(
                batch.history,
                batch.now,
                columns.tag_starts,
                columns.tag_counts,
                columns.tag_codes,
                config.groups,
            )
        if not groups.rows.size:
            return CandidateBatch.empty(k.size)
        found = gather_top_k(
            groups.offsets,
            groups.rows,
            weights,
            self._indptr,
            self._rows,
            self._scores,
            config.groups,
            config.kept,
            k,
        )
        nothing = np.full(
            found.rows.size, -1, np.int32
        )  # rows of cities and tags are no trigger that can be named
        return CandidateBatch(found.rows, found.scores, nothing, found.offsets)


def _members(by: Literal["city", "category"], context: BuildContext) -> tuple[AnyArray, AnyArray]:
    """Return (item, city or tag) pairs of all items that have any."""
    columns, items = context.item_columns, context.interactions.items
    if by == "city":
        codes = columns.get("city", np.full(items, -1, np.int32))
        rows = np.flatnonzero(codes >= 0)
        return rows, codes[rows]
    offsets = columns.get("tags.offsets", np.zeros(items + 1, np.int64))
    codes = columns.get("tags.codes", np.empty(0, np.int32))
    return np.repeat(np.arange(items), np.diff(offsets)), codes


def _ranked(
    members: AnyArray, groups: AnyArray, scores: Float32Array, kept: int
) -> tuple[Int64Array, Int64Array]:
    """Return where each group's ranking begins, and the liked items of each, best first, at most `kept`."""
    liked = scores[members] > 0
    members, groups = members[liked], groups[liked]
    order = np.lexsort((members, -scores[members], groups))
    members, groups = members[order], groups[order]
    # A tag may stand twice with an item.
    first = np.ones(order.size, np.bool_)
    first[1:] = (members[1:] != members[:-1]) | (groups[1:] != groups[:-1])
    members, groups = members[first], groups[first]
    starts = np.searchsorted(groups, np.arange(int(groups.max(initial=-1)) + 2))
    place = np.arange(groups.size) - starts[groups]
    indptr = np.concatenate((np.zeros(1, np.int64), np.cumsum(np.minimum(np.diff(starts), kept))))
    return indptr, members[place < kept]
