"""Building the Deep Retrieval channel: trained, updated, refused. Needs PyTorch."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from channels.deep_retrieval import DeepRetrieval, DeepRetrievalOptions
from engine.core.channel import BuildContext, LoadContext, SilentProgress
from engine.core.errors import BuildError
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.memory import MemorySink
from engine.testing.world import interactions_of, random_batch, tiny_interactions

OPTIONS = {
    "dimension": 8,
    "sequence": {"kind": "gru", "width": 8, "length": 6},
    "item_features": [{"name": "author", "kind": "categorical", "dimension": 1}],
    "width": 4,
    "depth": 2,
    "path_hidden": [8],
    "paths": 2,
    "kept_paths": 6,
    "beam": 16,
    "training": {
        "epochs": 2, "fixed_epochs": 1, "batch": 64, "learning_rate": 0.01, "negatives": 20, "recall_beam": 16,
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _torch():
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'recall-engine[train]'")


def context_of(liked: Interactions, first: int = 0, **more) -> BuildContext:
    rows = np.arange(first, first + liked.items)
    columns = {
        "author": (rows % 5).astype(np.int32),
        "author.keys": np.arange(5),
        "author.vocabulary.offsets": np.arange(6, dtype=np.int64),
        "author.vocabulary.data": np.frombuffer(b"abcde", np.uint8),
        "item_id.keys": rows * 10,
    }
    now = int(liked.timestamps.max(initial=0))
    given = {"item_columns": columns, "threads": 1, "progress": SilentProgress(), **more}
    return BuildContext(liked, now=now, sink=MemorySink(), **given)


def built(liked: Interactions, first: int = 0, options=None, **more):
    context = context_of(liked, first, **more)
    DeepRetrieval.build(DeepRetrievalOptions.model_validate({**OPTIONS, **(options or {})}), context)
    return context.sink.arrays


@pytest.fixture(scope="module")
def first():
    return built(tiny_interactions())


def test_what_is_built_serves(first):
    config = DeepRetrievalOptions.model_validate(OPTIONS)
    channel = DeepRetrieval.load(config, LoadContext(first, 40, 60, ItemColumns(40)))
    answer = channel.recall_batch(random_batch(40, 60, 4), np.full(4, 10, np.int32))
    assert np.diff(answer.offsets).tolist() == [10] * 4
    assert (answer.triggers >= 0).all()
    likes = tiny_interactions().item_counts()
    assert ((first["assignment"][:, 0] >= 0) | (likes == 0)).all()


def grown(liked: Interactions) -> Interactions:
    """The next day: the first item is gone, two are new, and somebody liked one of these."""
    rows = [
        [row - 1 for row in liked.rows[liked.indptr[u] : liked.indptr[u + 1]].tolist() if row]
        for u in range(liked.users)
    ]
    rows[0] = [40, *rows[0]]
    rows[1] = [40, *rows[1]]
    later = interactions_of(rows, 41)
    times = later.timestamps.copy()
    times[later.rows == 40] = 2_000_000
    return replace(later, timestamps=times)


@pytest.mark.parametrize("mode", ["resume", "incremental"])
def test_an_update_goes_on_from_the_last_model(mode, first):
    later = grown(tiny_interactions())
    second = built(later, 1, mode=mode, previous=first)
    assert second["learnt_until"].tolist() == [2_000_000]
    # Row r of today is row r + 1 of yesterday, and moved a little.
    moved = np.abs(second["rank.vectors"][:39] - first["rank.vectors"][1:40])
    assert moved.max() < 0.3
    assert second["assignment"].shape == (41, 2)
    config = DeepRetrievalOptions.model_validate(OPTIONS)
    channel = DeepRetrieval.load(config, LoadContext(second, 41, 60, ItemColumns(41)))
    answer = channel.recall_batch(random_batch(41, 60, 3), np.full(3, 41, np.int32))
    assert 40 in answer.rows


def test_nothing_new_is_no_update(first):
    with pytest.raises(BuildError, match="nobody liked anything since"):
        built(tiny_interactions(), mode="incremental", previous=first)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"width": 5}, "lattice"), ({"paths": 1}, "paths"), ({"hidden": [4]}, "hidden")],
)
def test_another_model_is_not_trained_on(options, what, first):
    with pytest.raises(BuildError, match=what):
        built(tiny_interactions(), options=options, mode="resume", previous=first)


def test_an_update_without_a_model_is_a_full_training(first):
    again = built(tiny_interactions(), mode="incremental")
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in first.items()
    }


def test_without_torch_the_build_says_what_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("engine.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BuildError, match="deep_retrieval: training needs PyTorch"):
        built(tiny_interactions())
