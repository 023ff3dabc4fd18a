"""Reload: when another release comes into service, all workers take it, or none does.

The release is verified once. Then each worker in turn loads it and warms it up beside the one that answers, so that one
worker at a time has less of its core. Only when all have it is the word given to swap. If any worker fails, all let go
what they prepared, and the release is not tried again until `current` names another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Literal, Protocol

from engine.core.errors import RecallError, SnapshotError
from engine.data.snapshot import Snapshot, SnapshotStore
from engine.online.control import WorkerError, WorkerLostError

log = logging.getLogger(__name__)

Outcome = Literal["done", "failed"]

TRIES = 3
"""How often a release is tried while workers die over it, which may be by chance."""

_NICE = 10


class Reloading(Protocol):
    """A worker as a reload sees it. Each method raises WorkerError or WorkerLostError."""

    @property
    def name(self) -> str:
        """What the log calls it."""

    async def prepare(self, release: str) -> None:
        """Load a release and warm it up."""

    async def swap(self, release: str) -> None:
        """Have it answer."""

    async def abandon(self) -> None:
        """Let it go."""


class Reloader:
    """Looks which release is in service and brings it to the workers.

    Attributes:
        release: the release that the workers serve, and that new ones are to come up with.
    """

    def __init__(
        self,
        store: SnapshotStore,
        release: str,
        snapshots: dict[str, Snapshot],
        workers: Callable[[], Sequence[Reloading]],
    ) -> None:
        """Take what is needed.

        Args:
            store: where the releases are.
            release: the one that is served.
            snapshots: its snapshots, whose checksums were compared.
            workers: returns those that serve now.
        """
        self.release = release
        self._store = store
        self._verified = snapshots
        self._workers = workers
        self._tries: dict[str, int] = {}
        self._said = ""
        with suppress(SnapshotError):
            current = store.current_name()
            if (
                current is not None and current != release
            ):  # it was refused at the start, and is not tried again
                self._tries = {current: TRIES}

    async def look(self) -> Outcome | None:
        """Bring the release in service to the workers.

        Returns:
            What became of it; None where there was nothing to do.
        """
        try:
            name = await asyncio.to_thread(self._store.current_name)
        except SnapshotError as error:
            if str(error) != self._said:
                log.error("release %s goes on serving: %s", self.release, error)
            self._said = str(error)
            return None
        self._said = ""
        if name is None or name == self.release:
            self._tries = {}
            return None
        if self._tries.get(name, 0) >= TRIES:
            return None
        self._tries = {name: self._tries.get(name, 0) + 1}
        log.info("release %s is in service: preparing it", name)
        began = time.monotonic()
        try:
            snapshots = await asyncio.to_thread(self._verify, name)
            prepared = await self._prepare(name)
        except WorkerLostError as error:
            log.error(
                "release %s goes on serving, a worker died while it prepared %s: %s",
                self.release,
                name,
                error,
            )
            return "failed"
        except RecallError as error:
            log.error("release %s goes on serving, %s is refused: %s", self.release, name, error)
            self._tries[name] = TRIES
            return "failed"
        self.release, self._verified, before = name, snapshots, self.release
        await _all(worker.swap(name) for worker in prepared)
        log.info("release %s answers instead of %s, after %.1f s", name, before, time.monotonic() - began)
        return "done"

    async def _prepare(self, name: str) -> list[Reloading]:
        """Have every worker prepare a release, those that come up meanwhile too."""
        prepared: list[Reloading] = []
        try:
            while waiting := [worker for worker in self._workers() if worker not in prepared]:
                await waiting[0].prepare(name)
                prepared.append(waiting[0])
        except WorkerError as error:
            await _all(worker.abandon() for worker in self._workers())
            raise RecallError(f"{waiting[0].name}: {error}") from error
        except WorkerLostError:
            await _all(worker.abandon() for worker in self._workers())
            raise
        return prepared

    def _verify(self, name: str) -> dict[str, Snapshot]:
        """Compare the checksums of what is new in a release, behind everything else that wants the processor."""
        found: list[dict[str, Snapshot] | RecallError] = []

        def work() -> None:
            if sys.platform == "linux":  # where a thread has its own priority, and its threads inherit it
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            try:
                found.append(self._store.load_release(self._store.release(name), opened=self._verified))
            except RecallError as error:
                found.append(error)

        thread = threading.Thread(target=work, name="verify", daemon=True)
        thread.start()
        thread.join()
        if not found:
            raise RecallError(f"release {name} could not be verified")
        if isinstance(found[0], RecallError):
            raise found[0]
        return found[0]


async def _all(steps: Iterable[Awaitable[None]]) -> None:
    """Do all at once; one that fails keeps nobody from the rest."""
    for result in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, WorkerLostError):
            log.error("a worker did not follow: %s", result)
