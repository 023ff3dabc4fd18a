"""Hydrate: what the caller says joined to what is stored, held to a plain twin; ids looked up and counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.items import ItemColumns
from engine.core.live import LiveState
from engine.core.query import History
from engine.core.ragged import put_first
from engine.core.types import RaggedRows
from engine.data.ids import IdIndex
from engine.online.hydrate import Hydrator, combine
from engine.online.request import RecentItems, Request
from engine.state.history import SnapshotHistory, UserRead
from engine.testing import interactions_of

ITEMS = 9


def recent_of(entries, override=False) -> RecentItems:
    """(id, kind, points, time) of each event, newest first."""
    return RecentItems(
        ids=np.array([entry[0] for entry in entries], np.int64),
        kinds=np.array([entry[1] for entry in entries], np.int64),
        points=np.array([entry[2] for entry in entries], np.float32),
        timestamps=np.array([entry[3] for entry in entries], np.int64),
        override=override,
    )


def plain(entries, stored, override):
    """(row, weight, time) in order, one item at a time."""
    kinds: dict[int, dict[int, float]] = {}
    times: dict[int, int] = {}
    for row, kind, points, when in entries:
        if row >= 0:
            kinds.setdefault(row, {}).setdefault(kind, points)
            times.setdefault(row, when)
    weights = {row: sum(mine.values()) for row, mine in kinds.items()}
    if override:
        return [(row, weight, times[row]) for row, weight in weights.items()]
    for row, weight, _ in stored:
        if row in weights:
            weights[row] = max(weights[row], weight)
    front = [(row, weight, times[row]) for row, weight in weights.items()]
    return front + [entry for entry in stored if entry[0] not in weights]


halves = st.integers(0, 8).map(lambda n: n / 2)  # sums of which are exact
events = st.lists(
    st.tuples(st.integers(-1, ITEMS - 1), st.integers(0, 2), halves, st.integers(0, 99)), max_size=12
)
histories = st.lists(
    st.tuples(st.integers(0, ITEMS - 1), halves, st.integers(0, 99)), max_size=6, unique_by=lambda e: e[0]
)


def combined(entries, stored, override):
    rows, weights, times = combine(
        np.array([entry[0] for entry in entries], np.int32),
        recent_of(entries, override),
        np.array([row for row, _, _ in stored], np.int32),
        np.array([weight for _, weight, _ in stored], np.float32),
        np.array([when for _, _, when in stored], np.int64),
    )
    return list(zip(rows.tolist(), weights.tolist(), times.tolist(), strict=True))


@given(entries=events, stored=histories, override=st.booleans())
@settings(deadline=None, max_examples=250)
def test_it_combines_as_its_plain_twin_does(entries, stored, override):
    assert combined(entries, stored, override) == plain(entries, stored, override)


def test_what_is_stored_is_not_changed():
    weights = np.array([1.0, 2.0], np.float32)
    weights.flags.writeable = False  # as mapped from a snapshot
    rows = np.array([3, 4], np.int32)
    got = combine(np.array([4], np.int32), recent_of([(4, 0, 5.0, 9)]), rows, weights, np.zeros(2, np.int64))
    assert got[1].tolist() == [5.0, 1.0]
    assert weights.tolist() == [1.0, 2.0]


def test_given_items_stand_in_front_and_keep_the_larger_weight():
    stored = [(1, 3.0, 10), (2, 1.0, 9), (5, 1.0, 8)]
    given_ = [(7, 0, 1.0, 20), (1, 0, 1.0, 19), (2, 0, 2.0, 18)]
    assert combined(given_, stored, False) == [(7, 1.0, 20), (1, 3.0, 19), (2, 2.0, 18), (5, 1.0, 8)]


def test_an_override_forgets_what_is_stored():
    assert combined([(7, 0, 1.0, 20)], [(7, 3.0, 1), (2, 1.0, 0)], True) == [(7, 1.0, 20)]
    assert combined([], [(2, 1.0, 0)], True) == []
    assert combined([], [(2, 1.0, 0)], False) == [(2, 1.0, 0)]


def test_distinct_events_of_an_item_add_up_and_repeated_ones_do_not():
    click, like = 0, 1
    twice = [(7, click, 1.0, 20), (7, like, 2.0, 19), (7, click, 1.0, 18)]
    assert combined(twice, [], False) == [(7, 3.0, 20)]


# --- through the hydrator --------------------------------------------------------------------------


@pytest.fixture(params=["int64", "string"])
def kind(request) -> str:
    return request.param


def name(number: int, kind: str):
    return number if kind == "int64" else f"n{number}"


def hydrator(kind: str = "int64") -> Hydrator:
    """Items 100 to 108; users 1, 2 and 3, of whom 1 likes rows 2 and 0, and 2 likes 5."""
    liked = interactions_of([[2, 0], [5], []], ITEMS)
    arrays = {
        "indptr": liked.indptr,
        "rows": liked.rows,
        "weights": liked.weights,
        "timestamps": liked.timestamps,
    }
    items = IdIndex.of([name(100 + row, kind) for row in range(ITEMS)])
    return Hydrator(items, IdIndex.of([name(user, kind) for user in (1, 2, 3)]), SnapshotHistory(arrays))


def named(entries, kind, override=False) -> RecentItems:
    made = recent_of([(0, *entry[1:]) for entry in entries], override)
    ids = np.array([name(entry[0], kind) for entry in entries])
    return RecentItems(ids, made.points, made.timestamps, made.kinds, override)


def history_of(history: History, q: int) -> list[int]:
    return history.rows[history.offsets[q] : history.offsets[q + 1]].tolist()


def test_ids_become_rows_and_what_is_unknown_is_counted(kind):
    requests = [
        Request(user_id=name(1, kind), excluded=np.array([name(n, kind) for n in (101, 999, 103, 998)])),
        Request(user_id=name(77, kind), recent=named([(104, 0, 1, 5), (999, 0, 1, 4), (999, 1, 1, 3)], kind)),
        Request(),
        Request(user_id=name(2, kind), recent=named([(999, 0, 1, 5)], kind, override=True)),
    ]
    made = hydrator(kind)(requests)
    assert made.batch.users.tolist() == [0, -1, -1, 1]
    assert [history_of(made.batch.history, q) for q in range(4)] == [[2, 0], [4], [], []]
    assert made.unknown[2].tolist() == [2, 0, 0, 0]
    assert made.unknown[1].tolist() == [0, 2, 0, 1]
    assert made.batch.excluded.rows.tolist() == [1, 3]
    assert made.batch.excluded.offsets.tolist() == [0, 2, 2, 2, 2]
    assert made.batch.user_ids.tolist()[2] in (-1, "")


def test_a_batch_is_its_requests_one_by_one(kind):
    make = hydrator(kind)
    requests = [
        Request(user_id=name(1, kind)),
        Request(user_id=name(2, kind), recent=named([(105, 0, 1, 5), (101, 0, 2, 4)], kind)),
        Request(excluded=np.array([name(101, kind)]), now=7, latitude=1.0, longitude=2.0, city="Ulm"),
        Request(user_id=name(1, kind), recent=named([], kind, override=True), device={"os": "ios"}),
    ]
    together = make(requests).batch
    assert len(together) == 4
    for q, request in enumerate(requests):
        alone, mine = make([request]).batch.query(0), together.query(q)
        for column in ("history", "history_weights", "history_timestamps"):
            assert getattr(alone, column).tolist() == getattr(mine, column).tolist()
            assert getattr(alone, column).dtype == getattr(mine, column).dtype
        assert (alone.user_id, alone.user, alone.now) == (mine.user_id, mine.user, mine.now)
        assert (alone.city, alone.device) == (mine.city, mine.device)
        np.testing.assert_equal((alone.latitude, alone.longitude), (mine.latitude, mine.longitude))
        assert make([request]).batch.excluded.rows.tolist() == (
            together.excluded.rows[together.excluded.offsets[q] : together.excluded.offsets[q + 1]].tolist()
        )


def test_the_columns_have_the_types_that_kernels_are_compiled_for(kind):
    for requests in (
        [Request()],
        [Request(user_id=name(1, kind)), Request()],
        [Request(user_id=name(1, kind), recent=named([(104, 0, 1, 5)], kind))],
        [Request(recent=named([], kind), excluded=np.array([name(1, kind)])[:0])],
    ):
        batch = hydrator(kind)(requests).batch
        history = batch.history
        assert (history.rows.dtype, history.weights.dtype) == (np.int32, np.float32)
        assert (history.timestamps.dtype, history.offsets.dtype) == (np.int64, np.int64)
        assert (batch.excluded.rows.dtype, batch.excluded.offsets.dtype) == (np.int32, np.int64)
        assert (batch.users.dtype, batch.now.dtype) == (np.int32, np.int64)


def test_ids_at_the_ends_are_ids_like_others():
    liked = interactions_of([[1], [0]], 2)
    arrays = {
        "indptr": liked.indptr,
        "rows": liked.rows,
        "weights": liked.weights,
        "timestamps": liked.timestamps,
    }
    ends = IdIndex.of(np.array([0, 2**63 - 1]))
    make = Hydrator(ends, ends, SnapshotHistory(arrays))
    batch = make([Request(user_id=0), Request(user_id=2**63 - 1), Request(), Request(user_id=2**62)]).batch
    assert batch.users.tolist() == [0, 1, -1, -1]
    assert batch.user_ids.tolist() == [0, 2**63 - 1, -1, 2**62]
    assert make.items == make.users == 2


def test_trigger_items_are_looked_up_each_once_and_excluded(kind):
    requests = [
        Request(triggers=np.array([name(n, kind) for n in (103, 999, 101, 103)])),
        Request(excluded=np.array([name(104, kind)])),
        Request(triggers=np.array([name(102, kind)]), excluded=np.array([name(n, kind) for n in (105, 102)])),
    ]
    made = hydrator(kind)(requests)
    assert made.batch.triggers.rows.tolist() == [3, 1, 2]
    assert made.batch.triggers.offsets.tolist() == [0, 2, 2, 3]
    assert made.unknown[3].tolist() == [1, 0, 0]
    assert made.batch.excluded.rows.tolist() == [3, 1, 4, 5, 2, 2]
    assert made.batch.excluded.offsets.tolist() == [0, 2, 3, 6]
    assert made.batch.alone(2).triggers.rows.tolist() == [2]


class Wanderers:
    """User state in which everybody was in cities 1 and 0, the latest first."""

    def ask(self, user_ids):
        return self.read

    def read(self, users, now, cities):
        n = users.size
        past = RaggedRows(np.tile(np.array([1, 0], np.int32), n), np.arange(n + 1) * 2)
        return UserRead(History.empty(n), LiveState.empty(n, cities=put_first(past, cities)))


def test_what_is_to_be_done_meanwhile_is_done_between_asking_for_users_and_reading_them():
    done: list[str] = []

    class Watched(Wanderers):
        def ask(self, user_ids):
            done.append("asked")
            return super().ask(user_ids)

        def read(self, users, now, cities):
            done.append("read")
            return super().read(users, now, cities)

    ids = IdIndex.of(np.arange(3))
    Hydrator(ids, ids, Watched())([Request(user_id=1)], lambda: done.append("meanwhile"))
    assert done == ["asked", "meanwhile", "read"]


def test_the_requests_city_stands_in_front_of_those_where_the_user_was():
    columns = ItemColumns(3)
    columns.city_codes = {"Ulm": 0, "Bonn": 1, "Kiel": 2}
    ids = IdIndex.of(np.arange(3))
    requests = [Request(city=city) for city in ("Ulm", "", "Kiel", "Atlantis", "Bonn")]
    live = Hydrator(ids, ids, Wanderers(), columns=columns)(requests).batch.live
    assert [live.alone(q).cities.rows.tolist() for q in range(5)] == [
        [0, 1],
        [1, 0],
        [2, 1, 0],
        [1, 0],
        [1, 0],
    ]
    empty = SnapshotHistory(
        {
            "indptr": np.zeros(4, np.int64),
            **dict.fromkeys(("rows", "weights", "timestamps"), np.empty(0, np.int32)),
        }
    )
    live = Hydrator(ids, ids, empty, columns=columns)(requests).batch.live
    assert [live.alone(q).cities.rows.tolist() for q in range(5)] == [[0], [], [2], [], [1]]
