"""Reading many values from the state store into one buffer: no object is made per value.

The protocol is RESP 2, that of Redis and Valkey: an array begins with `*<values>`, a value with `$<bytes>`, or is `$-1`
where there is no such key, and every line and value ends with CR and LF.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self, overload

import numpy as np
from numba import njit

from engine.core.types import Int64Array, UInt8Array

_ROOM = 1 << 18
"""Bytes to begin with: a batch of eight users who did a lot takes half of them."""

_ARRAY, _VALUE, _MINUS, _ZERO, _CR = b"*$-0\r"


class Values(Sequence[bytes | None]):
    """The values of some keys, in order; None for a key that is not there.

    Attributes:
        content: uint8[...], in which they lie.
        starts: int64[n], where each begins.
        sizes: int64[n], how many bytes it has; -1 where there is none.
    """

    __slots__ = ("content", "sizes", "starts")

    def __init__(self, content: UInt8Array, starts: Int64Array, sizes: Int64Array) -> None:
        self.content = content
        self.starts = starts
        self.sizes = sizes

    @classmethod
    def of(cls, values: Iterable[bytes | None]) -> Self:
        """Return some values as those of one reply."""
        lines = [b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value) for value in values]
        reply = bytearray(b"*%d\r\n%s" % (len(lines), b"".join(lines)))
        content = np.frombuffer(reply, np.uint8)
        found = cls(content, np.empty(len(lines), np.int64), np.empty(len(lines), np.int64))
        scan(content, len(reply), len(lines), np.zeros(2, np.int64), found.starts, found.sizes)
        return found

    @classmethod
    def joined(cls, parts: Sequence[tuple[Values, Int64Array]]) -> Self:
        """Return the values of several replies as those of one; with each comes int64[...], where its values stand."""
        count = sum(len(part) for part, _ in parts)
        starts, sizes = np.empty(count, np.int64), np.empty(count, np.int64)
        before = 0
        for part, places in parts:
            starts[places], sizes[places] = part.starts + before, part.sizes
            before += part.content.size
        return cls(np.concatenate([part.content for part, _ in parts]), starts, sizes)

    def __len__(self) -> int:
        return self.sizes.size

    @overload
    def __getitem__(self, at: int) -> bytes | None: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes | None]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes | None] | None:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(len(self)))]
        start, size = int(self.starts[at]), int(self.sizes[at])
        return None if size < 0 else self.content[start : start + size].tobytes()


class OtherReplyError(Exception):
    """What came is no array of values; an error of the server, as a rule.

    Attributes:
        arrays: how many came before it.
        content: what has come from there on.
    """

    def __init__(self, arrays: int, content: bytes) -> None:
        super().__init__("no array of values")
        self.arrays = arrays
        self.content = content


def receive_values(socket: Any, arrays: int, width: int) -> Values:
    """Read arrays of values to the last byte.

    Args:
        socket: where they come from, a `socket` or `SSLSocket`.
        arrays: how many.
        width: values in each.

    Raises:
        OtherReplyError: something else came.
        OSError: the connection failed, or gave more than it was asked for.
    """
    content = np.empty(_ROOM, np.uint8)
    values = Values(content, np.empty(arrays * width, np.int64), np.empty(arrays * width, np.int64))
    progress = np.zeros(2, np.int64)
    filled = 0
    while progress[1] < arrays * width:
        if filled == content.size:
            content = values.content = np.concatenate((content, np.empty_like(content)))
        received = socket.recv_into(content[filled:])
        if not received:
            raise ConnectionError("the connection was closed")
        filled += received
        if not scan(content, filled, width, progress, values.starts, values.sizes):
            raise OtherReplyError(int(progress[1]) // width, content[progress[0] : filled].tobytes())
    if progress[0] != filled:
        raise ConnectionError("more came than was asked for")
    values.content = content[:filled]
    return values


@njit(nogil=True, cache=True)
def scan(content, filled, width, progress, starts, sizes):  # type: ignore[no-untyped-def]
    """Find values in arrays, from where the last call stopped; return whether nothing else was met.

    Args:
        content: uint8[...], `filled` bytes of which have come.
        width: values in each array.
        progress: int64[2], in and out: the byte up to which all has been seen, and how many values that was.
        starts, sizes: int64[...], out: where each value begins, and its bytes; -1 for none.
    """
    at, found = progress[0], progress[1]
    whole = True
    while whole and found < starts.size:
        # At the first value of an array its header comes before: both are seen together or not at all.
        after = at
        number = np.int64(0)
        for header in range(2 if found % width == 0 else 1, 0, -1):
            if after < filled and content[after] != (_ARRAY if header == 2 else _VALUE):
                progress[0], progress[1] = at, found
                return False
            after += 1
            number = np.int64(0)
            negative = after < filled and content[after] == _MINUS
            after += negative
            while after < filled and content[after] != _CR:
                number = 10 * number + (np.int64(content[after]) - _ZERO)
                after += 1
            after += 2
            if header == 2 and after <= filled and (negative or number != width):
                progress[0], progress[1] = at, found
                return False
        if negative:
            number = np.int64(-1)
        else:
            after += number + 2
        whole = after <= filled
        if whole:
            starts[found], sizes[found] = after - 2 - number, number
            at, found = after, found + 1
    progress[0], progress[1] = at, found
    return True
