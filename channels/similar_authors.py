"""Similar authors: the newest posts of authors who have their followers and readers in common with those the user likes.

Source: the recommender course (Wang Shusen, author recall): authors are similar when their fans overlap, computed as
ItemCF computes items; the authors a user likes are those followed and those interacted with; of each similar author the
newest post is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Self

import numpy as np
from numba import njit
from pydantic import Field

from channels.followed_authors import AuthorPosts
from channels.interacted_authors import InteractedAuthorsOptions
from engine.core.candidates import CandidateBatch, FanOut
from engine.core.channel import BuildContext, LoadContext, Progress
from engine.core.gather import gather_top_k
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.members import not_members_reference
from engine.core.options import Online
from engine.core.postings import SECONDS_PER_DAY, PostingLists, Wanted
from engine.core.query import QueryBatch
from engine.core.similarity import (
    Finish,
    NeighbourBlock,
    NeighbourLists,
    SparseRows,
    power,
    top_k_products,
    write_neighbour_lists,
)
from engine.core.totals import heaviest_codes
from engine.core.types import Int32Array, RaggedRows


class SimilarAuthorsOptions(InteractedAuthorsOptions):
    """Options of the similar-authors channel."""

    authors: Annotated[int, Field(ge=1, le=10_000), Online()] = 100
    """Similar authors asked for at most."""

    per_author: Annotated[int, Field(ge=1, le=10_000), Online()] = 1
    """Newest posts taken of each; 1 in the course."""

    follow_points: Annotated[float, Field(ge=0)] = 1.0
    """What a follow adds to a user's interest in an author when similarities are computed."""

    shrinkage: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """A similarity that rests on n common users is multiplied by n / (n + this). 0 in the course."""

    neighbours: Annotated[int, Field(ge=1, le=10_000)] = 50
    """Similar authors kept per author."""

    follow_weight: Annotated[float, Field(gt=0), Online()] = 1.0
    """Weight of a followed author among those that the user likes, besides the interest in their posts."""

    sources: Annotated[int, Field(ge=1, le=10_000), Online()] = 50
    """Authors the user likes most that similar ones are looked up of."""

    top_k: Annotated[int, Field(ge=1, le=10_000), Online()] = 10
    """Similar authors taken of each."""


class SimilarAuthors(AuthorPosts):
    """Recalls from authors similar to those the user follows or likes, not from those; the trigger is the latter."""

    Config = SimilarAuthorsOptions

    def __init__(
        self,
        config: SimilarAuthorsOptions,
        posts: PostingLists,
        columns: ItemColumns,
        similar: NeighbourLists,
    ) -> None:
        super().__init__(config, posts, columns)
        self._similar = similar

    @classmethod
    def build(cls, config: SimilarAuthorsOptions, context: BuildContext) -> None:
        """Write the posting lists and each author's similar authors; empty where the catalogue has no authors."""
        super().build(config, context)
        authors = context.item_columns.get("author", np.full(context.interactions.items, -1, np.int32))
        engaged = engagement(
            context.interactions, authors, context.authors, context.follows, config.follow_points
        )
        write_neighbour_lists(
            context.sink, author_neighbours(engaged, config, context.threads, context.progress)
        )

    @classmethod
    def load(cls, config: SimilarAuthorsOptions, context: LoadContext) -> Self:
        """Map the lists."""
        arrays, columns = context.arrays, context.columns
        return cls(config, PostingLists.load(arrays, columns), columns, NeighbourLists.load(arrays))

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Gather sources x top_k similar authors per query and read the lists of the best of them."""
        config = self.config
        sources, weights = heaviest_codes(
            batch.history,
            batch.now,
            None,
            None,
            self._columns.authors,
            config.sources,
            config.interest_days * SECONDS_PER_DAY,
            config.max_days * SECONDS_PER_DAY,
            batch.live.follows,
            config.follow_weight,
        )
        if not sources.rows.size:
            return CandidateBatch.empty(k.size)
        # The sources themselves are other channels' business: as many more are gathered as can be among them.
        found = gather_top_k(
            sources.offsets,
            sources.rows,
            weights,
            self._similar.indptr,
            self._similar.neighbours,
            self._similar.similarities,
            config.sources,
            config.top_k,
            (config.authors + sources.lengths).astype(np.int32),
        )
        return self._posts.read(others(found, sources), self._reading, batch.now, k)


def others(found: CandidateBatch, sources: RaggedRows) -> Wanted:
    """Return the authors found that are not sources of the same query, in their order, as lists to read.

    Args:
        found: authors; their scores are weights.
        sources: authors of each query.
    """
    keys, weights = np.empty(found.rows.size, np.int64), np.empty(found.rows.size, np.float32)
    triggers, offsets = np.empty(found.rows.size, np.int32), np.empty(found.offsets.size, np.int64)
    size = _others(
        found.rows, found.scores, found.triggers, found.offsets, sources.rows, sources.offsets, keys, weights,
        triggers, offsets,
    )  # fmt: skip
    return Wanted(offsets, keys[:size], weights[:size], triggers[:size])


@njit(nogil=True, cache=True)
def _others(  # type: ignore[no-untyped-def]
    rows, scores, triggers, offsets, sources, source_offsets, out_keys, out_weights, out_triggers, out_offsets
):
    size = 0
    out_offsets[0] = 0
    for q in range(offsets.size - 1):
        for p in range(offsets[q], offsets[q + 1]):
            new = True
            for s in range(
                source_offsets[q], source_offsets[q + 1]
            ):  # some dozens: to look is quicker than to hash
                new &= sources[s] != rows[p]
            if new:
                out_keys[size] = rows[p]
                out_weights[size] = scores[p]
                out_triggers[size] = triggers[p]
                size += 1
        out_offsets[q + 1] = size
    return size


def others_reference(found: CandidateBatch, sources: RaggedRows) -> Wanted:
    """The plain NumPy twin of `others`."""
    candidates = FanOut(found.rows, found.offsets, found.offsets.size - 1)
    new = not_members_reference(candidates, sources.rows, sources.offsets)
    offsets = np.concatenate(([0], np.cumsum(new, dtype=np.int64)))[found.offsets]
    return Wanted(offsets, found.rows[new].astype(np.int64), found.scores[new], found.triggers[new])


def engagement(
    liked: Interactions,
    author_of: Int32Array,
    authors: int,
    follows: Interactions | None,
    follow_points: float,
) -> Interactions:
    """Return users x authors: the interest in an author's items added up, and `follow_points` for a follow.

    Args:
        liked: users x items.
        author_of: int32[items], author rows; -1 where not known.
        authors: rows in the index of authors.
        follows: users x authors; None for none.
        follow_points: what a follow is worth.
    """
    if follows is None or follow_points == 0:
        nothing = np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int64)
        follows = Interactions(liked.users, authors, np.zeros(liked.users + 1, np.int64), *nothing)
    indptr = np.zeros(liked.users + 1, np.int64)
    rows = np.empty(liked.entries + follows.entries, np.int32)
    weights = np.empty(rows.size, np.float32)
    size = _engagement(
        liked.indptr, liked.rows, liked.weights, author_of.astype(np.int32), follows.indptr, follows.rows,
        np.float32(follow_points), np.zeros(authors, np.float32), indptr, rows, weights,
    )  # fmt: skip
    return Interactions(liked.users, authors, indptr, rows[:size], weights[:size], np.zeros(size, np.int64))


@njit(nogil=True, cache=True)
def _engagement(  # type: ignore[no-untyped-def]
    indptr, items, interest, author_of, follow_indptr, followed, follow_points, sums, out_indptr, out_rows, out_weights
):  # fmt: skip
    """A dense accumulator per user, as in `top_k_products`; authors in the order in which they are met."""
    written = 0
    for u in range(indptr.size - 1):
        start = written
        for p in range(indptr[u], indptr[u + 1]):
            author = author_of[items[p]]
            if author >= 0 and interest[p] > 0:
                if sums[author] == 0:
                    out_rows[written] = author
                    written += 1
                sums[author] += interest[p]
        for p in range(follow_indptr[u], follow_indptr[u + 1]):
            author = followed[p]
            if sums[author] == 0:
                out_rows[written] = author
                written += 1
            sums[author] += follow_points
        for at in range(start, written):
            out_weights[at] = sums[out_rows[at]]
            sums[out_rows[at]] = 0
        out_indptr[u + 1] = written
    return written


def author_neighbours(
    engaged: Interactions, config: SimilarAuthorsOptions, threads: int, progress: Progress
) -> Iterable[NeighbourBlock]:
    """Yield every author's similar authors, block by block: the cosine of their engagement vectors over users.

    Args:
        engaged: users x authors, as `engagement` makes it.
        config: options.
        threads, progress: as everywhere.
    """
    by_author = engaged.by_item()
    values = engaged.weights
    squares = np.bincount(engaged.rows, weights=np.square(values, dtype=np.float64), minlength=engaged.items)
    norms = power(squares.astype(np.float64), 0.5)
    return top_k_products(
        SparseRows(by_author.indptr, by_author.users, values[by_author.positions]),
        SparseRows(engaged.indptr, engaged.rows, values),
        np.ones(engaged.users, np.float32),
        norms,
        config.shrinkage,
        config.neighbours,
        Finish(False, 1.0, norms),
        threads,
        progress,
        "similar authors",
    )
