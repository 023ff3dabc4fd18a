"""What arrays count for, and that a world's bytes add up."""

import numpy as np

from engine.bench.footprint import axes_of, bench_memory
from engine.bench.world import made_up_world
from engine.config import load_config
from engine.core.channel import SilentProgress
from engine.data.snapshot import SnapshotStore


def test_an_array_counts_for_what_its_length_goes_with():
    arrays = {
        "indptr": np.array([0, 2, 5, 7], np.int64),
        "rows": np.zeros(7, np.int32),
        "likers.indptr": np.array([0, 4, 4, 6, 8, 11], np.int64),
        "likers.rows": np.zeros(11, np.int32),
        "ids.values": np.zeros(3, np.int64),
        "ids.table": np.zeros(16, np.int32),
        "vocabulary": np.zeros((2, 9), np.uint8),
        "words.data": np.zeros(99, np.uint8),
    }
    axes = axes_of(arrays, {"item": 3, "user": 5, "author": 70})
    assert axes == {
        "indptr": "item", "rows": "item", "likers.indptr": "user", "likers.rows": "user", "ids.values": "item",
        "ids.table": "item", "vocabulary": "item", "words.data": "fixed",
    }  # fmt: skip


def test_a_world_is_measured(tmp_path):
    world = made_up_world(
        load_config(), ["itemcf", "usercf", "cache"], 1000, 100, SnapshotStore(tmp_path), SilentProgress()
    )
    report = bench_memory(world, 10_000, SilentProgress())
    files = sum(array.nbytes for snapshot in world.snapshots().values() for array in snapshot.arrays.values())
    assert sum(part["bytes"] for part in report["components"].values()) == files
    itemcf = report["components"]["itemcf"]
    assert itemcf["per_user"] == 0
    assert itemcf["larger"] == 10 * itemcf["bytes"]
    assert report["components"]["usercf"]["per_item"] == 0
    assert report["own"] is None or report["own"]["process"]["bytes"] > 10 << 20
