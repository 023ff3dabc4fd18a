"""The supervisor: worker processes on one port, each started, watched, replaced when it dies, and told of new releases.

The supervisor answers no request. It reserves the port with a socket that is bound and does not listen, so that port 0
works and nobody takes the port while a worker is replaced; it runs the embedded state store, so that a worker's death is
not the store's; it serves the metrics of all workers; and it looks which release is in service.

Workers are programs of their own, not forks: a process that has threads and a gRPC core cannot be forked safely.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from engine.config import Config
from engine.core import merge
from engine.core.errors import RecallError, SnapshotError
from engine.data.snapshot import Snapshot, SnapshotStore
from engine.data.snapshot.manifest import moment_of
from engine.online import security
from engine.online.control import WorkerError, WorkerLostError
from engine.online.exposition import MetricsPage, merged
from engine.online.reload import Reloader
from engine.online.reservation import Reservation
from engine.online.state import FOLDER
from engine.online.worker_process import WorkerProcess
from engine.state.embedded import EmbeddedStore
from engine.state.url import state_url

log = logging.getLogger(__name__)

HUNG_SECONDS = 30.0
"""A worker that serves and answers no ping for so long is killed: its compute thread, or its event loop, hangs."""

_START_HUNG_SECONDS = 300.0
"""The same for one that starts, whose event loop may wait for a compilation."""

_PING_SECONDS = 2.0
_YOUNG_SECONDS = 10.0
"""A worker that dies younger than this is not started again at once."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_COLLECT_SECONDS = 5.0
_STOP_SECONDS = 20.0
"""What a worker may take to end, beyond twice the drain."""


class Supervisor:
    """Runs the workers of `recall serve`."""

    def __init__(
        self,
        config: Config,
        document: str,
        ready: Callable[[int], None] | None = None,
        hung_seconds: float = HUNG_SECONDS,
    ) -> None:
        """Take what is needed; `run` does the rest.

        Args:
            config: the configuration, with what the command line changed in `server` and `store`.
            document: the file that it was read from (TOML), which the workers read.
            ready: called with the port when all workers serve.
            hung_seconds: how long a worker may answer no ping.
        """
        self._config = config
        self._document = document
        self._ready = ready
        self._hung_seconds = hung_seconds
        self._store = SnapshotStore(config.store.path)
        self._workers: list[WorkerProcess | None] = [None] * config.server.workers
        self._all_served = False
        self._stopping = False
        self._stop = asyncio.Event()
        self._failure: RecallError | None = None
        self._state_url = ""
        self._port = 0
        self._metrics = _Metrics()
        self._reloader: Reloader | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal kills. Needs the main thread.

        Raises:
            ConfigError, SnapshotError, StateError, RecallError: nothing could be started; the text is one sentence.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            await self._run()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _run(self) -> None:
        began = time.monotonic()
        settings = self._config.server
        security.check(self._config)
        with ExitStack() as stack:
            self._port = stack.enter_context(Reservation(settings.host, settings.port)).port
            if settings.metrics_port:
                page = MetricsPage(settings.metrics_host, settings.metrics_port, self._page_from_thread())
                stack.callback(page.close)
            # While the store starts and checksums are compared the first worker already imports its modules.
            first = await self._spawn(0)
            try:
                self._state_url = await asyncio.to_thread(self._start_store, stack)
                release, snapshots = await asyncio.to_thread(self._choose)
            except BaseException:
                await first.kill()
                raise
            self._reloader = Reloader(self._store, release, snapshots, self._serving)
            log.info("release %s, checked in %.1f s", release, time.monotonic() - began)
            keepers = [asyncio.create_task(self._keep(0, first))]
            try:
                await self._bring_up_others(keepers, began)
                watching = asyncio.create_task(self._follow_releases())
                await self._stop.wait()
                watching.cancel()
                await asyncio.wait((watching,))
            finally:
                await self._end(keepers)
                # Threads wait for the state store's end, and may: nothing else runs here any more.
                await asyncio.to_thread(stack.close)
        if self._failure is not None:
            raise self._failure
        log.info("stopped")

    async def _bring_up_others(self, keepers: list[asyncio.Task[None]], began: float) -> None:
        count = len(self._workers)
        if count > 1 and not _kernels_are_cached():
            log.info("kernels are not compiled yet: worker 0 does it alone, the others follow")
            await self._until(lambda: self._listening() == 1)
        keepers += [asyncio.create_task(self._keep(number)) for number in range(1, count)]
        await self._until(lambda: self._listening() == count)
        if self._stop.is_set():
            return
        self._all_served = True
        log.info("%d of %d workers serve after %.1f s", count, count, time.monotonic() - began)
        if self._ready is not None:
            self._ready(self._port)

    async def _until(self, there: Callable[[], bool]) -> None:
        while not there() and not self._stop.is_set():
            await asyncio.sleep(0.01)

    def _choose(self) -> tuple[str, dict[str, Snapshot]]:
        """Return the newest release that is whole, with every checksum compared."""
        release, snapshots, refused = self._store.newest_valid(verify=True)
        for error in refused:
            log.error("release refused, an earlier one serves: %s", error)
        self._metrics.serves(release.name)
        return release.name, snapshots

    def _start_store(self, stack: ExitStack) -> str:
        """Run the embedded state store if the configuration names no other; return its URL, else ""."""
        settings = self._config.state
        if state_url(settings.url):
            return ""  # the workers read for themselves where it is, and what it is opened with
        embedded = EmbeddedStore(self._config.store.path / FOLDER, settings.durability)
        url = embedded.start()
        stack.callback(embedded.stop)
        return url

    # --- workers -----------------------------------------------------------------------------------------

    def _serving(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker is not None and worker.serving]

    def _listening(self) -> int:
        return sum(worker.listening for worker in self._serving())

    async def _spawn(self, number: int) -> WorkerProcess:
        worker = self._workers[number] = await WorkerProcess.spawn(number)
        return worker

    async def _keep(self, number: int, worker: WorkerProcess | None = None) -> None:
        """Have a worker of this number serve until told to stop."""
        pause = 0.0
        while True:
            began = time.monotonic()
            refused = False
            try:
                worker = worker or await self._spawn(number)
                await self._live(worker)
            except WorkerError as error:
                refused = True
                if not self._all_served:
                    self._give_up(error)
                elif not self._stopping:
                    log.error("worker %d cannot start: %s", number, error)
                    await self._choose_again(error)
            except OSError as error:
                log.error("worker %d cannot be started: %s", number, error.strerror)
            if worker is not None:
                status = await worker.kill()
                if not refused and not self._stopping:
                    log.error("worker %d (process %d) ended: %s", number, worker.pid, _how(status))
                    if not self._serving() and not self._all_served:
                        text = f"worker {number} ended before it served, {_how(status)}; the log says why"
                        self._give_up(RecallError(text))
            self._workers[number] = worker = None
            if self._stopping:
                return
            young = time.monotonic() - began < _YOUNG_SECONDS
            pause = min(max(2 * pause, _SHORTEST_PAUSE), _LONGEST_PAUSE) if young else 0.0
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause or 0.001)
            if self._stopping or self._stop.is_set():
                return
            self._metrics.restarts.labels(str(number)).inc()

    async def _live(self, worker: WorkerProcess) -> None:
        """Start a worker, have it listen, and return when it has ended."""
        assert self._reloader is not None
        watching = asyncio.create_task(self._watch(worker))
        try:
            server = self._config.server.model_dump(mode="json") | {"port": self._port, "metrics_port": 0}
            release = self._reloader.release
            await worker.control.ask(
                "start",
                config=self._document,
                store=str(self._config.store.path),
                server=server,
                state_url=self._state_url,
                release=release,
            )
            while release != self._reloader.release:  # another one came into service meanwhile
                release = self._reloader.release
                await worker.prepare(release)
                await worker.control.ask("swap")
            # From here on reloads count this worker in: what it is asked, it does in turn.
            worker.serving = True
            await worker.control.ask("listen")
            worker.listening = True
            self._metrics.workers.set(self._listening())
            log.info("worker %d (process %d) serves release %s", worker.number, worker.pid, release)
            await worker.control.ended()
        except WorkerLostError:
            pass
        finally:
            worker.serving = False
            self._metrics.workers.set(self._listening())
            watching.cancel()

    async def _watch(self, worker: WorkerProcess) -> None:
        """Kill a worker that does not answer."""
        while True:
            patience = self._hung_seconds if worker.serving else _START_HUNG_SECONDS
            try:
                async with asyncio.timeout(patience):
                    await worker.control.ask("ping")
            except WorkerLostError:
                return
            except WorkerError as error:
                log.warning("worker %d: %s", worker.number, error)
            except TimeoutError:
                log.error(
                    "worker %d (process %d) has not answered for %g s: it is killed",
                    worker.number, worker.pid, patience,
                )  # fmt: skip
                await worker.kill()
                return
            await asyncio.sleep(min(_PING_SECONDS, self._hung_seconds / 4))

    def _give_up(self, error: RecallError) -> None:
        if self._failure is None and not self._stopping:
            self._failure = RecallError(str(error))
            self._stop.set()

    async def _choose_again(self, error: WorkerError) -> None:
        """Where nobody serves and the release cannot be opened any more, take the newest that can."""
        if error.kind != SnapshotError.__name__ or self._serving() or self._reloader is None:
            return
        try:
            release, snapshots = await asyncio.to_thread(self._choose)
        except SnapshotError as refused:
            log.error("no release can be served: %s", refused)
            return
        self._reloader = Reloader(self._store, release, snapshots, self._serving)

    async def _follow_releases(self) -> None:
        while self._config.server.reload_seconds:
            await asyncio.sleep(self._config.server.reload_seconds)
            assert self._reloader is not None
            try:
                outcome = await self._reloader.look() if self._serving() else None
            except Exception:  # the next look may go better
                log.exception("the release in service could not be looked at")
                continue
            if outcome is not None:
                self._metrics.reloads.labels(outcome).inc()
                self._metrics.serves(self._reloader.release)

    # --- end ---------------------------------------------------------------------------------------------

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.info("%s again: killing the workers", number.name)
            for worker in self._workers:
                if worker is not None:
                    worker.signal(signal.SIGKILL)
            return
        log.info("%s: draining for at most %g s", number.name, self._config.server.drain_seconds)
        self._stop.set()

    async def _end(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        self._stopping = True
        self._stop.set()
        for worker in self._workers:
            if worker is not None:
                worker.tell_to_stop()
        patience = 2 * self._config.server.drain_seconds + _STOP_SECONDS
        _, late = await asyncio.wait(keepers, timeout=patience)
        for worker in self._workers if late else ():
            if worker is not None:
                log.error("worker %d does not end: it is killed", worker.number)
                worker.signal(signal.SIGKILL)
        for result in await asyncio.gather(*keepers, return_exceptions=True):
            if isinstance(result, BaseException):
                log.error("a worker could not be looked after: %r", result)

    # --- metrics -----------------------------------------------------------------------------------------

    def _page_from_thread(self) -> Callable[[], str]:
        loop = asyncio.get_running_loop()

        def page() -> str:
            return asyncio.run_coroutine_threadsafe(self._page(), loop).result(_COLLECT_SECONDS + 5)

        return page

    async def _page(self) -> str:
        workers = self._serving()
        texts = await asyncio.gather(*(self._text_of(worker) for worker in workers))
        pages = {str(worker.number): text for worker, text in zip(workers, texts, strict=True) if text}
        return merged(generate_latest(self._metrics.registry).decode(), pages)

    async def _text_of(self, worker: WorkerProcess) -> str:
        try:
            async with asyncio.timeout(_COLLECT_SECONDS):
                return str((await worker.control.ask("metrics"))["text"])
        except (WorkerError, WorkerLostError, TimeoutError):
            return ""


class _Metrics:
    """What the supervisor itself has to say."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.workers = Gauge("recall_workers", "Workers that serve.", registry=self.registry)
        self.restarts = Counter(
            "recall_worker_restarts", "Workers started again.", ("worker",), registry=self.registry
        )
        self.reloads = Counter(
            "recall_reloads", "Releases that came into service; outcome: done, failed.", ("outcome",),
            registry=self.registry,
        )  # fmt: skip
        self._age = Gauge(
            "recall_release_age_seconds",
            "Time since the release that is served was made.",
            registry=self.registry,
        )
        for outcome in ("done", "failed"):
            self.reloads.labels(outcome)

    def serves(self, release: str) -> None:
        made = moment_of(release).timestamp()
        self._age.set_function(lambda: time.time() - made)


def _how(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"


def _kernels_are_cached() -> bool:
    """Whether the kernels that every answer goes through were compiled since their source last changed.

    They stand for all: where only another module changed, workers that start together compile the same at the same time,
    which costs time and nothing else.
    """
    source = Path(merge.__file__)
    folder = os.environ.get("NUMBA_CACHE_DIR")
    found = Path(folder).rglob("merge.*.nbi") if folder else source.parent.glob("__pycache__/merge.*.nbi")
    changed = source.stat().st_mtime
    return any(file.stat().st_mtime >= changed for file in found)


def run_supervisor(config: Config, document: str, ready: Callable[[int], None] | None = None) -> int:
    """Serve until SIGTERM or SIGINT: the command line's `serve`; arguments and errors as of `Supervisor`.

    Returns:
        The exit status, 0.
    """

    async def run() -> None:
        await Supervisor(config, document, ready).run()

    asyncio.run(run())
    return 0
