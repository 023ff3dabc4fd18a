"""The whole loop of streaming VQ: reported, learnt, assigned, served; published, assigned, recalled; swapped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.client import Action, AsyncIngestClient, AsyncRecallClient, Event, Item
from engine.config import Config, parse_config
from engine.core.channel import SilentProgress
from engine.data.dataset import write_dataset
from engine.data.snapshot import SnapshotStore
from engine.offline import follow
from engine.offline.build import build_release
from engine.offline.follow import Follower
from engine.online.replica import Replica
from engine.online.server import Server
from engine.online.state import FOLDER, State
from engine.state.assignments import AssignmentLog
from engine.state.embedded import EmbeddedStore
from engine.state.store import StateStore

pytest.importorskip("torch", reason="training needs PyTorch (pip install 'recall-engine[train]')")

NOW = 1_700_000_000
ITEMS, USERS = 60, 30
PATIENCE = 60.0


def config_of(folder: Path) -> Config:
    training = {"batch": 32, "negatives": 16, "label_seconds": 10, "dump_minutes": 0.02}
    channel = {
        "clusters": 6,
        "dimension": 8,
        "item_features": [
            {"name": "item_id", "kind": "id", "dimension": 8},
            {"name": "tags", "kind": "multi", "dimension": 8},
        ],
        "sequence": {"kind": "mean", "length": 8, "width": 8},
        "rank": "none",
        "training": training,
    }
    scene = {
        "quotas": {"streaming_vq": 100},
        "limit": 100,
        "filters": ["availability"],
        "fallback": [],
    }
    return parse_config(
        {
            "store": {"path": str(folder / "store")},
            "server": {"port": 0},
            "ingest": {"event_log": True},
            "interest": {"click": 1.0},
            "channels": {"streaming_vq": channel},
            "scenes": {"default": scene},
        }
    )


def build(folder: Path, config: Config) -> SnapshotStore:
    rng = np.random.default_rng(3)
    users, items = rng.integers(0, USERS, 600), rng.integers(0, ITEMS, 600)
    items[:ITEMS], users[:USERS] = np.arange(ITEMS), np.arange(USERS)
    interactions = pa.table(
        {
            "user_id": users,
            "item_id": items,
            "event": ["click"] * 600,
            "timestamp": np.arange(NOW - 10_000, NOW - 9_400),
        }
    )
    tags = [[f"tag{n % 5}"] for n in range(ITEMS)]
    described = pa.table({"item_id": list(range(ITEMS)), "tags": tags})
    data = write_dataset(folder / "data", interactions, items=described, meta={"id_type": "int64"})
    store = SnapshotStore(config.store.path)
    build_release(config, data, store, SilentProgress(), threads=1)
    return store


class Loop:
    """A running server, asked over the network."""

    def __init__(
        self, state: State, server: Server, recall: AsyncRecallClient, ingest: AsyncIngestClient
    ) -> None:
        self.state, self.server, self.recall, self.ingest = state, server, recall, ingest

    async def clusters(self) -> dict[Any, Any]:
        """The cluster of each item, as an answer names it."""
        answer = await self.recall.recall(user_id=1, limit=100)
        return {candidate.id: int(candidate.proposals[0].trigger or 0) for candidate in answer.candidates}

    async def until(self, reached: Callable[[dict[Any, Any]], Any]) -> dict[Any, Any]:
        """Ask until the clusters are as they should be."""
        deadline = time.monotonic() + PATIENCE
        while not reached(found := await self.clusters()):
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.02)
        return found


async def test_reported_learnt_assigned_served_and_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(follow, "TELL_SECONDS", 0.1)
    config = config_of(tmp_path)
    snapshots = build(tmp_path, config)
    first = snapshots.current_name()
    with EmbeddedStore(config.store.path / FOLDER) as embedded:
        state = State(config, StateStore.connect(embedded.url, config.state.prefix, 1000.0))
        replica = Replica.open(config, snapshots, state=state)
        server = Server(config, replica, state)
        target = f"127.0.0.1:{await server.start()}"
        stop, failed = threading.Event(), []

        def train() -> None:
            assert state.events is not None
            try:
                Follower(config, "streaming_vq", snapshots, state.store, state.events).run(stop)
            except BaseException as error:
                failed.append(error)
                raise

        thread = threading.Thread(target=train)
        try:
            async with AsyncRecallClient(target, timeout=60.0) as recall, AsyncIngestClient(target) as ingest:
                loop = Loop(state, server, recall, ingest)
                await loop.until(lambda found: len(found) == ITEMS)
                thread.start()
                # What is published is assigned by the trainer, and the worker has it from there.
                await ingest.upsert_items([Item(500, tags=["tag1"])])
                log = AssignmentLog(state.store, "streaming_vq")
                await loop.until(lambda found: 500 in found and 500 in assigned(log))
                # What is reported is learnt; what comes of it is what the worker serves.
                events = [
                    Event(n % USERS, Action((7 * n) % ITEMS, "click"), timestamp=NOW + n) for n in range(400)
                ]
                await ingest.report(events)
                await loop.until(lambda found: len(assigned(log)) > 30)
                # A bundle of the trainer swaps in, and the clusters stay those of the log.
                deadline = time.monotonic() + PATIENCE
                while snapshots.current_name() == first:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)
                stop.set()
                await asyncio.to_thread(thread.join, PATIENCE)
                said = assigned(log)
                await loop.until(lambda found: all(found[key] == cluster for key, cluster in said.items()))
                newest = snapshots.current_name()
                assert newest is not None
                await server.prepare(snapshots, newest)
                await server.swap()
                assert server.release == newest
                await loop.until(lambda found: all(found.get(key) == each for key, each in said.items()))
        finally:
            stop.set()
            if thread.ident is not None:
                await asyncio.to_thread(thread.join, PATIENCE)
            await server.stop(5)
            state.store.close()
    assert failed == []


def assigned(log: AssignmentLog) -> dict[int, int]:
    """The table: cluster by key."""
    return {
        key: cluster
        for part in log.table()
        for key, cluster in zip(part.keys.tolist(), part.clusters.tolist(), strict=True)
    }
