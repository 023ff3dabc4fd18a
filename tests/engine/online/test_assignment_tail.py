"""Workers follow the assignment log: between batches, from the bundle's position, over gaps, runs and new items."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from recall.v1 import ingest_pb2 as pb

from engine.core.channel import Channel, takes_assignments
from engine.core.options import Options
from engine.core.types import Float32Array, Int32Array
from engine.data.catalogue import Catalogue
from engine.data.changes import ItemChanges
from engine.data.columns import TextColumn
from engine.data.ids import IdIndex
from engine.data.live import LiveCatalogue
from engine.online.assignments import AssignmentTail
from engine.online.beside import Beside
from engine.online.metrics import Metrics
from engine.online.replica import Replica
from engine.state.assignments import AssignedItems, AssignmentLog, Lease, Position
from engine.state.embedded import EmbeddedStore
from engine.state.store import StateStore
from engine.state.stream import START

PATIENCE = 60.0


class Taker(Channel):
    def __init__(self) -> None:
        super().__init__(Options())
        self.told: dict[int, tuple[int, float]] = {}
        self.calls = 0
        self.breaks = False

    def assign(self, rows: Int32Array, clusters: Int32Array, biases: Float32Array) -> None:
        self.calls += 1
        if self.breaks:
            self.breaks = False
            raise RuntimeError("the lists are on fire")
        assert np.unique(rows).size == rows.size
        pairs = zip(clusters.tolist(), biases.tolist(), strict=True)
        self.told |= dict(zip(rows.tolist(), pairs, strict=True))


def at_once(work: Callable[[], None]) -> Future[None]:
    done: Future[None] = Future()
    try:
        work()
        done.set_result(None)
    except BaseException as error:
        done.set_exception(error)
    return done


@dataclass
class World:
    log: AssignmentLog
    lease: Lease
    replica: Replica
    taker: Taker
    metrics: Metrics = field(default_factory=Metrics)

    def write(self, **clusters: int) -> str:
        keys = np.array([int(name[1:]) for name in clusters], np.int64)
        values = np.array(list(clusters.values()), np.int32)
        return self.log.write(AssignedItems(keys, values, values.astype(np.float32)), "r1", self.lease)

    def publish(self, id_: int) -> None:
        change = pb.ItemChange(item_id=id_, updated_at_ms=1, put=pb.Item())
        self.replica.catalogue.apply(ItemChanges.of([change], "int64"))

    def tail(self, position: Position) -> AssignmentTail:
        return AssignmentTail("vq", self.replica, self.log, position, at_once, self.metrics)

    def until(self, told: dict[int, int]) -> None:
        deadline = time.monotonic() + PATIENCE
        while {row: cluster for row, (cluster, _) in self.taker.told.items()} != told:
            assert time.monotonic() < deadline, (self.taker.told, told)
            time.sleep(0.005)

    def metric(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(f"recall_{name}", {"channel": "vq"}) or 0.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateStore]:
    with EmbeddedStore(tmp_path_factory.mktemp("state")) as embedded:
        connected = StateStore.connect(embedded.url, "test", 1000.0)
        yield connected
        connected.close()


@pytest.fixture
def make(store: StateStore, tmp_path: Path) -> Callable[..., World]:
    def world(length: int = 1000) -> World:
        log = AssignmentLog(store, f"{tmp_path.name}_{time.time_ns()}", length)
        lease = log.lease(60)
        assert lease.take()
        log.begin("r1", lease)
        nothing = IdIndex.of(np.empty(0, np.int64))
        names = TextColumn.of(pa.array([], pa.large_string()))
        items = IdIndex.of([100, 101, 102, 103])
        catalogue = LiveCatalogue.of(Catalogue(items, nothing, nothing, names, {}, {}, {}, {}, ()))
        taker = Taker()
        channels: dict[str, Any] = {"vq": taker}
        return World(log, lease, Replica("r-1", {}, catalogue, {}, channels), taker)

    return world


def test_only_a_channel_that_overrides_assign_takes_assignments():
    assert takes_assignments(Taker())
    assert not takes_assignments(Channel(Options()))


def test_a_channel_beside_the_compute_is_told_on_its_own_thread_and_of_the_newest_where_many_wait():
    entered, go_on = threading.Event(), threading.Event()

    class Slow(Taker):
        def assign(self, rows: Int32Array, clusters: Int32Array, biases: Float32Array) -> None:
            entered.set()
            assert go_on.wait(PATIENCE)
            super().assign(rows, clusters, biases)

    taker = Slow()
    beside = Beside("vq", taker, 1.0)
    try:
        for n in range(200):
            rows = np.array([n % 3, 3], np.int32)
            beside.assign(rows, np.full(2, n, np.int32), np.full(2, n, np.float32))
            assert entered.wait(PATIENCE)
        go_on.set()
        deadline = time.monotonic() + PATIENCE
        while taker.told != {0: (198, 198.0), 1: (199, 199.0), 2: (197, 197.0), 3: (199, 199.0)}:
            assert time.monotonic() < deadline, taker.told
            time.sleep(0.005)
        assert taker.calls < 100
    finally:
        go_on.set()
        beside.close()


def test_what_is_behind_the_position_comes_in_and_what_is_before_it_does_not(make):
    world = make()
    before = world.write(i100=1, i101=2)
    world.write(i101=3, i102=4)
    tail = world.tail(Position("r1", before))
    tail.start()
    try:
        world.until({1: 3, 2: 4})
        end = world.write(i103=5, i102=6)
        world.until({1: 3, 2: 6, 3: 5})
        deadline = time.monotonic() + PATIENCE
        while tail.offset != end:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert world.metric("assignments_applied_total") == 4
        assert world.metric("assignments_resyncs_total") == 0
        assert tail.lag() == 0
    finally:
        tail.close()


def test_an_item_that_is_not_known_yet_comes_when_it_is_published(make):
    world = make()
    tail = world.tail(Position("r1", START))
    tail.start()
    try:
        world.write(i100=1, i777=9)
        world.until({0: 1})
        world.publish(777)
        world.until({0: 1, 4: 9})
    finally:
        tail.close()


def test_what_was_published_since_the_bundle_is_looked_up(make):
    world = make()
    world.write(i777=9)
    position = world.write(i100=1)
    world.publish(777)
    tail = world.tail(Position("r1", position))
    tail.start()
    try:
        world.until({4: 9})
    finally:
        tail.close()


def test_a_gap_is_filled_from_the_table_and_said(make, caplog: pytest.LogCaptureFixture):
    world = make(length=2)
    for n in range(4):
        world.write(**{f"i{100 + n}": n})
    tail = world.tail(Position("r1", START))
    tail.start()
    try:
        world.until({0: 0, 1: 1, 2: 2, 3: 3})
        assert world.metric("assignments_resyncs_total") == 1
        world.write(i100=8)
        world.until({0: 8, 1: 1, 2: 2, 3: 3})
        assert "no longer has what follows 0-0: reading the table" in caplog.text
    finally:
        tail.close()


def test_another_run_is_passed_over_and_a_gap_then_keeps_the_bundles_clusters(
    make, caplog: pytest.LogCaptureFixture
):
    world = make(length=2)
    for n in range(4):
        world.write(**{f"i{100 + n}": n})
    tail = world.tail(Position("another", START))
    tail.start()
    try:
        deadline = time.monotonic() + PATIENCE
        while not world.metric("assignments_resyncs_total"):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        end = world.write(i100=8)
        while tail.offset != end:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert world.taker.told == {}
        assert "the clusters stay as the last bundle has them" in " ".join(caplog.text.split())
    finally:
        tail.close()


def test_a_channel_that_fails_is_counted_and_told_of_the_next_ones(make):
    world = make()
    world.taker.breaks = True
    tail = world.tail(Position("r1", START))
    tail.start()
    try:
        world.write(i100=1)
        deadline = time.monotonic() + PATIENCE
        while not world.metrics.registry.get_sample_value(
            "recall_update_failures_total", {"component": "vq"}
        ):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        world.write(i101=2)
        world.until({1: 2})
    finally:
        tail.close()
