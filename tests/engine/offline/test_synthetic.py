"""The synthetic matrix: the sizes asked for, the same for the same seed, and popularity as it is in the field."""

from __future__ import annotations

import numpy as np
import pytest

from engine.offline.synthetic import TOPIC_ITEMS, synthetic_interactions


def test_the_same_seed_makes_the_same_matrix_and_another_another():
    one, same, other = (synthetic_interactions(300, 2_000, 6_000, seed) for seed in (3, 3, 4))
    for name in ("indptr", "rows", "weights", "timestamps"):
        assert getattr(one, name).tobytes() == getattr(same, name).tobytes()
    assert one.rows.tobytes() != other.rows.tobytes()


@pytest.mark.parametrize(("users", "items", "events"), [(1, 1, 1), (7, 30, 50), (500, 3_000, 20_000)])
def test_it_is_of_the_sizes_asked_for(users, items, events):
    made = synthetic_interactions(users, items, events)
    assert (made.users, made.items) == (users, items)
    assert made.indptr.size == users + 1
    assert made.indptr[-1] == made.rows.size == made.weights.size == made.timestamps.size
    assert 0.3 * events < made.entries <= events + users
    assert made.user_counts().min() >= 1
    assert made.rows.min() >= 0
    assert made.rows.max() < items


def test_types_and_order_are_those_of_a_matrix_from_data():
    made = synthetic_interactions(200, 1_500, 5_000)
    assert (made.indptr.dtype, made.rows.dtype, made.weights.dtype, made.timestamps.dtype) == (
        np.int64, np.int32, np.float32, np.int64,
    )  # fmt: skip
    for user in range(made.users):
        part = slice(int(made.indptr[user]), int(made.indptr[user + 1]))
        assert np.unique(made.rows[part]).size == made.rows[part].size
        assert (np.diff(made.timestamps[part]) < 0).all()


def test_few_items_have_most_of_the_likes():
    made = synthetic_interactions(4_000, 5_000, 100_000)
    counts = np.sort(made.item_counts())[::-1]
    assert counts[: counts.size // 10].sum() > 0.4 * made.entries
    assert counts[0] > 20 * max(np.median(counts), 1)


def test_the_row_of_an_item_says_nothing_of_its_popularity():
    made = synthetic_interactions(4_000, 5_000, 100_000)
    halves = made.item_counts().reshape(2, -1).sum(axis=1)
    assert abs(halves[0] - halves[1]) < 0.15 * made.entries


def test_a_user_stays_within_a_few_topics():
    # Users of one topic share items far more than chance would have it.
    made = synthetic_interactions(2_000, 20 * TOPIC_ITEMS, 60_000)
    by_item = made.by_item()
    cold = np.flatnonzero((made.item_counts() >= 2) & (made.item_counts() <= 5))
    together = []
    for item in cold[:200].tolist():
        fans = by_item.users[by_item.indptr[item] : by_item.indptr[item + 1]][:2].tolist()
        one, other = (set(made.rows[made.indptr[u] : made.indptr[u + 1]].tolist()) - {item} for u in fans)
        if one and other:
            together.append(len(one & other) / min(len(one), len(other)))
    assert np.mean(together) > 0.05
