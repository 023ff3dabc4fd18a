"""What happened to users on its way into the state store: collected per user, applied by one script call each."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from engine.core.exposure import FIRST_MIX, GOLDEN, SECOND_MIX, splitmix64
from engine.core.types import Float32Array, Int64Array
from engine.state.exposure import ExposureBackend
from engine.state.layout import (
    AUTHOR,
    CITIES,
    CITIES_KEPT,
    DISLIKES,
    EVENT_IDS,
    FOLLOWS,
    ITEM,
    LEFTOVERS,
    RECENT,
    RECORD,
    event_hash,
    slice_suffix,
    user_prefix,
)
from engine.state.store import Script, StateStore

_RECENT, _FOLLOWS, _DISLIKES, _LEFTOVERS, _RECALLED, _EXPOSURES = 1, 2, 3, 4, 5, 6

_OPERATION = struct.Struct("<B8sI")
_RECORD = struct.Struct("<qIfq")
_OPERATION_RECORD = struct.Struct("<B8sIqIfq")
_OPERATION_EXPOSURE = struct.Struct("<B8sIQq")
_PROBE = struct.Struct("<Qq")
_SETTINGS = struct.Struct("<12I")

_SUFFIXES = tuple(b":" + each for each in (RECENT, FOLLOWS, DISLIKES, LEFTOVERS, CITIES, EVENT_IDS))

_CALL_BYTES = 64 * 1024
"""Operations in one call of the script; a user of more gets several, so that others are answered in between."""

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


class _UserWrites:
    __slots__ = ("cities", "events", "operations")

    def __init__(self) -> None:
        self.operations: list[bytes] = []
        self.cities: dict[int, int] = {}
        self.events = 0


class Writes:
    """What to write, grouped by user; the order of a user's events is kept.

    In all methods `user` is the user's tag (`layout.user_tag`), `event` the id of the event (b"": none), `key` and
    `keys` are 64-bit keys of ids (`engine.core.keys`), `time` is seconds since the epoch.
    """

    def __init__(self) -> None:
        self._users: dict[bytes, _UserWrites] = {}
        self.exposures: list[tuple[bytes, Sequence[int] | Int64Array]] = []
        """Who was shown what, for exposures that are kept elsewhere than in the store."""

    def __len__(self) -> int:
        """How many events there are."""
        return sum(user.events for user in self._users.values())

    def expose(self, user: bytes, keys: Sequence[int] | Int64Array, event: bytes = b"") -> None:
        """The user was shown items."""
        if len(keys) == 1:
            key = int(keys[0])
            operation = _OPERATION_EXPOSURE.pack(_EXPOSURES, event_hash(event), 16, splitmix64(key), key)
        else:
            operation = _OPERATION.pack(_EXPOSURES, event_hash(event), 16 * len(keys)) + _probes(keys)
        self._add(user, operation)
        self.exposures.append((user, keys))

    def act(
        self, user: bytes, key: int, kind: int, time: int, watch_seconds: float, event: bytes = b""
    ) -> None:
        """The user did something with an item; `kind` from `layout.kind_of`, watch_seconds NaN where not known."""
        self._record(_RECENT, user, key, kind, watch_seconds, time, event)

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
        cities = self._user(user).cities
        cities[city_key] = max(time, cities.get(city_key, time))

    def recalled(self, user: bytes, keys: Sequence[int] | Int64Array) -> None:
        """Leftovers were recalled. No event: nothing is lost but a count where it does not go in."""
        payload = np.asarray(keys, np.int64).tobytes()
        self._user(user).operations.append(_OPERATION.pack(_RECALLED, bytes(8), len(payload)) + payload)

    def _record(
        self, where: int, user: bytes, key: int, kind: int, value: float, time: int, event: bytes
    ) -> None:
        self._add(
            user, _OPERATION_RECORD.pack(where, event_hash(event), RECORD.itemsize, key, kind, value, time)
        )

    def _user(self, user: bytes) -> _UserWrites:
        found = self._users.get(user)
        if found is None:
            found = self._users[user] = _UserWrites()
        return found

    def _add(self, user: bytes, operation: bytes) -> None:
        mine = self._user(user)
        mine.operations.append(operation)
        mine.events += 1

    def calls(self) -> list[tuple[bytes, bytes, bytes]]:
        """Return (user, operations, records of cities) for every call of the script."""
        calls = []
        for user, mine in self._users.items():
            cities = b"".join(_RECORD.pack(key, ITEM, 1.0, time) for key, time in mine.cities.items())
            first = size = 0
            for at, operation in enumerate(mine.operations):
                size += len(operation)
                if size > _CALL_BYTES and at > first:
                    calls.append((user, b"".join(mine.operations[first:at]), b""))
                    first, size = at, len(operation)
            calls.append((user, b"".join(mine.operations[first:]), cities))
        return calls


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
            0,
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

    def commit_many(self, several: Sequence[Writes], now: float) -> list[CommitResult]:
        """Write what came from several callers in one go, in their order, and count for each; as `commit`."""
        current = b":" + slice_suffix(self._exposure.slice_number(now) if self._exposure.in_store else 0)
        ends: list[int] = []
        calls: list[tuple[list[bytes], tuple[bytes, bytes, bytes]]] = []
        for writes in several:
            calls += [
                (self._keys(user, current), (self._settings, operations, cities))
                for user, operations, cities in writes.calls()
            ]
            ends.append(len(calls))
        replies: list[Any] = self._store.run_script(self._script, calls) if calls else []
        for reply in replies:
            if isinstance(reply, Exception):
                raise self._store.refused(reply)
        if not self._exposure.in_store:
            for writes in several:
                for user, keys in writes.exposures:
                    self._exposure.record(user, np.asarray(keys, np.int64), now)
        results: list[CommitResult] = []
        for first, end, writes in zip([0, *ends], ends, several, strict=False):
            duplicates = sum(replies[first:end])
            results.append(CommitResult(len(writes) - duplicates, duplicates))
        return results

    def _keys(self, user: bytes, current: bytes) -> list[bytes]:
        prefix = user_prefix(self._store.prefix, user)
        return [prefix + suffix for suffix in (*_SUFFIXES, current)]


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
