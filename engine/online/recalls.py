"""Tells the state store which leftovers were recalled, so that the cache channel can stop proposing them.

This is only ever counted, so no request waits for it and none fails by it: what cannot be written in time is dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
from numba import njit

from engine.core.errors import StateError
from engine.core.types import Int64Array, RaggedRows
from engine.online.metrics import Metrics
from engine.online.notes import Notes
from engine.online.pipeline import Pipeline
from engine.online.run import Run
from engine.state.layout import user_tag
from engine.state.writes import UserStore, Writes

log = logging.getLogger(__name__)

_Note = tuple[bytes, Int64Array]


class Recalls:
    """Notes what was recalled, on a thread of its own."""

    def __init__(self, users: UserStore, metrics: Metrics | None = None) -> None:
        """Begin.

        Args:
            users: where to write.
            metrics: told of what is dropped.
        """
        self._users = users
        self._metrics = metrics
        self._failing = False
        self._notes: Notes[_Note] = Notes("recalls", self._write, self._drop)

    def note(self, pipeline: Pipeline, run: Run, keys: Int64Array) -> None:
        """Note what a batch's answers hold of the channels that count it; on the compute thread.

        Args:
            pipeline, run: what made the answers.
            keys: int64[items], the key of each row.
        """
        found = recalled(pipeline, run)
        if found is None:
            return
        rows, ends = found.rows, found.offsets.tolist()
        for q, request in enumerate(run.requests):
            if request.user_id is not None and ends[q] < ends[q + 1]:
                self._notes.put((user_tag(request.user_id), keys[rows[ends[q] : ends[q + 1]]]))

    def close(self, patience: float | None = None) -> None:
        """Write what waits, at most `patience` seconds long, and stop."""
        self._notes.close(patience)

    def _write(self, notes: Sequence[_Note]) -> None:
        writes = Writes()
        for user, keys in notes:
            writes.recalled(user, keys)
        try:
            self._users.commit(writes, time.time())
            self._failing = False
        except StateError as error:
            if not self._failing:
                log.warning("what was recalled is not counted for now: %s", error)
            self._failing = True
            self._drop(len(notes))

    def _drop(self, count: int) -> None:
        if self._metrics is not None:
            self._metrics.recalls_dropped.inc(count)


def recalled(pipeline: Pipeline, run: Run) -> RaggedRows | None:
    """Return which items of each answer a channel that counts them proposed; None where there is no such channel."""
    counts = np.array([channel.counts_recalls for channel in pipeline.channels], np.bool_)
    if not counts.any():
        return None
    merged = run.merged
    rows, offsets = np.empty(merged.rows.size, np.int32), np.empty(len(run.requests) + 1, np.int64)
    _recalled(
        merged.offsets, merged.rows, merged.proposal_offsets, merged.proposal_channels, counts, rows, offsets
    )
    return RaggedRows(rows[: int(offsets[-1])], offsets)


@njit(nogil=True, cache=True)
def _recalled(offsets, rows, proposal_offsets, proposal_channels, counts, out, out_offsets):  # type: ignore[no-untyped-def]
    """Write which items of each answer were proposed by a channel that counts."""
    to = out_offsets[0] = 0
    for q in range(offsets.size - 1):
        for item in range(offsets[q], offsets[q + 1]):
            for p in range(proposal_offsets[item], proposal_offsets[item + 1]):
                if counts[proposal_channels[p]]:
                    out[to] = rows[item]
                    to += 1
                    break
        out_offsets[q + 1] = to
