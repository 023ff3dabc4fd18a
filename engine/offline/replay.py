"""Replays the files of a data set to the ingest service: interactions and follows as events, items as changes.

Every event gets an id made of the file's content and its row, and every item the file's time as its time of change; so
a replay that is repeated, or goes on after it was broken off, does not count what went in before.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from recall.v1 import ingest_pb2 as pb

from engine.client import IngestClient, Refusal
from engine.core.channel import Progress
from engine.core.errors import DatasetError
from engine.data.form import check_types, form, is_text
from engine.data.ids import IdKind

FileKind: TypeAlias = Literal["items", "follows", "interactions"]

REPLAYED: tuple[FileKind, ...] = ("items", "follows", "interactions")
"""The files of a data set that are replayed, in this order."""

_READ_ROWS = 1 << 14
_COLUMNS: Mapping[FileKind, tuple[str, ...]] = {
    "interactions": ("user_id", "item_id", "event", "timestamp", "watch_seconds"),
    "follows": ("user_id", "author_id", "timestamp"),
    "items": (
        "item_id",
        "author_id",
        "published_at",
        "title",
        "tags",
        "city",
        "latitude",
        "longitude",
        "quality",
        "duration_seconds",
    ),
}
_SAVE_SECONDS = 1.0
_REFUSALS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LogFile:
    """A file to replay.

    Attributes:
        path: where it is.
        kind: what its columns say that it holds.
        id_kind: what its ids are.
        rows: how many it has.
        fingerprint: 16 hex digits that change with its content.
        columns: those that are read.
    """

    path: Path
    kind: FileKind
    id_kind: IdKind
    rows: int
    fingerprint: str
    columns: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Look at a file; its columns say what it holds.

        Raises:
            DatasetError: it cannot be read, or is none of the files that can be replayed.
        """
        try:
            with open(path, "rb") as stream:
                fingerprint = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
            with pq.ParquetFile(path) as parquet:
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            said = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
            raise DatasetError(f"cannot be read as Parquet: {said}", str(path)) from error
        names = set(schema.names)
        kind: FileKind
        if {"user_id", "item_id", "event"} <= names:
            kind = "interactions"
        elif {"user_id", "author_id"} <= names:
            kind = "follows"
        elif "item_id" in names and "user_id" not in names:
            kind = "items"
        else:
            text = "has neither the columns of interactions (user_id, item_id, event) nor of follows nor of items"
            raise DatasetError(text, path.name)
        id_column = "item_id" if kind == "items" else "user_id"
        id_kind: IdKind = "string" if is_text(schema.field(id_column).type) else "int64"
        columns = tuple(name for name in _COLUMNS[kind] if name in names)
        known = tuple(column for column in form(id_kind)[kind] if column.name in columns)
        check_types(path.name, schema, known)
        return cls(path, kind, id_kind, rows, fingerprint, columns)

    def batches(self, first: int) -> Iterator[tuple[int, dict[str, list[Any]]]]:
        """Yield (number of the first row, values of each column) in file order, from a row on.

        Raises:
            DatasetError: it cannot be read any further.
        """
        try:
            with pq.ParquetFile(self.path, pre_buffer=False) as parquet:
                start, group = 0, 0
                # Whole row groups before the first row are not even read.
                while group < parquet.num_row_groups and (
                    start + parquet.metadata.row_group(group).num_rows <= first
                ):
                    start += parquet.metadata.row_group(group).num_rows
                    group += 1
                groups = list(range(group, parquet.num_row_groups))
                for batch in parquet.iter_batches(_READ_ROWS, row_groups=groups, columns=list(self.columns)):
                    end = start + batch.num_rows
                    if end > first:
                        part = batch.slice(max(0, first - start))
                        yield max(first, start), part.to_pydict()
                    start = end
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            said = " ".join(str(error).split())[:200]
            raise DatasetError(f"cannot be read as Parquet: {said}", self.path.name) from error


def files_of(path: Path) -> list[LogFile]:
    """Return what a path means: one file, or those of a data set's folder.

    Raises:
        DatasetError: there is nothing to replay, or it cannot be read.
    """
    if not path.is_dir():
        return [LogFile.open(path)]
    found = [path / f"{kind}.parquet" for kind in REPLAYED if (path / f"{kind}.parquet").is_file()]
    if not found:
        raise DatasetError(
            "holds neither interactions.parquet nor follows.parquet nor items.parquet", str(path)
        )
    return [LogFile.open(file) for file in found]


class OffsetFile:
    """Where each file's replay stands, kept on disk: JSON, fingerprint -> rows done."""

    def __init__(self, path: Path | None) -> None:
        """Read the file, if there is one; None keeps nothing.

        Raises:
            DatasetError: it is not one of ours.
        """
        self._path = path
        self._saved = time.monotonic()
        self._rows: dict[str, int] = {}
        if path is None or not path.exists():
            return
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            self._rows = {str(name): int(row) for name, row in rows.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DatasetError("cannot be read as a file of offsets", str(path)) from error

    def rows(self, file: LogFile) -> int:
        """Return how many rows of a file are done."""
        return min(self._rows.get(file.fingerprint, 0), file.rows)

    def note(self, file: LogFile, rows: int) -> None:
        """Note how many rows are done; written about once a second."""
        self._rows[file.fingerprint] = rows
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write it down now, whole or not at all.

        Raises:
            DatasetError: it cannot be written.
        """
        self._saved = time.monotonic()
        if self._path is None or not self._rows:
            return
        beside = self._path.with_name(f".{self._path.name}.tmp")
        try:
            beside.write_text(json.dumps(self._rows) + "\n", encoding="utf-8")
            os.replace(beside, self._path)
        except OSError as error:
            raise DatasetError(f"cannot be written: {error.strerror}", str(self._path)) from error


@dataclass(slots=True)
class Totals:
    """What became of a file's rows.

    Attributes:
        rows: done, counted from the file's beginning.
        accepted, duplicates, stale: as the server counts them.
        refused: how many the server refused; `refusals`: the first few, with the row for an index.
        skipped: rows that are not sent, by reason: an event's kind, or "before --since".
    """

    rows: int = 0
    accepted: int = 0
    duplicates: int = 0
    stale: int = 0
    refused: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


class Replay:
    """Sends one file.

    Attributes:
        totals: what became of it so far.
    """

    def __init__(
        self,
        file: LogFile,
        kinds: frozenset[str],
        *,
        batch: int = 1000,
        since: int | None = None,
        offsets: OffsetFile | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Take what to send.

        Args:
            file: the file.
            kinds: the kinds of event that the server takes as actions.
            batch: entries of a request.
            since: rows of an earlier time are skipped; items: those published earlier.
            offsets: where to begin, and where to note what is done.
            stop: set to end `run` by KeyboardInterrupt after the batch that is under way.
        """
        self.file = file
        self.totals = Totals()
        self._kinds = kinds
        self._batch = batch
        self._since = since
        self._offsets = offsets or OffsetFile(None)
        self._stop = stop or threading.Event()
        self.totals.rows = self._offsets.rows(file)

    def run(self, client: IngestClient, progress: Progress, patience: float) -> None:
        """Send what is left of the file.

        Args:
            client: of the server.
            progress: told of rows.
            patience: seconds that the server may be unavailable meanwhile.

        Raises:
            DatasetError: the file cannot be read any further.
            InvalidRequest, grpc.RpcError, ConnectionError: as of the client.
            KeyboardInterrupt: `stop` was set.
        """
        progress.start(self.file.path.name, self.file.rows)
        progress.advance(self.totals.rows)
        try:
            if self.file.kind == "items":
                self._send_items(client, progress)
            else:
                self._send_events(client, progress, patience)
        finally:
            self._offsets.save()

    def _send_events(self, client: IngestClient, progress: Progress, patience: float) -> None:
        rows_of: dict[int, list[int]] = {}

        def batches() -> Iterator[tuple[int, list[pb.Event]]]:
            for end, rows, events in self.event_batches():
                rows_of[end] = rows
                yield end, events

        for answer in client.stream(batches(), patience=patience):
            self.totals.accepted += answer.accepted
            self.totals.duplicates += answer.duplicates
            self._done(answer.offset, rows_of.pop(answer.offset), answer.refused, progress)

    def event_batches(self) -> Iterator[tuple[int, list[int], list[pb.Event]]]:
        """Yield (rows done behind it, the row of each event, events) from where the replay stands."""
        events: list[pb.Event] = []
        rows: list[int] = []
        end = sent = self.totals.rows
        make = self._interaction if self.file.kind == "interactions" else self._follow
        for first, columns in self.file.batches(self.totals.rows):
            count = len(columns["user_id"])
            times = columns.get("timestamp") or [None] * count
            for at in range(count):
                end = first + at + 1
                time_ = times[at]
                if self._since is not None and time_ is not None and time_ < self._since:
                    self.totals.skipped["before --since"] += 1
                    continue
                event = pb.Event(event_id=f"{self.file.fingerprint}-{end - 1}", timestamp=time_)
                _set(event, "user", columns["user_id"][at])
                if make(event, columns, at):
                    events.append(event)
                    rows.append(end - 1)
                    if len(events) == self._batch:
                        yield end, rows, events
                        events, rows, sent = [], [], end
        if end > sent:  # where the rest was skipped, an empty batch brings the offset behind it
            yield end, rows, events

    def _interaction(self, event: pb.Event, columns: Mapping[str, list[Any]], at: int) -> bool:
        """Say what happened in a row; False where nobody asks for it."""
        kind, item = columns["event"][at], columns["item_id"][at]
        if kind == "expose":
            if item is not None:
                (event.exposure.item_keys if isinstance(item, str) else event.exposure.item_ids).append(item)
            event.exposure.SetInParent()
            return True
        if kind == "dislike":
            _set(event.dislike, "item", item)
            return True
        if kind not in self._kinds:
            self.totals.skipped[str(kind)] += 1
            return False
        action = event.action
        action.kind = kind
        _set(action, "item", item)
        watched = columns["watch_seconds"][at] if "watch_seconds" in columns else None
        if watched is not None:
            action.watch_seconds = watched
        return True

    def _follow(self, event: pb.Event, columns: Mapping[str, list[Any]], at: int) -> bool:
        _set(event.follow, "author", columns["author_id"][at])
        return True

    def _send_items(self, client: IngestClient, progress: Progress) -> None:
        # Of two changes the later wins: the file counts as what its source said when the file was written.
        updated = int(self.file.path.stat().st_mtime * 1000)
        changes: list[pb.ItemChange] = []
        rows: list[int] = []

        def send(end: int) -> None:
            result = client.upsert_items(changes)
            self.totals.accepted += result.accepted - result.stale
            self.totals.stale += result.stale
            self._done(end, rows, result.refused, progress)

        for first, columns in self.file.batches(self.totals.rows):
            for at in range(len(columns["item_id"])):
                values = {name: each[at] for name, each in columns.items() if each[at] is not None}
                published = values.setdefault("published_at", updated // 1000)
                if self._since is not None and published < self._since:
                    self.totals.skipped["before --since"] += 1
                    continue
                changes.append(_change(values, updated))
                rows.append(first + at)
                if len(changes) == self._batch:
                    send(first + at + 1)
                    changes, rows = [], []
        if self.totals.rows < self.file.rows:
            send(self.file.rows)

    def _done(self, end: int, rows: list[int], refused: tuple[Refusal, ...], progress: Progress) -> None:
        progress.advance(end - self.totals.rows)
        self.totals.rows = end
        self.totals.refused += len(refused)
        room = max(0, _REFUSALS_SHOWN - len(self.totals.refusals))
        self.totals.refusals += [
            Refusal(rows[each.index], each.field, each.reason) for each in refused[:room]
        ]
        self._offsets.note(self.file, end)
        if self._stop.is_set():
            raise KeyboardInterrupt


def _change(values: dict[str, Any], updated: int) -> pb.ItemChange:
    change = pb.ItemChange(updated_at_ms=updated)
    _set(change, "item", values.pop("item_id", None))
    author = values.pop("author_id", None)
    if author is not None:
        _set(change.put, "author", author)
    # NaN is how some writers say that a number is not known.
    change.put.MergeFrom(pb.Item(**{name: value for name, value in values.items() if value == value}))
    return change


def _set(message: Any, prefix: str, id_: int | str | None) -> None:
    """Set the field of an id, by its type; what has none is refused by the server."""
    if isinstance(id_, str):
        setattr(message, f"{prefix}_key", id_)
    elif id_ is not None:
        setattr(message, f"{prefix}_id", id_)
