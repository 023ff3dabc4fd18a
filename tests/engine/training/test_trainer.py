"""Training finds planted structure, repeats itself, goes on after a kill, and says why when it stops."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra train")

from engine.core.channel import SilentProgress  # noqa: E402
from engine.core.errors import BuildError, ConfigError  # noqa: E402
from engine.core.interactions import Interactions  # noqa: E402
from engine.models.encoded import Encoded, Multi  # noqa: E402
from engine.models.options import TrainingOptions  # noqa: E402
from engine.models.spec import Feature, ModelSpec, SequenceSpec  # noqa: E402
from engine.training import losses, optimizers  # noqa: E402
from engine.training.data import TrainingData  # noqa: E402
from engine.training.trainer import train  # noqa: E402

USERS, ITEMS, GROUPS, WIDTH = 80, 40, 4, 8
ITEM_ID = Feature(name="item_id", kind="id", dimension=WIDTH, size=ITEMS + 1)
USER_ID = Feature(name="user_id", kind="id", dimension=WIDTH, size=USERS + 1)
TAGS = Feature(name="tags", kind="multi", dimension=WIDTH, size=GROUPS + 1)
NUMBER = Feature(name="duration", kind="numeric")
FAST = TrainingOptions(epochs=10, batch=64, learning_rate=0.02, negatives={"in_batch": 1, "popular": 16})
DEFAULT = ModelSpec(
    item_features=(ITEM_ID,), dimension=WIDTH, items=ITEMS, sequence=SequenceSpec(kind="mean", width=WIDTH)
)


def spec(kind="mean", users=(), items=(ITEM_ID,), **more):
    sequence = SequenceSpec(kind=kind, width=WIDTH, length=8)
    return ModelSpec(
        user_features=users, item_features=items, dimension=WIDTH, items=ITEMS, sequence=sequence, **more
    )


def data(of=DEFAULT, timed=True, seed=0):
    """Users like eight of the ten items of their group, in rising order with gaps where times are known."""
    random = np.random.default_rng(seed)
    lists = []
    for user in range(USERS):
        mine = random.permutation(10)[:8]
        lists.append(np.sort(mine)[::-1] * GROUPS + user % GROUPS)
    rows = np.concatenate(lists).astype(np.int32)
    times = np.tile(np.arange(8, 0, -1), USERS).astype(np.int64) * (3600 if timed else 0)
    matrix = Interactions(
        USERS, ITEMS, np.arange(0, rows.size + 1, 8), rows, np.ones(rows.size, np.float32), times
    )
    return TrainingData(
        matrix,
        encoded(of.user_features, USERS),
        encoded(of.item_features, ITEMS),
        clusters=(np.arange(ITEMS, dtype=np.int32) % GROUPS).astype(np.int32),
        rejects=Interactions(
            USERS,
            ITEMS,
            np.arange(USERS + 1),
            ((np.arange(USERS) + 1) % GROUPS).astype(np.int32),
            np.ones(USERS, np.float32),
            np.zeros(USERS, np.int64),
        ),
    )


def encoded(features, n):
    codes = [np.arange(1, n + 1) for f in features if f.coded]
    tags = Multi((np.arange(n) % GROUPS + 1).astype(np.int32), np.arange(n + 1))
    floats = [np.stack([np.linspace(-1, 1, n), np.zeros(n)], 1) for f in features if f.floats]
    return Encoded(
        np.stack(codes, 1).astype(np.int32) if codes else np.empty((n, 0), np.int32),
        tuple(tags for f in features if f.multi),
        np.concatenate(floats, 1).astype(np.float32) if floats else np.empty((n, 0), np.float32),
    )


def run(of, options=FAST, given=None, **more):
    return train(of, options, data(of) if given is None else given, SilentProgress(), **more)


def apart(trained):
    """How much nearer the items of one group are to each other than to others, in cosines."""
    vectors = trained.arrays["item_vectors"]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    same = np.arange(ITEMS)[:, None] % GROUPS == np.arange(ITEMS) % GROUPS
    cosines = vectors @ vectors.T
    return cosines[same & ~np.eye(ITEMS, dtype=bool)].mean() - cosines[~same].mean()


LOSSES = {
    "softmax": {"negatives": {"in_batch": 1}, "logq": "streaming"},
    "full_softmax": {},
    "user_softmax": {"negative_power": -0.3},
    "bce": {"negatives": {"popular": 3}},
    "gbce": {"negatives": {"popular": 16}},
    "nce": {"negatives": {"popular": 8}},
    "hinge": {"negatives": {"popular": 2}},
    "logistic": {"negatives": {"in_batch": 8, "popular": 2}},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_finds_the_groups(loss):
    options = FAST.model_copy(update={"loss": loss, **LOSSES[loss]})
    assert apart(run(spec(), options)) > 0.4


SPECS = {
    "matrix factorisation": spec("none", users=(USER_ID,)),
    "an id and a weighted mean": ModelSpec(
        user_features=(USER_ID,),
        item_features=(ITEM_ID,),
        dimension=WIDTH,
        items=ITEMS,
        join="sum",
        sequence=SequenceSpec(kind="mean", width=WIDTH, length=8, item_exponent=0.5, length_exponent=0.5),
    ),
    "attention": spec("attention"),
    "gru": spec("gru", metric="inner"),
    "sasrec": spec("sasrec", metric="inner"),
    "comirec": spec("comirec"),
    "features": spec(
        "mean", users=(USER_ID,), items=(ITEM_ID, TAGS, NUMBER), hidden=(16,), item_hidden=(16,)
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_tower_learns(name):
    temperature = 1.0 if SPECS[name].metric == "inner" else 0.1
    options = FAST.model_copy(update={"temperature": temperature, "batch": 32, "epochs": 12, "dropout": 0.1})
    trained = run(SPECS[name], options)
    if name in ("gru", "sasrec"):  # these learn what comes next, which here is the group and the order
        assert trained.curves["loss"][-1] < 0.85 * trained.curves["loss"][0]
    else:
        assert apart(trained) > 0.2
    assert trained.arrays["item_vectors"].shape == (ITEMS, WIDTH)
    assert all(array.dtype == np.float32 for array in trained.arrays.values())


def test_the_whole_history_teaches_by_user_what_the_others_do():
    options = FAST.model_copy(update={"loss": "user_softmax", "batch": 16})
    of = SPECS["an id and a weighted mean"]
    others, whole = (
        apart(run(of, options.model_copy(update={"history": name}))) for name in ("others", "whole")
    )
    assert min(others, whole) > 0.4


def test_weights_of_a_mean_are_those_of_the_counts():
    trained = run(SPECS["an id and a weighted mean"], FAST.model_copy(update={"epochs": 1}))
    counts = data().interactions.item_counts()
    assert trained.arrays["user.sequence.weights"][1:] == pytest.approx(counts**-0.5)


def test_vectors_of_popular_items_are_longer():
    of = SPECS["an id and a weighted mean"].model_copy(update={"popularity_exponent": 0.25})
    trained = run(of, FAST.model_copy(update={"epochs": 1}))
    counts = np.maximum(data().interactions.item_counts(), 1)
    lengths = (counts / counts.mean()) ** 0.25
    assert np.linalg.norm(trained.arrays["item_vectors"], axis=1) == pytest.approx(lengths, rel=1e-5)
    # An item that the build did not know is taken for one that one user likes.
    assert trained.arrays["item.lengths"] == pytest.approx([counts.mean() ** -0.25, *lengths], rel=1e-5)


def test_the_step_size_rises_and_falls(monkeypatch):
    rates = []
    set_rate = optimizers.Optimizer.set_rate
    monkeypatch.setattr(
        optimizers.Optimizer, "set_rate", lambda own, rate: (rates.append(rate), set_rate(own, rate))
    )
    options = FAST.model_copy(update={"warmup": 0.25, "decay": "linear", "epochs": 4, "learning_rate": 0.1})
    run(spec(), options)
    steps = len(rates)
    assert steps == 40
    assert rates[0] == pytest.approx(0.1 / 10)
    assert rates[9] == pytest.approx(0.1 * (1 - 9 / 40))
    assert rates[-1] == pytest.approx(0.1 / 40)
    rates.clear()
    monkeypatch.setattr(optimizers, "LAZY_ROWS", 10)
    still = run(spec(users=(USER_ID,)), FAST.model_copy(update={"learning_rate": 1e-10, "epochs": 1}))
    assert np.abs(still.arrays["user.embeddings.0.weight"]).max() < 0.2
    assert set(rates) == {1e-10}


def test_hard_negatives_and_self_supervision_train_too():
    options = FAST.model_copy(
        update={
            "negatives": {"in_batch": 1, "cluster": 1, "reject": 1, "interpolated": 2},
            "self_supervised": 0.5,
            "hot_threshold": 0.02,
        }
    )
    assert apart(run(SPECS["features"], options)) > 0.2
    alone = FAST.model_copy(update={"negatives": {"interpolated": 2}})
    assert run(spec(), alone).epochs == FAST.epochs


def test_hard_negatives_without_their_source_are_refused():
    bare = replace(data(), clusters=None, rejects=None)
    for source in ("cluster", "reject"):
        with pytest.raises(BuildError, match=source):
            run(spec(), FAST.model_copy(update={"negatives": {source: 1}}), bare)


def same(one, two):
    return all(np.array_equal(one.arrays[name], two.arrays[name]) for name in one.arrays)


def test_a_seed_makes_a_run_repeat(monkeypatch):
    monkeypatch.setattr(optimizers, "LAZY_ROWS", 10)
    options = FAST.model_copy(update={"epochs": 2, "dropout": 0.2})
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = run(SPECS["features"], options)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(first, run(SPECS["features"], options))
    assert not same(first, run(SPECS["features"], options.model_copy(update={"seed": 1})))


def test_lazy_tables_learn_as_dense_ones_do(monkeypatch):
    dense = run(spec(users=(USER_ID,)))
    monkeypatch.setattr(optimizers, "LAZY_ROWS", 10)
    assert apart(run(spec(users=(USER_ID,)))) == pytest.approx(apart(dense), abs=0.15)


def test_validation_keeps_the_best_epoch_and_stops_when_it_gets_no_better():
    options = FAST.model_copy(
        update={"validation": 0.3, "recall_at": 3, "patience": 6, "epochs": 30, "history": "others"}
    )
    trained = run(spec(), options)
    recalls = trained.curves["recall"]
    assert max(recalls) > 0.4  # by chance it is 3 of the 33 items that the user does not have
    assert trained.best == int(np.argmax(recalls)) + 1
    assert trained.epochs == min(trained.best + 6, 30)


class KillAt(SilentProgress):
    """Kills its own process in the middle of an epoch."""

    def __init__(self, epoch):
        self.left = epoch

    def start(self, task, total):
        self.left -= 1

    def advance(self, amount=1):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(options, work):
    optimizers.LAZY_ROWS = 10
    train(SPECS["features"], options, data(SPECS["features"]), KillAt(3), work)


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "LAZY_ROWS", 10)
    options = FAST.model_copy(
        update={"epochs": 5, "dropout": 0.2, "logq": "streaming", "validation": 0.2, "self_supervised": 0.1}
    )
    child = multiprocessing.get_context("spawn").Process(target=killed, args=(options, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

    tasks = []

    class Told(SilentProgress):
        def start(self, task, total):
            tasks.append(task)

    went_on = train(SPECS["features"], options, data(SPECS["features"]), Told(), tmp_path)
    assert [task.split(",")[0] for task in tasks] == ["epoch 3/5", "epoch 4/5", "epoch 5/5"]
    whole = run(SPECS["features"], options)
    assert same(went_on, whole)
    assert went_on.curves["loss"] == whole.curves["loss"]
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_not_gone_on_with(tmp_path):
    class Stopped(SilentProgress):
        def start(self, task, total):
            if task.startswith("epoch 2"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SPECS["features"], FAST, data(SPECS["features"]), Stopped(), tmp_path)
    assert (tmp_path / "checkpoint.pt").is_file()
    other = FAST.model_copy(update={"epochs": 2, "seed": 9})
    assert same(run(SPECS["features"], other, work=tmp_path), run(SPECS["features"], other))
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    assert same(run(SPECS["features"], other, work=tmp_path), run(SPECS["features"], other))


def test_an_incremental_update_moves_ids_only_and_learns_what_is_new():
    of = SPECS["features"]
    given = data(of)
    old = run(of, given=given)
    fresh = np.zeros(given.interactions.entries, bool)
    fresh[: 8 * 10] = True
    updated = run(of, given=replace(given, examples=fresh), start=old.arrays, mode="incremental")
    assert updated.epochs == 1
    moved = {name for name in old.arrays if not np.array_equal(old.arrays[name], updated.arrays[name])}
    assert moved == {"user.embeddings.0.weight", "item.embeddings.0.weight", "item_vectors"}
    users = np.abs(old.arrays["user.embeddings.0.weight"] - updated.arrays["user.embeddings.0.weight"]).max(1)
    assert np.all(users[11:] == 0)
    assert np.all(users[1:11] > 0)


def test_a_full_update_starts_from_the_last_model_and_does_one_pass():
    of = SPECS["features"]
    old = run(of)
    updated = run(of, start=old.arrays, mode="resume")
    assert updated.epochs == 1
    assert updated.curves["loss"][0] < old.curves["loss"][1]
    with pytest.raises(BuildError, match="needs the arrays of an earlier training"):
        run(of, mode="resume")
    with pytest.raises(BuildError, match=r"user\.layers\.0\.weight"):
        run(of.model_copy(update={"hidden": (17,)}), start=old.arrays, mode="resume")


def test_a_loss_that_is_no_number_stops_with_the_batch_named():
    of = SPECS["features"]
    given = data(of)
    given.items.numbers[5, 0] = np.nan
    with pytest.raises(BuildError, match=r"the loss is nan at epoch 1, batch \d"):
        run(of, given=given)


def test_a_diverging_run_stops_and_says_so():
    options = FAST.model_copy(update={"learning_rate": 10.0, "temperature": 1.0})
    with pytest.raises(BuildError, match=r"diverges: .* smaller learning_rate"):
        run(spec("mean", metric="inner"), options)


def test_memory_that_does_not_suffice_is_said_with_the_way_out(monkeypatch):
    def greedy(*arguments):
        return torch.empty(2**50)

    monkeypatch.setattr(losses, "shared_softmax", greedy)
    with pytest.raises(BuildError, match=r"batch of 64 .* smaller training\.batch"):
        run(spec())


def test_what_cannot_be_trained_is_said():
    with pytest.raises(BuildError, match="no times"):
        run(spec("sasrec"), given=data(timed=False))
    with pytest.raises(BuildError, match="needs times"):
        run(spec(), FAST.model_copy(update={"history": "past"}), data(timed=False))
    in_order = FAST.model_copy(update={"order": "time"})
    with pytest.raises(BuildError, match="needs times"):
        run(spec(), in_order, data(timed=False))
    with pytest.raises(ConfigError, match=r"order: .* sasrec"):
        run(spec("sasrec"), in_order)
    nothing = replace(data(), examples=np.zeros(USERS * 8, bool))
    with pytest.raises(BuildError, match="no positive"):
        run(spec(), given=nothing)
    with pytest.raises(BuildError, match="numbers of 0 or more"):
        run(spec(), given=replace(data(), weights=np.full(USERS * 8, -1, np.float32)))


def test_a_full_softmax_over_too_large_a_catalogue_is_refused(monkeypatch):
    monkeypatch.setattr(losses, "FULL_SOFTMAX_ITEMS", 30)
    with pytest.raises(ConfigError, match=r"training\.loss: full_softmax"):
        run(spec(), FAST.model_copy(update={"loss": "full_softmax"}))


@pytest.mark.parametrize("kind", ["sasrec", "comirec"])
def test_the_softmax_by_users_needs_one_vector_of_a_user(kind):
    with pytest.raises(ConfigError, match=f"one vector of a user, not {kind}"):
        run(spec(kind), FAST.model_copy(update={"loss": "user_softmax"}))


def test_unknown_ids_have_a_vector_that_training_made():
    alone = run(SPECS["matrix factorisation"]).arrays["user.embeddings.0.weight"]
    assert alone[0] == pytest.approx(alone[1:].mean(0), abs=1e-6)
    hidden = run(SPECS["features"], FAST.model_copy(update={"feature_dropout": 0.0}))
    trained = run(SPECS["features"])
    name = "item.embeddings.0.weight"
    assert np.abs(trained.arrays[name][0] - hidden.arrays[name][0]).max() > 0.01


def test_weights_decide_what_an_example_counts_for():
    weights = np.ones(USERS * 8, np.float32)
    weights[: 8 * 40] = 0
    given = replace(data(SPECS["matrix factorisation"]), weights=weights)
    options = FAST.model_copy(update={"epochs": 1})
    whole = run(SPECS["matrix factorisation"], options, given)
    table = whole.arrays["user.embeddings.0.weight"]
    untouched = train(
        SPECS["matrix factorisation"],
        options.model_copy(update={"learning_rate": 1e-9}),
        given,
        SilentProgress(),
    ).arrays["user.embeddings.0.weight"]
    assert np.abs(table - untouched)[1:41].max() < 1e-6
    assert np.abs(table - untouched)[41:].max() > 1e-3
