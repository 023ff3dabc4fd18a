"""`recall train` on the bundled sample: what it makes, says and refuses."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest

from engine.cli import app
from engine.config import load_config
from engine.data.dataset import Dataset
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


def test_what_was_learnt_goes_beside_the_data_and_is_taken_from_there(tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'recall-engine[train]'")
    from engine.core.channel import SilentProgress
    from engine.offline.build import build_release

    config, data = tmp_path / "config.toml", tmp_path / "data"
    config.write_text(CONFIG)
    shutil.copytree(sample_path(), data, ignore=shutil.ignore_patterns("*.npz", "*.py", "__pycache__"))
    arguments = ["train", "two_tower", str(data), "--config", str(config), "--with-data", "--no-live"]
    with pytest.raises(SystemExit) as ended:
        app([*arguments, "--store", str(tmp_path / "store"), "--threads", "1"])
    assert ended.value.code in (0, None)
    assert "two_tower.model.npz" in capsys.readouterr().out
    loaded = load_config(config)
    stores = [SnapshotStore(tmp_path / name) for name in ("store", "other")]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "torch", None)  # an import of it fails
        patched.delitem(sys.modules, "engine.training.trainer")
        build_release(loaded, Dataset.open(data), stores[1], SilentProgress(), threads=1)
    first, second = (
        store.open("two_tower", store.current().snapshots["two_tower"], verify=True).arrays
        for store in stores
    )
    assert first.keys() == second.keys()
    for name in first.keys() - {"run", "item_vectors", "index.header"}:
        assert first[name].tobytes() == second[name].tobytes(), name
    # PyTorch adds up in another order.
    np.testing.assert_allclose(first["item_vectors"], second["item_vectors"], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("popular",), "does not learn; channels that do: two_tower"),
        (("three_tower",), "is not declared"),
        (("two_tower", "--mode", "half"), "is none of full, resume, incremental"),
        (("two_tower", "--params", "absent.toml"), "absent.toml"),
    ],
)
def test_what_cannot_be_trained_is_refused(recall, arguments, says):
    code, _, error = recall(*arguments)
    assert code == 2
    assert says in error
