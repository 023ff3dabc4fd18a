from dataclasses import replace

import numpy as np
import pytest

from channels.itemcf import SECONDS_PER_DAY, ItemCF, ItemCFOptions, itemcf_neighbours
from engine.core.channel import SilentProgress
from engine.core.errors import BuildError
from engine.core.interactions import Interactions
from engine.core.query import History, QueryBatch
from engine.core.types import RaggedRows
from engine.testing import ChannelContract, built_channel, interactions_of, random_batch, tiny_interactions

# Users like: 0 -> {0, 1}, 1 -> {0, 1, 2}, 2 -> {1, 2}, 3 -> {3}.
HAND = interactions_of([[0, 1], [0, 1, 2], [1, 2], [3]], items=4)


class TestContract(ChannelContract):
    def channel(self):
        return built_channel(ItemCF, tiny_interactions(self.users, self.items), top_k=5)


def similarities(liked, now=1_000_000, **options):
    config = ItemCFOptions(**options)
    found = {}
    row = 0
    for block in itemcf_neighbours(liked, config, now, 2, SilentProgress()):
        at = 0
        for length in block.lengths.tolist():
            part = slice(at, at + length)
            pairs = zip(block.neighbours[part].tolist(), block.similarities[part].tolist(), strict=True)
            found[row] = dict(pairs)
            at, row = at + length, row + 1
    return found


def test_the_default_is_the_cosine_of_the_course():
    got = similarities(HAND)
    assert got[0] == pytest.approx({1: 2 / np.sqrt(2 * 3), 2: 1 / np.sqrt(2 * 2)})
    assert got[1] == pytest.approx({0: 2 / np.sqrt(3 * 2), 2: 2 / np.sqrt(3 * 2)})
    assert got[3] == {}


def test_interest_scores_weigh_as_the_course_says():
    # User 0 gives item 0 three points and item 1 one; user 1 gives both two.
    liked = Interactions(
        2,
        2,
        np.array([0, 2, 4]),
        np.array([0, 1, 0, 1], np.int32),
        np.array([3, 1, 2, 2], np.float32),
        np.zeros(4, np.int64),
    )
    assert similarities(liked)[0] == pytest.approx({1: (3 * 1 + 2 * 2) / (np.sqrt(9 + 4) * np.sqrt(1 + 4))})


def test_active_users_say_less_where_the_option_says_so():
    got = similarities(HAND, activity_exponent=1.0, source_exponent=0.0, target_exponent=0.0)
    assert got[0] == pytest.approx({1: 1 / 2 + 1 / 3, 2: 1 / 3})


def test_exponents_shrinkage_and_amplification_follow_the_formula():
    got = similarities(HAND, source_exponent=1.0, target_exponent=0.25, shrinkage=2.0, amplification=0.5)
    assert got[0][1] == pytest.approx((2 / 3**0.25 * 2 / (2 + 2)) ** 0.5 / 2)


def test_normalising_gives_every_trigger_the_same_say():
    got = similarities(HAND, normalize="sum", source_exponent=0.0)
    assert [sum(got[i].values()) for i in range(3)] == pytest.approx([1, 1, 1])
    plain = similarities(HAND, source_exponent=0.0)
    assert got[0][1] == pytest.approx(plain[0][1] / sum(plain[0].values()))


def test_an_old_like_counts_less():
    liked = interactions_of([[0, 1]], items=2)
    day = SECONDS_PER_DAY
    old = Interactions(
        1, 2, liked.indptr, liked.rows, liked.weights, np.array([1_000_000, 1_000_000 - 2 * day], np.int64)
    )
    got = similarities(old, half_life_days=1.0, source_exponent=0.0, target_exponent=0.0)
    assert got[0] == pytest.approx({1: 1.0 * 0.25})


def test_only_the_best_neighbours_are_kept_ties_by_row():
    got = similarities(HAND, neighbours=1)
    assert list(got[1]) == [0]


def test_online_the_scores_of_an_item_reached_twice_add_up():
    channel = built_channel(ItemCF, HAND, top_k=10)
    batch = random_batch(4, 4, 1)
    history = batch.history.__class__(
        np.array([0, 2], np.int32), np.array([1, 3], np.float32), np.zeros(2, np.int64), np.array([0, 2])
    )
    batch = batch.plain(np.array([0], np.int32), history)
    answer = channel.recall_batch(batch, np.array([10], np.int32)).query(0)
    scores = dict(zip(answer.rows.tolist(), answer.scores.tolist(), strict=True))
    assert scores[1] == pytest.approx(1 * 2 / np.sqrt(6) + 3 * 2 / np.sqrt(6))
    assert answer.triggers[answer.rows.tolist().index(1)] == 2


def test_an_older_trigger_counts_less_where_the_option_says_so():
    channel = built_channel(ItemCF, HAND, top_k=10, recency_half_life=1.0)
    rows = np.array([3, 0, 2, 0], np.int32)  # two queries: 3, 0, 2 and 0 alone
    history = History(rows, np.ones(4, np.float32), np.zeros(4, np.int64), np.array([0, 3, 4]))
    batch = QueryBatch.plain(np.array([0, 1], np.int32), history)
    answer = channel.recall_batch(batch, np.array([10, 10], np.int32))
    first, second = answer.query(0), answer.query(1)
    scores = dict(zip(first.rows.tolist(), first.scores.tolist(), strict=True))
    assert scores[1] == pytest.approx(0.5 * 2 / np.sqrt(6) + 0.25 * 2 / np.sqrt(6))
    assert dict(zip(second.rows.tolist(), second.scores.tolist(), strict=True))[1] == pytest.approx(
        2 / np.sqrt(6)
    )


def test_last_n_and_top_k_bound_the_gather():
    channel = built_channel(ItemCF, tiny_interactions(), last_n=1, top_k=1)
    batch = random_batch(40, 60, 5)
    assert np.diff(channel.recall_batch(batch, np.full(5, 40, np.int32)).offsets).max() <= 1


@pytest.mark.parametrize("likes", [[[0]], [[0, 1, 2]], [[0], [0], [0]]])
def test_one_user_or_one_item_builds(likes):
    built_channel(ItemCF, interactions_of(likes, items=3))


def test_nobody_likes_anything_is_an_error():
    with pytest.raises(BuildError, match="itemcf: no event"):
        built_channel(ItemCF, interactions_of([[], []], items=3))


def test_more_like_an_item_starts_from_the_request_not_from_the_history():
    # Users who like 0 like 1 too; nobody likes 2 and another.
    channel = built_channel(ItemCF, interactions_of([[0, 1], [0, 1], [2]], items=3), source="trigger")
    batch = random_batch(3, 3, 3)
    triggers = RaggedRows.of([np.array(part, np.int32) for part in ([1], [2, 0], [])])
    answer = channel.recall_batch(replace(batch, triggers=triggers), np.full(3, 9, np.int32))
    assert [answer.query(q).rows.tolist() for q in range(3)] == [[0], [1], []]
    assert answer.triggers.tolist() == [1, 0]
