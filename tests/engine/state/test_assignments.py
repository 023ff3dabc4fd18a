"""The assignment log on real servers: one writes, everybody reads the same, and what was missed is in the table."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from engine.core.errors import StateError
from engine.state.assignments import AssignedItems, AssignmentLog, Lease, Position
from engine.state.store import StateStore
from engine.state.stream import START

_names = (f"vq{n}" for n in itertools.count())


def items_of(**clusters: int) -> AssignedItems:
    keys = np.array([int(name[1:]) for name in clusters], np.int64)
    values = np.array(list(clusters.values()), np.int32)
    return AssignedItems(keys, values, values.astype(np.float32) / 4)


def said(items: AssignedItems) -> dict[int, tuple[int, float]]:
    pairs = zip(items.clusters.tolist(), items.biases.tolist(), strict=True)
    return dict(zip(items.keys.tolist(), pairs, strict=True))


def begun(store: StateStore, length: int = 1000, run: str = "r1") -> tuple[AssignmentLog, Lease]:
    log = AssignmentLog(store, f"{next(_names)}_{time.time_ns()}", length)
    lease = log.lease(60)
    assert lease.take()
    log.begin(run, lease)
    return log, lease


def table(log: AssignmentLog) -> dict[int, tuple[int, float]]:
    return {key: value for part in log.table() for key, value in said(part).items()}


def test_a_position_is_what_it_was_written_as():
    assert Position.parse(str(Position("20260101T000000", "17-3"))) == Position("20260101T000000", "17-3")
    assert Position.parse("") == Position("", START)
    assert str(Position()) == ""


def test_items_survive_their_encoding():
    items = items_of(i1=5, i2=0)
    assert said(AssignedItems.decode(items.encode())) == {1: (5, 1.25), 2: (0, 0.0)}


def test_of_an_item_named_twice_the_last_counts():
    items = AssignedItems.join([items_of(i1=5, i2=6), items_of(i1=7)])
    assert said(items.newest()) == {1: (7, 1.75), 2: (6, 1.5)}
    assert items.newest().keys.tolist() == [1, 2]


def test_what_is_written_is_in_the_log_and_in_the_table(any_store):
    log, lease = begun(any_store)
    log.write(items_of(i1=5, i2=6), "r1", lease)
    end = log.write(items_of(i1=7, i9223372036854775807=1), "r1", lease)
    items, offset, entries, missed = log.read(START, "r1", 10, 1)
    assert (offset, entries, missed) == (end, 2, False)
    assert items.keys.tolist() == [1, 2, 1, 2**63 - 1]
    assert table(log) == {1: (7, 1.75), 2: (6, 1.5), 2**63 - 1: (1, 0.25)}
    assert said(log.lookup(np.array([2, 3, 2**63 - 1]))) == {2: (6, 1.5), 2**63 - 1: (1, 0.25)}
    assert log.write(AssignedItems.empty(), "r1", lease) == ""


def test_many_items_go_in_in_entries_of_a_thousand(any_store):
    log, lease = begun(any_store, length=10_000)
    many = AssignedItems(np.arange(2500), np.arange(2500, dtype=np.int32), np.zeros(2500, np.float32))
    log.write(many, "r1", lease)
    items, _, entries, _ = log.read(START, "r1", 10, 1)
    assert entries == 3
    assert items.keys.tolist() == list(range(2500))
    assert len(table(log)) == 2500


def test_what_is_trimmed_is_a_gap_and_the_table_has_it(any_store):
    log, lease = begun(any_store, length=3)
    for n in range(6):
        log.write(items_of(**{f"i{n}": n}), "r1", lease)
    items, _, _, missed = log.read(START, "r1", 10, 1)
    assert missed
    assert items.keys.tolist() == [3, 4, 5]
    assert sorted(table(log)) == [0, 1, 2, 3, 4, 5]


def test_another_run_begins_with_an_empty_table_and_is_passed_over_by_readers_of_the_first(any_store):
    log, lease = begun(any_store)
    log.write(items_of(i1=5), "r1", lease)
    assert not log.begin("r1", lease)
    assert log.begin("r2", lease)
    log.write(items_of(i2=6), "r2", lease)
    assert log.run() == "r2"
    assert table(log) == {2: (6, 1.5)}
    items, _, entries, _ = log.read(START, "r1", 10, 1)
    assert (entries, items.keys.tolist()) == (2, [1])
    with pytest.raises(StateError, match="another run"):
        log.write(items_of(i1=1), "r1", lease)


def test_only_one_has_the_lease_and_only_who_has_it_writes(any_store):
    log, lease = begun(any_store)
    second = log.lease(60)
    assert not second.take()
    assert 0 < second.left() <= 60
    with pytest.raises(StateError, match="another trainer writes"):
        log.write(items_of(i1=1), "r1", second)
    assert lease.renew()
    second.let_go()  # not its own: nothing happens
    assert not second.renew()
    lease.let_go()
    assert second.take()
    assert not lease.renew()
    with pytest.raises(StateError, match="another trainer writes"):
        log.write(items_of(i1=1), "r1", lease)


def test_a_lease_that_nobody_renews_is_free_again(any_store):
    log = AssignmentLog(any_store, f"{next(_names)}_{time.time_ns()}")
    assert log.lease(0.05).take()
    deadline, other = time.monotonic() + 60, log.lease(60)
    while not other.take():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_log_can_be_looked_at_from_a_moment_on(any_store):
    log, lease = begun(any_store)
    log.write(items_of(i1=5), "r1", lease)
    time.sleep(0.005)
    second = log.write(items_of(i2=6), "r1", lease)
    moment = int(second.partition("-")[0])
    assert [said(items) for _, items in log.entries("r1")] == [{1: (5, 1.25)}, {2: (6, 1.5)}]
    assert [(at, said(items)) for at, items in log.entries("r1", moment)] == [(moment, {2: (6, 1.5)})]
    assert list(log.entries("r2")) == []
