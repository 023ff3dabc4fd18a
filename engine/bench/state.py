"""`recall bench state`: what reading the users of a batch from the embedded state store costs the worker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.bench.report import circumstances, spread
from engine.config import Config
from engine.core.channel import Progress
from engine.core.memory import MemorySink
from engine.core.types import Int64Array
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog, interest_matrix
from engine.data.live import LiveCatalogue
from engine.data.sample import sample_path
from engine.online.state import State, open_state
from engine.state.history import SnapshotHistory, UserState, write_history
from engine.state.layout import AUTHOR, kind_of, user_tag
from engine.state.writes import Writes

RECENT, EXPOSED, FOLLOWED, DISLIKED, LEFT_OVER = 200, 2000, 50, 20, 100
"""What each user did; the exposures lie in 4 slices."""
SLICES = 4


def bench_state(
    config: Config,
    folder: Path,
    users: int,
    batch: int,
    progress: Progress,
    repetitions: int = 7,
    reads: int = 200,
) -> dict[str, Any]:
    """Fill an embedded store with users who did a lot, and time the read of random batches of them.

    Args:
        config: limits and exposure settings; the store is the embedded one.
        folder: where it keeps its data.
        users: how many are filled.
        batch: users per read.
        progress: told how far it is.
        repetitions: how often `reads` reads are timed; the spread is over these.
        reads: per repetition.

    Returns:
        read_us: CPU time of the reading thread per batch, decoding included; wall_us: with the wait for the store;
        bytes_per_user: of the store's memory, all keys of a user.
    """
    config = config.model_copy(
        update={
            "store": config.store.model_copy(update={"path": folder}),
            "state": config.state.model_copy(update={"url": ""}),
        }
    )
    dataset = Dataset.open(sample_path())
    catalogue = LiveCatalogue.of(Catalogue.from_dataset(dataset))
    history = MemorySink()
    liked = interest_matrix(EventLog.read(dataset, catalogue.base), config.interest)
    write_history(history, liked, config.history.keep)
    rng = np.random.default_rng(1)
    known = catalogue.users.ids(rng.choice(len(catalogue.users), users, replace=False).astype(np.int32))
    with open_state(config) as state:
        assert state is not None
        progress.start("filling the store", users)
        for user in known.tolist():
            _fill(state, config, catalogue, user, rng)
            progress.advance()
        reader = state.live_users(catalogue, SnapshotHistory(history.arrays))
        batches = [rng.choice(known, batch, replace=False) for _ in range(reads)]
        _read(reader, catalogue, batches[:20])  # compiles, and warms the caches
        progress.start("reading", repetitions)
        timed = []
        for _ in range(repetitions):
            timed.append(_read(reader, catalogue, batches))
            progress.advance()
        held = [_bytes_of(state, user) for user in known[:20].tolist()]
    return {
        **spread("read_us", [cpu for cpu, _ in timed]),
        **spread("wall_us", [wall for _, wall in timed]),
        "bytes_per_user": float(np.mean(held)),
        "users": users,
        "batch": batch,
        **circumstances(),
    }


def _fill(
    state: State, config: Config, catalogue: LiveCatalogue, user: int | str, rng: np.random.Generator
) -> None:
    keys = catalogue.columns.keys
    acted = kind_of(next(kind for kind, points in config.interest.items() if points > 0))
    tag, now = user_tag(user), time.time()
    for age in reversed(range(SLICES)):
        shown = Writes()
        shown.expose(tag, rng.choice(keys, EXPOSED // SLICES, replace=False))
        state.users.commit(shown, now - age * config.state.exposure.slice_seconds)
    rest = Writes()
    for at, key in enumerate(rng.choice(keys, RECENT, replace=False).tolist()):
        rest.act(tag, key, acted, int(now) - RECENT + at, 1.0)
    authors = catalogue.authors.keys(
        rng.choice(len(catalogue.authors), FOLLOWED + DISLIKED, replace=False).astype(np.int32)
    )
    for at, author in enumerate(authors[:FOLLOWED].tolist()):
        rest.follow(tag, author, int(now) - at, False)
    for at, author in enumerate(authors[FOLLOWED:].tolist()):
        rest.dislike(tag, AUTHOR, author, int(now) - at, False)
    left: Int64Array = rng.choice(keys, LEFT_OVER, replace=False)
    rest.leftovers(tag, left, np.linspace(1, 0, LEFT_OVER, dtype=np.float32), int(now))
    state.users.commit(rest, now)


def _read(reader: UserState, catalogue: LiveCatalogue, batches: list[Any]) -> tuple[float, float]:
    """Return microseconds per batch: CPU time of this thread, and time on the wall."""
    rows = [catalogue.users.rows(batch) for batch in batches]
    now = np.full(batches[0].size, int(time.time()), np.int64)
    cities = ("",) * now.size
    cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
    for batch, mine in zip(batches, rows, strict=True):
        if not reader.read(batch, mine, now, cities).live.available:
            raise RuntimeError("the state store did not answer")
    spent = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
    return spent[0] / len(batches) / 1000, spent[1] / len(batches) / 1000


def _bytes_of(state: State, user: int | str) -> int:
    pattern = b"*{" + user_tag(user) + b"}*"
    found = [key for part in _scanned(state, pattern) for key in part]
    return sum(int(state.store.execute("MEMORY", "USAGE", key, timeout=5.0)) for key in found)


def _scanned(state: State, pattern: bytes) -> list[list[bytes]]:
    parts, cursor = [], b"0"
    while True:
        cursor, part = state.store.execute("SCAN", cursor, "MATCH", pattern, "COUNT", 10_000, timeout=5.0)
        parts.append(part)
        if int(cursor) == 0:
            return parts
