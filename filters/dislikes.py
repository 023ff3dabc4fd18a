"""Dislikes: items, authors and topics that the user does not want are not returned."""

from __future__ import annotations

from typing import Self

import numpy as np
from numba import njit
from pydantic import Field

from engine.core.candidates import FanOut
from engine.core.channel import LoadContext
from engine.core.errors import StateUnavailableError
from engine.core.filter import Filter
from engine.core.hashing import spread
from engine.core.items import ItemColumns
from engine.core.live import LiveState
from engine.core.options import Options
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Int64Array


class DislikesOptions(Options):
    """Options of the dislikes filter."""

    overfetch: int = Field(default=50, ge=0, le=100_000)
    """Candidates that each channel brings more where the user dislikes authors or topics, besides the disliked items."""


class Dislikes(Filter):
    """Removes items that the user dislikes, items of an author or with a tag that the user dislikes."""

    Config = DislikesOptions
    bounded = False

    def __init__(self, config: DislikesOptions, columns: ItemColumns) -> None:
        super().__init__(config)
        self._columns = columns

    @classmethod
    def load(cls, config: DislikesOptions, context: LoadContext) -> Self:
        """Keep the columns, for authors and tags of the items."""
        return cls(config, context.columns)

    def overfetch(self, batch: QueryBatch) -> Int64Array | None:
        """Bring as many more as items are disliked, and the option's number for authors and topics."""
        live = batch.live
        if _nobody_dislikes(live):
            return None
        by_property = (live.disliked_authors.lengths > 0) | (live.disliked_tags.lengths > 0)
        return live.disliked_items.lengths + np.where(by_property, self.config.overfetch, 0)

    def keep(self, batch: QueryBatch, candidates: FanOut) -> BoolArray | None:
        """Return True where the user dislikes neither the candidate nor its author nor one of its tags.

        Raises:
            StateUnavailableError: the state store did not answer and somebody in the batch is no guest.
        """
        if not batch.live.available and not batch.guests.all():
            raise StateUnavailableError("what the user dislikes could not be read")
        return None if _nobody_dislikes(batch.live) else not_disliked(candidates, batch.live, self._columns)


def _nobody_dislikes(live: LiveState) -> bool:
    return not (
        live.disliked_items.rows.size or live.disliked_authors.rows.size or live.disliked_tags.rows.size
    )


def not_disliked(candidates: FanOut, live: LiveState, columns: ItemColumns) -> BoolArray:
    """Return bool[m]: True where a candidate's user dislikes neither it nor its author nor one of its tags.

    Args:
        candidates: the fan-out.
        live: the dislikes of its queries' users.
        columns: authors and tags of the items.
    """
    keep = np.ones(candidates.rows.size, np.bool_)
    _not_disliked(
        candidates.rows,
        candidates.offsets,
        candidates.queries,
        columns.authors,
        columns.tag_starts,
        columns.tag_counts,
        columns.tag_codes,
        live.disliked_items.rows,
        live.disliked_items.offsets,
        live.disliked_authors.rows,
        live.disliked_authors.offsets,
        live.disliked_tags.rows,
        live.disliked_tags.offsets,
        keep,
    )
    return keep


@njit(nogil=True, cache=True)
def _table_of(longest):  # type: ignore[no-untyped-def]
    """Return an open-addressing table for so many rows, at most half full."""
    capacity = 2
    while capacity < 2 * longest:
        capacity *= 2
    return np.full(capacity, -1, np.int32)


@njit(nogil=True, cache=True)
def _longest(offsets):  # type: ignore[no-untyped-def]
    longest = 0
    for q in range(offsets.size - 1):
        longest = max(longest, offsets[q + 1] - offsets[q])
    return longest


@njit(nogil=True, cache=True)
def _fill(table, rows, begin, end):  # type: ignore[no-untyped-def]
    """Put rows into a table in place of what it holds."""
    table[:] = -1
    mask = table.size - 1
    for i in range(begin, end):
        at = spread(rows[i]) & mask
        while table[at] != -1 and table[at] != rows[i]:
            at = (at + 1) & mask
        table[at] = rows[i]


@njit(nogil=True, cache=True, inline="always")
def _holds(table, row):  # type: ignore[no-untyped-def]
    mask = table.size - 1
    at = spread(row) & mask
    while table[at] != -1 and table[at] != row:
        at = (at + 1) & mask
    return table[at] != -1


@njit(nogil=True, cache=True)
def _not_disliked(  # type: ignore[no-untyped-def]
    rows,
    segments,
    queries,
    authors,
    tag_starts,
    tag_counts,
    tag_codes,
    items_disliked,
    items_offsets,
    authors_disliked,
    authors_offsets,
    tags_disliked,
    tags_offsets,
    keep,
):
    items_table = _table_of(_longest(items_offsets))
    authors_table = _table_of(_longest(authors_offsets))
    tags_table = _table_of(_longest(tags_offsets))
    for q in range(queries):
        by_item = items_offsets[q] < items_offsets[q + 1]
        by_author = authors_offsets[q] < authors_offsets[q + 1]
        by_tag = tags_offsets[q] < tags_offsets[q + 1]
        if by_item:
            _fill(items_table, items_disliked, items_offsets[q], items_offsets[q + 1])
        if by_author:
            _fill(authors_table, authors_disliked, authors_offsets[q], authors_offsets[q + 1])
        if by_tag:
            _fill(tags_table, tags_disliked, tags_offsets[q], tags_offsets[q + 1])
        if not (by_item or by_author or by_tag):
            continue
        for s in range(q, segments.size - 1, queries):
            for p in range(segments[s], segments[s + 1]):
                row = rows[p]
                bad = by_item and _holds(items_table, row)
                if not bad and by_author and authors[row] >= 0:
                    bad = _holds(authors_table, authors[row])
                if not bad and by_tag:
                    for t in range(tag_starts[row], tag_starts[row] + tag_counts[row]):
                        bad = bad or _holds(tags_table, tag_codes[t])
                keep[p] = not bad


def not_disliked_reference(candidates: FanOut, live: LiveState, columns: ItemColumns) -> BoolArray:
    """The plain NumPy twin of `not_disliked`."""
    keep = np.ones(candidates.rows.size, np.bool_)
    for at, (q, row) in enumerate(zip(candidates.query_of_candidate(), candidates.rows, strict=True)):
        tags = columns.tag_codes[columns.tag_starts[row] : columns.tag_starts[row] + columns.tag_counts[row]]
        keep[at] = not (
            np.isin(row, live.disliked_items.alone(q).rows)
            or (
                columns.authors[row] >= 0
                and np.isin(columns.authors[row], live.disliked_authors.alone(q).rows)
            )
            or np.isin(tags, live.disliked_tags.alone(q).rows).any()
        )
    return keep
