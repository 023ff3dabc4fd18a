import numpy as np
import pytest

from channels.fresh import Fresh
from channels.popular import Popular
from engine.core.interactions import Interactions
from engine.testing import ChannelContract, built_channel, interactions_of, random_batch, tiny_interactions

DAY = 86_400


class TestPopularContract(ChannelContract):
    def channel(self):
        return built_channel(Popular, tiny_interactions(self.users, self.items))


class TestFreshContract(ChannelContract):
    def channel(self):
        published = {"published_at": np.arange(self.items, dtype=np.int64) * DAY}
        return built_channel(Fresh, tiny_interactions(self.users, self.items), published)


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
    answer = front(built_channel(Fresh, interactions_of([[0]], items=3), published), 3, 3)
    assert answer.rows.tolist() == [2, 0]


def test_fresh_without_the_column_is_empty_not_an_error():
    assert front(built_channel(Fresh, interactions_of([[0]], items=3)), 3, 3).rows.size == 0
