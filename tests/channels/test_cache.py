"""The cache: leftovers of earlier fine rankings, and when they leave."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.cache import Cache, CacheOptions, leftovers_reference
from engine.core.live import Leftovers
from engine.testing import ChannelContract, built_channel, interactions_of, random_batch, tiny_interactions

DAY = 86_400
NOW = 100 * DAY


def leftovers_of(lists):
    """Lists of (row, score, age in days, recalls)."""
    flat = [entry for part in lists for entry in part]
    return Leftovers(
        np.array([row for row, _, _, _ in flat], np.int32),
        np.array([score for _, score, _, _ in flat], np.float32),
        np.array([NOW - age * DAY for _, _, age, _ in flat], np.int64),
        np.array([recalls for _, _, _, recalls in flat], np.int32),
        np.concatenate(([0], np.cumsum([len(part) for part in lists]))).astype(np.int64),
    )


def with_leftovers(lists):
    batch = random_batch(40, 60, len(lists), now=NOW)
    return replace(batch, live=replace(batch.live, leftovers=leftovers_of(lists)))


class TestCacheContract(ChannelContract):
    def channel(self):
        return built_channel(Cache, tiny_interactions(self.users, self.items))

    def batch(self):
        rng = np.random.default_rng(1)
        return with_leftovers(
            [
                [
                    (row, rng.random(), int(rng.integers(0, 5)), int(rng.integers(0, 12)))
                    for row in rng.choice(self.items, rng.integers(0, 9), replace=False).tolist()
                ]
                for _ in range(self.size)
            ]
        )


def answer(channel, leftovers, k=50):
    return channel.recall_batch(with_leftovers([leftovers]), np.array([k], np.int32)).query(0)


def test_the_newest_ranking_first_and_within_one_what_it_scored_best():
    channel = built_channel(Cache, interactions_of([[0]], 5))
    got = answer(channel, [(1, 0.2, 0, 0), (2, 0.9, 0, 0), (0, 5.0, 1, 0), (3, 0.9, 0, 0)])
    assert got.rows.tolist() == [2, 3, 1, 0]
    assert got.scores.tolist() == [0, -1, -2, -3]
    assert got.triggers.tolist() == [-1] * 4
    assert answer(channel, [(1, 0.2, 0, 0), (2, 0.9, 0, 0)], k=1).rows.tolist() == [2]


def test_leftovers_leave_when_recalled_often_or_old_and_those_few_people_saw_later():
    liked = interactions_of([[0], [0], [1]], 4)
    channel = built_channel(Cache, liked, max_recalls=10, max_days=3, patient_days=7, low_interest=2)
    assert answer(channel, [(0, 1, 3, 9)]).rows.tolist() == [0]
    assert answer(channel, [(0, 1, 0, 10)]).rows.tolist() == []
    assert answer(channel, [(0, 1, 4, 0)]).rows.tolist() == []
    # Item 1 was liked once, item 3 never, row 9 was published since: all of low interest.
    assert answer(channel, [(1, 3, 7, 0), (3, 2, 7, 0), (9, 1, 7, 0)]).rows.tolist() == [1, 3, 9]
    assert answer(channel, [(1, 3, 8, 0)]).rows.tolist() == []


def test_its_recalls_are_counted():
    assert Cache.counts_recalls


ENTRY = st.tuples(
    st.integers(0, 12),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0, 1, 2, 3, 5, 8]),
    st.integers(0, 4),
)


@given(
    lists=st.lists(st.lists(ENTRY, max_size=8, unique_by=lambda entry: entry[0]), min_size=1, max_size=4),
    counts=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    k=st.integers(0, 6),
    low=st.integers(0, 4),
)
@settings(max_examples=150, deadline=None)
def test_the_kernel_does_what_its_plain_twin_does(lists, counts, k, low):
    config = CacheOptions(max_recalls=3, max_days=2, patient_days=5, low_interest=low)
    channel = Cache(config, np.array(counts, np.int32))
    batch = with_leftovers(lists)
    asked = np.full(len(lists), k, np.int32)
    got = channel.recall_batch(batch, asked)
    wanted = leftovers_reference(batch.live.leftovers, np.array(counts, np.int32), batch.now, asked, config)
    assert [got.query(q).rows.tolist() for q in range(len(lists))] == wanted
