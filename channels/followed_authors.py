"""Followed authors: the newest posts of the authors that the user follows.

Source: the recommender course (Wang Shusen, author recall): user -> followed authors -> newest posts.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field

from engine.core.candidates import CandidateBatch, TriggerKind
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
from engine.core.types import Int32Array


class AuthorOptions(PostOptions):
    """Options of every channel that recalls posts of authors."""

    authors: Annotated[int, Field(ge=1, le=10_000), Online()] = 200
    """Authors asked for at most."""

    per_author: Annotated[int, Field(ge=1, le=10_000), Online()] = 20
    """Newest posts taken of each."""


class AuthorPosts(Channel):
    """What the author channels share: a posting list per author, kept up to date; the trigger is the author."""

    Config = AuthorOptions
    inline = True
    trigger_kind = TriggerKind.AUTHOR

    def __init__(self, config: Any, posts: PostingLists, columns: ItemColumns) -> None:
        super().__init__(config)
        self._posts = posts
        self._columns = columns
        self._reading = Reading.of(config, lists=config.authors, per_list=config.per_author)

    @classmethod
    def build(cls, config: Any, context: BuildContext) -> None:
        """Write the posting lists of the authors; empty ones where the catalogue has no authors."""
        items, columns = context.interactions.items, context.item_columns
        context.progress.start("posts of authors", items)
        authors = columns.get("author", np.full(items, NO_KEY, np.int32)).astype(np.int64)
        write_posting_lists(context.sink, authors, columns.get("published_at"), lists=context.authors)
        context.progress.advance(items)

    @classmethod
    def load(cls, config: Any, context: LoadContext) -> Self:
        """Map the lists."""
        return cls(config, PostingLists.load(context.arrays, context.columns), context.columns)

    def update(self, rows: Int32Array) -> None:
        """Give items to the authors that they are of now."""
        self._posts.update(rows, self._columns.authors[rows].astype(np.int64))


class FollowedAuthors(AuthorPosts):
    """Recalls from the authors that the user followed last, all alike: newest posts first."""

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Read the lists of the authors followed."""
        follows = batch.live.follows
        if not follows.rows.size:
            return CandidateBatch.empty(k.size)
        return self._posts.read(Wanted.alike(follows), self._reading, batch.now, k)
