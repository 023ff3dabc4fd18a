"""The clusters' lists while items move, and their merge: held to building from scratch and to sorting everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.streaming_vq.lists import SHORT, SPARE, ClusterLists, lists_reference
from channels.streaming_vq.merge import Merger, Scorer, merge_reference, sort_reference
from engine.ann.lists import in_bytes
from engine.core.types import RaggedRows
from engine.models.cluster_lists import sort_lists

BIASES = (-1.5, -0.25, 0.0, 0.25, 0.5, 2.0)


def lists_of(assignment, biases, clusters, short=SHORT):
    assignment, biases = np.array(assignment, np.int32), np.array(biases, np.float32)
    offsets, rows, places = sort_lists(assignment, biases, clusters)
    return ClusterLists(offsets, rows, places, biases[rows], short)


def columns(changes, kinds):
    return [np.array(part, kind) for part, kind in zip(zip(*changes, strict=True), kinds, strict=True)]


@st.composite
def histories(draw):
    items = draw(st.integers(0, 30))
    clusters = draw(st.integers(1, 5))
    cluster, bias = st.integers(-1, clusters - 1), st.sampled_from(BIASES)
    assignment = draw(st.lists(cluster, min_size=items, max_size=items))
    biases = draw(st.lists(bias, min_size=items, max_size=items))
    change = st.tuples(st.sampled_from(("assign", "hide", "show")), st.integers(0, items + 9), cluster, bias)
    batches = draw(st.lists(st.lists(change, max_size=40), max_size=6))
    return clusters, assignment, biases, batches, draw(st.sampled_from((0, 3, SHORT)))


@given(histories())
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_changes_is_as_building_from_scratch(world):
    clusters, assignment, biases, batches, short = world
    lists = lists_of(assignment, biases, clusters, short)
    state = {row: (cluster, bias) for row, (cluster, bias) in enumerate(zip(assignment, biases, strict=True))}
    hidden = set()
    merger = Merger(lists, 2)
    for batch in batches:
        for what, row, cluster, bias in batch:
            rows = np.array([row], np.int32)
            if what == "assign":
                lists.assign(rows, np.array([cluster], np.int32), np.array([bias], np.float32))
                state[row] = (cluster, bias)
            elif what == "hide":
                lists.hide(rows)
                hidden.add(row)
            else:
                lists.show(rows)
                hidden.discard(row)
        seen = {row: value for row, value in state.items() if row not in hidden}
        expected = lists_reference(seen, clusters)
        assert [lists.take(k).tolist() for k in range(clusters)] == expected
        best = [seen[mine[0]][1] if mine else -np.inf for mine in expected]
        assert lists.heads.tolist() == best
        for row, (cluster, bias) in state.items():
            assert lists.of(row)[0] == cluster
            assert cluster < 0 or lists.of(row)[1] == bias
        scores = np.linspace(-1, 1, clusters).astype(np.float32)[None]
        found = merger.merge(scores, np.ones(1, np.bool_), 20, RaggedRows.empty(1))
        twin = merge_reference(scores[0], [[(row, seen[row][1]) for row in mine] for mine in expected], 20, 2)
        whole = int(found.offsets[-1])
        assert lists.rows_of(found.slots[:whole]).tolist() == [row for row, _, _ in twin]


@pytest.mark.parametrize("short", [0, SHORT])
def test_changes_at_once_are_as_one_after_the_other_and_what_is_left_behind_is_collected(short):
    random = np.random.default_rng(3)
    items, clusters = 3000, 40
    assignment = random.integers(-1, clusters, items)
    biases = random.standard_normal(items).astype(np.float32)
    lists = lists_of(assignment, biases, clusters, short)
    state = dict(enumerate(zip(assignment.tolist(), biases.tolist(), strict=True)))
    most = 0
    for _ in range(30):
        rows = random.integers(0, items + 200, 2000).astype(np.int32)
        to = random.integers(-1, clusters, rows.size).astype(np.int32)
        value = random.standard_normal(rows.size).astype(np.float32)
        lists.assign(rows, to, value)
        state |= dict(zip(rows.tolist(), zip(to.tolist(), value.tolist(), strict=True), strict=True))
        most = max(most, lists._entries.size)
    assert [lists.take(k).tolist() for k in range(clusters)] == lists_reference(state, clusters)
    # 60,000 changes of 3,200 items: what a cluster leaves behind does not pile up.
    assert most < 8 * (items + 200)
    assert lists.nbytes["blocks"] <= 8 * most


def test_an_assignment_touches_no_more_in_longer_lists():
    """Counted in entries that blocks take, as no clock can be trusted: the root of the list's length an assignment."""
    for items in (1000, 16_000):
        lists = lists_of(np.zeros(items), np.arange(items), 2)
        rows = np.arange(items, dtype=np.int32)[:500]
        lists.assign(rows, np.ones(500, np.int32), np.arange(500, dtype=np.float32))
        copied = lists._used[0]
        assert copied < 2 * items + 500 * (SPARE + 4 * np.sqrt(items))


@pytest.mark.parametrize(
    ("rows", "clusters", "biases", "words"),
    [
        ([-1], [0], [0.0], "row -1"),
        ([0], [3], [0.0], "cluster 3 is none of 3"),
        ([0], [-2], [0.0], "cluster -2"),
        ([0], [0], [np.nan], "finite"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_assigned(rows, clusters, biases, words):
    lists = lists_of([0, 1], [0.0, 0.0], 3)
    good = ([1], [2], [1.0])
    both = (good[0] + rows, good[1] + clusters, good[2] + biases)
    with pytest.raises(ValueError, match=words):
        lists.assign(np.array(both[0], np.int32), np.array(both[1], np.int32), np.array(both[2], np.float32))
    assert lists.take(1).tolist() == [1]


@st.composite
def merges(draw):
    items = draw(st.integers(0, 60))
    clusters = draw(st.integers(1, 30))
    seed = draw(st.integers(0, 1000))
    return (
        items, clusters, seed, draw(st.integers(1, 70)), draw(st.sampled_from((1, 2, 3, 8))), draw(st.integers(0, 20)),
        draw(st.sampled_from((None, 3, SHORT))),
    )  # fmt: skip


@given(merges())
@settings(max_examples=150, deadline=None)
def test_the_merge_is_its_twin_and_in_chunks_of_one_sorting_everything(world):
    items, clusters, seed, most, chunk, forbidden, short = world
    random = np.random.default_rng(seed)
    assignment = random.integers(-1, clusters, items)
    biases = (random.integers(-4, 5, items) / 4).astype(np.float32)
    lists = lists_of(assignment, biases, clusters, SHORT if short is None else short)
    if short is not None and items:
        rows = random.integers(0, items + 5, 10).astype(np.int32)
        lists.assign(rows, random.integers(-1, clusters, 10).astype(np.int32), np.full(10, 0.5, np.float32))
    merger = Merger(lists, chunk)
    scores = (random.integers(-6, 7, (3, clusters)) / 4).astype(np.float32)
    excluded = RaggedRows.of([random.integers(0, items + 5, n).astype(np.int32) for n in (forbidden, 0, 1)])
    for asked in ([True, True, True], [False, True, True]):
        mask = np.array(asked)
        found = merger.merge(scores[mask], mask, most, excluded)
        for q in range(3):
            mine = slice(int(found.offsets[q]), int(found.offsets[q + 1]))
            banned = set(excluded.rows[excluded.offsets[q] : excluded.offsets[q + 1]].tolist())
            members = [
                [(row, lists.of(row)[1]) for row in lists.take(k).tolist() if row not in banned]
                for k in range(clusters)
            ]
            expected = merge_reference(scores[q], members, most, chunk) if asked[q] else []
            rows = lists.rows_of(found.slots[mine]).tolist()
            got = list(zip(rows, found.clusters[mine].tolist(), found.scores[mine].tolist(), strict=True))
            assert got == expected
            if chunk == 1 and asked[q]:
                assert got == sort_reference(scores[q], members, most)


def test_chunks_come_in_the_order_of_their_heads_and_nothing_better_is_left_out():
    random = np.random.default_rng(1)
    items, clusters, most = 4000, 300, 700
    assignment = random.integers(0, clusters, items)
    biases = random.standard_normal(items).astype(np.float32)
    lists = lists_of(assignment, biases, clusters)
    scores = random.standard_normal((1, clusters)).astype(np.float32)
    found = Merger(lists, 8).merge(scores, np.ones(1, np.bool_), most, RaggedRows.empty(1))
    rows = lists.rows_of(found.slots[:most])
    heads, seen, worst = [], {}, np.inf
    for row, cluster, score in zip(
        rows.tolist(), found.clusters.tolist(), found.scores.tolist(), strict=False
    ):
        if seen.setdefault(cluster, 0) % 8 == 0:
            heads.append(score)
            worst = min(worst, score)
        seen[cluster] += 1
        assert lists.of(row)[0] == cluster
    assert heads == sorted(heads, reverse=True)
    # Of every cluster what was taken is a prefix, and the chunk that comes next is no better than any that was taken.
    for k in range(clusters):
        mine = lists.take(k).tolist()
        taken = [
            row for row, cluster in zip(rows.tolist(), found.clusters.tolist(), strict=False) if cluster == k
        ]
        assert mine[: len(taken)] == taken
        if len(taken) % 8 == 0 and len(taken) < len(mine):
            assert scores[0, k] + np.float32(lists.of(mine[len(taken)])[1]) <= worst


def test_clusters_that_did_not_enter_at_first_come_in_when_the_bound_falls():
    """Two items a cluster: a list of 3,000 takes far more clusters than one chunk of each would."""
    random = np.random.default_rng(2)
    items, clusters = 4096, 2048
    biases = random.standard_normal(items).astype(np.float32)
    lists = lists_of(np.arange(items) % clusters, biases, clusters)
    scores = random.standard_normal((2, clusters)).astype(np.float32)
    merger = Merger(lists, 8)
    for most in (10, 3000, 5000):
        found = merger.merge(scores, np.ones(2, np.bool_), most, RaggedRows.empty(2))
        for q in range(2):
            mine = slice(int(found.offsets[q]), int(found.offsets[q + 1]))
            members = [[(row, lists.of(row)[1]) for row in lists.take(k).tolist()] for k in range(clusters)]
            expected = merge_reference(scores[q], members, most)
            assert lists.rows_of(found.slots[mine]).tolist() == [row for row, _, _ in expected]


def test_scores_of_clusters_are_products_and_do_not_depend_on_the_batch():
    random = np.random.default_rng(4)
    for clusters, width in ((5, 3), (64, 8), (200, 19)):
        vectors = random.standard_normal((clusters, width)).astype(np.float32)
        users = random.standard_normal((9, width)).astype(np.float32)
        scorer = Scorer(vectors)
        together = scorer.scores(users)
        codes, scales = in_bytes(vectors)
        np.testing.assert_allclose(together[:, :clusters], users @ (codes * scales[:, None]).T, atol=1e-5)
        np.testing.assert_allclose(together[:, :clusters], users @ vectors.T, atol=0.05 * np.sqrt(width))
        for q in range(9):
            assert scorer.scores(users[q : q + 1]).tobytes() == together[q].tobytes()
