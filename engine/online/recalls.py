"""Tells the state store which leftovers were recalled, so that the cache channel can stop proposing them.

This is only ever counted, so no request waits for it and none fails by it: what cannot be written in time is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
from numba import njit

from engine.core.errors import StateError
from engine.core.types import BoolArray, Int64Array
from engine.online.metrics import Metrics
from engine.online.notes import Notes
from engine.online.pipeline import Pipeline
from engine.online.run import Run
from engine.state.layout import user_tag
from engine.state.recall_counts import RecallCounts, Recalled

log = logging.getLogger(__name__)

_TOGETHER = 32
"""Users who are written together at most."""


class Recalls:
    """Notes what was recalled, on a thread of its own."""

    def __init__(self, counts: RecallCounts, metrics: Metrics | None = None) -> None:
        """Begin.

        Args:
            counts: where to write.
            metrics: told of what is dropped.
        """
        self._counts = counts
        self._metrics = metrics
        self._failing = False
        self._notes: Notes[Recalled] = Notes("recalls", self._write, self._drop, _TOGETHER)

    def note(self, pipeline: Pipeline, run: Run, keys: Int64Array) -> None:
        """Note what a batch's answers hold of the channels that count it; on the compute thread.

        Args:
            pipeline, run: what made the answers.
            keys: int64[items], the key of each row.
        """
        found = recalled(pipeline, run, keys)
        if found is None:
            return
        for q, (request, items) in enumerate(zip(run.requests, found, strict=True)):
            if request.user_id is not None and items.size:
                self._notes.put(Recalled(user_tag(request.user_id), items, run.hydrated.leftovers(q)))

    def close(self, patience: float | None = None) -> None:
        """Write what waits, at most `patience` seconds long, and stop."""
        self._notes.close(patience)

    def _write(self, notes: Sequence[Recalled]) -> None:
        try:
            self._drop(self._counts.add(notes))
            self._failing = False
        except StateError as error:
            if not self._failing:
                log.warning("what was recalled is not counted for now: %s", error)
            self._failing = True
            self._drop(len(notes))

    def _drop(self, count: int) -> None:
        if count and self._metrics is not None:
            self._metrics.recalls_dropped.inc(count)


_counting: WeakKeyDictionary[Pipeline, BoolArray | None] = WeakKeyDictionary()
"""Which channels of a pipeline count recalls; None where none does."""


def _counts(pipeline: Pipeline) -> BoolArray | None:
    if pipeline not in _counting:
        counts = np.array([channel.counts_recalls for channel in pipeline.channels], np.bool_)
        _counting[pipeline] = counts if counts.any() else None
    return _counting[pipeline]


def recalled(pipeline: Pipeline, run: Run, keys: Int64Array) -> list[Int64Array] | None:
    """Return the keys of the items of each answer that a channel proposed which counts them.

    Args:
        pipeline, run: what made the answers.
        keys: int64[items], the key of each row.

    Returns:
        int64[...] per query; None where no channel counts.
    """
    counts = _counts(pipeline)
    if counts is None:
        return None
    merged = run.merged
    found, offsets = np.empty(merged.rows.size, np.int64), np.empty(len(run.requests) + 1, np.int64)
    _recalled(
        merged.offsets, merged.rows, merged.proposal_offsets, merged.proposal_channels, counts, keys, found, offsets
    )  # fmt: skip
    return [found[begin:end].copy() for begin, end in pairwise(offsets.tolist())]


@njit(nogil=True, cache=True)
def _recalled(  # type: ignore[no-untyped-def]
    offsets, rows, proposal_offsets, proposal_channels, counts, keys, out, out_offsets
):  # fmt: skip
    """Write the keys of the items of each answer that were proposed by a channel that counts."""
    to = out_offsets[0] = 0
    for q in range(offsets.size - 1):
        for item in range(offsets[q], offsets[q + 1]):
            for p in range(proposal_offsets[item], proposal_offsets[item + 1]):
                if counts[proposal_channels[p]]:
                    out[to] = keys[rows[item]]
                    to += 1
                    break
        out_offsets[q + 1] = to
