"""The streaming VQ channel: what it answers, what it takes in while serving, and which bundles it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from streaming_vq_world import SMALL, loaded, written

from channels.streaming_vq import StreamingVqOptions
from channels.streaming_vq.build import rewards_of
from channels.streaming_vq.merge import merge_reference
from engine.ann.lists import in_bytes
from engine.core.channel import BuildContext, Events, SilentProgress
from engine.core.errors import BuildError, ConfigError, SnapshotError, StateUnavailableError
from engine.core.memory import MemorySink
from engine.core.query import History, QueryBatch
from engine.core.types import RaggedRows
from engine.models.debiased import debiased
from engine.models.features import take_users
from engine.models.rank import rank_reference
from engine.models.streaming_options import Task
from engine.testing import ChannelContract
from engine.testing.world import catalogue_columns, random_batch, random_columns, tiny_interactions

TASKS = {"tasks": [{"name": "click"}, {"name": "finish", "kinds": ["finish"]}]}


def world(seed=0, **options):
    liked, columns = tiny_interactions(60, 40), random_columns(40, seed=1)
    words = [f"tag {code}".encode() for code in range(6)]
    offsets = np.concatenate(([0], np.cumsum([len(word) for word in words]))).astype(np.int64)
    vocabulary = {
        "tags.vocabulary.offsets": offsets,
        "tags.vocabulary.data": np.frombuffer(b"".join(words), np.uint8),
    }
    options = {**SMALL, **options}
    return (
        liked,
        columns,
        written(liked, {**catalogue_columns(columns), **vocabulary}, seed, **options),
        options,
    )


def channel_of(**more):
    liked, columns, arrays, options = world(**more)
    return loaded(arrays, liked.users, liked.items, columns, **options)


class TestTwoTower(ChannelContract):
    def channel(self):
        return channel_of()


class TestNone(ChannelContract):
    def channel(self):
        return channel_of(rank="none")


class TestComplex(ChannelContract):
    def channel(self):
        return channel_of(rank="complex")


class TestTasks(ChannelContract):
    """A tower per task, a short list, and items that have moved."""

    def channel(self):
        channel = channel_of(training=TASKS, task_weights={"finish": 2}, rank_list=17)
        rows = np.arange(0, 40, 3, dtype=np.int32)
        rows = rows[channel._columns.available[rows]]
        channel.assign(rows, (rows % 6).astype(np.int32), (rows / 8).astype(np.float32))
        return channel


def index_scores(channel, batch):
    """float64[n, K]: what the plain towers say."""
    vectors, _ = channel.user_vectors(channel._queries.encode(batch))
    codes, scales = in_bytes(channel._model.vectors)
    return vectors.astype(np.float32) @ (codes * scales[:, None]).T


def members(channel, q, batch):
    banned = set(batch.excluded.rows[batch.excluded.offsets[q] : batch.excluded.offsets[q + 1]].tolist())
    lists = channel._lists
    return [
        [(row, lists.of(row)[1]) for row in lists.take(k).tolist() if row not in banned]
        for k in range(lists.clusters)
    ]


def test_without_a_ranking_step_candidates_are_the_best_of_the_merge():
    channel = channel_of(rank="none", chunk=1, rank_list=12)
    batch = random_batch(40, 60, 5)
    answer = channel.recall_batch(batch, np.full(5, 12, np.int32))
    scores = index_scores(channel, batch)
    for q in range(5):
        expected = merge_reference(scores[q], members(channel, q, batch), 12, 1)
        mine = answer.query(q)
        assert mine.rows.tolist() == [row for row, _, _ in expected]
        np.testing.assert_allclose(mine.scores, [score for _, _, score in expected], atol=1e-5)
        assert mine.triggers.tolist() == [k for _, k, _ in expected]


@pytest.mark.parametrize("rank", ["two_tower", "complex"])
def test_the_ranking_step_orders_what_the_merge_gives_it(rank):
    channel = channel_of(rank=rank, rank_list=20, training=TASKS, task_weights={"click": 3})
    batch = random_batch(40, 60, 5)
    k = np.full(5, 7, np.int32)
    answer = channel.recall_batch(batch, k)
    users = channel._queries.encode(batch)
    vectors, inputs = channel.user_vectors(users)
    scores = channel._scorer.scores(vectors)
    model, spec = channel._model, channel._model.spec
    arrays = world(rank=rank, training=TASKS)[2]
    kept = arrays["lists.vectors"] * arrays["lists.scales"][:, None]
    for q in range(5):
        listed = merge_reference(scores[q, : spec.clusters], members(channel, q, batch), 20, 2)
        rows = np.array([row for row, _, _ in listed])
        slots = model.places[rows]
        history = np.empty(0, np.int32)
        if rank == "complex":
            read = take_users(users, np.array([q])).sequence
            codes, lengths = debiased(read, channel._groups, spec.dropped_clusters, spec.rank_history)
            history = codes[0, codes.shape[1] - lengths[0] :]
        expected = rank_reference(
            spec, arrays, channel._weights, inputs[q], kept[slots, : spec.rank_dimension],
            arrays["lists.rank_bias"][slots], history,
        )  # fmt: skip
        order = np.lexsort((rows, -expected))[:7]
        assert answer.query(q).rows.tolist() == rows[order].tolist()
        np.testing.assert_allclose(answer.query(q).scores, expected[order], rtol=1e-4, atol=1e-4)
        cluster_of = {row: cluster for row, cluster, _ in listed}
        assert answer.query(q).triggers.tolist() == [cluster_of[row] for row in rows[order].tolist()]


def test_tasks_are_weighed_in_the_index_too():
    batch = random_batch(40, 60, 4)
    only, other = (
        channel_of(rank="none", training=TASKS, task_weights=weights)
        for weights in ({"click": 1, "finish": 0}, {"click": 0, "finish": 1})
    )
    mixed = channel_of(rank="none", training=TASKS, task_weights={"click": 3, "finish": 1})
    expected = 0.75 * index_scores(only, batch) + 0.25 * index_scores(other, batch)
    np.testing.assert_allclose(index_scores(mixed, batch), expected, atol=1e-5)


def test_an_item_that_is_assigned_is_found_there_in_the_next_batch():
    channel = channel_of(rank="none")
    batch = random_batch(40, 60, 3)
    k = np.full(3, 5, np.int32)
    best = int(np.argmax(index_scores(channel, batch)[0]))
    row = next(
        row
        for row in np.flatnonzero(channel._columns.available).tolist()
        if channel._lists.of(row)[0] != best
    )
    assert channel.recall_batch(batch, k).query(0).rows[0] != row
    one = np.array([row], np.int32)
    channel.assign(one, np.array([best], np.int32), np.array([50.0], np.float32))
    after = channel.recall_batch(batch, k).query(0)
    assert (after.rows[0], after.triggers[0]) == (row, best)
    channel.assign(one, np.array([-1], np.int32), np.array([0.0], np.float32))
    assert row not in channel.recall_batch(batch, np.full(3, 40, np.int32)).rows


def test_what_is_taken_down_is_never_recalled_costs_no_place_and_comes_back_where_it_was_put_meanwhile():
    channel = channel_of()
    batch = random_batch(40, 60, 3)
    k = np.full(3, 5, np.int32)
    best = int(channel.recall_batch(batch, k).rows[0])
    row = np.array([best], np.int32)
    channel._columns.put("available", row, np.zeros(1, np.bool_))
    channel.update(row)
    for cluster in (3, 4):
        channel.assign(row, np.array([cluster], np.int32), np.ones(1, np.float32))
        after = channel.recall_batch(batch, np.full(3, 40, np.int32))
        assert best not in after.rows
        assert np.diff(channel.recall_batch(batch, k).offsets).tolist() == [5, 5, 5]
    channel._columns.put("available", row, np.ones(1, np.bool_))
    channel.update(row)
    after = channel.recall_batch(batch, np.full(3, 40, np.int32))
    assert set(after.triggers[after.rows == best].tolist()) == {4}


def test_what_was_down_when_it_was_loaded_is_not_recalled():
    channel = channel_of()
    down = np.flatnonzero(~channel._columns.available)
    assert down.size
    answer = channel.recall_batch(random_batch(40, 60, 3), np.full(3, 40, np.int32))
    assert not set(down.tolist()) & set(answer.rows.tolist())


def test_what_a_request_excludes_costs_no_place():
    channel = channel_of(rank_list=9)
    batch = random_batch(40, 60, 3)
    k = np.full(3, 9, np.int32)
    first = channel.recall_batch(batch, k)
    excluded = RaggedRows.of([first.query(0).rows, np.empty(0, np.int32), first.query(2).rows[:2]])
    after = channel.recall_batch(replace(batch, excluded=excluded), k)
    assert np.diff(after.offsets).tolist() == [9, 9, 9]
    assert not set(after.query(0).rows.tolist()) & set(first.query(0).rows.tolist())
    assert after.query(1).rows.tolist() == first.query(1).rows.tolist()


class Shown:
    """Exposure of fixed rows, or one that cannot be read."""

    def __init__(self, rows):
        self.rows = rows

    def seen(self, candidates, keys):
        if self.rows is None:
            raise StateUnavailableError("cannot be read")
        assert keys.size == 40
        return np.isin(candidates.rows, self.rows)


def test_what_the_user_was_shown_costs_no_place_unless_it_may_be_shown_again():
    channel = channel_of()
    batch = random_batch(40, 60, 2)
    k = np.full(2, 5, np.int32)
    first = channel.recall_batch(batch, k)
    shown = replace(batch, live=replace(batch.live, exposure=Shown(first.rows)))
    after = channel.recall_batch(shown, k)
    assert np.diff(after.offsets).tolist() == [5, 5]
    assert not set(after.rows.tolist()) & set(first.rows.tolist())
    again = channel_of(mask_exposed=False).recall_batch(shown, k)
    assert again.rows.tolist() == first.rows.tolist()
    unread = replace(batch, live=replace(batch.live, exposure=Shown(None)))
    assert channel.recall_batch(unread, k).rows.tolist() == first.rows.tolist()


def publish(channel, like, row=40):
    """Publish an item with the tags of another."""
    columns = channel._columns
    columns.grow(row + 1)
    new = np.array([row], np.int32)
    begin = columns.tag_starts[like]
    tags = columns.tag_codes[begin : begin + columns.tag_counts[like]]
    columns.put_tags(new, np.array([tags.size], np.int32), tags)
    channel.update(new)


@pytest.mark.parametrize("rank", ["none", "two_tower", "complex"])
def test_what_is_published_is_found_in_the_next_batch_until_a_trainer_knows_better(rank):
    channel = channel_of(rank=rank)
    twin = int(np.flatnonzero(channel._columns.tag_counts > 0)[0])
    publish(channel, twin)
    batch, k = random_batch(40, 60, 4), np.full(4, 60, np.int32)
    answer = channel.recall_batch(batch, k)
    assert (answer.rows == 40).sum() == 4
    first = channel._lists.of(40)
    assert first[1] == channel._model.code_bias[0]
    row = np.array([40], np.int32)
    other = np.array([(first[0] + 1) % 6], np.int32)
    channel.assign(row, other, np.full(1, 0.5, np.float32))
    channel.update(row)
    assert channel._lists.of(40) == (int(other[0]), 0.5)
    channel._columns.put("available", row, np.zeros(1, np.bool_))
    channel.update(row)
    assert 40 not in channel.recall_batch(batch, k).rows


def test_what_a_trainer_has_learnt_of_what_is_published_ranks_it():
    liked, columns, arrays, options = world(rank="two_tower")
    plain = loaded(arrays, liked.users, liked.items, columns, **options)
    twin = int(np.flatnonzero(plain._columns.tag_counts > 0)[0])
    publish(plain, twin)
    key = plain._columns.keys[40]
    arrays["published.keys"] = np.array([key + 1, key], np.int64)
    arrays["published.rank.item_vectors"] = np.arange(8, dtype=np.float32).reshape(2, 4)
    arrays["published.rank.item_bias"] = np.array([[1.0], [2.0]], np.float32)
    channel = loaded(arrays, liked.users, liked.items, random_columns(40, seed=1), **options)
    publish(channel, twin)
    assert channel._rank._fresh[0, :4].tolist() == [4, 5, 6, 7]
    assert channel._rank._fresh_biases[0] == 2
    assert plain._rank._fresh_biases[0] != 2
    arrays["published.rank.item_bias"] = arrays["published.rank.item_bias"][:1]
    with pytest.raises(SnapshotError, match=r"published\.rank\.item_bias"):
        loaded(arrays, liked.users, liked.items, columns, **options)


@pytest.mark.parametrize("rank", ["none", "two_tower", "complex"])
def test_an_item_may_be_assigned_before_anything_is_known_of_it(rank):
    channel = channel_of(rank=rank)
    channel._columns.grow(43)
    channel.assign(np.array([42], np.int32), np.array([1], np.int32), np.array([9.0], np.float32))
    answer = channel.recall_batch(random_batch(40, 60, 2), np.full(2, 60, np.int32))
    assert (answer.rows == 42).sum() == 2
    assert set(answer.triggers[answer.rows == 42].tolist()) == {1}


def test_histories_are_debiased_by_where_items_are_now():
    channel = channel_of(rank="complex")
    before = channel._groups.copy()
    row = next(row for row in range(40) if channel._columns.available[row])
    cluster = next(k for k in range(6) if channel._model.secondary[k] != before[row + 1])
    channel.assign(np.array([row], np.int32), np.array([cluster], np.int32), np.zeros(1, np.float32))
    assert channel._groups[row + 1] == channel._model.secondary[cluster]
    assert (np.delete(channel._groups, row + 1) == np.delete(before, row + 1)).all()


def test_an_assignment_that_cannot_be_is_refused():
    channel = channel_of()
    row = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="cluster 6"):
        channel.assign(row, np.array([6], np.int32), np.zeros(1, np.float32))


def test_a_guest_without_history_gets_an_answer():
    channel = channel_of(rank="complex")
    batch = QueryBatch.plain(np.array([-1], np.int32), History.empty(1))
    answer = channel.recall_batch(batch, np.array([5], np.int32))
    assert answer.rows.size == 5
    assert np.isfinite(answer.scores).all()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("codebook.vectors", lambda a: a[:-1], r"codebook.vectors.*float32\[5, 8\].*\[6, 8\]"),
        ("codebook.counts", lambda a: a[:-1], "codebook.counts"),
        ("codebook.vectors", lambda a: a * np.nan, "no number"),
        ("lists.rows", lambda a: a + 1, "lists.rows"),
        ("lists.offsets", lambda a: a[::-1].copy(), "lists.offsets"),
        ("lists.places", lambda a: a.astype(np.int64), "lists.places"),
        ("lists.vectors", lambda a: a[:, :-1], "lists.vectors"),
        ("lists.scales", lambda a: a.astype(np.float64), r"lists.scales.*float64\[40\].*float32\[40\]"),
        ("assignment", None, "assignment"),
        ("rank.project.weight", lambda a: a[:-1], "rank.project.weight"),
        ("spec", lambda a: a[:-1], "spec"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused_by_name(name, change, words):
    liked, columns, arrays, options = world()
    broken = {part: array for part, array in arrays.items() if part != name}
    if change is not None:
        broken[name] = change(arrays[name])
    with pytest.raises(SnapshotError, match=words):
        loaded(broken, liked.users, liked.items, columns, **options)


def test_a_model_of_another_catalogue_is_refused():
    liked, _, arrays, options = world()
    with pytest.raises(SnapshotError, match="40 items, the catalogue has 41"):
        loaded(arrays, liked.users, 41, random_columns(41, seed=1), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "cosine"}, "inner"),
        ({"sequence": {"kind": "comirec", "width": 8}}, "comirec"),
        ({"rank_heads": 3}, "rank_heads"),
        ({"rank": "complex", "rank_read": 2}, "rank_read"),
        ({"clusters": 1}, "clusters"),
        ({"rank_list": 0}, "rank_list"),
        ({"task_weights": {"other": 1}}, "'other'"),
        ({"task_weights": {"positive": 0}}, "no task"),
        ({"training": {"tasks": []}}, "tasks"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        StreamingVqOptions.model_validate({**SMALL, **options})


def test_a_live_trainers_later_items_are_left_out_of_a_bundle():
    """Their rows are its own; servers learn from the log where they are."""
    from streaming_vq_world import random_training

    from channels.streaming_vq.bundle import specified
    from engine.models.cluster_lists import as_served

    liked = tiny_interactions(60, 40)
    config = StreamingVqOptions.model_validate({**SMALL, "item_features": [SMALL["item_features"][0]]})
    context = BuildContext(liked, {}, 0, MemorySink(), SilentProgress(), 1)
    spec, _ = specified(config, context, None)
    trained = random_training(spec)
    longer = dict(trained)
    for name in ("assignment", "item_bias", "rank.item_vectors", "rank.item_bias"):
        longer[name] = np.concatenate((trained[name], trained[name][:3]))
    made, expected = as_served(spec, longer), as_served(spec, trained)
    assert made.keys() == expected.keys()
    assert "rank.item_vectors" not in made
    for name, array in expected.items():
        assert made[name].tobytes() == array.tobytes()
    # Lists that were there before are made anew.
    stale = {**longer, "lists.rows": np.zeros(40, np.int32)}
    assert as_served(spec, stale)["lists.rows"].tolist() == expected["lists.rows"].tolist()


def test_an_update_goes_on_from_what_a_trainer_learnt_of_what_was_published():
    from channels.streaming_vq.bundle import Bundle, specified
    from channels.streaming_vq.start import carried_over
    from channels.two_tower.bundle import keys_of_items

    liked = tiny_interactions(60, 40)
    options = {**SMALL, "item_features": [SMALL["item_features"][0]]}
    config = StreamingVqOptions.model_validate(options)
    context = BuildContext(liked, {}, 0, MemorySink(), SilentProgress(), 1)
    keys = keys_of_items(context)
    arrays = written(liked, {}, **options)
    arrays["item_keys"] = np.where(keys == keys[5], -77, keys)  # the build before did not know that item
    arrays["published.keys"] = np.array([-78, keys[5]], np.int64)
    arrays["published.bias.weight"] = np.array([6, 7], np.float32)
    for name, width in (("item.embeddings.0.weight", 8), ("rank.items.weight", 4), ("rank.bias.weight", 1)):
        arrays[f"published.{name}"] = np.full((2, width), 3, np.float32)
    for name, width in (("rank.item_vectors", 4), ("rank.item_bias", 1)):
        arrays[f"published.{name}"] = np.zeros((2, width), np.float32)
    previous = Bundle(arrays)
    spec, encoders = specified(config, context, previous)
    start = carried_over("vq", spec, encoders, keys, previous, arrays)
    assert start["bias.weight"][6] == 7
    assert (start["item.embeddings.0.weight"][6] == 3).all()
    assert (start["rank.items.weight"][6] == 3).all()
    assert start["assignment"][5] == -1
    others = np.arange(41) != 6
    assert (start["bias.weight"][others] == arrays["bias.weight"][others]).all()


def test_rewards_are_a_pair_of_user_and_item_each_with_what_any_task_rewards():
    liked = tiny_interactions(5, 6)
    kinds = ("click", "finish")
    events = Events(
        np.array([0, 0, 1, 1], np.int32), np.array([2, 2, 3, 4], np.int32), np.array([0, 1, 0, 1], np.uint8), kinds,
        np.array([50, 40, 30, 20], np.int64),
    )  # fmt: skip
    tasks = (Task(name="click", kinds=("click",)), Task(name="finish", kinds=("finish",)))
    users, items, rewards, times = rewards_of(tasks, liked, events)
    assert list(zip(users, items, rewards.tolist(), times, strict=True)) == [
        (0, 2, [1, 1], 40), (1, 3, [1, 0], 30), (1, 4, [0, 1], 20),
    ]  # fmt: skip
    users, _, rewards, _ = rewards_of((Task(name="positive"), tasks[1]), liked, events)
    assert rewards[:, 0].sum() == liked.entries
    assert rewards[:, 1].sum() == 2


def test_a_build_says_what_it_cannot_learn():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from channels.streaming_vq import StreamingVq

    liked = tiny_interactions(60, 40)
    plain = {**SMALL, "item_features": [SMALL["item_features"][0]]}
    context = BuildContext(liked, {}, 0, MemorySink(), SilentProgress(), 1)
    stays = {"tasks": [{"name": "stay", "kinds": ["stay"], "reward": "log_value"}]}
    with pytest.raises(ConfigError, match="values"):
        StreamingVq.build(StreamingVqOptions.model_validate({**plain, "training": stays}), context)
    with pytest.raises(BuildError, match="events"):
        StreamingVq.build(StreamingVqOptions.model_validate({**plain, "training": TASKS}), context)
    many = StreamingVqOptions.model_validate({**plain, "clusters": 41})
    with pytest.raises(ConfigError, match="41 clusters"):
        StreamingVq.build(many, context)


@pytest.mark.parametrize("rank", ["none", "two_tower", "complex"])
def test_what_is_built_is_served_and_learnt_on(rank):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from channels.streaming_vq import StreamingVq

    liked = tiny_interactions(60, 40)
    training = {"batch": 64, "negatives": 8}
    options = {**SMALL, "item_features": [SMALL["item_features"][0]], "rank": rank, "training": training}
    config = StreamingVqOptions.model_validate(options)
    sink = MemorySink()
    now = int(liked.timestamps.max())
    context = BuildContext(liked, {}, now, sink, SilentProgress(), 1)
    StreamingVq.build(config, context)
    first = loaded(sink.arrays, liked.users, liked.items, **options)
    answer = first.recall_batch(random_batch(40, 60, 4), np.full(4, 10, np.int32))
    assert np.diff(answer.offsets).tolist() == [10] * 4
    assert first.event_kinds(config) == ()
    again = MemorySink()
    resumed = replace(context, sink=again, mode="resume", previous=sink.arrays)
    StreamingVq.build(config, resumed)
    loaded(again.arrays, liked.users, liked.items, **options)
    assert again.arrays["codebook.vectors"].tobytes() != sink.arrays["codebook.vectors"].tobytes()
    with pytest.raises(BuildError, match="since the last"):
        StreamingVq.build(config, replace(resumed, mode="incremental"))
    other = StreamingVqOptions.model_validate({**options, "clusters": 7})
    with pytest.raises(BuildError, match="clusters"):
        StreamingVq.build(other, resumed)
