"""Each loss against plain loops over examples and negatives."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra train")

from engine.training import losses  # noqa: E402
from engine.training.objective import softmax_inside  # noqa: E402

N, M, D, ITEMS = 7, 5, 4, 11


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@pytest.fixture
def scores():
    random = np.random.default_rng(3)
    positive = random.normal(size=N).astype(np.float32)
    negatives = random.normal(size=(N, M)).astype(np.float32)
    masked = random.random((N, M)) < 0.3
    masked[2] = True  # an example without any negative
    weights = random.uniform(0.5, 2, N).astype(np.float32)
    return positive, negatives, masked, weights


def expected(scores, one):
    """The weighted mean of one(s, [s_j that count]) over the examples."""
    positive, negatives, masked, weights = scores
    each = [one(float(positive[n]), negatives[n][~masked[n]].astype(float)) for n in range(N)]
    return float(np.average(each, weights=weights))


def tensors(scores):
    return tuple(torch.from_numpy(array) for array in scores)


def triplets(one):
    return lambda s, js: float(np.mean([one(s, j) for j in js])) if len(js) else 0.0


CASES = {
    "softmax": (losses.softmax, {}, lambda s, js: -s + math.log(math.exp(s) + np.exp(js).sum())),
    "bce": (losses.bce, {}, lambda s, js: -log_sigmoid(s) - sum(log_sigmoid(-j) for j in js)),
    "nce": (
        losses.nce,
        {"shift": 0.3, "shifts": 0.7},
        lambda s, js: -log_sigmoid(s - 0.3) - sum(log_sigmoid(-(j - 0.7)) for j in js),
    ),
    "hinge": (losses.hinge, {"margin": 0.5}, triplets(lambda s, j: max(0.0, j + 0.5 - s))),
    "logistic": (losses.logistic, {}, triplets(lambda s, j: math.log1p(math.exp(j - s)))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_its_formula(scores, name):
    loss, options, one = CASES[name]
    assert float(loss(*tensors(scores), **options)) == pytest.approx(expected(scores, one), rel=1e-5)


@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
def test_gbce_raises_the_positive_to_its_power(scores, calibration):
    share = M / (ITEMS - 1)
    beta = share * (calibration * (1 - 1 / share) + 1 / share)

    def one(s, js):
        return -beta * log_sigmoid(s) - sum(log_sigmoid(-j) for j in js)

    found = losses.gbce(*tensors(scores), calibration=calibration, items=ITEMS)
    assert float(found) == pytest.approx(expected(scores, one), rel=1e-5)
    assert calibration > 0 or beta == pytest.approx(1.0)
    assert calibration < 1 or beta == pytest.approx(share)


def vectors(*shape, seed=0):
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.normal(size=shape).astype(np.float32)).requires_grad_()


def gradients(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss * 3, inputs)]


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_the_full_softmax_in_chunks_is_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK_CELLS", chunk)
    queries, items = vectors(40, D), vectors(ITEMS, D, seed=1)
    positives = torch.arange(40) % ITEMS
    weights = torch.linspace(0.1, 2, 40)
    plain = torch.nn.functional.cross_entropy(queries @ items.T / 0.5, positives, reduction="none")
    made = gradients(losses.full_softmax(queries, items, positives, weights, 0.5), queries, items)
    for found, wanted in zip(
        made, gradients((plain * weights).sum() / weights.sum(), queries, items), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_the_softmax_by_users_is_that_of_each_like_against_what_the_user_does_not_have(monkeypatch, chunk):
    monkeypatch.setattr(losses, "USER_CELLS", chunk)
    random = np.random.default_rng(4)
    users = 40
    has = random.random((users, ITEMS)) < 0.3
    has[3] = True  # a user without any negative
    likes = random.integers(0, 4, users)
    ends = np.concatenate([[0], np.cumsum(likes)])
    queries, items = vectors(users, D), vectors(ITEMS, D, seed=1)
    scores, shifts = vectors(int(ends[-1]), seed=2), torch.linspace(-1, 1, ITEMS)
    weights = torch.linspace(0.1, 2, int(ends[-1]))
    owners = torch.from_numpy(np.repeat(np.arange(users), likes))
    negatives = (queries @ items.T + shifts)[owners]
    wanted = losses.softmax(scores, negatives, torch.from_numpy(has)[owners], weights)
    own = np.concatenate([[0], np.cumsum(has.sum(1))]), np.nonzero(has)[1].astype(np.int32)
    found = losses.user_softmax(queries, items, shifts, own, scores, ends, weights)
    inputs = (queries, items, scores)
    for mine, theirs in zip(gradients(found, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("owned", [False, True])
def test_shared_negatives_in_chunks_are_the_softmax(monkeypatch, chunk, owned):
    monkeypatch.setattr(losses, "CHUNK_CELLS", chunk)
    queries, shared, own = vectors(40, D), vectors(M, D, seed=1), vectors(40, 3, seed=2)
    shifts, weights = torch.linspace(-1, 1, M), torch.linspace(0.1, 2, 40)
    owners = torch.arange(40) // 8 if owned else None
    masked = torch.from_numpy(np.random.default_rng(5).random((5 if owned else 40, M)) < 0.4)
    hits = masked[owners] if owned else masked
    negatives = torch.cat([queries @ shared.T - shifts, own[:, 1:]], 1)
    gone = torch.cat([hits, torch.zeros(40, 2, dtype=torch.bool)], 1)
    wanted = gradients(losses.softmax(own[:, 0], negatives, gone, weights), queries, shared, own)
    found = losses.shared_softmax(queries, shared, shifts, masked, owners, own, weights)
    for mine, theirs in zip(gradients(found, queries, shared, own), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_hopeless_positive_gives_a_finite_loss_and_the_right_gradient():
    queries = torch.tensor([[200.0]], requires_grad=True)
    items = torch.tensor([[1.0], [-1.0]])
    loss = losses.full_softmax(queries, items, torch.tensor([1]), torch.ones(1), 1.0)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert float(queries.grad) == pytest.approx(2.0)


@pytest.mark.parametrize("by_user", [True, False])
def test_a_softmax_inside_tasks_is_that_with_the_negatives_of_the_others_masked(by_user):
    random, n, m, users = np.random.default_rng(2), 30, 20, 9
    of, columns = random.integers(0, 4, n).astype(np.int32), random.integers(0, 3, m).astype(np.int32)
    owners = torch.from_numpy(random.integers(0, users, n)) if by_user else None
    # A history has one task, so what of its user's other tasks is masked is the same for all its examples.
    of = np.arange(users, dtype=np.int32)[owners.numpy()] % 4 if owners is not None else of
    masked = torch.from_numpy(random.random((users if by_user else n, m)) < 0.2)
    other = (np.arange(users) % 4 if by_user else of)[:, None] != columns
    found = []
    for inside in (True, False):
        torch.manual_seed(3)
        queries, shared, own = (torch.randn(shape, requires_grad=True) for shape in ((n, 5), (m, 5), (n, 2)))
        shifts, weights = torch.randn(m), torch.rand(n)
        if inside:
            loss = softmax_inside(queries, shared, shifts, masked, owners, own, weights, of, columns)
        else:
            hits = masked | torch.from_numpy(other)
            loss = losses.shared_softmax(queries, shared, shifts, hits, owners, own, weights)
        loss.backward()
        found.append((loss.detach(), queries.grad, shared.grad, own.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
