"""The bench of the M-step makes up scores that crowd, and shows what the penalty does about it."""

from __future__ import annotations

import numpy as np
import pytest

from engine.bench.assignment import bench_mstep, made_up_scores
from engine.core.channel import SilentProgress
from engine.core.errors import ConfigError


def test_the_penalty_thins_the_fullest_path():
    report = bench_mstep(3000, 3, 10, 10, 3, 1e-4, 3, 1, SilentProgress(), repetitions=1)
    on, off = report["rows"]
    assert on["largest"] < off["largest"]
    assert on["paths"] > off["paths"]
    assert report["seconds"] > 0
    with pytest.raises(ConfigError, match="made-up scores need"):
        bench_mstep(30, 3, 10, 3, 2, 1e-4, 3, 1, SilentProgress(), repetitions=1)


def test_made_up_candidates_are_distinct_and_best_first():
    paths, scores, counts = made_up_scores(200, 10, 1000, 0)
    assert all(len(set(row)) == 10 for row in paths.tolist())
    assert paths.min() >= 0
    assert paths.max() < 1000
    assert (np.diff(scores, axis=1) <= 0).all()
    assert counts.min() >= 1
