from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.candidates import FanOut
from engine.core.errors import StateUnavailableError
from engine.core.exposure import ExposureBits, ExposureLayout, add
from engine.core.items import ItemColumns
from engine.core.live import LiveState
from engine.core.options import Options
from engine.core.types import RaggedRows
from engine.testing import FilterContract, built_filter, random_batch, random_columns
from filters.age import Age, young_enough, young_enough_reference
from filters.availability import Availability, to_be_had, to_be_had_reference
from filters.dislikes import Dislikes, not_disliked, not_disliked_reference
from filters.excluded import Excluded
from filters.exposure import Exposure
from filters.seen import Seen

DAY = 86_400


def ragged(rng, queries, below):
    return RaggedRows.of(
        [rng.integers(0, below, rng.integers(0, 4)).astype(np.int32) for _ in range(queries)]
    )


def disliking(queries, items, authors=8, tags=6, seed=0):
    rng = np.random.default_rng(seed)
    return replace(
        LiveState.empty(queries),
        disliked_items=ragged(rng, queries, items),
        disliked_authors=ragged(rng, queries, authors),
        disliked_tags=ragged(rng, queries, tags),
    )


def fan_out_of(*rows, queries=1):
    """One channel's candidates, a list per query."""
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in rows]))).astype(np.int64)
    return FanOut(np.array([row for part in rows for row in part], np.int32), offsets, queries)


class TestSeenContract(FilterContract):
    def filter(self):
        return Seen(Options())


class TestExcludedContract(FilterContract):
    def filter(self):
        return Excluded(Options())

    def batch(self):
        rng = np.random.default_rng(2)
        lists = [rng.choice(self.items, 8, replace=False).astype(np.int32) for _ in range(self.size)]
        return replace(super().batch(), excluded=RaggedRows.of(lists))


class TestAvailabilityContract(FilterContract):
    def filter(self):
        return built_filter(Availability, random_columns(self.items))


class TestAgeContract(FilterContract):
    def filter(self):
        return built_filter(Age, random_columns(self.items), max_days=3)


class TestDislikesContract(FilterContract):
    def filter(self):
        return built_filter(Dislikes, random_columns(self.items))

    def batch(self):
        return replace(super().batch(), live=disliking(self.size, self.items))


class TestExposureContract(FilterContract):
    def filter(self):
        return built_filter(Exposure, random_columns(self.items), overfetch=3)

    def batch(self):
        rng = np.random.default_rng(3)
        keys = random_columns(self.items).keys
        layout = ExposureLayout(8, 10, 7)
        bits = ExposureBits.of(
            [
                [None, add(None, rng.choice(keys, 6).tolist(), layout), add(None, keys[:1].tolist(), layout)]
                for _ in range(self.size)
            ]
        )
        return replace(super().batch(), live=replace(LiveState.empty(self.size), exposure=bits))


class TestExposureContractWhereNothingIsKept(FilterContract):
    def filter(self):
        return built_filter(Exposure, random_columns(self.items))


def test_seen_removes_the_history_and_excluded_removes_the_excluded():
    batch = random_batch(10, 5, 1, seed=3)
    batch = replace(batch, excluded=RaggedRows.of([np.array([9], np.int32)]))
    everything = FanOut(np.arange(10, dtype=np.int32), np.array([0, 10]), 1)
    kept = np.flatnonzero(Seen(Options()).keep(batch, everything))
    assert set(kept) == set(range(10)) - set(batch.history.rows.tolist())
    assert np.flatnonzero(~Excluded(Options()).keep(batch, everything)).tolist() == [9]


def test_availability_removes_what_was_taken_down_and_what_is_yet_to_come():
    columns = ItemColumns(4)
    columns.set("available", np.array([True, False, True, True]))
    columns.set("published_at", np.array([100, 100, 101, -1]))
    component = built_filter(Availability, columns)
    everything = fan_out_of(range(4))
    assert component.keep(random_batch(4, 1, 1, now=100), everything).tolist() == [True, False, False, True]
    assert component.keep(random_batch(4, 1, 1, now=101), everything).tolist() == [True, False, True, True]
    # A query of no moment: what was taken down is gone all the same.
    assert component.keep(random_batch(4, 1, 1, now=0), everything).tolist() == [True, False, True, True]


def test_the_columns_are_read_anew_for_each_batch():
    columns = ItemColumns(2)
    component = built_filter(Availability, columns)
    columns.grow(5000)
    columns.put("available", np.array([4999], np.int32), np.zeros(1, np.bool_))
    assert component.keep(random_batch(2, 1, 1), fan_out_of([1, 4999])).tolist() == [True, False]


def test_age_removes_what_is_too_old():
    columns = ItemColumns(4)
    columns.set("published_at", np.array([10 * DAY, 9 * DAY - 1, 20 * DAY, -1]))
    batch, everything = random_batch(4, 1, 1, now=11 * DAY), fan_out_of(range(4))
    assert built_filter(Age, columns, max_days=2).keep(batch, everything).tolist() == [
        True,
        False,
        True,
        True,
    ]
    strict = built_filter(Age, columns, max_days=2, keep_unknown=False)
    assert strict.keep(batch, everything).tolist() == [True, False, True, False]
    assert strict.keep(random_batch(4, 1, 1, now=0), everything).tolist() == [True, True, True, False]


def test_dislikes_removes_items_authors_and_topics_of_the_user_who_dislikes_them():
    columns = ItemColumns(5)
    columns.set("authors", np.array([0, 1, 1, -1, 2]))
    columns.set_tags(np.array([0, 2, 2, 3, 4, 4]), np.array([7, 8, 8, 9], np.int32))
    nothing = np.empty(0, np.int32)
    live = replace(
        LiveState.empty(4),
        disliked_items=RaggedRows.of([np.array([3], np.int32), nothing, nothing, nothing]),
        disliked_authors=RaggedRows.of([nothing, np.array([1], np.int32), nothing, nothing]),
        disliked_tags=RaggedRows.of([nothing, nothing, np.array([8], np.int32), nothing]),
    )
    batch = replace(random_batch(5, 1, 4), live=live)
    component = built_filter(Dislikes, columns, overfetch=30)
    keep = component.keep(batch, fan_out_of(*[range(5)] * 4, queries=4)).reshape(4, 5)
    assert [np.flatnonzero(~row).tolist() for row in keep] == [[3], [1, 2], [0, 2], []]
    assert component.overfetch(batch).tolist() == [1, 30, 30, 0]


def test_exposure_removes_what_was_shown():
    columns = ItemColumns(100)
    layout = ExposureLayout(100, 16, 7)
    bits = ExposureBits.of([[add(None, [3, 5], layout)], []])
    batch = replace(random_batch(100, 1, 2), live=replace(LiveState.empty(2), exposure=bits))
    component = built_filter(Exposure, columns, overfetch=1)
    keep = component.keep(batch, fan_out_of(range(100), range(100), queries=2)).reshape(2, 100)
    assert np.flatnonzero(~keep[0]).tolist() == [3, 5]
    assert keep[1].all()
    assert component.overfetch(batch).tolist() == [1, 0]


@pytest.mark.parametrize("kind", [Exposure, Dislikes])
def test_where_the_state_cannot_be_read_only_guests_are_judged(kind):
    component = built_filter(kind, ItemColumns(4))
    batch = replace(random_batch(4, 1, 2), live=LiveState.empty(2, available=False))
    with pytest.raises(StateUnavailableError, match="could not be read"):
        component.keep(batch, fan_out_of([1], [2], queries=2))
    assert component.overfetch(batch) is None
    for guests in (np.array([-1, -1]), np.array(["", ""])):
        assert component.keep(replace(batch, user_ids=guests), fan_out_of([1], [2], queries=2)) is None


@st.composite
def worlds(draw):
    queries, channels = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    items = draw(st.integers(1, 30))
    segments = draw(
        st.lists(
            st.lists(st.integers(0, items - 1), max_size=8),
            min_size=queries * channels,
            max_size=queries * channels,
        )
    )
    candidates = fan_out_of(*segments, queries=queries)
    seed = draw(st.integers(0, 1000))
    now = np.array(draw(st.lists(st.integers(-1, 40), min_size=queries, max_size=queries)), np.int64)
    columns = random_columns(items, authors=4, tags=4, seed=seed, now=30)
    return candidates, columns, now, disliking(queries, items, authors=4, tags=4, seed=seed)


@given(world=worlds(), seconds=st.integers(0, 30), keep_unknown=st.booleans())
@settings(deadline=None, max_examples=200)
def test_the_kernels_do_what_their_plain_twins_do(world, seconds, keep_unknown):
    candidates, columns, now, live = world
    there = to_be_had(candidates, now, columns.visible_from)
    assert there.tolist() == to_be_had_reference(candidates, now, columns.visible_from).tolist()
    moment = now[candidates.query_of_candidate()]
    published = (moment <= 0) | (columns.published_at[candidates.rows] <= moment)
    assert there.tolist() == (columns.available[candidates.rows] & published).tolist()
    how = (columns.published_at, seconds, keep_unknown)
    assert (
        young_enough(candidates, now, *how).tolist() == young_enough_reference(candidates, now, *how).tolist()
    )
    assert (
        not_disliked(candidates, live, columns).tolist()
        == not_disliked_reference(candidates, live, columns).tolist()
    )
