"""The metrics: the kernel held to a plain twin, and to numbers worked out on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.types import RaggedRows
from engine.offline.metrics import hit_matrix, long_tail, overlap_share, ranking_metrics, tail_recall
from engine.testing.world import interactions_of

LOG3 = math.log2(3)


def ragged(lists):
    return RaggedRows.of([np.array(part, np.int32) for part in lists])


@st.composite
def evaluations(draw):
    items, users = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    row = st.integers(0, items - 1)
    lists = [draw(st.lists(row, unique=True)) for _ in range(users)]
    truth = [draw(st.lists(row, unique=True, min_size=1)) for _ in range(users)]
    cuts = draw(st.lists(st.integers(1, 15), min_size=1, max_size=4))
    return items, lists, truth, cuts


def plain(items, lists, truth, cuts):
    found = {}
    for k in cuts:
        recall, ndcg, hit, precision, f, shown = [], [], [], [], [], set()
        for ranked, wanted in zip(lists, truth, strict=True):
            places = [place for place, row in enumerate(ranked[:k]) if row in wanted]
            ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
            recall.append(len(places) / len(wanted))
            ndcg.append(sum(1 / math.log2(place + 2) for place in places) / ideal)
            hit.append(bool(places))
            precision.append(len(places) / k)
            both = precision[-1] + recall[-1]
            f.append(2 * precision[-1] * recall[-1] / both if both else 0.0)
            shown |= set(ranked[:k])
        means = {"recall": recall, "ndcg": ndcg, "hit": hit, "precision": precision, "f": f}
        for name, values in means.items():
            found[f"{name}@{k}"] = sum(values) / len(values)
        found[f"coverage@{k}"] = len(shown) / items
    return found


@given(world=evaluations())
@settings(deadline=None, max_examples=200)
def test_the_kernel_does_what_its_plain_twin_does(world):
    items, lists, truth, cuts = world
    got = ranking_metrics(ragged(lists), ragged(truth), items, cuts)
    assert got == pytest.approx(plain(items, lists, truth, cuts), abs=1e-12)
    assert all(0 <= value <= 1 + 1e-12 for value in got.values())


@given(world=evaluations())
@settings(deadline=None, max_examples=100)
def test_shares_and_hits_are_what_sets_say(world):
    _, lists, truth, _ = world
    hits = hit_matrix(ragged(lists), ragged(truth))
    wanted = [float(row in mine) for mine, rows in zip(lists, truth, strict=True) for row in rows]
    assert hits.tolist() == wanted
    entries = [(user, row) for user, mine in enumerate(lists) for row in mine]
    shared = [row in truth[user] for user, row in entries]
    assert overlap_share(ragged(lists), ragged(truth)) == pytest.approx(
        sum(shared) / len(shared) if shared else 0.0
    )


def test_the_definitions_by_hand():
    # Two users of a catalogue of 10. The first has hits at ranks 1 and 3, the second none.
    lists = ragged([[7, 1, 8, 2], [3, 4]])
    truth = ragged([[7, 8, 9], [0]])
    got = ranking_metrics(lists, truth, 10, [1, 3])
    assert got == pytest.approx(
        {
            "recall@1": (1 / 3) / 2,
            "ndcg@1": 1 / 2,
            "hit@1": 1 / 2,
            "precision@1": 1 / 2,
            "f@1": (2 * 1 * (1 / 3) / (1 + 1 / 3)) / 2,
            "coverage@1": 2 / 10,
            "recall@3": (2 / 3) / 2,
            "ndcg@3": (1 + 1 / 2) / (1 + 1 / LOG3 + 1 / 2) / 2,
            "hit@3": 1 / 2,
            "precision@3": (2 / 3) / 2,
            "f@3": (2 / 3) / 2,
            "coverage@3": 5 / 10,
        }
    )


def test_precision_counts_the_places_of_a_list_that_is_short_and_f_is_a_mean_of_users():
    got = ranking_metrics(ragged([[7], [0, 1]]), ragged([[7, 8], [5]]), 10, [2])
    assert got["precision@2"] == pytest.approx((1 / 2 + 0) / 2)
    assert got["f@2"] == pytest.approx((2 * (1 / 2) * (1 / 2) / (1 / 2 + 1 / 2) + 0) / 2)


def test_the_ideal_list_is_no_longer_than_the_cut():
    assert ranking_metrics(ragged([[0, 1]]), ragged([[0, 1, 2, 3]]), 4, [2])["ndcg@2"] == pytest.approx(1.0)


def test_the_ideal_list_is_no_longer_than_the_truth():
    assert ranking_metrics(ragged([[0, 1, 2]]), ragged([[0]]), 3, [3])["ndcg@3"] == pytest.approx(1.0)


def test_a_list_that_ends_before_the_cut_counts_as_it_is():
    short = ranking_metrics(ragged([[0], []]), ragged([[0, 1], [1]]), 2, [1, 5, 20])
    assert short["recall@20"] == short["recall@5"] == short["recall@1"] == 0.25
    assert short["coverage@20"] == 0.5


def test_the_order_of_the_cuts_and_of_the_truth_does_not_matter():
    lists = ragged([[5, 3, 1], [2, 4]])
    one = ranking_metrics(lists, ragged([[1, 3], [4]]), 6, [1, 2, 3])
    other = ranking_metrics(lists, ragged([[3, 1], [4]]), 6, [3, 1, 2])
    assert one == other


def test_overlap_of_nothing_is_none():
    assert overlap_share(ragged([[], []]), ragged([[1], [2]])) == 0.0
    assert overlap_share(ragged([[1], [2]]), ragged([[1], [1]])) == 0.5


@given(world=evaluations(), popular=st.integers(0, 12))
@settings(deadline=None, max_examples=100)
def test_the_long_tails_recall_is_that_of_its_truth_alone(world, popular):
    items, lists, truth, cuts = world
    tail = np.arange(items) >= popular
    got = tail_recall(ragged(lists), ragged(truth), tail, cuts)
    for k in cuts:
        each = []
        for ranked, wanted in zip(lists, truth, strict=True):
            rare = {row for row in wanted if tail[row]}
            if rare:
                each.append(len(rare & set(ranked[:k])) / len(rare))
        assert got[f"tail@{k}"] == pytest.approx(sum(each) / max(len(each), 1))


def test_the_fifth_that_most_like_is_no_long_tail():
    # Item 9 has three likes, 0 and 4 have two, the others one or none; of equals the lower row is popular.
    lists = [[9, 4, 0], [9, 0], [9, 4, 1, 2, 3]]
    assert np.flatnonzero(~long_tail(interactions_of(lists, 11))).tolist() == [0, 9]
    assert long_tail(interactions_of([[0]], 4)).all()
