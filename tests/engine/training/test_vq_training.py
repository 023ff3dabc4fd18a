"""The streaming trainer: formulas by hand, planted worlds that stand still and that drift, and going on after a stop."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra train")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from engine.core.channel import SilentProgress  # noqa: E402
from engine.core.errors import BuildError, ConfigError, SnapshotError  # noqa: E402
from engine.core.interactions import Interactions  # noqa: E402
from engine.models.codebook import balance_of  # noqa: E402
from engine.models.encoded import Encoded, EncodedUsers  # noqa: E402
from engine.models.spec import Feature, ModelSpec, SequenceSpec  # noqa: E402
from engine.models.streaming_options import StreamingOptions, Task  # noqa: E402
from engine.models.towers import ItemTower, UserTower  # noqa: E402
from engine.models.vq_spec import VqSpec  # noqa: E402
from engine.training.data import TrainingData  # noqa: E402
from engine.training.frequency import Intervals  # noqa: E402
from engine.training.impressions import ImpressionBatch, ImpressionLog  # noqa: E402
from engine.training.rank import RankStep  # noqa: E402
from engine.training.streaming_trainer import StreamingTrainer  # noqa: E402
from engine.training.streaming_vq import train_streaming  # noqa: E402
from engine.training.vq_losses import (  # noqa: E402
    column_logs,
    mask_histories,
    own_items,
    rewarded_softmax,
    shared_softmax,
    similarity,
    straight_through,
)

WIDTH, GROUPS, USERS, ITEMS = 16, 12, 300, 360
FAST = StreamingOptions(batch=256, negatives=128, learning_rate=0.02, decay=0.95, replay=0)


def id_feature(name, size):
    return Feature(name=name, kind="id", dimension=WIDTH, size=size + 1)


def ids(n):
    return Encoded(np.arange(1, n + 1, dtype=np.int32)[:, None], (), np.empty((n, 0), np.float32))


class World:
    """Users have one of twelve interests, items belong to one; some items are shown far more often than others."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.of_user = self.random.integers(0, GROUPS, USERS)
        self.of_item = np.arange(ITEMS) % GROUPS
        self.popularity = (np.arange(ITEMS) // GROUPS + 1.0) ** -0.8

    def drift(self, share):
        """A share of the items now belongs to another interest."""
        moved = self.random.random(ITEMS) < share
        self.of_item = np.where(moved, self.random.integers(0, GROUPS, ITEMS), self.of_item)

    def shown(self, n):
        """int32[n] users and int32[n] items that they like."""
        users = self.random.integers(0, USERS, n).astype(np.int32)
        items = np.empty(n, np.int32)
        for group in range(GROUPS):
            mine, its = np.flatnonzero(self.of_user[users] == group), np.flatnonzero(self.of_item == group)
            weights = self.popularity[its] / self.popularity[its].sum()
            items[mine] = self.random.choice(its, mine.size, p=weights)
        return users, items

    def batch(self, n=FAST.batch):
        users, items = self.shown(n)
        nothing = np.empty((n, 0), np.float32)
        encoded = EncodedUsers(
            users[:, None] + np.int32(1), (), nothing, np.zeros((n, 0), np.int32), np.zeros(n, np.int32)
        )
        return ImpressionBatch(users, encoded, items, np.ones((n, 1), np.float32), np.full(n, 7, np.int64))

    def recall(self, arrays, k=30):
        """How many of the k best of each user by u . Q(v) + bias are of the user's interest."""
        scores = arrays["user.embeddings.0.weight"][1:] @ arrays["codebook.vectors"].T
        scores = scores[:, arrays["assignment"]] + arrays["item_bias"]
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        right = (self.of_item[best] == self.of_user[:, None]).sum(1)
        return np.mean(right / np.minimum(k, np.bincount(self.of_item, minlength=GROUPS)[self.of_user]))


def world_spec(clusters=48):
    tower = ModelSpec(
        user_features=(id_feature("user_id", USERS),), item_features=(id_feature("item_id", ITEMS),),
        dimension=WIDTH, metric="inner", items=ITEMS, tie_items=False,
    )  # fmt: skip
    return VqSpec(tower=tower, clusters=clusters)


@pytest.fixture(scope="module")
def trained():
    """A planted world, and a model that has learnt it: 150 batches."""
    world = World()
    trainer = StreamingTrainer(world_spec(), FAST, ids(ITEMS))
    for _ in range(150):
        trainer.step(world.batch())
        trainer.assign(trainer.candidates(64))
    trainer.assign(np.arange(ITEMS, dtype=np.int32))
    return world, trainer.arrays()


def after_drift(trained, options):
    """Recall after each of three waves of drift, with 50 batches between two."""
    world, start = copy.deepcopy(trained[0]), trained[1]
    trainer = StreamingTrainer(world_spec(), options, ids(ITEMS), start)
    found = []
    for _ in range(3):
        world.drift(0.4)
        for _ in range(50):
            trainer.step(world.batch())
        trainer.assign(np.arange(ITEMS, dtype=np.int32))
        found.append(world.recall(trainer.arrays()))
    return found


# --- learning -----------------------------------------------------------------------------------------------------


def test_a_planted_world_is_learnt_from_a_random_start_and_its_clusters_are_even(trained):
    world, arrays = trained
    assert world.recall(arrays) > 0.95
    balance = balance_of(arrays["assignment"], 48)
    assert balance.largest < 0.1
    assert balance.empty < 0.1
    assert balance.spread < 6
    # Items of one cluster are of one interest.
    pure = [np.bincount(world.of_item[arrays["assignment"] == k]).max(initial=0) for k in range(48)]
    assert sum(pure) / ITEMS > 0.95


def test_with_l_sim_recall_decays_while_items_drift_and_without_it_does_not(trained):
    """Section 3.2: L_ind and L_sim, as VQ-VAE has them, lock items where they are; with L_aux for L_sim they move."""
    free = after_drift(trained, FAST)
    locked = after_drift(
        trained, FAST.model_copy(update={"similarity_weight": 10.0, "auxiliary_weight": 0.0})
    )
    assert min(free) > 0.7
    assert locked[0] > locked[1] > locked[2]
    assert locked[2] < 0.35


def test_the_bias_says_how_popular_an_item_is(trained):
    world, arrays = trained
    assert np.corrcoef(np.log(world.popularity), arrays["item_bias"])[0, 1] > 0.5
    trainer = StreamingTrainer(world_spec(), FAST.model_copy(update={"bias": False}), ids(ITEMS))
    trainer.step(world.batch())
    assert not trainer.arrays()["item_bias"].any()


# --- formulas -----------------------------------------------------------------------------------------------------


def test_intervals_by_hand():
    intervals = Intervals(3, rate=0.25)
    intervals.update(np.array([0, 1, 0], np.int32))
    # Item 0 came at 1 and 3: the guess (3 items) and the interval 2 are averaged.
    np.testing.assert_allclose(intervals.of(np.array([0, 1, 2])), [2.5, 3.0, 3.0])
    intervals.update(np.array([1, 0, 0, 0], np.int32))
    # 0 at 5, 6, 7: intervals 2, 1, 1, averaged evenly up to the fourth occurrence, then by 1 / 4.
    expected = 2.5 + (2 - 2.5) / 3
    expected += (1 - expected) / 4
    expected += (1 - expected) / 4
    np.testing.assert_allclose(intervals.gap, [expected, (3 + 2) / 2, 3.0])
    intervals.grow(5)
    np.testing.assert_allclose(intervals.of(np.array([4])), [7.0])


def test_intervals_come_near_the_true_ones():
    random = np.random.default_rng(0)
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    intervals = Intervals(4)
    for _ in range(40):
        intervals.update(random.choice(4, 100, p=shares).astype(np.int32))
    np.testing.assert_allclose(intervals.gap, 1 / shares, rtol=0.5)


def test_the_correction_is_the_log_of_being_a_column():
    made = column_logs(np.array([4.0, 1.0]), 3, 2, 10)
    np.testing.assert_allclose(made, [np.log(1 - 0.75**3 * 0.9**2), 0.0], atol=1e-5)


def test_the_softmax_by_hand_and_clusters_gradient_goes_to_items():
    users = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    vectors = torch.tensor([[0.3, 0.1], [0.0, 1.0], [5.0, 5.0]], requires_grad=True)
    clusters = torch.tensor([[0.5, 0.0], [0.0, 0.5], [1.0, 1.0]])
    logits = users @ straight_through(vectors, clusters).T
    loss = rewarded_softmax(logits, torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    plain = (users @ clusters.T).numpy()
    each = -np.log(np.exp(plain[[0, 1], [0, 1]]) / np.exp(plain).sum(1))
    np.testing.assert_allclose(float(loss.detach()), (each[0] + 3 * each[1]) / 4, rtol=1e-5)
    loss.backward()
    shares = np.exp(plain) / np.exp(plain).sum(1, keepdims=True)
    wanted = (shares - np.eye(2, 3)) * np.array([[0.25], [0.75]])
    np.testing.assert_allclose(vectors.grad, wanted.T @ users.numpy(), rtol=1e-5)
    np.testing.assert_allclose(
        float(similarity(vectors[:2], clusters[:2]).detach()), (np.sqrt(0.05) + 0.5) / 2, rtol=1e-4
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9), m=st.integers(1, 40), scale=st.sampled_from([0.1, 3.0, 60.0]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_softmax_of_shared_columns_and_its_gradients_are_those_of_torch(n, m, scale, seed):
    random = np.random.default_rng(seed)
    given_ = [random.standard_normal(shape).astype(np.float32) for shape in ((n, 5), (m, 5), (m,))]
    given_[0] *= np.float32(scale)
    own, masked = random.integers(0, m, n), random.random((n, m)) < 0.3
    masked[np.arange(n), own] = False
    rewards = random.random(n).astype(np.float32) * (random.random(n) < 0.7)
    rewards[0] = 1.0
    queries, vectors, shift = (torch.from_numpy(each).requires_grad_() for each in given_)
    loss = 2 * shared_softmax(queries, vectors, shift, masked, own, rewards)
    loss.backward()
    double = [torch.from_numpy(each).double().requires_grad_() for each in given_]
    logits = (double[0] @ double[1].T + double[2]).masked_fill(torch.from_numpy(masked), -torch.inf)
    wanted = 2 * rewarded_softmax(logits, torch.from_numpy(own), torch.from_numpy(rewards).double())
    wanted.backward()
    np.testing.assert_allclose(float(loss.detach()), float(wanted.detach()), rtol=1e-4, atol=1e-5)
    for mine, right in zip((queries, vectors, shift), double, strict=True):
        np.testing.assert_allclose(mine.grad, right.grad, rtol=1e-3, atol=1e-4)


def test_a_users_other_items_are_no_negatives():
    users = np.array([3, -1, 3, -1], np.int32)
    masked = own_items(users, np.array([0, 1, 2, 0]), 4)
    wanted = np.zeros((4, 4), bool)
    wanted[0, 2] = wanted[2, 0] = True
    np.testing.assert_array_equal(masked, wanted)


def test_an_item_of_the_history_is_no_negative():
    sequence = np.array([[0, 3, 5], [0, 0, 9], [2, 3, 4], [0, 0, 0]], np.int32)
    codes = np.array([0, 3, 4, 0, 5], np.int64)  # two of the columns have no code of their own
    masked = np.zeros((4, 5), bool)
    masked[0, 0] = True
    mask_histories(sequence, codes, np.array([4, 0, 1, 1]), masked)
    wanted = np.zeros((4, 5), bool)
    wanted[0, :2] = wanted[2, 2] = True
    np.testing.assert_array_equal(masked, wanted)
    mask_histories(sequence[:, :0], codes, np.array([4, 0, 1, 1]), masked)


@pytest.mark.parametrize("lengths", [[3, 0], [0, 0]])
def test_the_complex_ranking_step_is_what_its_formula_says(lengths):
    spec = VqSpec(
        tower=world_spec().tower, clusters=4, tasks=("a", "b"), rank="complex", rank_dimension=8, rank_heads=2,
        rank_hidden=(6,),
    )  # fmt: skip
    torch.manual_seed(0)
    rank = RankStep(spec)
    n, count, width = 2, 5, 8
    random = np.random.default_rng(0)
    users = random.standard_normal((n, width)).astype(np.float32)
    items = random.standard_normal((n, count, width)).astype(np.float32)
    biases = random.standard_normal((n, count, 2)).astype(np.float32)
    history = np.zeros((n, 4), np.int32)
    history[0, 4 - lengths[0] :] = random.integers(1, ITEMS, lengths[0])
    with torch.no_grad():
        made = rank.crossed(
            torch.from_numpy(users), torch.from_numpy(items), torch.from_numpy(biases), history,
            np.array(lengths, np.int32),
        ).numpy()  # fmt: skip
    w = {name: value.numpy() for name, value in rank.state_dict().items()}
    for r in range(n):
        s = w["items.weight"][history[r][history[r] > 0]]
        for c in range(count):
            z, parts = items[r, c], []
            q, k, v = w["query.weight"] @ z, s @ w["key.weight"].T, s @ w["value.weight"].T
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                logits = k[:, part] @ q[part] / 2
                share = np.exp(logits) / np.exp(logits).sum() if len(s) else logits
                parts.append(share @ v[:, part] if len(s) else np.zeros(4))
            mixed = w["out.weight"] @ np.concatenate(parts) + w["out.bias"]
            y = np.concatenate([mixed, users[r], z, users[r] * z])
            y = np.maximum(w["layers.0.weight"] @ y + w["layers.0.bias"], 0)
            wanted = w["heads.weight"] @ y + w["heads.bias"] + biases[r, c]
            np.testing.assert_allclose(made[r, c], wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 5))
def test_histories_are_what_was_liked_before_the_second_of_the_impression(seed, length):
    data = small_data(seed)
    liked = data.interactions
    log = ImpressionLog.of_positives(liked, liked.weights)
    assert np.all(np.diff(log.timestamps) >= 0)
    assert len(log) == liked.entries
    for batch in log.batches(7, liked, data.users, length):
        for r, user in enumerate(batch.users):
            own = slice(liked.indptr[user], liked.indptr[user + 1])
            older = liked.rows[own][liked.timestamps[own] < batch.timestamps[r]][:length][::-1] + 1
            assert batch.encoded.lengths[r] == older.size
            np.testing.assert_array_equal(batch.encoded.sequence[r, length - older.size :], older)
            assert not batch.encoded.sequence[r, : length - older.size].any()


# --- going on -----------------------------------------------------------------------------------------------------

TASKS = (Task(name="click"), Task(name="stay", reward="log_value", eta=0.5, weight=0.5))
SMALL_USERS, SMALL_ITEMS = 40, 60


def small_data(seed=0):
    """Users like four to ten of the items of their half, some in the same second."""
    random = np.random.default_rng(seed)
    lists = [
        random.permutation(SMALL_ITEMS // 2)[: random.integers(4, 11)] * 2 + user % 2
        for user in range(SMALL_USERS)
    ]
    counts = [len(mine) for mine in lists]
    times = [np.sort(random.integers(1, 40, count))[::-1] * 3600 for count in counts]
    rows = np.concatenate(lists).astype(np.int32)
    matrix = Interactions(
        SMALL_USERS, SMALL_ITEMS, np.append(0, np.cumsum(counts)), rows, np.ones(rows.size, np.float32),
        np.concatenate(times).astype(np.int64),
    )  # fmt: skip
    hours = np.stack([np.arange(1, SMALL_USERS + 1), np.zeros(SMALL_USERS)], 1).astype(np.int32)
    users = Encoded(hours, (), random.standard_normal((SMALL_USERS, 2)).astype(np.float32))
    codes = np.stack([np.arange(1, SMALL_ITEMS + 1), np.arange(SMALL_ITEMS) % 7 + 1], 1).astype(np.int32)
    return TrainingData(matrix, users, Encoded(codes, (), np.empty((SMALL_ITEMS, 0), np.float32)))


def small_spec(rank="none", tasks=("positive",), **more):
    tower = ModelSpec(
        user_features=(
            id_feature("user_id", SMALL_USERS),
            Feature(name="context.hour", kind="categorical", dimension=4, size=25),
            Feature(name="age", kind="numeric"),
        ),
        item_features=(
            id_feature("item_id", SMALL_ITEMS),
            Feature(name="author", kind="categorical", dimension=4, size=8),
        ),
        sequence=SequenceSpec(kind="mean", length=4, width=WIDTH),
        hidden=(12,), item_hidden=(12,), dimension=WIDTH, metric="inner", items=SMALL_ITEMS,
    )  # fmt: skip
    more = {"secondary_clusters": 4, "rank_dimension": 8, "rank_history": 3, "rank_read": 6} | more
    return VqSpec(tower=tower, clusters=8, rank=rank, tasks=tasks, **more)


SMALL = StreamingOptions(batch=32, negatives=16, learning_rate=0.01, decay=0.9, feature_dropout=0.1)


def task_log(data, seed=0):
    """Of the impressions half are of items that the user did nothing with."""
    random = np.random.default_rng(seed)
    log = ImpressionLog.of_positives(data.interactions, data.interactions.weights)
    stay = np.log1p(random.integers(0, 3, len(log)) * 20.0)
    more = random.integers(0, SMALL_ITEMS, len(log)).astype(np.int32)
    rewards = np.concatenate([np.stack([np.ones(len(log)), stay], 1), np.zeros((len(log), 2))])
    return ImpressionLog.of(
        np.tile(log.users, 2), np.concatenate((log.items, more)), rewards.astype(np.float32),
        np.tile(log.timestamps, 2),
    )  # fmt: skip


def same(first, second):
    assert set(first) == set(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


@pytest.mark.parametrize("rank", ["none", "two_tower", "complex"])
def test_a_restored_trainer_does_what_an_uninterrupted_one_does(rank):
    data, spec = small_data(), small_spec(rank, ("click", "stay"))
    options = SMALL.model_copy(update={"tasks": TASKS})
    batches = list(task_log(data).batches(32, data.interactions, data.users, spec.read))
    published = Encoded(np.array([[0, 3], [0, 5]], np.int32), (), np.empty((2, 0), np.float32))
    for batch in batches[5:]:
        batch.items[:2] = SMALL_ITEMS, SMALL_ITEMS + 1  # one has a row of its own, the other has not

    def some_steps(trainer, few):
        made = []
        for batch in few:
            result = trainer.step(batch)
            made += [result.items, result.clusters, result.biases, *trainer.assign(trainer.candidates(9))]
        return made

    whole = StreamingTrainer(spec, options, data.items, spare=1)
    some_steps(whole, batches[:5])
    whole.add_items(published)
    some_steps(whole, batches[5:7])
    saved = io.BytesIO()
    torch.save(whole.state(), saved)
    wanted = some_steps(whole, batches[7:])

    other = StreamingTrainer(spec, options, data.items, spare=1)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    other.restore(state)
    for mine, right in zip(some_steps(other, batches[7:]), wanted, strict=True):
        np.testing.assert_array_equal(mine, right)
    same(other.arrays(), whole.arrays())
    other.restore(state)  # a state can be gone on from twice
    for mine, right in zip(some_steps(other, batches[7:]), wanted, strict=True):
        np.testing.assert_array_equal(mine, right)


def test_a_stopped_training_goes_on_where_it_was(tmp_path):
    data = small_data()
    options = SMALL.model_copy(update={"epochs": 2})

    class StoppedError(Exception):
        pass

    class StopsAfter(SilentProgress):
        left = 14

        def advance(self, amount=1):
            self.left -= amount
            if self.left <= 0:
                raise StoppedError

    whole = train_streaming(small_spec(), options, data, SilentProgress())
    with pytest.raises(StoppedError):
        train_streaming(small_spec(), options, data, StopsAfter(), work=tmp_path)
    assert (tmp_path / "checkpoint.pt").is_file()
    gone_on = train_streaming(small_spec(), options, data, SilentProgress(), work=tmp_path)
    same(whole.arrays, gone_on.arrays)
    assert whole.curves["loss"] == gone_on.curves["loss"]
    assert not (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("rank", ["none", "two_tower", "complex"])
def test_a_log_is_learnt_and_the_arrays_are_those_of_the_specification(rank):
    data, spec = small_data(), small_spec(rank)
    options = SMALL.model_copy(update={"epochs": 12, "crowding": 0.0, "centres": "moving"})
    made = train_streaming(spec, options, data, SilentProgress())
    arrays = made.arrays
    assert made.steps == 12 * -(-data.interactions.entries // 32)
    assert arrays["bias.weight"].shape == (SMALL_ITEMS + 1,)
    assert arrays["codebook.vectors"].shape == arrays["codebook.sums"].shape == (8, WIDTH)
    assert arrays["assignment"].dtype == np.int32
    assert arrays["assignment"].min() >= 0
    assert arrays["item_bias"].dtype == np.float32
    assert arrays["item_bias"].shape == (SMALL_ITEMS,)
    assert made.curves["index"][-1] < 0.9 * made.curves["index"][0]
    if rank != "none":
        assert arrays["rank.item_vectors"].shape == (SMALL_ITEMS, 8)
        assert arrays["rank.item_bias"].shape == (SMALL_ITEMS, 1)
        assert made.curves["rank"][-1] < made.curves["rank"][0]
        widths = [(w.shape[1], w.shape[0]) for w in layers(arrays, "rank.user.layers")]
        assert tuple(widths) == spec.rank_user_layers
    if rank == "complex":
        assert arrays["secondary"].shape == (8,)
        assert arrays["secondary"].max() < 4
    # What serves reads the same arrays: items of a user's half are scored above the others.
    vectors = ItemTower.load(spec.tower, arrays).vectors(data.items)
    np.testing.assert_array_equal(
        arrays["assignment"],
        np.argmin(
            np.linalg.norm(vectors[:, None] - arrays["codebook.vectors"], axis=2)
            * np.minimum(5 * arrays["codebook.counts"] / arrays["codebook.counts"].mean(), 1),
            1,
        ),
    )
    log = ImpressionLog.of_positives(data.interactions, data.interactions.weights)
    batch = list(log.batches(32, data.interactions, data.users, 4))[-1]
    users = UserTower.load(spec.tower, arrays).vectors(batch.encoded)
    scores = users @ arrays["codebook.vectors"].T
    scores = scores[:, arrays["assignment"]] + arrays["item_bias"]
    best = np.argsort(-scores, 1)[:, :10]
    assert np.mean(best % 2 == batch.users[:, None] % 2) > 0.8


def layers(arrays, prefix):
    return [arrays[f"{prefix}.{at}.weight"] for at in range(9) if f"{prefix}.{at}.weight" in arrays]


def test_an_update_goes_on_from_an_earlier_model():
    data = small_data()
    first = train_streaming(small_spec(), SMALL, data, SilentProgress())
    newer = data.interactions.timestamps > 30 * 3600
    part = TrainingData(data.interactions, data.users, data.items, examples=newer)
    second = train_streaming(
        small_spec(), SMALL, part, SilentProgress(), start=first.arrays, mode="incremental"
    )
    assert second.steps == -(-int(newer.sum()) // 32)
    other = {**first.arrays, "codebook.sums": first.arrays["codebook.sums"][:, :3]}
    with pytest.raises(BuildError, match="another one: codebook"):
        train_streaming(small_spec(), SMALL, part, SilentProgress(), start=other, mode="incremental")
    with pytest.raises(BuildError, match="earlier training"):
        train_streaming(small_spec(), SMALL, part, SilentProgress(), mode="resume")


def test_a_trainer_begins_with_the_clusters_as_they_are_and_makes_them_the_means_of_their_items():
    data, spec = small_data(), small_spec()
    first = train_streaming(spec, SMALL, data, SilentProgress()).arrays
    vectors = ItemTower.load(spec.tower, first).vectors(data.items)
    seen = np.bincount(data.interactions.rows, minlength=SMALL_ITEMS) > 0
    for k in range(8):
        mine = vectors[(first["assignment"] == k) & seen]
        assert not len(mine) or (mine.min(0) - 1e-4 <= first["codebook.vectors"][k]).all()
        assert not len(mine) or (first["codebook.vectors"][k] <= mine.max(0) + 1e-4).all()
    trainer = StreamingTrainer(spec, SMALL, data.items, first)
    np.testing.assert_allclose(trainer.codebook.vectors, first["codebook.vectors"], rtol=1e-5, atol=1e-6)
    # None has come since, so that all count alike.
    trainer.assign(np.arange(SMALL_ITEMS, dtype=np.int32))
    for k in range(8):
        mine = vectors[trainer.assignment == k]
        if len(mine):
            np.testing.assert_allclose(trainer.codebook.vectors[k], mine.mean(0), rtol=1e-4, atol=1e-5)


def test_each_task_has_a_tower_of_its_own_and_rewards_draw_the_clusters():
    data, spec = small_data(), small_spec("two_tower", ("click", "stay"))
    options = SMALL.model_copy(update={"tasks": TASKS})
    arrays = train_streaming(spec, options, data, SilentProgress(), log=task_log(data)).arrays
    assert "user_click.layers.0.weight" in arrays
    assert "user_stay.layers.0.weight" in arrays
    assert arrays["rank.user.layers.1.weight"].shape[0] == 2 * 8
    indifferent = options.model_copy(
        update={"tasks": tuple(task.model_copy(update={"eta": 0.0}) for task in TASKS)}
    )
    other = train_streaming(spec, indifferent, data, SilentProgress(), log=task_log(data)).arrays
    assert arrays["codebook.counts"].sum() > 1.2 * other["codebook.counts"].sum()


def test_what_nobody_has_seen_does_not_crowd_in_one_cluster():
    """Two thirds of the items never come; by the paper's rules, without crowding, they go where the vectors begin."""
    data = small_data()
    seen = data.interactions.rows < SMALL_ITEMS // 3
    log = ImpressionLog.of_positives(data.interactions, np.where(seen, 1, 0).astype(np.float32))
    largest = {}
    for crowding in (0.0, 1.0):
        options = SMALL.model_copy(update={"epochs": 4, "crowding": crowding})
        made = train_streaming(small_spec(), options, data, SilentProgress(), log=log)
        balance = balance_of(made.arrays["assignment"], 8)
        largest[crowding] = balance.largest
    assert largest[1.0] < 0.25 < largest[0.0]
    assert balance.empty == 0


def test_published_items_are_placed_by_their_features_and_passed_over_in_histories():
    data, spec = small_data(), small_spec("complex")
    trainer = StreamingTrainer(spec, SMALL, data.items)
    assert trainer.assignment.max() == -1
    rows = trainer.add_items(Encoded(np.array([[0, 3]], np.int32), (), np.empty((1, 0), np.float32)))
    assert rows.tolist() == [SMALL_ITEMS]
    clusters, _ = trainer.assign(rows)
    assert trainer.assignment[SMALL_ITEMS] == clusters[0] >= 0
    log = ImpressionLog.of_positives(data.interactions, data.interactions.weights)
    batch = list(log.batches(32, data.interactions, data.users, spec.read))[-1]
    batch.encoded.sequence[0, -2] = SMALL_ITEMS + 1
    batch.items[1] = SMALL_ITEMS
    result = trainer.step(batch)
    assert SMALL_ITEMS in result.items
    assert np.isfinite(result.loss)
    assert trainer.candidates(99).tolist() == list(range(SMALL_ITEMS + 1))


@pytest.mark.parametrize("rank", ["none", "two_tower"])
def test_published_items_learn_rows_of_their_own_while_some_are_spare(rank):
    data, spec = small_data(), small_spec(rank)
    trainer = StreamingTrainer(spec, SMALL, data.items, spare=2)
    log = ImpressionLog.of_positives(data.interactions, data.interactions.weights)
    batches = list(log.batches(32, data.interactions, data.users, spec.read))
    trainer.step(batches[0])
    rows = trainer.add_items(Encoded(np.full((3, 2), (0, 3), np.int32), (), np.empty((3, 0), np.float32)))
    assert trainer.learning == 2
    assert np.unique(trainer.assign(rows)[1]).size == 1  # all of them as an unknown item is
    for batch in batches[1:8]:
        batch.items[:8] = SMALL_ITEMS + 1
        trainer.step(batch)
    biases = trainer.assign(rows)[1]
    assert biases[1] > biases[0] + 0.05
    assert biases[1] > biases[2] + 0.05

    arrays = trainer.arrays()
    tables = {"bias.weight": (), "item.embeddings.0.weight": (WIDTH,)}
    if rank != "none":
        tables |= {"rank.items.weight": (8,), "rank.bias.weight": (1,)}
        assert arrays["published.rank.item_vectors"].shape == (2, 8)
        assert arrays["published.rank.item_bias"].shape == (2, 1)
    for name, shape in tables.items():
        assert arrays[name].shape == (SMALL_ITEMS + 1, *shape)
        assert arrays[f"published.{name}"].shape == (2, *shape)
        assert np.abs(arrays[f"published.{name}"][1] - arrays[f"published.{name}"][0]).max() > 0
    # A trainer that begins with them goes on from there, whatever the order; without them, from the unknown.
    other = StreamingTrainer(spec, SMALL, data.items, arrays, spare=2)
    features = Encoded(np.full((2, 2), (0, 3), np.int32), (), np.empty((2, 0), np.float32))
    other.add_items(features, np.array([1, -1], np.int32))
    found = other.arrays()
    for name in tables:
        np.testing.assert_array_equal(found[f"published.{name}"][0], arrays[f"published.{name}"][1])
        np.testing.assert_array_equal(found[f"published.{name}"][1], found[name][0])


def test_impressions_without_any_reward_move_the_clusters_alone():
    data, spec = small_data(), small_spec()
    trainer = StreamingTrainer(spec, SMALL, data.items)
    log = ImpressionLog.of_positives(data.interactions, data.interactions.weights)
    batch = next(log.batches(32, data.interactions, data.users, spec.read))
    batch.rewards[:] = 0
    before = trainer.arrays()
    result = trainer.step(batch)
    after = trainer.arrays()
    assert np.isnan(result.loss)
    assert not result.losses
    np.testing.assert_array_equal(before["item.embeddings.0.weight"], after["item.embeddings.0.weight"])
    assert not np.array_equal(before["codebook.sums"], after["codebook.sums"])


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(-1.0, "-1.0"), (np.nan, "nan"), (np.inf, "inf")])
def test_a_reward_out_of_range_is_refused_by_name(value, shown):
    data, spec = small_data(), small_spec(tasks=("click", "stay"))
    trainer = StreamingTrainer(spec, SMALL.model_copy(update={"tasks": TASKS}), data.items)
    log = task_log(data)
    log.rewards[5, 1] = value
    batch = next(log.batches(32, data.interactions, data.users, spec.read))
    with pytest.raises(BuildError, match=f"task 'stay'.*impression 5 has {shown}"):
        trainer.step(batch)


def test_what_cannot_work_is_refused_in_a_sentence():
    data = small_data()
    with pytest.raises(ConfigError, match="clusters: 61 clusters are more than the 60 items"):
        StreamingTrainer(small_spec().model_copy(update={"clusters": 61}), SMALL, data.items)
    with pytest.raises(ConfigError, match="tasks: the model has the tasks positive"):
        StreamingTrainer(small_spec(), SMALL.model_copy(update={"tasks": TASKS}), data.items)
    with pytest.raises(ConfigError, match="tasks: several tasks need a log"):
        train_streaming(
            small_spec(tasks=("click", "stay")),
            SMALL.model_copy(update={"tasks": TASKS}),
            data,
            SilentProgress(),
        )
    liked = data.interactions
    untimed = Interactions(
        liked.users, liked.items, liked.indptr, liked.rows, liked.weights, 0 * liked.timestamps
    )
    with pytest.raises(BuildError, match="no times"):
        train_streaming(small_spec(), SMALL, TrainingData(untimed, data.users, data.items), SilentProgress())
    nothing = TrainingData(liked, data.users, data.items, weights=np.zeros(liked.entries, np.float32))
    with pytest.raises(BuildError, match="nothing to learn from"):
        train_streaming(small_spec(), SMALL, nothing, SilentProgress())
    trainer = StreamingTrainer(small_spec(), SMALL, data.items)
    log = ImpressionLog.of_positives(liked, liked.weights)
    batch = next(log.batches(32, liked, data.users, 4))
    batch.items[3] = SMALL_ITEMS
    with pytest.raises(BuildError, match="item row 60"):
        trainer.step(batch)
    other = StreamingTrainer(small_spec("two_tower"), SMALL, data.items)
    with pytest.raises(SnapshotError, match="another model"):
        trainer.restore(other.state())


def test_specifications_that_do_not_fit_are_refused():
    tower = small_spec().tower
    with pytest.raises(ValueError, match="inner product"):
        VqSpec(tower=tower.model_copy(update={"metric": "cosine"}), clusters=4)
    with pytest.raises(ValueError, match="rank_heads = 3"):
        VqSpec(tower=tower, clusters=4, rank_heads=3)
    with pytest.raises(ValueError, match="rank_read = 5"):
        VqSpec(tower=tower, clusters=4, rank="complex", rank_read=5)
    with pytest.raises(ValueError, match="twice"):
        StreamingOptions(tasks=(Task(name="a"), Task(name="a")))
    with pytest.raises(ValueError, match="nothing is learnt"):
        StreamingOptions(auxiliary_weight=0, index_weight=0)
