import numpy as np
import pytest

from channels.usercf import UserCF
from engine.core.errors import BuildError
from engine.core.query import History, QueryBatch
from engine.testing import ChannelContract, built_channel, interactions_of, tiny_interactions

# Items: 0 is liked by everybody, 1 by users 0 and 1, 2 by user 1, 3 by user 2, 4 by user 3.
HAND = interactions_of([[0, 1], [2, 1, 0], [3, 0], [4]], items=5)


class TestContract(ChannelContract):
    def channel(self):
        return built_channel(UserCF, tiny_interactions(self.users, self.items))


def ask(channel, user):
    batch = QueryBatch.plain(np.array([user], np.int32), History.empty(1))
    return channel.recall_batch(batch, np.array([10], np.int32)).query(0)


def test_similarity_and_score_are_the_course_s():
    answer = ask(built_channel(UserCF, HAND), 0)
    scores = dict(zip(answer.rows.tolist(), answer.scores.tolist(), strict=True))
    with_one = (1 / np.log1p(3) + 1 / np.log1p(2)) / np.sqrt(2 * 3)
    with_two = (1 / np.log1p(3)) / np.sqrt(2 * 2)
    assert scores[2] == pytest.approx(with_one)
    assert scores[3] == pytest.approx(with_two)
    assert scores[0] == pytest.approx(with_one + with_two)
    assert 4 not in scores


def test_the_trigger_is_the_user_who_gave_most():
    answer = ask(built_channel(UserCF, HAND), 0)
    assert dict(zip(answer.rows.tolist(), answer.triggers.tolist(), strict=True)) == {0: 1, 1: 1, 2: 1, 3: 2}


def test_last_n_takes_the_newest_items_of_a_similar_user():
    answer = ask(built_channel(UserCF, HAND, last_n=1), 0)
    assert sorted(answer.rows.tolist()) == [2, 3]


def test_top_k_bounds_the_users_asked():
    answer = ask(built_channel(UserCF, HAND, top_k=1), 0)
    assert sorted(answer.rows.tolist()) == [0, 1, 2]


def test_a_popular_item_scores_less_where_the_option_says_so():
    plain = ask(built_channel(UserCF, HAND), 0)
    damped = ask(built_channel(UserCF, HAND, candidate_exponent=1.0), 0)
    before = dict(zip(plain.rows.tolist(), plain.scores.tolist(), strict=True))
    after = dict(zip(damped.rows.tolist(), damped.scores.tolist(), strict=True))
    assert after[0] == pytest.approx(before[0] / 3)
    assert after[2] == pytest.approx(before[2])


def test_an_unknown_user_gets_nothing():
    assert ask(built_channel(UserCF, HAND), -1).rows.size == 0


def test_nobody_likes_anything_is_an_error():
    with pytest.raises(BuildError, match="usercf: no event"):
        built_channel(UserCF, interactions_of([[], []], items=3))
