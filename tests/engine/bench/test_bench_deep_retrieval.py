"""The search of paths against comparing every item, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest

from engine.bench.deep_retrieval import best_of_all
from engine.cli import app

Run: TypeAlias = Callable[..., tuple[int, str, str]]
SMALL = (
    "--items", 1000, "--width", 6, "--depth", 2, "--beam", 9, "--dimension", 8, "--hidden", 8, "--k", 20, "--asked", 8,
    "--repetitions", 1, "--reached", 300,
)  # fmt: skip


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            app(["bench", "deep-retrieval", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_parts_and_brute_force_are_measured(bench: Run) -> None:
    code, out, _ = bench(*SMALL, "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["items"], report["width"], report["depth"], report["beam"]) == (1000, 6, 2, 9)
    assert 9 <= report["paths"] <= 36
    assert report["reached"] > 0
    assert [row["batch"] for row in report["rows"]] == [1, 8]
    for row in report["rows"]:
        for name in ("beam_us", "gather_us", "search_us", "tower_us", "brute_us"):
            assert 0 < row[f"{name}_min"] <= row[name] <= row[f"{name}_max"]
        assert row["ratio"] == round(row["brute_us"] / row["search_us"], 1)
    code, out, _ = bench(*SMALL)
    assert code == 0
    assert "of 6^2 paths" in " ".join(out.split())


def test_more_than_there_is_is_refused(bench: Run) -> None:
    assert "at most the 36 paths" in bench(*SMALL, "--beam", 37)[2]
    assert "at most the 1,000 items" in bench(*SMALL, "--k", 1001)[2]


def test_brute_force_finds_the_best() -> None:
    random = np.random.default_rng(0)
    users, vectors = random.standard_normal((3, 4), np.float32), random.standard_normal((50, 4), np.float32)
    bias = random.standard_normal(50, np.float32)
    rows, scores = best_of_all(users, vectors, bias, 7)
    expected = users @ vectors.T + bias
    assert rows.tolist() == np.argsort(-expected, axis=1)[:, :7].tolist()
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, 1), rtol=1e-6)
