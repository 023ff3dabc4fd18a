"""Views of items hide what their mask says."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra train")

from engine.models.encoded import Encoded, Multi  # noqa: E402
from engine.models.spec import Feature  # noqa: E402
from engine.training.self_supervised import mutual_information, two_views, view_loss  # noqa: E402

FEATURES = (
    Feature(name="item_id", kind="id", size=41),
    Feature(name="tags", kind="multi", size=9),
    Feature(name="duration", kind="numeric"),
    Feature(name="author", kind="categorical", size=5),
)
N = 40


@pytest.fixture
def items():
    random = np.random.default_rng(0)
    author = random.integers(1, 5, N).astype(np.int32)
    tags = np.repeat(author, 3) + random.integers(0, 2, 3 * N).astype(np.int32)
    return Encoded(
        np.stack([np.arange(1, N + 1, dtype=np.int32), author], 1),
        (Multi(tags.astype(np.int32), np.arange(0, 3 * N + 1, 3)),),
        np.stack([random.normal(size=N), np.zeros(N)], 1).astype(np.float32),
    )


def hidden_features(view):
    return [
        bool(np.all(view.codes[:, 0] == 0)),
        view.multi[0].codes.size == 0,
        bool(np.all(view.numbers[:, 1] == 1)),
        bool(np.all(view.codes[:, 1] == 0)),
    ]


def test_complementary_views_share_nothing_and_miss_nothing(items):
    related = mutual_information(items, FEATURES)
    for mask in ("complementary", "information"):
        for seed in range(8):
            first, second = two_views(items, FEATURES, mask, related, np.random.default_rng(seed))
            assert [not gone for gone in hidden_features(first)] == hidden_features(second)
            assert 0 < sum(hidden_features(first)) < 4


def test_information_hides_related_features_together(items):
    related = mutual_information(items, FEATURES)
    assert related == pytest.approx(related.T)
    assert related[3, 1] > related[3, 2]  # the tags were made from the author, the duration was not
    assert related[3, 3] == pytest.approx(
        -sum(p * np.log(p) for p in np.bincount(items.codes[:, 1])[1:] / N), rel=1e-9
    )


def test_dropout_thins_lists_and_random_draws_each_view_anew(items):
    related = mutual_information(items, FEATURES)
    first, second = two_views(items, FEATURES, "dropout", related, np.random.default_rng(1))
    assert 0 < first.multi[0].codes.size < items.multi[0].codes.size
    assert not np.array_equal(first.multi[0].codes, second.multi[0].codes)
    assert np.array_equal(first.codes, items.codes)
    for view in (first, second):
        for row in range(N):
            kept = view.multi[0].codes[view.multi[0].offsets[row] : view.multi[0].offsets[row + 1]]
            whole = items.multi[0].codes[3 * row : 3 * row + 3]
            assert set(kept) <= set(whole)
    seen = set()
    for seed in range(30):
        views = two_views(items, FEATURES, "random", related, np.random.default_rng(seed))
        seen.add(tuple(map(tuple, map(hidden_features, views))))
    assert len(seen) > 10


def test_the_loss_of_views_is_its_formula():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 6, 3))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    wanted = np.mean([-np.log(np.exp(a[i] @ b[i] / 0.2) / np.exp(b @ a[i] / 0.2).sum()) for i in range(6)])
    found = view_loss(torch.from_numpy(first), torch.from_numpy(second), 0.2)
    assert float(found) == pytest.approx(wanted)
