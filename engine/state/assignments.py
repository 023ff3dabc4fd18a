"""The assignment log of a channel: which item went into which cluster, in the order in which all workers take it in.

    {prefix}:{vq:<channel>}            a stream, one entry per batch of the trainer; field "a": keys int64[n], clusters
                                       int32[n], biases float32[n], end to end, little-endian; field "r": the run; field
                                       "n": how many assignments there were in all, these included
    {prefix}:{vq:<channel>}:table      a hash: key of the item (8 bytes) -> cluster int32, bias float32; what holds now
    {prefix}:{vq:<channel>}:run        the run of the table
    {prefix}:{vq:<channel>}:total      how many assignments there were in all
    {prefix}:{vq:<channel>}:trimmed    the last entry that was deleted from the front of the stream
    {prefix}:{vq:<channel>}:lease      who trains, with a time to live

A *run* is one codebook and what became of it: clusters of another run are other clusters. It is named by the version of
the snapshot that the trainer began with; the bundles that come of it say so in their `log_position`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.core.types import Float32Array, Int32Array, Int64Array
from engine.state.store import Script, StateStore
from engine.state.stream import START, WRITE_SECONDS, FollowedStream

LENGTH = 2_000_000
"""Assignments that the stream keeps, 16 bytes each; who reads behind them reads the table."""

_ITEM_BYTES = 16
_SCRIPT_ITEMS = 1000
"""Assignments per script and entry: a thousandth of a second or two, in which the store does nothing else."""

_TABLE_FIELDS = 2000
_TRIMMED_AT_ONCE = 256

_VALUE = np.dtype([("cluster", "<i4"), ("bias", "<f4")])

_ASSIGN = Script("""
if redis.call('GET', KEYS[6]) ~= ARGV[5] then
  return redis.error_reply('LEASE another trainer writes')
end
if redis.call('GET', KEYS[5]) ~= ARGV[2] then
  return redis.error_reply('RUN the table is of another run')
end
local data, count = ARGV[1], tonumber(ARGV[3])
local fields = {}
for each = 1, count do
  fields[2 * each - 1] = string.sub(data, 8 * each - 7, 8 * each)
  fields[2 * each] = string.sub(data, 8 * count + 4 * each - 3, 8 * count + 4 * each)
      .. string.sub(data, 12 * count + 4 * each - 3, 12 * count + 4 * each)
end
redis.call('HSET', KEYS[4], unpack(fields))
local total = redis.call('INCRBY', KEYS[3], count)
local added = redis.call('XADD', KEYS[1], '*', 'a', data, 'r', ARGV[2], 'n', total)
local from, gone = '-', false
for each = 1, tonumber(ARGV[6]) do
  local entry = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 1)[1]
  if not entry or entry[1] == added or total - tonumber(entry[2][6]) < tonumber(ARGV[4]) then
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

_BEGIN = Script("""
if redis.call('GET', KEYS[3]) ~= ARGV[2] then
  return redis.error_reply('LEASE another trainer writes')
end
if redis.call('GET', KEYS[2]) == ARGV[1] then
  return 0
end
redis.call('UNLINK', KEYS[1])
redis.call('SET', KEYS[2], ARGV[1])
return 1
""")

_RENEW = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
""")

_LET_GO = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then
  return redis.call('DEL', KEYS[1])
end
return 0
""")


@dataclass(frozen=True, slots=True)
class Position:
    """How much of an assignment log a bundle holds.

    Attributes:
        run: of which codebook; "": that of the bundle's own snapshot, which no trainer went on from yet.
        offset: of the last entry that it holds.
    """

    run: str = ""
    offset: str = START

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read what `str` wrote; an empty text is a bundle that knows of no log."""
        run, _, offset = text.partition(" ")
        return cls(run, offset or START)

    def __str__(self) -> str:
        return f"{self.run} {self.offset}" if self.run else ""


@dataclass(frozen=True, slots=True)
class AssignedItems:
    """Items and their clusters.

    Attributes:
        keys: int64[n], of the items' ids; an item may come more than once, the last time counts.
        clusters: int32[n].
        biases: float32[n].
    """

    keys: Int64Array
    clusters: Int32Array
    biases: Float32Array

    @classmethod
    def empty(cls) -> AssignedItems:
        """Return none."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))

    @classmethod
    def join(cls, parts: list[AssignedItems]) -> AssignedItems:
        """Return all of some parts, in their order."""
        if not parts:
            return cls.empty()
        return cls(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.clusters for part in parts]),
            np.concatenate([part.biases for part in parts]),
        )

    @classmethod
    def decode(cls, data: bytes) -> AssignedItems:
        """Read the field of an entry."""
        n = len(data) // _ITEM_BYTES
        return cls(
            np.frombuffer(data, "<i8", n),
            np.frombuffer(data, "<i4", n, 8 * n),
            np.frombuffer(data, "<f4", n, 12 * n),
        )

    def encode(self) -> bytes:
        """Return the field of an entry."""
        return (
            self.keys.astype("<i8").tobytes()
            + self.clusters.astype("<i4").tobytes()
            + self.biases.astype("<f4").tobytes()
        )

    def __len__(self) -> int:
        return int(self.keys.size)

    def take(self, where: Any) -> AssignedItems:
        """Return some of them; `where` indexes the arrays."""
        return AssignedItems(self.keys[where], self.clusters[where], self.biases[where])

    def newest(self) -> AssignedItems:
        """Return each item once, as it was said last, in rising order of key."""
        _, place = np.unique(self.keys[::-1], return_index=True)
        return self.take(len(self) - 1 - place)


class AssignmentLog(FollowedStream):
    """The assignment log of one channel; safe to use from several threads.

    Every method raises StateUnavailableError where the store does not answer.

    Attributes:
        key: of the stream, and the beginning of the others' keys.
    """

    def __init__(self, store: StateStore, channel: str, length: int = LENGTH) -> None:
        """Read and write the log of a channel; `length`: assignments that the stream keeps."""
        self.key = f"{store.prefix}:{{vq:{channel}}}"
        super().__init__(store, self.key)
        self._table = self._stream + b":table"
        self._run_key = self._stream + b":run"
        self._total = self._stream + b":total"
        self._lease = self._stream + b":lease"
        self._length = length

    def run(self) -> str:
        """Return the run of the table; "" where nobody has trained yet."""
        run: bytes | None = self._store.execute("GET", self._run_key)
        return "" if run is None else run.decode()

    def begin(self, run: str, lease: Lease) -> bool:
        """Make the table that of a run; what an earlier run said is forgotten.

        Returns:
            Whether it was another run's.

        Raises:
            StateError: the lease is lost.
        """
        keys = (self._table, self._run_key, self._lease)
        return bool(self._run(_BEGIN, [(keys, (run, lease.token))], WRITE_SECONDS)[0])

    def write(self, items: AssignedItems, run: str, lease: Lease) -> str:
        """Write assignments to the log and the table; durable, as the store is, when this returns.

        Args:
            items: an entry of each thousand; none: nothing is written.
            run: of which codebook.
            lease: of the trainer that writes.

        Returns:
            The offset of the last entry; "" where there is none.

        Raises:
            StateError: the lease is lost, or the table is of another run; parts may have gone in.
        """
        keys = (self._stream, self._trimmed, self._total, self._table, self._run_key, self._lease)
        calls = []
        for start in range(0, len(items), _SCRIPT_ITEMS):
            part = items.take(slice(start, start + _SCRIPT_ITEMS))
            arguments = (part.encode(), run, len(part), self._length, lease.token, _TRIMMED_AT_ONCE)
            calls.append((keys, arguments))
        replies = self._run(_ASSIGN, calls, WRITE_SECONDS) if calls else []
        return replies[-1].decode() if replies else ""

    def read(self, after: str, run: str, entries: int, block_ms: int) -> tuple[AssignedItems, str, int, bool]:
        """Wait for assignments of a run behind an offset.

        Args:
            after: the offset.
            run: entries of another run are passed over.
            entries: how many at most.
            block_ms: how long to wait for the first one where there is none.

        Returns:
            The assignments; the offset of the last entry; how many entries there were; and whether others that should
            stand before them are gone.
        """
        found, missed = self._followed(after, entries, block_ms)
        mine = [AssignedItems.decode(fields[1]) for _, fields in found if fields[3] == run.encode()]
        return AssignedItems.join(mine), found[-1][0].decode() if found else after, len(found), missed

    def entries(self, run: str, since_ms: int = 0, count: int = 1000) -> Iterator[tuple[int, AssignedItems]]:
        """Go through what the stream holds of a run since a moment, oldest first, for people who look at it.

        Yields:
            When it was written, in milliseconds since the epoch, and the assignments of one entry.
        """
        after = f"{max(0, since_ms - 1)}-{2**63}"
        while found := self._range(after, count):
            for offset, fields in found:
                if fields[3] == run.encode():
                    yield int(offset.partition(b"-")[0]), AssignedItems.decode(fields[1])
            after = found[-1][0].decode()

    def table(self) -> Iterator[AssignedItems]:
        """Go through the table in pieces of some thousands; an item may come more than once.

        What changes meanwhile comes as it was or as it is; whoever notes `end` first and reads on from there misses
        nothing.
        """
        cursor: Any = 0
        while True:
            cursor, flat = self._store.execute(
                "HSCAN", self._table, cursor, "COUNT", _TABLE_FIELDS, timeout=WRITE_SECONDS
            )
            if flat:
                yield _of_table(flat[::2], flat[1::2])
            if int(cursor) == 0:
                return

    def lookup(self, keys: Int64Array) -> AssignedItems:
        """Return what the table says of some items; those that it does not have are left out."""
        parts = []
        for start in range(0, keys.size, _TABLE_FIELDS):
            wanted = [key.tobytes() for key in keys[start : start + _TABLE_FIELDS].astype("<i8")]
            values = self._store.execute("HMGET", self._table, *wanted, timeout=WRITE_SECONDS)
            there = [(key, value) for key, value in zip(wanted, values, strict=True) if value is not None]
            if there:
                parts.append(_of_table([key for key, _ in there], [value for _, value in there]))
        return AssignedItems.join(parts)

    def lease(self, seconds: float) -> Lease:
        """Return a lease that is not taken yet."""
        return Lease(self._store, self._lease, seconds)


class Lease:
    """The right to be the one who trains: a key of the store that vanishes when it is not renewed.

    Attributes:
        token: what the key holds while it is this one's.
        seconds: how long it lasts.
    """

    def __init__(self, store: StateStore, key: bytes, seconds: float) -> None:
        self.token = secrets.token_hex(16)
        self.seconds = seconds
        self._store = store
        self._key = key

    def take(self) -> bool:
        """Take it; False where another has it. StateUnavailableError where the store does not answer."""
        lifetime = round(self.seconds * 1000)
        return self._store.execute("SET", self._key, self.token, "NX", "PX", lifetime) is not None

    def left(self) -> float:
        """Return how many seconds the one who has it has left, at most; 0 where nobody has it."""
        left: int = self._store.execute("PTTL", self._key)
        return max(0, left) / 1000

    def renew(self) -> bool:
        """Keep it for as long again; False where it is lost."""
        return bool(self._called(_RENEW, round(self.seconds * 1000)))

    def let_go(self) -> None:
        """Give it back, unless it is another's already."""
        self._called(_LET_GO)

    def _called(self, script: Script, *arguments: int) -> int:
        reply = self._store.run_script(script, [((self._key,), (self.token, *arguments))])[0]
        if isinstance(reply, Exception):
            raise self._store.refused(reply)
        return int(reply)


def _of_table(keys: list[bytes], values: list[bytes]) -> AssignedItems:
    found = np.frombuffer(b"".join(values), _VALUE)
    return AssignedItems(np.frombuffer(b"".join(keys), "<i8"), found["cluster"].copy(), found["bias"].copy())
