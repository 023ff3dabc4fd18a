"""Following the assignment log of a channel while serving: what a trainer says is taken in between two batches.

One `AssignmentTail` per channel that takes assignments. It begins at the position that the channel's snapshot holds.
Items that were published since are looked up in the table as soon as the catalogue knows them: what the log said of them
before is passed over.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from concurrent.futures import CancelledError

import numpy as np

from engine.core.channel import takes_assignments
from engine.core.errors import StateError
from engine.core.types import Int64Array
from engine.online.live import Between
from engine.online.metrics import Metrics
from engine.online.replica import Replica
from engine.state.assignments import AssignedItems, AssignmentLog, Position
from engine.state.store import StateStore
from engine.state.stream import offset_key

log = logging.getLogger(__name__)

LOG_POSITION = "log_position"
"""The array of a snapshot that says, as text, how much of the assignment log it holds (`Position`)."""

TAILED = 200
"""Entries taken in together."""

TOLD = 10_000
"""Items that a channel is told of between two batches, at most."""

_BLOCK_MS = 100
"""How long an item that was assigned before the catalogue knew it may wait, as nothing wakes the thread for it."""

_RETRY_SECONDS = 0.25


class AssignmentTail:
    """Follows the assignment log of one channel on a thread of its own."""

    def __init__(
        self,
        name: str,
        replica: Replica,
        source: AssignmentLog,
        position: Position,
        between: Between,
        metrics: Metrics | None = None,
    ) -> None:
        """Take what is needed.

        Args:
            name: of the channel.
            replica: has the channel.
            source: the log.
            position: what the channel's snapshot holds of the log, its run always named.
            between: has something done between two batches.
            metrics: told of lag and assignments.
        """
        self._name = name
        self._replica = replica
        self._log = source
        self._run = position.run
        self._offset = position.offset
        self._between = between
        self._metrics = metrics
        # Rows of the catalogue whose assignments are in the snapshot or were looked up.
        self._known_items = len(replica.catalogue.base.items)
        self._closing = threading.Event()
        self._reachable = True
        self._caught_up = True
        self._known_until = time.time()
        self._thread = threading.Thread(target=self._work, name=f"assignments {name}", daemon=True)
        if metrics is not None:
            metrics.assignments_lag_seconds.labels(name).set_function(self.lag)
            metrics.assignments_applied.labels(name)
            metrics.assignments_resyncs.labels(name)

    @property
    def offset(self) -> str:
        """The last entry of the log that was taken in."""
        return self._offset

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def close(self, patience: float | None = None) -> None:
        """Stop, within half a second unless the store or the channel hangs; at most `patience` seconds are waited."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(patience)

    def lag(self) -> float:
        """Return how old the newest assignments taken in are, in seconds, while there are more or nobody knows."""
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
                    log.error("%s: the assignment log cannot be read, clusters stay: %s", self._name, error)
                self._reachable = False
                self._closing.wait(_RETRY_SECONDS)
            except Exception:  # the thread must outlive whatever an entry does
                log.exception("%s: following the assignment log failed, trying again", self._name)
                self._closing.wait(_RETRY_SECONDS)

    def _step(self) -> None:
        self._look_up_new()
        asked = time.time()
        items, offset, entries, missed = self._log.read(self._offset, self._run, TAILED, _BLOCK_MS)
        if not self._reachable:
            log.info("%s: the assignment log can be read again", self._name)
            self._reachable = True
        if missed:
            self._resync()
        elif entries:
            self._caught_up = False
            self._take_in(items)
            self._offset = offset
            self._known_until = offset_key(offset)[0] / 1000
            self._caught_up = entries < TAILED
        else:
            self._caught_up, self._known_until = True, asked

    def _resync(self) -> None:
        """Read the table instead of what was missed. Where it is of another run the snapshot's clusters stay."""
        self._caught_up = False
        end = self._log.end()
        run = self._log.run()
        if run == self._run:
            log.warning(
                "%s: the assignment log no longer has what follows %s: reading the table, then on from %s",
                self._name, self._offset, end,
            )  # fmt: skip
            for items in self._log.table():
                self._take_in(items)
        else:
            log.warning(
                "%s: the assignment log no longer has what follows %s, and its table is of run %s, not of %s: the"
                " clusters stay as the last bundle has them, and follow the log from %s",
                self._name, self._offset, run or "none", self._run, end,
            )  # fmt: skip
        if self._metrics is not None:
            self._metrics.assignments_resyncs.labels(self._name).inc()
        self._offset = end

    def _look_up_new(self) -> None:
        """Read the table for items that the catalogue has come to know: the log may have named them before."""
        if len(self._replica.catalogue.items) == self._known_items:
            return
        keys: list[Int64Array] = []
        columns, first = self._replica.catalogue.columns, self._known_items
        self._between(lambda: keys.append(columns.keys[first:].copy())).result()
        if self._log.run() == self._run:
            self._take_in(self._log.lookup(keys[0]))
        self._known_items = first + keys[0].size

    def _take_in(self, items: AssignedItems) -> None:
        for start in range(0, len(items), TOLD):
            part = items.take(slice(start, start + TOLD))
            try:
                self._between(functools.partial(self._tell, part)).result()
            except (StateError, CancelledError):
                raise
            except Exception:
                log.exception("%s failed to take %d assignments", self._name, len(part))
                if self._metrics is not None:
                    self._metrics.update_failures.labels(self._name).inc()

    def _tell(self, items: AssignedItems) -> None:
        count = self._replica.assign(self._name, items)
        if self._metrics is not None:
            self._metrics.assignments_applied.labels(self._name).inc(count)


class AssignmentTails:
    """The tails of all channels of a replica that take assignments."""

    def __init__(
        self,
        replica: Replica,
        snapshots: dict[str, str],
        store: StateStore,
        between: Between,
        metrics: Metrics | None = None,
    ) -> None:
        """Make them.

        Args:
            replica: what serves.
            snapshots: channel -> the channel whose snapshot it loads.
            store: where the logs are.
            between: has something done between two batches.
            metrics: of the server.
        """
        self._tails = [
            AssignmentTail(
                name,
                replica,
                AssignmentLog(store, snapshots[name]),
                position_of(replica, snapshots[name]),
                between,
                metrics,
            )
            for name, channel in replica.channels.items()
            if takes_assignments(channel)
        ]

    def start(self) -> None:
        """Begin to follow."""
        for tail in self._tails:
            tail.start()

    def close(self, patience: float | None = None) -> None:
        """Stop; at most `patience` seconds are waited for each."""
        for tail in self._tails:
            tail.close(patience)


def position_of(replica: Replica, component: str) -> Position:
    """Return how much of its assignment log a snapshot of a replica holds."""
    snapshot = replica.snapshots[component]
    text = bytes(np.asarray(snapshot.arrays.get(LOG_POSITION, np.empty(0, np.uint8)))).decode()
    position = Position.parse(text)
    return position if position.run else Position(snapshot.manifest.version)
