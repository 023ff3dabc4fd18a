"""`recall bench ingest`: events a second through the ingest service into the embedded state store.

The service runs in a process of its own, its store in another; events come over gRPC on loopback, streamed in batches
by this process. A run's events are made before its clock starts, so what is timed is sending, reading, committing and
answering.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from recall.v1 import ingest_pb2 as pb

from engine.bench.report import circumstances, spread
from engine.client import IngestClient
from engine.config import Config, StateConfig, StoreConfig
from engine.core.channel import Progress
from engine.core.errors import RecallError
from engine.offline.replay import Replay, files_of
from engine.online.ingest import IngestService
from engine.online.state import open_state
from engine.state.store import StateStore

ITEMS = 1_000_000
_START_SECONDS = 120.0


def bench_ingest(
    config: Config,
    data: Path | None,
    users: int,
    events: int,
    batch: int,
    repetitions: int,
    always: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Stream events to a service of its own, several times, and measure how many go in per second.

    Args:
        config: the kinds of action, and what is kept of a user.
        data: a data set whose interactions are sent, in their order; None: an exposure of one random item to a random
            user, over and over.
        users: how many, where there is no data set.
        events: per repetition; of a data set the following ones each time.
        batch: events of a message.
        repetitions: how often; the spread is over these. One before them warms up and is not counted.
        always: whether an acknowledgement waits for the disk.
        progress: told of the repetitions.

    Raises:
        RecallError: the service does not start, or refuses events.
        DatasetError: the data set cannot be read, or has too few events.
    """
    # The user state is bound by its limits, so users of a data set that come back cost what they cost in service.
    durability = "always" if always else "everysec"
    state = config.state.model_copy(update={"url": "", "durability": durability})
    rates: list[float] = []
    cpu: dict[str, list[float]] = {"client_us": [], "server_us": [], "store_us": []}
    source = _synthetic(users) if data is None else _replayed(config, data)
    progress.start("ingest", repetitions + 1)
    with (
        tempfile.TemporaryDirectory(prefix="recall-bench-") as folder,
        _service(config, state, folder) as service,
    ):
        connection, port = service
        with IngestClient(f"127.0.0.1:{port}") as client:
            for round_ in range(repetitions + 1):
                made = [next(source) for _ in range(events)]
                batches = [(at, made[at : at + batch]) for at in range(0, events, batch)]
                before, mine, began = _spent(connection), time.process_time(), time.perf_counter()
                taken = 0
                for answer in client.stream(batches):
                    taken += answer.accepted
                    if answer.refused:
                        raise RecallError(f"the service refused an event: {answer.refused[0].reason}")
                seconds = time.perf_counter() - began
                if round_:
                    rates.append(taken / seconds)
                    cpu["client_us"].append((time.process_time() - mine) / events * 1e6)
                    server, store = (now - then for now, then in zip(_spent(connection), before, strict=True))
                    cpu["server_us"].append(server / events * 1e6)
                    cpu["store_us"].append(store / events * 1e6)
                progress.advance()
    report = circumstances() | {
        "events": events,
        "batch": batch,
        "data": "synthetic" if data is None else data.name,
        "users": users if data is None else None,
        "durability": durability,
        "repetitions": repetitions,
    }
    report |= spread("events_per_second", rates, 0)
    for name, values in cpu.items():
        report |= spread(name, values, 1)
    return report


def _synthetic(users: int) -> Iterator[pb.Event]:
    rng = np.random.default_rng(7)
    number = 0
    while True:
        for user, item in zip(
            rng.integers(0, users, 10_000).tolist(), rng.integers(0, ITEMS, 10_000).tolist(), strict=True
        ):
            number += 1
            yield pb.Event(event_id=f"bench-{number}", user_id=user, exposure=pb.Exposure(item_ids=[item]))


def _replayed(config: Config, data: Path) -> Iterator[pb.Event]:
    (file,) = [each for each in files_of(data) if each.kind == "interactions"]
    for _, _, events in Replay(file, frozenset(config.interest)).event_batches():
        yield from events
    raise RecallError(f"{data} has too few events for so many repetitions")


@contextmanager
def _service(config: Config, state: StateConfig, folder: str) -> Iterator[tuple[Connection, int]]:
    config = config.model_copy(update={"state": state, "store": StoreConfig(path=Path(folder))})
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(config, there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(_START_SECONDS):
            raise RecallError("the ingest service did not start in time")
        try:
            port = int(here.recv())
        except EOFError as error:
            raise RecallError("the ingest service did not start; what it said stands above") from error
        yield here, port
    finally:
        here.close()
        process.join(30)
        if process.is_alive():
            process.kill()


def _serve(config: Config, connection: Connection) -> None:
    """Serve until the other end of the connection closes; anything that comes over it asks for the CPU time."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's; its end of the connection closes then
    with open_state(config) as state:
        assert state is not None
        asyncio.run(_run(config, state, connection))


async def _run(config: Config, state: Any, connection: Connection) -> None:
    service = IngestService(config, "int64", state.users, state.log)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((service.handlers(),))
    connection.send(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    try:
        await asyncio.to_thread(_answer, connection, state.store)
    finally:
        await service.close(10)
        await server.stop(0)


def _answer(connection: Connection, store: StateStore) -> None:
    try:
        while True:
            connection.recv()
            lines = store.execute("INFO", "cpu").decode().splitlines()
            used = dict(line.split(":", 1) for line in lines if ":" in line)
            connection.send((time.process_time(), float(used["used_cpu_user"]) + float(used["used_cpu_sys"])))
    except EOFError:
        return


def _spent(connection: Connection) -> tuple[float, float]:
    """Return the CPU time of the service and of its store so far, in seconds."""
    connection.send(None)
    service, store = connection.recv()
    return service, store
