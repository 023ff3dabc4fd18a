"""Live state on the command line: builds that take in what was published, stores that are away, the benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from recall.v1 import ingest_pb2 as pb

from engine.cli import app
from engine.config import load_config
from engine.data.sample import sample_path
from engine.data.snapshot import CATALOGUE, SnapshotStore
from engine.online.state import open_state
from engine.state.log import START, LogChange

Recall: TypeAlias = Callable[..., tuple[int, str, str]]

NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("RECALL_STATE_URL", raising=False)


@pytest.fixture
def recall(capsys: pytest.CaptureFixture[str]) -> Recall:
    """Run a command in this process; return exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, out, err

    return run


def offset_of(store: SnapshotStore) -> str:
    release = store.current()
    assert release is not None
    return store.manifest(CATALOGUE, release.snapshots[CATALOGUE]).log_offset


def test_a_build_takes_in_what_was_published(recall: Recall, tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    code, out, _ = recall("build", sample_path(), "--store", tmp_path)
    assert code == 0
    assert "taken in" not in out
    assert not (tmp_path / "state").exists()  # nothing was ever published, so nothing is started
    assert offset_of(store) == START
    config = load_config()
    config = config.model_copy(update={"store": config.store.model_copy(update={"path": tmp_path})})
    with open_state(config) as state:
        assert state is not None
        end = state.log.publish([LogChange(10**9, 1_700_000_000_000, pb.Item(title="live"))]).offset
    code, out, _ = recall("build", sample_path(), "--store", tmp_path)
    assert code == 0
    assert "taken in: what the live log says of items until " in out
    assert offset_of(store) == end
    assert "2100 users and 3236 items" in out.replace(",", "")
    code, out, _ = recall("releases", "list", "--store", tmp_path)
    assert " none " in out
    assert recall("build", sample_path(), "--store", tmp_path, "--no-live")[0] == 0
    assert offset_of(store) == START


def test_a_store_that_is_away_is_one_sentence(
    recall: Recall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALL_STATE_URL", NOWHERE)
    code, _, err = recall("build", sample_path(), "--store", tmp_path)
    assert code == 2
    assert err.startswith(f"error: the state store at {NOWHERE} does not answer")
    assert "--no-live" in err
    assert SnapshotStore(tmp_path).current() is None
    assert recall("build", sample_path(), "--store", tmp_path, "--no-live")[0] == 0
    code, _, err = recall("serve", "--store", tmp_path)
    assert code == 2
    assert f"error: the state store at {NOWHERE} does not answer" in err
    assert "Traceback" not in err


def test_bench_live_sees_every_item_on_every_worker(recall: Recall) -> None:
    options = ("--seconds", 1, "--rate", 20, "--workers", 2, "--load", 5, "--json")
    code, out, err = recall("bench", "live", *options)
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    assert report["published"] == 20
    assert report["channels"].keys() == {"geo", "followed_authors"}
    for row in report["channels"].values():
        assert row["never_seen"] == 0
        assert 0 <= row["p50"] <= row["p99"] <= row["max"]
