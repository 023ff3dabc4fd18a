"""A stream of the state store that several processes follow, each from its own offset.

A stream `<key>` has `<key>:trimmed` beside it, the last entry that was deleted from its front: whoever writes or trims
keeps it, so that a reader knows when entries that it has not seen are gone. Offsets are the stream's entry ids,
`<milliseconds>-<number>`; `offset_key` makes them comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.state.nodes import Argument
from engine.state.store import Script, StateStore

START = "0-0"
"""The offset before every entry."""

WRITE_SECONDS = 10.0
"""How long a command may take that writes or reads many entries."""


class FollowedStream:
    """Reads one stream; safe to use from several threads.

    Every method raises StateUnavailableError where the store does not answer.
    """

    def __init__(self, store: StateStore, key: str) -> None:
        """Read the stream of a key; in a cluster the key has a hash tag, which what lies beside it shares."""
        self._store = store
        self._stream = key.encode()
        self._trimmed = self._stream + b":trimmed"

    def clock(self) -> int:
        """Return the store's clock, milliseconds since the epoch: what is written from now on is not earlier."""
        seconds, microseconds = self._store.execute("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    def end(self) -> str:
        """Return the offset of the newest entry that there ever was; `START` where there was none."""
        return self._end_of(self._store.pipeline([("XINFO", "STREAM", self._stream)])[0])

    def first(self) -> str | None:
        """Return the offset of the oldest entry; None where there is none."""
        entries = self._store.execute("XRANGE", self._stream, "-", "+", "COUNT", 1)
        return entries[0][0].decode() if entries else None

    def missed(self, after: str) -> bool:
        """Whether a reader that has taken in everything up to an offset can no longer read all that followed.

        So it is when entries behind the offset were trimmed, and when the store's stream ends before the offset: the
        store lost what was there, or is another one.
        """
        return self._misses(after, self._store.pipeline(self._what_is_left()))

    def _range(self, after: str, count: int) -> list[tuple[bytes, list[bytes]]]:
        """Return entries behind an offset, oldest first: (offset, names and values of its fields)."""
        entries: list[tuple[bytes, list[bytes]]] = self._store.execute(
            "XRANGE", self._stream, f"({after}", "+", "COUNT", count, timeout=WRITE_SECONDS
        )
        return entries

    def _followed(
        self, after: str, count: int, block_ms: int
    ) -> tuple[list[tuple[bytes, list[bytes]]], bool]:
        """Wait for entries behind an offset; as `_range`, in one round trip with `missed`.

        Args:
            after: the offset.
            count: how many at most.
            block_ms: how long to wait for the first one where there is none; 0: not at all. Stores look up from time to
                time only whether somebody has waited long enough, often ten times a second.
        """
        block = ("BLOCK", block_ms) if block_ms else ()
        found, *facts = self._store.pipeline(
            [
                ("XREAD", *block, "COUNT", count, "STREAMS", self._stream, after),
                *self._what_is_left(),
            ],
            timeout=block_ms / 1000 + WRITE_SECONDS,
        )
        if isinstance(found, Exception):
            raise self._store.refused(found)
        return (found[0][1] if found else []), self._misses(after, facts)

    def _what_is_left(self) -> list[tuple[bytes | str, ...]]:
        return [("GET", self._trimmed), ("XINFO", "STREAM", self._stream)]

    def _misses(self, after: str, facts: Sequence[Any]) -> bool:
        trimmed, stream = facts
        if isinstance(trimmed, Exception):
            raise self._store.refused(trimmed)
        if trimmed is not None and offset_key(trimmed.decode()) > offset_key(after):
            return True
        return offset_key(self._end_of(stream)) < offset_key(after)

    def _end_of(self, facts: Any) -> str:
        """Return the newest offset that there ever was, from the reply to XINFO STREAM."""
        if isinstance(facts, Exception):
            if "no such key" in str(facts):  # the stream was never written to
                return START
            raise self._store.refused(facts)
        end: bytes = facts[facts.index(b"last-generated-id") + 1]
        return end.decode()

    def _run(
        self, script: Script, calls: Sequence[tuple[Sequence[bytes], Sequence[Argument]]], timeout: float
    ) -> list[Any]:
        replies = self._store.run_script(script, calls, timeout)
        for reply in replies:
            if isinstance(reply, Exception):
                raise self._store.refused(reply)
        return replies


def offset_key(offset: str) -> tuple[int, int]:
    """Return what offsets compare by."""
    milliseconds, _, number = offset.partition("-")
    return int(milliseconds), int(number or 0)
