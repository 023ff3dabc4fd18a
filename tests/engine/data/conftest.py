"""Data sets in temporary folders, and arrays that go to disk and come back mapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

INTERACTIONS: dict[str, Any] = {
    "user_id": [7, 7, 9, 9, 9],
    "item_id": [50, 10, 10, 30, 10],
    "event": ["click", "click", "like", "expose", "click"],
    "timestamp": [100, 200, 300, 400, 500],
}


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a data set without any check: tables or dicts by file, `toml` as text; None leaves a file out."""

    def make(toml: str | None = 'name = "tiny"\n', **files: Any) -> Path:
        if toml is not None:
            (tmp_path / "dataset.toml").write_text(toml)
        for file, data in ({"interactions": INTERACTIONS} | files).items():
            if data is not None:
                table = data if isinstance(data, pa.Table) else pa.table(data)
                pq.write_table(table, tmp_path / f"{file}.parquet")
        return tmp_path

    return make


class FolderSink:
    """A sink of one .npy file per array."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, array: np.ndarray) -> None:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.")
        assert not (self.folder / f"{name}.npy").exists()
        np.save(self.folder / f"{name}.npy", array, allow_pickle=False)

    def arrays(self) -> dict[str, np.ndarray]:
        loaded = {path.stem: np.load(path) for path in self.folder.glob("*.npy")}
        return {
            name: np.load(self.folder / f"{name}.npy", mmap_mode="r") if array.size else array
            for name, array in loaded.items()
        }


@pytest.fixture
def through_disk(tmp_path: Path) -> Callable[..., Mapping[str, np.ndarray]]:
    """Save something with its `save(sink, *args)` and return its arrays, mapped and read-only."""

    def store(thing: Any, *args: str) -> Mapping[str, np.ndarray]:
        folder = tmp_path / "arrays"
        folder.mkdir()
        sink = FolderSink(folder)
        thing.save(sink, *args)
        return sink.arrays()

    return store
