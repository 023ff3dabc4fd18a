"""Excluded: what the request forbids."""

from __future__ import annotations

from engine.core.filter import FanOut, Filter
from engine.core.members import not_members
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Int64Array


class Excluded(Filter):
    """Removes the items that the request named in exclude_item_ids or exclude_item_keys."""

    def overfetch(self, batch: QueryBatch) -> Int64Array:
        """At most every excluded item stands in front of what may be shown."""
        return batch.excluded.lengths

    def keep(self, batch: QueryBatch, candidates: FanOut) -> BoolArray:
        """Return True where the request does not exclude the candidate."""
        return not_members(candidates, batch.excluded.rows, batch.excluded.offsets)
