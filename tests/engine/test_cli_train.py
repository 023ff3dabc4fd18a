"""`recall train` on the bundled sample: what it makes, says and refuses."""

from __future__ import annotations

import pytest

from engine.cli import app
from engine.data.sample import sample_path
from engine.data.snapshot import SnapshotStore

CONFIG = """
[interest]
click = 1.0
like = 1.0

[channels.popular]
[channels.two_tower]
dimension = 8
index = "exact"
sequence = { kind = "mean", width = 8 }
training = { epochs = 1, batch = 8192, learning_rate = 0.01, event_weights = { like = 2.0 } }

[filters.seen]

[scenes.default]
quotas = { two_tower = 50 }
filters = ["seen"]
fallback = ["popular"]
"""


@pytest.fixture
def recall(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    config = tmp_path / "config.toml"
    config.write_text(CONFIG)

    def run(channel: str, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        arguments = ["train", channel, str(sample_path()), "--config", str(config)]
        arguments += ["--store", str(tmp_path / "store"), "--no-live", "--threads", "1", *more]
        with pytest.raises(SystemExit) as ended:
            app(arguments)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_it_trains_publishes_and_updates(recall, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'recall-engine[train]'")
    store = SnapshotStore(tmp_path / "store")
    code, out, _ = recall("two_tower")
    assert code == 0
    first = store.current()
    assert {"two_tower", "popular"} <= set(first.snapshots)
    assert "is in service" in out
    assert "curves.png" in out
    code, _, _ = recall("two_tower", "--mode", "resume", "--seed", "3")
    assert code == 0
    second = store.current()
    assert second.snapshots["popular"] == first.snapshots["popular"]
    assert second.snapshots["two_tower"] != first.snapshots["two_tower"]
    manifest = store.manifest("two_tower", second.snapshots["two_tower"])
    assert manifest.parameters["options"]["training"]["seed"] == 3
    assert "ef_search" not in manifest.parameters["options"]["index_options"]  # of the online half alone
    code, _, error = recall("two_tower", "--mode", "incremental")
    assert code == 2
    assert "nobody liked anything since" in error
    assert store.current() == second


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("popular",), "does not learn; channels that do: two_tower"),
        (("three_tower",), "is not declared"),
        (("two_tower", "--mode", "half"), "is none of full, resume, incremental"),
    ],
)
def test_what_cannot_be_trained_is_refused(recall, arguments, says):
    code, _, error = recall(*arguments)
    assert code == 2
    assert says in error
