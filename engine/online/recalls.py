"""Tells the state store which leftovers were recalled, so that the cache channel can stop proposing them.

This is only ever counted, so no request waits for it and none fails by it: what cannot be written in time is dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from engine.core.errors import StateError
from engine.core.types import Int64Array
from engine.online.metrics import Metrics
from engine.online.notes import Notes
from engine.online.pipeline import Pipeline, Run
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
        counting = [c for c, channel in enumerate(pipeline.channels) if channel.counts_recalls]
        if not counting:
            return
        merged = run.merged
        proposed = np.flatnonzero(np.isin(merged.proposal_channels, counting))
        places = np.searchsorted(merged.proposal_offsets, proposed, side="right") - 1
        owners = np.searchsorted(merged.offsets, places, side="right") - 1
        for q in sorted(set(owners.tolist())):
            user = run.requests[q].user_id
            if user is None:
                continue
            self._notes.put((user_tag(user), keys[merged.rows[places[owners == q]]]))

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
