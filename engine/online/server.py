"""The server process: listens, warms up, says it is healthy, serves, and drains when told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.config import Config
from engine.core.errors import ConfigError, RecallError, StateError
from engine.data.snapshot import SnapshotStore
from engine.online import security
from engine.online.answered import Answered
from engine.online.assignments import AssignmentTails
from engine.online.batcher import Batcher
from engine.online.calls import Calls
from engine.online.impressions import Impressions
from engine.online.ingest import INGEST_SERVICE, IngestService
from engine.online.live import Tail
from engine.online.metrics import Metrics, MetricsServer
from engine.online.recalls import Recalls
from engine.online.replica import Replica
from engine.online.service import METHOD, SERVICE, RecallService
from engine.online.state import State
from engine.online.telemetry import Telemetry
from engine.online.warm_up import warm_up
from engine.state.log import offset_key

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 5.0
"""How long the batch that is being computed may still take once nobody waits for it."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """A gRPC server around one replica: RecallService, health and reflection; IngestService with a state store.

    Attributes:
        metrics: what it counts.
        metrics_port: where it serves them over HTTP while it runs; 0 where it does not.
    """

    def __init__(
        self,
        config: Config,
        replica: Replica,
        state: State | None = None,
        shared_port: bool = False,
    ) -> None:
        """Take what is needed.

        Args:
            config: its `server` section says where to listen.
            replica: what answers; opened with the same `state`.
            state: the state store; it stays the caller's to close, after `stop`.
            shared_port: whether other processes listen on the same port; without it, a taken port is an error.
        """
        self._config = config
        self._replica = replica
        self._next: Replica | None = None
        self._state = state
        self._shared_port = shared_port
        self._health = _Health()
        self._ingest: IngestService | None = None
        self._recalls: Recalls | None = None
        self._impressions: Impressions | None = None
        self._tail: Tail | None = None
        self._assignments: AssignmentTails | None = None
        self._metrics_server: MetricsServer | None = None
        self.metrics = Metrics() if state is None else state.metrics

    @property
    def metrics_port(self) -> int:
        """The port of the metrics."""
        return 0 if self._metrics_server is None else self._metrics_server.port

    @property
    def release(self) -> str:
        """The release that answers."""
        return self._replica.release

    async def start(self) -> int:
        """Listen, warm up, and only then say SERVING.

        Returns:
            The port.

        Raises:
            ConfigError: if the address cannot be listened on, or not safely.
            RecallError: if a scene cannot answer at all.
        """
        await self._prepare_services()
        port = await self._open_port()
        try:
            await asyncio.to_thread(warm_up, self._config, self._replica, self._state)
        except BaseException:
            await self.stop(0)
            raise
        await self._begin(port)
        return port

    async def warm(self) -> None:
        """Do all of `start` that needs no port; then call `listen`, or `stop`. For a server that shares its port.

        The system gives connections to whoever listens, so a server that shares must not before it can answer.

        Raises:
            ConfigError, RecallError: as `start`.
        """
        await self._prepare_services()
        await asyncio.to_thread(warm_up, self._config, self._replica, self._state)

    async def listen(self) -> int:
        """Do the rest of `start` after `warm`; return the port.

        Raises:
            ConfigError: if the address cannot be listened on.
        """
        port = await self._open_port()
        await self._begin(port)
        return port

    async def _prepare_services(self) -> None:
        """Make the gRPC server and what is behind it; nobody can connect yet."""
        for name in ("", *self._services):
            await self._health.set(name, _NOT_SERVING)
        settings = self._config.server
        self._secured = security.credentials(self._config)
        # Two servers on one port share its connections by chance; unless that is meant, a taken port is an error.
        options = [("grpc.so_reuseport", int(self._shared_port)), *security.options(self._config)]
        if self._shared_port and settings.max_connection_age_seconds:
            # Connections stay where they began: only when they end can a worker that came later get its share.
            options.append(("grpc.max_connection_age_ms", round(settings.max_connection_age_seconds * 1000)))
        gates = security.interceptors(self._config)
        self._server = grpc.aio.server(options=options, interceptors=gates)
        self._batcher = Batcher(
            self._replica, settings.max_batch, settings.max_queue, self._observe, self._config.overload
        )
        self.metrics.watch(self._batcher.admission)
        self._telemetry = Telemetry(self._config.telemetry, self.metrics.telemetry_dropped.inc)
        service = RecallService(self._config, self._batcher, self.metrics, self._telemetry.traces, gates)
        self._calls = Calls(self._server, METHOD, service.begin, self._batcher.turns)
        if self._state is not None:
            kind = self._replica.catalogue.id_type
            share = self._config.telemetry.impressions
            self._impressions = Impressions(self._state.store, share, self.metrics) if share else None
            self._ingest = IngestService(
                self._config,
                kind,
                self._state.users,
                self._state.log,
                self.metrics,
                self._impressions,
                self._state.events,
            )
            self._recalls = Recalls(self._state.recall_counts, self.metrics)
            self._server.add_generic_rpc_handlers([self._ingest.handlers()])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def _open_port(self) -> int:
        settings = self._config.server
        try:
            port = _listen(self._server, settings.host, settings.port, self._secured)
            if settings.metrics_port:
                self._metrics_server = self.metrics.serve(settings.metrics_host, settings.metrics_port)
        except BaseException:
            await self.stop(0)
            raise
        await self._server.start()
        self._calls.start()
        return port

    async def _begin(self, port: int) -> None:
        """Follow the live log, and say SERVING."""
        self._follow()
        for name in ("", *self._services):
            await self._health.set(name, _SERVING)
        log.info("release %s: listening on %s:%d", self.release, self._config.server.host, port)

    @property
    def _services(self) -> tuple[str, ...]:
        return (SERVICE,) if self._state is None else (SERVICE, INGEST_SERVICE)

    def _follow(self) -> None:
        if self._state is not None:
            self._tail = Tail(self._replica, self._state.log, self._batcher.between, self.metrics)
            self._tail.start()
            snapshots = {name: self._config.snapshot_of(name) for name in self._replica.channels}
            self._assignments = AssignmentTails(
                self._replica, snapshots, self._state.store, self._batcher.between, self.metrics
            )
            self._assignments.start()

    async def alive(self) -> None:
        """Return once the compute thread has been between two batches: later than a batch takes, something hangs."""
        await asyncio.wrap_future(self._batcher.between(lambda: None))

    async def prepare(self, store: SnapshotStore, release: str) -> None:
        """Load another release beside the one that answers, take in the live log, and warm it up: for `swap`.

        Snapshots that both releases name are opened once. What was prepared before is let go.

        Args:
            store: where it is.
            release: its name; somebody has compared its checksums.

        Raises:
            SnapshotError, ConfigError, StateError: as `Replica.open_release`.
            RecallError: its ids are of another kind, or a scene cannot answer.
        """
        self.abandon()
        self._next = await asyncio.to_thread(self._successor, store, release)

    def _successor(self, store: SnapshotStore, release: str) -> Replica:
        before = self._replica
        replica = Replica.open_release(self._config, store, release, self._state, before)
        kind, known = replica.catalogue.id_type, before.catalogue.id_type
        try:
            if kind != known:
                raise RecallError(
                    f"release {release} has ids of type {kind}, not {known}; that needs a restart"
                )
            warm_up(self._config, replica, self._state)
        except BaseException:
            replica.close()
            raise
        return replica

    async def swap(self) -> None:
        """Have the prepared release answer from the next batch on, and let the one before go.

        It first takes in what the live log brought meanwhile, so that no answer knows less of it than the ones before.

        Raises:
            RecallError: nothing is prepared; the release that answers stays.
        """
        replica, self._next = self._next, None
        if replica is None:
            raise RecallError("no release is prepared")
        await asyncio.to_thread(self._level, replica)
        before = self._replica
        await asyncio.wrap_future(self._batcher.between(lambda: self._put_in_service(replica)))
        tails = self._tail, self._assignments
        self._tail = self._assignments = None
        self._follow()
        log.info("release %s answers", replica.release)
        for tail in tails:
            if tail is not None:
                await asyncio.to_thread(tail.close, _PATIENCE_SECONDS)
        before.close()

    def abandon(self) -> None:
        """Let go what was prepared."""
        if self._next is not None:
            self._next.close()
        self._next = None

    def _level(self, replica: Replica) -> bool:
        """Take in what the live log has; whether it could be read."""
        if self._state is None:
            return True
        try:
            replica.catch_up(self._state.log)
        except StateError as error:
            log.warning(
                "release %s lacks the newest items until the live log can be read: %s", replica.release, error
            )
            return False
        return True

    def _put_in_service(self, replica: Replica) -> None:
        """Replace the replica: pipelines, catalogue and all; between two batches, on the thread that computes them."""
        if self._state is not None and offset_key(replica.log_offset) < offset_key(self._replica.log_offset):
            self._level(replica)
        before = self._replica
        self._batcher.replica = self._replica = replica
        before.close()

    async def stop(self, grace: float) -> None:
        """Say NOT_SERVING, refuse new calls, let those in flight finish, and close.

        Args:
            grace: seconds they may take.
        """
        await self._health.end()
        if self._ingest is not None:
            await self._ingest.close(max(grace, _PATIENCE_SECONDS))
        await self._server.stop(grace)
        await self._batcher.close(_PATIENCE_SECONDS)
        await asyncio.to_thread(self._calls.close, _PATIENCE_SECONDS)
        threads = (self._tail, self._assignments, self._recalls, self._impressions, self._telemetry)
        for thread in threads:
            if thread is not None:
                await asyncio.to_thread(thread.close, _PATIENCE_SECONDS)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)

    def _observe(self, answered: Answered) -> None:
        """Note what became of a batch; on the compute thread, when its answers are on their way."""
        self.metrics.count(answered)
        self._telemetry.note(answered)
        if self._recalls is not None:
            self._recalls.note(answered.pipeline, answered.run, self._replica.catalogue.columns.keys)
        if self._impressions is not None:
            self._impressions.answered(answered, self._replica.catalogue.columns.keys)


class _Health(health.aio.HealthServicer):  # type: ignore[name-defined,misc]
    """The health service; its Watch streams end with the server, else each holds it for the whole grace."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802  # gRPC's name
        """Stream the status until the server stops."""
        watch = asyncio.ensure_future(super().Watch(request, context))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait((watch, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            ended.cancel()

    async def end(self) -> None:
        """Say NOT_SERVING for good, and end the streams once they have said so."""
        try:
            async with asyncio.timeout(0.5):  # a watcher that does not read must not hold us
                await self.enter_graceful_shutdown()
        except TimeoutError:
            log.warning("a health watcher does not read")
        asyncio.get_running_loop().call_later(0.1, self._ended.set)


async def serve(
    config: Config,
    replica: Replica,
    ready: Callable[[int], None] | None = None,
    stop: asyncio.Event | None = None,
    state: State | None = None,
) -> None:
    """Serve until told to stop, then drain.

    Args:
        config: the configuration.
        replica: what answers.
        ready: called with the port when the server is up and healthy.
        stop: ends it when set; without one, SIGTERM and SIGINT do (a second one kills, as ever), which needs
            the main thread.
        state: as `Server` takes it.

    Raises:
        ConfigError: if the address cannot be listened on.
        RecallError: if a scene cannot answer at all.
    """
    loop = asyncio.get_running_loop()
    stopped = stop if stop is not None else asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT) if stop is None else ()

    def on_signal(number: signal.Signals) -> None:
        log.info("%s: draining for at most %g s", number.name, config.server.drain_seconds)
        for other in signals:
            loop.remove_signal_handler(other)
        stopped.set()

    for number in signals:
        loop.add_signal_handler(number, on_signal, number)
    server = Server(config, replica, state)
    try:
        port = await server.start()
        try:
            if ready is not None:
                ready(port)
            await stopped.wait()
        finally:
            await server.stop(config.server.drain_seconds)
        log.info("stopped")
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _listen(server: grpc.aio.Server, host: str, port: int, secured: grpc.ServerCredentials | None) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if secured is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, secured)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: {_why(host, port)}", "server.port") from error
    return bound


def _why(host: str, port: int) -> str:
    """Ask the system why an address cannot be had; gRPC does not pass that on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC was refused the address"
