"""Histories and sequences against plain Python, and the order of epochs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.interactions import Interactions
from engine.training.batches import ByUser, Pairs, Sequences, by_task, keep_probabilities


def matrix(lists, items=50, timed=True):
    """Interactions from each user's items, newest first."""
    counts = [len(mine) for mine in lists]
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.array([row for mine in lists for row in mine], np.int32)
    times = np.concatenate([1000 - np.arange(c) for c in counts] or [[]]).astype(np.int64)
    return Interactions(
        len(lists), items, indptr, rows, np.ones(rows.size, np.float32), times if timed else 0 * times
    )


def ones(interactions):
    return np.ones(interactions.entries, np.float32)


users = st.lists(st.lists(st.integers(0, 49), unique=True, max_size=9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(users, st.integers(0, 6), st.booleans(), st.integers(1, 5))
def test_a_history_is_what_the_user_did_without_the_positive(lists, length, past, size):
    data = matrix(lists)
    pairs = Pairs(data, ones(data), None, length, past, None, size, seed=1)
    seen = []
    for batch in pairs.epoch(0):
        for n, user in enumerate(batch.users):
            history = list(batch.history[batch.offsets[n] : batch.offsets[n + 1]] - 1)
            mine, at = lists[user], int(batch.entries[n] - data.indptr[user])
            assert batch.positives[n] == mine[at]
            if past:
                assert history == mine[at + 1 :][:length][::-1]
            else:
                others = mine[:at] + mine[at + 1 :]
                assert len(history) == min(len(others), length)
                assert len(set(history)) == len(history)
                # A stretch of the list, oldest first, which may run round its end.
                twice = others[::-1] * 2
                assert any(history == twice[k : k + len(history)] for k in range(len(others) + 1))
            seen.append(int(batch.entries[n]))
    assert sorted(seen) == list(range(data.entries))


@settings(max_examples=60, deadline=None)
@given(users, st.integers(0, 6), st.integers(1, 5))
def test_by_user_all_pairs_of_a_user_stand_together(lists, length, size):
    data = matrix(lists)
    plan = ByUser(data, ones(data), None, length, False, None, size, seed=1)
    batches = list(plan.epoch(0))
    assert len(batches) == plan.batches(0)
    met = []
    for batch in batches:
        turns = [user for at, user in enumerate(batch.users) if at == 0 or user != batch.users[at - 1]]
        assert len(turns) == size or batch is batches[-1]
        met += turns
    assert sorted(met) == [user for user, mine in enumerate(lists) if mine]
    assert sorted(entry for batch in batches for entry in batch.entries) == list(range(data.entries))


@settings(max_examples=60, deadline=None)
@given(users, st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_by_task_each_positive_is_learnt_once_in_its_cluster_and_once_by_the_intent(
    lists, length, size, every
):
    data = matrix(lists)
    clusters = (np.arange(50) % 3).astype(np.int32)
    if every:
        plan = Sequences(data, ones(data), None, length, None, size, seed=1)
    else:
        plan = Pairs(data, ones(data), None, length, True, None, size, seed=1)
    for batch in plan.epoch(0):
        made = by_task(batch, clusters, 3, every)
        learnt = []
        for n, task in enumerate(made.tasks.tolist()):
            begin, end = made.offsets[n : n + 2].tolist()
            own = list(batch.users).index(made.users[n]) if every else n % batch.users.size
            first = int(batch.offsets[own])
            assert made.history[begin:end].tolist() == batch.history[first : first + end - begin].tolist()
            for p in range(begin, end) if every else [n]:
                if made.weights[p]:
                    assert task in (3, clusters[made.positives[p]])
                    assert data.rows[made.entries[p]] == made.positives[p]
                    learnt.append((int(made.entries[p]), task == 3))
            assert not every or made.weights[end - 1], "a copy ends where its last positive is"
        wanted = [(int(entry), whole) for entry in batch.entries for whole in (False, True)]
        assert sorted(learnt) == sorted(wanted)


@settings(max_examples=60, deadline=None)
@given(users, st.integers(1, 6), st.integers(1, 5))
def test_every_entry_of_a_sequence_predicts_the_next_item(lists, length, size):
    data = matrix(lists)
    sequences = Sequences(data, ones(data), None, length, None, size, seed=1)
    taught = set()
    for batch in sequences.epoch(0):
        assert np.all(np.diff(np.diff(batch.offsets)) <= 0)  # the longest come first
        for n, user in enumerate(batch.users):
            part = slice(batch.offsets[n], batch.offsets[n + 1])
            whole = lists[user][: length + 1][::-1]
            assert list(batch.history[part] - 1) == whole[:-1]
            assert list(batch.positives[part]) == whole[1:]
            assert np.array_equal(data.rows[batch.entries[part]], batch.positives[part])
            taught.add(int(user))
    assert taught == {u for u, mine in enumerate(lists) if len(mine) > 1}


LISTS = [[3, 1, 2], [4, 5], [], [6], [7, 8, 9, 10, 11]]


def test_an_epoch_depends_on_seed_and_number_only():
    data = matrix(LISTS)

    def orders(seed, epoch):
        pairs = Pairs(data, ones(data), None, 4, False, None, 3, seed)
        return [batch.entries.tolist() + batch.history.tolist() for batch in pairs.epoch(epoch)]

    assert orders(1, 2) == orders(1, 2)
    assert orders(1, 2) != orders(1, 3)
    assert orders(1, 2) != orders(2, 2)
    assert len(orders(1, 0)) == Pairs(data, ones(data), None, 4, False, None, 3, 1).batches(0)


def test_an_update_in_order_goes_by_time_and_teaches_its_examples_only():
    data = matrix(LISTS)
    examples = data.timestamps > 997
    pairs = Pairs(data, ones(data), examples, 4, True, None, 2, seed=1, in_order=True)
    entries = np.concatenate([batch.entries for batch in pairs.epoch(0)])
    assert np.all(np.diff(data.timestamps[entries]) >= 0)
    assert sorted(entries) == np.flatnonzero(examples).tolist()
    sequences = Sequences(data, ones(data), examples, 4, None, 9, seed=1)
    for batch in sequences.epoch(0):
        assert np.array_equal(batch.weights > 0, examples[batch.entries])


def test_hot_items_are_kept_less_often_in_both_regimes():
    data = matrix([[0, user] for user in range(1, 41)])
    keep = keep_probabilities(data, 0.1)
    assert keep is not None
    assert keep[data.rows == 0] == pytest.approx(np.sqrt(0.1 / 0.5))
    assert np.all(keep[data.rows != 0] == 1)
    assert keep_probabilities(data, 0.0) is None
    pairs = Pairs(data, ones(data), None, 0, False, keep, 1000, seed=1)
    (batch,) = pairs.epoch(0)
    assert (batch.positives != 0).sum() == 40
    assert 8 <= (batch.positives == 0).sum() <= 28
    (whole,) = Sequences(data, ones(data), None, 5, keep, 1000, seed=1).epoch(0)
    assert 8 <= (whole.weights > 0).sum() <= 28
