"""The two-tower channel: what it answers, what it takes in while serving, and which bundles it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from two_tower_world import SMALL, loaded, written

from channels.two_tower import TwoTowerOptions
from channels.two_tower.answers import as_batch, merge_reference, nearest_triggers, nearest_triggers_reference
from channels.two_tower.examples import event_weights, reject_matrix
from engine.core.candidates import CandidateBatch
from engine.core.channel import Events
from engine.core.errors import ConfigError, SnapshotError
from engine.core.query import History, QueryBatch
from engine.core.types import RaggedRows
from engine.testing import ChannelContract
from engine.testing.world import (
    catalogue_columns,
    interactions_of,
    random_batch,
    random_columns,
    tiny_interactions,
)


def world(seed=0, **options):
    liked = tiny_interactions(60, 40)
    columns = random_columns(40, seed=1)
    item_columns = with_words(catalogue_columns(columns))
    options = {**SMALL, **options}
    return liked, columns, written(liked, item_columns, seed=seed, **options), options


def with_words(columns):
    words = [f"tag {code}".encode() for code in range(6)]
    offsets = np.concatenate(([0], np.cumsum([len(word) for word in words]))).astype(np.int64)
    data = np.frombuffer(b"".join(words), np.uint8)
    return {**columns, "tags.vocabulary.offsets": offsets, "tags.vocabulary.data": data}


def channel_of(**more):
    liked, columns, arrays, options = world(**more)
    return loaded(arrays, liked.users, liked.items, columns, **options)


class TestMeanOfItems(ChannelContract):
    def channel(self):
        return channel_of()


class TestSasrec(ChannelContract):
    def channel(self):
        return channel_of(sequence={"kind": "sasrec", "width": 8, "length": 6, "heads": 2})


class TestInterests(ChannelContract):
    def channel(self):
        return channel_of(sequence={"kind": "comirec", "width": 8, "length": 6, "interests": 3}, hidden=[8])


class TestIds(ChannelContract):
    def channel(self):
        options = {"user_features": [{"name": "user_id", "kind": "id", "dimension": 8}]}
        return channel_of(**options, sequence={"kind": "none"}, item_features=[], item_hidden=[])


def test_candidates_are_the_nearest_and_scores_their_products():
    channel = channel_of()
    batch = random_batch(40, 60, 5)
    answer = channel.recall_batch(batch, np.full(5, 40, np.int32))
    queries = channel._tower.vectors(channel._queries.encode(batch))
    products = queries @ channel._model.vectors.T
    available = np.flatnonzero(channel._columns.available)
    assert queries.any(1).any()
    for q in range(5):
        mine = answer.query(q)
        # Who did nothing has a vector of zeros, to which no item is nearer than another.
        assert set(mine.rows.tolist()) == (set(available.tolist()) if queries[q].any() else set())
        np.testing.assert_allclose(mine.scores, products[q, mine.rows], atol=1e-5)


def test_the_trigger_is_the_nearest_of_the_newest_items():
    channel = channel_of()
    batch = random_batch(40, 60, 6)
    answer = channel.recall_batch(batch, np.full(6, 7, np.int32))
    expected = nearest_triggers_reference(answer, batch.history, 20, channel._model.vectors)
    assert answer.triggers.tolist() == expected
    assert (answer.triggers >= 0).any()
    assert (np.diff(batch.history.offsets) == 0).any(), "somebody has no history"


def test_what_is_taken_down_costs_no_place():
    channel = channel_of()
    batch = random_batch(40, 60, 3)
    before = channel.recall_batch(batch, np.full(3, 5, np.int32))
    best = int(before.rows[0])
    channel._columns.put("available", np.array([best], np.int32), np.zeros(1, np.bool_))
    channel.update(np.array([best], np.int32))
    after = channel.recall_batch(batch, np.full(3, 5, np.int32))
    assert best not in after.rows
    assert np.diff(after.offsets).tolist() == [5, 5, 5]


def test_a_new_item_is_found_in_the_next_batch_by_what_is_known_of_it():
    channel = channel_of()
    columns = channel._columns
    twin = int(np.flatnonzero(columns.available & (columns.tag_counts > 0))[0])
    columns.grow(41)
    new = np.array([40], np.int32)
    columns.put("authors", new, columns.authors[[twin]])
    columns.put("quality", new, columns.quality[[twin]])
    tags = columns.tag_codes[columns.tag_starts[twin] : columns.tag_starts[twin] + columns.tag_counts[twin]]
    columns.put_tags(new, np.array([tags.size], np.int32), tags)
    channel.update(new)
    batch = random_batch(40, 60, 4)
    answer = channel.recall_batch(batch, np.full(4, 41, np.int32))
    assert (answer.rows == 40).sum() == np.count_nonzero(np.diff(batch.history.offsets)) > 0
    # As a history it says nothing to the tower, which has no embedding of it, but it can be a trigger.
    both = np.array([40, twin], np.int32)
    history = History(both, np.ones(2, np.float32), np.ones(2, np.int64), np.array([0, 2]))
    alone = channel.recall_batch(replace(batch.alone(0), history=history), np.full(1, 41, np.int32))
    assert set(alone.triggers.tolist()) == {40, twin}


def test_an_item_of_which_nothing_is_known_gets_no_vector():
    channel = channel_of()
    channel._columns.grow(41)
    channel.update(np.array([40], np.int32))
    answer = channel.recall_batch(random_batch(40, 60, 2), np.full(2, 41, np.int32))
    assert 40 not in answer.rows


def test_an_item_that_changed_moves_and_one_that_did_not_stays():
    channel = channel_of()
    row = np.flatnonzero(channel._columns.available)[:1].astype(np.int32)
    batch = random_batch(40, 60, 1)
    k = np.full(1, 40, np.int32)

    def score():
        answer = channel.recall_batch(batch, k)
        return float(answer.scores[answer.rows == row[0]][0])

    before = score()
    channel.update(row)
    assert score() == before
    channel._columns.put("quality", row, np.array([0.123], np.float32))
    channel.update(row)
    assert score() != before


def test_model_and_index_of_different_runs_are_refused():
    liked, columns, first, options = world(seed=0)
    second = world(seed=1)[2]
    mixed = {**first, **{name: array for name, array in second.items() if name.startswith("index.")}}
    with pytest.raises(SnapshotError, match="run"):
        loaded(mixed, liked.users, liked.items, columns, **options)


@pytest.mark.parametrize("name", ["spec", "item_vectors", "item.layers.0.weight", "encoded.item.codes"])
def test_a_bundle_that_lacks_something_is_refused(name):
    _liked, columns, arrays, options = world()
    with pytest.raises(SnapshotError, match=r"bundle|specification"):
        loaded({key: array for key, array in arrays.items() if key != name}, 60, 40, columns, **options)


def test_vectors_of_another_dimension_are_refused():
    _liked, columns, arrays, options = world()
    with pytest.raises(SnapshotError, match="item_vectors"):
        loaded({**arrays, "item_vectors": arrays["item_vectors"][:, 1:]}, 60, 40, columns, **options)


def test_a_model_of_another_catalogue_is_refused():
    _liked, _columns, arrays, options = world()
    with pytest.raises(SnapshotError, match="40 items"):
        loaded(arrays, 60, 39, **options)


@pytest.mark.parametrize(
    ("feature", "says"),
    [
        ({"name": "colour", "kind": "categorical"}, "no column 'colour'; it has author, city"),
        ({"name": "tags", "kind": "numeric"}, "lists of strings"),
        ({"name": "quality", "kind": "categorical"}, "numbers"),
        ({"name": "author", "kind": "numeric"}, "author ids"),
        ({"name": "context.hour", "kind": "categorical"}, "not of an item"),
        ({"name": "author", "kind": "id", "lookup": "hash"}, "2 or more"),
        ({"name": "author", "kind": "categorical", "lookup": "hash"}, "hashed"),
    ],
)
def test_a_feature_that_the_data_does_not_have_is_refused_by_its_key(feature, says):
    with pytest.raises(ConfigError, match=says) as caught:
        world(
            item_features=[*SMALL["item_features"], feature]
            if feature["name"] not in ("tags", "quality", "author")
            else [SMALL["item_features"][0], feature]
        )
    assert caught.value.field.startswith("item_features.")


def test_negatives_need_a_source():
    for source in ("reject", "cluster"):
        with pytest.raises(ValueError, match=source):
            TwoTowerOptions.model_validate({**SMALL, "training": {"negatives": {source: 1}}})


@given(st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_interests_are_merged_as_plain_python_does(seed):
    rng = np.random.default_rng(seed)
    n, interests, columns = int(rng.integers(1, 4)), int(rng.integers(2, 4)), int(rng.integers(1, 6))
    rows = np.full((n * interests, columns), -1, np.int32)
    scores = np.full((n * interests, columns), -np.inf, np.float32)
    for r in range(n * interests):
        many = int(rng.integers(0, columns + 1))
        mine = rng.choice(8, many, replace=False)
        values = -np.sort(-rng.integers(-2, 3, many).astype(np.float32))
        rows[r, :many], scores[r, :many] = mine, values
    k = rng.integers(0, columns + 1, n).astype(np.int32)
    answer = as_batch(rows, scores, interests, k)
    expected = merge_reference(rows, scores, interests, k)
    got = [
        list(zip(answer.query(q).rows.tolist(), answer.query(q).scores.tolist(), strict=True))
        for q in range(n)
    ]
    assert got == expected


@given(st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_triggers_are_as_plain_numpy_says(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 4))
    vectors = rng.normal(size=(12, 5)).astype(np.float32)
    lists = RaggedRows.of(
        [rng.choice(12, rng.integers(0, 12), replace=False).astype(np.int32) for _ in range(n)]
    )
    done = RaggedRows.of(
        [rng.choice(12, rng.integers(0, 9), replace=False).astype(np.int32) for _ in range(n)]
    )
    history = History(
        done.rows, np.ones(done.rows.size, np.float32), np.zeros(done.rows.size, np.int64), done.offsets
    )
    answer = CandidateBatch(
        lists.rows,
        np.zeros(lists.rows.size, np.float32),
        np.full(lists.rows.size, -1, np.int32),
        lists.offsets,
    )
    nearest_triggers(answer, history, 4, vectors, np.empty(0, np.int32), np.empty((0, 5), np.float32))
    assert answer.triggers.tolist() == nearest_triggers_reference(answer, history, 4, vectors)


def test_an_entry_weighs_what_its_events_weigh():
    liked = interactions_of([[2, 0], [1]], items=3)
    events = Events(
        np.array([0, 0, 0, 1, 1], np.int32),
        np.array([2, 2, 2, 1, 0], np.int32),
        np.array([0, 1, 1, 2, 0], np.uint8),
        ("click", "like", "share"),
        np.zeros(5, np.int64),
    )
    assert event_weights(liked, events, {"click": 0.5, "like": 2.0}).tolist() == [2.5, 1.0, 1.0]


def test_rejects_are_what_the_user_never_liked():
    liked = interactions_of([[2], [1]], items=3)
    events = Events(
        np.array([0, 0, 0, 1], np.int32),
        np.array([2, 1, 0, 0], np.int32),
        np.array([0, 0, 0, 1], np.uint8),
        ("reject", "click"),
        np.array([1, 2, 3, 4], np.int64),
    )
    thrown = reject_matrix(liked, events, ("reject",))
    assert thrown.indptr.tolist() == [0, 2, 2]
    assert thrown.rows.tolist() == [0, 1]


def test_guests_of_whom_the_tower_knows_nothing_are_left_to_the_others():
    channel = channel_of()
    answer = channel.recall_batch(
        QueryBatch.plain(np.full(2, -1, np.int32), History.empty(2)), np.full(2, 4, np.int32)
    )
    assert np.diff(answer.offsets).tolist() == [0, 0]
