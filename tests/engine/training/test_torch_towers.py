"""The torch towers against the NumPy towers that serve, kind by kind; and their packing against plain attention."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra train")

from engine.models import towers as served  # noqa: E402
from engine.models.encoded import Encoded, EncodedUsers, Multi  # noqa: E402
from engine.models.spec import Feature, ModelSpec, SequenceSpec  # noqa: E402
from engine.training import export  # noqa: E402
from engine.training.export import arrays, item_vectors, taken  # noqa: E402
from engine.training.layers import dropped  # noqa: E402
from engine.training.tensors import Features, Packed  # noqa: E402
from engine.training.towers import build_item_tower, build_user_tower  # noqa: E402

ITEMS, WIDTH, USERS = 30, 8, 17
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
    Feature(name="age", kind="numeric"),
)
ALONE = {"item_features": (ITEM_ID,), "dimension": WIDTH, "items": ITEMS}
BOTH = {"user_features": USER, "item_features": ITEM, "dimension": 6, "items": ITEMS}
KINDS = ("mean", "attention", "gru", "sasrec", "comirec")


def sequence(kind, length=20):
    return SequenceSpec(kind=kind, width=WIDTH, length=length, heads=2)


SPECS = {
    "ids": ModelSpec(user_features=USER[:1], **ALONE, metric="inner"),
    "mlp": ModelSpec(**BOTH, hidden=(13, 7), item_hidden=(11,)),
    "popular items are longer": ModelSpec(
        user_features=USER[:1],
        item_features=(ITEM[1], Feature(name="author", kind="categorical", size=4), ITEM_ID),
        dimension=6,
        items=ITEMS,
        popularity_exponent=0.3,
    ),
    "sums": ModelSpec(
        **BOTH, join="sum", item_join="sum", sequence=SequenceSpec(kind="mean", width=WIDTH, length=20)
    ),
    "weighted mean": ModelSpec(
        user_features=USER[:1],
        join="sum",
        **ALONE,
        sequence=SequenceSpec(kind="mean", width=WIDTH, length=20, item_exponent=0.5, length_exponent=0.5),
    ),
    **{kind: ModelSpec(**ALONE, sequence=sequence(kind), metric="inner") for kind in KINDS},
    **{
        f"{kind} in a tower": ModelSpec(**BOTH, sequence=sequence(kind), hidden=(9,), tie_items=False)
        for kind in KINDS
    },
    **{
        cross: ModelSpec(**BOTH, cross=cross, item_cross=cross, hidden=(9,), sequence=sequence("mean"))
        for cross in ("dcn", "senet", "fibinet")
    },
}


def encoded(spec, side, n, seed=0):
    random = np.random.default_rng(seed)
    features = spec.features(side)
    codes = [random.integers(0, f.size, n) for f in features if f.coded]
    multi = []
    for feature in (f for f in features if f.multi):
        offsets = np.concatenate([[0], np.cumsum(random.integers(0, 4, n))]).astype(np.int64)
        multi.append(Multi(random.integers(1, feature.size, int(offsets[-1])).astype(np.int32), offsets))
    return Encoded(
        np.stack(codes, 1).astype(np.int32) if codes else np.empty((n, 0), np.int32),
        tuple(multi),
        random.normal(size=(n, 2 * sum(f.floats for f in features))).astype(np.float32),
    )


def users_of(spec, seed=0):
    random = np.random.default_rng(seed)
    most = spec.sequence.length
    lengths = random.integers(0, most + 1, USERS).astype(np.int32)
    lengths[:2] = 0, most
    codes = random.integers(1, ITEMS + 1, (USERS, most)).astype(np.int32)
    codes[np.arange(most) < most - lengths[:, None]] = 0
    own = encoded(spec, "user", USERS, seed)
    return EncodedUsers(own.codes, own.multi, own.numbers, codes, lengths)


def towers(spec):
    torch.manual_seed(1)
    user, item = build_user_tower(spec), build_item_tower(spec)
    with torch.no_grad():  # far from the initial zeros and ones, so that each parameter has a say
        for tower in (user, item):
            for value in tower.parameters():
                value.add_(torch.randn(value.shape) * 0.3)
        if spec.sequence.weighted:
            user.sequence.weigh(np.arange(ITEMS), spec.sequence.item_exponent)
        if spec.popularity_exponent:
            item.measure(np.arange(ITEMS))
    return user.eval(), item.eval()


def tied(spec, item):
    return None if spec.tied_feature is None else item.embeddings[str(spec.tied_feature)]


@pytest.mark.parametrize("name", SPECS)
def test_torch_and_numpy_give_the_same_vectors(name):
    spec = SPECS[name]
    user, item = towers(spec)
    items, users = encoded(spec, "item", ITEMS, 3), users_of(spec)
    made = arrays(spec, user, item, items)
    with torch.no_grad():
        queries = user(Features.of(users), Packed.of(users), tied(spec, item)).numpy()
    assert queries.shape == (USERS * spec.vectors_per_user, spec.dimension)
    assert served.UserTower.load(spec, made).vectors(users) == pytest.approx(queries, abs=1e-4)
    assert served.ItemTower.load(spec, made).vectors(items) == pytest.approx(made["item_vectors"], abs=1e-4)


@pytest.mark.parametrize("kind", ["mean", "attention", "gru", "sasrec"])
def test_torch_and_numpy_agree_on_prompts_and_intents(kind):
    spec = ModelSpec(**BOTH, sequence=sequence(kind), hidden=(9,), tie_items=False, prompts=3)
    user, item = towers(spec)
    users, tasks = users_of(spec), (np.arange(USERS) % 4).astype(np.int32)
    made = arrays(spec, user, item, encoded(spec, "item", ITEMS, 3))
    with torch.no_grad():
        queries = user(Features.of(users), Packed.of(users), tasks=torch.from_numpy(tasks).long())
        shares = torch.softmax(user.intent(queries), 1).numpy()
    numpy = served.UserTower.load(spec, made)
    assert numpy.vectors(users, tasks) == pytest.approx(queries.numpy(), abs=1e-4)
    assert numpy.intent(queries.numpy()) == pytest.approx(shares, abs=1e-5)


@pytest.mark.parametrize("kind", ["gru", "sasrec"])
def test_every_prefix_has_the_vector_of_a_history_that_ends_there(kind):
    spec = SPECS[f"{kind} in a tower"]
    user, _ = towers(spec)
    users = users_of(spec)
    whole = Packed.of(users)
    with torch.no_grad():
        every = user(Features.of(users), whole, every=True)
        last = user(Features.of(users), whole)
        some = np.flatnonzero(users.lengths)
        torch.testing.assert_close(every[whole.offsets[1:][some] - 1], last[some], rtol=1e-4, atol=1e-5)
        if kind == "gru":  # without positions a prefix is the same wherever it stands
            n = int(np.argmax(users.lengths))
            begin = int(whole.offsets[n])
            short = Packed(whole.codes[begin : begin + 3], np.array([0, 3]))
            alone = user(Features.of(taken(users, np.array([n], np.int32))), short)
            torch.testing.assert_close(every[begin + 2], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gru", "sasrec"])
def test_the_rows_that_are_read_have_the_vectors_and_gradients_they_have_among_all(kind):
    spec = SPECS[f"{kind} in a tower"]
    user, _ = towers(spec)
    users = users_of(spec)
    whole = Packed.of(users)
    which = np.flatnonzero(np.random.default_rng(1).random(whole.offsets[-1]) < 0.3)
    found = []
    for read in (None, which):
        user.zero_grad()
        vectors = user(Features.of(users), whole, every=True, which=read)
        vectors = vectors[which] if read is None else vectors
        (vectors * torch.arange(vectors.numel()).view(vectors.shape).sin()).sum().backward()
        found.append([vectors.detach(), *(value.grad.clone() for value in user.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_packed_attention_is_torchs_causal_attention_on_each_sequence():
    spec = SPECS["sasrec"]
    user, item = towers(spec)
    users = users_of(spec)
    packed = Packed.of(users)
    encoder, table = user.sequence, tied(spec, item)
    with torch.no_grad():
        found = user(Features.of(users), packed, table, every=True)
        for begin, end in zip(packed.offsets[:-1], packed.offsets[1:], strict=True):
            n = int(end - begin)
            if not n:
                continue
            x = table(packed.codes[begin:end]) * WIDTH**0.5
            x = (x + encoder.positions.weight[:n].flip(0)).unsqueeze(0)
            for block in encoder.blocks:
                attention = torch.nn.MultiheadAttention(WIDTH, 2, batch_first=True)
                attention.load_state_dict(block.attention.state_dict())
                normed = block.attention_norm(x)
                ahead = torch.ones(n, n, dtype=torch.bool).triu(1)
                x = x + attention(normed, normed, normed, attn_mask=ahead, need_weights=False)[0]
                x = x + block.outer(torch.relu(block.inner(block.feed_norm(x))))
            torch.testing.assert_close(found[begin:end], encoder.norm(x)[0], rtol=1e-4, atol=1e-5)


def test_item_vectors_do_not_depend_on_the_blocks(monkeypatch):
    spec = SPECS["mlp"]
    _, item = towers(spec)
    items = encoded(spec, "item", ITEMS, 3)
    whole = item_vectors(spec, item, items)
    monkeypatch.setattr(export, "BLOCK", 7)
    assert item_vectors(spec, item, items) == pytest.approx(whole, abs=1e-6)


def test_dropout_keeps_the_mean_and_hides_its_share():
    torch.manual_seed(0)
    x = dropped(torch.ones(400, 250), 0.2, True)
    assert float((x == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.01)
    assert dropped(x, 0.2, False) is x
