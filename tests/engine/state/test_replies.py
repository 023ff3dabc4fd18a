"""Replies in pieces, with errors among them, and the columns of records that they hold."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.exposure import ExposureLayout, add
from engine.data.ids import IdIndex
from engine.data.live import LiveIds
from engine.state.layout import RECORD, STATE_SUFFIXES
from engine.state.records import collect, read_histories
from engine.state.replies import OtherReplyError, Values, receive_values

KINDS = len(STATE_SUFFIXES)

value = st.none() | st.binary(max_size=30) | st.just(b"\r\n$5\r\n*1\r\n")


class Pieces:
    """A socket from which a reply comes in pieces."""

    def __init__(self, content: bytes, lengths: Sequence[int]) -> None:
        ends = itertools.accumulate(lengths)
        cuts = [0, *itertools.takewhile(lambda end: end < len(content), ends), len(content)]
        self.pieces = [content[a:b] for a, b in itertools.pairwise(cuts)]

    def recv_into(self, buffer: np.ndarray) -> int:
        piece = self.pieces.pop(0)
        room = memoryview(buffer)
        taken = min(len(piece), len(room))
        if taken < len(piece):
            self.pieces.insert(0, piece[taken:])
        room[:taken] = piece[:taken]
        return taken


def packed(values: Sequence[bytes | None]) -> bytes:
    parts = [b"*%d\r\n" % len(values)]
    parts += [b"$-1\r\n" if each is None else b"$%d\r\n%s\r\n" % (len(each), each) for each in values]
    return b"".join(parts)


@settings(max_examples=300, deadline=None)
@given(
    arrays=st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(value, min_size=width, max_size=width), min_size=1, max_size=4)
    ),
    lengths=st.lists(st.integers(1, 25), max_size=40),
)
def test_values_are_found_however_the_reply_is_cut(
    arrays: list[list[bytes | None]], lengths: list[int]
) -> None:
    reply = b"".join(map(packed, arrays))
    found = receive_values(Pieces(reply, lengths), len(arrays), len(arrays[0]))
    assert list(found) == [each for array in arrays for each in array]
    assert list(Values.of(found)) == list(found)
    assert found[1:] == list(found)[1:]


def test_a_reply_larger_than_the_buffer_is_read() -> None:
    values = [bytes([at]) * 300_000 for at in range(4)]
    assert list(receive_values(Pieces(packed(values), []), 1, 4)) == values


@pytest.mark.parametrize("reply", [b"-ERR no\r\n", b"+OK\r\n", b"*3\r\n$1\r\na\r\n", b"*-1\r\n", b":1\r\n"])
def test_another_reply_is_handed_on(reply: bytes) -> None:
    with pytest.raises(OtherReplyError) as raised:
        receive_values(Pieces(packed([b"a", None]) + reply, []), 2, 2)
    assert (raised.value.arrays, raised.value.content) == (1, reply)


def test_a_connection_that_ends_or_says_too_much_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"*1\r\n$5\r\nab")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError, match="closed"):
            receive_values(ours, 1, 1)
    with pytest.raises(ConnectionError, match="more"):
        receive_values(Pieces(packed([b"a"]) + b"+OK\r\n", []), 1, 1)


def test_values_of_several_replies_take_their_places() -> None:
    parts = [
        (Values.of([b"c", None]), np.array([2, 3])),
        (Values.of([b"a", b"b", None, b""]), np.array([0, 1, 4, 5])),
    ]
    assert list(Values.joined(parts)) == [b"a", b"b", b"c", None, None, b""]


record = st.tuples(st.integers(-5, 5), st.integers(1, 3), st.floats(0, 1, width=32), st.integers(0, 9))
records = st.none() | st.tuples(st.lists(record, max_size=5), st.integers(0, 2), st.sampled_from(["", "x"]))
bits = st.none() | st.lists(st.integers(0, 100), max_size=5)


@settings(max_examples=200, deadline=None)
@given(
    users=st.lists(st.none() | st.tuples(st.tuples(*[records] * KINDS), st.tuples(*[bits] * 2)), max_size=4)
)
def test_collecting_equals_the_plain_rule(users: list) -> None:
    values: list[bytes | None] = []
    kept = [[np.zeros(0, RECORD) for _ in users] for _ in range(KINDS)]
    damaged = 0
    shown = [[] for _ in users]
    for u, user in enumerate(users):
        for kind, given_ in enumerate(user[0] if user else ()):
            if given_ is None:
                values.append(None)
                continue
            content, room, tail = np.array(given_[0], RECORD), np.zeros(given_[1], RECORD), given_[2].encode()
            values.append(content.tobytes() + room.tobytes() + tail)
            damaged += bool(tail)
            if not tail:
                kept[kind][u] = content
        for keys in user[1] if user else ():
            values.append(add(None, keys, ExposureLayout(10, 10, 7)) if keys else None)
            shown[u] += [values[-1]] * bool(keys)
    asked = np.array([user is not None for user in users], np.bool_)
    read, width = Values.of(values), KINDS + 2
    offsets, words = collect(read.content, read.starts, read.sizes, asked, width, 0, KINDS)
    expected = [part for parts in kept for part in parts]
    assert offsets.tolist() == [0, *itertools.accumulate(map(len, expected))]
    assert words[: 3 * offsets[-1]].tobytes() == b"".join(part.tobytes() for part in expected)
    later, _ = collect(read.content, read.starts, read.sizes, asked, width, 2, 4)
    assert later.tolist() == (offsets[2 * asked.size : 4 * asked.size + 1] - offsets[2 * asked.size]).tolist()
    spans, owned = np.empty((len(values), 2), np.int64), np.empty(asked.size + 1, np.int64)
    nothing = [np.zeros(0, dtype) for dtype in (np.int32, np.float32, np.int64)]
    old = [np.zeros(1, np.int64), *map(np.copy, nothing)]
    for array in old:
        array.flags.writeable = False
    bad = read_histories(
        read.content, read.starts, read.sizes, asked, width,
        *LiveIds(IdIndex.of(np.zeros(0, np.int64))).key_tables, np.zeros(0, np.uint32), nothing[1],
        np.full(asked.size, -1, np.int32), *old, 10, 10, *nothing, np.empty(asked.size + 1, np.int64), spans, owned,
    )  # fmt: skip
    assert bad == damaged
    found = [read.content[start : start + size].tobytes() for start, size in spans[: owned[-1]].tolist()]
    assert [found[a:b] for a, b in itertools.pairwise(owned.tolist())] == shown
