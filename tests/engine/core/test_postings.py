"""Posting lists against a twin that looks at every item as it stands now, over random histories of changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.candidates import check_contract
from engine.core.items import ItemColumns
from engine.core.memory import MemorySink
from engine.core.postings import (
    NO_KEY,
    PostingLists,
    PostOptions,
    Reading,
    Wanted,
    read_reference,
    write_posting_lists,
)
from engine.core.types import RaggedRows

DAY = 86_400
NOW = 100 * DAY


class World:
    """A catalogue with a key per item, and the posting lists that are told of every change."""

    def __init__(self, keys, published, lists=0, quality=None, gone=()):
        self.keys = np.array(keys, np.int64)
        self.columns = ItemColumns(self.keys.size)
        self.columns.set("published_at", np.array(published, np.int64))
        if quality is not None:
            self.columns.set("quality", np.array(quality, np.float32))
        self.columns.available[list(gone)] = False
        sink = MemorySink()
        write_posting_lists(sink, self.keys, self.columns.published_at, lists)
        self.lists = PostingLists.load(sink.arrays, self.columns)

    def change(self, row, key, published, available=True, quality=np.nan):
        if row >= len(self.columns):
            self.columns.grow(row + 1)
            self.keys = np.concatenate((self.keys, np.full(row + 1 - self.keys.size, NO_KEY)))
        self.keys[row] = key
        self.columns.published_at[row] = published
        self.columns.available[row] = available
        self.columns.quality[row] = quality

    def tell(self, rows):
        rows = np.array(rows, np.int32)
        self.lists.update(rows, self.keys[rows])

    def both(self, wanted, reading, now, k):
        columns = self.columns
        return self.lists.read(wanted, reading, now, k), read_reference(
            self.keys, columns.published_at, columns.available, columns.quality, wanted, reading, now, k
        )

    def newest(self, key, k=50, now=NOW, **options):
        answer = self.lists.read(
            ask([[(key, 1.0)]]), Reading.of(PostOptions(**options)), np.array([now]), np.array([k], np.int32)
        )
        return answer.rows.tolist()


def ask(queries):
    """Lists of (key, weight) pairs; the trigger of a list is its key + 100."""
    flat = [pair for query in queries for pair in query]
    offsets = np.concatenate(([0], np.cumsum([len(query) for query in queries]))).astype(np.int64)
    keys = np.array([key for key, _ in flat], np.int64)
    return Wanted(
        offsets, keys, np.array([weight for _, weight in flat], np.float32), (keys + 100).astype(np.int32)
    )


def same(one, other):
    assert one.offsets.tolist() == other.offsets.tolist()
    assert one.rows.tolist() == other.rows.tolist()
    assert one.scores.tobytes() == other.scores.tobytes()
    assert one.triggers.tolist() == other.triggers.tolist()


KEYS = st.integers(-1, 5)
TIMES = st.one_of(st.just(-1), st.integers(90, 104).map(lambda day: day * DAY), st.integers(0, NOW))
QUALITY = st.sampled_from([np.nan, 0.0, 0.4, 0.9])
CHANGE = st.tuples(st.integers(0, 39), KEYS, TIMES, st.booleans(), QUALITY)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), dense=st.booleans())
def test_any_history_of_changes_reads_as_if_built_from_scratch(data, dense):
    start = data.draw(st.lists(st.tuples(KEYS, TIMES, QUALITY), min_size=1, max_size=30))
    gone = data.draw(st.lists(st.integers(0, len(start) - 1), max_size=3))
    world = World(*zip(*((key, time) for key, time, _ in start), strict=True), lists=4 if dense else 0, gone=gone,
                  quality=[quality for _, _, quality in start])  # fmt: skip
    if dense:  # rows past the last list of the snapshot reach the lists through an update only
        late = np.flatnonzero(world.keys >= 4)
        world.tell(late)
    for batch in data.draw(st.lists(st.lists(CHANGE, max_size=12), max_size=4)):
        rows = dict.fromkeys(change[0] for change in batch)
        for change in batch:
            world.change(*change)
        world.tell(list(rows))
        queries = data.draw(
            st.lists(st.lists(st.tuples(KEYS, st.sampled_from([0.0, 0.3, 1.0, 2.5])), max_size=5), max_size=3)
        )
        reading = Reading.of(
            PostOptions(
                min_quality=data.draw(st.sampled_from([0.0, 0.4])),
                max_age_days=data.draw(st.sampled_from([0.0, 8.0])),
                half_life_days=data.draw(st.sampled_from([0.01, 7.0])),
            ),
            lists=data.draw(st.integers(0, 3)),
            per_list=data.draw(st.integers(0, 3)),
            lead=data.draw(st.integers(0, 2)),
            thin=data.draw(st.integers(0, 3)),
        )
        n = len(queries)
        now = np.array([NOW - at * 5 * DAY for at in range(n)], np.int64)
        k = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), np.int32)
        answer, expected = world.both(ask(queries), reading, now, k)
        same(answer, expected)
        check_contract(answer, k, len(world.columns), "posts")


def test_a_long_history_in_random_order_of_time_reads_newest_first():
    rng = np.random.default_rng(3)
    world = World([0] * 50, rng.integers(0, NOW, 50))
    for _ in range(6):
        rows = rng.permutation(20_000)[:9_000]
        for row in rows.tolist():
            world.change(row, row % 3, int(rng.integers(0, NOW)), bool(rng.random() < 0.9))
        world.tell(rows)
    queries = [[(0, 1.0)], [(1, 1.0), (2, 0.5)], [(0, 1.0), (1, 1.0), (2, 1.0)]]
    now, k = np.full(3, NOW), np.array([5_000, 700, 30], np.int32)
    for reading in (Reading.of(PostOptions()), Reading.of(PostOptions(), per_list=11)):
        same(*world.both(ask(queries), reading, now, k))


def test_an_item_moves_from_list_to_list_and_leaves_no_trace():
    world = World([7, 7, 9], [1 * DAY, 2 * DAY, 3 * DAY])
    assert world.newest(7) == [1, 0]
    world.change(1, 9, 2 * DAY)
    world.tell([1])
    assert (world.newest(7), world.newest(9)) == ([0], [2, 1])
    world.change(1, 7, 0)
    world.tell([1])
    assert (world.newest(7), world.newest(9)) == ([0, 1], [2])
    world.change(1, NO_KEY, 0)
    world.tell([1])
    assert (world.newest(7), world.newest(9)) == ([0], [2])


def test_a_published_item_is_read_at_once_and_one_taken_down_never_again():
    world = World([4], [10 * DAY])
    world.change(1, 4, 20 * DAY)
    world.change(2, 4, 5 * DAY)
    world.tell([1, 2])
    assert world.newest(4) == [1, 0, 2]
    world.change(0, 4, 10 * DAY, available=False)
    world.tell([0])
    assert world.newest(4) == [1, 2]
    world.change(0, 4, 10 * DAY)
    world.tell([0])
    assert world.newest(4) == [1, 0, 2]


def test_what_is_gone_when_the_lists_are_loaded_stays_gone():
    assert World([1, 1], [DAY, DAY], gone=[0]).newest(1) == [1]


def test_items_of_the_future_are_not_there_yet_and_take_no_place():
    world = World([1, 1, 1], [NOW + 1, NOW, NOW - 5])
    assert world.newest(1) == [1, 2]
    assert world.newest(1, k=1) == [1]
    assert world.newest(1, now=NOW + 1) == [0, 1, 2]
    world.change(3, 1, NOW + 1)
    world.tell([3])
    assert world.newest(1) == [1, 2]


def test_an_unknown_time_is_very_old_but_allowed_unless_there_is_an_age_limit():
    world = World([1, 1], [-1, DAY])
    assert world.newest(1) == [1, 0]
    assert world.newest(1, max_age_days=99.5) == [1]
    assert world.newest(1, max_age_days=98.5) == []


def test_gates_are_read_from_the_live_columns():
    world = World([1, 1, 1], [DAY, DAY, DAY], quality=[0.2, 0.8, np.nan])
    assert world.newest(1) == [0, 1, 2]
    assert world.newest(1, min_quality=0.5) == [1]
    world.columns.quality[0] = 0.6
    assert world.newest(1, min_quality=0.5) == [0, 1]


def test_scores_are_weight_and_age_on_a_logarithmic_scale():
    world = World([1, 2], [NOW - 14 * DAY, NOW - 7 * DAY])
    answer = world.lists.read(
        ask([[(1, 4.0), (2, 1.0)]]), Reading.of(PostOptions()), np.array([NOW]), np.array([9], np.int32)
    )
    # log2(4) - 14 / 7 = 0, log2(1) - 7 / 7 = -1
    assert answer.rows.tolist() == [0, 1]
    assert answer.scores.tolist() == [0.0, -1.0]
    assert answer.triggers.tolist() == [101, 102]


def test_of_a_key_asked_twice_the_larger_weight_counts():
    world = World([1], [NOW])
    answer, expected = world.both(
        ask([[(1, 1.0), (1, 8.0), (1, 2.0)]]),
        Reading.of(PostOptions()),
        np.array([NOW]),
        np.array([9], np.int32),
    )
    assert (answer.rows.tolist(), answer.scores.tolist()) == ([0], [3.0])
    same(answer, expected)


@pytest.mark.parametrize(("own", "asked"), [(3, False), (2, True)])
def test_further_lists_are_read_only_where_the_first_is_thin(own, asked):
    world = World([1] * own + [2], [NOW] * (own + 1))
    reading = Reading.of(PostOptions(), lead=1, thin=3)
    for k in (1, 9):
        answer = world.lists.read(
            ask([[(1, 1.0), (2, 2.0)]]), reading, np.array([NOW]), np.array([k], np.int32)
        )
        assert (own in answer.rows) == asked, "however many are asked for"


def test_items_of_one_score_are_in_order_of_row_however_many():
    rng = np.random.default_rng(5)
    world = World(rng.integers(0, 3, 3_000), rng.choice([-1, 90 * DAY], 3_000))
    moved = rng.permutation(3_000)[:500]
    for row in moved.tolist():
        world.change(row, row % 3, 90 * DAY)
    world.tell(moved)
    queries = [[(0, 1.0), (1, 1.0), (2, 1.0)]] * 3
    k = np.array([2_900, 700, 30], np.int32)
    same(*world.both(ask(queries), Reading.of(PostOptions()), np.full(3, NOW), k))


def test_nothing_changed_costs_nothing_and_the_overlay_holds_an_item_once():
    world = World([1] * 4, [DAY] * 4)
    world.tell([0, 1, 2, 3])
    size = world.lists.bytes_in_memory
    for turn in range(2_000):
        world.change(turn % 4, turn % 3, turn)
        world.tell([turn % 4])
    assert world.lists.bytes_in_memory == size
    assert world.newest(1, now=3_000) == [row for row in (3, 2, 1, 0) if world.keys[row] == 1]


def test_an_empty_catalogue_and_no_queries():
    world = World([], [])
    assert world.newest(3) == []
    nothing = Wanted.alike(RaggedRows.empty(0))
    answer = world.lists.read(
        nothing, Reading.of(PostOptions()), np.empty(0, np.int64), np.empty(0, np.int32)
    )
    assert answer.offsets.tolist() == [0]


def test_rows_past_the_snapshot_one_by_one_stay_within_all_arrays() -> None:
    """Rows and their bits grow together, whatever room the last growth left (100 rows past 37 cross several bytes)."""
    columns = ItemColumns(37)
    columns.set("published_at", np.arange(37))
    sink = MemorySink()
    write_posting_lists(sink, np.zeros(37, np.int64), columns.published_at, lists=1)
    posts = PostingLists.load(sink.arrays, columns)
    for row in range(37, 1500):
        columns.grow(row + 1)
        columns.put("published_at", np.array([row], np.int32), np.array([row]))
        posts.update(np.array([row], np.int32), np.zeros(1, np.int64))
        assert posts._overlay._moved.size * 8 >= posts._overlay._latest.size
