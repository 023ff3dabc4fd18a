"""The trainer that follows: learns from the event log, assigns what is published, survives a kill, and is alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recall.v1 import ingest_pb2 as pb

from engine.core.errors import ConfigError, SnapshotError, StateError
from engine.data.snapshot import SnapshotStore
from engine.offline import follow
from engine.offline.follow import Follower, LeaseLostError, Told
from engine.state.assignments import AssignmentLog, Position
from engine.state.embedded import EmbeddedStore
from engine.state.events import EventLog
from engine.state.log import LiveLog, LogChange
from engine.state.store import StateStore

torch = pytest.importorskip("torch", reason="training needs PyTorch (pip install 'recall-engine[train]')")
import follow_world  # noqa: E402  # needs torch
from follow_world import LATE, build_world, config_of, entry, served  # noqa: E402

PATIENCE = 60.0
LEASE = "test:{vq:vq}:lease"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "TELL_SECONDS", 0.05)


@dataclass
class World:
    folder: Path
    snapshots: SnapshotStore
    store: StateStore
    url: str
    told: list[Told] = field(default_factory=list)
    thread: threading.Thread | None = None

    @property
    def events(self) -> EventLog:
        return EventLog(self.store, 10**6)

    @property
    def log(self) -> AssignmentLog:
        return AssignmentLog(self.store, "vq")

    def table(self) -> dict[int, tuple[int, float]]:
        return {
            key: (cluster, bias)
            for part in self.log.table()
            for key, cluster, bias in zip(
                part.keys.tolist(), part.clusters.tolist(), part.biases.tolist(), strict=True
            )
        }

    def follower(self, events: EventLog | None = None, **training: Any) -> Follower:
        config = config_of(self.folder, **training)
        return Follower(
            config, "vq", self.snapshots, self.store, events or self.events, tell=self.told.append
        )

    @contextmanager
    def following(self, **training: Any) -> Iterator[threading.Event]:
        """A follower on a thread of its own; stopped in the end."""
        stop, failed = threading.Event(), []

        def work() -> None:
            try:
                self.follower(**training).run(stop)
            except BaseException as error:
                failed.append(error)

        thread = self.thread = threading.Thread(target=work)
        thread.start()
        try:
            yield stop
        finally:
            stop.set()
            thread.join(PATIENCE)
            if failed:
                raise failed[0]

    def until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline, self.told[-1:]
            assert self.thread is None or self.thread.is_alive(), "the trainer has ended"
            time.sleep(0.01)

    def until_taken(self, events: int) -> None:
        self.until(lambda: bool(self.told) and self.told[-1].events >= events)


@contextmanager
def world_of(folder: Path, kind: str = "int64") -> Iterator[World]:
    snapshots = build_world(folder, config_of(folder), kind)
    with EmbeddedStore(folder / "state") as embedded:
        store = StateStore.connect(embedded.url, "test", 1000.0)
        yield World(folder, snapshots, store, embedded.url)
        store.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with world_of(tmp_path) as made:
        yield made


def records_of(entries: range) -> int:
    return sum(len(entry(seed)) // 32 for seed in entries)


def append(world: World, entries: range) -> int:
    for seed in entries:
        world.events.append(entry(seed))
    return records_of(entries)


def published(id_: int | str, tag: str = "tag1") -> LogChange:
    return LogChange(id_, 1, pb.Item(tags=[tag]))


def test_events_are_learnt_and_assignments_written(world):
    count = append(world, range(30))
    with world.following():
        world.until_taken(count)
    assert world.told[-1].steps > 5
    assert world.told[-1].waiting == 0
    assert any(np.isfinite(told.loss) for told in world.told)
    found = world.table()
    assert set(found) <= set(range(60))
    assert len(found) > 30
    assert all(0 <= cluster < 8 for cluster, _ in found.values())


def test_what_is_published_is_assigned_at_once_and_its_events_are_learnt(world, caplog):
    LiveLog(world.store).publish([published(500), published(501, "tag2")])
    with world.following(spare_rows=2):
        world.until(lambda: {500, 501} <= set(world.table()))
        world.until(lambda: bool(world.told))
        assert "spare rows" not in caplog.text
        LiveLog(world.store).publish([published(502)])
        world.until(lambda: 502 in world.table())
        world.events.append(follow_world.shown_records(b"u1", [502, 503], follow_world.NOW))
        world.until_taken(2)
    assert world.told[-1].unknown == 1  # 503
    assert (world.told[0].crowded_out, world.told[-1].crowded_out) == (0, 1)
    assert caplog.text.count("more items were published than the 2 spare rows of vq") == 1


def test_publications_and_events_that_come_right_behind_each_other_all_get_in(world):
    with world.following():
        world.until(lambda: bool(world.told))
        for n in range(100):
            LiveLog(world.store).publish([published(500 + n)])
            world.events.append(follow_world.shown_records(b"u1", [500 + n], follow_world.NOW + n))
        world.until_taken(100)
    assert world.told[-1].unknown == 0
    assert set(range(500, 600)) <= set(world.table())


def test_the_same_stream_gives_the_same_assignments_whether_it_is_read_at_once_or_in_pieces(tmp_path):
    tables = []
    for name, pauses in (("whole", [40]), ("broken", [13, 14, 40])):
        with world_of(tmp_path / name) as world:
            begun = 0
            for until in pauses:
                world.told.clear()
                count = append(world, range(begun, until))
                with world.following():
                    world.until_taken(count)
                begun = until
            tables.append(world.table())
    assert tables[0] == tables[1]


def test_killed_and_started_again_it_gives_the_same_assignments(tmp_path):
    """SIGKILL between checkpoints; what was written since the last one is written once more."""
    with world_of(tmp_path / "whole") as world:
        LiveLog(world.store).publish([published(id_) for id_ in LATE])
        count = append(world, range(60))
        with world.following():
            world.until_taken(count)
        wanted, steps = world.table(), world.told[-1].steps
    with world_of(tmp_path / "killed") as world:
        LiveLog(world.store).publish([published(id_) for id_ in LATE])
        append(world, range(30))
        before = world.log.end()
        process = subprocess.Popen(
            [sys.executable, follow_world.__file__, str(world.folder), world.url, "0.3"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if world.log.end() != before and int(line.split()[0]) > 5:
                    break
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        world.store.execute("DEL", LEASE)  # as if it had lapsed
        append(world, range(30, 60))
        with world.following():
            world.until(lambda: bool(world.told) and world.told[-1].steps >= steps)
        assert world.table() == wanted


def test_a_second_trainer_is_refused_in_one_sentence(world, monkeypatch):
    monkeypatch.setattr(follow, "LEASE_SECONDS", 0.2)  # how long it waits for the lease of one that died
    lease = world.log.lease(60)
    assert lease.take()
    stop = threading.Event()

    def alive() -> None:
        while not stop.wait(0.05):
            lease.renew()

    thread = threading.Thread(target=alive)
    thread.start()
    try:
        with pytest.raises(
            StateError, match=r"^a trainer of vq runs already: it holds the lease test:\{vq:vq\}:lease$"
        ):
            world.follower().run(threading.Event())
    finally:
        stop.set()
        thread.join()


def test_a_trainer_that_loses_its_lease_stops(world):
    def stolen() -> None:
        with world.following():
            world.until(lambda: bool(world.told))
            world.store.execute("SET", LEASE, "somebody")
            assert world.thread is not None
            world.thread.join(PATIENCE)

    with pytest.raises(LeaseLostError, match="is lost"):
        stolen()


def test_a_bundle_is_published_that_goes_on_from_its_place_in_the_logs(world):
    first = served(world.snapshots)
    count = append(world, range(20))
    with world.following(dump_minutes=0.01):
        world.until_taken(count)
        world.until(lambda: served(world.snapshots).version != first.version)
        held = Position.parse(bytes(served(world.snapshots).arrays["log_position"]).decode())
        world.until(
            lambda: (
                Position.parse(bytes(served(world.snapshots).arrays["log_position"]).decode()).offset
                == world.log.end()
            )
        )
    assert held.run == first.version
    bundle = served(world.snapshots)
    assert set(first.arrays) < set(bundle.arrays)
    found = world.table()
    for key, cluster in enumerate(bundle.arrays["assignment"].tolist()):
        if key in found:
            assert found[key][0] == cluster
    # Of the trainer's own making two releases stay.
    releases = [release.snapshots.get("vq", first.version) for release in world.snapshots.releases()]
    assert 1 <= len([version for version in releases if version != first.version]) <= 2
    assert bytes(bundle.arrays["event_position"]).decode() == world.events.end()


def test_without_a_checkpoint_it_goes_on_from_the_bundle(world, tmp_path):
    LiveLog(world.store).publish([published(id_) for id_ in LATE])
    count = append(world, range(20))
    with world.following(dump_minutes=0.01):
        world.until_taken(count)
        world.until(
            lambda: (
                bytes(served(world.snapshots).arrays.get("event_position", b"")).decode()
                == world.events.end()
            )
        )
    checkpoint = world.snapshots.root / ".work" / "follow-vq" / "checkpoint.pt"
    checkpoint.unlink()
    bundle = served(world.snapshots)
    assert bundle.arrays["published.keys"].tolist() == list(LATE)
    assert np.ptp(bundle.arrays["published.bias.weight"]) > 0.01
    with world.following(dump_minutes=0.01):  # what was published is read again, and nothing is forgotten
        world.until(lambda: served(world.snapshots).version != bundle.version)
    again = served(world.snapshots)
    for name, array in bundle.arrays.items():
        if name.startswith("published."):
            np.testing.assert_array_equal(again.arrays[name], array)
    checkpoint.unlink()
    world.told.clear()
    run, more = world.log.run(), append(world, range(20, 25))
    with world.following():
        world.until_taken(more)
    assert world.told[-1].events == more  # and not the others again
    assert world.log.run() == run


def test_another_training_in_service_begins_a_new_run(world):
    count = append(world, range(10))
    with world.following():
        world.until_taken(count)
    run = world.log.run()
    snapshots = build_world(world.folder, config_of(world.folder))
    assert served(snapshots).version != run
    world.told.clear()
    with world.following():
        world.until_taken(count)  # from the beginning of the log
    assert world.log.run() == served(snapshots).version


def test_events_that_were_trimmed_are_a_gap_that_is_said(world, caplog):
    count = append(world, range(5))
    with world.following():
        world.until_taken(count)
    short = EventLog(world.store, 100)
    for seed in range(5, 30):
        short.append(entry(seed))
    world.told.clear()
    with world.following():
        world.until(lambda: bool(world.told) and world.told[-1].events >= 100)
    assert "the event log no longer has all that follows" in caplog.text


def test_a_reward_that_cannot_be_is_refused_by_name_and_the_others_are_learnt(world, caplog):
    bad = follow_world.action_record(b"u1", 3, follow_world.kind_of("finish"), follow_world.NOW, -5.0)
    world.events.append(bad)
    count = append(world, range(10))
    with world.following():
        world.until_taken(count + 1)
    assert "the reward of task 'positive' must come of a value of 0 or more" in caplog.text
    assert world.told[-1].steps > 1


def test_string_ids_are_followed_by_their_keys(tmp_path):
    from engine.core.keys import key_of

    with world_of(tmp_path, "string") as world:
        LiveLog(world.store).publish([published("new")])
        for n in range(40):
            records = follow_world.shown_records(
                f"kkey-{n}".encode(), [key_of("key-1")], follow_world.NOW + n
            )
            world.events.append(records)
        world.events.append(follow_world.shown_records(b"kkey-1", [key_of("new")], follow_world.NOW + 500))
        with world.following():
            world.until_taken(41)
        assert world.told[-1].unknown == 0
        assert {key_of("new"), key_of("key-1")} <= set(world.table())


def test_what_does_not_learn_from_a_stream_and_what_is_not_there_are_refused(world, tmp_path):
    config = config_of(world.folder)
    with pytest.raises(ConfigError, match="'popular' does not learn from a stream"):
        Follower(config, "popular", world.snapshots, world.store, world.events)
    with pytest.raises(SnapshotError, match="no release is in service"):
        Follower(config, "vq", SnapshotStore(tmp_path / "empty"), world.store, world.events)
