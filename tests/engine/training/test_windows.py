"""Windows against plain Python: every later item of a user is predicted once from what came before it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.interactions import Interactions
from engine.training.windows import Windows


def matrix(counts):
    """User u did items u * 100, u * 100 + 1, ... in this order; newest first here."""
    rows = [u * 100 + j for u, count in enumerate(counts) for j in reversed(range(count))]
    indptr = np.append(0, np.cumsum(counts)).astype(np.int64)
    return Interactions(
        len(counts), 100 * len(counts), indptr, np.array(rows, np.int32), np.ones(len(rows), np.float32),
        np.array(rows, np.int64),
    )  # fmt: skip


worlds = st.lists(st.integers(0, 30), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(worlds, st.integers(1, 8), st.integers(1, 40), st.integers(0, 2))
def test_each_item_but_the_oldest_is_predicted_once_from_the_one_before(counts, length, size, epoch):
    data = matrix(counts)
    windows = Windows(data, np.ones(data.entries, np.float32), None, length, 1, size, seed=3)
    batches = list(windows.epoch(epoch))
    assert len(batches) == windows.batches(epoch)
    labels = []
    for batch in batches:
        lengths = np.diff(batch.offsets)
        assert (lengths >= 1).all()
        assert (lengths <= length).all()
        assert (np.diff(lengths) <= 0).all()
        assert lengths.sum() < size + 2 * length
        owners = np.repeat(batch.users, lengths)
        assert (batch.positives == batch.history).all()  # item codes are row + 1, and rows rise with time
        assert (batch.positives // 100 == owners).all()
        assert (data.rows[batch.entries] == batch.positives).all()
        inside = np.diff(batch.history)[~np.isin(np.arange(1, batch.history.size), batch.offsets)]
        assert (inside == 1).all()
        labels += batch.positives.tolist()
    assert sorted(labels) == [u * 100 + j for u, count in enumerate(counts) for j in range(1, count)]


@settings(max_examples=50, deadline=None)
@given(worlds, st.integers(2, 6))
def test_a_horizon_draws_a_later_item(counts, horizon):
    data = matrix(counts)
    ahead = []
    for batch in Windows(data, np.ones(data.entries, np.float32), None, 5, horizon, 20, seed=0).epoch(0):
        ahead += (batch.positives - batch.history + 1).tolist()
    assert all(1 <= each <= horizon for each in ahead)
    if len(ahead) > 60:
        assert len(set(ahead)) > 1


def test_where_windows_begin_differs_by_epoch_and_what_teaches_nothing_is_left_out():
    data = matrix([40, 3, 1, 4])
    weights = np.ones(data.entries, np.float32)
    weights[data.indptr[1] : data.indptr[2] - 1] = (
        0  # of user 1 only the oldest counts, which nothing comes before
    )
    windows = Windows(data, weights, None, 10, 1, 1000, seed=0)
    seen = [next(iter(windows.epoch(epoch))) for epoch in range(3)]
    assert all(set(batch.users.tolist()) == {0, 3} for batch in seen)
    assert len({tuple(batch.history[batch.offsets[:-1]].tolist()) for batch in seen}) == 3
    assert np.array_equal(seen[0].history, next(iter(windows.epoch(0))).history)
