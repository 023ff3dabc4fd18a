"""Another release beside the one that answers: prepared, swapped between two batches, or abandoned; in one process."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from online_world import submit
from recall.v1 import ingest_pb2 as pb
from recall.v1 import recall_pb2

from engine.config import Config, parse_config
from engine.core.channel import SilentProgress
from engine.core.errors import RecallError
from engine.data.dataset import Dataset, write_dataset
from engine.data.snapshot import SnapshotStore
from engine.offline.build import build_release
from engine.online.control import WorkerError, WorkerLostError
from engine.online.reload import TRIES, Reloader
from engine.online.replica import Replica
from engine.online.request import Request
from engine.online.server import Server
from engine.online.state import FOLDER, State
from engine.state.embedded import EmbeddedStore
from engine.state.log import LogChange, offset_key
from engine.state.store import StateStore

NOW = 1_700_000_000


def config_of(path: Path) -> Config:
    scene = {"quotas": {"fresh": 100}, "limit": 100, "filters": ["availability"], "fallback": []}
    return parse_config(
        {
            "store": {"path": str(path)},
            "server": {"port": 0},
            "interest": {"click": 1.0},
            "channels": {"fresh": {}},
            "scenes": {"default": scene},
        }
    )


def dataset_of(folder: Path, items: range, strings: bool = False) -> Dataset:
    """Items that were published an hour apart, each with a click."""
    ids = [f"key-{n}" if strings else n for n in items]
    times = [NOW + n for n in items]
    interactions = pa.table(
        {"user_id": ids, "item_id": ids, "event": ["click"] * len(ids), "timestamp": times}
    )
    columns = pa.table({"item_id": ids, "published_at": [NOW + 3600 * n for n in items]})
    return write_dataset(
        folder, interactions, items=columns, meta={"id_type": "string" if strings else "int64"}
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three releases: items 0 to 4, items 0 to 5, and items whose ids are strings; the first serves."""
    root = tmp_path_factory.mktemp("made")
    store = SnapshotStore(root / "store")
    for number, (items, strings) in enumerate(((range(5), False), (range(6), False), (range(3), True))):
        dataset = dataset_of(root / f"data-{number}", items, strings)
        build_release(config_of(store.root), dataset, store, SilentProgress())
    store.rollback(store.release_names()[-1])
    return store.root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(shutil.copytree(made, tmp_path / "store"))


@pytest.fixture
def embedded(store: SnapshotStore) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(store.root / FOLDER) as running:
        yield running


@asynccontextmanager
async def serving(store: SnapshotStore, embedded: EmbeddedStore | None = None) -> AsyncIterator[Server]:
    config = config_of(store.root)
    state = None
    if embedded is not None:
        state = State(config, StateStore.connect(embedded.url, config.state.prefix, 1000))
    server = Server(config, Replica.open(config, store, state=state), state)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(5)
        if state is not None:
            state.store.close()


async def answer(server: Server) -> Any:
    request = Request(now=NOW + 10**6)
    return recall_pb2.RecallResponse.FromString(await submit(server._batcher, "default", request, "r"))


async def items(server: Server) -> list[int]:
    return [candidate.item_id for candidate in (await answer(server)).candidates]


def put(item: int, at: int) -> LogChange:
    return LogChange(item, 1, pb.Item(published_at=at))


async def test_a_swap_changes_release_and_items_at_once_while_requests_go_on(store):
    _, newer, older = store.release_names()
    async with serving(store) as server:
        assert await items(server) == [4, 3, 2, 1, 0]
        expected = {older: [4, 3, 2, 1, 0], newer: [5, 4, 3, 2, 1, 0]}
        stop = asyncio.Event()
        seen = []

        async def ask() -> None:
            while not stop.is_set():
                response = await answer(server)
                found = [candidate.item_id for candidate in response.candidates]
                assert found == expected[response.release]
                seen.append(response.release)

        askers = [asyncio.create_task(ask()) for _ in range(4)]
        for name in (newer, older, newer):
            await server.prepare(store, name)
            await server.swap()
            asked = len(seen)
            while len(seen) < asked + 20:
                await asyncio.sleep(0)
            assert set(seen[-10:]) == {name}
        stop.set()
        await asyncio.gather(*askers)
        assert server.release == newer


async def test_what_was_prepared_and_abandoned_changes_nothing(store):
    _, newer, older = store.release_names()
    async with serving(store) as server:
        await server.prepare(store, newer)
        server.abandon()
        with pytest.raises(RecallError, match="no release is prepared"):
            await server.swap()
        assert (await answer(server)).release == older


async def test_ids_of_another_kind_need_a_restart(store):
    strings, _, older = store.release_names()
    async with serving(store) as server:
        with pytest.raises(RecallError, match="has ids of type string, not int64; that needs a restart"):
            await server.prepare(store, strings)
        assert (await answer(server)).release == older


async def test_the_release_before_is_let_go_and_what_both_have_is_opened_once(store):
    _, newer, _ = store.release_names()
    async with serving(store) as server:
        before = weakref.ref(server._replica)
        await server.prepare(store, store.current_name())
        assert server._next.snapshots == server._replica.snapshots
        same = server._next.snapshots["fresh"] is server._replica.snapshots["fresh"]
        assert same
        await server.prepare(store, newer)
        await server.swap()
        gc.collect()
        assert before() is None


async def test_what_is_published_around_a_swap_is_lost_nowhere(store, embedded):
    _, newer, older = store.release_names()
    async with serving(store, embedded) as server:
        log = server._state.log
        published = []

        def publish() -> str:
            item = 100 + len(published)
            published.insert(0, item)
            return log.publish([put(item, NOW + 10**5 + item)]).offset

        for name, base in ((newer, [5, 4, 3, 2, 1, 0]), (older, [4, 3, 2, 1, 0])):
            publish()
            await server.prepare(store, name)
            offset = publish()
            while offset_key((await answer(server)).log_offset) < offset_key(offset):
                await asyncio.sleep(0.005)
            before = (await answer(server)).log_offset
            publish()
            await server.swap()
            response = await answer(server)
            assert response.release == name
            assert offset_key(response.log_offset) >= offset_key(before), (
                "an answer forgot what was published"
            )
            offset = publish()
            while offset_key((await answer(server)).log_offset) < offset_key(offset):
                await asyncio.sleep(0.005)
            assert await items(server) == published + base


async def test_a_swap_does_without_the_state_store(store, tmp_path):
    _, newer, _ = store.release_names()
    embedded = EmbeddedStore(store.root / FOLDER)
    embedded.start()
    async with serving(store, embedded) as server:
        await server.prepare(store, newer)
        embedded.stop()
        await server.swap()
        assert (await answer(server)).release == newer


# --- all workers, or none ------------------------------------------------------------------------


class Peer:
    """A worker that does, or fails at, what it is told."""

    def __init__(self, name: str, failure: RecallError | None = None) -> None:
        self.name = name
        self.failure = failure
        self.told: list[str] = []

    async def prepare(self, release: str) -> None:
        self.told.append(f"prepare {release[-12:]}")
        if self.failure is not None:
            raise self.failure

    async def swap(self, release: str) -> None:
        self.told.append(f"swap {release[-12:]}")

    async def abandon(self) -> None:
        self.told.append("abandon")


def reloader(store: SnapshotStore, peers: list[Peer]) -> Reloader:
    release, snapshots, _ = store.newest_valid()
    return Reloader(store, release.name, snapshots, lambda: peers)


async def test_all_prepare_before_one_swaps_and_those_that_come_meanwhile_too(store):
    peers = [Peer("worker 0")]
    late = Peer("worker 1")
    reload = reloader(store, peers)
    assert await reload.look() is None

    async def prepare(release: str) -> None:
        peers[0].told.append("prepare")
        peers.append(late)

    peers[0].prepare = prepare
    newer = store.release_names()[1]
    store.rollback(newer)
    assert await reload.look() == "done"
    assert reload.release == newer
    assert peers[0].told == ["prepare", f"swap {newer[-12:]}"]
    assert late.told == [f"prepare {newer[-12:]}", f"swap {newer[-12:]}"]
    assert await reload.look() is None


async def test_if_one_fails_all_abandon_and_the_release_is_tried_again_only_when_the_pointer_moved(
    store, caplog
):
    peers = [Peer("worker 0"), Peer("worker 1", WorkerError("no room", "RecallError")), Peer("worker 2")]
    reload = reloader(store, peers)
    older, newer = store.current_name(), store.release_names()[1]
    store.rollback(newer)
    assert await reload.look() == "failed"
    assert [peer.told[-1] for peer in peers] == ["abandon"] * 3
    assert peers[2].told == ["abandon"]
    assert reload.release == older
    assert f"{newer} is refused: worker 1: no room" in caplog.text
    assert await reload.look() is None
    peers[1].failure = None
    store.rollback(older)
    assert await reload.look() is None
    store.rollback(newer)
    assert await reload.look() == "done"


async def test_a_release_over_which_workers_die_is_tried_some_times(store):
    peers = [Peer("worker 0", WorkerLostError("the worker has ended"))]
    reload = reloader(store, peers)
    store.rollback(store.release_names()[1])
    assert [await reload.look() for _ in range(TRIES + 1)] == ["failed"] * TRIES + [None]


async def test_a_damaged_release_reaches_no_worker(store, caplog):
    peers = [Peer("worker 0")]
    reload = reloader(store, peers)
    newer = store.release_names()[1]
    victim = next((store.root / "fresh" / store.release(newer).snapshots["fresh"]).glob("*.npy"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))
    store.rollback(newer)
    assert await reload.look() == "failed"
    assert peers[0].told == []
    assert f"{victim}: damaged: its SHA-256 is" in caplog.text
    assert await reload.look() is None


async def test_what_was_refused_at_the_start_is_not_tried(store):
    newest, *_, older = store.release_names()
    store.rollback(newest)
    peers = [Peer("worker 0")]
    reload = Reloader(store, older, {}, lambda: peers)
    assert await reload.look() is None
    (store.root / "current").write_text("nonsense\n")
    assert await reload.look() is None
    assert peers[0].told == []
