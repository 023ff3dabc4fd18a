"""Constant traffic of recalls over several connections, and what became of every one of them."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import grpc

from engine.client import AsyncRecallClient

OK = "OK"


class Call(NamedTuple):
    """One call: when it began and ended (`time.monotonic()`), its status, and what its answer says of itself.

    Attributes:
        flagged: a filter could not judge, because the user's state was not to be had.
    """

    began: float
    ended: float
    status: str
    flagged: bool = False


def milliseconds(calls: Iterable[Call]) -> dict[str, float]:
    """Return how long calls took: p50_ms, p99_ms and most_ms; zeros where there are none."""
    spent = sorted(call.ended - call.began for call in calls)
    shares = (("p50_ms", 0.5), ("p99_ms", 0.99), ("most_ms", 1.0))
    return {
        name: round(spent[int(share * (len(spent) - 1))] * 1000, 1) if spent else 0.0
        for name, share in shares
    }


class Traffic:
    """Asks from a thread of its own while the context lasts.

    Attributes:
        answered: requests answered, by release.
        failed: requests that failed, by status.
        failures: the details of each failure.
        calls: every request that has ended, in that order.
        in_flight: requests that wait for their answer.
    """

    def __init__(
        self,
        target: str,
        users: list[int],
        connections: int = 8,
        per_second: float = 200.0,
        timeout: float = 5.0,
        retry: bool = True,
    ) -> None:
        """Take what is asked.

        Args:
            target: the server.
            users: who is asked for.
            connections: each a channel of its own.
            per_second: requests sent, whatever becomes of those before.
            timeout: the deadline of each, in seconds.
            retry: whether the clients try again where the server is unavailable, as they do by default.
        """
        self.answered: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.failures: list[str] = []
        self.calls: list[Call] = []
        self.in_flight = 0
        self._target, self._users = target, users
        self._connections, self._pause, self._timeout = connections, 1.0 / per_second, timeout
        self._options = () if retry else (("grpc.enable_retries", 0),)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="traffic")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for(self, count: int, patience: float = 60.0) -> None:
        """Wait until so many more are answered or have failed."""
        wanted = self.answered.total() + self.failed.total() + count
        deadline = time.monotonic() + patience
        while self.answered.total() + self.failed.total() < wanted and time.monotonic() < deadline:
            time.sleep(0.01)

    async def _run(self) -> None:
        clients = [
            AsyncRecallClient(self._target, timeout=self._timeout, options=self._options)
            for _ in range(self._connections)
        ]
        draw = random.Random(1)
        under_way: set[asyncio.Task[None]] = set()
        next_ = time.monotonic()
        try:
            while not self._stop.is_set():
                task = asyncio.create_task(self._ask(draw.choice(clients), draw.choice(self._users)))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                next_ += self._pause
                # One that fell far behind does not send all it missed at once.
                next_ = max(next_, time.monotonic() - 0.1)
                await asyncio.sleep(max(0.0, next_ - time.monotonic()))
            if under_way:
                await asyncio.wait(under_way)
        finally:
            for client in clients:
                await client.close()

    async def _ask(self, client: AsyncRecallClient, user: int) -> None:
        began = time.monotonic()
        self.in_flight += 1
        status, flagged = OK, False
        try:
            result = await client.recall(user_id=user, limit=50)
            self.answered[result.release] += 1
            flagged = any(report.status != OK for report in result.filters)
        except grpc.RpcError as error:
            status = error.code().name  # type: ignore[attr-defined]
            self.failed[status] += 1
            self.failures.append(f"{status}: {error.details()}")  # type: ignore[attr-defined]
        finally:
            self.in_flight -= 1
            self.calls.append(Call(began, time.monotonic(), status, flagged))

    def summary(self) -> dict[str, Any]:
        """Return what became of the requests; times in milliseconds."""
        return {
            "answered": self.answered.total(),
            "answered_by_release": dict(self.answered),
            "failed": dict(self.failed),
            "failures": self.failures[:5],
            **milliseconds(call for call in self.calls if call.status == OK),
        }
