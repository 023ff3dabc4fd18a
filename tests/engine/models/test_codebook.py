"""The codebook: formulas by hand, kernels against NumPy, and dead clusters that come to life."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import ConfigError, SnapshotError
from engine.models.codebook import (
    BLOCK,
    FLOOR,
    Codebook,
    balance_of,
    coarse_clusters,
    occurrence_weights,
    sizes_of,
)
from engine.models.debiased import debiased


def random_book(clusters, dimension, seed=0, **more):
    random = np.random.default_rng(seed)
    counts = random.gamma(0.5, 1.0, clusters).astype(np.float32) + np.float32(1e-3)
    vectors = random.standard_normal((clusters, dimension), np.float32)
    return Codebook(vectors * counts[:, None], counts, **more)


def distances(book, vectors):
    """float64[n, K]: ||e - v|| r, as the paper writes it."""
    e = book.sums.astype(np.float64) / book.counts[:, None]
    r = np.minimum(book.counts / book.counts.mean(dtype=np.float64) * book.boost, 1.0) if book.boost else 1.0
    return np.linalg.norm(vectors[:, None].astype(np.float64) - e, axis=2) * r


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2 * BLOCK + 3),
    st.integers(1, 9),
    st.integers(0, 200),
    st.sampled_from((0.0, 5.0)),
    st.integers(0, 99),
)
def test_an_item_goes_to_the_cluster_that_seems_nearest(clusters, dimension, n, boost, seed):
    book = random_book(clusters, dimension, seed, boost=boost)
    vectors = np.random.default_rng(seed + 1).standard_normal((n, dimension), np.float32)
    chosen = book.assign(vectors)
    all_of_them = distances(book, vectors)
    assert chosen.dtype == np.int32
    assert np.all(chosen >= 0)
    assert np.all(chosen < clusters)
    taken = all_of_them[np.arange(n), chosen]
    # Near 0 the square is a small difference of larger numbers.
    np.testing.assert_allclose(taken, all_of_them.min(1), rtol=1e-4, atol=2e-3)


def test_a_vector_is_assigned_alike_alone_in_a_batch_and_by_many_threads():
    book = random_book(700, 10)
    vectors = np.random.default_rng(1).standard_normal((301, 10), np.float32)
    whole = book.assign(vectors)
    alone = np.concatenate([book.assign(vectors[at : at + 1]) for at in range(len(vectors))])
    np.testing.assert_array_equal(whole, alone)
    with ThreadPoolExecutor(3) as pool:
        np.testing.assert_array_equal(whole, book.assign(vectors, pool, 3))


def test_the_disturbance_favours_clusters_below_a_fifth_of_the_mean():
    vectors = np.array([[0.0], [1.0]], np.float32)
    counts = np.array([1.9, 0.1], np.float32)  # the mean is 1, so that r = (1, 0.5)
    item = np.array([[0.4]], np.float32)  # 0.4 from the first, 0.6 from the second, which seems 0.3
    assert Codebook(vectors * counts[:, None], counts, boost=5.0).assign(item).tolist() == [1]
    assert Codebook(vectors * counts[:, None], counts, boost=0.0).assign(item).tolist() == [0]
    np.testing.assert_allclose(Codebook(vectors, counts, boost=5.0).discounts(), [1.0, 0.5], rtol=1e-6)


def test_a_cluster_with_more_items_than_the_mean_seems_farther():
    vectors = np.array([[0.0], [1.0]], np.float32)
    item = np.array(
        [[0.4]], np.float32
    )  # 0.4 from the first, which has 1.75 of the mean, 0.6 from the second
    sizes, counts = np.array([7, 1]), np.ones(2, np.float32)
    book = Codebook(vectors, counts, boost=0.0, crowding=1.0, sizes=sizes)
    np.testing.assert_allclose(book.discounts(), [1.75, 1.0], rtol=1e-6)
    assert book.assign(item).tolist() == [1]
    assert Codebook(vectors, counts, boost=0.0, crowding=0.5, sizes=sizes).assign(item).tolist() == [0]
    # Where there are fewer items than clusters, one is no crowd.
    alone = Codebook(vectors, counts, boost=0.0, crowding=1.0, sizes=np.array([1, 0]))
    np.testing.assert_array_equal(alone.discounts(), [1.0, 1.0])


def test_a_cluster_that_counts_next_to_nothing_does_not_take_a_crowd_from_everywhere():
    vectors, counts = np.array([[0.0], [1.0]], np.float32), np.array([1.999, 0.001], np.float32)
    sizes = np.array([2, 6])
    book = Codebook(vectors, counts, boost=5.0, crowding=1.0, sizes=sizes)
    np.testing.assert_allclose(book.discounts(), [1.0, 0.2 * 1.5], rtol=1e-6)
    by_the_paper = Codebook(vectors, counts, boost=5.0, sizes=sizes)
    np.testing.assert_allclose(by_the_paper.discounts(), [1.0, 0.005], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 90),
    st.lists(st.integers(0, 39), max_size=120),
    st.sampled_from((0.0, 1.0)),
    st.integers(0, 9),
)
def test_placing_keeps_the_sizes_and_does_not_depend_on_threads(clusters, rows, crowding, seed):
    random = np.random.default_rng(seed)
    begin = random.integers(-1, clusters, 40).astype(np.int32)
    mine = np.array(rows, np.int32)  # some of them twice
    vectors = random.standard_normal((mine.size, 5), np.float32)
    made = []
    with ThreadPoolExecutor(2) as pool:
        for threads in (None, pool):
            book = random_book(clusters, 5, seed, crowding=crowding, sizes=sizes_of(begin, clusters))
            assignment = begin.copy()
            chosen = book.place(vectors, mine, assignment, threads, 2)
            np.testing.assert_array_equal(book.sizes, sizes_of(assignment, clusters))
            made.append(assignment)
            last = dict(zip(mine.tolist(), chosen.tolist(), strict=True))
            assert all(assignment[row] == cluster for row, cluster in last.items())
    np.testing.assert_array_equal(made[0], made[1])


def test_equal_items_share_out_over_the_clusters_where_it_is_crowded():
    """All but a few items are alike, as those are that nobody has seen."""
    random = np.random.default_rng(0)
    items = (1e-3 * random.standard_normal((400, 4))).astype(np.float32)
    items[:40] += random.standard_normal((40, 4), np.float32)
    largest = {}
    for crowding in (0.0, 1.0):
        book = Codebook.at(items[::25].copy(), boost=0.0, crowding=crowding)
        assignment = np.full(400, -1, np.int32)
        for _ in range(3):
            book.place(items, np.arange(400, dtype=np.int32), assignment)
        largest[crowding] = balance_of(assignment, 16).largest
    assert largest[1.0] < 0.15


def test_of_equally_near_clusters_the_first_is_taken():
    book = Codebook.at(np.zeros((BLOCK + 5, 3), np.float32))
    assert book.assign(np.ones((2, 3), np.float32)).tolist() == [0, 0]


def test_the_moving_averages_by_hand():
    book = Codebook(np.array([[2.0], [3.0]], np.float32), np.array([1.0, 1.5], np.float32), decay=0.5)
    # Two items in cluster 0, none in cluster 1, which keeps its vector and loses weight.
    book.update(
        np.array([0, 0], np.int32), np.array([[4.0], [6.0]], np.float32), np.array([1.0, 3.0], np.float32)
    )
    np.testing.assert_allclose(book.sums, [[0.5 * 2 + 0.5 * (4 + 18)], [1.5]])
    np.testing.assert_allclose(book.counts, [0.5 + 0.5 * 4, 0.75])
    np.testing.assert_allclose(book.vectors, [[12 / 2.5], [2.0]], rtol=1e-6)


def test_the_weight_of_an_occurrence_by_hand():
    rewards = np.array([[0.0, 0.0], [1.0, 3.0]], np.float32)
    made = occurrence_weights(rewards, np.array([2.0, 0.5]), np.array([16.0, 81.0]), 0.25)
    np.testing.assert_allclose(made, [2.0, 2.0**2 * 4.0**0.5 * 3.0], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 60), st.integers(0, 99))
def test_the_moving_averages_are_those_of_numpy(clusters, dimension, n, seed):
    random = np.random.default_rng(seed)
    book = random_book(clusters, dimension, seed, decay=0.9)
    sums, counts = book.sums.astype(np.float64), book.counts.astype(np.float64)
    chosen = random.integers(0, clusters, n).astype(np.int32)
    vectors = random.standard_normal((n, dimension), np.float32)
    weights = random.random(n, np.float32) + np.float32(0.1)
    book.update(chosen, vectors, weights)
    sums, counts = 0.9 * sums, 0.9 * counts
    np.add.at(sums, chosen, 0.1 * weights[:, None] * vectors)
    np.add.at(counts, chosen, 0.1 * weights)
    np.testing.assert_allclose(book.counts, counts, rtol=1e-4)
    np.testing.assert_allclose(book.vectors, sums / counts[:, None], rtol=1e-3, atol=1e-4)


def test_a_dead_cluster_keeps_its_vector_and_never_vanishes():
    book = Codebook.at(np.array([[1.0], [7.0]], np.float32), decay=0.5)
    for _ in range(300):
        book.update(np.zeros(1, np.int32), np.ones((1, 1), np.float32), np.ones(1, np.float32))
    np.testing.assert_allclose(book.vectors[1], 7.0, rtol=1e-3)
    assert book.counts[1] >= 0.9 * FLOOR * book.counts.mean()


def test_dead_clusters_come_to_life_by_the_disturbance_alone():
    """All clusters but one begin far from every item; without the disturbance they would stay there."""
    random = np.random.default_rng(0)
    items = random.standard_normal((256, 4), np.float32)
    begin = np.full((16, 4), 50.0, np.float32)
    begin[0] = 0.0
    used = {}
    for boost in (5.0, 0.0):
        book = Codebook.at(begin, decay=0.9, boost=boost)
        for _ in range(200):
            mine = items[random.integers(0, 256, 64)]
            book.update(book.assign(mine), mine, np.ones(64, np.float32))
        used[boost] = 1 - balance_of(book.assign(items), 16).empty
    assert used[0.0] == 1 / 16
    assert used[5.0] >= 12 / 16


def test_clusters_near_each_other_are_in_one_coarser_cluster():
    random = np.random.default_rng(0)
    centres = 100 * random.standard_normal((6, 3))
    of = random.integers(0, 6, 300)
    made = coarse_clusters((centres[of] + random.standard_normal((300, 3))).astype(np.float32), 6, passes=30)
    pure = sum(np.bincount(of[made == each]).max() for each in np.unique(made)) / 300
    assert made.dtype == np.int32
    assert pure > 0.6
    np.testing.assert_array_equal(coarse_clusters(np.zeros((4, 2), np.float32), 9), np.arange(4))


def test_the_balance_by_hand():
    balance = balance_of(np.array([0, 0, 0, 2, -1], np.int32), 4)
    assert (balance.largest, balance.empty) == (0.75, 0.5)
    assert balance_of(np.array([0], np.int32), 3).spread == np.inf


@pytest.mark.parametrize(
    ("sums", "counts"),
    [
        (np.zeros((2, 3), np.float32), np.ones(3, np.float32)),
        (np.zeros((2, 3), np.float32), np.array([1.0, 0.0], np.float32)),
        (np.full((2, 3), np.nan, np.float32), np.ones(2, np.float32)),
    ],
)
def test_what_is_no_codebook_is_refused(sums, counts):
    with pytest.raises(SnapshotError, match="codebook"):
        Codebook(sums, counts)


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="decay"):
        Codebook.at(np.zeros((2, 2), np.float32), decay=1.0)
    with pytest.raises(ConfigError, match="boost"):
        Codebook.at(np.zeros((2, 2), np.float32), boost=-1.0)
    with pytest.raises(ConfigError, match="crowding"):
        Codebook.at(np.zeros((2, 2), np.float32), crowding=-1.0)


# --- debiased histories -------------------------------------------------------------------------------------------


def slow_debiased(codes, groups, dropped, keep):
    out = np.zeros((len(codes), keep), np.int32)
    for r, history in enumerate(codes):
        of = [groups[code] if code < groups.size else -1 for code in history]
        there = [group for code, group in zip(history, of, strict=True) if code and group >= 0]
        full = sorted((-there.count(group), group) for group in set(there) if there.count(group) >= 2)
        gone = {group for _, group in full[:dropped]}
        left = [code for code, group in zip(history, of, strict=True) if code and group not in gone][-keep:]
        out[r, keep - len(left) :] = left
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(0, 12), st.integers(0, 3), st.integers(1, 6), st.integers(0, 99))
def test_histories_lose_the_items_of_their_fullest_groups(n, t, dropped, keep, seed):
    random = np.random.default_rng(seed)
    groups = np.concatenate(([-1], random.integers(-1, 4, 20))).astype(np.int32)
    codes = np.zeros((n, t), np.int32)
    for row in codes:
        length = random.integers(0, t + 1)
        row[t - length :] = random.integers(1, 24, length)  # some were published later
    made, lengths = debiased(codes, groups, dropped, keep)
    np.testing.assert_array_equal(made, slow_debiased(codes, groups, dropped, keep))
    np.testing.assert_array_equal(lengths, (made > 0).sum(1))
