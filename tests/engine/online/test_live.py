"""Live items end to end: published here, recallable there; taken down, gone; restarts, gaps and a store that dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from online_world import submit
from recall.v1 import ingest_pb2 as pb
from recall.v1 import recall_pb2

from engine.config import Config, parse_config
from engine.core.channel import SilentProgress
from engine.core.errors import RecallError
from engine.core.types import Int32Array
from engine.data.dataset import Dataset, write_dataset
from engine.data.snapshot import CATALOGUE, SnapshotStore
from engine.offline.build import build_release
from engine.online.replica import Replica
from engine.online.request import Request
from engine.online.server import Server
from engine.online.state import FOLDER, State, open_state
from engine.state.embedded import EmbeddedStore
from engine.state.layout import user_tag
from engine.state.log import START, LiveLog, LogChange, offset_key
from engine.state.store import StateStore
from engine.state.writes import Writes

NOW = 1_700_000_000
PATIENCE = 60.0
KINDS = ("int64", "string")


def name(n: int, kind: str) -> Any:
    return n if kind == "int64" else f"key-{n}"


def config_of(path: Path, **more: Any) -> Config:
    return parse_config(
        {
            "store": {"path": str(path), "keep_releases": 2},
            "server": {"port": 0},
            "interest": {"click": 1.0},
            "channels": {"fresh": {}},
            "scenes": {
                "default": {
                    "quotas": {"fresh": 100},
                    "limit": 100,
                    "filters": ["availability"],
                    "fallback": [],
                }
            },
            **more,
        }
    )


def dataset_of(folder: Path, kind: str = "int64") -> Dataset:
    """Items 0 to 4, published an hour apart; item 4 is the newest."""
    ids = [name(n, kind) for n in range(5)]
    interactions = pa.table(
        {"user_id": ids, "item_id": ids, "event": ["click"] * 5, "timestamp": [NOW + n for n in range(5)]}
    )
    items = pa.table({"item_id": ids, "published_at": [NOW + 3600 * n for n in range(5)]})
    return write_dataset(folder, interactions, items=items, meta={"id_type": kind})


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., tuple[Config, SnapshotStore, Dataset]]:
    def build(kind: str = "int64", **more: Any) -> tuple[Config, SnapshotStore, Dataset]:
        config = config_of(tmp_path / "store", **more)
        store = SnapshotStore(config.store.path)
        dataset = dataset_of(tmp_path / "data", kind)
        build_release(config, dataset, store, SilentProgress())
        return config, store, dataset

    return build


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path / "store" / FOLDER) as store:
        yield store


def connected(config: Config, embedded: EmbeddedStore) -> State:
    return State(config, StateStore.connect(embedded.url, config.state.prefix, 1000))


class Asked:
    """One server, asked without the network."""

    def __init__(self, server: Server, replica: Replica, state: State) -> None:
        self.server, self.replica, self.state = server, replica, state

    async def response(self) -> Any:
        answer = await submit(self.server._batcher, "default", Request(now=NOW + 10**6), "r")
        return recall_pb2.RecallResponse.FromString(answer)

    async def items(self) -> list[Any]:
        response = await self.response()
        return [candidate.item_key or candidate.item_id for candidate in response.candidates]

    async def until(self, offset: str) -> None:
        """Wait until an answer knows the log up to an offset."""
        deadline = time.monotonic() + PATIENCE
        while offset_key((await self.response()).log_offset) < offset_key(offset):
            assert time.monotonic() < deadline, "the log does not arrive"
            await asyncio.sleep(0.005)

    def metric(self, name: str, **labels: str) -> float:
        return self.state.metrics.registry.get_sample_value(f"recall_{name}", labels) or 0.0


@asynccontextmanager
async def serving(config: Config, store: SnapshotStore, embedded: EmbeddedStore) -> AsyncIterator[Asked]:
    state = connected(config, embedded)
    replica = Replica.open(config, store, state=state)
    server = Server(config, replica, state)
    await server.start()
    try:
        yield Asked(server, replica, state)
    finally:
        await server.stop(5)
        state.store.close()


def put(id_: int | str, at: int, updated_at_ms: int = 1, **item: Any) -> LogChange:
    return LogChange(id_, updated_at_ms, pb.Item(published_at=at, **item))


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_published_is_recalled_everywhere_and_what_is_taken_down_nowhere(
    built: Any, embedded: EmbeddedStore, kind: str
) -> None:
    config, store, _ = built(kind)
    old = [name(n, kind) for n in (4, 3, 2, 1, 0)]
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(serving(config, store, embedded)) for _ in range(2)]
        for server in (first, second):
            assert await server.items() == old
        new, older = name(700, kind), name(650, kind)
        log = first.state.log
        end = log.publish(
            [put(new, NOW + 10**5), put(older, NOW + 9 * 10**4), put(name(1, kind), NOW + 8 * 10**4)]
        )
        for server in (first, second):
            await server.until(end.offset)
            assert await server.items() == [new, older, *(name(n, kind) for n in (1, 4, 3, 2, 0))]
        end = log.publish([LogChange(new, 2, None), LogChange(name(4, kind), 2, None)])
        for server in (first, second):
            await server.until(end.offset)
            assert await server.items() == [older, *(name(n, kind) for n in (1, 3, 2, 0))]
        # What is older than that, and what was sent before, changes nothing; a later one brings the item back.
        log.publish([put(new, NOW + 10**5), put(older, NOW + 9 * 10**4)])
        end = log.publish([put(new, NOW + 10**5, 3)])
        for server in (first, second):
            await server.until(end.offset)
            assert await server.items() == [new, older, *(name(n, kind) for n in (1, 3, 2, 0))]
            assert server.metric("log_entries_applied_total") == 6
            assert server.metric("log_lag_seconds") == 0
            assert server.metric("requests_total", scene="default") > 0


async def test_a_start_takes_in_all_that_was_published_before_it_serves(
    built: Any, embedded: EmbeddedStore
) -> None:
    config, store, _ = built()
    state = connected(config, embedded)
    end = state.log.publish([put(700 + n, NOW + 10**5 + n) for n in range(50)] + [LogChange(4, 5, None)])
    async with serving(config, store, embedded) as server:
        assert (await server.response()).log_offset == end.offset
        assert await server.items() == [*range(749, 699, -1), 3, 2, 1, 0]
    assert connected(config, embedded).log.end() == end.offset
    state.store.close()


async def test_what_was_trimmed_is_read_from_the_table(built: Any, embedded: EmbeddedStore) -> None:
    config, store, _ = built()
    state = connected(config, embedded)
    offsets = [state.log.publish([put(700 + n, NOW + 10**5 + n)]).offset for n in range(3)]
    state.log.publish([LogChange(701, 9, None)])
    state.log.trim(offsets[2])
    async with serving(config, store, embedded) as server:
        assert (await server.response()).log_offset == state.log.end()
        assert await server.items() == [702, 700, 4, 3, 2, 1, 0]
    state.store.close()


async def test_a_server_that_fell_behind_a_trim_reads_the_table(
    built: Any, embedded: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store, _ = built()
    async with serving(config, store, embedded) as server:
        log = server.state.log
        gate, inside = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        follow = LiveLog.follow

        def held(self: LiveLog, after: str, count: int, block_ms: int) -> Any:
            loop.call_soon_threadsafe(inside.set)
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(PATIENCE)
            return follow(self, after, count, block_ms)

        monkeypatch.setattr(LiveLog, "follow", held)
        await asyncio.wait_for(inside.wait(), PATIENCE)
        log.publish([put(700, NOW + 10**5)])
        end = log.publish([put(701, NOW + 10**5 + 1)]).offset
        log.trim(f"{offset_key(end)[0] + 1}-0")
        assert log.first() is None
        gate.set()
        await server.until(end)
        assert await server.items() == [701, 700, 4, 3, 2, 1, 0]
        assert server.metric("log_resyncs_total") == 1
        end = log.publish([put(702, NOW + 10**5 + 2)]).offset
        await server.until(end)
        assert (await server.items())[:2] == [702, 701]
        assert server.metric("log_resyncs_total") == 1


async def test_a_store_that_dies_comes_back_and_nothing_is_missed(
    built: Any, embedded: EmbeddedStore
) -> None:
    config, store, _ = built()
    embedded_always = embedded  # what is published before the kill is on its way to the disk at least
    async with serving(config, store, embedded_always) as server:
        end = server.state.log.publish([put(700, NOW + 10**5)]).offset
        await server.until(end)
        before = embedded.pid
        os.kill(before, signal.SIGKILL)
        assert (await server.items())[0] == 700  # items are served as they were
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                end = server.state.log.publish([put(701, NOW + 10**5 + 1)]).offset
                break
            except RecallError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        await server.until(end)
        assert (await server.items())[:2] == [701, 700]
        assert embedded.pid != before
        while server.metric("log_lag_seconds") > 0:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_a_channel_that_cannot_take_note_costs_nobody_else(
    built: Any, embedded: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store, _ = built()
    async with serving(config, store, embedded) as server:
        fresh = server.replica.channels["fresh"]
        update = type(fresh).update

        def refusing(self: Any, rows: Int32Array) -> None:
            if 5 in rows:
                raise ValueError("not this one")
            update(self, rows)

        monkeypatch.setattr(type(fresh), "update", refusing)
        log = server.state.log
        await server.until(log.publish([put(700, NOW + 10**5)]).offset)
        await server.until(log.publish([put(701, NOW + 10**5)]).offset)
        assert await server.items() == [701, 4, 3, 2, 1, 0]
        assert server.metric("update_failures_total", component="fresh") == 1
        # The columns know it all the same: availability and ids do not depend on channels.
        assert server.replica.catalogue.items.rows([700]).tolist() == [5]


async def test_an_entry_that_nobody_can_read_is_left_out(
    built: Any, embedded: EmbeddedStore, caplog: pytest.LogCaptureFixture
) -> None:
    config, store, _ = built()
    async with serving(config, store, embedded) as server:
        stream = f"{config.state.prefix}:{{log}}"
        for change in (b"\xff\xff", pb.ItemChange(item_key="of another catalogue").SerializeToString()):
            server.state.store.execute("XADD", stream, "*", "c", change)
        await server.until(server.state.log.publish([put(701, NOW + 10**5)]).offset)
        assert await server.items() == [701, 4, 3, 2, 1, 0]
        assert "left out 1 changes of items that are no recall.v1.ItemChange" in caplog.text
        assert "left out 1 changes of items whose ids are not of type int64" in caplog.text


async def test_without_a_store_there_is_no_offset(built: Any) -> None:
    config, store, _ = built(state={"url": "none"})
    with open_state(config) as state:
        assert state is None
    server = Server(config, Replica.open(config, store))
    await server.start()
    try:
        asked = Asked(server, server._replica, None)  # type: ignore[arg-type]
        assert (await asked.response()).log_offset == ""
        assert await asked.items() == [4, 3, 2, 1, 0]
    finally:
        await server.stop(5)


async def test_leftovers_that_were_recalled_are_counted(built: Any, embedded: EmbeddedStore) -> None:
    scene = {"quotas": {"cache": 10, "fresh": 10}, "limit": 20, "filters": [], "fallback": []}
    config, store, _ = built(channels={"cache": {"max_recalls": 2}, "fresh": {}}, scenes={"default": scene})
    async with serving(config, store, embedded) as server:
        writes = Writes()
        # Of the user's own clock: leftovers leave the cache after days.
        writes.leftovers(user_tag(3), [2, 4], [0.5, 0.4], NOW + 10**6 - 60)
        server.state.users.commit(writes, time.time())

        async def cached(user: int | None) -> list[int]:
            answer = await submit(
                server.server._batcher, "default", Request(user_id=user, now=NOW + 10**6), "r"
            )
            response = recall_pb2.RecallResponse.FromString(answer)
            return [
                candidate.item_id
                for candidate in response.candidates
                if any(proposal.channel == "cache" for proposal in candidate.proposals)
            ]

        assert await cached(None) == []
        asked = 0
        deadline = time.monotonic() + PATIENCE
        while await cached(3):
            asked += 1
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert asked >= 2
        assert server.metric("recalls_dropped_total") == 0


# --- builds -------------------------------------------------------------------------------------


async def test_a_build_takes_in_what_was_published(built: Any, embedded: EmbeddedStore) -> None:
    config, store, dataset = built()
    state = connected(config, embedded)
    first = store.current()
    end = state.log.publish(
        [
            put(2, NOW + 2 * 10**5, title="new"),
            put(700, NOW + 10**5, author_id=5),
            LogChange(4, 5, None),
            LogChange(900, 5, None),
        ]
    ).offset
    second, source = build_release(config, dataset, store, SilentProgress(), live_log=state.log)
    assert second != first
    assert store.manifest(CATALOGUE, second.snapshots[CATALOGUE]).log_offset == end
    assert len(source.catalogue.items) == 6
    assert source.catalogue.describe_items(np.array([2], np.int32))[0].title == "new"
    # The release before is kept and replays from the start: nothing is trimmed.
    assert state.log.first() is not None
    async with serving(config, store, embedded) as server:
        assert (await server.response()).log_offset == end
        assert len(server.replica.catalogue.columns) == 6
        assert await server.items() == [2, 700, 3, 1, 0]
        await server.until(state.log.publish([put(4, NOW + 3 * 10**5, 6)]).offset)
        assert await server.items() == [4, 2, 700, 3, 1, 0]
    # Nothing new: nothing is built. Something new: the oldest release that stays is the second, and the log begins there.
    state.log.publish([put(701, NOW + 10**5)])
    third, _ = build_release(config, dataset, store, SilentProgress(), live_log=state.log)
    again, _ = build_release(config, dataset, store, SilentProgress(), live_log=state.log)
    assert again == third != second
    assert store.release_names() == [third.name, second.name]
    oldest = state.log.first()
    assert oldest == end  # the offset itself stays, what is before it goes
    store.rollback()
    async with serving(config, store, embedded) as server:
        assert await server.items() == [4, 2, 701, 700, 3, 1, 0] or await server.items() == [
            4,
            2,
            700,
            701,
            3,
            1,
            0,
        ]
        assert server.metric("log_resyncs_total") == 0
    state.store.close()


def test_a_build_of_a_data_set_that_names_no_live_item_keeps_them(
    built: Any, embedded: EmbeddedStore
) -> None:
    config, store, dataset = built()
    state = connected(config, embedded)
    state.log.publish([put("of another type", NOW)])
    release, source = build_release(config, dataset, store, SilentProgress(), live_log=state.log)
    assert release == store.current()
    assert source.key == dataset.fingerprint()
    assert store.manifest(CATALOGUE, release.snapshots[CATALOGUE]).log_offset == START
    state.store.close()
