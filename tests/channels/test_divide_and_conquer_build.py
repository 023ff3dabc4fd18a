"""Building divide and conquer: the clusters, and what is trained over them. The second half needs PyTorch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.divide_and_conquer import DivideAndConquer, DivideAndConquerOptions
from channels.divide_and_conquer.clusters import (
    add_rows,
    clusters_of,
    directions,
    k_means,
    unit,
    user_sums,
)
from channels.two_tower.likers import item_sums
from engine.core.channel import BuildContext, LoadContext, SilentProgress
from engine.core.errors import BuildError, ConfigError
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.memory import MemorySink
from engine.models.spec import ModelSpec
from engine.testing.world import interactions_of, random_batch, tiny_interactions

GROUPS, EACH, USERS = 4, 10, 80
OPTIONS = {
    "dimension": 8,
    "metric": "inner",
    "sequence": {"kind": "sasrec", "width": 8, "length": 8, "blocks": 1},
    "clusters": GROUPS,
    "index": "exact",
    "training": {
        "epochs": 8, "batch": 16, "learning_rate": 0.02, "temperature": 1.0, "negatives": {"popular": 64},
    },
}  # fmt: skip


def planted(seed: int = 0) -> Interactions:
    """Users like eight of the ten items of their group, item i being in group i mod GROUPS."""
    random = np.random.default_rng(seed)
    lists = [
        (np.sort(random.permutation(EACH)[:8])[::-1] * GROUPS + user % GROUPS).tolist()
        for user in range(USERS)
    ]
    return interactions_of(lists, GROUPS * EACH)


def context_of(liked: Interactions, **more) -> BuildContext:
    words = b"".join(f"theme {theme}".encode() for theme in range(GROUPS))
    columns = {
        "item_id.keys": np.arange(liked.items) * 10,
        "theme": (np.arange(liked.items) % GROUPS).astype(np.int32),
        "theme.vocabulary.offsets": np.arange(0, 8 * GROUPS, 7),
        "theme.vocabulary.data": np.frombuffer(words, np.uint8),
    }
    given_to = {"item_columns": columns, "threads": 1, "progress": SilentProgress(), **more}
    return BuildContext(liked, now=int(liked.timestamps.max(initial=0)), sink=MemorySink(), **given_to)


def built(liked: Interactions, options=None, **more):
    context = context_of(liked, **more)
    DivideAndConquer.build(DivideAndConquerOptions.model_validate({**OPTIONS, **(options or {})}), context)
    return context.sink.arrays


def same_cut(one, other) -> bool:
    return (
        len(set(zip(one.tolist(), other.tolist(), strict=True)))
        == len(set(one.tolist()))
        == len(set(other.tolist()))
    )


def test_k_means_on_who_likes_what_finds_the_groups():
    liked = planted()
    for seed in range(3):
        clusters, count = k_means(directions(liked, GROUPS, seed), GROUPS, seed)
        assert count == GROUPS
        assert same_cut(clusters, np.arange(liked.items) % GROUPS)


def test_directions_are_those_of_the_dense_decomposition():
    liked = tiny_interactions(300, 12)
    dense = np.zeros((liked.users, liked.items))
    dense[np.repeat(np.arange(liked.users), liked.user_counts()), liked.rows] = 1
    u, i = (1 / np.sqrt(dense.sum(axis) + dense.sum(axis).mean()) for axis in (1, 0))
    _, _, right = np.linalg.svd(u[:, None] * dense * i)
    expected = unit((right[:4].T * i[:, None]).astype(np.float32))
    found = directions(liked, 4, 0)
    # A singular vector's sign is arbitrary; products of rows do not see it.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=0.02)


def test_an_item_that_nobody_likes_has_no_direction():
    liked = interactions_of([[0, 1], [1, 2], [0, 2]], 5)
    points = directions(liked, 2, 0)
    assert points.shape == (5, 2)
    assert not points[3:].any()


def test_fewer_points_than_clusters_make_fewer_clusters():
    clusters, count = k_means(unit(np.eye(3, dtype=np.float32)), 10, 0)
    assert (count, sorted(clusters.tolist())) == (3, [0, 1, 2])


def test_clusters_are_numbered_by_size_and_none_is_left_empty_where_points_differ():
    rng = np.random.default_rng(0)
    clusters, count = k_means(unit(rng.normal(size=(300, 6)).astype(np.float32)), 12, 1)
    sizes = np.bincount(clusters, minlength=count)
    assert count == 12
    assert (np.diff(sizes) <= 0).all()
    assert sizes.min() > 0


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_sums_are_products_with_the_matrix(seed):
    rng = np.random.default_rng(seed)
    users, items = int(rng.integers(1, 6)), int(rng.integers(1, 8))
    dense = (rng.random((users, items)) < 0.4).astype(np.float32)
    indptr = np.concatenate(([0], np.cumsum(dense.sum(1)))).astype(np.int64)
    rows = np.flatnonzero(dense.ravel()).astype(np.int32) % items
    x, y = (rng.normal(size=(n, 3)).astype(np.float32) for n in (items, users))
    of_users, of_items = np.empty_like(y), np.zeros_like(x)
    user_sums(indptr, rows, x, of_users)
    item_sums(indptr, rows, y, of_items)
    np.testing.assert_allclose(of_users, dense @ x, atol=1e-5)
    np.testing.assert_allclose(of_items, dense.T @ y, atol=1e-5)
    to, sums = rng.integers(0, 4, items).astype(np.int32), np.zeros((4, 3), np.float32)
    add_rows(x, to, sums)
    np.testing.assert_allclose(sums, np.eye(4, dtype=np.float32)[to].T @ x, atol=1e-5)


def test_a_column_makes_the_clusters_and_one_that_is_not_there_is_named():
    liked = planted()
    config = DivideAndConquerOptions.model_validate({**OPTIONS, "cluster": "theme"})
    clusters, count = clusters_of(config, context_of(liked))
    assert count == GROUPS
    assert same_cut(clusters, np.arange(liked.items) % GROUPS)
    config = DivideAndConquerOptions.model_validate({**OPTIONS, "cluster": "colour"})
    with pytest.raises(ConfigError, match="no column 'colour' of strings; it has theme"):
        clusters_of(config, context_of(liked))


@pytest.mark.parametrize("codes", [np.zeros(40, np.int32), np.arange(300, dtype=np.int32)])
def test_a_column_of_one_or_too_many_strings_is_refused(codes):
    liked = replace(planted(), items=codes.size)
    context = context_of(liked)
    context.item_columns["theme"] = codes
    with pytest.raises(ConfigError, match="2 to 256 are possible"):
        clusters_of(DivideAndConquerOptions.model_validate({**OPTIONS, "cluster": "theme"}), context)


@pytest.mark.parametrize("column", ["", "theme"])
def test_in_an_update_items_stay_and_new_ones_join_those_who_are_liked_by_the_same(column):
    liked = planted()
    config = DivideAndConquerOptions.model_validate({**OPTIONS, "cluster": column})
    first, count = clusters_of(config, context_of(liked))
    towers = {
        "sequence": {"kind": "mean"},
        "item_features": [{"name": "item_id", "kind": "id", "dimension": 64}],
    }
    spec = ModelSpec.model_validate({"prompts": count, **towers}).model_dump_json()
    previous = {
        "clusters": first[1:],  # item 0 is new, and the others had one row less
        "item_keys": np.arange(1, liked.items) * 10,
        "spec": np.frombuffer(spec.encode(), np.uint8),
    }
    again, count = clusters_of(config, context_of(liked, previous=previous, mode="resume"))
    assert count == GROUPS
    assert again.tolist() == first.tolist()
    if not column:
        other = config.model_copy(update={"clusters": 7})
        with pytest.raises(BuildError, match=r"other towers \(clusters\)"):
            clusters_of(other, context_of(liked, previous=previous, mode="resume"))


def test_nobody_who_likes_anything_is_said():
    with pytest.raises(BuildError, match="divide_and_conquer: no event"):
        built(interactions_of([[], []], 5))


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"loss": "full_softmax"},
        {"loss": "bce", "negatives": {"cluster": 2}},
        {"negatives": {"in_batch": 1}},
    ],
    ids=["popular", "whole cluster", "bce", "in batch"],
)
def test_what_is_built_finds_what_the_user_would_like_next(training):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'recall-engine[train]'")
    liked = planted()
    arrays = built(liked, {"training": {**OPTIONS["training"], **training}})
    config = DivideAndConquerOptions.model_validate(OPTIONS)
    channel = DivideAndConquer.load(config, LoadContext(arrays, liked.items, USERS, ItemColumns(liked.items)))
    batch = random_batch(liked.items, USERS, 12, seed=3)
    mine = np.arange(12) % GROUPS
    rows = np.concatenate([np.arange(3) * GROUPS + group for group in mine]).astype(np.int32)
    history = batch.history._replace(
        rows=rows, weights=np.ones(36, np.float32), timestamps=np.ones(36, np.int64),
        offsets=np.arange(0, 37, 3),
    )  # fmt: skip
    answer = channel.recall_batch(replace(batch, history=history), np.full(12, 8, np.int32))
    found = answer.rows.reshape(12, 8) % GROUPS == mine[:, None]
    assert found.mean() > 0.75, "the intent names the cluster of the user's group"


def test_it_goes_on_from_the_last_model_and_validates():
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'recall-engine[train]'")
    liked = planted()
    options = {"training": {**OPTIONS["training"], "epochs": 2, "validation": 0.2}}
    first = built(liked, options)
    assert first["user.sequence.prompts"].shape == (GROUPS + 1, 8)
    second = built(liked, options, mode="resume", previous=first)
    assert second["clusters"].tolist() == first["clusters"].tolist()
    moved = np.abs(second["user.sequence.prompts"] - first["user.sequence.prompts"])
    assert 0 < moved.max() < 0.5
    assert {name: a.tobytes() for name, a in first.items()} == {
        name: a.tobytes() for name, a in built(liked, options).items()
    }
