from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.swing import Swing, SwingOptions, swing_neighbours, swing_reference
from engine.core.channel import SilentProgress
from engine.core.errors import BuildError
from engine.core.types import RaggedRows
from engine.testing import ChannelContract, built_channel, interactions_of, random_batch, tiny_interactions


class TestContract(ChannelContract):
    def channel(self):
        return built_channel(Swing, tiny_interactions(self.users, self.items), top_k=5)


def similarities(liked, **options):
    config = SwingOptions(**options)
    matrix = np.zeros((liked.items, liked.items))
    row = 0
    for block in swing_neighbours(liked.indptr, liked.rows, liked.items, config, 2, SilentProgress()):
        at = 0
        for length in block.lengths.tolist():
            matrix[row, block.neighbours[at : at + length]] = block.similarities[at : at + length]
            at, row = at + length, row + 1
    return matrix


def dense(liked):
    matrix = np.zeros((liked.users, liked.items))
    for u in range(liked.users):
        matrix[u, liked.rows[liked.indptr[u] : liked.indptr[u + 1]]] = 1
    return matrix


@given(
    seed=st.integers(0, 5000),
    alpha=st.sampled_from([0.0, 1.0, 5.0]),
    user_exponent=st.sampled_from([0.0, 0.5, 1.0]),
    exponents=st.sampled_from([(0.0, 0.0), (0.5, 0.25)]),
    single_users=st.sampled_from([0.0, 0.5, 2.0]),
    normalize=st.sampled_from(["none", "sum"]),
    amplification=st.sampled_from([1.0, 0.5]),
)
@settings(deadline=None, max_examples=60)
def test_the_kernel_does_what_its_plain_twin_does(
    seed, alpha, user_exponent, exponents, single_users, normalize, amplification
):
    liked = tiny_interactions(users=12, items=9, seed=seed)
    options = {
        "alpha": alpha,
        "user_exponent": user_exponent,
        "source_exponent": exponents[0],
        "target_exponent": exponents[1],
        "single_users": single_users,
        "normalize": normalize,
        "amplification": amplification,
    }
    wanted = swing_reference(dense(liked), SwingOptions(**options))
    np.testing.assert_allclose(similarities(liked, **options), wanted, rtol=1e-5)


def test_the_paper_s_formula_by_hand():
    # Items 0 and 1 are shared by users 0, 1 and 2; users 0 and 1 share item 2 besides.
    liked = interactions_of([[0, 1, 2], [0, 1, 2], [0, 1]], items=3)
    w = [3**-0.5, 3**-0.5, 2**-0.5]
    pairs = w[0] * w[1] / (1 + 3) + w[0] * w[2] / (1 + 2) + w[1] * w[2] / (1 + 2)
    assert similarities(liked)[0, 1] == pytest.approx(pairs)


def test_items_that_share_a_single_user_are_neighbours_only_where_the_option_says_so():
    liked = interactions_of([[0, 1], [0], [1]], items=2)
    assert similarities(liked)[0, 1] == 0
    assert similarities(liked, single_users=0.5)[0, 1] == pytest.approx(0.5 * (1 / 2) / (1 + 1))


def test_a_small_circle_says_less_than_strangers():
    # Two users who share ten items back 0-1; two who share nothing else back 0-2.
    circle = list(range(10, 20))
    liked = interactions_of(
        [[0, 1, *circle], [0, 1, *circle], [0, 2, *range(20, 30)], [0, 2, *range(30, 40)]], 40
    )
    got = similarities(liked)
    assert got[0, 2] > got[0, 1] > 0


def test_trusting_active_users_more_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        SwingOptions(user_exponent=-0.35)


def test_caps_bound_the_work_and_are_seeded():
    liked = tiny_interactions(users=200, items=30, seed=3)
    options = {"max_users_per_item": 5, "max_items_per_user": 4}
    first, again = similarities(liked, **options), similarities(liked, **options)
    other = similarities(liked, **options, seed=2)
    assert (first == again).all()
    assert (first != other).any()
    assert (first > 0).sum() < (similarities(liked) > 0).sum()


def test_caps_that_nobody_reaches_change_nothing():
    liked = tiny_interactions(seed=4)
    wanted = similarities(liked)
    assert (similarities(liked, max_users_per_item=60, max_items_per_user=40) == wanted).all()


@pytest.mark.parametrize("likes", [[[0]], [[0, 1, 2]], [[0], [0], [0]]])
def test_one_user_or_one_item_builds(likes):
    built_channel(Swing, interactions_of(likes, items=3))


def test_nobody_likes_anything_is_an_error():
    with pytest.raises(BuildError, match="swing: no event"):
        built_channel(Swing, interactions_of([[], []], items=3))


def test_more_like_an_item_starts_from_the_request_not_from_the_history():
    # Users who like 0 like 1 too; nobody likes 2 and another.
    channel = built_channel(Swing, interactions_of([[0, 1], [0, 1], [2]], items=3), source="trigger")
    batch = random_batch(3, 3, 3)
    triggers = RaggedRows.of([np.array(part, np.int32) for part in ([1], [2, 0], [])])
    answer = channel.recall_batch(replace(batch, triggers=triggers), np.full(3, 9, np.int32))
    assert [answer.query(q).rows.tolist() for q in range(3)] == [[0], [1], []]
    assert answer.triggers.tolist() == [1, 0]
