"""KuaiRand (Pure, 1K, 27K): a short-video log; every row is an exposure, its flags say what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from engine.core.errors import DatasetError
from engine.data.dataset import Dataset, write_dataset
from engine.data.importers.source import Source, constant, split_tags

FLAGS = {
    "is_click": "click",
    "is_like": "like",
    "is_follow": "follow",
    "is_comment": "comment",
    "is_forward": "share",
    "is_hate": "dislike",
    "long_view": "finish",
}
"""The columns of the log that say what the user did, and the events they become."""

OPTIONAL_FLAGS = {"is_profile_enter": "profile_enter"}

_LOG = {"user_id": pa.int64(), "video_id": pa.int64(), "time_ms": pa.int64(), "play_time_ms": pa.float64()}

_VIDEO = {
    "video_id": pa.int64(),
    "author_id": pa.float64(),  # some editions write numbers with a decimal point
    "video_type": pa.string(),
    "upload_dt": pa.string(),
    "video_duration": pa.float64(),
    "music_id": pa.float64(),
    "tag": pa.string(),
}


def import_kuairand(source: Path, destination: Path) -> Dataset:
    """Import the standard logs (`log_standard_*.csv`) with video and user features.

    A row gives an `expose` event and one for each flag that is set, with the watch time on all of them.
    Follows go to `follows.parquet` too where the video's author is known. The logs of random exposure are
    left out: what was shown there says nothing of what a recommender would show.

    Raises:
        DatasetError: a file is missing, lacks a column or is not as published.
    """
    with Source(source) as files:
        follows = _Follows()
        # The parts are read in this order, so the follows are known when the videos pass by.
        return write_dataset(
            destination,
            _events(files, follows),
            items=_items(files, follows),
            users=_users(files),
            follows=follows.tables(),
            meta={
                "name": source.resolve().stem,
                "licence": "CC BY-SA 4.0",
                "source": "KuaiRand (Gao et al. 2022), https://kuairand.com, standard log",
                "protocol": "temporal",
            },
        )


class _Follows:
    """Gathers (user, video, time) of the follows from the log, and then the videos' authors."""

    def __init__(self) -> None:
        self._follows: list[Any] = []
        self._authors: list[Any] = []

    def add_events(self, events: Any) -> None:
        self._follows.append(events.select(["user_id", "item_id", "timestamp"]))

    def add_items(self, items: Any) -> None:
        followed = pa.concat_tables(self._follows)["item_id"]
        known = pc.and_(pc.is_in(items["item_id"], value_set=followed), pc.is_valid(items["author_id"]))
        self._authors.append(items.select(["item_id", "author_id"]).filter(known))

    def tables(self) -> Iterator[Any]:
        """One table, each (user, author) once, at the first time; lazy, since the log comes first."""
        joined = pa.concat_tables(self._follows).join(
            pa.concat_tables(self._authors), "item_id", join_type="inner"
        )
        first = joined.group_by(["user_id", "author_id"]).aggregate([("timestamp", "min")])
        named = first.rename_columns(["user_id", "author_id", "timestamp"])
        yield named.sort_by([(name, "ascending") for name in ("timestamp", "user_id", "author_id")])


def _events(files: Source, follows: _Follows) -> Iterator[Any]:
    flags, visits = dict.fromkeys(FLAGS, pa.int8()), dict.fromkeys(OPTIONAL_FLAGS, pa.int8())
    for batch in files.batches("log_standard_*.csv", _LOG | flags, optional=visits):
        rows = pa.table(
            {
                "user_id": batch["user_id"],
                "item_id": batch["video_id"],
                "timestamp": pc.divide(batch["time_ms"], 1000),
                "watch_seconds": pc.divide(batch["play_time_ms"], 1000.0).cast(pa.float32()),
            }
        )
        events = FLAGS | OPTIONAL_FLAGS
        parts = {"expose": rows} | {events[flag]: rows.filter(pc.equal(batch[flag], 1)) for flag in events}
        follows.add_events(parts["follow"])
        yield pa.concat_tables(
            part.append_column("event", constant(event, part.num_rows)) for event, part in parts.items()
        )


def _items(files: Source, follows: _Follows) -> Iterator[Any]:
    for batch in files.batches("video_features_basic_*.csv", _VIDEO):
        items = pa.table(
            {
                "item_id": batch["video_id"],
                "author_id": _id_or_null(batch["author_id"]),
                "published_at": _seconds_of_day(batch["upload_dt"]),
                "duration_seconds": pc.divide(batch["video_duration"], 1000.0).cast(pa.float32()),
                "tags": split_tags(batch["tag"], ","),
                "kind": batch["video_type"],
                "music_id": _id_or_null(batch["music_id"]),
            }
        )
        follows.add_items(items)
        yield items


def _id_or_null(values: Any) -> Any:
    # Unknown is empty, or a negative number.
    return pc.if_else(pc.greater_equal(values, 0), values, None).cast(pa.int64())


def _seconds_of_day(days: Any) -> Any:
    """int64 seconds of the day's begin, UTC; null where the day is empty."""
    seconds = pc.strptime(days, "%Y-%m-%d", "s", error_is_null=True).cast(pa.int64())
    wrong = days.filter(pc.and_(pc.is_null(seconds), pc.not_equal(days, "")))
    if len(wrong):
        text = f"is not as published: expected days as 2022-04-08, got {wrong[0].as_py()!r}"
        raise DatasetError(text, "video_features_basic", "upload_dt")
    return seconds


def _users(files: Source) -> Any:
    return files.inferred("user_features_*.csv", {"user_id": pa.int64()})
