"""Following the live log while serving: what comes is taken in between two batches."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future

from engine.core.errors import StateError
from engine.data.changes import ItemChanges
from engine.online.metrics import Metrics
from engine.online.replica import Replica
from engine.state.log import LiveLog, offset_key

log = logging.getLogger(__name__)

TAILED = 1_000
"""Entries taken in together: some thousandths of a second, which the next batch waits."""

_BLOCK_MS = 500
_RETRY_SECONDS = 0.25

Between = Callable[[Callable[[], None]], "Future[None]"]
"""Has something done between two batches, on the thread that computes them (`Batcher.between`)."""


class Tail:
    """Follows the live log on a thread of its own and hands what comes to the compute thread."""

    def __init__(
        self, replica: Replica, live_log: LiveLog, between: Between, metrics: Metrics | None = None
    ) -> None:
        """Take what is needed.

        Args:
            replica: what takes the changes in; has taken in everything up to its `log_offset`.
            live_log: the log.
            between: has something done between two batches.
            metrics: told of lag and entries.
        """
        self._replica = replica
        self._log = live_log
        self._between = between
        self._metrics = metrics
        self._closing = threading.Event()
        self._reachable = True
        self._caught_up = True
        # Up to this moment all that was published is known to have been taken in; seconds since the epoch.
        self._known_until = time.time()
        self._thread = threading.Thread(target=self._work, name="tail", daemon=True)
        if metrics is not None:
            metrics.log_lag_seconds.set_function(self.lag)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def close(self, patience: float | None = None) -> None:
        """Stop, within half a second unless the store or a channel hangs; at most `patience` seconds are waited."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(patience)

    def lag(self) -> float:
        """Return how old the newest change taken in is, in seconds, while there is more or nobody knows; else 0."""
        return 0.0 if self._caught_up else max(0.0, time.time() - self._known_until)

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                self._step()
            except CancelledError:  # the batcher is closed
                return
            except StateError as error:
                self._caught_up = False
                if self._reachable:
                    log.error("the live log cannot be read, items stay as they are: %s", error)
                self._reachable = False
                self._closing.wait(_RETRY_SECONDS)
            except Exception:  # the thread must outlive whatever an entry does
                log.exception("following the live log failed, trying again")
                self._closing.wait(_RETRY_SECONDS)

    def _step(self) -> None:
        offset = self._replica.log_offset
        asked = time.time()
        entries, missed = self._log.follow(offset, TAILED, _BLOCK_MS)
        if not self._reachable:
            log.info("the live log can be read again")
            self._reachable = True
        if missed:
            self._resync()
        elif entries:
            self._caught_up = False
            self._take_in(entries)
            self._known_until = offset_key(entries[-1][0])[0] / 1000
            self._caught_up = len(entries) < TAILED
        else:
            self._caught_up, self._known_until = True, asked

    def _resync(self) -> None:
        self._caught_up = False
        end = self._log.end()
        log.warning(
            "the live log no longer has what follows %s: reading the table, then on from %s",
            self._replica.log_offset, end,
        )  # fmt: skip
        if self._metrics is not None:
            self._metrics.log_resyncs.inc()
        for values in self._log.table():
            for start in range(0, len(values), TAILED):
                part = values[start : start + TAILED]
                self._take_in([(self._replica.log_offset, value) for value in part])
        self._replica.log_offset = end

    def _take_in(self, entries: Sequence[tuple[str, bytes]]) -> None:
        offset = entries[-1][0]
        try:
            changes = ItemChanges.parse([value for _, value in entries], self._replica.catalogue.id_type)
            self._between(lambda: self._apply(changes, offset)).result()
        except (StateError, CancelledError):
            raise
        except Exception:
            if len(entries) == 1:
                log.exception("entry %s of the live log cannot be taken in and is left out", offset)
                self._count_failure("catalogue")
                self._replica.log_offset = offset
                return
            log.warning("%d entries of the live log failed together, one by one now", len(entries))
            for entry in entries:
                self._take_in([entry])
            return
        if self._metrics is not None:
            self._metrics.log_entries_applied.inc(len(entries))

    def _apply(self, changes: ItemChanges, offset: str) -> None:
        for component in self._replica.apply(changes, offset):
            self._count_failure(component)

    def _count_failure(self, component: str) -> None:
        if self._metrics is not None:
            self._metrics.update_failures.labels(component).inc()
