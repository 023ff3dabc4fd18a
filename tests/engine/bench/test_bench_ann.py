"""The comparison of vector indexes on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from engine.bench.ann import made_up_vectors, queries_near
from engine.cli import app

Run: TypeAlias = Callable[..., tuple[int, str, str]]
SMALL = ("--asked", 8, "--repetitions", 1, "--threads", 1)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            app(["bench", "ann", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_every_kind_is_measured(bench: Run) -> None:
    options = ("--option", "ef_construction=40", "--option", "bits=4", "--option", "parts=4", "--k", 20)
    code, out, _ = bench("--items", 1000, "--dimension", 8, *SMALL, *options, "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["items"], report["dimension"], report["k"], report["vectors"]) == (1000, 8, 20, "made up")
    rows: list[dict[str, Any]] = report["rows"]
    assert {row["kind"] for row in rows} == {"exact", "hnsw", "hnsw_faiss", "ivf_int8", "ivf_flat", "ivf_pq"}
    for row in rows:
        assert 0 < row["recall_p5"] <= 1
        assert row["recall"] > (0.9 if row["kind"] != "ivf_pq" else 0.5)
        assert row["batch1_us_min"] <= row["batch1_us"] <= row["batch1_us_max"]
        assert row["bytes"] > 0
    assert next(row["recall"] for row in rows if row["kind"] == "exact") == 1


def test_vectors_of_ones_own(bench: Run, tmp_path: Path) -> None:
    vectors, queries = made_up_vectors(1200, 6, 9)
    np.save(tmp_path / "items.npy", vectors)
    np.save(tmp_path / "users.npy", queries)
    files = ("--vectors", tmp_path / "items.npy", "--queries", tmp_path / "users.npy")
    code, out, _ = bench(*files, *SMALL, "--kinds", "exact,ivf_flat", "--k", 5)
    assert code == 0
    assert "1,200 vectors of 6 dimensions (items.npy), 9 queries for 5" in " ".join(out.split())
    assert "probes 32" in out


def test_what_makes_no_sense_is_refused(bench: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.ones((5, 3)))
    np.save(tmp_path / "items.npy", np.ones((5, 3), np.float32))
    np.save(tmp_path / "users.npy", np.ones((5, 2), np.float32))
    items = ("--vectors", tmp_path / "items.npy")
    for arguments, message in (
        (
            ("--kinds", "annoy"),
            "--kinds: expected kinds of exact, hnsw, hnsw_faiss, ivf_int8, ivf_flat, ivf_pq, got 'annoy'",
        ),
        (("--option", "m"), "--option: expected NAME=VALUE, got 'm'"),
        (("--option", "m=1"), "--option: m: Input should be greater than or equal to 2"),
        (("--option", "nprobe=1"), "--option: nprobe: Extra inputs are not permitted"),
        (("--queries", tmp_path / "items.npy"), "--queries: means nothing without --vectors"),
        (("--vectors", tmp_path / "none.npy"), "--vectors: cannot read"),
        (("--vectors", tmp_path / "wide.npy"), "to hold float32[items, dimension]"),
        ((*items, "--queries", tmp_path / "users.npy"), "--queries: expected queries of 3 dimensions, got 2"),
        ((*items, "--k", 6), "--k: expected at most the 5 vectors there are, got 6"),
    ):
        code, out, err = bench(*arguments)
        assert (code, out) == (2, ""), arguments
        assert message in " ".join(err.split())


def test_made_up_vectors_are_normalised_and_repeat() -> None:
    vectors, queries = made_up_vectors(3000, 16, 10)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([vectors, queries]), axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors, made_up_vectors(3000, 16, 10)[0])
    near = queries_near(vectors, 50)
    assert 0.8 < float((near @ vectors.T).max(axis=1).mean()) < 1.1
