"""What a data set holds, in numbers, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core.types import Int64Array
from engine.data.dataset import Dataset
from engine.data.form import File, file_name


@dataclass(frozen=True, slots=True)
class ColumnSummary:
    """A column: its name, its type as pyarrow calls it, and how many of its values are null."""

    name: str
    type: str
    nulls: int


@dataclass(frozen=True, slots=True)
class FileSummary:
    """A file of the data set; `bytes` is its size on disk."""

    name: str
    rows: int
    bytes: int
    columns: tuple[ColumnSummary, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """How many events one user (or item) has, among those with any."""

    median: float
    p99: float
    most: int


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """What a data set holds.

    Attributes:
        name, id_type: as in `Dataset`.
        files: every file, interactions first.
        users, items: how many have at least one event.
        events: how many interactions there are.
        kinds: events by kind, most frequent first.
        splits: events by split; empty without that column.
        first, last: the range of the timestamps, seconds since the epoch; None without that column.
        density: events / (users x items): above 1 is possible, since events repeat.
        per_user, per_item: how events are spread.
    """

    name: str
    id_type: str
    files: tuple[FileSummary, ...]
    users: int
    items: int
    events: int
    kinds: Mapping[str, int]
    splits: Mapping[str, int]
    first: int | None
    last: int | None
    density: float
    per_user: Spread
    per_item: Spread


def describe(dataset: Dataset) -> DatasetSummary:
    """Summarise a data set. Streams every file; memory is that of its distinct ids.

    Raises:
        DatasetError: if a file cannot be read.
    """
    users, items = dataset.index(("interactions", "user_id")), dataset.index(("interactions", "item_id"))
    user_counts, item_counts = np.zeros(len(users), np.int64), np.zeros(len(items), np.int64)
    counts: dict[str, dict[str, int]] = {"event": {}, "split": {}}
    first: int | None = None
    last: int | None = None
    timed = dataset.has("interactions", "timestamp")
    wanted = [name for name in ("event", "split", "timestamp") if dataset.has("interactions", name)]
    for batch in dataset.batches("interactions", ["user_id", "item_id", *wanted]):
        user_counts += np.bincount(users.rows(batch.column("user_id")), minlength=len(users))
        item_counts += np.bincount(items.rows(batch.column("item_id")), minlength=len(items))
        for name in set(wanted) & counts.keys():
            _tally(counts[name], batch.column(name))
        if timed and batch.num_rows:
            low, high = pc.min_max(batch.column("timestamp")).as_py().values()
            first, last = min(low, first if first is not None else low), max(high, last or 0)
    events = dataset.rows["interactions"]
    return DatasetSummary(
        name=dataset.name,
        id_type=dataset.id_type,
        files=tuple(_file_summary(dataset, file) for file in dataset.schemas),
        users=len(users),
        items=len(items),
        events=events,
        kinds=_sorted(counts["event"]),
        splits=_sorted(counts["split"]),
        first=first,
        last=last,
        density=events / (len(users) * len(items)),
        per_user=_spread(user_counts),
        per_item=_spread(item_counts),
    )


def _file_summary(dataset: Dataset, file: File) -> FileSummary:
    schema = dataset.schemas[file]
    nulls = np.zeros(len(schema), np.int64)
    for batch in dataset.batches(file, schema.names):
        nulls += [column.null_count for column in batch.columns]
    columns = [
        ColumnSummary(field.name, _type_name(field.type), count)
        for field, count in zip(schema, nulls.tolist(), strict=True)
    ]
    path = dataset.path / file_name(file)
    return FileSummary(path.name, dataset.rows[file], path.stat().st_size, tuple(columns))


def _type_name(type_: Any) -> str:
    # Dictionary encoding is how it is stored, not what it is.
    return str(type_.value_type if pa.types.is_dictionary(type_) else type_)


def _tally(counts: dict[str, int], values: Any) -> None:
    for entry in pc.value_counts(values).to_pylist():
        counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]


def _sorted(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _spread(counts: Int64Array) -> Spread:
    median, p99 = np.percentile(counts, [50, 99]).tolist()
    return Spread(median, p99, int(counts.max()))
