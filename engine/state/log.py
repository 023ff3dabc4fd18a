"""The live log: every change of an item in the order in which all workers take it in, and a table of what holds now.

The log is a stream of the state store, the table a hash beside it, in one slot of a cluster:

    {prefix}:{log}            one entry per change that counted; field "c": a serialized recall.v1.ItemChange
    {prefix}:{log}:items      id as text -> `updated_at_ms` (8 bytes, little-endian), then the newest ItemChange
    {prefix}:{log}:trimmed    the last entry that was deleted from the front of the stream

One script compares a change with the table and writes both, so that they never disagree and of two changes of an item
the later wins on every worker, whichever comes first. What was taken down stays in the table, as a change that says so:
an older change that comes late must not bring it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recall.v1 import ingest_pb2 as pb

from engine.state.store import Script, StateStore
from engine.state.stream import START, WRITE_SECONDS, FollowedStream, offset_key

__all__ = ["MOST_MS", "START", "LiveLog", "LogChange", "PublishResult", "offset_key"]

MOST_MS = 2**53 - 1
"""The latest time that a change may have: the store's scripts count in float64."""

_SCRIPT_CHANGES = 500
"""Changes per script: a thousandth of a second or two, in which the store does nothing else."""

_TRIM_SECONDS = 60.0
_TABLE_FIELDS = 2000

_PUBLISH = Script("""
local stale, last = 0, false
for at = 1, #ARGV, 3 do
  local id, time, change = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local known = redis.call('HGET', KEYS[2], id)
  local entry = time .. change
  if known and struct.unpack('<I8', known) > struct.unpack('<I8', time) then
    stale = stale + 1
  elseif known ~= entry then
    redis.call('HSET', KEYS[2], id, entry)
    last = redis.call('XADD', KEYS[1], '*', 'c', change)
  end
end
return {last, stale}
""")

_TRIM = Script("""
local gone = redis.call('XREVRANGE', KEYS[1], '(' .. ARGV[1], '-', 'COUNT', 1)
if #gone == 0 then
  return 0
end
redis.call('SET', KEYS[2], gone[1][1])
return redis.call('XTRIM', KEYS[1], 'MINID', '=', ARGV[1])
""")


@dataclass(frozen=True, slots=True)
class LogChange:
    """A change of one item.

    Attributes:
        id: the item's external id.
        updated_at_ms: milliseconds since the epoch at the source, 0 to `MOST_MS`.
        item: what is known of it now; None: it was taken down.
    """

    id: int | str
    updated_at_ms: int
    item: pb.Item | None


@dataclass(frozen=True, slots=True)
class PublishResult:
    """What became of some changes: the position in the log behind them, and how many were older than the table."""

    offset: str
    stale: int


class LiveLog(FollowedStream):
    """The live log of a state store; safe to use from several threads.

    Every method raises StateUnavailableError where the store does not answer.
    """

    def __init__(self, store: StateStore) -> None:
        super().__init__(store, f"{store.prefix}:{{log}}")
        self._items = self._stream + b":items"

    def publish(self, changes: Sequence[LogChange]) -> PublishResult:
        """Write changes to the log and the table; what is older than the table changes nothing.

        A change that is there already, equal in time and content, is counted as taken and makes no new entry, so that
        sending changes again is harmless. Durable when this returns, as the store is. Atomic per item; where this
        raises, some of the changes may have gone in.
        """
        calls = []
        for start in range(0, len(changes), _SCRIPT_CHANGES):
            arguments: list[bytes] = []
            for change in changes[start : start + _SCRIPT_CHANGES]:
                time = change.updated_at_ms.to_bytes(8, "little")
                arguments += (str(change.id).encode(), time, _message(change).SerializeToString())
            calls.append(((self._stream, self._items), arguments))
        offset, stale = "", 0
        for last, old in self._run(_PUBLISH, calls, WRITE_SECONDS):
            offset = last.decode() if last else offset
            stale += old
        return PublishResult(offset or self.end(), stale)

    def read(self, after: str, count: int) -> list[tuple[str, bytes]]:
        """Return entries behind an offset, oldest first: (offset, serialized ItemChange).

        Args:
            after: the offset.
            count: how many at most.
        """
        return [(offset.decode(), fields[1]) for offset, fields in self._range(after, count)]

    def replay(self, after: str, count: int) -> Iterator[tuple[list[bytes], str]]:
        """Read from an offset to the end, `count` entries at a time.

        Yields:
            Serialized ItemChanges, oldest first, and the offset of the last of them.
        """
        while entries := self._range(after, count):
            after = entries[-1][0].decode()
            yield [fields[1] for _, fields in entries], after

    def follow(self, after: str, count: int, block_ms: int) -> tuple[list[tuple[str, bytes]], bool]:
        """Wait for entries behind an offset; as `read`, in one round trip with `missed`.

        Args:
            after: the offset.
            count: how many at most.
            block_ms: how long to wait for the first one where there is none.

        Returns:
            The entries, and whether others that should stand before them are gone.
        """
        entries, missed = self._followed(after, count, block_ms)
        return [(offset.decode(), fields[1]) for offset, fields in entries], missed

    def table(self) -> Iterator[list[bytes]]:
        """Go through the table: the newest ItemChange of every item, serialized, in pieces of some thousands.

        An item may come more than once. What changes meanwhile comes as it was or as it is; whoever notes `end` first
        and reads on from there misses nothing.
        """
        cursor: Any = 0
        while True:
            cursor, flat = self._store.execute(
                "HSCAN", self._items, cursor, "COUNT", _TABLE_FIELDS, timeout=WRITE_SECONDS
            )
            if flat:
                yield [value[8:] for value in flat[1::2]]
            if int(cursor) == 0:
                return

    def trim(self, before: str) -> int:
        """Delete the entries before an offset and return how many they were; who still needs them reads the table."""
        if offset_key(before) == (0, 0):
            return 0
        calls = [((self._stream, self._trimmed), (before,))]
        return int(self._run(_TRIM, calls, _TRIM_SECONDS)[0])


def _message(change: LogChange) -> pb.ItemChange:
    message = pb.ItemChange(updated_at_ms=change.updated_at_ms)
    if isinstance(change.id, str):
        message.item_key = change.id
    else:
        message.item_id = change.id
    if change.item is None:
        message.take_down = True
    else:
        message.put.CopyFrom(change.item)
    return message
