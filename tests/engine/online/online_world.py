"""A world drawn by hand: 40 items, 6 users, channels that can be worked out on paper, and servers around it.

Item row r has id 100 + r (or the key "item-<100 + r>"), user row u has id 1 + u (or "user-<1 + u>"). User row
u liked the items of rows u and u + 6, the latter more recently; the last user has no history.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from engine.client import AsyncRecallClient
from engine.config import Config, SceneConfig, ServerConfig
from engine.core.candidates import Candidates, TriggerKind
from engine.core.channel import Channel
from engine.core.errors import RecallError
from engine.core.filter import Filter
from engine.core.options import Options
from engine.data.catalogue import Catalogue
from engine.data.columns import TextColumn
from engine.data.ids import IdIndex
from engine.data.live import LiveCatalogue
from engine.online.batcher import Batcher
from engine.online.hydrate import Hydrator
from engine.online.pipeline import Pipeline
from engine.online.replica import Replica
from engine.online.request import Request
from engine.online.server import Server, serve
from engine.state.history import SnapshotHistory
from filters.excluded import Excluded
from filters.seen import Seen

ITEMS = 40
USERS = 6
INTEREST = {"click": 1.0, "like": 2.0, "view": 0.0}
QUOTAS = {"similar": 4, "crowd": 3, "top": 3}
PATIENCE = 60.0
"""Seconds after which what is waited for is taken not to come, on however busy a machine."""

POISON = USERS - 1
"""Row of the user whom the filter `Poisoned` cannot bear."""


def item_id(row: int, kind: str = "int64") -> Any:
    return 100 + row if kind == "int64" else f"item-{100 + row}"


def user_id(row: int, kind: str = "int64") -> Any:
    return 1 + row if kind == "int64" else f"user-{1 + row}"


def candidates(scores: dict[int, float], triggers: dict[int, int], k: int) -> Candidates:
    best = sorted(scores, key=lambda row: (-scores[row], row))[:k]
    return Candidates(
        np.array(best, np.int32),
        np.array([scores[row] for row in best], np.float32),
        np.array([triggers.get(row, -1) for row in best], np.int32),
    )


class Similar(Channel):
    """From each item of the history to the three rows behind it: weight / distance; triggers are items."""

    trigger_kind = TriggerKind.ITEM

    def recall(self, query, k):
        scores: dict[int, float] = {}
        triggers: dict[int, int] = {}
        for row, weight in zip(query.history.tolist(), query.history_weights.tolist(), strict=True):
            for distance in (1, 2, 3):
                to = (row + distance) % ITEMS
                scores[to] = scores.get(to, 0.0) + weight / distance
                triggers.setdefault(to, row)
        return candidates(scores, triggers, k)


class Crowd(Channel):
    """For known users, the rows 20 to 29; triggers are the next user."""

    trigger_kind = TriggerKind.USER

    def recall(self, query, k):
        if query.user < 0:
            return candidates({}, {}, k)
        rows = range(20, 30)
        return candidates({r: 50.0 - r for r in rows}, dict.fromkeys(rows, (query.user + 1) % USERS), k)


class Top(Channel):
    """Rows 39, 38, ... for everybody; clusters, of no index, as triggers of the even ones."""

    trigger_kind = TriggerKind.CLUSTER

    def recall(self, query, k):
        return candidates({r: float(r) for r in range(ITEMS)}, {r: r // 2 for r in range(0, ITEMS, 2)}, k)


class Rest(Channel):
    """The whole catalogue in order of rows."""

    def recall(self, query, k):
        return candidates(dict.fromkeys(range(ITEMS), 1.0), {}, k)


class KnownOnly(Rest):
    """Shut for guests."""

    def enable(self, query):
        return query.user >= 0


class Raising(Channel):
    def recall(self, query, k):
        raise RuntimeError("the index is on fire")


class NotFinite(Channel):
    def recall(self, query, k):
        return Candidates(np.zeros(1, np.int32), np.array([np.nan], np.float32), np.full(1, -1, np.int32))


class OutOfRange(Channel):
    def recall(self, query, k):
        return Candidates(np.full(1, ITEMS, np.int32), np.ones(1, np.float32), np.full(1, -1, np.int32))


class StrangeTrigger(Channel):
    trigger_kind = TriggerKind.ITEM

    def recall(self, query, k):
        return Candidates(np.zeros(1, np.int32), np.ones(1, np.float32), np.full(1, ITEMS, np.int32))


class Gate(Channel):
    """Holds the compute thread while it is shut."""

    def __init__(self) -> None:
        super().__init__(Options())
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.batches: list[int] = []

    def recall_batch(self, batch, k):
        self.batches.append(len(batch))
        self.entered.set()
        assert self.open.wait(PATIENCE)
        return Rest(Options()).recall_batch(batch, k)


class Poisoned(Filter):
    def keep(self, batch, candidates):
        if (batch.users == POISON).any():
            raise RuntimeError("poison")
        return np.ones(candidates.rows.size, np.bool_)


@dataclass
class World:
    """A configuration and a replica that fit each other."""

    config: Config
    replica: Replica
    kind: str = "int64"
    channels: dict[str, Channel] = field(default_factory=dict)

    def item(self, row: int) -> Any:
        return item_id(row, self.kind)

    def items(self, rows) -> list[Any]:
        return [self.item(row) for row in rows]

    def user(self, row: int) -> dict[str, Any]:
        return {"user_id" if self.kind == "int64" else "user_key": user_id(row, self.kind)}


def make_world(
    kind: str = "int64",
    extra: dict[str, Channel] | None = None,
    quotas: dict[str, int] = QUOTAS,
    fallback: tuple[str, ...] = ("rest",),
    limit: int = 10,
    filters: tuple[str, ...] = ("seen", "excluded"),
    scenes: dict[str, SceneConfig] | None = None,
    more_filters: dict[str, Filter] | None = None,
    fail_open: tuple[str, ...] = (),
    **server: Any,
) -> World:
    config = Config(
        server=ServerConfig(**{"port": 0, "max_limit": 500, **server}),
        interest=INTEREST,
        channels={},
        scenes=scenes
        or {
            "default": SceneConfig(
                quotas=quotas, limit=limit, fallback=fallback, filters=filters, fail_open=fail_open
            ),
            "other": SceneConfig(quotas={"top": 5}, limit=5, fallback=(), filters=()),
        },
    )
    items = IdIndex.of([item_id(row, kind) for row in range(ITEMS)])
    users = IdIndex.of([user_id(row, kind) for row in range(USERS)])
    nothing = IdIndex.of(np.empty(0, np.int64)) if kind == "int64" else IdIndex.of(np.empty(0, np.str_))
    no_names = TextColumn.of(pa.array([], pa.large_string()))
    catalogue = LiveCatalogue.of(Catalogue(items, users, nothing, no_names, {}, {}, {}, {}, ()))
    with_history = USERS - 1
    liked = np.array([[u + 6, u] for u in range(with_history)], np.int32).ravel()
    history = SnapshotHistory(
        {
            "indptr": np.minimum(np.arange(USERS + 1), with_history).astype(np.int64) * 2,
            "rows": liked,
            "weights": np.tile(np.array([2.0, 1.0], np.float32), with_history),
            "timestamps": np.tile(np.array([1_700_000_000, 1_600_000_000], np.int64), with_history),
        }
    )
    hydrator = Hydrator(items, users, history)
    channels: dict[str, Channel] = {
        "similar": Similar(Options()),
        "crowd": Crowd(Options()),
        "top": Top(Options()),
        "rest": Rest(Options()),
        "known_only": KnownOnly(Options()),
        **(extra or {}),
    }
    all_filters: dict[str, Filter] = {
        "seen": Seen(Options()),
        "excluded": Excluded(Options()),
        "poisoned": Poisoned(Options()),
        **(more_filters or {}),
    }
    pipelines = {
        name: Pipeline(scene, channels, all_filters, hydrator, config.server.reserve_ms)
        for name, scene in config.scenes.items()
    }
    replica = Replica("r-1", {"catalogue": "c-1", "history": "h-1"}, catalogue, pipelines)
    return World(config, replica, kind, channels)


class Awaited:
    """A caller of the batcher that waits on an event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[bytes] = self._loop.create_future()

    @property
    def cancelled(self) -> bool:
        return self.answer.cancelled()

    def deliver(self, outcome: bytes | RecallError) -> None:
        self._loop.call_soon_threadsafe(self._take, outcome)

    def _take(self, outcome: bytes | RecallError) -> None:
        if self.answer.done():
            return
        if isinstance(outcome, bytes):
            self.answer.set_result(outcome)
        else:
            self.answer.set_exception(outcome)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what is true sooner or later."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.002)


async def submit(
    batcher: Batcher, scene: str, request: Request, request_id: str, debug: bool = False
) -> bytes:
    """The bytes of the response to a request; raises what the batcher says instead."""
    caller = Awaited()
    batcher.submit(scene, request, request_id, caller, debug)
    return await caller.answer


@asynccontextmanager
async def served(world: World, **client: Any) -> AsyncIterator[tuple[Server, AsyncRecallClient]]:
    """A server on this event loop, and a client of it."""
    server = Server(world.config, world.replica)
    port = await server.start()
    try:
        async with AsyncRecallClient(f"127.0.0.1:{port}", **{"timeout": PATIENCE, **client}) as connected:
            yield server, connected
    finally:
        await server.stop(5)


@asynccontextmanager
async def serving(world: World, **client: Any) -> AsyncIterator[AsyncRecallClient]:
    """A client of a server on this event loop."""
    async with served(world, **client) as (_, connected):
        yield connected


def in_flight(server: Server) -> float:
    """Requests that the server has taken in and not answered."""
    return server.metrics.registry.get_sample_value("recall_in_flight") or 0.0


@contextmanager
def serving_thread(world: World) -> Iterator[int]:
    """The port of a server on an event loop of its own, in a thread."""
    ready = threading.Event()
    known: dict[str, Any] = {}

    async def main() -> None:
        known["loop"], known["stop"] = asyncio.get_running_loop(), asyncio.Event()

        def on_ready(port: int) -> None:
            known["port"] = port
            ready.set()

        await serve(world.config, world.replica, on_ready, known["stop"])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(60)
        yield known["port"]
    finally:
        known["loop"].call_soon_threadsafe(known["stop"].set)
        thread.join()
