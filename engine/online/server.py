"""The server process: listens, warms up, says it is healthy, serves, and drains when told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.config import Config
from engine.core.errors import ConfigError, RecallError
from engine.data.snapshot import SnapshotStore
from engine.online.batcher import Batcher
from engine.online.encode import ResponseEncoder
from engine.online.ingest import INGEST_SERVICE, IngestService
from engine.online.live import Tail
from engine.online.metrics import Metrics, MetricsServer
from engine.online.pipeline import Pipeline, Run
from engine.online.recalls import Recalls
from engine.online.rehearsal import rehearse
from engine.online.replica import Replica
from engine.online.request import RecentItems, Request
from engine.online.service import SERVICE, RecallService
from engine.online.state import State, open_state

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 4 << 20
"""A request at every limit that `wire` sets has 3 MB."""

OPTIONS: tuple[tuple[str, int], ...] = (
    # Two servers on one port would share its connections by chance; a taken port must be an error.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # A response is bounded by max_limit.
    ("grpc.max_send_message_length", -1),
    # Clients may ask every 10 s whether we live; by default one that asks twice in 5 minutes is cut off.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

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
    ) -> None:
        """Take what is needed.

        Args:
            config: its `server` section says where to listen.
            replica: what answers; opened with the same `state`.
            state: the state store; it stays the caller's to close, after `stop`.
        """
        self._config = config
        self._replica = replica
        self._state = state
        self._health = _Health()
        self._ingest: IngestService | None = None
        self._recalls: Recalls | None = None
        self._tail: Tail | None = None
        self._metrics_server: MetricsServer | None = None
        self.metrics = Metrics() if state is None else state.metrics

    @property
    def metrics_port(self) -> int:
        """The port of the metrics."""
        return 0 if self._metrics_server is None else self._metrics_server.port

    async def start(self) -> int:
        """Listen, warm up, and only then say SERVING.

        Returns:
            The port.

        Raises:
            ConfigError: if the address cannot be listened on.
            RecallError: if a scene cannot answer at all.
        """
        services = (SERVICE,) if self._state is None else (SERVICE, INGEST_SERVICE)
        for name in ("", *services):
            await self._health.set(name, _NOT_SERVING)
        settings = self._config.server
        self._server = grpc.aio.server(options=OPTIONS)
        port = _listen(self._server, settings.host, settings.port)
        if settings.metrics_port:
            self._metrics_server = self.metrics.serve(settings.host, settings.metrics_port)
        self._batcher = Batcher(self._replica, settings.max_batch, settings.max_queue, self._observe)
        handlers = [RecallService(self._config, self._batcher).handlers()]
        if self._state is not None:
            kind = self._replica.catalogue.id_type
            self._ingest = IngestService(self._config, kind, self._state.users, self._state.log, self.metrics)
            self._recalls = Recalls(self._state.users, self.metrics)
            handlers.append(self._ingest.handlers())
        self._server.add_generic_rpc_handlers(handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._server.start()
        try:
            await asyncio.to_thread(self._warm_up)
        except BaseException:
            await self.stop(0)
            raise
        if self._state is not None:
            self._tail = Tail(self._replica, self._state.log, self._batcher.between, self.metrics)
            self._tail.start()
        for name in ("", *services):
            await self._health.set(name, _SERVING)
        if settings.host not in ("127.0.0.1", "::1", "localhost"):
            log.warning(
                "%s is open to others, and there is neither encryption nor a check of who calls",
                settings.host,
            )
        log.info("release %s: listening on %s:%d", self._replica.release, settings.host, port)
        return port

    def _warm_up(self) -> None:
        warm_up(self._replica)
        if self._state is not None:
            try:
                rehearse(self._config, self._replica, self._state)
            except Exception as error:
                raise RecallError(f"live state cannot be served: {error!r}") from error

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
        for thread in (self._tail, self._recalls):
            if thread is not None:
                await asyncio.to_thread(thread.close, _PATIENCE_SECONDS)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)

    def _observe(self, scene: str, pipeline: Pipeline, run: Run) -> None:
        """Note what became of a batch; on the compute thread, when its answers are on their way."""
        self.metrics.count(scene, pipeline, run)
        if self._recalls is not None:
            self._recalls.note(pipeline, run, self._replica.catalogue.columns.keys)


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


def run_server(config: Config, store: SnapshotStore, ready: Callable[[int], None] | None = None) -> int:
    """Open the newest sound release and serve it until SIGTERM or SIGINT: the command line's `serve`.

    Args:
        config: the configuration.
        store: where the releases are.
        ready: called with the port when the server is up and healthy.

    Returns:
        The exit status, 0.

    Raises:
        SnapshotError, ConfigError: as `Replica.open`; ConfigError too if the address cannot be listened on.
        StateError: if the state store cannot be had.
    """
    with open_state(config) as state:
        replica = Replica.open(config, store, state=state)
        asyncio.run(serve(config, replica, ready, state=state))
    return 0


def warm_up(replica: Replica) -> None:
    """Run a few requests through every scene, so that every kernel is compiled before the first caller comes.

    Raises:
        RecallError: if a scene cannot answer.
    """
    catalogue = replica.catalogue
    guest = Request()
    requests = [guest]
    if len(catalogue.users) and len(catalogue.items):
        user = catalogue.users.ids(np.zeros(1, np.int32)).tolist()[0]
        item = catalogue.items.ids(np.zeros(1, np.int32))
        recent = RecentItems(
            ids=item,
            points=np.ones(1, np.float32),
            timestamps=np.zeros(1, np.int64),
            kinds=np.zeros(1, np.int64),
            override=False,
        )
        requests += [Request(user_id=user), Request(user_id=user, recent=recent, excluded=item)]
    for scene, pipeline in replica.pipelines.items():
        # One alone and several together go through different code.
        for batch in (*([request] for request in requests), requests):
            try:
                run = pipeline.run(batch)
                encoder = ResponseEncoder(replica, pipeline, run)
                for q in range(len(batch)):
                    encoder.response(q, "warm-up", True)
            except Exception as error:
                raise RecallError(f"scene {scene!r} cannot answer: {error!r}") from error


def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
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
