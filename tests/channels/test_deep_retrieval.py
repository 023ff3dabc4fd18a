"""The Deep Retrieval channel: what it answers, what it takes in while serving, and which bundles it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from deep_retrieval_world import SMALL, loaded, written
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from channels.deep_retrieval import DeepRetrieval, DeepRetrievalOptions
from channels.deep_retrieval.lists import PathLists, invert, reach_reference
from channels.deep_retrieval.names import path_names
from channels.deep_retrieval.rerank import Ranker, rank_reference
from engine.ann.lists import in_bytes
from engine.core.channel import BuildContext, SilentProgress
from engine.core.errors import BuildError, ConfigError, SnapshotError, StateUnavailableError
from engine.core.memory import MemorySink
from engine.core.query import History, QueryBatch
from engine.core.types import RaggedRows
from engine.models.paths import PathSpec
from engine.models.tiles import in_wide_bytes
from engine.testing import ChannelContract
from engine.testing.world import (
    catalogue_columns,
    interactions_of,
    random_batch,
    random_columns,
    tiny_interactions,
)


def described(columns):
    words = [f"tag {code}".encode() for code in range(6)]
    offsets = np.concatenate(([0], np.cumsum([len(word) for word in words]))).astype(np.int64)
    data = np.frombuffer(b"".join(words), np.uint8)
    return {
        **catalogue_columns(columns),
        "tags.vocabulary.offsets": offsets,
        "tags.vocabulary.data": data,
    }


def world(seed=0, liked=None, **options):
    liked = tiny_interactions(60, 40) if liked is None else liked
    columns = random_columns(40, seed=1)
    options = {**SMALL, **options}
    return liked, columns, written(liked, described(columns), seed=seed, **options), options


def channel_of(**more):
    liked, columns, arrays, options = world(**more)
    return loaded(arrays, liked.users, liked.items, columns, **options)


class TestReranked(ChannelContract):
    def channel(self):
        return channel_of()


class TestByPath(ChannelContract):
    def channel(self):
        return channel_of(rerank=False)


class TestDeepLattice(ChannelContract):
    """More paths than have a table of places: they are searched for."""

    def channel(self):
        channel = channel_of()
        model = channel._model
        channel._lists = PathLists(
            1 << 40,
            model.codes,
            model.offsets,
            model.rows,
            model.list_vectors,
            model.list_scales,
            model.list_bias,
        )
        return channel


def on_paths(channel, batch, beam=30):
    """Return, per query, what is on its paths, as the plain twins say: rows, codes and logs; and its vector."""
    vectors = channel._tower.vectors(channel._queries.encode(batch))
    paths, logs = channel._paths.beam(vectors, beam)
    available = channel._columns.available
    found = [
        reach_reference(
            channel._model.assignment,
            paths[q],
            logs[q],
            available,
            set(batch.excluded.rows[batch.excluded.offsets[q] : batch.excluded.offsets[q + 1]].tolist()),
        )
        for q in range(len(batch))
    ]
    return vectors, found


def in_bytes_and_back(vectors):
    codes, scales = in_bytes(vectors)
    return codes * scales[:, None]


def test_candidates_are_the_best_of_what_is_on_the_users_paths():
    channel = channel_of()
    batch = random_batch(40, 60, 5)
    answer = channel.recall_batch(batch, np.full(5, 6, np.int32))
    vectors, found = on_paths(channel, batch)
    model = channel._model
    for q in range(5):
        rows = np.array([row for row, _, _ in found[q]], np.int32)
        assert rows.size > 6
        expected = rank_reference(vectors[q], in_bytes_and_back(model.vectors), model.bias, rows, 6)
        mine = answer.query(q)
        assert mine.rows.tolist() == [row for row, _ in expected]
        np.testing.assert_allclose(mine.scores, [score for _, score in expected], atol=1e-5)
        path_of = {row: code for row, code, _ in found[q]}
        assert model.codes[mine.triggers].tolist() == [path_of[row] for row in mine.rows.tolist()]


def test_without_the_ranker_they_stand_in_order_of_their_paths():
    channel = channel_of(rerank=False)
    batch = random_batch(40, 60, 5)
    answer = channel.recall_batch(batch, np.full(5, 40, np.int32))
    _, found = on_paths(channel, batch)
    for q in range(5):
        expected = sorted(found[q], key=lambda each: (-each[2], each[0]))
        assert answer.query(q).rows.tolist() == [row for row, _, _ in expected]
        np.testing.assert_allclose(answer.query(q).scores, [log for _, _, log in expected])


def test_a_wider_beam_finds_no_less():
    batch = random_batch(40, 60, 5)
    k = np.full(5, 40, np.int32)
    narrow, wide = channel_of(beam=5).recall_batch(batch, k), channel_of(beam=125).recall_batch(batch, k)
    assert (np.diff(narrow.offsets) <= np.diff(wide.offsets)).all()
    assert np.diff(wide.offsets).tolist() == [int(channel_of()._columns.available.sum())] * 5


def test_what_is_taken_down_is_never_recalled_and_costs_no_place():
    channel = channel_of()
    batch = random_batch(40, 60, 3)
    k = np.full(3, 5, np.int32)
    best = int(channel.recall_batch(batch, k).rows[0])
    row = np.array([best], np.int32)
    channel._columns.put("available", row, np.zeros(1, np.bool_))
    channel.update(row)
    after = channel.recall_batch(batch, k)
    assert best not in after.rows
    assert np.diff(after.offsets).tolist() == [5, 5, 5]
    channel._columns.put("available", row, np.ones(1, np.bool_))
    channel.update(row)
    assert best in channel.recall_batch(batch, k).rows


def test_what_a_request_excludes_costs_no_place():
    channel = channel_of()
    batch = random_batch(40, 60, 3)
    k = np.full(3, 5, np.int32)
    first = channel.recall_batch(batch, k)
    excluded = RaggedRows.of([first.query(0).rows, np.empty(0, np.int32), first.query(2).rows[:2]])
    after = channel.recall_batch(replace(batch, excluded=excluded), k)
    assert np.diff(after.offsets).tolist() == [5, 5, 5]
    assert not set(after.query(0).rows.tolist()) & set(first.query(0).rows.tolist())
    assert after.query(1).rows.tolist() == first.query(1).rows.tolist()
    assert after.query(2).rows.tolist()[:3] == first.query(2).rows.tolist()[2:]


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
    # What cannot be read is for the scene's filter to answer for.
    unread = replace(batch, live=replace(batch.live, exposure=Shown(None)))
    assert channel.recall_batch(unread, k).rows.tolist() == first.rows.tolist()


def publish(channel, like, row=40):
    """Publish an item with the author and tags of another."""
    columns = channel._columns
    columns.grow(row + 1)
    new = np.array([row], np.int32)
    columns.put("authors", new, columns.authors[[like]])
    tags = columns.tag_codes[columns.tag_starts[like] : columns.tag_starts[like] + columns.tag_counts[like]]
    columns.put_tags(new, np.array([tags.size], np.int32), tags)
    channel.update(new)


def test_what_is_published_is_found_in_the_next_batch_by_what_is_known_of_it():
    channel = channel_of(beam=125)
    twin = int(np.flatnonzero(channel._columns.available & (channel._columns.tag_counts > 0))[0])
    publish(channel, twin)
    batch = random_batch(40, 60, 4)
    answer = channel.recall_batch(batch, np.full(4, 41, np.int32))
    assert (answer.rows == 40).sum() == 4
    vectors = channel._tower.vectors(channel._queries.encode(batch))
    mine = answer.rows == 40
    assert np.isfinite(answer.scores[mine]).all()
    assert vectors.shape == (4, 8)
    # It is on paths that its author's or its tags' items vote for, and goes when it is taken down.
    votes = set(channel._model.score_paths.ravel().tolist())
    assert set(channel._model.codes[answer.triggers[mine]].tolist()) <= votes
    channel._columns.put("available", np.array([40], np.int32), np.zeros(1, np.bool_))
    channel.update(np.array([40], np.int32))
    assert 40 not in channel.recall_batch(batch, np.full(4, 41, np.int32)).rows


def test_what_changes_after_it_was_published_moves():
    channel = channel_of(beam=125)
    likes = np.flatnonzero(channel._columns.available & (channel._columns.authors >= 0))
    publish(channel, int(likes[0]))
    first = channel._placed[40].tolist()
    moved = next(
        placed
        for like in likes[1:].tolist()
        if (publish(channel, like), placed := channel._placed[40].tolist())[1] != first
    )
    on = [
        place
        for place in range(channel._model.codes.size)
        if 40 in channel._lists._added.take(place).tolist()
    ]
    assert sorted(on) == sorted(moved)


def test_what_is_similar_to_nothing_is_on_no_path():
    channel = channel_of(beam=125)
    channel._columns.grow(41)
    channel.update(np.array([40], np.int32))
    answer = channel.recall_batch(random_batch(40, 60, 2), np.full(2, 41, np.int32))
    assert 40 not in answer.rows


def test_an_item_without_an_event_is_placed_by_its_features_and_on_no_path_without():
    rows = [list(range(39)) for _ in range(60)]
    liked = interactions_of(rows, 40)
    channel = channel_of(liked=liked)
    assert (channel._model.assignment[:39] >= 0).all()
    assert channel._columns.authors[39] >= 0
    assert channel._model.assignment[39, 0] >= 0
    bare = channel_of(liked=liked, item_features=[])
    assert (bare._model.assignment[39] == -1).all()
    assert 39 not in bare._model.rows


def test_a_build_takes_what_was_learnt_earlier():
    liked = interactions_of([[user % 37] for user in range(60)], 40)  # the last three without an event
    _, columns, arrays, options = world(liked=liked)
    learnt = {name: array for name, array in arrays.items() if name.startswith(DeepRetrieval.learnt)}
    sink = MemorySink()
    now = int(liked.timestamps.max())
    context = BuildContext(liked, described(columns), now, sink, SilentProgress(), 1, learnt=learnt)
    DeepRetrieval.build(DeepRetrievalOptions.model_validate(options), context)
    assert sink.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(sink.arrays[name], array), name


def test_guests_are_answered():
    channel = channel_of()
    batch = QueryBatch.plain(np.full(2, -1, np.int32), History.empty(2))
    answer = channel.recall_batch(batch, np.full(2, 4, np.int32))
    assert np.diff(answer.offsets).tolist() == [4, 4]
    assert answer.rows[:4].tolist() == answer.rows[4:].tolist()


def test_triggers_have_names():
    channel = channel_of()
    answer = channel.recall_batch(random_batch(40, 60, 2), np.full(2, 4, np.int32))
    names = channel.trigger_names(answer.triggers.astype(np.int64))
    text = [bytes(name).rstrip(b"\0").decode() for name in names]
    lattice = channel._model.spec.lattice
    assert text == [lattice.name(int(channel._model.codes[place])) for place in answer.triggers]


@pytest.mark.parametrize(("width", "depth"), [(100, 3), (1000, 2), (2, 62), (7, 1), (65_536, 3)])
def test_names_are_those_of_the_lattice(width, depth):
    lattice = PathSpec(width=width, depth=depth, dimension=1)
    codes = np.random.default_rng(0).integers(0, lattice.paths, 50)
    codes[:2] = 0, lattice.paths - 1
    names = [bytes(name).rstrip(b"\0").decode() for name in path_names(codes, lattice)]
    assert names == [lattice.name(int(code)) for code in codes]


def lists_of(paths, assignment, vectors, bias):
    codes, offsets, rows = invert(assignment)
    return PathLists(paths, codes, offsets, rows, *in_wide_bytes(vectors, rows), bias[rows])


@given(st.integers(0, 2**16), st.booleans())
@settings(max_examples=40, deadline=None)
def test_lists_and_ranker_are_as_plain_python_says(seed, rerank):
    random = np.random.default_rng(seed)
    n, items, beam, whole = int(random.integers(1, 4)), int(random.integers(1, 60)), 6, 12
    published, e = int(random.integers(0, 4)), int(random.integers(1, 20))
    assignment = np.sort(random.integers(-1, whole, (items, 3)), axis=1)[:, ::-1].copy()
    vectors = random.integers(-127, 128, (items + published, e)).astype(np.float32)
    # The largest is 127: bytes are these numbers themselves.
    vectors[:, 0] = 127
    bias = random.integers(-2, 3, items + published).astype(np.float32)
    lists = lists_of(int(random.choice([whole, 1 << 30])), assignment, vectors[:items], bias[:items])
    ranker = Ranker(items, e)
    nowhere = np.empty(0, np.int32)
    for row in range(items, items + published):
        places = (
            np.unique(random.integers(0, lists.codes.size, 2)).astype(np.int32)
            if lists.codes.size
            else nowhere
        )
        ranker.put(np.array([row], np.int32), vectors[row : row + 1], bias[row : row + 1])
        lists.move(row, nowhere, places)
        mine = np.full((1, 3), -1)
        mine[0, : places.size] = lists.codes[places]
        assignment = np.concatenate((assignment, mine))
    paths = np.stack([random.permutation(whole)[:beam] for _ in range(n)]).astype(np.int64)
    logs = -np.sort(random.integers(0, 4, (n, beam)), axis=1).astype(np.float32)
    k = random.integers(0, 9, n).astype(np.int32)
    available = random.random(items + published) < 0.8
    excluded = [random.permutation(items)[: random.integers(0, 4)].astype(np.int32) for _ in range(n)]
    users = random.integers(-2, 3, (n, e)).astype(np.float32)
    asked = k > 0
    answer = ranker.best(
        users[asked], paths[asked], logs[asked], k, lists, available, RaggedRows.of(excluded), rerank
    )
    for q in range(n):
        one = answer.query(q)
        plain = reach_reference(assignment, paths[q], logs[q], available, set(excluded[q].tolist()))
        rows = np.array([row for row, _, _ in plain], np.int32)
        best = rank_reference(users[q], vectors, bias, rows, int(k[q]))
        if not rerank:
            best = sorted(((row, log) for row, _, log in plain), key=lambda each: (-each[1], each[0]))[: k[q]]
        assert list(zip(one.rows.tolist(), one.scores.tolist(), strict=True)) == best
        path_of = {row: code for row, code, _ in plain}
        assert lists.codes[one.triggers].tolist() == [path_of[row] for row in one.rows.tolist()]


def test_of_many_items_on_several_paths_the_best_are_found_in_every_batch():
    random = np.random.default_rng(3)
    items, whole, beam, n = 3000, 40, 20, 5
    assignment = np.argsort(random.random((items, whole)), axis=1)[:, :3].astype(np.int64)
    vectors = random.standard_normal((items, 24)).astype(np.float32)
    bias = random.standard_normal(items).astype(np.float32)
    lists = lists_of(whole, assignment, vectors, bias)
    users = random.standard_normal((n, 24)).astype(np.float32)
    paths = np.stack([random.permutation(whole)[:beam] for _ in range(n)]).astype(np.int64)
    logs = -np.sort(random.random((n, beam)), axis=1).astype(np.float32)
    # Most of what is best is excluded or taken down: the ranker has to look further.
    available = bias < 1
    excluded = [
        np.flatnonzero(bias > 0).astype(np.int32) if q % 2 else np.empty(0, np.int32) for q in range(n)
    ]
    k = np.array([1, 50, 100, 300, 3000], np.int32)
    ranker, ragged = Ranker(items, 24), RaggedRows.of(excluded)
    answer = ranker.best(users, paths, logs, k, lists, available, ragged, True)
    for q in range(n):
        banned = set(excluded[q].tolist())
        rows = np.array(
            [row for row, _, _ in reach_reference(assignment, paths[q], logs[q], available, banned)]
        )
        best = rank_reference(users[q], vectors, bias, rows, int(k[q]))
        one = answer.query(q)
        assert one.rows.size == len(best)
        # Bytes put those at the end in another order.
        assert len(set(one.rows.tolist()) & {row for row, _ in best}) >= 0.97 * len(best)
        np.testing.assert_allclose(one.scores, [score for _, score in best], atol=0.15)
        alone = ranker.best(
            users[q : q + 1], paths[q : q + 1], logs[q : q + 1], k[q : q + 1], lists, available,
            RaggedRows.of(excluded[q : q + 1]), True,
        )  # fmt: skip
        assert (alone.rows.tobytes(), alone.scores.tobytes()) == (one.rows.tobytes(), one.scores.tobytes())


def test_groups_vote_as_plain_python_says():
    from channels.deep_retrieval.placement import groups_of, place_reference
    from engine.models.features import take_encoded

    channel = channel_of()
    model = channel._model
    offsets, groups = groups_of(model.spec.item_features, model.items)
    places, vectors, bias = model.placement.place(take_encoded(model.items, np.arange(40, dtype=np.int32)), 2)
    for row in range(40):
        similar = [
            item
            for group in groups[offsets[row] : offsets[row + 1]].tolist()
            for item in model.group_items[
                model.group_offsets[group] : model.group_offsets[group + 1]
            ].tolist()
        ]
        expected = place_reference(similar, model.score_paths, model.score_values, model.codes, 2)
        assert model.codes[places[row][places[row] >= 0]].tolist() == expected
        if similar:
            np.testing.assert_allclose(vectors[row], model.vectors[similar].mean(0), atol=1e-6)
            assert bias[row] == pytest.approx(model.bias[similar].mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"paths": 5}, r"paths = 5 \(J\) is more than kept_paths = 4 \(S\)"),
        ({"kept_paths": 126}, "more than width.depth = 125 paths"),
        ({"beam": 126}, "beam = 126 is more than"),
        ({"beam": 0}, "greater than or equal to 1"),
        ({"width": 65_536, "depth": 4}, r"more than 2\^62"),
        ({"sequence": {"kind": "comirec", "width": 8}}, "several vectors"),
        ({"item_features": [{"name": "item_id", "kind": "id"}]}, "no value that items share"),
        ({"item_features": [{"name": "quality", "kind": "numeric"}]}, "no value that items share"),
        ({"sequence": {"kind": "none"}}, "a feature or a sequence"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        DeepRetrievalOptions.model_validate({**SMALL, **options})


def context_of(liked):
    return BuildContext(liked, {}, 0, MemorySink(), SilentProgress(), 1)


def test_a_lattice_too_small_for_the_corpus_names_the_width_that_would_do():
    from channels.deep_retrieval import DeepRetrieval

    options = {**SMALL, "width": 5, "depth": 1, "kept_paths": 5, "beam": 5, "item_features": []}
    liked = interactions_of([[0]], 5000)
    with pytest.raises(
        ConfigError, match=r"5\^1 = 5 paths are too few for 5,000 items.*take 10 or more"
    ) as caught:
        DeepRetrieval.build(DeepRetrievalOptions.model_validate(options), context_of(liked))
    assert caught.value.field == "width"


def test_a_log_without_likes_is_refused():
    from channels.deep_retrieval import DeepRetrieval

    with pytest.raises(BuildError, match="deep_retrieval: no event"):
        DeepRetrieval.build(DeepRetrievalOptions.model_validate(SMALL), context_of(interactions_of([[]], 4)))


@pytest.mark.parametrize(
    "name",
    [
        "spec", "learnt_until", "assignment", "scores.paths", "scores.values", "rank.vectors", "rank.bias", "lists.paths",
        "lists.offsets", "lists.rows", "lists.vectors", "lists.scales", "lists.bias",
        "similar.offsets", "similar.items", "paths.layers.1.0.weight",
        "paths.nodes.0.weight", "user.sequence.items.weight", "encoded.user.codes",
    ],
)  # fmt: skip
def test_a_bundle_that_lacks_something_is_refused(name):
    liked, columns, arrays, options = world()
    with pytest.raises(SnapshotError, match=rf"{name}|no bundle"):
        loaded(
            {key: array for key, array in arrays.items() if key != name},
            liked.users,
            liked.items,
            columns,
            **options,
        )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rank.vectors", lambda array: array[:, 1:]),
        ("rank.bias", lambda array: array.astype(np.float64)),
        ("assignment", lambda array: array[1:]),
        ("scores.values", lambda array: array[:, :-1]),
        ("lists.paths", lambda array: array[::-1].copy()),
        ("lists.paths", lambda array: array + 125),
        ("lists.offsets", lambda array: array + 1),
        ("lists.rows", lambda array: array + 40),
        ("lists.vectors", lambda array: array[:, 1:]),
        ("lists.scales", lambda array: array.astype(np.float64)),
        ("lists.bias", lambda array: array[1:]),
        ("similar.items", lambda array: array - 40),
        ("paths.layers.2.1.bias", lambda array: array[1:]),
    ],
)
def test_an_array_of_another_shape_is_named(name, change):
    liked, columns, arrays, options = world()
    with pytest.raises(SnapshotError, match=name):
        loaded({**arrays, name: change(arrays[name])}, liked.users, liked.items, columns, **options)


def test_a_model_of_another_catalogue_is_refused():
    _liked, _columns, arrays, options = world()
    with pytest.raises(SnapshotError, match="40 items"):
        loaded(arrays, 60, 39, **options)
