"""How often leftovers were recalled: counted whatever happened to them since they were read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import connected, server
from user_model import UserModel, small_limits, stored

from engine.core.errors import StateUnavailableError
from engine.core.exposure import ExposureLayout
from engine.state.embedded import server_binary
from engine.state.exposure import BitsBackend
from engine.state.layout import GONE, RECORD, user_prefix
from engine.state.recall_counts import RecallCounts, Recalled, counted, counted_reference
from engine.state.store import StateStore
from engine.state.writes import UserLimits, UserStore, Writes

LAYOUT = ExposureLayout(planned=8, bits=10, hashes=3)
NOW = 1_760_000_000.0

_numbers = itertools.count()

keys = st.sampled_from([0, 1, 2, 3, 4, 5, 2**40, 2**53 + 1, 2**63 - 1, -(2**63)])
some_keys = st.lists(keys, max_size=4)
events = st.one_of(
    st.tuples(st.just("leftovers"), st.tuples(some_keys, st.just([]), st.integers(0, 9)), st.just(b"")),
    st.tuples(st.just("expose"), st.tuples(some_keys), st.just(b"")),
)


def fresh_user() -> bytes:
    return b"u%d%06d" % (os.getpid(), next(_numbers))


def commit(store: StateStore, user: bytes, batch: Sequence[Any], limits: UserLimits | None = None) -> None:
    writes = Writes()
    for name, arguments, _ in batch:
        getattr(writes, name)(user, *arguments)
    UserStore(store, limits or UserLimits(), BitsBackend(LAYOUT, 86_400, 4)).commit(writes, NOW)


def leftovers(store: StateStore, user: bytes) -> bytes:
    return store.execute("GET", user_prefix(store.prefix, user) + b":c") or b""


def recalls(store: StateStore, user: bytes) -> list[int]:
    kinds: list[int] = np.frombuffer(leftovers(store, user), RECORD)["kind"].tolist()
    return [kind if kind == GONE else kind - 1 for kind in kinds]


def note(store: StateStore, user: bytes, *recalled: int) -> Recalled:
    return Recalled(user, np.array(recalled, np.int64), leftovers(store, user))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.lists(events, max_size=3), st.lists(some_keys, max_size=3)), max_size=5))
def test_whatever_happened_since_they_were_read(any_store: StateStore, steps: Any) -> None:
    user, limits = fresh_user(), small_limits()
    model = UserModel(limits, LAYOUT)
    for batch, wanted in steps:
        # Only what was read as a leftover can have been recalled as one.
        left = [key for key, kind, *_ in model.records["c"] if kind != GONE]
        recalled = [[key for key in items if key in left] for items in wanted]
        notes = [note(any_store, user, *items) for items in recalled]
        commit(any_store, user, batch, limits)
        model.commit(batch)
        assert RecallCounts(any_store).add(notes) == 0
        for items in recalled:
            model.recall(items)
        assert stored(any_store, user, int(NOW // 86_400), LAYOUT)["c"] == model.records["c"]


@settings(max_examples=200, deadline=None)
@given(
    users=st.lists(
        st.tuples(
            st.lists(st.tuples(keys, st.sampled_from([0, 1, 2, GONE - 2, GONE - 1, GONE])), max_size=12),
            st.lists(keys, max_size=20),
        ),
        max_size=4,
    )
)
def test_the_kernel_counts_as_its_twin(users: Any) -> None:
    notes = []
    for known, recalled in users:
        records = np.ones(len(known), RECORD)
        records["key"] = [key for key, _ in known]
        records["kind"] = [kind for _, kind in known]
        notes.append(Recalled(b"", np.array(recalled, np.int64), records.tobytes()))
    expected = [counted_reference(mine.leftovers, mine.keys.tolist()) for mine in notes]
    assert counted(notes) == expected


def test_many_users_go_in_together_and_keep_their_time(any_store: StateStore) -> None:
    users = [fresh_user() for _ in range(100)]
    for user in users:
        commit(any_store, user, [("leftovers", ([1, 2, 3], [], 50), b"")])
    lives = [any_store.execute("TTL", user_prefix(any_store.prefix, user) + b":c") for user in users]
    assert RecallCounts(any_store).add([note(any_store, user, 1, 3, 9) for user in users]) == 0
    assert [recalls(any_store, user) for user in users] == [[1, 0, 1]] * 100
    for user, life in zip(users, lives, strict=True):
        assert life - 10 <= any_store.execute("TTL", user_prefix(any_store.prefix, user) + b":c") <= life


def test_what_is_gone_or_damaged_is_let_be(embedded: StateStore) -> None:
    user, damaged = fresh_user(), fresh_user()
    commit(embedded, user, [("leftovers", ([1], [], 50), b"")])
    old = note(embedded, user, 1)
    embedded.execute("DEL", user_prefix(embedded.prefix, user) + b":c")
    embedded.execute("SET", user_prefix(embedded.prefix, damaged) + b":c", b"\x01" * 25)
    assert RecallCounts(embedded).add([old, note(embedded, damaged, 1)]) == 0
    assert leftovers(embedded, user) == b""
    assert leftovers(embedded, damaged) == b"\x01" * 25
    assert RecallCounts(embedded).add([]) == 0


def test_leftovers_that_keep_changing_are_given_up(
    embedded: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, calm = fresh_user(), fresh_user()
    for user in (busy, calm):
        commit(embedded, user, [("leftovers", ([1], [], 50), b"")])
    counts = RecallCounts(embedded)
    put = counts._put

    def put_too_late(notes: Sequence[Recalled]) -> list[Recalled]:
        commit(embedded, busy, [("leftovers", ([next(_numbers) + 10], [], 50), b"")])
        return put(notes)

    monkeypatch.setattr(counts, "_put", put_too_late)
    assert counts.add([note(embedded, busy, 1), note(embedded, calm, 1)]) == 1
    assert recalls(embedded, calm) == [1]
    assert set(recalls(embedded, busy)) == {0}


def test_a_store_out_of_memory_is_an_error(tmp_path: Path) -> None:
    options = ("--port", "0", "--unixsocket", str(tmp_path / "s"))
    with server(server_binary(), tmp_path, *options):
        store = connected(f"unix://{tmp_path / 's'}")
        user = fresh_user()
        commit(store, user, [("leftovers", ([1], [], 50), b"")])
        mine = note(store, user, 1)
        store.execute("CONFIG", "SET", "maxmemory", 1)
        with pytest.raises(StateUnavailableError, match="memory"):
            RecallCounts(store).add([mine])
        store.execute("CONFIG", "SET", "maxmemory", 0)
        assert RecallCounts(store).add([mine]) == 0
        assert recalls(store, user) == [1]
