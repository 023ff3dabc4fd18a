"""What happened to users on its way into the state store: collected per user, applied by a script, many users a call."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from engine.core.exposure import splitmix64
from engine.core.hashing import FIRST_MIX, GOLDEN, SECOND_MIX
from engine.core.types import Float32Array, Int64Array
from engine.state.events import action_record, shown_records
from engine.state.exposure import ExposureBackend
from engine.state.layout import (
    AUTHOR,
    CITIES_KEPT,
    ITEM,
    RECORD,
    event_hash,
    slice_suffix,
    user_prefix,
)
from engine.state.store import Script, StateStore

_RECENT, _FOLLOWS, _DISLIKES, _LEFTOVERS, _EXPOSURES = 1, 2, 3, 4, 5

_OPERATION = struct.Struct("<B8sI")
_RECORD = struct.Struct("<qIfq")
_OPERATION_RECORD = struct.Struct("<B8sIqIfq")
_OPERATION_EXPOSURE = struct.Struct("<B8sIQq")
_PROBE = struct.Struct("<Qq")
_SETTINGS = struct.Struct("<11I")
_CLOCK = struct.Struct("<I")
_LENGTHS = struct.Struct("<3I")

_CALL_BYTES = 4096
"""What one call of the script takes, as long as it has more than one user: about a millisecond's work."""

_USER_BYTES = 64 * 1024
"""Operations of one user in a call; a user of more gets several, so that others are answered in between."""

_FEW = 8
"""Exposures up to which plain Python mixes their keys sooner than NumPy does."""


@dataclass(frozen=True, slots=True)
class UserLimits:
    """How much is kept of a user, and for how long.

    Attributes:
        recent, follows, dislikes, leftovers, event_ids: the newest so many; up to a quarter more lies in the store
            until the oldest are dropped together.
        user_seconds: a user is forgotten so long after the last event.
        slice_seconds: the length of a slice of exposures.
        slices: full slices remembered besides the current one.
    """

    recent: int = 200
    follows: int = 1000
    dislikes: int = 500
    leftovers: int = 100
    event_ids: int = 128
    user_seconds: int = 90 * 86_400
    slice_seconds: int = 7 * 86_400
    slices: int = 4


@dataclass(frozen=True, slots=True)
class CommitResult:
    """How many events went in now, and how many had gone in before."""

    accepted: int
    duplicates: int


class Writes:
    """What to write, grouped by user; the order of a user's events is kept.

    In all methods `user` is the user's tag (`layout.user_tag`), `event` the id of the event (b"": none), `key` and
    `keys` are 64-bit keys of ids (`engine.core.keys`), `time` is seconds since the epoch.
    """

    def __init__(self, logged: bool = False) -> None:
        """Begin with nothing; `logged`: exposures and actions are to go into the event log, too."""
        self._operations: dict[bytes, list[bytes]] = {}
        # What each operation adds to the event log, in the same order.
        self._records: dict[bytes, list[bytes]] | None = {} if logged else None
        self._cities: dict[bytes, dict[int, int]] = {}
        self._events = 0
        self.exposures: list[tuple[bytes, Sequence[int] | Int64Array]] = []
        """Who was shown what, for exposures that are kept elsewhere than in the store."""

    def __len__(self) -> int:
        """How many events there are."""
        return self._events

    def expose(
        self, user: bytes, keys: Sequence[int] | Int64Array, event: bytes = b"", time: int = 0
    ) -> None:
        """The user was shown items; `time` is for the event log alone: here what counts is when it arrives."""
        if len(keys) == 1:
            key = int(keys[0])
            operation = _OPERATION_EXPOSURE.pack(_EXPOSURES, event_hash(event), 16, splitmix64(key), key)
        else:
            operation = _OPERATION.pack(_EXPOSURES, event_hash(event), 16 * len(keys)) + _probes(keys)
        self._add(user, operation, b"" if self._records is None else shown_records(user, keys, time))
        self.exposures.append((user, keys))

    def act(
        self, user: bytes, key: int, kind: int, time: int, watch_seconds: float, event: bytes = b""
    ) -> None:
        """The user did something with an item; `kind` from `layout.kind_of`, watch_seconds NaN where not known."""
        record = b"" if self._records is None else action_record(user, key, kind, time, watch_seconds)
        self._record(_RECENT, user, key, kind, watch_seconds, time, event, record)

    def follow(self, user: bytes, author_key: int, time: int, undo: bool, event: bytes = b"") -> None:
        """The user follows an author, or no longer does; what has the later time counts."""
        self._record(_FOLLOWS, user, author_key, AUTHOR, 0.0 if undo else 1.0, time, event)

    def dislike(
        self, user: bytes, what: Literal[1, 2, 3], key: int, time: int, undo: bool, event: bytes = b""
    ) -> None:
        """The user dislikes an item, an author or a topic, or no longer does; what has the later time counts."""
        self._record(_DISLIKES, user, key, what, 0.0 if undo else 1.0, time, event)

    def leftovers(
        self,
        user: bytes,
        keys: Sequence[int] | Int64Array,
        scores: Sequence[float] | Float32Array,
        time: int,
        event: bytes = b"",
    ) -> None:
        """A fine ranking left items over, best first; an item comes once. Without scores: `scores` is empty."""
        unique = dict.fromkeys(int(key) for key in keys)
        records = np.zeros(len(unique), RECORD)
        records["key"] = list(unique)
        records["kind"] = 1
        records["time"] = time
        if len(scores):
            best: dict[int, float] = {}
            for key, score in zip(keys, scores, strict=True):
                best.setdefault(int(key), float(score))
            records["value"] = list(best.values())
        payload = records.tobytes()
        self._add(user, _OPERATION.pack(_LEFTOVERS, event_hash(event), len(payload)) + payload)

    def city(self, user: bytes, city_key: int, time: int) -> None:
        """The user was in a city. Belongs to an event, and is none of its own."""
        self._operations.setdefault(user, [])
        cities = self._cities.setdefault(user, {})
        cities[city_key] = max(time, cities.get(city_key, time))

    def _record(
        self,
        where: int,
        user: bytes,
        key: int,
        kind: int,
        value: float,
        time: int,
        event: bytes,
        record: bytes = b"",
    ) -> None:
        operation = _OPERATION_RECORD.pack(where, event_hash(event), RECORD.itemsize, key, kind, value, time)
        self._add(user, operation, record)

    def _add(self, user: bytes, operation: bytes, record: bytes = b"") -> None:
        self._put(user, operation, record)
        self._events += 1

    def _put(self, user: bytes, operation: bytes, record: bytes = b"") -> None:
        mine = self._operations.get(user)
        if mine is None:
            self._operations[user] = [operation]
        else:
            mine.append(operation)
        if self._records is not None:
            self._records.setdefault(user, []).append(record)

    def records(self, user: bytes) -> Sequence[bytes]:
        """Return what each operation of a user adds to the event log; nothing where that is not wanted."""
        return () if self._records is None else self._records.get(user, ())

    def parts(self) -> Iterator[tuple[bytes, int, bytes, bytes]]:
        """Yield (user, number of operations, these, records of cities); users of very much in several parts."""
        for user, mine in self._operations.items():
            cities = b""
            if self._cities and user in self._cities:
                cities = b"".join(
                    _RECORD.pack(key, ITEM, 1.0, time) for key, time in self._cities[user].items()
                )
            if len(mine) == 1:
                yield user, 1, mine[0], cities
                continue
            first = size = 0
            for at, operation in enumerate(mine):
                size += len(operation)
                if size > _USER_BYTES and at > first:
                    yield user, at - first, b"".join(mine[first:at]), b""
                    first, size = at, len(operation)
            yield user, len(mine) - first, b"".join(mine[first:]), cities


class _Call:
    """A call of the script while it is filled.

    Attributes:
        name: of the first user.
        content: what the script takes.
        size: its bytes.
        operations: how many.
        owners: (first operation, whose) of every run of operations that one caller wrote.
        records: what each operation adds to the event log; empty where nothing goes there.
    """

    __slots__ = ("content", "name", "operations", "owners", "records", "size")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.content: list[bytes] = []
        self.size = 0
        self.operations = 0
        self.owners: list[tuple[int, int]] = []
        self.records: list[bytes] = []


class UserStore:
    """Writes what happens to users."""

    def __init__(self, store: StateStore, limits: UserLimits, exposure: ExposureBackend) -> None:
        """Write to a store.

        Args:
            store: where users are kept.
            limits: how much of each.
            exposure: who keeps exposures.
        """
        self._store = store
        self._exposure = exposure
        self._head = user_prefix(store.prefix, b"")[:-1]
        self._script = Script(files("engine.state").joinpath("commit.lua").read_text("utf-8"))
        layout = exposure.layout
        self._settings = _SETTINGS.pack(
            limits.recent,
            limits.follows,
            limits.dislikes,
            limits.leftovers,
            CITIES_KEPT,
            limits.event_ids,
            limits.user_seconds,
            # From the first write of the slice; the last may come a whole slice later.
            (limits.slices + 3) * limits.slice_seconds,
            layout.planned if exposure.in_store else 0,
            layout.bits,
            layout.hashes,
        )

    def commit(self, writes: Writes, now: float) -> CommitResult:
        """Write; durable, as the store is configured, when this returns.

        Args:
            writes: what happened.
            now: the server's clock, seconds since the epoch: it says into which slice exposures go.

        Raises:
            StateUnavailableError: the store did not take it, or not all of it. To commit the same again is harmless
                for events with ids.
            StateError: if the store cannot do what is asked of it.
        """
        return self.commit_many([writes], now)[0]

    def commit_many(
        self, several: Sequence[Writes], now: float, logged: Callable[[bytes], None] | None = None
    ) -> list[CommitResult]:
        """Write what came from several callers in one go, in their order, and count for each; as `commit`.

        Args:
            several: what happened.
            now: the server's clock.
            logged: told, when all is durable, what of it goes into the event log: records of what went in now, without
                what had gone in before. Not told of nothing.
        """
        calls = self._calls(several)
        slice_ = b":" + slice_suffix(self._exposure.slice_number(now) if self._exposure.in_store else 0)
        settings = self._settings + _CLOCK.pack(int(now))
        replies: list[Any] = self._store.run_script(
            self._script,
            [((call.name,), (settings, slice_, b"".join(call.content))) for call in calls],
        )
        duplicates = [0] * len(several)
        for call, reply in zip(calls, replies, strict=True):
            if isinstance(reply, Exception):
                raise self._store.refused(reply)
            for number in reply:
                # The last run that begins at the operation or before.
                duplicates[call.owners[bisect_right(call.owners, number, key=itemgetter(0)) - 1][1]] += 1
                if number < len(call.records):
                    call.records[number] = b""
        if not self._exposure.in_store:
            for writes in several:
                for user, keys in writes.exposures:
                    self._exposure.record(user, np.asarray(keys, np.int64), now)
        if logged is not None and (records := b"".join(chain.from_iterable(call.records for call in calls))):
            logged(records)
        return [
            CommitResult(len(writes) - repeated, repeated)
            for writes, repeated in zip(several, duplicates, strict=True)
        ]

    def _calls(self, several: Sequence[Writes]) -> list[_Call]:
        calls: list[_Call] = []
        head, pack = self._head, _LENGTHS.pack
        most = 0 if self._store.clustered else _CALL_BYTES
        for owner, writes in enumerate(several):
            call: _Call | None = None
            taken: dict[bytes, int] = {}
            if calls:
                call = calls[-1]
                call.owners.append((call.operations, owner))
            for user, count, operations, cities in writes.parts():
                size = len(user) + len(operations) + len(cities)
                name = b"%s%s}" % (head, user)
                if call is None or call.size + size > most:
                    call = _Call(name)
                    call.owners.append((0, owner))
                    calls.append(call)
                call.content += (pack(len(name), len(operations), len(cities)), name, operations, cities)
                call.size += size
                if records := writes.records(user):
                    done = taken.get(user, 0)
                    call.records += [b""] * (call.operations - len(call.records))
                    call.records += records[done : done + count]
                    taken[user] = done + count
                call.operations += count
        return calls


def _probes(keys: Sequence[int] | Int64Array) -> bytes:
    """Return, end to end, splitmix64 of the key (it says where the bits stand) and the key of each exposure."""
    if len(keys) <= _FEW:
        return b"".join([_PROBE.pack(splitmix64(int(key)), int(key)) for key in keys])
    both = np.empty((len(keys), 2), np.uint64)
    both[:, 1] = np.asarray(keys, np.int64).view(np.uint64)
    z = both[:, 1] + np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST_MIX)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND_MIX)
    both[:, 0] = z ^ (z >> np.uint64(31))
    return both.tobytes()
