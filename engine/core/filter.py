"""The filter contract: says of each candidate whether it stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from engine.core.options import Options
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Int32Array, Int64Array


@dataclass(frozen=True, slots=True)
class FanOut:
    """The candidates of all channels for a batch, channel after channel, as filters and the merge see them.

    Segment s = channel * queries + query owns [offsets[s], offsets[s + 1]).

    Attributes:
        rows: int32[m], catalogue rows.
        offsets: int64[channels * queries + 1].
        queries: how many queries the batch has.
    """

    rows: Int32Array
    offsets: Int64Array
    queries: int

    def query_of_candidate(self) -> Int32Array:
        """int32[m]: which query each candidate belongs to."""
        segments = self.offsets.size - 1
        owner = np.tile(np.arange(self.queries, dtype=np.int32), segments // max(self.queries, 1))
        return np.repeat(owner, np.diff(self.offsets))


class Filter:
    """Removes candidates that must not be shown.

    A plugin subclasses this and implements `keep`. Counting what each filter removed is the framework's.
    """

    Config: ClassVar[type[Options]] = Options
    """The options of this filter; unknown keys are refused."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def load(cls, config: Any, items: int) -> Self:
        """Return a filter for a catalogue of `items` rows."""
        del items
        return cls(config)

    def overfetch(self, batch: QueryBatch) -> Int64Array | None:
        """Say how many more candidates each channel should bring to make up for what this filter removes.

        Returns:
            int64[n], or None for none.
        """
        del batch
        return None

    def keep(self, batch: QueryBatch, candidates: FanOut) -> BoolArray | None:
        """Return bool[m]: True where the candidate stays; None where all do."""
        raise NotImplementedError(f"{type(self).__name__} has no keep()")
