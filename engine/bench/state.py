"""`recall bench state`: what reading the users of a batch from the embedded state store costs the worker."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from engine.bench.report import circumstances, spread
from engine.config import Config
from engine.core.channel import Progress
from engine.core.memory import MemorySink
from engine.core.types import NO_ROW, AnyArray, Int32Array, Int64Array
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog, interest_matrix
from engine.data.live import LiveCatalogue
from engine.data.sample import sample_path
from engine.online.state import State, open_state
from engine.state.history import ReadUsers, SnapshotHistory, UserRead, UserState, write_history
from engine.state.layout import AUTHOR, kind_of, user_tag
from engine.state.replies import Values
from engine.state.store import StateStore
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
        read_us: CPU time of the reading thread per batch: asking, receiving, histories decoded and merged, exposure
        bits found; wall_us: with the wait for the store; used_us: CPU time of the same and of sorting out all else
        (leftovers, dislikes, follows, cities), which happens when the first channel or filter asks for one of them;
        fetch_us: CPU time of asking and receiving alone; decode_us, decode_used_us: of all but that, of the one and of
        the other; ping_us: of a bare round trip;
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
        snapshot = SnapshotHistory(history.arrays)
        reader = state.live_users(catalogue, snapshot)
        fetched = _Fetched(state.store)
        decoder = state.live_users(catalogue, snapshot, cast(StateStore, fetched))
        batches = [rng.choice(known, batch, replace=False) for _ in range(reads)]
        for each in (_Used(reader), _Used(decoder)):  # compiles, and warms the caches
            _timed(_reads(each, catalogue, batches))
        progress.start("reading", repetitions)
        parts: dict[str, list[Callable[[], object]]] = {
            "read": _reads(reader, catalogue, batches),
            "used": _reads(_Used(reader), catalogue, batches),
            "fetch": [functools.partial(state.store.mget_users, *asked) for asked in fetched.known],
            "decode": _reads(decoder, catalogue, batches),
            "decode_used": _reads(_Used(decoder), catalogue, batches),
            "ping": [functools.partial(state.store.execute, "PING")] * reads,
        }
        timed: dict[str, list[tuple[float, float]]] = {name: [] for name in parts}
        for _ in range(repetitions):
            for name, calls in parts.items():
                timed[name].append(_timed(calls))
            progress.advance()
        held = [_bytes_of(state, user) for user in known[:20].tolist()]
    return {
        **spread("wall_us", [wall for _, wall in timed["read"]]),
        **{
            key: value
            for name, both in timed.items()
            for key, value in spread(f"{name}_us", [cpu for cpu, _ in both]).items()
        },
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


class _Fetched:
    """A store that has fetched already what is read a second time."""

    def __init__(self, store: StateStore) -> None:
        self.prefix = store.prefix
        self.known: dict[tuple[tuple[bytes, ...], tuple[bytes, ...]], Values] = {}
        self._store = store

    def ask_users(self, users: Sequence[bytes], suffixes: Sequence[bytes]) -> Callable[[], Values]:
        asked = tuple(users), tuple(suffixes)
        if asked not in self.known:
            self.known[asked] = self._store.mget_users(users, suffixes)
        return lambda: self.known[asked]


class _Used:
    """Reads users and asks for what is sorted out only then."""

    def __init__(self, users: UserState) -> None:
        self._users = users

    def ask(self, user_ids: AnyArray) -> ReadUsers:
        read = self._users.ask(user_ids)

        def used(users: Int32Array, now: Int64Array, cities: Int32Array) -> UserRead:
            known = read(users, now, cities)
            assert known.live.follows
            return known

        return used


def _reads(reader: UserState, catalogue: LiveCatalogue, batches: list[Any]) -> list[Callable[[], object]]:
    now = np.full(batches[0].size, int(time.time()), np.int64)
    cities = np.full(now.size, NO_ROW, np.int32)
    return [
        functools.partial(_read, reader, batch, catalogue.users.rows(batch), now, cities) for batch in batches
    ]


def _read(reader: UserState, user_ids: AnyArray, *batch: Any) -> None:
    if not reader.ask(user_ids)(*batch).live.available:
        raise RuntimeError("the state store did not answer")


def _timed(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Return microseconds per call: CPU time of this thread, and time on the wall."""
    cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
    for call in calls:
        call()
    spent = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
    return spent[0] / len(calls) / 1000, spent[1] / len(calls) / 1000


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
