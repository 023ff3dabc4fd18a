"""Drain the queue: one compute thread takes whatever has arrived and answers it together.

Under light load a batch is one request and nobody waits for a timer; under heavy load the Python glue, the
thread hop and the matrix products are shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from engine.core.errors import RecallError
from engine.online.encode import ResponseEncoder
from engine.online.pipeline import Pipeline, Run
from engine.online.replica import Replica
from engine.online.request import Request

Observer = Callable[[str, Pipeline, Run], None]
"""Told of each batch when it is answered: its scene, pipeline and run."""

log = logging.getLogger(__name__)


class QueueFullError(RecallError):
    """As many requests wait as may wait."""


class DeadlinePassedError(RecallError):
    """The caller's deadline passed while the request waited."""


class ClosedError(RecallError):
    """The batcher takes no more requests."""


class ComputeError(RecallError):
    """The request could not be computed, not even alone; the log has the traceback."""


@dataclass(slots=True, eq=False)
class _Job:
    """One request on its way through the compute thread."""

    scene: str
    request: Request
    request_id: str
    debug: bool
    answer: asyncio.Future[bytes]
    outcome: bytes | RecallError | None = None
    """What becomes of `answer`, which only the event loop's thread may touch."""


class Batcher:
    """Takes requests from an event loop and answers them on a thread of its own.

    Attributes:
        replica: what answers. Read once per batch, so that another one may be put here at any time.
    """

    def __init__(
        self, replica: Replica, max_batch: int, max_queue: int, observer: Observer | None = None
    ) -> None:
        """Start the compute thread; must be called on the event loop that will submit.

        Args:
            replica: what answers.
            max_batch: requests that go down the pipeline together at most.
            max_queue: requests that may wait.
            observer: told of each batch once its answers are on their way, on the compute thread.
        """
        self.replica = replica
        self._observer = observer
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Job] = deque()
        self._chores: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._ended = asyncio.Event()
        # A daemon, so that a process can end while a channel hangs.
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    async def submit(self, scene: str, request: Request, request_id: str, debug: bool = False) -> bytes:
        """Return the bytes of the RecallResponse to a request.

        Args:
            scene: a scene of the replica.
            request: the request; one whose deadline has passed when its turn comes is not computed, and
                neither is one whose awaiting task was cancelled.
            request_id: comes back in the answer.
            debug: adds DebugInfo to it.

        Raises:
            QueueFullError: at once.
            ClosedError: at once.
            DeadlinePassedError: when its turn came too late.
            ComputeError: it failed, alone too.
            StateUnavailableError: a filter that the scene cannot do without could not read the user's state.
        """
        job = _Job(scene, request, request_id, debug, self._loop.create_future())
        with self._changed:
            if self._closing:
                raise ClosedError("the server is shutting down")
            if len(self._waiting) >= self._max_queue:
                raise QueueFullError(f"{self._max_queue} requests are waiting already; try again later")
            self._waiting.append(job)
            self._changed.notify()
        return await job.answer

    def between(self, chore: Callable[[], None]) -> Future[None]:
        """Have something done between two batches, on the thread that computes them; from any thread.

        Returns:
            What ends when it is done, or raises what it raised; cancelled where the batcher is closed.
        """
        done: Future[None] = Future()
        with self._changed:
            if self._closing:
                done.cancel()
            else:
                self._chores.append((chore, done))
                self._changed.notify()
        return done

    async def close(self, patience: float = math.inf) -> None:
        """Refuse new requests, finish those that wait, and end the thread.

        Args:
            patience: seconds after which a thread that hangs is left to itself.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        try:
            await asyncio.wait_for(self._ended.wait(), None if math.isinf(patience) else patience)
        except TimeoutError:
            log.error("the compute thread hangs; it is left to itself")

    def _work(self) -> None:
        self._serve_batches()
        for _, done in self._chores:
            done.cancel()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._ended.set)

    def _serve_batches(self) -> None:
        while (work := self._drain()) is not None:
            chores, jobs = work
            for chore, done in chores:
                _do(chore, done)
            if not jobs:
                continue
            finished: list[tuple[str, Pipeline, Run]] = []
            try:
                self._answer(jobs, finished)
            except Exception:  # the thread must outlive whatever a batch does
                log.exception("a batch of %d requests failed", len(jobs))
            for job in jobs:
                if job.outcome is None:
                    job.outcome = _failed(job)
            try:
                self._loop.call_soon_threadsafe(_deliver, jobs)
            except RuntimeError:  # the loop is closed: nobody waits for the answers any more
                log.warning("the event loop is gone; %d answers are dropped", len(jobs))
                return
            self._observe(finished)

    def _observe(self, finished: Sequence[tuple[str, Pipeline, Run]]) -> None:
        if self._observer is None:
            return
        for scene, pipeline, run in finished:
            try:
                self._observer(scene, pipeline, run)
            except Exception:  # what is noted about a batch must cost no batch
                log.exception("scene %s: a batch could not be noted", scene)

    def _drain(self) -> tuple[list[tuple[Callable[[], None], Future[None]]], list[_Job]] | None:
        """Wait for work and take what is there: all chores, and requests up to a batch; None when closed and empty."""
        with self._changed:
            while not self._waiting and not self._chores and not self._closing:
                self._changed.wait()
            if not self._waiting and not self._chores:
                return None
            chores = list(self._chores)
            self._chores.clear()
            jobs = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))]
            return chores, jobs

    def _answer(self, jobs: Sequence[_Job], finished: list[tuple[str, Pipeline, Run]]) -> None:
        replica = self.replica
        now = time.monotonic()
        scenes: dict[str, list[_Job]] = {}
        for job in jobs:
            if job.answer.cancelled():
                job.outcome = DeadlinePassedError("nobody waits for the answer any more")
            elif job.request.deadline <= now:
                job.outcome = DeadlinePassedError("the deadline passed while the request waited for its turn")
            else:
                scenes.setdefault(job.scene, []).append(job)
        for scene, together in scenes.items():
            try:
                finished.append(_compute(replica, scene, together))
            except Exception:
                if len(together) > 1:
                    log.exception("scene %s: a batch of %d failed, one by one now", scene, len(together))
                    finished += _answer_alone(replica, scene, together)
                else:
                    _log_failure(together[0])


def _do(chore: Callable[[], None], done: Future[None]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        chore()
    except BaseException as error:  # the thread must outlive it; who asked for it gets it
        done.set_exception(error)
    else:
        done.set_result(None)


def _answer_alone(replica: Replica, scene: str, jobs: Sequence[_Job]) -> list[tuple[str, Pipeline, Run]]:
    """Answer one by one, so that a request that breaks the pipeline takes no neighbour along."""
    finished = []
    for job in jobs:
        try:
            finished.append(_compute(replica, scene, [job]))
        except Exception:
            _log_failure(job)
    return finished


def _compute(replica: Replica, scene: str, jobs: Sequence[_Job]) -> tuple[str, Pipeline, Run]:
    pipeline = replica.pipelines[scene]
    run = pipeline.run([job.request for job in jobs])
    encoder = ResponseEncoder(replica, pipeline, run)
    answers = [
        run.refused.get(q) or encoder.response(q, job.request_id, job.debug) for q, job in enumerate(jobs)
    ]
    for job, answer in zip(jobs, answers, strict=True):
        job.outcome = answer
    return scene, pipeline, run


def _failed(job: _Job) -> ComputeError:
    return ComputeError(f"the request {job.request_id!r} failed; the server's log says why")


def _log_failure(job: _Job) -> None:
    log.exception("scene %s: the request %r failed", job.scene, job.request_id)


def _deliver(jobs: Sequence[_Job]) -> None:
    """Hand the outcomes over, on the event loop."""
    for job in jobs:
        if job.answer.done():  # cancelled meanwhile
            continue
        if isinstance(job.outcome, bytes):
            job.answer.set_result(job.outcome)
        elif job.outcome is not None:
            job.answer.set_exception(job.outcome)
