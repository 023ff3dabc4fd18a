"""Channels that run beside the compute: each on a thread of its own, waited for no longer than its deadline.

Whatever such a channel does, its call ends in an answer that is checked, in arrays that the channel does not know, and an
error for each query that failed. A call that is left behind keeps its own place for its answer, which nobody looks at any
more: it cannot come into a later batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from engine.config import BreakerConfig, Config
from engine.core.candidates import CandidateBatch, Candidates, check_contract, check_distinct, own_copy
from engine.core.channel import Channel, gates, waits
from engine.core.errors import ContractError
from engine.core.query import QueryBatch
from engine.core.types import Float32Array, Int32Array
from engine.online.breaker import Breaker

log = logging.getLogger(__name__)

WARM_UP_SECONDS = 10.0
"""The deadline of every channel while the server warms up: the first call may compile kernels, or connect."""

_MOST_UPDATES = 64
"""Updates that may wait; more are put together, so that a channel that hangs costs no memory."""

_LONGEST_MESSAGE = 300

Assigned: TypeAlias = tuple[Int32Array, Int32Array, Float32Array]
"""What `Channel.assign` is told."""


@dataclass
class Answer:
    """What became of one call.

    Attributes:
        batch: the candidates of the queries that went well.
        gated: the queries that the channel's gate shut.
        errors: query -> what it raised, or which rule it broke.
    """

    batch: CandidateBatch
    gated: list[int] = field(default_factory=list)
    errors: dict[int, BaseException] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """What an answer is held to: rows in the catalogue, and in the index of the channel's triggers where there is one."""

    items: int
    trigger_rows: int | None


class Call:
    """One batch put to one channel.

    Attributes:
        until: when it is given up, on the clock of time.monotonic(), seconds.
        by_request: whether a request's deadline comes so long before the channel's that being late is no failure of it.
        seconds: how long the answer took, once it is there.
    """

    def __init__(
        self, batch: QueryBatch, k: Int32Array, rules: Rules, until: float, by_request: bool
    ) -> None:
        self.batch, self.k, self.rules = batch, k, rules
        self.until, self.by_request = until, by_request
        self.began = time.monotonic()
        self.seconds = 0.0
        self.given_up = False
        self.task: asyncio.Task[Answer] | None = None
        self._answer: Answer | None = None
        self._ended = threading.Event()

    def end(self, answer: Answer) -> None:
        """Put the answer in its place; on the channel's thread."""
        self.seconds = time.monotonic() - self.began
        self._answer = answer
        self._ended.set()

    def answer(self) -> Answer | None:
        """Wait for the answer until the time is up; None where it is late."""
        self._ended.wait(max(0.0, self.until - time.monotonic()))
        return self._answer


class Beside:
    """One channel and its thread, which begins with the first call.

    Attributes:
        deadline: how long a batch waits for it, seconds.
    """

    def __init__(self, name: str, channel: Channel, deadline: float) -> None:
        self.deadline = deadline
        self._name = name
        self._channel = channel
        self._gated = gates(channel)
        self._changed = threading.Condition()
        self._call: Call | None = None
        self._updates: deque[Int32Array] = deque()
        self._assignments: deque[Assigned] = deque()
        self._failed_updates = 0
        self._closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def busy_seconds(self) -> float:
        """Return how long it has been at a call that was given up; 0 where it is free."""
        call = self._call
        return 0.0 if call is None else time.monotonic() - call.began

    def start(self, call: Call) -> None:
        """Begin a call; only while it is free."""
        with self._changed:
            self._call = call
            self._wake()

    def give_up(self, call: Call) -> None:
        """Leave a late call behind: a coroutine is cancelled, a thread goes on and nobody hears it."""
        call.given_up = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_cancel, call)

    def update(self, rows: Int32Array) -> int:
        """Have the channel take note of changed items before its next call.

        Returns:
            How many updates failed since this was last asked.
        """
        with self._changed:
            self._updates.append(rows)
            if len(self._updates) > _MOST_UPDATES:
                together = np.unique(np.concatenate(list(self._updates)).astype(np.int32))
                self._updates.clear()
                self._updates.append(together)
            failed, self._failed_updates = self._failed_updates, 0
            self._wake()
        return failed

    def assign(self, rows: Int32Array, clusters: Int32Array, biases: Float32Array) -> None:
        """Have the channel take assignments before its next call, behind the updates that wait; each row once."""
        with self._changed:
            self._assignments.append((rows, clusters, biases))
            if len(self._assignments) > _MOST_UPDATES:
                together = tuple(np.concatenate(column) for column in zip(*self._assignments, strict=True))
                _, last = np.unique(together[0][::-1], return_index=True)
                newest = len(together[0]) - 1 - last
                self._assignments.clear()
                self._assignments.append((together[0][newest], together[1][newest], together[2][newest]))
            self._wake()

    def close(self) -> None:
        """End the thread when it is free; it is a daemon, and one that hangs is left to itself."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"channel {self._name}", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _work(self) -> None:
        # A coroutine gets an event loop of its own too: one that blocks it holds up no other channel.
        with asyncio.Runner() as runner:
            if waits(self._channel):
                self._loop = runner.get_loop()
            while (work := self._next()) is not None:
                updates, assignments, call = work
                for rows in updates:
                    self._take_note(rows)
                for assigned in assignments:
                    self._take_assigned(assigned)
                if call is None:
                    continue
                answer = self._serve(runner, call)
                with self._changed:
                    self._call = None  # first: who has the answer may begin the next call at once
                call.end(answer)

    def _next(self) -> tuple[list[Int32Array], list[Assigned], Call | None] | None:
        with self._changed:
            while self._call is None and not self._updates and not self._assignments and not self._closing:
                self._changed.wait()
            if self._closing:
                return None
            updates, assignments = list(self._updates), list(self._assignments)
            self._updates.clear()
            self._assignments.clear()
            return updates, assignments, self._call

    def _take_note(self, rows: Int32Array) -> None:
        try:
            self._channel.update(rows)
        except BaseException:
            log.exception("%s failed to take note of %d changed items", self._name, rows.size)
            self._failed_updates += 1

    def _take_assigned(self, assigned: Assigned) -> None:
        try:
            self._channel.assign(*assigned)
        except BaseException:
            log.exception("%s failed to take %d assignments", self._name, assigned[0].size)
            self._failed_updates += 1

    def _serve(self, runner: asyncio.Runner, call: Call) -> Answer:
        if call.given_up:  # while it took note of updates
            return Answer(CandidateBatch.empty(call.k.size))
        try:
            return runner.run(self._cancellable(call)) if waits(self._channel) else _run(self._asked(call))
        except BaseException as error:
            return Answer(CandidateBatch.empty(call.k.size), errors=dict.fromkeys(range(call.k.size), error))

    async def _cancellable(self, call: Call) -> Answer:
        task = asyncio.ensure_future(self._asked(call))
        call.task = task
        if call.given_up:
            task.cancel()
        return await task

    async def _asked(self, call: Call) -> Answer:
        """Ask for the batch, and where that fails for each query alone."""
        k = call.k.copy()
        answer = Answer(CandidateBatch.empty(k.size))
        if self._gated:
            self._ask_gate(call, k, answer)
        if not k.any():
            return answer
        try:
            answer.batch = await self._checked(call.batch, k, call.rules)
        except BaseException as error:
            if k.size == 1 or call.given_up:
                answer.errors |= dict.fromkeys(np.flatnonzero(k).tolist(), error)
                return answer
            answer.batch = await self._one_by_one(call, k, answer)
        return answer

    def _ask_gate(self, call: Call, k: Int32Array, answer: Answer) -> None:
        for q in np.flatnonzero(k).tolist():
            try:
                if self._channel.enable(call.batch.query(q)):
                    continue
                answer.gated.append(q)
            except BaseException as error:
                answer.errors[q] = error
            k[q] = 0

    async def _one_by_one(self, call: Call, k: Int32Array, answer: Answer) -> CandidateBatch:
        parts: list[Candidates] = []
        for q in range(k.size):
            parts.append(CandidateBatch.empty(1).query(0))
            if k[q] == 0 or call.given_up:
                continue
            try:
                alone = await self._checked(call.batch.alone(q), k[q : q + 1], call.rules)
                parts[q] = alone.query(0)
            except BaseException as error:
                answer.errors[q] = error
        return CandidateBatch.of(parts)

    async def _checked(self, batch: QueryBatch, k: Int32Array, rules: Rules) -> CandidateBatch:
        channel = self._channel
        asked = k.copy()
        given = (
            await channel.recall_batch_async(batch, asked)
            if waits(channel)
            else channel.recall_batch(batch, asked)
        )
        answer = own_copy(given, k, self._name)
        check_contract(answer, k, rules.items, self._name, rules.trigger_rows)
        check_distinct(answer, self._name)
        return answer


def _run(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """Run what waits for nothing to its end, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        answer: Answer = end.value
        return answer
    raise AssertionError("a channel that is no coroutine waited")


def _cancel(call: Call) -> None:
    if call.task is not None:
        call.task.cancel()


def said(error: BaseException) -> str:
    """Return what the answer says of an error that a channel raised, whatever it is made of."""
    try:
        text = str(error) if isinstance(error, ContractError) else repr(error)
    except BaseException:
        text = f"{type(error).__name__}, which cannot be printed"
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[:_LONGEST_MESSAGE]}..."
    return text.encode(errors="replace").decode()


class Guard:
    """What stands between one channel of a replica and its pipelines: the circuit breaker, and the thread of its own."""

    def __init__(self, name: str, channel: Channel, rules: BreakerConfig, deadline_ms: float) -> None:
        """Take a channel; `deadline_ms` is how long a batch waits for one that is not inline."""
        self.breaker = Breaker(rules)
        self.beside = None if channel.inline else Beside(name, channel, deadline_ms / 1000)


class Guards(Mapping[str, Guard]):
    """The guards of a replica's channels by name; its pipelines share them."""

    def __init__(self, guards: Mapping[str, Guard]) -> None:
        self._guards = dict(guards)

    @classmethod
    def of(cls, config: Config, channels: Mapping[str, Channel]) -> Guards:
        """Make a guard for each channel, as the configuration says."""
        return cls(
            {
                name: Guard(name, channel, config.breaker, config.deadline_of(name))
                for name, channel in channels.items()
            }
        )

    def __getitem__(self, name: str) -> Guard:
        return self._guards[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._guards)

    def __len__(self) -> int:
        return len(self._guards)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """While the server warms up every channel has time, and nothing counts against it afterwards."""
        beside = [guard.beside for guard in self._guards.values() if guard.beside is not None]
        before = [each.deadline for each in beside]
        for each in beside:
            each.deadline = max(each.deadline, WARM_UP_SECONDS)
        try:
            yield
        finally:
            for each, deadline in zip(beside, before, strict=True):
                each.deadline = deadline
            for guard in self._guards.values():
                guard.breaker.reset()

    def close(self) -> None:
        """End the threads of the channels; the replica answers no more."""
        for guard in self._guards.values():
            if guard.beside is not None:
                guard.beside.close()
