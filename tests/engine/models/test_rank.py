"""The ranking step of streaming VQ while serving, held to its plain twin and, where there is torch, to the training's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import SnapshotError
from engine.models.rank import RankStep, random_rank, rank_reference, task_weights
from engine.models.spec import Feature, ModelSpec, SequenceSpec
from engine.models.tiles import in_wide_bytes
from engine.models.vq_spec import VqSpec

ITEMS = 30


def spec_of(rank="two_tower", tasks=("a", "b"), **options):
    tower = ModelSpec(
        user_features=(Feature(name="user_id", kind="id", dimension=8, size=5),),
        item_features=(Feature(name="item_id", kind="id", dimension=8, size=ITEMS + 1),),
        sequence=SequenceSpec(kind="mean", width=8),
        dimension=8,
        metric="inner",
        items=ITEMS,
    )
    own = {"rank_dimension": 4, "rank_hidden": (6,), "rank_history": 5, "rank_read": 9} | options
    return VqSpec(tower=tower, clusters=3, tasks=tasks, rank=rank, **own)


def step_of(spec, seed=0, weights=None):
    random = np.random.default_rng(seed)
    arrays = random_rank(spec, seed)
    vectors = random.standard_normal((ITEMS, spec.rank_dimension)).astype(np.float32)
    biases = random.standard_normal((ITEMS, len(spec.tasks))).astype(np.float32)
    weights = task_weights(spec, weights or {})
    codes, scales = in_wide_bytes(vectors, np.arange(ITEMS, dtype=np.int32))
    kept = codes[:, : vectors.shape[1]] * scales[:, None]
    return RankStep(spec, arrays, weights, codes, scales, biases), arrays, kept, biases, weights


def histories_of(random, n, longest, items=ITEMS):
    lengths = random.integers(0, longest + 1, n).astype(np.int32)
    codes = np.zeros((n, longest), np.int32)
    for q, length in enumerate(lengths):
        codes[q, longest - length :] = random.integers(1, items + 1, length)
    return codes, lengths


@given(
    st.sampled_from(("two_tower", "complex")),
    st.sampled_from((("a",), ("a", "b"), ("a", "b", "c"))),
    st.sampled_from(((6,), (5, 7), (9, 4, 3))),
    st.sampled_from((1, 2)),
    st.integers(0, 6),
    st.integers(0, 50),
)
@settings(max_examples=40, deadline=None)
def test_scores_are_those_of_the_plain_twin(rank, tasks, hidden, heads, longest, seed):
    spec = spec_of(rank, tasks, rank_hidden=hidden, rank_heads=heads)
    step, arrays, vectors, biases, weights = step_of(spec, seed, {"a": 0.5})
    random = np.random.default_rng(seed)
    n = 4
    inner = spec.rank_user_layers[0][0]
    x = random.standard_normal((n, inner)).astype(np.float32)
    asked = np.array([True, False, True, True])
    counts = np.array([70, 0, 3, random.integers(0, 5)])
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    slots = random.integers(0, ITEMS, int(offsets[-1])).astype(np.int32)
    codes, lengths = histories_of(random, 3, longest)
    out = np.full(slots.size, np.nan, np.float32)
    step.score(step.users(x[asked]), asked, slots, offsets, out, (codes, lengths))
    for m, q in enumerate(np.flatnonzero(asked)):
        mine = slice(int(offsets[q]), int(offsets[q + 1]))
        history = codes[m, longest - lengths[m] :]
        there = slots[mine]
        expected = rank_reference(spec, arrays, weights, x[q], vectors[there], biases[there], history)
        np.testing.assert_allclose(out[mine], expected, rtol=1e-4, atol=1e-4)
        alone = np.empty(there.size, np.float32)
        step.score(
            step.users(x[q : q + 1]), np.ones(1, np.bool_), there.copy(), np.array([0, there.size]), alone,
            (codes[m : m + 1], lengths[m : m + 1]),
        )  # fmt: skip
        assert alone.tobytes() == out[mine].tobytes()


@pytest.mark.parametrize("rank", ["two_tower", "complex"])
def test_what_was_published_since_is_ranked_by_its_vector_and_by_code_0_until_there_is_one(rank):
    spec = spec_of(rank)
    step, arrays, _, _, weights = step_of(spec)
    random = np.random.default_rng(1)
    step.make_room(ITEMS + 2)
    vector = random.standard_normal((1, 8)).astype(np.float32)
    step.put(np.array([ITEMS + 3], np.int32), vector)
    x = random.standard_normal((1, spec.rank_user_layers[0][0])).astype(np.float32)
    slots = np.array([ITEMS, ITEMS + 3], np.int32)
    out = np.empty(2, np.float32)
    codes, lengths = histories_of(random, 1, 4)
    step.score(step.users(x), np.ones(1, np.bool_), slots, np.array([0, 2], np.int64), out, (codes, lengths))
    unknown, project = arrays["rank.items.weight"][0], arrays["rank.project.weight"]
    vectors = np.stack((unknown, unknown + project @ vector[0]))
    biases = np.repeat(arrays["rank.bias.weight"][:1], 2, 0)
    expected = rank_reference(spec, arrays, weights, x[0], vectors, biases, codes[0, 4 - lengths[0] :])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    assert step.fresh_nbytes > 0


def test_an_array_of_another_shape_is_refused_by_name():
    spec = spec_of("complex")
    _, arrays, _, biases, weights = step_of(spec)
    codes, scales = np.zeros((ITEMS, 16), np.int8), np.ones(ITEMS, np.float32)
    for name in arrays:
        wrong = {**arrays, name: np.zeros((1, 1, 1), np.float32)}
        with pytest.raises(SnapshotError, match=name):
            RankStep(spec, wrong, weights, codes, scales, biases)


def test_tasks_count_what_their_weights_say():
    spec = spec_of(tasks=("a", "b", "c"))
    assert task_weights(spec, {}).tolist() == pytest.approx([1 / 3] * 3)
    assert task_weights(spec, {"a": 3, "c": 0}).tolist() == [0.75, 0.25, 0.0]
    with pytest.raises(SnapshotError, match="'d'"):
        task_weights(spec, {"d": 1})
    with pytest.raises(SnapshotError, match="no task"):
        task_weights(spec, dict.fromkeys("abc", 0.0))


@pytest.mark.parametrize("rank", ["two_tower", "complex"])
def test_it_serves_what_was_trained(rank):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from engine.training.rank import RankStep as Trained

    spec = spec_of(rank, rank_hidden=(6, 5))
    arrays = random_rank(spec, 3)
    trained = Trained(spec)
    trained.load_state_dict(
        {name.removeprefix("rank."): torch.from_numpy(array) for name, array in arrays.items()}
    )
    random = np.random.default_rng(3)
    x = random.standard_normal((2, spec.rank_user_layers[0][0])).astype(np.float32)
    index = random.standard_normal((ITEMS, 8)).astype(np.float32)
    codes, lengths = histories_of(random, 2, 5)
    weights = task_weights(spec, {"a": 2})
    with torch.no_grad():
        vectors = trained.item_vectors(torch.arange(1, ITEMS + 1), torch.from_numpy(index))
        biases = trained.bias(torch.arange(1, ITEMS + 1))
        users = trained.user_vectors(torch.from_numpy(x))
        if rank == "complex":
            each = vectors.expand(2, -1, -1), biases.expand(2, -1, -1)
            of_tasks = trained.crossed(users, *each, codes, lengths).numpy()
        else:
            products = [trained.of_task(users, task) @ vectors.T + biases[:, task] for task in range(2)]
            of_tasks = torch.stack(products, 2).numpy()
    kept = in_wide_bytes(vectors.numpy(), np.arange(ITEMS, dtype=np.int32))
    step = RankStep(spec, arrays, weights, *kept, biases.numpy())
    slots = np.tile(np.arange(ITEMS, dtype=np.int32), 2)
    out = np.empty(2 * ITEMS, np.float32)
    offsets = np.array([0, ITEMS, 2 * ITEMS], np.int64)
    step.score(step.users(x), np.ones(2, np.bool_), slots, offsets, out, (codes, lengths))
    np.testing.assert_allclose(out.reshape(2, ITEMS), of_tasks @ weights, atol=0.05)
