"""A gRPC client for load alone: one process, one thread, HTTP/2 frames written and read by hand.

A general client makes objects, headers and callbacks for every call and costs as much as a small server, so that a
measurement on two cores measures the client. This one sends prepared bytes and reads no more of an answer than its frame
headers: a few microseconds of Python a request. It sends a different message each time, which h2load cannot, and it can
send at moments that are due whether or not earlier answers have come (an open loop).

A unary answer that carries a message counts as answered. One that ends without a message is an error of gRPC's
(trailers only), and counts as refused: the status itself is not read, because that needs the whole of HPACK.

Frames and header compression: RFC 9113 and RFC 7541.
"""

from __future__ import annotations

import gc
import random
import select
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from engine.core.types import BoolArray, Float64Array, Int64Array

_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_FRAME = struct.Struct(">HBBBI")  # the length's upper 16 bits, its lower 8, kind, flags, stream
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_STREAM_WINDOW = 1 << 28
_CONNECTION_WINDOW = 1 << 30
_GIVE_BACK = 1 << 20
_RECEIVE = 1 << 18
_DRAIN_SECONDS = 5.0
"""How long answers to what was sent are waited for in the end; those that come later count as never answered."""


@dataclass(frozen=True)
class Load:
    """What to send.

    Attributes:
        port: on 127.0.0.1.
        path: the method's, as "/package.Service/Method".
        messages: serialized requests; each request takes one at random.
        connections: how many.
        in_flight: requests that are unanswered at any time, over all connections (a closed loop).
        rate: requests a second, sent when they are due (an open loop); 0 for a closed one.
        seconds: how long is measured.
        warm_up: seconds before that.
        seed: of the choice of messages.
    """

    port: int
    path: str
    messages: Sequence[bytes]
    connections: int = 8
    in_flight: int = 64
    rate: float = 0.0
    seconds: float = 5.0
    warm_up: float = 1.0
    seed: int = 1


@dataclass(frozen=True)
class Samples:
    """What became of the requests that ended, or were due, while it was measured.

    Attributes:
        seconds: how long was measured.
        waits: float64[n], seconds from when a request was sent, or due, to the end of its answer; NaN where none came.
        answered: bool[n], whether the answer carried a message.
        sizes: int64[n], bytes of the answer's DATA frames.
        completed: answers with a message that came while it was measured, whenever their requests were due.
        late: seconds that the client itself was behind at most (open loop).
        delays: float64[n], seconds from when a request was due to when the client sent it: a part of `waits` (open loop).
    """

    seconds: float
    waits: Float64Array
    answered: BoolArray
    sizes: Int64Array
    completed: int
    late: float = 0.0
    delays: Float64Array | None = None

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.completed / self.seconds

    def percentiles(self) -> dict[str, float]:
        """Return p50_ms, p90_ms and p99_ms of the answered."""
        waits = self.waits[self.answered]
        if not waits.size:
            return dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"), float("nan"))
        p50, p90, p99 = (np.percentile(waits, [50, 90, 99]) * 1e3).tolist()
        return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99}

    def p99_from_sent_ms(self) -> float:
        """Return the p99 of the answered from when each was sent: what the server had a part in."""
        if self.delays is None or not self.answered.any():
            return float("nan")
        return float(np.percentile((self.waits - self.delays)[self.answered], 99) * 1e3)


def send(load: Load, began: Connection | None = None) -> Samples:
    """Send a load and wait for the answers.

    Args:
        load: what to send.
        began: is sent the two moments, on the clock of time.perf_counter(), between which is measured.

    Raises:
        ConnectionError: the server ends a connection.
    """
    client = _Client(load)
    start = time.perf_counter() + load.warm_up
    end = start + load.seconds
    if began is not None:
        began.send((start, end))
    try:
        if load.rate:
            client.open_loop(start - load.warm_up, end)
        else:
            client.closed_loop(end)
    finally:
        client.close()
    return client.samples(start, end)


def send_for(connection: Connection, load: Load) -> None:
    """Send a load for another process; sends it the two moments, and then the samples or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # nothing here is part of a cycle, and what waits for a collection is sent late
    try:
        connection.send(send(load, connection))
    except Exception as error:  # the parent says what it was
        connection.send(error)


class _Stream:
    __slots__ = ("began", "sent", "size")

    def __init__(self, began: float) -> None:
        self.began = began
        self.sent = time.perf_counter()
        self.size = 0


class _Connection:
    def __init__(self, port: int, path: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = struct.pack(">HI", 2, 0) + struct.pack(
            ">HI", 4, _STREAM_WINDOW
        )  # no push; the window of a stream
        self.socket.sendall(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW, 0, 0, struct.pack(">I", _CONNECTION_WINDOW))
        )
        self.streams: dict[int, _Stream] = {}
        self._next = 1
        self._window = 65_535
        self._held: deque[tuple[bytes, float]] = deque()
        self._rest = b""
        self._unread = 0
        self._headers = _first_headers(path, port)

    def request(self, message: bytes, began: float) -> None:
        """Send a request; `message` has its gRPC prefix. Held back while the server's window is full."""
        if self._held or len(message) > self._window:
            self._held.append((message, began))
            return
        stream = self._next
        self._next += 2
        self._window -= len(message)
        self.streams[stream] = _Stream(began)
        headers, self._headers = self._headers, _LATER_HEADERS
        self.socket.sendall(
            _frame(_HEADERS, _END_HEADERS, stream, headers) + _frame(_DATA, _END_STREAM, stream, message)
        )

    def receive(self, ended: list[tuple[_Stream, bool]]) -> None:
        """Read what is there; adds the streams that ended, and whether a message came."""
        got = self.socket.recv(_RECEIVE)
        if not got:
            raise ConnectionError("the server closed a connection")
        data = self._rest + got if self._rest else got
        at, size = 0, len(data)
        while size - at >= 9:
            high, low, kind, flags, stream = _FRAME.unpack_from(data, at)
            length = high << 8 | low
            if size - at - 9 < length:
                break
            at += 9
            if kind == _DATA:
                self._unread += length
                open_ = self.streams.get(stream)
                if open_ is not None:
                    open_.size += length
                    if flags & _END_STREAM:
                        ended.append((self.streams.pop(stream), True))
            elif kind == _HEADERS:
                if flags & _END_STREAM:
                    open_ = self.streams.pop(stream, None)
                    if open_ is not None:
                        ended.append((open_, open_.size > 0))
            elif kind == _RESET:
                open_ = self.streams.pop(stream, None)
                if open_ is not None:
                    ended.append((open_, False))
            elif kind == _GOAWAY:
                raise ConnectionError(f"the server ends the connection: {data[at + 8 : at + length]!r}")
            else:
                self._control(kind, flags, stream, data[at : at + length])
            at += length
        self._rest = data[at:]
        if self._unread > _GIVE_BACK:
            self.socket.sendall(_frame(_WINDOW, 0, 0, struct.pack(">I", self._unread)))
            self._unread = 0

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            self.socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self.socket.sendall(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW and stream == 0:
            self._window += struct.unpack(">I", payload)[0]
            held, self._held = self._held, deque()
            for message, began in held:
                self.request(message, began)


class _Client:
    def __init__(self, load: Load) -> None:
        self._load = load
        self._connections = [_Connection(load.port, load.path) for _ in range(load.connections)]
        self._sockets = {each.socket: each for each in self._connections}
        self._messages = [struct.pack(">BI", 0, len(each)) + each for each in load.messages]
        self._draw = random.Random(load.seed).random
        self._done: list[tuple[float, float, bool, int, float]] = []
        self._late = 0.0

    def closed_loop(self, end: float) -> None:
        load = self._load
        for n in range(load.in_flight):
            self._send(self._connections[n % load.connections], time.perf_counter())
        while (now := time.perf_counter()) < end:
            for connection, times in self._receive(max(end - now, 0.0)):
                for _ in range(times):
                    self._send(connection, time.perf_counter())

    def open_loop(self, start: float, end: float) -> None:
        pause, due = 1.0 / self._load.rate, start
        turn = 0
        while due < end:
            now = time.perf_counter()
            while due <= now and due < end:
                self._late = max(self._late, now - due)
                self._send(self._connections[turn % len(self._connections)], due)
                turn += 1
                due += pause
            self._receive(max(due - time.perf_counter(), 0.0))
        while any(each.streams for each in self._connections) and time.perf_counter() < end + _DRAIN_SECONDS:
            self._receive(0.1)

    def _send(self, connection: _Connection, began: float) -> None:
        connection.request(self._messages[int(self._draw() * len(self._messages))], began)

    def _receive(self, patience: float) -> list[tuple[_Connection, int]]:
        """Wait for answers; returns the connections that have them, and how many."""
        found: list[tuple[_Connection, int]] = []
        # Not epoll: Python rounds its patience up to whole milliseconds, and what is due would be sent late.
        for ready in select.select(self._sockets, (), (), patience)[0]:
            ended: list[tuple[_Stream, bool]] = []
            connection = self._sockets[ready]
            connection.receive(ended)
            now = time.perf_counter()
            for stream, answered in ended:
                self._done.append((stream.began, now, answered, stream.size, stream.sent))
            found.append((connection, len(ended)))
        return found

    def samples(self, start: float, end: float) -> Samples:
        done = self._done
        completed = sum(answered and start <= ended < end for _, ended, answered, _, _ in done)
        if self._load.rate:
            # Of an open loop what counts is when a request was due, and that it was never answered counts too.
            lost = [stream.began for each in self._connections for stream in each.streams.values()]
            done = done + [(began, float("nan"), False, 0, began) for began in lost]
            done = [each for each in done if start <= each[0] < end]
        else:
            done = [each for each in done if start <= each[1] < end]
        began, ended, answered, sizes, sent = zip(*done, strict=True) if done else ((), (), (), (), ())
        return Samples(
            end - start,
            np.array(ended, np.float64) - np.array(began, np.float64),
            np.array(answered, np.bool_),
            np.array(sizes, np.int64),
            completed,
            self._late,
            np.array(sent, np.float64) - np.array(began, np.float64),
        )

    def close(self) -> None:
        for connection in self._connections:
            connection.socket.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    size = len(payload)
    return _FRAME.pack(size >> 8, size & 0xFF, kind, flags, stream) + payload


def _text(value: str) -> bytes:
    raw = value.encode()
    assert len(raw) < 127
    return bytes([len(raw)]) + raw


def _first_headers(path: str, port: int) -> bytes:
    """Headers of a connection's first request; four of them go into the server's table, where later ones name them."""
    return (
        b"\x83\x86"  # POST, http
        + b"\x44" + _text(path)
        + b"\x41" + _text(f"127.0.0.1:{port}")
        + b"\x40" + _text("te") + _text("trailers")
        + b"\x5f" + _text("application/grpc")
    )  # fmt: skip


_LATER_HEADERS = b"\x83\x86\xc1\xc0\xbf\xbe"
