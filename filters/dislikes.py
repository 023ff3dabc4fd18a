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


_MARKS = 8192
"""Places of the marks, a power of two; with 500 dislikes of a kind 6 % of them are set."""


@njit(nogil=True, cache=True, inline="always")
def _place(row):  # type: ignore[no-untyped-def]
    return spread(row) & (_MARKS - 1)


@njit(nogil=True, cache=True)
def _mark(marks, rows, begin, end, mark):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        marks[_place(rows[i])] = mark


@njit(nogil=True, cache=True)
def _among(rows, begin, end, row):  # type: ignore[no-untyped-def]
    found = False
    for i in range(begin, end):
        found |= rows[i] == row
    return found


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
    # A byte where a disliked row falls: the few candidates that fall on one are looked up, the others are passed with
    # a branch that the processor guesses right.
    marks = np.zeros((3, _MARKS), np.uint8)
    item_marks, author_marks, tag_marks = marks[0], marks[1], marks[2]
    marked = np.empty(rows.size, np.uint8)
    tags = np.zeros((rows.size, 2), np.int64)
    for q in range(queries):
        i0, i1 = items_offsets[q], items_offsets[q + 1]
        a0, a1 = authors_offsets[q], authors_offsets[q + 1]
        t0, t1 = tags_offsets[q], tags_offsets[q + 1]
        if i0 == i1 and a0 == a1 and t0 == t1:
            continue
        _mark(item_marks, items_disliked, i0, i1, np.uint8(1))
        _mark(author_marks, authors_disliked, a0, a1, np.uint8(1))
        _mark(tag_marks, tags_disliked, t0, t1, np.uint8(1))
        for s in range(q, segments.size - 1, queries):
            # The columns first, which lie all over the catalogue: no branch waits for them, so the reads overlap.
            for p in range(segments[s], segments[s + 1]):
                row = rows[p]
                marked[p] = item_marks[_place(row)] | author_marks[_place(authors[row])]
                if t0 < t1:
                    tags[p, 0], tags[p, 1] = tag_starts[row], tag_starts[row] + tag_counts[row]
            for p in range(segments[s], segments[s + 1]):
                for t in range(tags[p, 0], tags[p, 1]):
                    marked[p] |= tag_marks[_place(tag_codes[t])]
            for p in range(segments[s], segments[s + 1]):
                if marked[p] == 0:
                    continue
                row = rows[p]
                disliked = _among(items_disliked, i0, i1, row)
                disliked |= authors[row] >= 0 and _among(authors_disliked, a0, a1, authors[row])
                for t in range(tags[p, 0], tags[p, 1]):
                    disliked |= _among(tags_disliked, t0, t1, tag_codes[t])
                keep[p] = not disliked
        _mark(item_marks, items_disliked, i0, i1, np.uint8(0))
        _mark(author_marks, authors_disliked, a0, a1, np.uint8(0))
        _mark(tag_marks, tags_disliked, t0, t1, np.uint8(0))


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
