"""Small worlds for tests: an interest matrix, batches of queries, a channel built without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.core.channel import BuildContext, Channel, LoadContext, SilentProgress
from engine.core.filter import Filter
from engine.core.interactions import Interactions
from engine.core.items import NO_TIME, ItemColumns
from engine.core.memory import MemorySink
from engine.core.query import History, QueryBatch
from engine.core.types import AnyArray, RaggedRows


def interactions_of(likes: Sequence[Sequence[int]], items: int) -> Interactions:
    """Return the matrix of users who like the items listed, newest first, one point and one second each."""
    indptr = np.zeros(len(likes) + 1, np.int64)
    np.cumsum([len(mine) for mine in likes], out=indptr[1:])
    rows = np.array([row for mine in likes for row in mine], np.int32)
    times = np.array([1_000_000 - at for mine in likes for at in range(len(mine))], np.int64)
    return Interactions(len(likes), items, indptr, rows, np.ones(rows.size, np.float32), times)


def tiny_interactions(users: int = 60, items: int = 40, seed: int = 0) -> Interactions:
    """Return a random matrix of users who like between none and a third of the items, popular ones more."""
    rng = np.random.default_rng(seed)
    appeal = rng.zipf(1.6, items).astype(np.float64)
    likes = [
        rng.choice(items, rng.integers(0, items // 3), replace=False, p=appeal / appeal.sum()).tolist()
        for _ in range(users)
    ]
    return interactions_of(likes, items)


def built_channel(
    kind: type[Channel],
    liked: Interactions,
    item_columns: Mapping[str, AnyArray] | None = None,
    columns: ItemColumns | None = None,
    follows: Interactions | None = None,
    authors: int = 0,
    user_columns: Mapping[str, AnyArray] | None = None,
    **options: Any,
) -> Channel:
    """Build a channel in memory and load it.

    Args:
        kind: its class.
        liked: the interest matrix.
        item_columns: what the build sees of the items; None: what `columns` has.
        columns: the live columns; None: those of items of whom nothing is known.
        follows, authors, user_columns: as in `BuildContext`.
        options: of the channel.
    """
    config = kind.Config(**options)
    sink = MemorySink()
    now = int(liked.timestamps.max(initial=0))
    if kind.needs_build:
        if item_columns is None:
            item_columns = {} if columns is None else catalogue_columns(columns)
        context = BuildContext(
            liked, item_columns, now, sink, SilentProgress(), 2, follows, authors, user_columns or {}
        )
        kind.build(config, context)
    live = columns if columns is not None else ItemColumns(liked.items)
    return kind.load(config, LoadContext(sink.arrays, liked.items, liked.users, live))


def catalogue_columns(columns: ItemColumns) -> dict[str, AnyArray]:
    """Return live columns under the names that a build knows them by."""
    tags = [
        columns.tag_codes[start : start + count]
        for start, count in zip(columns.tag_starts.tolist(), columns.tag_counts.tolist(), strict=True)
    ]
    return {
        "author": columns.authors.copy(),
        "city": columns.cities.copy(),
        "published_at": columns.published_at.copy(),
        "quality": columns.quality.copy(),
        "latitude": columns.latitude.astype(np.float64),
        "longitude": columns.longitude.astype(np.float64),
        "tags.offsets": np.concatenate(
            (np.zeros(1, np.int64), np.cumsum(columns.tag_counts, dtype=np.int64))
        ),
        "tags.codes": np.concatenate([np.empty(0, np.int32), *tags]),
    }


def built_filter(kind: type[Filter], columns: ItemColumns, **options: Any) -> Filter:
    """Load a filter for a catalogue."""
    return kind.load(kind.Config(**options), LoadContext({}, len(columns), 0, columns))


def random_columns(
    items: int, authors: int = 8, tags: int = 6, seed: int = 0, now: int = 1_000_000
) -> ItemColumns:
    """Return random columns: some items taken down, some published after `now`, some of no known author or time."""
    rng = np.random.default_rng(seed)
    columns = ItemColumns(items)
    columns.set("keys", rng.choice(1 << 62, items, replace=False))
    columns.set("available", rng.random(items) < 0.8)
    columns.set("authors", rng.integers(-1, authors, items))
    known = rng.random(items) < 0.8
    columns.set("published_at", np.where(known, rng.integers(0, now * 5 // 4, items), NO_TIME))
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(rng.integers(0, 4, items))))
    columns.set_tags(offsets, rng.integers(0, tags, int(offsets[-1])).astype(np.int32))
    columns.tag_vocabulary = {f"tag {code}": code for code in range(tags)}
    return columns


def random_batch(items: int, users: int, size: int, seed: int = 0, now: int = 1_000_000) -> QueryBatch:
    """Return a batch of random users, some unknown, with random histories, some empty."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(items, rng.integers(0, min(items, 8) + 1), replace=False) for _ in range(size)]
    history = RaggedRows.of([part.astype(np.int32) for part in rows])
    total = history.rows.size
    return QueryBatch.plain(
        rng.integers(-1, users, size).astype(np.int32),
        History(
            history.rows,
            rng.integers(1, 5, total).astype(np.float32),
            np.full(total, now, np.int64),
            history.offsets,
        ),
        now=now,
    )
