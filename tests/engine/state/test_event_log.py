"""The event log on real servers: what was acknowledged is in it once, in order, and what is gone is noticed."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from engine.core.errors import StateUnavailableError
from engine.core.exposure import ExposureLayout
from engine.core.keys import key_of
from engine.state.events import EVENT, SHOWN, EventLog, action_record, shown_records
from engine.state.exposure import BitsBackend
from engine.state.layout import kind_of, user_tag
from engine.state.store import StateStore
from engine.state.stream import START, offset_key
from engine.state.writes import UserLimits, UserStore, Writes

NOW = 1_700_000_000
CLICK = kind_of("click")
_logs = itertools.count()


def fresh(store: StateStore, length: int = 1000) -> EventLog:
    log = EventLog(store, length)
    store.execute("DEL", "test:{events}", "test:{events}:total", "test:{events}:trimmed")
    return log


def users_of(store: StateStore) -> UserStore:
    return UserStore(store, UserLimits(), BitsBackend(ExposureLayout(1000, 10, 7), 7 * 86_400, 4))


def test_what_is_appended_is_read_in_order_with_the_times_of_its_entries(any_store):
    log = fresh(any_store)
    first = log.append(shown_records(b"u4", [10, 11], NOW) + action_record(b"u4", 10, CLICK, NOW + 1, 2.5))
    second = log.append(shown_records(user_tag("ann"), np.arange(100, dtype=np.int64), NOW + 2))
    batch, missed = log.read(START, 10, 1)
    assert not missed
    assert batch.offsets == [first, second]
    assert batch.entries[:, 0].tolist() == [offset_key(first)[0], offset_key(second)[0]]
    assert batch.entries[:, 1].tolist() == [0, 3]
    assert batch.records[:3].tolist()[2] == (4, 10, NOW + 1, CLICK, 2.5)
    assert batch.records["kind"].tolist() == [SHOWN, SHOWN, CLICK] + [SHOWN] * 100
    assert (batch.records["user"][3:] == key_of("ann")).all()
    assert np.isnan(batch.records["value"][[0, 1, 3]]).all()
    assert batch.waiting == 0
    assert abs(batch.asked - time.time() * 1000) < 60_000


def test_reading_goes_on_from_an_offset_and_says_how_much_is_left(any_store):
    log = fresh(any_store)
    offsets = [log.append(action_record(b"u1", n, CLICK, NOW, math.nan)) for n in range(5)]
    batch, _ = log.read(offsets[0], 2, 1)
    assert batch.records["item"].tolist() == [1, 2]
    assert batch.offsets[-1] == offsets[2]
    assert batch.waiting == 2
    batch, missed = log.read(offsets[-1], 2, 1)
    assert (batch.records.size, batch.offsets, missed) == (0, [], False)


def test_the_oldest_events_go_and_who_has_not_read_them_is_told(any_store):
    log = fresh(any_store, length=10)
    offsets = [log.append(action_record(b"u1", n, CLICK, NOW, math.nan) * 4) for n in range(6)]
    batch, missed = log.read(START, 100, 1)
    assert missed
    assert batch.records["item"].tolist() == [3] * 4 + [4] * 4 + [5] * 4  # 10 and up to an entry more
    assert log.oldest() == offsets[2]
    assert not log.read(offsets[2], 100, 1)[1]
    assert log.read(offsets[1], 100, 1)[1]


def test_one_large_entry_sweeps_many_small_ones_out(any_store):
    log = fresh(any_store, length=50)
    for n in range(50):
        log.append(action_record(b"u1", n, CLICK, NOW, math.nan))
    log.append(action_record(b"u1", 99, CLICK, NOW, math.nan) * 50)
    batch, _ = log.read(START, 100, 1)
    assert batch.records["item"].tolist() == [99] * 50


def test_a_log_that_ends_before_the_reader_has_a_gap(any_store):
    log = fresh(any_store)
    last = log.append(action_record(b"u1", 1, CLICK, NOW, math.nan))
    milliseconds, number = offset_key(last)
    assert log.read(f"{milliseconds + 1000}-{number}", 10, 1)[1]


def test_a_commit_tells_what_goes_into_the_log_without_what_had_gone_in_before(any_store):
    store = users_of(any_store)
    name = next(_logs) + int(time.time())
    user, other = b"u%d" % name, b"u%d" % (name + 10**9)
    told: list[bytes] = []

    def writes() -> Writes:
        made = Writes(logged=True)
        made.expose(user, [1, 2], b"shown", NOW)
        made.follow(user, 7, NOW, False, b"followed")
        made.act(user, 2, CLICK, NOW + 5, 3.0, b"clicked")
        made.act(other, 3, CLICK, NOW + 6, math.nan)
        return made

    store.commit_many([writes()], NOW, told.append)
    records = np.frombuffer(told[0], EVENT)
    assert records["item"].tolist() == [1, 2, 2, 3]
    assert records["time"].tolist() == [NOW, NOW, NOW + 5, NOW + 6]
    again = writes()
    again.act(user, 4, CLICK, NOW + 7, math.nan, b"new")
    store.commit_many([again, writes()], NOW, told.append)
    records = np.frombuffer(told[1], EVENT)
    assert sorted(records["item"].tolist()) == [3, 3, 4]  # an event without an id is new each time


def test_a_commit_of_users_with_very_much_logs_all_of_it(any_store):
    store = users_of(any_store)
    user = b"u%d" % (next(_logs) + 2 * 10**12 + int(time.time()))
    made, told = Writes(logged=True), []
    for n in range(3000):
        made.act(user, n, CLICK, NOW + n, math.nan)
    store.commit_many([made], NOW, told.append)
    assert np.frombuffer(told[0], EVENT)["item"].tolist() == list(range(3000))


def test_nothing_is_told_where_nothing_is_logged(any_store):
    made, told = Writes(), []
    made.act(b"u%d" % (3 * 10**12 + int(time.time())), 1, CLICK, NOW, math.nan)
    users_of(any_store).commit_many([made], NOW, told.append)
    assert told == []


def test_a_store_that_is_away_refuses_an_append():
    log = EventLog(StateStore("unix:///nowhere/at/all", "test", 100.0), 1000)
    with pytest.raises(StateUnavailableError):
        log.append(action_record(b"u1", 1, CLICK, NOW, math.nan))
