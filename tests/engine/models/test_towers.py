"""The compiled towers against plain NumPy, a row at a time; and that a row does not depend on its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.core.errors import SnapshotError
from engine.models.dense import dense
from engine.models.encoded import Encoded, EncodedUsers, Multi
from engine.models.reference import intent, item_vectors, random_weights, user_vectors
from engine.models.spec import Feature, ModelSpec, SequenceSpec
from engine.models.towers import ItemTower, UserTower

ITEMS, WIDTH = 30, 8
ITEM_ID = Feature(name="item_id", kind="id", dimension=WIDTH, size=ITEMS + 1)
USER = (
    Feature(name="user_id", kind="id", dimension=WIDTH, size=9),
    Feature(name="tastes", kind="multi", dimension=WIDTH, size=6),
    Feature(name="age", kind="numeric", scale="log"),
    Feature(name="income", kind="numeric", scale="bucket", dimension=WIDTH, size=5),
)
ITEM = (
    ITEM_ID,
    Feature(name="tags", kind="multi", dimension=WIDTH, size=7),
    Feature(name="duration", kind="numeric"),
)
ID_ONLY = {"item_features": (ITEM_ID,), "dimension": WIDTH, "items": ITEMS}
BOTH = {"user_features": USER, "item_features": ITEM, "dimension": 6, "items": ITEMS}
SPECS = {
    "matrix factorisation": ModelSpec(user_features=USER[:1], **ID_ONLY, metric="inner"),
    "mlp": ModelSpec(**BOTH, hidden=(13, 7), item_hidden=(11,)),
    "no hidden layer": ModelSpec(**BOTH),
    "popular items are longer": ModelSpec(**BOTH, popularity_exponent=0.3),
    "weighted mean": ModelSpec(
        **ID_ONLY,
        sequence=SequenceSpec(kind="mean", width=WIDTH, length=6, item_exponent=0.5, length_exponent=0.5),
    ),
    "sums": ModelSpec(
        **BOTH,
        join="sum",
        item_join="sum",
        sequence=SequenceSpec(kind="mean", width=WIDTH, length=6, length_exponent=0.5),
        hidden=(9,),
    ),
    "an id and a mean": ModelSpec(
        user_features=USER[:1],
        join="sum",
        **ID_ONLY,
        sequence=SequenceSpec(kind="mean", width=WIDTH, length=6),
    ),
    **{
        kind: ModelSpec(**ID_ONLY, sequence=SequenceSpec(kind=kind, width=WIDTH, length=6, heads=2))
        for kind in ("mean", "attention", "gru", "sasrec", "comirec")
    },
    **{
        f"{kind} in a tower": ModelSpec(
            **BOTH, sequence=SequenceSpec(kind=kind, width=WIDTH, length=6), hidden=(9,), tie_items=False
        )
        for kind in ("mean", "sasrec", "comirec")
    },
    **{
        cross: ModelSpec(
            **BOTH,
            cross=cross,
            item_cross=cross,
            hidden=(9,),
            sequence=SequenceSpec(kind="attention", width=WIDTH, length=6),
        )
        for cross in ("dcn", "senet", "fibinet")
    },
}

PROMPTED = {
    **{
        kind: ModelSpec(**ID_ONLY, sequence=SequenceSpec(kind=kind, width=WIDTH, length=6), prompts=3)
        for kind in ("mean", "attention", "gru", "sasrec")
    },
    "in a tower": ModelSpec(
        **BOTH, sequence=SequenceSpec(kind="sasrec", width=WIDTH, length=6), hidden=(9,), prompts=3
    ),
}


def encoded(spec, side, n, seed):
    rng = np.random.default_rng(seed)
    features = spec.features(side)
    codes = [rng.integers(0, f.size, n) for f in features if f.coded]
    floats = sum(f.floats for f in features)
    multi = []
    for feature in features:
        if feature.multi:
            offsets = np.concatenate(([0], np.cumsum(rng.integers(0, 4, n)))).astype(np.int64)
            multi.append(Multi(rng.integers(1, feature.size, int(offsets[-1])).astype(np.int32), offsets))
    return Encoded(
        np.stack(codes, 1).astype(np.int32) if codes else np.empty((n, 0), np.int32),
        tuple(multi),
        rng.normal(size=(n, 2 * floats)).astype(np.float32),
    )


def users_of(spec, n, seed=0):
    rng = np.random.default_rng(seed)
    most = spec.sequence.length
    lengths = rng.integers(0, most + 1, n).astype(np.int32)
    lengths[0] = 0
    sequence = rng.integers(1, ITEMS + 1, (n, most)).astype(np.int32)
    sequence[np.arange(most)[None, :] < (most - lengths)[:, None]] = 0
    own = encoded(spec, "user", n, seed)
    return EncodedUsers(own.codes, own.multi, own.numbers, sequence, lengths)


def alone(users, q):
    most = int(users.lengths[q])
    multi = [
        Multi(m.codes[m.offsets[q] : m.offsets[q + 1]], m.offsets[q : q + 2] - m.offsets[q])
        for m in users.multi
    ]
    return EncodedUsers(
        users.codes[q : q + 1],
        tuple(multi),
        users.numbers[q : q + 1],
        np.ascontiguousarray(users.sequence[q : q + 1, users.sequence.shape[1] - most :]),
        users.lengths[q : q + 1],
    )


@pytest.mark.parametrize("name", SPECS)
def test_towers_are_what_the_formulas_say(name):
    spec = SPECS[name]
    arrays = random_weights(spec)
    users, items = users_of(spec, 9), encoded(spec, "item", 9, 1)
    expected = user_vectors(spec, arrays, users)
    assert expected.shape == (9 * spec.vectors_per_user, spec.dimension)
    np.testing.assert_allclose(UserTower.load(spec, arrays).vectors(users), expected, atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(
        ItemTower.load(spec, arrays).vectors(items), item_vectors(spec, arrays, items), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", SPECS)
def test_a_batch_is_its_queries_alone_bit_for_bit(name):
    spec = SPECS[name]
    tower = UserTower.load(spec, random_weights(spec))
    users = users_of(spec, 7, seed=2)
    each = spec.vectors_per_user
    together = tower.vectors(users)
    for q in range(7):
        assert tower.vectors(alone(users, q)).tobytes() == together[q * each : (q + 1) * each].tobytes()


@pytest.mark.parametrize("name", PROMPTED)
def test_a_prompt_multiplies_every_item_and_the_intent_is_a_softmax(name):
    spec = PROMPTED[name]
    arrays = random_weights(spec)
    tower, users = UserTower.load(spec, arrays), users_of(spec, 9)
    tasks = (np.arange(9) % 4).astype(np.int32)
    vectors = tower.vectors(users, tasks)
    np.testing.assert_allclose(vectors, user_vectors(spec, arrays, users, tasks), atol=2e-5, rtol=1e-4)
    shares = tower.intent(vectors)
    np.testing.assert_allclose(shares, intent(spec, arrays, vectors), atol=1e-6)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    for q in range(9):
        one = tower.vectors(alone(users, q), tasks[q : q + 1])
        assert one.tobytes() == vectors[q : q + 1].tobytes()
        assert tower.intent(one).tobytes() == shares[q : q + 1].tobytes()


@given(n=st.integers(1, 9), terms=st.integers(1, 19), columns=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_product_is_one_of_matrices_and_a_row_of_it_does_not_know_its_neighbours(n, terms, columns, seed):
    rng = np.random.default_rng(seed)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((n, terms), (terms, columns)))
    bias = rng.normal(size=columns).astype(np.float32)
    weight.flags.writeable = bias.flags.writeable = False
    out, one = np.empty((n, columns), np.float32), np.empty((1, columns), np.float32)
    dense(x, weight, bias, out)
    np.testing.assert_allclose(out, x @ weight + bias, atol=1e-4)
    for r in range(n):
        dense(x[r : r + 1], weight, bias, one)
        assert one.tobytes() == out[r : r + 1].tobytes()


def test_cosine_vectors_have_length_one():
    spec = SPECS["mlp"]
    vectors = UserTower.load(spec, random_weights(spec)).vectors(users_of(spec, 5))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("change", ["missing", "shape", "type"])
def test_weights_that_the_specification_does_not_mean_are_refused(change):
    spec = SPECS["sasrec"]
    arrays = dict(random_weights(spec))
    name = "user.sequence.blocks.1.inner.weight"
    if change == "missing":
        del arrays[name]
    else:
        arrays[name] = arrays[name][:, 1:] if change == "shape" else arrays[name].astype(np.float64)
    with pytest.raises(SnapshotError, match=name):
        UserTower.load(spec, arrays)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sequence": {"kind": "sasrec", "width": 10, "heads": 3}}, "heads"),
        ({"sequence": {"kind": "mean", "width": 10}}, "dimension of item_id"),
        ({"item_features": [{"name": "tags", "kind": "multi"}], "sequence": {"kind": "mean"}}, "tie_items"),
        ({"user_features": []}, "a feature or a sequence"),
        ({"user_features": [{"name": "a", "kind": "id"}] * 2}, "twice"),
        ({"user_features": [{"name": "a", "kind": "id"}], "cross": "fibinet"}, "two or more fields"),
        ({"user_features": [{"name": "a", "kind": "id"}], "prompts": 2}, "prompts need a sequence"),
        ({"sequence": {"kind": "mean"}, "metric": "inner", "popularity_exponent": 0.1}, "have lengths"),
        (
            {
                "user_features": [{"name": "a", "kind": "id"}],
                "item_features": [{"name": "item_id", "kind": "id", "lookup": "hash", "size": 9}],
                "popularity_exponent": 0.1,
            },
            'needs the item feature "item_id"',
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(values, says):
    with pytest.raises(ValidationError, match=says):
        ModelSpec.model_validate(values)
