"""Divide and conquer: what it answers, quotas against plain twins, how the corpus is cut, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_two_tower import with_words
from two_tower_world import SMALL, loaded, written

from channels.divide_and_conquer import DivideAndConquer, DivideAndConquerOptions
from channels.divide_and_conquer.quotas import (
    allot,
    allot_reference,
    begins_of,
    interleave,
    interleave_reference,
    sharpen,
)
from channels.divide_and_conquer.search import (
    by_cluster,
    by_cluster_reference,
    pass_over_reference,
    passed,
)
from channels.two_tower import TwoTowerOptions
from engine.core.errors import SnapshotError
from engine.core.query import History, QueryBatch
from engine.core.types import RaggedRows
from engine.testing import ChannelContract
from engine.testing.world import catalogue_columns, random_batch, random_columns, tiny_interactions

CLUSTERS = (np.arange(40) * 7 % 3).astype(np.int32)
SASREC = {**SMALL, "sequence": {"kind": "sasrec", "width": 8, "length": 6}, "metric": "inner"}


def world(seed=0, **options):
    liked = tiny_interactions(60, 40)
    columns = random_columns(40, seed=1)
    options = {**SASREC, **options}
    item_columns = with_words(catalogue_columns(columns))
    arrays = written(liked, item_columns, seed=seed, kind=DivideAndConquer, clusters=CLUSTERS, **options)
    return columns, arrays, options


def channel_of(**more):
    columns, arrays, options = world(**more)
    return loaded(arrays, 60, 40, columns, kind=DivideAndConquer, **options)


class TestSasrec(ChannelContract):
    def channel(self):
        return channel_of()


class TestMeanOfItems(ChannelContract):
    def channel(self):
        return channel_of(sequence={"kind": "mean", "width": 8, "length": 6}, metric="cosine")


class TestTheSameOfEveryCluster(ChannelContract):
    def channel(self):
        return channel_of(alpha=0)


def shares_of(channel, batch):
    tower, users = channel._tower, channel._queries.encode(batch)
    shares = tower.intent(tower.vectors(users, np.full(len(batch), 3, np.int32)))
    sharpen(shares, np.float32(channel.config.alpha))
    return users, shares


def test_each_cluster_gives_its_quota_of_those_nearest_under_its_prompt():
    channel = channel_of(alpha=0.7, pass_over_history=False)
    batch = random_batch(40, 60, 6)
    answer = channel.recall_batch(batch, np.full(6, 9, np.int32))
    users, shares = shares_of(channel, batch)
    available = channel._columns.available
    room = np.bincount(CLUSTERS[available], minlength=3)
    for q in range(6):
        mine = answer.query(q)
        quotas = allot_reference(shares[q], room, 9)
        assert np.bincount(CLUSTERS[mine.rows], minlength=3).tolist() == quotas
        for cluster in range(3):
            products = (
                channel._tower.vectors(users, np.full(6, cluster, np.int32))[q] @ channel._model.vectors.T
            )
            rows = np.flatnonzero(available & (cluster == CLUSTERS))
            best = rows[np.argsort(-products[rows], kind="stable")][: quotas[cluster]]
            assert mine.rows[CLUSTERS[mine.rows] == cluster].tolist() == best.tolist()


def test_a_batch_is_its_queries_alone_bit_for_bit():
    channel = channel_of()
    batch = random_batch(40, 60, 7)
    k = np.array([5, 0, 12, 1, 40, 7, 3], np.int32)
    together = channel.recall_batch(batch, k)
    for q in range(7):
        one, mine = channel.recall_batch(batch.alone(q), k[q : q + 1]), together.query(q)
        assert (one.rows.tobytes(), one.scores.tobytes()) == (mine.rows.tobytes(), mine.scores.tobytes())
        assert one.triggers.tolist() == mine.triggers.tolist()


def test_everything_that_may_be_recalled_is_where_it_is_asked_for():
    channel = channel_of(pass_over_history=False)
    answer = channel.recall_batch(random_batch(40, 60, 3), np.full(3, 40, np.int32))
    expected = np.flatnonzero(channel._columns.available).tolist()
    for q in range(3):
        assert sorted(answer.query(q).rows.tolist()) == expected


def test_what_is_taken_down_costs_no_place():
    channel = channel_of()
    batch = random_batch(40, 60, 3)
    best = channel.recall_batch(batch, np.full(3, 5, np.int32)).rows[:1]
    channel._columns.put("available", best, np.zeros(1, np.bool_))
    channel.update(best)
    after = channel.recall_batch(batch, np.full(3, 5, np.int32))
    assert best[0] not in after.rows
    assert np.diff(after.offsets).tolist() == [5, 5, 5]


def test_a_new_item_goes_to_the_cluster_whose_centre_is_nearest():
    channel = channel_of(pass_over_history=False)
    columns = channel._columns
    columns.grow(42)
    new = np.array([41, 40], np.int32)
    columns.put("quality", new, np.array([0.9, 0.2], np.float32))
    columns.put("authors", new, np.array([1, 2], np.int32))
    channel.update(new)
    vectors = channel._new.arrays[1][channel._new.arrays[0][new]]
    expected = (vectors @ channel._search._centres.T).argmax(1)
    assert channel._search._clusters[new].tolist() == expected.tolist()
    answer = channel.recall_batch(random_batch(40, 60, 4), np.full(4, 42, np.int32))
    assert [(answer.rows == row).sum() for row in new] == [4, 4]
    # It changes, and stays where it is, once.
    columns.put("quality", new[:1], np.array([0.4], np.float32))
    channel.update(new[:1])
    answer = channel.recall_batch(random_batch(40, 60, 4), np.full(4, 42, np.int32))
    assert (answer.rows == 41).sum() == 4
    assert channel._search._clusters[41] == expected[0]


def test_guests_are_answered():
    answer = channel_of().recall_batch(
        QueryBatch.plain(np.full(2, -1, np.int32), History.empty(2)), np.full(2, 4, np.int32)
    )
    assert np.diff(answer.offsets).tolist() == [4, 4]
    assert set(answer.triggers.tolist()) == {-1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clusters": None}, "no clusters of 40 items"),
        ({"clusters": CLUSTERS + np.int32(1)}, "none of 3"),
        ({"cluster.1.vectors": None}, "not the vectors of the cluster"),
        ({"user.intent.weight": None}, "intent.weight"),
    ],
)
def test_a_bundle_that_does_not_fit_together_is_refused(change, says):
    columns, arrays, options = world()
    arrays = {name: array for name, array in {**arrays, **change}.items() if array is not None}
    with pytest.raises(SnapshotError, match=says):
        loaded(arrays, 60, 40, columns, kind=DivideAndConquer, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clusters": 1}, "greater than or equal to 2"),
        ({"alpha": -1}, "greater than or equal to 0"),
        ({"sequence": {"kind": "comirec"}}, "cannot be prompted"),
        ({"sequence": {"kind": "mean", "item_exponent": 0.5}}, "cannot be prompted"),
        ({"training": {"negatives": {"reject": 1}}}, "rejects no kind of event"),
    ],
)
def test_options_that_cannot_work_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DivideAndConquerOptions.model_validate(options)


def test_hard_negatives_of_the_cluster_need_no_column():
    assert DivideAndConquerOptions.model_validate({"training": {"negatives": {"cluster": 1}}}).cluster == ""


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_quotas_and_their_order_are_those_of_the_plain_twins(seed):
    rng = np.random.default_rng(seed)
    n, clusters = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    # Few different shares, so that there are ties.
    shares = (rng.integers(1, 4, (n, clusters)) / np.float32(8)).astype(np.float32)
    room, k = rng.integers(0, 6, (n, clusters)), rng.integers(0, 15, n).astype(np.int32)
    quotas = np.zeros((n, clusters), np.int32)
    allot(shares, room, k, quotas)
    assert quotas.tolist() == [allot_reference(shares[q], room[q], int(k[q])) for q in range(n)]
    assert quotas.sum(1).tolist() == np.minimum(k, room.sum(1)).tolist()
    found = rng.permutation(int(quotas.sum())).astype(np.int32)
    begins = begins_of(quotas)
    counts = (quotas - (quotas * rng.random(quotas.shape) < 0.2) * (quotas > 0)).astype(np.int32)
    rows, scores, offsets = np.empty_like(found), np.empty(found.size, np.float32), np.empty(n + 1, np.int64)
    whole = interleave(found, begins, counts, shares, rows, scores, offsets)
    assert whole == counts.sum() == offsets[-1]
    for q in range(n):
        lists = [found[begins[q * clusters + c] :][: counts[q, c]].tolist() for c in range(clusters)]
        mine = slice(offsets[q], offsets[q + 1])
        expected = interleave_reference(lists, shares[q])
        assert list(zip(rows[mine].tolist(), scores[mine].tolist(), strict=True)) == expected
        assert (np.diff(scores[mine]) < 0).all()


@given(st.integers(0, 10_000), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_quota_is_about_its_share_and_never_shrinks_with_the_list(seed, k):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(4), 1).astype(np.float32)
    quotas = np.zeros((2, 4), np.int32)
    allot(np.repeat(shares, 2, 0), np.full((2, 4), 1000), np.array([k, k + 1], np.int32), quotas)
    assert (quotas[1] >= quotas[0]).all()
    # Webster's method leaves the range of rounding in rare cases, and then by little (Balinski and Young 1982).
    assert (np.abs(quotas[0] - k * shares[0]) < 2).all()


def test_alpha_sharpens_the_intent_or_levels_it():
    given_shares = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], np.float32)
    for alpha, expected in ((1.0, given_shares), (0.0, np.full((2, 3), 1 / 3)), (2.0, given_shares**2)):
        shares = given_shares.copy()
        sharpen(shares, np.float32(alpha))
        np.testing.assert_allclose(shares, expected / expected.sum(1, keepdims=True), atol=1e-5)


def test_a_table_given_in_part_keeps_the_channels_own_defaults():
    options = DivideAndConquerOptions.model_validate(
        {"sequence": {"length": 30}, "training": {"epochs": 3, "loss": "full_softmax"}}
    )
    assert (options.sequence.kind, options.sequence.length) == ("sasrec", 30)
    assert (options.training.batch, options.training.negatives) == (128, {"popular": 4096})
    assert (
        TwoTowerOptions.model_validate({"sequence": {"length": 30}}).sequence.kind
        == TwoTowerOptions().sequence.kind
        == "mean"
    )


@pytest.mark.parametrize("loss", ["bce", "hinge", "logistic", "nce"])
def test_negatives_drawn_for_each_positive_are_of_its_cluster(loss):
    training = DivideAndConquerOptions.model_validate({"training": {"loss": loss}}).training
    assert (training.negatives, training.batch) == ({"cluster": 2}, 128)
    named = {"loss": loss, "negatives": {"in_batch": 1}}
    assert DivideAndConquerOptions.model_validate({"training": named}).training.negatives == {"in_batch": 1}


def test_what_the_user_had_and_what_is_forbidden_costs_no_place():
    channel = channel_of(alpha=0.7)
    batch = random_batch(40, 60, 6)
    forbidden = [np.array(rows, np.int32) for rows in ([], [3, 4, 3], [0], [], list(range(40)), [39])]
    batch = replace(batch, excluded=RaggedRows.of(forbidden))
    answer = channel.recall_batch(batch, np.full(6, 9, np.int32))
    _, shares = shares_of(channel, batch)
    available = channel._columns.available
    for q in range(6):
        history = batch.history.rows[batch.history.offsets[q] : batch.history.offsets[q + 1]]
        free = available.copy()
        free[history] = free[forbidden[q]] = False
        mine = answer.query(q).rows
        assert free[mine].all()
        quotas = allot_reference(shares[q], np.bincount(CLUSTERS[free], minlength=3), 9)
        assert np.bincount(CLUSTERS[mine], minlength=3).tolist() == quotas


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_what_is_passed_over_is_that_of_the_plain_twins(seed):
    rng = np.random.default_rng(seed)
    n, count, items = int(rng.integers(1, 5)), int(rng.integers(1, 4)), int(rng.integers(1, 12))
    clusters = rng.integers(-1, count, items).astype(np.int32)
    local = rng.permutation(items).astype(np.int32)
    one, other = (
        RaggedRows.of([rng.integers(-1, items + 3, rng.integers(0, 6)).astype(np.int32) for _ in range(n)])
        for _ in range(2)
    )
    room = rng.integers(0, 9, count)
    marks, found = np.zeros(items, np.bool_), np.empty(one.rows.size + other.rows.size, np.int32)
    offsets, left = np.zeros(n + 1, np.int64), np.repeat(room[None], n, 0)
    passed(one.rows, one.offsets, other.rows, other.offsets, clusters, marks, found, offsets, left)
    assert not marks.any()
    lists = [found[offsets[q] : offsets[q + 1]].tolist() for q in range(n)]
    for q in range(n):
        mine = [each.rows[each.offsets[q] : each.offsets[q + 1]].tolist() for each in (one, other)]
        rows, expected = pass_over_reference(mine, clusters, room)
        assert (sorted(lists[q]), left[q].tolist()) == (sorted(rows), expected)
    quotas = rng.integers(0, 2, (n, count)).astype(np.int32)
    by, at = np.empty_like(found), np.zeros(n * count + 1, np.int64)
    by_cluster(found[: offsets[-1]], offsets, clusters, local, quotas, by, at)
    pairs = [by[at[pair] : at[pair + 1]].tolist() for pair in range(n * count)]
    assert pairs == by_cluster_reference(lists, clusters, local, quotas)
