"""`recall bench streaming-vq-quality` and `streaming-vq-drift`: small, for what they say and what they refuse."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("torch", reason="training needs the extra train")

from engine.bench.vq_drift import MINUTES, bench_drift
from engine.bench.vq_quality import ABLATIONS, ablate, compare, drawn_users
from engine.config import load_config
from engine.core.channel import SilentProgress
from engine.core.errors import ConfigError
from engine.data.catalogue import Catalogue
from engine.data.dataset import write_dataset
from engine.data.events import EventLog
from engine.data.snapshot import SnapshotStore
from engine.models.streaming_options import StreamingOptions

SEQUENCE = {"kind": "mean", "width": 8, "length": 10}
VQ = {"dimension": 8, "clusters": 4, "sequence": SEQUENCE, "training": {"batch": 32, "negatives": 8}}
VECTORS = {"dimension": 8, "sequence": SEQUENCE, "training": {"epochs": 1, "batch": 64}}
PATHS = {
    "dimension": 8, "sequence": SEQUENCE, "width": 8, "depth": 2, "path_hidden": [8], "paths": 2, "kept_paths": 4,
    "beam": 8, "training": {"epochs": 1, "fixed_epochs": 0, "negatives": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """60 users who like some of 40 items, popular ones more, at one time or another."""
    random = np.random.default_rng(0)
    appeal = 1 / np.arange(1.0, 41)
    likes = [random.choice(40, 8, replace=False, p=appeal / appeal.sum()) for _ in range(60)]
    table = {
        "user_id": np.repeat(np.arange(60), 8),
        "item_id": np.concatenate(likes),
        "event": ["like"] * 480,
        "timestamp": 1_700_000_000 + random.permutation(480),
    }
    return write_dataset(tmp_path_factory.mktemp("data") / "liked", pa.table(table), meta={"name": "liked"})


def config_of():
    changes = {"streaming_vq": VQ, "two_tower": VECTORS, "deep_retrieval": PATHS}
    return load_config().with_channel_options(changes)


def test_three_channels_are_asked_for_the_same_users(dataset, tmp_path):
    report = compare(
        config_of(), dataset, "leave-one-out", "validation", [5], [], SnapshotStore(tmp_path), SilentProgress(),
        users=50, orders=["shuffled"],
    )  # fmt: skip
    assert 0 < report["users"] <= 50
    names = [(row["channel"], row["order"]) for row in report["rows"]]
    others = [("two_tower", "shuffled"), ("deep_retrieval", "shuffled")]
    assert names == [*others, *[("streaming_vq", "time")] * 4]
    assert all(0 <= row["recall@5"] <= 1 for row in report["rows"])
    reached = report["rows"][1]["rank_list"]
    assert reached > 0
    assert [row["rank_list"] for row in report["rows"][2:5]] == [
        max(1, round(part * reached)) for part in (0.1, 1 / 3, 1.0)
    ]
    assert 0 < report["balance"]["largest"] <= 1


def test_a_part_is_taken_away_and_what_the_streams_left_behind_is_counted(dataset):
    rows = ["all of it", "no candidate stream"]
    report = ablate(config_of(), dataset, "leave-one-out", "test", [5], [1, 2], rows, SilentProgress())
    assert [row["name"] for row in report["rows"]] == rows
    for row in report["rows"]:
        assert 0 <= row["recall@5"] <= 1
        assert 0 <= row["stale"] <= 1
        assert "exact_recall@5_sd" in row
    with pytest.raises(ConfigError, match="all of it"):
        ablate(config_of(), dataset, "leave-one-out", "test", [5], [], ["nothing"], SilentProgress())


def test_as_many_users_are_drawn_as_asked_for_and_the_same_ones_each_time(dataset):
    events = EventLog.read(dataset, Catalogue.from_dataset(dataset))
    some, again = drawn_users(events, 20), drawn_users(events, 20)
    np.testing.assert_array_equal(some.users, again.users)
    assert np.unique(some.users).size == 20
    assert (some.user_count, some.item_count, len(some)) == (60, 40, 160)
    assert drawn_users(events, None) is events
    assert drawn_users(events, 60) is events


def test_every_ablation_is_of_an_option_that_there_is():
    assert all(set(changes) <= set(StreamingOptions.model_fields) for changes in ABLATIONS.values())


def test_a_world_that_changes_is_worse_for_what_stays_as_it_was():
    options = StreamingOptions(batch=64, negatives=16)
    report = bench_drift(120, 200, 16, 512, 0.5, 6, [1], options, SilentProgress())
    assert [row["minute"] for row in report["rows"]] == list(MINUTES)
    last = report["rows"][-1]
    assert last["live"] > last["frozen"]
    assert len(report["back"]) == 1
