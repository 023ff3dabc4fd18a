"""An ingest service on loopback over an embedded state store of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from engine.config import Config, parse_config
from engine.core.exposure import ExposureLayout, contains
from engine.data.ids import IdKind
from engine.online.ingest import IngestService
from engine.online.metrics import Metrics
from engine.state.embedded import Durability, EmbeddedStore
from engine.state.events import EventLog
from engine.state.exposure import BitsBackend
from engine.state.layout import EVENT_IDS, RECORD, slice_suffix, user_prefix, user_tag
from engine.state.log import LiveLog
from engine.state.store import StateStore
from engine.state.writes import UserLimits, UserStore

INTEREST = {"click": 1.0, "like": 2.0, "view": 0.0}


def ingest_config(**more: Any) -> Config:
    scene = {"quotas": {"popular": 1}, "fallback": []}
    return parse_config(
        {"interest": INTEREST, "channels": {"popular": {}}, "scenes": {"default": scene}, **more}
    )


@dataclass
class Ingesting:
    """A running service and what lies behind it."""

    embedded: EmbeddedStore
    store: StateStore
    backend: BitsBackend
    log: LiveLog
    metrics: Metrics
    service: Any = None
    target: str = ""

    def value(self, user: int | str, suffix: bytes) -> bytes:
        key = user_prefix(self.store.prefix, user_tag(user)) + b":" + suffix
        return self.store.execute("GET", key) or b""

    def records(self, user: int | str, suffix: bytes) -> list[tuple[int, int, float, int]]:
        """(key, kind, value, time) of each record, oldest first."""
        found = np.frombuffer(self.value(user, suffix), RECORD)
        return [tuple(record) for record in found[found["kind"] != 0].tolist()]

    def exposed(self, user: int | str, key: int, now: float) -> bool:
        numbers = self.backend.slice_numbers(now)
        values = [self.value(user, slice_suffix(number)) for number in numbers]
        return any(contains(value, [key])[0] for value in values if value)

    def event_ids(self, user: int | str) -> int:
        found = np.frombuffer(self.value(user, EVENT_IDS), np.uint64)
        return int(np.count_nonzero(found[1:]))

    def counted(self, name: str) -> dict[str, float]:
        """A counter of one label: value by label."""
        (family,) = getattr(self.metrics, name).collect()
        return {
            next(iter(sample.labels.values())): sample.value
            for sample in family.samples
            if sample.name.endswith("_total")
        }


@contextmanager
def ingesting(
    folder: Path,
    id_kind: IdKind = "int64",
    durability: Durability = "everysec",
    config: Config | None = None,
) -> Iterator[Ingesting]:
    with EmbeddedStore(folder, durability) as embedded:
        store = StateStore.connect(embedded.url, "test", 1000.0)
        backend = BitsBackend(ExposureLayout(1000, 10, 7), 7 * 86_400, 4)
        world = Ingesting(embedded, store, backend, LiveLog(store), Metrics())
        users = UserStore(store, UserLimits(), backend)
        settings = config or ingest_config()
        started = threading.Event()
        loop = asyncio.new_event_loop()
        stop = asyncio.Event()

        async def serve() -> None:
            events = EventLog(store, settings.ingest.event_log_length) if settings.ingest.event_log else None
            world.service = IngestService(settings, id_kind, users, world.log, world.metrics, events=events)
            server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            server.add_generic_rpc_handlers((world.service.handlers(),))
            world.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            started.set()
            await stop.wait()
            await world.service.close(5)
            await server.stop(0)

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
        thread.start()
        assert started.wait(60)
        try:
            yield world
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(60)
            loop.close()
            store.close()
