"""Clusters as the means of their items: the same, however the items came there."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.models.codebook import Codebook
from engine.training.members import Members

K, D = 4, 3


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(0, 12), seed=st.integers(0, 2**31))
def test_a_cluster_is_the_weighted_mean_of_what_is_in_it_now(steps, seed):
    random = np.random.default_rng(seed)
    items = 9
    first = random.standard_normal((K, D)).astype(np.float32)
    book, members = Codebook.at(first), Members(items, K, D)
    latest: dict[int, tuple[int, np.ndarray, float]] = {}
    shown: dict[int, float] = {}
    before = book.vectors.copy()
    for _ in range(steps):
        counted = random.uniform(1, 3, 2).astype(np.float32)
        came = random.integers(0, items, 2).astype(np.int32)
        members.reward(came, counted, 0.25)
        for row, value in zip(came.tolist(), counted.tolist(), strict=True):
            shown[row] = shown[row] + 0.25 * (value - shown[row]) if row in shown else value
        rows = np.sort(random.choice(items, random.integers(1, items), replace=False)).astype(np.int32)
        clusters = random.integers(0, K, rows.size).astype(np.int32)
        vectors = random.standard_normal((rows.size, D)).astype(np.float32)
        rates = random.uniform(0.01, 1, rows.size)
        before = book.vectors.copy()
        members.put(rows, clusters, vectors, rates, book)
        for at, row in enumerate(rows.tolist()):
            latest[row] = (int(clusters[at]), vectors[at], float(rates[at]) * shown.get(row, 1.0))
        for k in range(K):
            mine = [(vector, weight) for cluster, vector, weight in latest.values() if cluster == k]
            if not mine:
                np.testing.assert_allclose(book.vectors[k], before[k], rtol=1e-4, atol=1e-5)
                continue
            weights = np.array([weight for _, weight in mine])
            mean = weights @ np.stack([vector for vector, _ in mine]) / weights.sum()
            np.testing.assert_allclose(book.vectors[k], mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(book.counts[k], weights.sum(), rtol=1e-5)
    assert (book.counts > 0).all()


def test_clusters_of_which_only_the_sums_are_known_stay_where_they_are_until_items_are_looked_at():
    counts = np.array([2.0, 6.0], np.float32)
    vectors = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    assignment = np.array([1, 0, 1, -1], np.int32)
    book = Codebook(vectors * counts[:, None], counts, sizes=np.array([1, 2]))
    members = Members(4, 2, 2)
    members.begin(book, assignment)
    # Items 0 and 2 share cluster 1: 0 moves to cluster 0, where it is seen at (0, 3) and counts 2.
    members.put(
        np.array([0], np.int32),
        np.array([0], np.int32),
        np.array([[0, 3]], np.float32),
        np.array([2.0]),
        book,
    )
    np.testing.assert_allclose(book.vectors, [[0.5, 1.5], [0.0, 1.0]], atol=1e-6)
    np.testing.assert_allclose(book.counts, [4.0, 3.0], rtol=1e-6)
    members.grow(6)
    members.put(
        np.array([5], np.int32),
        np.array([1], np.int32),
        np.array([[0, 4]], np.float32),
        np.array([3.0]),
        book,
    )
    np.testing.assert_allclose(book.vectors[1], [0.0, 2.5], atol=1e-6)
