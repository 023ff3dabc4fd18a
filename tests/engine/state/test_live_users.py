"""Reading users: what was written comes back as columns, merged with the release's history by the rules."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.candidates import FanOut
from engine.core.exposure import ExposureLayout
from engine.core.keys import key_of
from engine.data.catalogue import AUTHOR as AUTHOR_COLUMN
from engine.data.catalogue import Catalogue
from engine.data.columns import CodedColumn, TagColumn, TextColumn
from engine.data.ids import IdIndex, IdKind
from engine.data.live import LiveCatalogue
from engine.state.embedded import EmbeddedStore
from engine.state.exposure import BitsBackend
from engine.state.history import SnapshotHistory
from engine.state.layout import AUTHOR, CITIES, ITEM, RECENT, RECORD, TOPIC, kind_of, user_prefix, user_tag
from engine.state.recall_counts import RecallCounts, Recalled
from engine.state.records import merge_histories, newest_first
from engine.state.replies import Values
from engine.state.store import StateStore
from engine.state.users import LiveUsers
from engine.state.writes import UserLimits, UserStore, Writes

NOW = 1_760_000_000.0
LIMITS = UserLimits(recent=20, follows=3, dislikes=20, leftovers=10)
POINTS = {"click": 1.0, "like": 2.0, "expose": 0.0}
CLICK, LIKE = kind_of("click"), kind_of("like")
BACKEND = BitsBackend(ExposureLayout(1000, 10, 7), 7 * 86_400, 4)

_numbers = itertools.count()


def text(values: list[str]) -> Any:
    return pa.array(values, pa.large_string())


def catalogue_of(kind: IdKind) -> Catalogue:
    """Items 0, 10 ... 990, authors 1 to 5, cities and tags."""

    def ids(numbers: Any) -> list[Any]:
        return [name(kind, n) for n in numbers]

    return Catalogue(
        items=IdIndex.of(ids(range(0, 1000, 10))),
        users=IdIndex.of(ids(range(3))),
        authors=IdIndex.of(ids(range(1, 6))),
        author_names=TextColumn.of(text([""] * 5)),
        numeric={AUTHOR_COLUMN: np.zeros(100, np.int32)},
        coded={"city": CodedColumn.of(text(["paris", "rome"] * 50))},
        texts={},
        tags={"tags": TagColumn.of(pa.array([["cats", "dogs"]] * 100, pa.large_list(pa.large_string())))},
        skipped=(),
    )


def name(kind: IdKind, n: int) -> Any:
    return n if kind == "int64" else f"key-{n:04}"


HISTORY = SnapshotHistory(
    {
        "indptr": np.array([0, 3, 3, 5], np.int64),
        "rows": np.array([7, 8, 9, 50, 51], np.int32),
        "weights": np.array([5, 1, 1, 1, 1], np.float32),
        "timestamps": np.array([300, 200, 100, 20, 10], np.int64),
    }
)


class World:
    """A catalogue, a store, and users that nobody wrote to before."""

    def __init__(self, store: StateStore, kind: IdKind) -> None:
        self.store, self.kind = store, kind
        self.catalogue = LiveCatalogue.of(catalogue_of(kind))
        self.users = UserStore(store, LIMITS, BACKEND)
        self.reader = LiveUsers(store, LIMITS, self.catalogue, HISTORY, POINTS, 6, BACKEND)
        self.first = next(_numbers) * 1000 + os.getpid() * 10**7

    def user(self, n: int) -> Any:
        return name(self.kind, self.first + n)

    def tag(self, n: int) -> bytes:
        return user_tag(self.user(n))

    def key(self, n: int) -> int:
        return key_of(name(self.kind, n))

    def commit(self, writes: Writes) -> None:
        self.users.commit(writes, NOW)

    def read(self, *users: int | None, rows: list[int] | None = None, cities: list[str] | None = None) -> Any:
        guest = -1 if self.kind == "int64" else ""
        ids = np.array([guest if n is None else self.user(n) for n in users])
        found = rows if rows is not None else [-1] * len(users)
        codes = self.catalogue.columns.city_codes
        current = np.array([codes.get(city, -1) for city in cities or [""] * len(users)], np.int32)
        return self.reader.ask(ids)(np.array(found, np.int32), np.full(len(users), int(NOW)), current)


@pytest.fixture(params=["int64", "string"])
def world(request: pytest.FixtureRequest, embedded: StateStore) -> World:
    return World(embedded, request.param)


def lists(ragged: Any) -> list[list[int]]:
    return [ragged.rows[a:b].tolist() for a, b in itertools.pairwise(ragged.offsets.tolist())]


def histories(history: Any) -> list[list[tuple[int, float, int]]]:
    entries = list(
        zip(history.rows.tolist(), history.weights.tolist(), history.timestamps.tolist(), strict=True)
    )
    return [entries[a:b] for a, b in itertools.pairwise(history.offsets.tolist())]


def test_actions_become_the_front_of_the_history(world: World) -> None:
    writes = Writes()
    for key, kind, moment in [(10, CLICK, 400), (10, LIKE, 250), (70, CLICK, 350), (80, CLICK, 150)]:
        writes.act(world.tag(0), world.key(key), kind, moment, 0.0)
    writes.act(world.tag(0), world.key(10), CLICK, 390, 0.0)  # the same kind again, and older
    writes.act(world.tag(0), world.key(5), CLICK, 500, 0.0)  # an item that the catalogue does not know
    writes.act(world.tag(0), world.key(20), kind_of("expose"), 500, 0.0)  # of no points
    writes.act(world.tag(0), world.key(30), kind_of("dance"), 500, 0.0)  # of no kind that counts
    world.commit(writes)
    known = world.read(0, rows=[0])
    assert histories(known.history) == [[(1, 3.0, 400), (7, 5.0, 350), (8, 1.0, 200), (9, 1.0, 100)]]
    assert known.live.available
    three = world.read(1, 0, None, rows=[2, 0, -1])
    assert histories(three.history) == [
        [(50, 1.0, 20), (51, 1.0, 10)],
        [(1, 3.0, 400), (7, 5.0, 350), (8, 1.0, 200), (9, 1.0, 100)],
        [],
    ]


def test_an_empty_live_state_passes_the_release_through(world: World) -> None:
    known = world.read(0, rows=[0])
    released = [[(7, 5.0, 300), (8, 1.0, 200), (9, 1.0, 100)]]
    assert histories(known.history) == released
    # So does a user of whom other things are known.
    writes = Writes()
    writes.follow(world.tag(0), world.key(1), 1, False)
    world.commit(writes)
    assert histories(world.read(0, rows=[0]).history) == released


def test_a_history_is_cut_at_its_length(world: World) -> None:
    writes = Writes()
    for n in range(30):
        writes.act(world.tag(0), world.key(10 * n), CLICK, 1000 + n, 0.0)
    world.commit(writes)
    (history,) = histories(world.read(0, rows=[0]).history)
    assert history == [(n, 1.0, 1000 + n) for n in range(29, 23, -1)]


def test_follows_dislikes_and_leftovers_come_back(world: World) -> None:
    writes, tag = Writes(), world.tag(0)
    for author, moment, undo in [
        (1, 10, False),
        (2, 30, False),
        (3, 20, False),
        (4, 25, False),
        (9, 5, False),
    ]:
        writes.follow(tag, world.key(author), moment, undo)
    writes.dislike(tag, ITEM, world.key(40), 1, False)
    writes.dislike(tag, ITEM, world.key(50), 1, False)
    writes.dislike(tag, ITEM, world.key(50), 2, True)
    writes.dislike(tag, AUTHOR, world.key(5), 1, False)
    writes.dislike(tag, TOPIC, key_of("dogs"), 1, False)
    writes.dislike(tag, TOPIC, key_of("birds"), 1, False)
    writes.leftovers(tag, [world.key(n) for n in (10, 5, 20, 30)], [4.0, 3.0, 2.0, 1.0], 77)
    writes.expose(tag, [world.key(30)])
    world.commit(writes)
    read = world.read(None, 0, rows=[-1, -1])
    assert read.leftovers(0) == b""
    RecallCounts(world.store).add([Recalled(tag, np.array([world.key(20)]), read.leftovers(1))])
    live = world.read(None, 0, rows=[-1, -1]).live
    # Three are kept, and of these the newest comes first.
    assert lists(live.follows) == [[], [1, 3, 2]]
    assert lists(live.disliked_items) == [[], [4]]
    assert lists(live.disliked_authors) == [[], [4]]
    assert lists(live.disliked_tags) == [[], [world.catalogue.columns.tag_vocabulary["dogs"]]]
    left = live.leftovers
    assert (left.rows.tolist(), left.scores.tolist(), left.offsets.tolist()) == (
        [1, 2],
        [4.0, 2.0],
        [0, 0, 2],
    )
    assert (left.timestamps.tolist(), left.recalls.tolist()) == ([77, 77], [0, 1])


def test_only_what_is_asked_for_is_sorted_out_and_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes()
    writes.follow(world.tag(0), world.key(1), 10, False)
    world.commit(writes)
    calls: list[int] = []
    sorted_out = LiveUsers._sorted_out
    monkeypatch.setattr(LiveUsers, "_sorted_out", lambda *args: calls.append(1) or sorted_out(*args))
    live = world.read(0).live
    assert live.available
    assert live.exposure is not None
    assert not calls
    assert lists(live.follows) == [[0]]
    assert lists(live.cities) == [[]]
    changed = dataclasses.replace(live, exposure=None)
    assert changed.exposure is None
    assert lists(changed.follows) == lists(live.alone(0).follows) == [[0]]
    assert len(calls) == 1
    with pytest.raises(AttributeError):
        live.nothing  # noqa: B018


def test_an_undone_follow_is_gone(world: World) -> None:
    writes = Writes()
    writes.follow(world.tag(0), world.key(1), 10, False)
    writes.follow(world.tag(0), world.key(1), 20, True)
    world.commit(writes)
    assert lists(world.read(0).live.follows) == [[]]


def test_cities_are_the_one_now_then_those_before(world: World) -> None:
    codes = world.catalogue.columns.city_codes
    writes = Writes()
    for city, moment in [("paris", 10), ("atlantis", 30), ("rome", 20)]:
        writes.city(world.tag(0), key_of(city), moment)
    writes.act(world.tag(0), world.key(10), CLICK, 10, 0.0)
    world.commit(writes)
    paris, rome = codes["paris"], codes["rome"]
    known = world.read(0, 0, 1, None, cities=["", "paris", "rome", "atlantis"])
    assert lists(known.live.cities) == [[rome, paris], [paris, rome], [rome], []]
    codes["atlantis"] = 2  # an item was published there
    assert lists(world.read(0, cities=["atlantis"]).live.cities) == [[2, rome, paris]]
    # Of a batch of whom nothing is known, too.
    assert lists(world.read(1, None, cities=["rome", "nowhere"]).live.cities) == [[rome], []]


def test_what_was_shown_is_seen_and_guests_saw_nothing(embedded: StateStore, monkeypatch: Any) -> None:
    monkeypatch.setattr("engine.state.users.time.time", lambda: NOW)
    world = World(embedded, "int64")
    writes = Writes()
    writes.expose(world.tag(0), [world.key(10), world.key(20)])
    world.commit(writes)
    exposure = world.read(None, 0).live.exposure
    candidates = FanOut(np.array([1, 2, 3, 1, 2, 3], np.int32), np.array([0, 3, 6], np.int64), 2)
    assert exposure.seen(candidates, world.catalogue.columns.keys).tolist() == [False] * 3 + [
        True,
        True,
        False,
    ]


def test_guests_are_not_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        world.store, "ask_users", lambda users, suffixes: lambda: Values.of(asked.extend(users) or [])
    )
    assert world.read(None, None).live.available
    assert asked == []


def test_a_damaged_value_is_left_out(world: World, caplog: pytest.LogCaptureFixture) -> None:
    writes = Writes()
    for n in (0, 1):
        writes.act(world.tag(n), world.key(10), CLICK, 400, 0.0)
        writes.city(world.tag(n), key_of("rome"), 1)
    world.commit(writes)
    world.store.execute("APPEND", user_prefix(world.store.prefix, world.tag(0)) + b":" + RECENT, b"x")
    known = world.read(0, 1)
    assert histories(known.history) == [[], [(1, 1.0, 400)]]
    assert lists(known.live.cities) == [[1], [1]]
    assert "damaged" in caplog.text


def test_a_store_that_is_away_leaves_the_release(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedStore(tmp_path) as running:
        world = World(StateStore.connect(running.url, "test", 1000), "int64")
        writes = Writes()
        writes.follow(world.tag(0), world.key(1), 10, False)
        world.commit(writes)
    with caplog.at_level(logging.INFO):
        for _ in range(20):
            known = world.read(0, rows=[0])
            assert not known.live.available
            assert lists(known.live.follows) == [[]]
            assert histories(known.history) == [[(7, 5.0, 300), (8, 1.0, 200), (9, 1.0, 100)]]
        assert caplog.text.count("go on with the release") == 1
        with EmbeddedStore(tmp_path):
            world.store._node.rests_until = 0.0
            assert lists(world.read(0).live.follows) == [[0]]
        assert "answers again" in caplog.text


def test_a_value_of_another_type_does_not_fail_the_request(world: World) -> None:
    world.store.execute("SADD", user_prefix(world.store.prefix, world.tag(0)) + b":" + CITIES, "x")
    # MGET takes it for a key that is not there.
    assert world.read(0).live.available


record = st.tuples(st.integers(-1, 12), st.sampled_from([1, 2, 3]), st.integers(0, 30))
old_entry = st.tuples(st.integers(0, 14), st.integers(1, 5), st.integers(0, 30))


@settings(max_examples=300, deadline=None)
@given(
    users=st.lists(
        st.tuples(
            st.lists(record, max_size=60, unique_by=lambda r: (r[0], r[1]) if r[0] >= 0 else object()),
            st.lists(old_entry, max_size=12, unique_by=lambda entry: entry[0]),
        ),
        max_size=4,
    ),
    recent=st.integers(1, 40),
    keep=st.integers(1, 30),
)
def test_merging_equals_the_plain_rule(users: list[Any], recent: int, keep: int) -> None:
    users = [(live, sorted(old, key=lambda entry: -entry[2])) for live, old in users]
    points = {1: 1.0, 2: 0.5}
    expected = [plain_merge(live, old, points, recent, keep) for live, old in users]
    content = np.zeros(sum(len(live) for live, _ in users), RECORD)
    items = np.zeros(content.size, np.int32)
    # Whose history it is has another number than who asks; one who has none is not known.
    offsets, indptr = np.zeros(len(users) + 1, np.int64), np.zeros(len(users) + 1, np.int64)
    owners = np.arange(len(users), dtype=np.int32)[::-1].copy()
    at = 0
    for u, (live, old) in enumerate(users):
        owners[u] = owners[u] if old else -1
        for n, (row, kind, moment) in enumerate(live):
            content["kind"][at + n], content["time"][at + n], items[at + n] = kind, moment, row
        at += len(live)
        offsets[u + 1] = at
    for owner, (_, old) in enumerate(reversed(users)):
        indptr[owner + 1] = indptr[owner] + len(old)
    indptr.flags.writeable = False
    entries = [entry for _, old in reversed(users) for entry in old]
    room = len(users) * keep
    out = np.zeros(room, np.int32), np.zeros(room, np.float32), np.zeros(room, np.int64)
    ends = np.zeros(len(users) + 1, np.int64)
    raw = content.tobytes() or bytes(8)
    frozen = [
        np.frombuffer(np.array(column, dtype).tobytes() or bytes(8), dtype)
        for column, dtype in zip(
            list(zip(*entries, strict=True)) or [(), (), ()], (np.int32, np.float32, np.int64), strict=True
        )
    ]
    merge_histories(
        offsets, items, np.frombuffer(raw, np.uint32), np.frombuffer(raw, np.int64),
        np.array(list(points), np.uint32), np.array(list(points.values()), np.float32),
        owners, indptr, *frozen, recent, keep, *out, ends,
    )  # fmt: skip
    found = [
        list(zip(*(column[a:b].tolist() for column in out), strict=True)) for a, b in itertools.pairwise(ends)
    ]
    assert found == expected


def plain_merge(
    live: list[Any], old: list[Any], points: dict[int, float], recent: int, keep: int
) -> list[tuple[int, float, int]]:
    order = sorted(range(len(live)), key=lambda at: (-live[at][2], -at))[:recent]
    merged: dict[int, list[float]] = {}
    for row, kind, moment in (live[at] for at in order):
        if row >= 0 and kind in points:
            entry = merged.setdefault(row, [0.0, moment])
            entry[0] += points[kind]
    for row, weight, moment in old:
        entry = merged.setdefault(row, [weight, moment])
        entry[:] = [max(entry[0], weight), max(entry[1], moment)]
    entries = [(row, weight, int(moment)) for row, (weight, moment) in merged.items()]
    return sorted(entries, key=lambda entry: -entry[2])[:keep]


@settings(max_examples=200, deadline=None)
@given(moments=st.lists(st.integers(0, 40), max_size=120), before=st.integers(0, 3))
def test_newest_first_is_a_stable_sort(moments: list[int], before: int) -> None:
    times = np.zeros(3 * (before + len(moments)) + 3, np.int64)
    times[2::3][before : before + len(moments)] = moments
    order, spare = np.zeros(len(moments) + 1, np.int64), np.zeros(len(moments) + 1, np.int64)
    newest_first(times, before, len(moments), order, spare)
    expected = sorted(range(len(moments)), key=lambda at: (-moments[at], -at))
    assert order[: len(moments)].tolist() == [before + at for at in expected]


def test_limits_are_plain_numbers() -> None:
    assert all(isinstance(value, int) for value in dataclasses.asdict(UserLimits()).values())
