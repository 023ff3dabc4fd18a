"""Building the two-tower channel: trained, updated, interrupted, refused. Needs PyTorch."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from channels.two_tower import TwoTower, TwoTowerOptions
from engine.core.channel import BuildContext, LoadContext, SilentProgress
from engine.core.errors import BuildError
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.memory import MemorySink
from engine.testing.world import interactions_of, random_batch, tiny_interactions

OPTIONS = {
    "dimension": 8,
    "sequence": {"kind": "mean", "width": 8, "length": 6},
    "item_features": [
        {"name": "item_id", "kind": "id", "dimension": 8},
        {"name": "author", "kind": "categorical", "dimension": 4},
    ],
    "item_hidden": [8],
    "index": "exact",
    "training": {"epochs": 3, "batch": 32, "learning_rate": 0.01},
}


class Interrupted(SilentProgress):
    """Breaks off when an epoch begins, and remembers those that began."""

    def __init__(self, at: str = "") -> None:
        self.at = at
        self.tasks: list[str] = []

    def start(self, task: str, total: int) -> None:
        if self.at and task.startswith(self.at):
            raise KeyboardInterrupt
        self.tasks.append(task)


@pytest.fixture(scope="module", autouse=True)
def _torch():
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'recall-engine[train]'")


def context_of(liked: Interactions, **more) -> BuildContext:
    columns = {
        "author": (np.arange(liked.items) % 5).astype(np.int32),
        "author.keys": np.arange(5),
        "item_id.keys": np.arange(liked.items) * 10,
    }
    now = int(liked.timestamps.max(initial=0))
    given = {"item_columns": columns, "threads": 1, "progress": SilentProgress(), **more}
    return BuildContext(liked, now=now, sink=MemorySink(), **given)


def built(liked: Interactions, options=None, **more):
    context = context_of(liked, **more)
    TwoTower.build(TwoTowerOptions.model_validate({**OPTIONS, **(options or {})}), context)
    return context.sink.arrays


def test_what_is_built_serves():
    liked = tiny_interactions()
    arrays = built(liked)
    config = TwoTowerOptions.model_validate(OPTIONS)
    channel = TwoTower.load(config, LoadContext(arrays, 40, 60, ItemColumns(40)))
    batch = random_batch(40, 60, 4)
    answer = channel.recall_batch(batch, np.full(4, 10, np.int32))
    # These towers read histories alone: of whom there is none nothing can be said.
    known = np.diff(batch.history.offsets) > 0
    assert known.sum() == 3
    assert np.diff(answer.offsets).tolist() == np.where(known, 10, 0).tolist()


def test_the_same_again_is_the_same():
    liked = tiny_interactions()
    first, second = built(liked), built(liked)
    assert {name: array.tobytes() for name, array in first.items()} == {
        name: array.tobytes() for name, array in second.items()
    }


def grown(liked: Interactions) -> tuple[Interactions, BuildContext]:
    """The next day: the first item is gone, two are new, and somebody liked a new one."""
    rows = [
        [row - 1 for row in liked.rows[liked.indptr[u] : liked.indptr[u + 1]].tolist() if row]
        for u in range(liked.users)
    ]
    rows[0] = [40, *rows[0]]
    rows[1] = [40, *rows[1]]
    later = interactions_of(rows, 41)
    times = later.timestamps.copy()
    times[later.rows == 40] = 2_000_000
    later = replace(later, timestamps=times)
    columns = {
        "author": (np.arange(1, 42) % 5).astype(np.int32),
        "author.keys": np.arange(5),
        "item_id.keys": np.arange(1, 42) * 10,
    }
    return later, columns


@pytest.mark.parametrize("mode", ["resume", "incremental"])
def test_an_update_goes_on_from_the_last_model(mode):
    liked = tiny_interactions()
    first = built(liked)
    later, columns = grown(liked)
    second = built(later, item_columns=columns, mode=mode, previous=first)
    assert second["learnt_until"].tolist() == [2_000_000]
    # Row r of today is row r + 1 of yesterday; 0.01 a step is as far as Adam goes.
    table = "item.embeddings.0.weight"
    moved = np.abs(second[table][1:40] - first[table][2:41]).max(1)
    assert moved.max() < 0.3
    assert np.abs(second[table][41] - first[table][0]).max() < 0.3
    dense = [name for name in first if ".layers." in name]
    assert dense
    same = [np.array_equal(first[name], second[name]) for name in dense]
    assert all(same) if mode == "incremental" else not all(same)
    if mode == "incremental":
        assert np.array_equal(first["item.embeddings.1.weight"], second["item.embeddings.1.weight"])


def test_an_update_without_news_is_refused():
    liked = tiny_interactions()
    with pytest.raises(BuildError, match="nobody liked anything since"):
        built(liked, mode="incremental", previous=built(liked))


def test_an_update_of_other_towers_is_refused():
    liked = tiny_interactions()
    with pytest.raises(BuildError, match=r"other towers \(item_hidden\)"):
        built(liked, {"item_hidden": [16]}, mode="resume", previous=built(liked))


def test_without_a_model_an_update_is_a_full_build():
    liked = tiny_interactions()
    assert built(liked, mode="resume")["item_vectors"].tobytes() == built(liked)["item_vectors"].tobytes()


def test_what_was_interrupted_goes_on(tmp_path):
    liked = tiny_interactions()
    with pytest.raises(KeyboardInterrupt):
        built(liked, progress=Interrupted("epoch 3/3"), work=tmp_path / "work")
    after = Interrupted()
    arrays = built(liked, progress=after, work=tmp_path / "work")
    assert {task.partition(",")[0] for task in after.tasks if task.startswith("epoch")} == {"epoch 3/3"}
    assert arrays["item_vectors"].tobytes() == built(liked)["item_vectors"].tobytes()


def test_weights_and_rejects_need_events():
    liked = tiny_interactions()
    weighted = {"training": {**OPTIONS["training"], "event_weights": {"like": 2.0}}}
    with pytest.raises(BuildError, match="events of the log"):
        built(liked, weighted)


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "engine.training.trainer", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BuildError, match=r"pip install 'recall-engine\[train\]'"):
        built(tiny_interactions())
