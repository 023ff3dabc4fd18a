"""Drain the queue: one compute thread takes whatever has arrived and answers it together.

Under light load a batch is one request and nobody waits for a timer; under heavy load the Python glue, the
thread hop and the matrix products are shared.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from engine.config import OverloadConfig
from engine.core.errors import RecallError
from engine.online.admission import Admission
from engine.online.answered import Answered, Observer
from engine.online.encode import encode
from engine.online.replica import Replica
from engine.online.request import Request
from engine.online.turns import Turns

log = logging.getLogger(__name__)


class QueueFullError(RecallError):
    """As many requests wait as may wait, or more than can be answered before the caller's deadline."""


class DeadlinePassedError(RecallError):
    """The caller's deadline passed while the request waited."""


class ClosedError(RecallError):
    """The batcher takes no more requests."""


class ComputeError(RecallError):
    """The request could not be computed, not even alone; the log has the traceback."""


class Caller(Protocol):
    """Who waits for the answer to a request."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more."""
        ...

    def deliver(self, outcome: bytes | RecallError) -> None:
        """Take the bytes of the response, or why there are none; on the compute thread, so it must not block."""
        ...


@dataclass(slots=True, eq=False)
class _Job:
    """One request on its way through the compute thread."""

    scene: str
    request: Request
    request_id: str
    debug: bool
    trace: str
    caller: Caller
    came: float
    """On the clock of time.monotonic(), seconds."""
    since: float
    """From when on it may have waited, on the same clock."""
    outcome: bytes | RecallError | None = None


class Batcher:
    """Takes requests from any thread and answers them on one of its own.

    Attributes:
        replica: what answers. Read once per batch, so that another one may be put here at any time.
        admission: how many requests are taken in.
        turns: of the compute thread and the one that takes calls.
    """

    def __init__(
        self,
        replica: Replica,
        max_batch: int,
        max_queue: int,
        observer: Observer | None = None,
        overload: OverloadConfig | None = None,
    ) -> None:
        """Start the compute thread.

        Args:
            replica: what answers.
            max_batch: requests that go down the pipeline together at most.
            max_queue: requests that may wait.
            observer: told of each batch once its answers are on their way, on the compute thread; while the state store
                works on the next one, or when nothing waits.
            overload: how the limit on requests in flight adapts.
        """
        self.admission = Admission(overload or OverloadConfig(), max_batch, max_queue)
        self.turns = Turns(self.admission)
        self.replica = replica
        self._observer = observer
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._waiting: deque[_Job] = deque()
        self._unnoted: list[Answered] = []
        self._chores: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        # A daemon, so that a process can end while a channel hangs.
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(
        self,
        scene: str,
        request: Request,
        request_id: str,
        caller: Caller,
        debug: bool = False,
        trace: str = "",
    ) -> None:
        """Have a request answered.

        Args:
            scene: a scene of the replica.
            request: the request; one whose deadline has passed when its turn comes is not computed, and
                neither is one whose caller is gone.
            request_id: comes back in the answer.
            caller: is given the bytes of the RecallResponse, or one of
                DeadlinePassedError, when its turn came too late;
                ComputeError, where it failed, alone too;
                StateUnavailableError, where a filter that the scene cannot do without could not read the user's state.
            debug: adds DebugInfo to the answer.
            trace: the caller's `traceparent`, for the observer.

        Raises:
            QueueFullError, ClosedError: it is not taken in, and the caller is told nothing else.
        """
        came = time.monotonic()
        job = _Job(scene, request, request_id, debug, trace, caller, came, min(came, self.turns.since))
        with self._changed:
            if self._closing:
                raise ClosedError("the server is shutting down")
            if len(self._waiting) >= self._max_queue:
                raise QueueFullError(f"{self._max_queue} requests are waiting already; try again later")
            refusal = self.admission.refusal(request.deadline, job.came)
            if refusal:
                raise QueueFullError(refusal)
            self.admission.enter()
            self._waiting.append(job)
            self._changed.notify()

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

    async def close(self, patience: float | None = None) -> None:
        """Refuse new requests, finish those that wait, and end the thread.

        Args:
            patience: seconds after which a thread that hangs is left to itself.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, patience)
        if self._thread.is_alive():
            log.error("the compute thread hangs; it is left to itself")

    def _work(self) -> None:
        self._serve_batches()
        for _, done in self._chores:
            done.cancel()

    def _serve_batches(self) -> None:
        while True:
            if not self._waiting:
                self._note()
            work = self._drain()
            if work is None:
                return
            chores, jobs = work
            if chores:
                self._note()
            for chore, done in chores:
                _do(chore, done)
            if not jobs:
                continue
            began, load = time.monotonic(), self.admission.load
            finished: list[Answered] = []
            try:
                self._answer(jobs, finished, load)
            except BaseException:  # the thread must outlive whatever a batch does
                log.exception("a batch of %d requests failed", len(jobs))
            for job in jobs:
                _deliver(job)
            self.admission.leave(len(jobs), began - jobs[0].since, time.monotonic() - began)
            self._note()  # the batch before, unless that was done meanwhile
            self._unnoted = finished
            self.turns.batch_ended()

    def _note(self) -> None:
        """Have the last batch noted, if it has not been: its callers have their answers, others wait for theirs."""
        finished, self._unnoted = self._unnoted, []
        if self._observer is None:
            return
        for answered in finished:
            try:
                self._observer(answered)
            except Exception:  # what is noted about a batch must cost no batch
                log.exception("scene %s: a batch could not be noted", answered.scene)

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

    def _answer(self, jobs: Sequence[_Job], finished: list[Answered], load: float) -> None:
        replica = self.replica
        now = time.monotonic()
        scenes: dict[str, list[_Job]] = {}
        for job in jobs:
            if job.caller.cancelled:
                job.outcome = DeadlinePassedError("nobody waits for the answer any more")
            elif job.request.deadline <= now:
                job.outcome = DeadlinePassedError("the deadline passed while the request waited for its turn")
            else:
                scenes.setdefault(job.scene, []).append(job)
        for scene, together in scenes.items():
            try:
                finished.append(_compute(replica, scene, together, load, self._note))
            except Exception:
                if len(together) > 1:
                    log.exception("scene %s: a batch of %d failed, one by one now", scene, len(together))
                    finished += _answer_alone(replica, scene, together, load)
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


def _answer_alone(replica: Replica, scene: str, jobs: Sequence[_Job], load: float) -> list[Answered]:
    """Answer one by one, so that a request that breaks the pipeline takes no neighbour along."""
    finished = []
    for job in jobs:
        try:
            finished.append(_compute(replica, scene, [job], load))
        except Exception:
            _log_failure(job)
    return finished


def _compute(
    replica: Replica,
    scene: str,
    jobs: Sequence[_Job],
    load: float,
    meanwhile: Callable[[], None] | None = None,
) -> Answered:
    began = time.monotonic()
    pipeline = replica.pipelines[scene]
    run = pipeline.run([job.request for job in jobs], pipeline.step_at(load), meanwhile)
    ids = [job.request_id for job in jobs]
    answers = encode(replica, pipeline, run, ids, [job.debug for job in jobs])
    for q, (job, answer) in enumerate(zip(jobs, answers, strict=True)):
        job.outcome = run.refused.get(q, answer)
    traces, came = [job.trace for job in jobs], [job.came for job in jobs]
    return Answered(scene, pipeline, run, replica.release, ids, traces, came, began, time.monotonic())


def _failed(job: _Job) -> ComputeError:
    return ComputeError(f"the request {job.request_id!r} failed; the server's log says why")


def _log_failure(job: _Job) -> None:
    log.exception("scene %s: the request %r failed", job.scene, job.request_id)


def _deliver(job: _Job) -> None:
    """Hand the outcome over."""
    outcome = job.outcome if job.outcome is not None else _failed(job)
    try:
        job.caller.deliver(outcome)
    except Exception:  # the thread must outlive whoever does not take an answer
        log.exception("the answer to %r could not be delivered", job.request_id)
