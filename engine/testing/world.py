"""Small worlds for tests: an interest matrix, batches of queries, a channel built without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.core.channel import BuildContext, Channel, LoadContext, SilentProgress
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
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
    **options: Any,
) -> Channel:
    """Build a channel in memory and load it."""
    config = kind.Config(**options)
    sink = MemorySink()
    now = int(liked.timestamps.max(initial=0))
    if kind.needs_build:
        kind.build(config, BuildContext(liked, item_columns or {}, now, sink, SilentProgress(), 2))
    live = columns if columns is not None else ItemColumns(liked.items)
    return kind.load(config, LoadContext(sink.arrays, liked.items, liked.users, live))


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
