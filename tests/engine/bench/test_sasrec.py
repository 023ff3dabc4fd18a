"""SASRec beside RecTools: what is measured of ours, and what is said where RecTools is not to be had."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs the extra train")

from engine.bench.sasrec import Settings, bench_sasrec, ranked
from engine.config import load_config
from engine.core.channel import SilentProgress
from engine.core.errors import BuildError
from engine.core.interactions import Interactions
from engine.data.sample import sample_path
from engine.models.reference import random_weights
from engine.models.spec import Feature, ModelSpec, SequenceSpec
from engine.models.towers import UserTower

SMALL = Settings(width=8, blocks=1, heads=1, length=10, epochs=1)


def bench(python):
    return bench_sasrec(load_config(), sample_path(), SMALL, python, 1, SilentProgress())


def test_the_report_has_both_numbers_and_the_cpu_time_of_the_training():
    report = bench(None)
    assert 0 <= report["recall_engine"]["ndcg"] <= report["recall_engine"]["hr"] <= 1
    assert report["recall_engine"]["cpu_s"] > 0
    assert report["settings"]["width"] == 8
    assert "rectools" not in report


def test_an_interpreter_without_rectools_is_named_by_its_error():
    with pytest.raises(BuildError, match="RecTools ended with status 1: ModuleNotFoundError"):
        bench(sys.executable)


def test_lists_are_the_best_items_that_the_user_does_not_have():
    items, length = 20, 5
    spec = ModelSpec(
        item_features=(Feature(name="item_id", kind="id", dimension=8, size=items + 1),),
        items=items,
        dimension=8,
        metric="inner",
        sequence=SequenceSpec(kind="mean", width=8, length=length),
    )
    arrays = random_weights(spec)
    table = arrays["item.embeddings.0.weight"]
    rows = np.array([3, 4, 5, 6, 7, 8, 9, 1], np.int32)
    known = Interactions(2, items, np.array([0, 7, 8]), rows, np.ones(8, np.float32), np.zeros(8, np.int64))
    made = ranked(UserTower.load(spec, arrays), table[1:], known, np.array([0, 1], np.int32), length, 4)
    for user, mine in enumerate((rows[:7], rows[7:])):
        scores = table[1:] @ table[mine[:length] + 1].mean(0)
        scores[mine] = -np.inf
        assert (
            made.rows[made.offsets[user] : made.offsets[user + 1]].tolist()
            == np.argsort(-scores)[:4].tolist()
        )
