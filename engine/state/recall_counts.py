"""Counts in the store how often leftovers were recalled.

A script that looks at every record of a user holds up the reads of all others for a tenth of a millisecond, and a user is
counted with nearly every answer. So the counting is done here, in what the read of the user brought. The script only puts
the counted records in the place of these, where they still are as they were read; else they are read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from engine.core.int_table import slot_of
from engine.core.types import Int64Array
from engine.state.layout import GONE, LEFTOVERS, RECORD, user_prefix
from engine.state.store import Script, StateStore

_BYTES = RECORD.itemsize

_TRIES = 5
"""How often the same leftovers may have changed between read and write; not even once, as a rule."""

_PUT = """\
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SETRANGE', KEYS[1], 0, ARGV[2])
return 1
"""


class Recalled(NamedTuple):
    """Leftovers of a user that were recalled once more.

    Attributes:
        user: the user's tag (`layout.user_tag`).
        keys: int64[...], the items' keys, which are among these leftovers; one that is there twice was recalled twice.
        leftovers: all the user's leftovers as they lay in the store.
    """

    user: bytes
    keys: Int64Array
    leftovers: bytes


class RecallCounts:
    """Writes how often leftovers were recalled."""

    def __init__(self, store: StateStore) -> None:
        """Write to a store."""
        self._store = store
        self._head = user_prefix(store.prefix, b"")[:-1]
        self._script = Script(_PUT)

    def add(self, notes: Sequence[Recalled]) -> int:
        """Count every item that is still among the user's leftovers, and was not shown since, once more.

        Args:
            notes: what was recalled; a user may come several times.

        Returns:
            How many users were not counted, because their leftovers kept changing.

        Raises:
            StateUnavailableError: the store did not take it, or not all of it.
            StateError: the store cannot do what is asked of it.
        """
        waiting = _by_user(notes)
        for attempt in range(_TRIES):
            if attempt:
                waiting = self._read_again(waiting)
            waiting = self._put(waiting)
            if not waiting:
                break
        return len(waiting)

    def _put(self, notes: Sequence[Recalled]) -> list[Recalled]:
        """Write; return those whose leftovers are no longer what they were."""
        changed = [
            (note, after)
            for note, after in zip(notes, counted(notes), strict=True)
            if after != note.leftovers
        ]
        replies = self._store.run_script(
            self._script, [((self._key(note),), (note.leftovers, after)) for note, after in changed]
        )
        for reply in replies:
            if isinstance(reply, Exception):
                raise self._store.refused(reply)
        return [note for (note, _), reply in zip(changed, replies, strict=True) if not reply]

    def _read_again(self, notes: Sequence[Recalled]) -> list[Recalled]:
        values = self._store.mget_users([self._user(note) for note in notes], [LEFTOVERS])
        return [note._replace(leftovers=value or b"") for note, value in zip(notes, values, strict=True)]

    def _user(self, note: Recalled) -> bytes:
        return b"%s%s}" % (self._head, note.user)

    def _key(self, note: Recalled) -> bytes:
        return b"%s:%s" % (self._user(note), LEFTOVERS)


def _by_user(notes: Sequence[Recalled]) -> list[Recalled]:
    """Put what was recalled of a user together: what was read first is likeliest to lie there still."""
    users: dict[bytes, list[Recalled]] = {}
    for note in notes:
        users.setdefault(note.user, []).append(note)
    if len(users) == len(notes):
        return list(notes)
    return [mine[0]._replace(keys=np.concatenate([note.keys for note in mine])) for mine in users.values()]


def counted(notes: Sequence[Recalled]) -> list[bytes]:
    """Return the leftovers of each note with its items counted once more; as they are where they are damaged."""
    whole = [b"" if len(note.leftovers) % _BYTES else note.leftovers for note in notes]
    records = np.frombuffer(bytearray(b"".join(whole)), np.int64)
    ends = np.zeros(len(notes) + 1, np.int64)
    np.cumsum([len(value) // _BYTES for value in whole], out=ends[1:])
    offsets = np.zeros(len(notes) + 1, np.int64)
    np.cumsum([note.keys.size for note in notes], out=offsets[1:])
    _count(records, ends, np.concatenate([note.keys for note in notes] or [ends[:0]]), offsets)
    after = records.tobytes()
    bounds = (ends * _BYTES).tolist()
    return [
        after[bounds[u] : bounds[u + 1]] if value else note.leftovers
        for u, (value, note) in enumerate(zip(whole, notes, strict=True))
    ]


@njit(nogil=True, cache=True)
def _count(records, ends, keys, offsets):  # type: ignore[no-untyped-def]
    """Count recalls in records, in place.

    Args:
        records: int64[...], records of three words each; word 0 is the item's key.
        ends: int64[n + 1]; user u has the records [ends[u], ends[u + 1]).
        keys: int64[...], of the items that were recalled.
        offsets: int64[n + 1]; those of user u are [offsets[u], offsets[u + 1]).
    """
    kinds = records.view(np.uint32)
    most = 1
    for u in range(offsets.size - 1):
        most = max(most, offsets[u + 1] - offsets[u])
    size = 4
    while size < 2 * most:
        size *= 2
    found, times = np.empty(size, np.int64), np.empty(size, np.int32)
    for u in range(offsets.size - 1):
        times[:] = -1
        for at in range(offsets[u], offsets[u + 1]):
            slot = slot_of(keys[at], found, times)
            found[slot] = keys[at]
            times[slot] = max(times[slot], 0) + 1
        for record in range(ends[u], ends[u + 1]):
            more = times[slot_of(records[3 * record], found, times)]
            count = np.int64(kinds[6 * record + 2])
            if more > 0 and 0 < count < GONE - 1:
                kinds[6 * record + 2] = min(count + more, GONE - 1)


def counted_reference(leftovers: bytes, keys: Sequence[int]) -> bytes:
    """The plain twin of `counted`, of one user."""
    records = np.frombuffer(bytearray(leftovers), RECORD)
    for record in records:
        for key in keys:
            if record["key"] == key and 0 < record["kind"] < GONE - 1:
                record["kind"] += 1
    return records.tobytes()
