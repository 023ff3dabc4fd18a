"""The bundled sample with a model of random weights, as `recall inspect` reads it, and that command itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.cli import app
from engine.cli.build import run_build
from engine.config import load_config
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog, interest_matrix
from engine.data.sample import sample_path
from engine.data.snapshot import CATALOGUE, SnapshotStore


def store_with(
    folder: Path, channel: str, written: Callable[..., Mapping[str, np.ndarray]], **options: Any
) -> SnapshotStore:
    """A store of the sample with the popular channel and what `written` makes for another one."""
    config = load_config()
    store = SnapshotStore(folder)
    run_build(config, sample_path(), store, ["popular"], 1)
    release = store.current()
    assert release is not None
    dataset = Dataset.open(sample_path())
    catalogue = Catalogue.from_dataset(dataset)
    liked = interest_matrix(EventLog.read(dataset, catalogue), config.interest)
    arrays = written(liked, catalogue.item_columns(), **options)
    version = release.snapshots[CATALOGUE]
    with store.begin(channel, parameters={}, dataset="x", catalogue=version) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    store.publish({**release.snapshots, channel: writer.version})
    return store


def inspector(
    channel: str, store: SnapshotStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run `recall inspect` for a channel; returns exit status, output and errors."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*more: object, directory: Path | None = None) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(["inspect", channel, str(directory or store.root), *map(str, more)])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
