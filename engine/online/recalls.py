"""Tells the state store which leftovers were recalled, so that the cache channel can stop proposing them.

This is only ever counted, so no request waits for it and none fails by it: what cannot be written in time is dropped.
"""

from __future__ import annotations

import logging
import queue
import threading
import time

import numpy as np

from engine.core.errors import StateError
from engine.core.types import Int64Array
from engine.online.metrics import Metrics
from engine.online.pipeline import Pipeline, Run
from engine.state.layout import user_tag
from engine.state.writes import UserStore, Writes

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Users whose recalls wait to be written; those of more are dropped."""

_TOGETHER = 256

_Note = tuple[bytes, Int64Array]


class Recalls:
    """Notes what was recalled, on a thread of its own."""

    def __init__(self, users: UserStore, metrics: Metrics | None = None) -> None:
        """Start the thread.

        Args:
            users: where to write.
            metrics: told of what is dropped.
        """
        self._users = users
        self._metrics = metrics
        self._notes: queue.Queue[_Note | None] = queue.Queue(MOST_WAITING)
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="recalls", daemon=True)
        self._thread.start()

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
            try:
                self._notes.put_nowait((user_tag(user), keys[merged.rows[places[owners == q]]]))
            except queue.Full:
                self._drop(1)

    def close(self, patience: float | None = None) -> None:
        """Write what waits, at most `patience` seconds long, and stop."""
        try:
            self._notes.put(None, timeout=patience)
        except queue.Full:
            return  # a daemon: it ends with the process
        self._thread.join(patience)

    def _work(self) -> None:
        closing = False
        while not closing:
            waiting = [self._notes.get()]
            while len(waiting) < _TOGETHER and not self._notes.empty():
                waiting.append(self._notes.get())  # nobody else takes from it
            closing = None in waiting
            notes = [note for note in waiting if note is not None]
            if notes:
                self._write(notes)

    def _write(self, notes: list[_Note]) -> None:
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
        except Exception:
            log.exception("what was recalled could not be counted")
            self._drop(len(notes))

    def _drop(self, count: int) -> None:
        if self._metrics is not None:
            self._metrics.recalls_dropped.inc(count)
