"""The event log: what ingest acknowledged, for who learns from it while it comes.

    {prefix}:{events}            a stream, one entry per commit; field "e": records (`EVENT`) end to end; field "n": how
                                 many events there were in all, these included
    {prefix}:{events}:total      that number
    {prefix}:{events}:trimmed    the last entry that was deleted from the front of the stream

It holds the newest events, a number of them, and forgets the oldest: whoever reads behind them is told that there is a
gap. Ids are in it as their 64-bit keys (`engine.core.keys`), so that a record has one size.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from engine.core.types import AnyArray, Int64Array
from engine.state.layout import user_key
from engine.state.store import Script, StateStore
from engine.state.stream import START, FollowedStream

EVENT = np.dtype([("user", "<i8"), ("item", "<i8"), ("time", "<i8"), ("kind", "<u4"), ("value", "<f4")])
"""A record: 32 bytes. Keys of user and item; seconds since the epoch, as the event says or when it came; `SHOWN`, or
`layout.kind_of` the action; seconds watched, NaN where not known and for what was shown."""

SHOWN = 0
"""The kind of an exposure; no action has it."""

_RECORD = struct.Struct("<qqqIf")

_FEW = 8
"""Exposures up to which plain Python packs them sooner than NumPy does."""

_APPEND_SECONDS = 1.0
"""An acknowledgement waits no longer for the log."""

_TRIMMED_AT_ONCE = 256
"""Entries that one append deletes at most."""

_APPEND = Script("""
local total = redis.call('INCRBY', KEYS[3], ARGV[2])
local added = redis.call('XADD', KEYS[1], '*', 'e', ARGV[1], 'n', total)
local length, from, gone = tonumber(ARGV[3]), '-', false
for each = 1, tonumber(ARGV[4]) do
  local entry = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 1)[1]
  if not entry or entry[1] == added or total - tonumber(entry[2][4]) < length then
    break
  end
  gone, from = entry[1], '(' .. entry[1]
end
if gone then
  redis.call('SET', KEYS[2], gone)
  local kept = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 1)[1]
  redis.call('XTRIM', KEYS[1], 'MINID', '=', kept[1])
end
return added
""")


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events of some entries of the log, in its order: of one user as they were acknowledged.

    Attributes:
        records: `EVENT`[n].
        offsets: of the entries.
        entries: one row per entry: int64[m, 2], when it was written, in milliseconds since the epoch by the store's
            clock, and its first record.
        waiting: events behind these that are in the log already.
        asked: the store's clock when it was asked, milliseconds since the epoch: whatever was written before this moment,
            and fits into what was asked for, is there.
    """

    records: AnyArray
    offsets: list[str]
    entries: Int64Array
    waiting: int
    asked: int


class EventLog(FollowedStream):
    """The event log of a state store; safe to use from several threads.

    Every method raises StateUnavailableError where the store does not answer.
    """

    def __init__(self, store: StateStore, length: int) -> None:
        """Write to and read from a store.

        Args:
            store: where the log is.
            length: the newest so many events are kept; up to an entry more, and more for a while where large entries
                follow many small ones.
        """
        super().__init__(store, f"{store.prefix}:{{events}}")
        self._total = self._stream + b":total"
        self._length = length

    def append(self, records: bytes) -> str:
        """Write an entry and return its offset; durable, as the store is, when this returns.

        Args:
            records: of `EVENT`, end to end; one or more.
        """
        keys = (self._stream, self._trimmed, self._total)
        count = len(records) // EVENT.itemsize
        arguments = (records, count, self._length, _TRIMMED_AT_ONCE)
        added: bytes = self._run(_APPEND, [(keys, arguments)], _APPEND_SECONDS)[0]
        return added.decode()

    def read(self, after: str, entries: int, block_ms: int) -> tuple[EventBatch, bool]:
        """Wait for events behind an offset.

        Args:
            after: the offset.
            entries: how many entries at most.
            block_ms: how long to wait for the first one where there is none; 0: not at all.

        Returns:
            The events, and whether others that should stand before them are gone.
        """
        asked = self.clock()
        found, missed = self._followed(after, entries, block_ms)
        if not found:
            return EventBatch(np.empty(0, EVENT), [], np.empty((0, 2), np.int64), 0, asked), missed
        records = np.frombuffer(b"".join(fields[1] for _, fields in found), EVENT)
        starts = np.cumsum([0, *(len(fields[1]) // EVENT.itemsize for _, fields in found[:-1])])
        written = np.array([int(offset.partition(b"-")[0]) for offset, _ in found])
        offsets = [offset.decode() for offset, _ in found]
        waiting = int(self._store.execute("GET", self._total) or 0) - int(found[-1][1][3])
        return EventBatch(records, offsets, np.stack((written, starts), 1), max(0, waiting), asked), missed

    def oldest(self) -> str:
        """Return the offset to read everything from that is still there: the last entry that was trimmed."""
        trimmed: bytes | None = self._store.execute("GET", self._trimmed)
        return START if trimmed is None else trimmed.decode()


def shown_records(user: bytes, keys: Sequence[int] | Int64Array, time: int) -> bytes:
    """Return the records of an exposure; `user` from `layout.user_tag`."""
    who = _user_key(user)
    if len(keys) <= _FEW:
        return b"".join([_RECORD.pack(who, int(key), time, SHOWN, math.nan) for key in keys])
    records = np.zeros(len(keys), EVENT)
    records["user"], records["item"], records["time"], records["value"] = who, keys, time, math.nan
    return records.tobytes()


def action_record(user: bytes, key: int, kind: int, time: int, value: float) -> bytes:
    """Return the record of an action; arguments as those of `Writes.act`."""
    return _RECORD.pack(_user_key(user), key, time, kind, value)


_user_key = lru_cache(1 << 16)(user_key)
