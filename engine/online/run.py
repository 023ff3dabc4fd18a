"""One batch on its way down the stages of a pipeline, and the columns that it carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from engine.core.candidates import CandidateBatch, FanOut
from engine.core.errors import StateUnavailableError
from engine.core.merge import Merged
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Float32Array, Float64Array, Int8Array, Int32Array
from engine.online.hydrate import Hydrated
from engine.online.request import Request


class Columns(NamedTuple):
    """The candidates of some channels for a batch, channel after channel: what filters and the merge work on.

    Of the filters `keep` says whether none removed the candidate, and `removed_by` which one did: int8[m], its place
    in the scene's filters, or -1.
    """

    fan_out: FanOut
    scores: Float32Array
    triggers: Int32Array
    keep: BoolArray
    removed_by: Int8Array

    @classmethod
    def of(cls, answers: Sequence[CandidateBatch], queries: int) -> Columns:
        """Put answers that keep the contract end to end."""
        rows, scores, triggers, ends = zip(*answers, strict=True)
        columns = cls.end_to_end(rows, scores, triggers, queries)
        starts = accumulate(map(len, rows), initial=0)
        columns.fan_out.offsets[0] = 0
        np.concatenate(
            [mine[1:] + start for mine, start in zip(ends, starts, strict=False)],
            out=columns.fan_out.offsets[1:],
        )
        columns.keep[:] = True
        columns.removed_by[:] = -1
        return columns

    @classmethod
    def end_to_end(
        cls,
        rows: Sequence[Int32Array],
        scores: Sequence[Float32Array],
        triggers: Sequence[Int32Array],
        queries: int,
    ) -> Columns:
        """Put the columns of answers end to end; what stands in the others means nothing yet.

        Raises:
            TypeError, ValueError: they are of other types, or not all of as many dimensions.
        """
        together = np.concatenate(rows, dtype=np.int32, casting="no")
        size = together.shape[0]
        return cls(
            FanOut(together, np.empty(len(rows) * queries + 1, np.int64), queries),
            np.concatenate(scores, dtype=np.float32, casting="no"),
            np.concatenate(triggers, dtype=np.int32, casting="no"),
            np.empty(size, np.bool_),
            np.empty(size, np.int8),
        )

    def followed_by(self, other: Columns) -> Columns:
        """Return these channels and then the other's."""
        offsets = np.concatenate((self.fan_out.offsets, other.fan_out.offsets[1:] + self.fan_out.rows.size))
        return Columns(
            FanOut(np.concatenate((self.fan_out.rows, other.fan_out.rows)), offsets, self.fan_out.queries),
            np.concatenate((self.scores, other.scores)),
            np.concatenate((self.triggers, other.triggers)),
            np.concatenate((self.keep, other.keep)),
            np.concatenate((self.removed_by, other.removed_by)),
        )


@dataclass(slots=True)
class Run:
    """One batch on its way down the stages; each stage fills in its part.

    Channel axes are the scene's channels in merge order, then its fallback channels. `refused` are the queries that
    cannot be answered because a filter could not read what it judges by, with the filter's name; their columns mean
    nothing. `first_deadline` is the earliest of the requests'. `depth` and `whole_depth`, int32[channels but fallback,
    n], are how many candidates each was asked for first, and how many it may be asked for at all; `answers` what they
    answered. `meanwhile` is called while the state store works on the batch; the time of `hydrate` holds what it takes.
    """

    requests: Sequence[Request]
    limits: Int32Array
    quotas: Int32Array
    status: Int32Array
    returned: Int32Array
    removed: Int32Array
    filter_status: Int32Array
    channel_us: Float64Array
    first_deadline: float
    messages: dict[tuple[int, int], str] = field(default_factory=dict)
    stage_us: dict[str, float] = field(default_factory=dict)
    refused: dict[int, StateUnavailableError] = field(default_factory=dict)
    degraded: int = 0
    meanwhile: Callable[[], None] | None = None
    hydrated: Hydrated = field(init=False)
    depth: Int32Array = field(init=False)
    whole_depth: Int32Array = field(init=False)
    answers: list[CandidateBatch] = field(init=False)
    columns: Columns = field(init=False)
    merged: Merged = field(init=False)

    @property
    def batch(self) -> QueryBatch:
        """The batch as the channels see it."""
        return self.hydrated.batch

    def removed_rows(self, q: int) -> list[Int32Array]:
        """Return the items of query q that each filter removed, each once per filter, in rising order of row."""
        mine, positions = self.columns.fan_out.alone(q)
        removed_by = self.columns.removed_by[positions]
        return [np.unique(mine.rows[removed_by == f]) for f in range(self.removed.shape[0])]
