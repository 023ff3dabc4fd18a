"""Interacted authors: the newest posts of the authors whose posts the user liked lately, followed or not.

Source: the recommender course (Wang Shusen, author recall): the list of a user's authors is kept fresh; those of whom the
user liked nothing for a while leave it.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from channels.followed_authors import AuthorOptions, AuthorPosts
from engine.core.candidates import CandidateBatch
from engine.core.options import Online
from engine.core.postings import SECONDS_PER_DAY, Wanted
from engine.core.query import QueryBatch
from engine.core.totals import heaviest_codes
from engine.core.types import Int32Array


class InteractedAuthorsOptions(AuthorOptions):
    """Options of the interacted-authors channel."""

    authors: Annotated[int, Field(ge=1, le=10_000), Online()] = 50
    """Authors asked for at most: those of most interest."""

    interest_days: Annotated[float, Field(gt=0), Online()] = 30.0
    """Interest in a post counts half for its author when it is this old."""

    max_days: Annotated[float, Field(gt=0), Online()] = 90.0
    """What the user did before that does not count; an event of no known time counts as one of now."""


class InteractedAuthors(AuthorPosts):
    """Recalls from the authors of the history's items, weighted by the interest in them and its recency."""

    Config = InteractedAuthorsOptions

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Add up interest by author and read the lists of the first."""
        config = self.config
        authors, weights = heaviest_codes(
            batch.history,
            batch.now,
            None,
            None,
            self._columns.authors,
            config.authors,
            config.interest_days * SECONDS_PER_DAY,
            config.max_days * SECONDS_PER_DAY,
        )
        if not authors.rows.size:
            return CandidateBatch.empty(k.size)
        wanted = Wanted(authors.offsets, authors.rows.astype(np.int64), weights, authors.rows)
        return self._posts.read(wanted, self._reading, batch.now, k)
