"""Group commit: one thread takes all that callers wrote meanwhile and makes it durable together.

So the round trip to the store, and with `durability = "always"` the wait for the disk, are shared by all who wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.core.errors import RecallError, StateError, StateUnavailableError
from engine.online.batcher import ClosedError, ComputeError, QueueFullError
from engine.online.metrics import Metrics
from engine.state.events import EVENT, EventLog
from engine.state.log import LiveLog, LogChange, PublishResult
from engine.state.writes import CommitResult, UserStore, Writes

log = logging.getLogger(__name__)

MAX_WAITING = 100_000
"""Units that may wait, about a second's worth; a unit is an event of ordinary size."""

MAX_GROUP = 4_000
"""Units that are committed together; a larger request is committed alone."""


COMPLAIN_SECONDS = 60.0
"""How often the log says that the event log does not take events."""


class Lane:
    """The requests of one stream, which must go in in their order: when one fails, those behind it fail too."""

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error: RecallError | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """What one request writes."""

    what: Writes | Sequence[LogChange]
    size: int
    lane: Lane
    answer: asyncio.Future[Any]
    outcome: CommitResult | PublishResult | RecallError | None = None
    """What becomes of `answer`, which only the event loop's thread may touch."""


class Committer:
    """Takes writes from an event loop and makes them durable on a thread of its own."""

    def __init__(
        self,
        users: UserStore,
        items: LiveLog,
        metrics: Metrics | None = None,
        events: EventLog | None = None,
    ) -> None:
        """Start the thread; must be called on the event loop that will submit.

        Args:
            users: takes what users did.
            items: takes what became of items.
            metrics: told how long commits take.
            events: takes what users did once more, for who learns from it; None: nobody does.
        """
        self._users = users
        self._items = items
        self._metrics = metrics
        self._events = events
        self._unlogged = 0
        self._complain_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Job] = deque()
        self._size = 0
        self._changed = threading.Condition()
        self._closing = False
        self._room = asyncio.Event()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._work, name="commit", daemon=True)
        self._thread.start()

    async def commit(self, writes: Writes, size: int) -> CommitResult:
        """Return when writes are durable.

        Args:
            writes: of one request.
            size: its units.

        Raises:
            QueueFullError, ClosedError: at once; nothing was written.
            StateUnavailableError: the store did not take them, or not all.
            ComputeError: it failed in a way that it should not; the log has the traceback.
        """
        result: CommitResult = await self.enqueue(writes, size, Lane())
        return result

    async def publish(self, changes: Sequence[LogChange], size: int) -> PublishResult:
        """Return when changes of items are durable; as `commit`."""
        result: PublishResult = await self.enqueue(changes, size, Lane())
        return result

    def enqueue(self, what: Writes | Sequence[LogChange], size: int, lane: Lane) -> asyncio.Future[Any]:
        """Line something up behind what waits, without waiting for it.

        Returns:
            What `commit` or `publish` would return, or raise later.

        Raises:
            QueueFullError, ClosedError: as `commit`.
        """
        job = _Job(what, size, lane, self._loop.create_future())
        with self._changed:
            if self._closing:
                raise ClosedError("the server is shutting down")
            if self._size >= MAX_WAITING:
                raise QueueFullError(f"{self._size} events are waiting already; try again later")
            self._waiting.append(job)
            self._size += size
            self._changed.notify()
        return job.answer

    async def room(self) -> None:
        """Wait until the queue takes more, or is closed."""
        while self._size >= MAX_WAITING and not self._closing:
            self._room.clear()
            await self._room.wait()

    async def close(self, patience: float = math.inf) -> None:
        """Refuse what is new, finish what waits, and end the thread.

        Args:
            patience: seconds after which a thread that hangs is left to itself.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._room.set()
        try:
            await asyncio.wait_for(self._ended.wait(), None if math.isinf(patience) else patience)
        except TimeoutError:
            log.error("the commit thread hangs; it is left to itself")

    def _work(self) -> None:
        while jobs := self._drain():
            self._make_durable(jobs)
            try:
                self._loop.call_soon_threadsafe(self._deliver, jobs)
            except RuntimeError:  # the loop is closed: nobody waits for the answers any more
                log.warning("the event loop is gone; %d answers are dropped", len(jobs))
                return
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._ended.set)

    def _drain(self) -> list[_Job]:
        """Wait for jobs and take what is there, up to a group of one kind; nothing when closed and empty."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            jobs: list[_Job] = []
            size = 0
            while self._waiting:
                first = self._waiting[0]
                if jobs and (
                    size + first.size > MAX_GROUP
                    or isinstance(first.what, Writes) != isinstance(jobs[0].what, Writes)
                ):
                    break
                jobs.append(self._waiting.popleft())
                size += first.size
            self._size -= size
            return jobs

    def _make_durable(self, jobs: Sequence[_Job]) -> None:
        """Give every job its outcome; never raises, as the thread must outlive whatever a group does."""
        group: list[_Job] = []
        for job in jobs:
            if job.lane.error is not None:
                job.outcome = job.lane.error
            elif not job.answer.cancelled():  # else nobody waits for it any more
                group.append(job)
        if not group:
            return
        began = time.perf_counter()
        try:
            outcomes = self._written([job.what for job in group])
        except StateUnavailableError as error:
            self._fail(group, error)
        except Exception:
            log.exception("a commit of %d requests failed", len(group))
            self._fail(group, ComputeError("the commit failed; the server's log says why"))
        else:
            for job, outcome in zip(group, outcomes, strict=True):
                job.outcome = outcome
        if self._metrics is not None:
            self._metrics.ingest_seconds.observe(time.perf_counter() - began)

    def _written(self, group: Sequence[Any]) -> Sequence[CommitResult | PublishResult]:
        if isinstance(group[0], Writes):
            return self._users.commit_many(group, time.time(), None if self._events is None else self._log)
        return [self._items.publish(changes) for changes in group]

    def _log(self, records: bytes) -> None:
        """Write to the event log what is durable already: that this fails takes nothing back."""
        assert self._events is not None
        count = len(records) // EVENT.itemsize
        try:
            self._events.append(records)
        except StateError as error:
            self._unlogged += count
            if self._metrics is not None:
                self._metrics.event_log_lost.inc(count)
            if time.monotonic() >= self._complain_at:
                log.error(
                    "%d events are missing in the event log, nobody learns from them: %s",
                    self._unlogged,
                    error,
                )
                self._unlogged, self._complain_at = 0, time.monotonic() + COMPLAIN_SECONDS
            return
        if self._metrics is not None:
            self._metrics.event_log_events.inc(count)

    @staticmethod
    def _fail(group: Sequence[_Job], error: RecallError) -> None:
        for job in group:
            job.outcome = job.lane.error = error

    def _deliver(self, jobs: Sequence[_Job]) -> None:
        """Hand the outcomes over, on the event loop."""
        self._room.set()
        for job in jobs:
            if job.answer.done():  # cancelled meanwhile
                continue
            if isinstance(job.outcome, RecallError):
                job.answer.set_exception(job.outcome)
            else:
                job.answer.set_result(job.outcome)
