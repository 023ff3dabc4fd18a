"""`recall bench streaming-vq`: small, for what it says and what it refuses; its times are nobody's here."""

from __future__ import annotations

import pytest

from engine.bench.streaming_vq import bench_streaming_vq
from engine.core.channel import SilentProgress
from engine.core.errors import ConfigError


def bench(**changes):
    given = {
        "items": 2000, "clusters": 64, "rank_list": 200, "dimension": 16, "rank": "two_tower", "rank_dimension": 8,
        "k": 20, "asked": 16, "repetitions": 1, "progress": SilentProgress(), "history": 8,
    }  # fmt: skip
    return bench_streaming_vq(**{**given, **changes})


@pytest.mark.parametrize("rank", ["none", "two_tower", "complex"])
def test_it_times_every_part_as_built_and_moved_and_counts_bytes(rank):
    report = bench(rank=rank)
    assert [(row["lists"], row["batch"]) for row in report["rows"]] == [
        ("built", 1), ("built", 8), ("moved", 1), ("moved", 8),
    ]  # fmt: skip
    for row in report["rows"]:
        assert all(row[f"{part}_us"] > 0 for part in ("scores", "merge", "search", "tower"))
        assert ("ratio" in row) == (row["lists"] == "built")
    memory = report["memory"]
    # Five numbers of four bytes say where an item is; a moved one takes as many more as it has room for.
    assert memory["index"] == 20
    assert memory["own"]["slots"] == 8
    assert 8 <= memory["own"]["blocks"] < 60
    assert ("lists.vectors" in memory["mapped"]) == (rank != "none")
    assert memory["larger"]["items"] == 350_000_000


def test_it_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="200 items there can be"):
        bench(k=201)
    with pytest.raises(ConfigError, match="2,000 items"):
        bench(clusters=2001)
