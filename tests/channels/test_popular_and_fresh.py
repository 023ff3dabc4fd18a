from dataclasses import replace

import numpy as np
import pytest

from channels.fresh import Fresh
from channels.popular import Popular
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.query import History, QueryBatch
from engine.core.types import RaggedRows
from engine.testing import (
    ChannelContract,
    built_channel,
    interactions_of,
    random_batch,
    random_columns,
    tiny_interactions,
)

DAY = 86_400


class TestPopularContract(ChannelContract):
    def channel(self):
        return built_channel(Popular, tiny_interactions(self.users, self.items))


class TestPopularByCategoryContract(ChannelContract):
    def channel(self):
        columns = random_columns(self.items)
        liked = tiny_interactions(self.users, self.items)
        return built_channel(Popular, liked, columns=columns, by="category", kept=5, groups=2)


class TestPopularByCityContract(ChannelContract):
    def channel(self):
        columns = random_columns(self.items)
        columns.set("cities", np.random.default_rng(2).integers(-1, 4, self.items))
        liked = tiny_interactions(self.users, self.items)
        return built_channel(Popular, liked, columns=columns, by="city", kept=5)

    def batch(self):
        rng = np.random.default_rng(3)
        lists = [rng.choice(6, rng.integers(0, 4), replace=False) for _ in range(self.size)]
        return in_cities(random_batch(self.items, self.users, self.size), lists)


class TestFreshContract(ChannelContract):
    def channel(self):
        published = {"published_at": np.arange(self.items, dtype=np.int64) * DAY}
        return built_channel(Fresh, tiny_interactions(self.users, self.items), published)


def in_cities(batch, lists):
    cities = RaggedRows.of([np.array(part, np.int32) for part in lists])
    return replace(batch, live=replace(batch.live, cities=cities))


def front(channel, items, k):
    return channel.recall_batch(random_batch(items, 3, 1), np.array([k], np.int32)).query(0)


def test_popular_ranks_by_decayed_likes_and_ends_with_what_nobody_liked():
    times = np.array([100 * DAY, 100 * DAY, 70 * DAY, 40 * DAY], np.int64)
    liked = Interactions(
        2, 4, np.array([0, 2, 4]), np.array([2, 1, 2, 3], np.int32), np.array([1, 3, 1, 4], np.float32), times
    )
    answer = front(built_channel(Popular, liked, half_life_days=30.0), 4, 4)
    assert answer.rows.tolist() == [1, 2, 3, 0]
    assert answer.scores.tolist() == pytest.approx([3.0, 1.5, 1.0, 0.0])


def test_fresh_is_newest_first_and_leaves_out_the_undated():
    published = {"published_at": np.array([5 * DAY, -1, 9 * DAY], np.int64)}
    channel = built_channel(Fresh, interactions_of([[0]], items=3), published)
    answer = newest(channel, now=10 * DAY)
    assert answer.rows.tolist() == [2, 0]
    assert answer.scores.tolist() == [-1.0, -5.0]  # minus the age in days
    assert newest(channel, now=8 * DAY).rows.tolist() == [0], "what is not published yet is not there yet"


def newest(channel, now, k=9):
    batch = random_batch(1, 3, 1, now=now)
    return channel.recall_batch(batch, np.array([k], np.int32)).query(0)


def test_fresh_takes_in_what_is_published_and_lets_go_of_what_is_taken_down():
    columns = ItemColumns(2)
    columns.set("published_at", np.array([5, 9]) * DAY)
    channel = built_channel(Fresh, interactions_of([[0]], 2), columns=columns, max_age_days=6)
    columns.grow(4)
    columns.published_at[2] = 7 * DAY
    columns.available[1] = False
    channel.update(np.array([1, 2, 3], np.int32))
    assert newest(channel, now=11 * DAY).rows.tolist() == [2, 0]
    assert newest(channel, now=12 * DAY).rows.tolist() == [2], "above six days"


def popular_by(by, columns, **options):
    # Item 0 is liked three times, 1 twice, 2 and 3 once, 4 never.
    liked = interactions_of([[0, 1, 2, 3], [0, 1], [0]], items=5)
    return built_channel(Popular, liked, columns=columns, by=by, half_life_days=1e9, **options)


def test_popular_by_city_weighs_the_current_city_more():
    columns = ItemColumns(5)
    columns.set("cities", np.array([0, 0, 1, -1, 1]))
    channel = popular_by("city", columns, past_weight=0.25)
    batch = in_cities(random_batch(1, 3, 3), [[1, 0], [0], [7]])
    answer = channel.recall_batch(batch, np.full(3, 9, np.int32))
    assert answer.query(0).rows.tolist() == [2, 0, 1]
    assert answer.query(0).scores.tolist() == pytest.approx([1.0, 0.75, 0.5])
    assert answer.query(1).rows.tolist() == [0, 1], "what nobody liked is not popular anywhere"
    assert answer.query(2).rows.tolist() == []
    assert set(answer.triggers.tolist()) == {-1}


def test_popular_by_category_follows_the_tags_of_the_history():
    columns = ItemColumns(5)
    # Tags: item 0 has 0, item 1 has 1, item 2 has 0 and 1 and 1 again, item 3 has 2.
    columns.set_tags(np.array([0, 1, 2, 5, 6, 6]), np.array([0, 1, 0, 1, 1, 2], np.int32))
    history = History(
        np.array([0, 3], np.int32), np.array([2, 1], np.float32), np.zeros(2, np.int64), np.array([0, 2])
    )
    batch = QueryBatch.plain(np.zeros(1, np.int32), history)
    answer = popular_by("category", columns).recall_batch(batch, np.array([9], np.int32))
    # Tag 0 weighs 2, tag 2 weighs 1: item 0 has 2 x 3, item 2 has 2 x 1, item 3 has 1 x 1.
    assert answer.rows.tolist() == [0, 2, 3]
    assert answer.scores.tolist() == pytest.approx([6.0, 2.0, 1.0])
    few = popular_by("category", columns, groups=1, kept=1)
    assert few.recall_batch(batch, np.array([9], np.int32)).rows.tolist() == [0]


@pytest.mark.parametrize("by", ["city", "category"])
def test_popular_by_a_column_that_is_not_there_is_empty(by):
    channel = built_channel(Popular, interactions_of([[0]], items=3), by=by)
    batch = in_cities(random_batch(3, 3, 1), [[0]])
    assert channel.recall_batch(batch, np.array([9], np.int32)).rows.size == 0


def test_fresh_without_the_column_is_empty_not_an_error():
    assert front(built_channel(Fresh, interactions_of([[0]], items=3)), 3, 3).rows.size == 0
