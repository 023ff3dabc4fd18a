"""Deep Retrieval finds planted groups, repeats itself, goes on after a kill, and says why when it cannot begin."""

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
from engine.models import paths as served  # noqa: E402
from engine.models.encoded import Encoded  # noqa: E402
from engine.models.path_options import PathTrainingOptions  # noqa: E402
from engine.models.paths import PathSpec  # noqa: E402
from engine.models.spec import Feature, ModelSpec, SequenceSpec  # noqa: E402
from engine.training import optimizers  # noqa: E402
from engine.training.data import TrainingData  # noqa: E402
from engine.training.deep_retrieval import train_paths  # noqa: E402
from engine.training.paths import PathModel, Ranker, with_one  # noqa: E402
from engine.training.tensors import Features, history  # noqa: E402
from engine.training.towers import build_user_tower  # noqa: E402

USERS, ITEMS, GROUPS, WIDTH = 120, 40, 2, 16
ITEM_ID = Feature(name="item_id", kind="id", dimension=WIDTH, size=ITEMS + 1)
LATTICE = PathSpec(width=6, depth=2, dimension=WIDTH, hidden=(16,))
FAST = PathTrainingOptions(
    epochs=6,
    fixed_epochs=1,
    batch=64,
    learning_rate=0.01,
    negatives=32,
    penalty=0.02,
    validation=0.2,
    recall_at=8,
    recall_beam=6,
    patience=9,
)
QUICK = FAST.model_copy(update={"epochs": 2, "fixed_epochs": 0, "batch": 256})
KEPT = 10


def spec(kind="gru", **more):
    sequence = SequenceSpec(kind=kind, width=WIDTH, length=6)
    return ModelSpec(
        item_features=(ITEM_ID,),
        dimension=WIDTH,
        items=ITEMS,
        sequence=sequence,
        metric="inner",
        tie_items=False,
        **more,
    )


def data(timed=True, seed=0):
    """Users like eight to twelve of the twenty items of their group, even ones or odd ones."""
    random = np.random.default_rng(seed)
    lists = [
        random.permutation(ITEMS // GROUPS)[: random.integers(8, 13)] * GROUPS + user % GROUPS
        for user in range(USERS)
    ]
    counts = [len(mine) for mine in lists]
    rows = np.concatenate(lists).astype(np.int32)
    times = np.concatenate([np.arange(count, 0, -1) for count in counts]) * (3600 if timed else 0)
    matrix = Interactions(
        USERS,
        ITEMS,
        np.append(0, np.cumsum(counts)),
        rows,
        np.ones(rows.size, np.float32),
        times.astype(np.int64),
    )
    return TrainingData(matrix, bare(USERS), bare(0))


def bare(n):
    return Encoded(np.empty((n, 0), np.int32), (), np.empty((n, 0), np.float32))


def run(options=FAST, of=None, given=None, **more):
    more = {"per_item": 2, "kept": KEPT} | more
    return train_paths(of or spec(), LATTICE, options, given or data(), SilentProgress(), **more)


def crossing(assignment):
    """Share of the pairs of items on a path that are of different groups."""
    pairs = across = 0
    for code in np.unique(assignment[assignment >= 0]):
        mine = np.flatnonzero((assignment == code).any(1)) % GROUPS
        pairs += mine.size * (mine.size - 1)
        across += 2 * int((mine == 0).sum()) * int((mine == 1).sum())
    return across / max(pairs, 1)


@pytest.fixture(scope="module")
def trained():
    return run()


def test_items_of_a_group_share_paths_and_beam_search_finds_what_brute_force_finds(trained):
    assert crossing(trained.arrays["assignment"]) < 0.15  # about half of random paths
    best = trained.best - 1
    assert (
        trained.curves["exact"][best] > 0.6
    )  # a held-out item is one of the 8 to 12 of the group that are left
    assert trained.curves["recall"][best] > 0.9 * trained.curves["exact"][best]
    assert trained.curves["path_loss"][-1] < 0.75 * trained.curves["path_loss"][0]
    assert trained.curves["softmax_loss"][-1] < trained.curves["softmax_loss"][0]


def test_arrays_have_the_names_and_shapes_that_serving_reads(trained):
    arrays = trained.arrays
    assert arrays["assignment"].shape == (ITEMS, 2)
    assert arrays["assignment"].dtype == arrays["scores.paths"].dtype == np.int64
    assert arrays["scores.paths"].shape == arrays["scores.values"].shape == (ITEMS, KEPT)
    assert arrays["rank.vectors"].shape == (ITEMS, WIDTH)
    assert arrays["rank.bias"].shape == (ITEMS,)
    assert 0 <= arrays["assignment"].min() <= arrays["assignment"].max() < LATTICE.paths
    floats = {name: array for name, array in arrays.items() if name.startswith(("user.", "paths.", "rank."))}
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in floats.values())
    for layer in range(LATTICE.depth):
        for at, (inner, outer) in enumerate(LATTICE.linears(layer)):
            assert arrays[f"paths.layers.{layer}.{at}.weight"].shape == (outer, inner)
    assert arrays["paths.nodes.0.weight"].shape == (LATTICE.width, WIDTH)


def given_paths(depth=3, hidden=(12,), seed=0):
    torch.manual_seed(seed)
    lattice = PathSpec(width=7, depth=depth, dimension=WIDTH, hidden=hidden)
    model = PathModel(lattice)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return lattice, model, torch.randn(20, WIDTH)


@pytest.mark.parametrize("hidden", [(), (12,), (12, 9)])
def test_log_probabilities_are_those_of_the_formula(hidden):
    _lattice, model, users = given_paths(hidden=hidden)
    nodes = torch.randint(0, 7, (20, 4, 3))
    found = model(users, nodes)
    for n in range(20):
        for j in range(4):
            total, read = 0.0, [users[n]]
            for layer, node in enumerate(nodes[n, j].tolist()):
                x = torch.cat(read)
                linears = list(model.layers[layer])
                for linear in linears[:-1]:
                    x = torch.relu(linear(x))
                total += torch.log_softmax(linears[-1](x), 0)[node]
                if layer < 2:
                    read.append(model.nodes[layer].weight[node])
            assert found[n, j].item() == pytest.approx(total.item(), abs=1e-4)


def test_a_beam_of_all_paths_has_them_all_and_their_probabilities_add_up_to_one():
    lattice, model, users = given_paths()
    codes, logs = model.search(users, lattice.paths)
    assert (np.sort(codes.numpy(), 1) == np.arange(lattice.paths)).all()
    assert logs.exp().sum(1).detach().numpy() == pytest.approx(1, abs=1e-4)
    assert (logs.diff(dim=1) <= 0).all()
    again = model(users, torch.from_numpy(lattice.nodes(codes.numpy())))
    assert again.detach().numpy() == pytest.approx(logs.numpy(), abs=1e-4)


@pytest.mark.parametrize(("depth", "hidden"), [(1, ()), (2, (12,)), (3, (12, 9))])
def test_beam_search_of_training_and_of_serving_agree(depth, hidden):
    lattice, model, users = given_paths(depth, hidden)
    arrays = {f"paths.{name}": value.numpy() for name, value in model.state_dict().items()}
    for beam in (1, 5):
        codes, logs = model.search(users, beam)
        theirs, their_logs = served.PathModel.load(lattice, arrays).beam(users.numpy(), beam)
        assert logs.numpy() == pytest.approx(their_logs, abs=1e-4)
        for threads in (1, 3):
            ours, our_logs = model.beam(users, beam, threads)
            assert np.array_equal(ours, theirs)
            assert np.array_equal(our_logs, their_logs)
        # Equally likely paths may change places.
        assert (codes.numpy() == theirs).mean() > 0.98


def test_beam_and_rerank_by_hand_give_the_recall_of_the_curves(trained):
    """What serving would do with the arrays finds the items of a user's group."""
    arrays = trained.arrays
    tower, of = build_user_tower(spec()), data()
    tower.load_state_dict({n[5:]: torch.from_numpy(a) for n, a in arrays.items() if n.startswith("user.")})
    users = np.arange(USERS, dtype=np.int32)
    with torch.no_grad():
        vectors = tower(
            Features.of(of.users), history(of.interactions, users, 6, torch.device("cpu"))
        ).numpy()
    codes, _ = served.PathModel.load(LATTICE, arrays).beam(vectors, 6)
    scores = vectors @ arrays["rank.vectors"].T + arrays["rank.bias"]
    hits = shown = 0
    for user in users:
        there = np.isin(arrays["assignment"], codes[user]).any(1)
        best = np.argsort(-np.where(there, scores[user], -np.inf))[:10]
        shown += int(there[best].sum())
        hits += int((there[best] & (best % GROUPS == user % GROUPS)).sum())
    assert shown > 8 * USERS
    assert hits > 0.9 * shown


def test_the_penalty_keeps_paths_small():
    fullest = []
    for penalty in (0.0, 0.05):
        made = run(FAST.model_copy(update={"penalty": penalty, "validation": 0.0, "epochs": 4, "batch": 128}))
        fullest.append(made.curves["largest"][-1])
    assert fullest[1] < 0.6 * fullest[0]


@pytest.mark.parametrize("kind", ["mean", "sasrec"])
def test_other_towers_learn_too(kind):
    made = run(FAST.model_copy(update={"negatives": 0, "assign_every": 3, "horizon": 3}), spec(kind))
    assert crossing(made.arrays["assignment"]) < 0.2
    assert made.curves["path_loss"][-1] < 0.9 * made.curves["path_loss"][0]


def same(one, two):
    return all(np.array_equal(one.arrays[name], two.arrays[name]) for name in one.arrays)


def test_a_seed_makes_a_run_repeat():
    options = QUICK.model_copy(update={"dropout": 0.2, "scored_share": 0.5})
    first = run(options)
    assert same(first, run(options))
    assert not same(first, run(options.model_copy(update={"seed": 1})))


def test_the_softmax_vectors_stay_in_the_fixed_epochs():
    joint = QUICK.model_copy(update={"validation": 0.0})
    before = run(joint)
    after = run(joint.model_copy(update={"fixed_epochs": 2}))
    assert after.epochs == 4
    for name in ("rank.vectors", "rank.bias"):
        assert np.array_equal(before.arrays[name], after.arrays[name])
    assert not np.array_equal(before.arrays["paths.nodes.0.weight"], after.arrays["paths.nodes.0.weight"])


class KillAt(SilentProgress):
    """Kills its own process in the middle of an epoch."""

    def __init__(self, epoch):
        self.left = epoch

    def start(self, task, total):
        self.left -= task.startswith("epoch")

    def advance(self, amount=1):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable():
    optimizers.LAZY_ROWS = 10
    return QUICK.model_copy(update={"epochs": 3, "fixed_epochs": 2, "dropout": 0.2})


def killed(work):
    train_paths(spec(), LATTICE, resumable(), data(), KillAt(3), work, per_item=2, kept=KEPT)


def test_a_killed_run_goes_on_and_ends_with_the_same_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "LAZY_ROWS", 10)
    child = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

    tasks = []

    class Told(SilentProgress):
        def start(self, task, total):
            tasks.append(task)

    went_on = train_paths(spec(), LATTICE, resumable(), data(), Told(), tmp_path, per_item=2, kept=KEPT)
    epochs = [task.split(",")[0] for task in tasks if task.startswith("epoch")]
    assert epochs == ["epoch 3/5", "epoch 4/5", "epoch 5/5"]
    whole = run(resumable())
    assert same(went_on, whole)
    for name in ("loss", "recall", "largest", "moved"):
        assert went_on.curves[name] == whole.curves[name]
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_a_checkpoint_of_another_shape_is_not_gone_on_with(tmp_path):
    class Stopped(SilentProgress):
        def start(self, task, total):
            if task.startswith("epoch 2"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_paths(spec(), LATTICE, QUICK, data(), Stopped(), tmp_path, per_item=2, kept=KEPT)
    assert (tmp_path / "checkpoint.pt").is_file()
    assert same(run(QUICK, per_item=1, work=tmp_path), run(QUICK, per_item=1))


def test_streaming_goes_on_from_a_model_in_order_of_time(trained):
    given = data()
    fresh = given.interactions.timestamps > 8 * 3600
    start = dict(trained.arrays)
    start["assignment"] = start["assignment"].copy()
    start["assignment"][3] = -1  # an item published since
    start["scores.paths"], start["scores.values"] = (
        start["scores.paths"].copy(),
        start["scores.values"].copy(),
    )
    start["scores.paths"][3], start["scores.values"][3] = -1, 0
    options = FAST.model_copy(update={"learning_rate": 1e-3, "batch": 32, "assign_every": 2})
    updated = run(options, given=replace(given, examples=fresh), start=start, mode="incremental")
    assert updated.epochs == 1
    assert updated.curves["path_loss"][0] < trained.curves["path_loss"][0]
    assert not np.array_equal(
        updated.arrays["user.sequence.items.weight"], start["user.sequence.items.weight"]
    )
    seen = np.zeros(ITEMS, bool)
    seen[given.interactions.rows[fresh]] = True
    changed = (updated.arrays["scores.values"] != start["scores.values"]).any(1)
    assert np.array_equal(changed, seen)
    assert (updated.arrays["assignment"] >= 0).all()
    again = run(FAST, start=trained.arrays, mode="resume")
    assert again.epochs == 1
    assert again.curves["path_loss"][0] < trained.curves["path_loss"][1]


def test_an_item_without_events_keeps_random_paths():
    given = data()
    matrix = given.interactions
    grown = replace(matrix, items=ITEMS + 3)
    of = spec().model_copy(update={"items": ITEMS + 3})
    made = run(QUICK.model_copy(update={"epochs": 1}), of, replace(given, interactions=grown))
    assert (made.arrays["scores.paths"][ITEMS:] == -1).all()
    assert (made.arrays["assignment"][ITEMS:] >= 0).all()


def test_what_cannot_be_trained_is_said(trained):
    with pytest.raises(ConfigError, match=r"paths: 11 paths are chosen among the 10"):
        run(per_item=11)
    with pytest.raises(ConfigError, match=r"kept_paths: 37 are more than the 36 paths"):
        run(kept=37)
    with pytest.raises(ConfigError, match="tie_items"):
        run(of=spec().model_copy(update={"tie_items": True}))
    with pytest.raises(ConfigError, match=r"sequence: comirec has several vectors"):
        run(of=spec("comirec"))
    with pytest.raises(ConfigError, match=r"dimension: .* 17 .* 16"):
        run(of=spec().model_copy(update={"dimension": 17}))
    with pytest.raises(BuildError, match="no times"):
        run(given=data(timed=False))
    with pytest.raises(ConfigError, match=r"order: .* gru"):
        run(FAST.model_copy(update={"order": "time"}), spec("gru"))
    nothing = replace(data(), examples=np.zeros(data().interactions.entries, bool))
    with pytest.raises(BuildError, match="no positive"):
        run(given=nothing)
    with pytest.raises(BuildError, match="needs the arrays of an earlier"):
        run(mode="resume")
    with pytest.raises(BuildError, match=r"assignment has shape \[40, 2\], and shape \[40, 3\]"):
        run(mode="resume", start=trained.arrays, per_item=3)
    beyond = trained.arrays | {"assignment": trained.arrays["assignment"] + 36}
    with pytest.raises(BuildError, match="there are 36"):
        run(mode="resume", start=beyond)


def test_a_diverging_run_stops_and_says_so():
    with pytest.raises(BuildError, match=r"diverges: .* smaller learning_rate"):
        run(FAST.model_copy(update={"learning_rate": 10.0}))


def test_the_bias_of_an_item_counts():
    ranker = Ranker(5, 3)
    torch.nn.init.normal_(ranker.bias.weight)
    users = torch.randn(4, 3)
    expected = users @ ranker.vectors.weight.T + ranker.bias.weight.T
    assert torch.allclose(with_one(users) @ ranker.whole().T, expected)
