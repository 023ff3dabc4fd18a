"""Sources of negatives draw what they say, and what a user has is found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from engine.core.errors import BuildError
from engine.core.interactions import Interactions
from engine.models.options import TrainingOptions
from engine.training.negatives import (
    AliasTable,
    ClusterNegatives,
    Owned,
    RejectNegatives,
    StreamingFrequency,
    log_expected,
)


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1000)).filter(lambda w: w.sum() > 0))
def test_an_alias_table_has_the_probabilities_it_was_made_from(weights):
    table = AliasTable(weights)
    n = weights.size
    # The probability of i is its own cell's share and what other cells pass on to it.
    found = np.bincount(table._alias, 1 - table._cut, minlength=n) + table._cut
    assert found / n == pytest.approx(weights / weights.sum(), abs=1e-9)


def test_an_alias_table_draws_in_proportion():
    drawn = AliasTable(np.array([1.0, 0.0, 3.0])).draw(np.random.default_rng(0), (100, 400))
    assert drawn.dtype == np.int32
    assert np.bincount(drawn.ravel(), minlength=3) / drawn.size == pytest.approx([0.25, 0, 0.75], abs=0.01)
    with pytest.raises(BuildError, match="nothing to draw"):
        AliasTable(np.zeros(3))


def test_cluster_negatives_stay_in_the_cluster_and_follow_popularity():
    clusters = np.array([2, 0, 2, 0, 2, 5], np.int32)
    source = ClusterNegatives(clusters, np.array([1.0, 0.0, 3.0, 0.0, 0.0, 1.0]))
    positives = np.array([0, 1, 5], np.int32)
    drawn = source.draw(np.random.default_rng(0), positives, 2000)
    assert np.array_equal(clusters[drawn], np.broadcast_to(clusters[positives][:, None], drawn.shape))
    assert np.mean(drawn[0] == 2) == pytest.approx(0.75, abs=0.05)
    assert set(drawn[1]) == {1, 3}  # nobody likes them: alike


def interactions(lists, items):
    indptr = np.concatenate([[0], np.cumsum([len(mine) for mine in lists])]).astype(np.int64)
    rows = np.array([row for mine in lists for row in mine], np.int32)
    return Interactions(
        len(lists), items, indptr, rows, np.ones(rows.size, np.float32), np.zeros(rows.size, np.int64)
    )


def test_rejects_are_the_users_own():
    source = RejectNegatives(interactions([[1, 2], [], [3]], 5))
    rows, found = source.draw(np.random.default_rng(0), np.array([0, 1, 2], np.int32), 50)
    assert found.tolist() == [True, False, True]
    assert set(rows[0]) == {1, 2}
    assert set(rows[2]) == {3}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_a_user_has_is_found_among_negatives(data):
    items = 12
    lists = data.draw(st.lists(st.lists(st.integers(0, items - 1), unique=True), min_size=1, max_size=5))
    owned = Owned.of(interactions(lists, items))
    users = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=6)), np.int32)
    shared = np.array(data.draw(st.lists(st.integers(0, items - 1), max_size=8)), np.int32)
    wanted = np.array([[row in lists[u] for row in shared] for u in users], bool).reshape(
        users.size, shared.size
    )
    assert np.array_equal(owned.shared(users, shared), wanted)
    assert np.all(owned.slots == -1)
    assert np.array_equal(owned.own(users, np.broadcast_to(shared, wanted.shape)), wanted)


def test_streaming_frequency_learns_how_often_an_item_comes():
    random = np.random.default_rng(0)
    share = np.array([0.9, 0.5, 0.1])
    streaming = StreamingFrequency(3)
    for _ in range(4000):
        streaming.update(np.flatnonzero(random.random(3) < share).astype(np.int32))
    assert streaming.probabilities(np.arange(3, dtype=np.int32)) == pytest.approx(share, rel=0.4)


def test_expected_draws_add_up_over_sources():
    found = log_expected([(10, np.array([0.1, 0.0])), (4, np.array([0.25, 0.5]))])
    assert np.exp(found) == pytest.approx([2.0, 2.0])


def test_exposed_is_refused_with_the_reason():
    with pytest.raises(ValidationError, match="nearly what the user wants"):
        TrainingOptions(negatives={"exposed": 2})
    with pytest.raises(ValidationError, match="no source"):
        TrainingOptions(negatives={"popular": 0})
    assert TrainingOptions(negatives={}, loss="full_softmax").negatives == {}
