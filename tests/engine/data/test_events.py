"""The event log, and the interest matrix against plain Python."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.core.errors import ConfigError, DatasetError
from engine.data.catalogue import Catalogue
from engine.data.dataset import BATCH_ROWS, Dataset
from engine.data.events import EventLog, ignored_events, interest_matrix

KINDS = ("click", "like", "share", "expose")
POINTS = {"click": 1.0, "like": 2.0, "share": 0.5, "expose": 0.0, "unheard": 9.0}
USERS, ITEMS = 4, 5


def log_of(events, users=USERS, items=ITEMS, kind_names=KINDS) -> EventLog:
    """A log of (user, item, kind, timestamp, rating or None) events."""
    columns = list(zip(*events, strict=True)) or [()] * 5
    ratings = [np.nan if rating is None else rating for rating in columns[4]]
    return EventLog(
        users=np.array(columns[0], np.int32),
        items=np.array(columns[1], np.int32),
        kinds=np.array(columns[2], np.uint8),
        kind_names=kind_names,
        timestamps=np.array(columns[3], np.int64),
        timed=True,
        splits=None,
        ratings=np.array(ratings, np.float32),
        user_count=users,
        item_count=items,
    )


def twin(events, where, points=POINTS, min_rating=None):
    """Per user the entries (item, weight, timestamp), newest first."""
    matrix = []
    for user in range(USERS):
        kinds, last = {}, {}
        for position, (who, item, kind, timestamp, rating) in enumerate(events):
            low = min_rating is not None and rating is not None and rating < min_rating
            if who == user and where[position] and points.get(KINDS[kind], 0) > 0 and not low:
                kinds.setdefault(item, set()).add(KINDS[kind])
                last[item] = max(last.get(item, (-1, -1)), (timestamp, position))
        newest = sorted(kinds, key=last.__getitem__, reverse=True)
        matrix.append([(item, sum(points[kind] for kind in kinds[item]), last[item][0]) for item in newest])
    return matrix


def entries_of(matrix):
    columns = zip(matrix.rows.tolist(), matrix.weights.tolist(), matrix.timestamps.tolist(), strict=True)
    entries = list(columns)
    return [entries[start:stop] for start, stop in zip(matrix.indptr, matrix.indptr[1:], strict=False)]


events_strategy = st.lists(
    st.tuples(
        st.integers(0, USERS - 1),
        st.integers(0, ITEMS - 1),
        st.integers(0, len(KINDS) - 1),
        st.integers(0, 6) | st.just(4_102_444_800),
        st.none() | st.integers(1, 5),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(events_strategy, st.none() | st.integers(1, 6), st.data())
@example([], None, None)
@example([(0, 0, 0, 5, None), (0, 1, 0, 5, None), (0, 0, 1, 5, None)], None, None)
@example([(3, 4, 0, 9, 1), (3, 4, 0, 1, 1), (3, 0, 0, 5, 5)], 2, None)
def test_the_interest_matrix_is_that_of_plain_python(events, min_rating, data):
    where = [True] * len(events)
    if data is not None:
        where = data.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    log = log_of(events)
    matrix = interest_matrix(log, POINTS, np.array(where, np.bool_), min_rating)
    assert entries_of(matrix) == twin(events, where, min_rating=min_rating)
    assert (matrix.users, matrix.items, matrix.indptr.size) == (USERS, ITEMS, USERS + 1)
    types = (matrix.indptr.dtype, matrix.rows.dtype, matrix.weights.dtype, matrix.timestamps.dtype)
    assert types == (np.int64, np.int32, np.float32, np.int64)


@settings(deadline=None)
@given(events_strategy, st.none() | st.integers(1, 6))
def test_every_event_is_counted_or_reported(events, min_rating):
    log = log_of(events)
    ignored = ignored_events(log, POINTS, min_rating=min_rating)
    kept = {kind: n - ignored.get(kind, 0) for kind, n in log.counts_by_kind().items()}
    assert all(count > 0 for count in ignored.values())
    assert kept["expose"] == 0
    lows = [
        kind for *_, kind, _, rating in events if min_rating and rating is not None and rating < min_rating
    ]
    for kind in (0, 1, 2):
        assert ignored.get(KINDS[kind], 0) == lows.count(kind)


def test_events_outside_the_selection_are_not_reported():
    log = log_of([(0, 0, 3, 1, None), (0, 1, 3, 1, None)])
    assert ignored_events(log, POINTS, np.array([True, False])) == {"expose": 1}


def test_long_histories_out_of_order_are_sorted():
    rng = np.random.default_rng(3)
    events = [
        (0, int(item), 0, int(time), None)
        for item, time in zip(rng.permutation(1000), rng.integers(0, 50, 1000), strict=True)
    ]
    log = log_of(events, users=1, items=1000)
    order = sorted(range(1000), key=lambda p: (events[p][3], p), reverse=True)
    assert interest_matrix(log, {"click": 1}).rows.tolist() == [events[p][1] for p in order]


def test_no_event_that_counts_makes_an_empty_matrix():
    log = log_of([(0, 0, 3, 1, None)])
    for matrix in (interest_matrix(log, POINTS), interest_matrix(log, {})):
        assert matrix.entries == 0
        assert matrix.indptr.tolist() == [0] * (USERS + 1)


def test_one_user_with_one_item_makes_one_entry():
    log = log_of([(0, 0, 0, 5, None), (0, 0, 0, 3, None), (0, 0, 1, 4, None)], users=1, items=1)
    assert entries_of(interest_matrix(log, POINTS)) == [[(0, 3.0, 5)]]


@pytest.mark.parametrize("points", [{"click": -1.0}, {"click": np.nan}, {"unheard": np.inf}])
def test_points_that_make_no_sense_are_refused(points):
    with pytest.raises(ConfigError) as caught:
        interest_matrix(log_of([]), points)
    assert caught.value.field.startswith("points.")


def test_sixty_four_kinds_may_have_points_and_no_more():
    names = tuple(f"kind{n:02}" for n in range(65))
    log = log_of([(0, 0, kind, 1, None) for kind in range(65)], kind_names=names)
    matrix = interest_matrix(log, dict.fromkeys(names[:64], 1.0))
    assert matrix.weights.tolist() == [64.0]
    with pytest.raises(ConfigError, match="at most 64"):
        interest_matrix(log, dict.fromkeys(names, 1.0))


def read(folder) -> EventLog:
    dataset = Dataset.open(folder)
    return EventLog.read(dataset, Catalogue.from_dataset(dataset))


def test_a_log_is_read_in_the_order_of_the_file(make_folder):
    log = read(make_folder())
    assert log.users.tolist() == [0, 0, 1, 1, 1]
    assert log.items.tolist() == [2, 0, 0, 1, 0]
    assert [log.kind_names[kind] for kind in log.kinds] == ["click", "click", "like", "expose", "click"]
    assert log.kind_names == ("click", "like", "expose")
    assert log.timestamps.tolist() == [100, 200, 300, 400, 500]
    assert (log.timed, log.splits, log.ratings, len(log)) == (True, None, None, 5)
    assert (log.user_count, log.item_count) == (2, 3)
    assert log.counts_by_kind() == {"click": 3, "like": 1, "expose": 1}
    assert log.counts_by_kind(log.items == 0) == {"click": 2, "like": 1, "expose": 0}


def test_splits_and_ratings_are_read_and_time_may_be_absent(make_folder):
    interactions = {
        "user_id": pa.array([2**63 - 1, 0, 0], pa.int64()),
        "item_id": pa.array([0, 2**63 - 1, 0], pa.int64()),
        # A dictionary may hold values that no row has.
        "event": pa.DictionaryArray.from_arrays([1, 1, 2], ["unused", "rate", "click"]),
        "split": pa.DictionaryArray.from_arrays([2, 0, 1], ["test", "tune", "train", "never"]),
        "rating": [5, None, 3],
    }
    log = read(make_folder(interactions=interactions))
    assert (log.timed, log.timestamps.tolist()) == (False, [0, 0, 0])
    assert log.splits.tolist() == [0, 2, 1]
    np.testing.assert_array_equal(log.ratings, np.array([5, np.nan, 3], np.float32))
    assert [log.kind_names[kind] for kind in log.kinds] == ["rate", "rate", "click"]
    assert log.users.tolist() == [1, 0, 0]
    # Without times the order of the file is the order of events.
    assert entries_of(interest_matrix(log, {"rate": 1, "click": 1}, log.splits != 9)) == [
        [(0, 1.0, 0), (1, 1.0, 0)],
        [(0, 1.0, 0)],
    ]


def test_kinds_keep_their_codes_from_batch_to_batch(make_folder):
    n = BATCH_ROWS + 100
    kinds = np.array([f"k{k}" for k in range(7)])[np.arange(n)[::-1] % 7]
    ids = np.arange(n) % 1000
    table = pa.table({"user_id": ids, "item_id": ids, "event": kinds, "timestamp": np.arange(n)})
    log = read(make_folder(interactions=table))
    assert np.array_equal(np.array(log.kind_names)[log.kinds], kinds)
    assert np.array_equal(log.timestamps, np.arange(n))


def test_too_many_kinds_of_event_are_refused(make_folder):
    n = 256
    table = {
        "user_id": [1] * n,
        "item_id": [1] * n,
        "event": [f"e{k}" for k in range(n)],
        "timestamp": [1] * n,
    }
    with pytest.raises(DatasetError, match="more than 255 kinds"):
        read(make_folder(interactions=table))


def test_a_log_needs_the_catalogue_of_its_data(make_folder):
    dataset = Dataset.open(make_folder())
    catalogue = Catalogue.from_dataset(dataset)
    events = {"user_id": [7, 8, 8], "item_id": [10, 10, 10], "event": ["click"] * 3, "timestamp": [1] * 3}
    grown = Dataset.open(make_folder(interactions=events))
    with pytest.raises(DatasetError, match="2 ids are not in the catalogue") as caught:
        EventLog.read(grown, catalogue)
    assert (caught.value.file, caught.value.column) == ("interactions.parquet", "user_id")


@pytest.mark.parametrize("rows", [3, 7])
def test_a_file_that_changes_under_the_reader_is_refused(make_folder, rows):
    dataset = Dataset.open(make_folder())
    catalogue = Catalogue.from_dataset(dataset)
    make_folder(
        interactions={
            "user_id": [7] * rows,
            "item_id": [10] * rows,
            "event": ["click"] * rows,
            "timestamp": [1] * rows,
        }
    )
    with pytest.raises(DatasetError, match="has changed since"):
        EventLog.read(dataset, catalogue)


def test_a_real_log_makes_a_matrix(real_data):
    log = read(real_data / "kuairand-pure-partial")
    points = dict.fromkeys(("click", "like", "collect", "share"), 1.0)
    matrix = interest_matrix(log, points)
    assert len(log) == 1_640_256
    assert 0 < matrix.entries < sum(log.counts_by_kind()[kind] for kind in ("click", "like", "share"))
    assert 1 <= matrix.weights.min() <= matrix.weights.max() <= 4
    ignored = ignored_events(log, points)
    assert ignored["expose"] == 228_329
    assert set(ignored) == {"expose", "finish", "comment", "follow", "dislike", "profile_enter"}
    same_user = np.repeat(np.arange(matrix.users), np.diff(matrix.indptr))
    newest_first = np.diff(matrix.timestamps) <= 0
    assert newest_first[same_user[1:] == same_user[:-1]].all()
