"""Small data sets and logs for the offline tests, and a progress that counts, or interrupts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config import Config, parse_config
from engine.core.interactions import Interactions
from engine.core.types import RaggedRows
from engine.data.dataset import Dataset, write_dataset
from engine.data.events import EventLog
from engine.data.form import SPLITS


def config_of(
    channels: dict[str, dict[str, Any]] | None = None,
    interest: dict[str, float] | None = None,
    min_rating: float | None = None,
    **scene: Any,
) -> Config:
    """A configuration of one scene; by default of the popular channel alone."""
    channels = {"popular": {}} if channels is None else channels
    defaults: dict[str, Any] = {"quotas": dict.fromkeys(channels, 10), "limit": 20, "fallback": []}
    raw: dict[str, Any] = {
        "interest": {"click": 1.0, "like": 2.0} if interest is None else interest,
        "channels": channels,
        "scenes": {"default": defaults | scene},
    }
    if min_rating is not None:
        raw["min_rating"] = min_rating
    return parse_config(raw)


def log_of(
    events: Sequence[tuple[Any, ...]], users: int, items: int, timed: bool = True, split: bool = False
) -> EventLog:
    """A log of (user, item, kind, timestamp, split) rows; what comes last may be left out."""
    names = list(dict.fromkeys(event[2] if len(event) > 2 else "click" for event in events))
    full = [(*event, *("click", 0, "train")[len(event) - 2 :]) for event in events]
    return EventLog(
        users=np.array([event[0] for event in full], np.int32),
        items=np.array([event[1] for event in full], np.int32),
        kinds=np.array([names.index(event[2]) for event in full], np.uint8),
        kind_names=tuple(names),
        timestamps=np.array([event[3] if timed else 0 for event in full], np.int64),
        timed=timed,
        splits=np.array([SPLITS.index(event[4]) for event in full], np.uint8) if split else None,
        ratings=None,
        user_count=users,
        item_count=items,
    )


def lists_of(ragged: RaggedRows) -> list[list[int]]:
    return [part.tolist() for part in np.split(ragged.rows, ragged.offsets[1:-1])][: ragged.offsets.size - 1]


def likes_of(matrix: Interactions) -> list[list[int]]:
    return lists_of(RaggedRows(matrix.rows, matrix.indptr))


def random_likes(users: int = 40, items: int = 25, seed: int = 0) -> list[tuple[int, int, str, int]]:
    """(user id, item id, kind, time) of users who like popular items more."""
    rng = np.random.default_rng(seed)
    appeal = 1.0 / np.arange(1, items + 1)
    events = []
    for user in range(users):
        mine = rng.choice(items, rng.integers(3, 10), replace=False, p=appeal / appeal.sum())
        for item in mine.tolist():
            kind = ("click", "like")[int(rng.integers(2))]
            events.append((10 + user, 100 + item, kind, int(1_700_000_000 + rng.integers(0, 10**7))))
    return events


def dataset_of(
    path: Path,
    events: Iterable[tuple[Any, ...]],
    items: dict[str, Any] | None = None,
    columns: Sequence[str] = ("user_id", "item_id", "event", "timestamp"),
    id_type: str = "int64",
) -> Dataset:
    """Write a data set of rows that have the columns named."""
    rows = list(zip(*events, strict=True))
    ids = pa.int64() if id_type == "int64" else pa.string()
    types = {"user_id": ids, "item_id": ids, "timestamp": pa.int64()}
    table = {
        name: pa.array(values, types.get(name, pa.string()))
        for name, values in zip(columns, rows, strict=True)
    }
    return write_dataset(
        path,
        pa.table(table),
        items=None if items is None else pa.table(items),
        meta={"name": path.name, "id_type": id_type},
    )


class Steps:
    """A progress that counts what it is told, and breaks off at one of the steps if asked to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.count = 0
        self.tasks: list[str] = []
        self._stop_at = stop_at

    def _step(self) -> None:
        if self.count == self._stop_at:
            raise KeyboardInterrupt
        self.count += 1

    def start(self, task: str, total: int) -> None:
        self.tasks.append(task)
        self._step()

    def advance(self, amount: int = 1) -> None:
        self._step()
