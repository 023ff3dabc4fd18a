"""Constant traffic of recalls over several connections, and what became of every one of them."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import Counter
from typing import Any, Self

import grpc

from engine.client import AsyncRecallClient


def without_shedding(text: str) -> str:
    """Return a configuration's text with such limits that a server refuses nothing for being busy.

    For servers whose failed requests are counted: what overload does is measured elsewhere.
    """
    text = re.sub(r"(?m)^target_ms = .*$", "target_ms = 60000.0", text)
    return re.sub(r"(?m)^backlog = .*$", "backlog = 100000", text)


class Traffic:
    """Asks from a thread of its own while the context lasts.

    Attributes:
        answered: requests answered, by release.
        failed: requests that failed, by status.
        failures: each failure: seconds since the epoch, status, details.
        seconds: how long each answered request took.
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
        self.failures: list[tuple[float, str, str]] = []
        self.seconds: list[float] = []
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
        try:
            result = await client.recall(user_id=user, limit=50)
        except grpc.RpcError as error:
            code = error.code().name  # type: ignore[attr-defined]
            self.failed[code] += 1
            self.failures.append((time.time(), code, str(error.details())))  # type: ignore[attr-defined]
            return
        finally:
            self.in_flight -= 1
        self.seconds.append(time.monotonic() - began)
        self.answered[result.release] += 1

    def summary(self) -> dict[str, Any]:
        """Return what became of the requests; times in milliseconds."""
        spent = sorted(self.seconds)

        def at(share: float) -> float:
            return round(spent[int(share * (len(spent) - 1))] * 1000, 1) if spent else 0.0

        return {
            "answered": self.answered.total(),
            "answered_by_release": dict(self.answered),
            "failed": dict(self.failed),
            "failures": [f"{code}: {text}" for _, code, text in self.failures[:5]],
            "p50_ms": at(0.5),
            "p99_ms": at(0.99),
            "most_ms": at(1.0),
        }
