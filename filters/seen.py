"""Seen: what the user's history holds is not returned again."""

from __future__ import annotations

from engine.core.candidates import FanOut
from engine.core.filter import Filter
from engine.core.members import not_members
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Int64Array


class Seen(Filter):
    """Removes the items of the query's own history."""

    def overfetch(self, batch: QueryBatch) -> Int64Array:
        """At most the whole history stands in front of what may be shown."""
        return batch.history.offsets[1:] - batch.history.offsets[:-1]

    def keep(self, batch: QueryBatch, candidates: FanOut) -> BoolArray | None:
        """Return True where the history does not hold the candidate."""
        if batch.history.rows.size == 0:
            return None
        return not_members(candidates, batch.history.rows, batch.history.offsets)
