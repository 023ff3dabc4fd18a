"""Excluded: what the request forbids."""

from __future__ import annotations

from engine.core.candidates import FanOut
from engine.core.filter import Filter
from engine.core.members import not_members
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Int64Array


class Excluded(Filter):
    """Removes the items that the request named in exclude_item_ids or exclude_item_keys."""

    def overfetch(self, batch: QueryBatch) -> Int64Array | None:
        """At most every excluded item stands in front of what may be shown."""
        if batch.excluded.rows.size == 0:
            return None
        return batch.excluded.lengths

    def keep(self, batch: QueryBatch, candidates: FanOut) -> BoolArray | None:
        """Return True where the request does not exclude the candidate."""
        if batch.excluded.rows.size == 0:
            return None
        return not_members(candidates, batch.excluded.rows, batch.excluded.offsets)
