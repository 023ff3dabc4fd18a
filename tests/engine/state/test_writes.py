"""The contract of writing users, on every kind of server, and the script against a model in plain Python."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import connected, server
from user_model import UserModel, small_limits, stored

from engine.core.errors import StateError, StateUnavailableError
from engine.core.exposure import ExposureLayout, contains
from engine.core.types import Int64Array
from engine.state.embedded import server_binary
from engine.state.exposure import BitsBackend
from engine.state.layout import (
    AUTHOR,
    GONE,
    ITEM,
    RECORD,
    TOPIC,
    event_hash,
    kind_of,
    slice_suffix,
    user_prefix,
    user_tag,
)
from engine.state.nodes import exchange
from engine.state.store import StateStore
from engine.state.writes import CommitResult, UserLimits, UserStore, Writes

LAYOUT = ExposureLayout(planned=8, bits=10, hashes=3)
SLICE = 7 * 86_400
NOW = 1_760_000_000.0
CLICK, LIKE = kind_of("click"), kind_of("like")

_numbers = itertools.count()


def fresh_user() -> bytes:
    return b"u%d%06d" % (os.getpid(), next(_numbers))


def user_store(
    store: StateStore, limits: UserLimits | None = None, layout: ExposureLayout = LAYOUT
) -> UserStore:
    return UserStore(store, limits or UserLimits(), BitsBackend(layout, SLICE, 4))


def commit(
    store: StateStore,
    user: bytes,
    events: list[tuple[Any, ...]],
    limits: UserLimits | None = None,
    now: float = NOW,
) -> Any:
    writes = Writes()
    for name, arguments, event in events:
        extra = () if name == "city" else (event,)
        getattr(writes, name)(user, *arguments, *extra)
    return user_store(store, limits).commit(writes, now)


def records(store: StateStore, user: bytes, suffix: bytes) -> Any:
    value = store.execute("GET", user_prefix(store.prefix, user) + b":" + suffix) or b""
    found = np.frombuffer(value, RECORD)
    return found[found["kind"] != 0]


keys = st.sampled_from([0, 1, 2, 3, 256, 512, 2**40, 2**53 + 1, 2**63 - 1, 0x0101010101010101])
times = st.integers(0, 12)
scores = st.floats(-4, 4, width=16)
ids = st.one_of(st.just(b""), st.integers(0, 20).map(lambda n: b"event %d" % n))
events = st.one_of(
    st.tuples(st.just("expose"), st.tuples(st.lists(st.integers(0, 60), max_size=12)), ids),
    st.tuples(st.just("act"), st.tuples(keys, st.sampled_from([CLICK, LIKE]), times, scores), ids),
    st.tuples(st.just("follow"), st.tuples(keys, times, st.booleans()), ids),
    st.tuples(
        st.just("dislike"), st.tuples(st.sampled_from([ITEM, AUTHOR, TOPIC]), keys, times, st.booleans()), ids
    ),
    st.tuples(
        st.just("leftovers"),
        st.lists(st.tuples(keys | st.integers(0, 9), scores), max_size=7).flatmap(
            lambda pairs: st.tuples(
                st.just([key for key, _ in pairs]),
                st.sampled_from([[score for _, score in pairs], []]),
                times,
            )
        ),
        ids,
    ),
    st.tuples(st.just("city"), st.tuples(st.integers(1, 15), times), st.just(b"")),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commits=st.lists(st.lists(events, max_size=12), min_size=1, max_size=6))
def test_the_script_does_what_the_model_does(any_store: StateStore, commits: list[Any]) -> None:
    user, limits = fresh_user(), small_limits()
    model = UserModel(limits, LAYOUT)
    for batch in commits:
        counted = sum(name != "city" for name, *_ in batch)
        duplicates = model.commit(batch)
        assert commit(any_store, user, batch, limits) == CommitResult(counted - duplicates, duplicates)
        expected = {**model.records, "ids": b"".join(map(event_hash, model.ids)).rstrip(b"\0")}
        expected["bits"] = model.bits[:16] + model.bits[16:].rstrip(b"\0")
        assert stored(any_store, user, int(NOW // SLICE), LAYOUT) == expected


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shown=st.lists(st.lists(st.integers(0, 2**63 - 1), max_size=400), min_size=1, max_size=3),
    layout=st.builds(
        ExposureLayout, planned=st.integers(8, 1000), bits=st.integers(1, 64), hashes=st.integers(1, 16)
    ),
)
def test_bits_are_those_of_the_format_whatever_the_shape(
    embedded: StateStore, shown: list[list[int]], layout: ExposureLayout
) -> None:
    user = fresh_user()
    model = UserModel(UserLimits(), layout)
    for items in shown:
        writes = Writes()
        writes.expose(user, np.array(items, np.int64))
        user_store(embedded, layout=layout).commit(writes, NOW)
        model.commit([("expose", (items,), b"")])
    found = stored(embedded, user, int(NOW // SLICE), layout)["bits"]
    assert found == model.bits[:16] + model.bits[16:].rstrip(b"\0")


def test_many_exposures_chain_links_up_to_the_largest(embedded: StateStore) -> None:
    user = fresh_user()
    layout = ExposureLayout(planned=100, bits=10, hashes=7)
    items: Int64Array = np.random.default_rng(5).integers(0, 2**63, 60_000)
    writes = Writes()
    for part in np.split(items, 60):
        writes.expose(user, part)
    assert user_store(embedded, layout=layout).commit(writes, NOW).accepted == 60
    model = UserModel(UserLimits(), layout)
    model.commit([("expose", (items.tolist(),), b"")])
    found = stored(embedded, user, int(NOW // SLICE), layout)["bits"]
    assert found == model.bits[:16] + model.bits[16:].rstrip(b"\0")
    assert contains(found, items[:2000].tolist()).all()


def test_a_slice_keeps_the_shape_it_began_with(embedded: StateStore) -> None:
    user, model = fresh_user(), UserModel(UserLimits(), LAYOUT)
    for layout, items in ((LAYOUT, [1, 2, 3]), (ExposureLayout(100, 20, 9), [4, 5])):
        writes = Writes()
        writes.expose(user, items)
        user_store(embedded, layout=layout).commit(writes, NOW)
        model.commit([("expose", (items,), b"")])
    assert stored(embedded, user, int(NOW // SLICE), LAYOUT)["bits"] == model.bits


@pytest.mark.parametrize(
    "header", [bytes([2]) + bytes(15), bytes([1]) + bytes(15), bytes([1, 3, 10, 0, 8, 0, 0, 0]) + b"\xff" * 8]
)
def test_bits_that_make_no_sense_are_an_error(embedded: StateStore, header: bytes) -> None:
    user = fresh_user()
    embedded.execute(
        "SET", user_prefix(embedded.prefix, user) + b":" + slice_suffix(int(NOW // SLICE)), header
    )
    with pytest.raises(StateError, match="exposure bits"):
        commit(embedded, user, [("expose", ([1],), b"")])


def test_an_event_that_comes_again_counts_once(any_store: StateStore) -> None:
    user = fresh_user()
    batch = [
        ("act", (5, CLICK, 100, 2.5), b"a"),
        ("expose", ([1, 2],), b"b"),
        ("act", (5, CLICK, 90, 0.0), b"a"),
        ("city", (77, 100), b""),
    ]
    assert commit(any_store, user, batch) == CommitResult(2, 1)
    assert commit(any_store, user, batch) == CommitResult(0, 3)
    assert records(any_store, user, b"r").tolist() == [(5, CLICK, 2.5, 100)]
    assert records(any_store, user, b"p").tolist() == [(77, ITEM, 1.0, 100)]


def test_events_of_many_users_go_in_together(any_store: StateStore) -> None:
    writes, users = Writes(), [fresh_user() for _ in range(300)] + [user_tag("name with } and ü")]
    for at, user in enumerate(users):
        writes.act(user, at, CLICK, 100 + at, 0.0, b"e%d" % at)
        writes.expose(user, [at])
    assert len(writes) == 602
    assert user_store(any_store).commit(writes, NOW).accepted == 602
    for at, user in enumerate(users):
        assert records(any_store, user, b"r")["key"].tolist() == [at]
    found = any_store.mget_users([user_prefix(any_store.prefix, user) for user in users], [b"r", b"f"])
    assert [value is None for value in found] == [False, True] * len(users)


def test_an_undo_outlives_a_late_copy_of_what_it_undid(any_store: StateStore) -> None:
    user = fresh_user()
    commit(any_store, user, [("follow", (9, 100, False), b"")])
    commit(any_store, user, [("follow", (9, 200, True), b"")])
    commit(any_store, user, [("follow", (9, 100, False), b"")])
    assert records(any_store, user, b"f").tolist() == [(9, AUTHOR, 0.0, 200)]


def test_what_was_shown_leaves_the_leftovers(any_store: StateStore) -> None:
    user = fresh_user()
    commit(any_store, user, [("leftovers", ([1, 2, 3, 2], [3.0, 2.0, 1.0, 9.0], 50), b"")])
    commit(any_store, user, [("expose", ([2],), b"")])
    assert records(any_store, user, b"c").tolist() == [(1, 1, 3.0, 50), (2, GONE, 2.0, 50), (3, 1, 1.0, 50)]
    commit(any_store, user, [("leftovers", ([4, 1], [], 60), b"")])
    assert records(any_store, user, b"c").tolist() == [(4, 1, 0.0, 60), (1, 1, 0.0, 60), (3, 1, 1.0, 50)]


def test_a_user_of_very_many_events_is_written_in_parts(embedded: StateStore) -> None:
    user, writes = fresh_user(), Writes()
    for n in range(5000):
        writes.act(user, n, CLICK, n, 0.0, b"%d" % n)
    assert len(list(writes.parts())) > 1
    assert user_store(embedded).commit(writes, NOW) == CommitResult(5000, 0)
    newest = records(embedded, user, b"r")
    assert newest["key"].tolist()[-200:] == list(range(4800, 5000))
    assert newest.size <= 250


def test_users_are_forgotten(embedded: StateStore) -> None:
    user, limits = fresh_user(), UserLimits(user_seconds=6400)
    prefix = user_prefix(embedded.prefix, user)
    commit(embedded, user, [("act", (1, CLICK, 1, 0.0), b"id"), ("expose", ([3],), b"")], limits)
    lives = [embedded.execute("TTL", prefix + suffix) for suffix in (b":r", b":e")]
    assert all(6390 <= seconds <= 6400 for seconds in lives)
    bits = embedded.execute("TTL", prefix + b":" + slice_suffix(int(NOW // SLICE)))
    assert 7 * SLICE - 10 <= bits <= 7 * SLICE
    # What is rewritten keeps its time, and is renewed when a 64th of it is gone.
    embedded.execute("EXPIRE", prefix + b":r", 6200)
    acts = [("act", (n, CLICK, n, 0.0), b"%d" % n) for n in range(300)]
    commit(embedded, user, acts, limits, NOW + 100)
    assert 6190 <= embedded.execute("TTL", prefix + b":r") <= 6200
    embedded.execute("EXPIRE", prefix + b":e", 6200)
    commit(embedded, user, [("follow", (1, 1, False), b"")], limits, NOW + 101)
    for suffix in (b":r", b":e", b":f"):
        assert embedded.execute("TTL", prefix + suffix) >= 6390
    for suffix in (b":r", b":e"):
        embedded.execute("EXPIRE", prefix + suffix, 6200)
    commit(embedded, user, [("follow", (2, 1, False), b"")], limits, NOW + 201)
    assert embedded.execute("TTL", prefix + b":r") <= 6200


def test_exposures_may_be_kept_elsewhere(embedded: StateStore) -> None:
    class Elsewhere(BitsBackend):
        in_store = False

        def record(self, user: bytes, keys: Int64Array, now: float) -> None:
            noted.append((user, keys.tolist(), now))

    noted: list[tuple[bytes, list[int], float]] = []
    user, writes = fresh_user(), Writes()
    writes.leftovers(user, [1, 2], [], 1)
    writes.expose(user, [2, 3])
    UserStore(embedded, UserLimits(), Elsewhere(LAYOUT, SLICE, 4)).commit(writes, NOW)
    assert noted == [(user, [2, 3], NOW)]
    assert records(embedded, user, b"c")["kind"].tolist() == [1, GONE]
    assert not embedded.execute("EXISTS", user_prefix(embedded.prefix, user) + b":" + slice_suffix(0))


def test_the_script_comes_back_where_it_is_not_known(any_store: StateStore) -> None:
    commit(any_store, fresh_user(), [("act", (1, CLICK, 1, 0.0), b"")])
    for node in any_store._nodes():
        exchange([(node, [("SCRIPT", "FLUSH")])], 5.0)
    assert commit(any_store, fresh_user(), [("act", (1, CLICK, 1, 0.0), b"")]).accepted == 1


def test_threads_write_and_read_at_once(any_store: StateStore) -> None:
    users = [fresh_user() for _ in range(4)]
    failures: list[BaseException] = []

    def work(user: bytes) -> None:
        try:
            for n in range(60):
                commit(any_store, user, [("act", (n, CLICK, n, 0.0), b"%d" % n), ("expose", ([n],), b"")])
                value = any_store.mget_users([user_prefix(any_store.prefix, user)], [b"r"])[0]
                assert value is not None
                assert n in np.frombuffer(value, RECORD)["key"]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for user in users:
        assert np.sort(records(any_store, user, b"r")["key"]).tolist() == list(range(60))


def test_nothing_to_write_asks_nobody(embedded: StateStore) -> None:
    assert user_store(embedded).commit(Writes(), time.time()) == CommitResult(0, 0)


def test_a_store_out_of_memory_takes_nothing_even_of_a_user_whom_it_does_not_know(tmp_path: Path) -> None:
    options = ("--port", "0", "--unixsocket", str(tmp_path / "s"))
    with server(server_binary(), tmp_path, *options):
        store = connected(f"unix://{tmp_path / 's'}")
        known, other = fresh_user(), fresh_user()
        click = [("act", (1, CLICK, int(NOW), 1.0), b"")]
        commit(store, known, click)
        store.execute("CONFIG", "SET", "maxmemory", 1)
        for user in (known, other):
            with pytest.raises(StateUnavailableError, match="memory"):
                commit(store, user, click)
        store.execute("CONFIG", "SET", "maxmemory", 0)
        assert store.execute("KEYS", f"*{other.decode()}*") == []
        commit(store, other, click)
