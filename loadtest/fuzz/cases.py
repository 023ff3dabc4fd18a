"""The cases: malformed requests, always the same of one seed and number."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recall.v1 import ingest_pb2, recall_pb2

from loadtest.fuzz.messages import any_field, fields_of, message, varint

MAX_BYTES = 4 << 20
"""The largest request that a server takes by default."""

_STOCK = 1_000


@dataclass(frozen=True)
class Method:
    """An RPC: what it takes and gives, and whether as a stream."""

    path: str
    request: Any
    response: Any
    streams: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


METHODS = (
    Method("/recall.v1.RecallService/Recall", recall_pb2.RecallRequest, recall_pb2.RecallResponse),
    Method("/recall.v1.IngestService/Report", ingest_pb2.ReportRequest, ingest_pb2.ReportResponse),
    Method(
        "/recall.v1.IngestService/ReportStream",
        ingest_pb2.ReportStreamRequest,
        ingest_pb2.ReportStreamResponse,
        streams=True,
    ),
    Method(
        "/recall.v1.IngestService/UpsertItems", ingest_pb2.UpsertItemsRequest, ingest_pb2.UpsertItemsResponse
    ),
)
_SHARES = tuple(itertools.accumulate((5, 3, 1, 2)))


@dataclass(frozen=True)
class Case:
    """What is sent: one message, or those of a stream."""

    number: int
    method: Method
    kind: str
    messages: tuple[bytes, ...]


def case(seed: int, number: int) -> Case:
    """Return a case; of one seed and number it is always the same."""
    draw = random.Random(seed * 2**40 + number)
    method = draw.choices(METHODS, cum_weights=_SHARES)[0]
    kind = draw.choices(_KIND_NAMES, cum_weights=_KIND_SHARES)[0]
    count = draw.choice((1, 1, 2, 3)) if method.streams else 1
    messages = tuple(_KINDS[kind](draw, method)[:MAX_BYTES] for _ in range(count))
    return Case(number, method, kind, messages)


def _random_bytes(draw: random.Random, method: Method) -> bytes:
    del method
    return draw.randbytes(draw.choice((0, 1, 2, 5, 10, 30, 100, 300, 2_000)))


def _structured(draw: random.Random, method: Method) -> bytes:
    """Well-formed, of extreme values: NaN, infinity, the ends of int64, NULs, long texts, fields that exclude others."""
    if draw.random() < 0.1:
        return message(draw, method.request.DESCRIPTOR, 0)
    # Messages of one type end to end are one again, so a stock makes many more than it has.
    stock = _stock(method)
    return draw.choice(stock) + (draw.choice(stock) if draw.random() < 0.3 else b"")


@functools.cache
def _stock(method: Method) -> list[bytes]:
    """Return some messages that are the same in every run: making one takes longer than to send it."""
    draw = random.Random(method.path)
    return [message(draw, method.request.DESCRIPTOR, 0) for _ in range(_STOCK)]


def _mutated(draw: random.Random, method: Method) -> bytes:
    data = bytearray(_structured(draw, method))
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(data) + 1)
        what = draw.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif what == 1 and at < len(data):
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif what == 2:
            data[at:at] = draw.randbytes(draw.randrange(1, 9))
        elif what == 3:
            del data[at : at + draw.randrange(1, 9)]
        elif what == 4:
            data[at:at] = data[draw.randrange(len(data) + 1) :][: draw.randrange(1, 64)]
        else:
            data += _structured(draw, method)
    return bytes(data)


def _truncated(draw: random.Random, method: Method) -> bytes:
    data = _structured(draw, method)
    return data[: draw.randrange(len(data) + 1)]


def _huge_varints(draw: random.Random, method: Method) -> bytes:
    """Numbers of up to 11 bytes as tags, lengths and values; lengths beyond what follows."""
    out = bytearray()
    for _ in range(draw.randrange(1, 6)):
        number = draw.choice((*_numbers(method), 0, 2**29 - 1, 2**29, 2**32))
        out += varint(number << 3 | draw.choice((0, 2)))
        huge = draw.choice((2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, draw.getrandbits(64), len(out) + 9))
        out += draw.choice(
            (varint(huge), b"\xff" * 10, b"\x80" * 10 + b"\x01", b"\x80\x80\x00", b"\xff" * 9 + b"\x01")
        )
        if draw.random() < 0.5:
            out += draw.randbytes(draw.randrange(12))
    return bytes(out)


def _nested(draw: random.Random, method: Method) -> bytes:
    """Groups in groups, and messages in messages, known fields and unknown ones."""
    depth = draw.choice((2, 50, 99, 100, 101, 200, 5_000))
    number = draw.choice((*_numbers(method), 200))
    if draw.random() < 0.5:
        inner = varint(number << 3 | 3) * depth
        return inner + (varint(number << 3 | 4) * draw.choice((depth, depth - 1, depth + 1, 0)))
    data = b"\x08\x01"
    for _ in range(min(depth, 300)):
        data = varint(number << 3 | 2) + varint(len(data)) + data
    return data


def _invalid_utf8(draw: random.Random, method: Method) -> bytes:
    """A well-formed message whose strings hold bytes that are no UTF-8."""
    return message(draw, method.request.DESCRIPTOR, 0, bad_text=True)


def _wrong_wire_types(draw: random.Random, method: Method) -> bytes:
    """Every field with a type of the wire that is not its own, inner messages included."""
    inner = b"".join(any_field(draw, n) for n in range(1, 16) if draw.random() < 0.7)
    parts = [any_field(draw, number) for number in _numbers(method) if draw.random() < 0.7]
    repeated = _repeated(method)
    if repeated:
        parts.append(varint(draw.choice(repeated) << 3 | 2) + varint(len(inner)) + inner)
    draw.shuffle(parts)
    return b"".join(parts)


def _enormous(draw: random.Random, method: Method) -> bytes:
    """A repeated field of a great many entries, up to the largest message: empty, small, or packed."""
    size = draw.choice((5_000, 20_000, 60_000, 60_000, 300_000, MAX_BYTES - 64))
    number = draw.choice((*_numbers(method), 99))
    entry = draw.choice((b"", b"\x08\x01", b"\x10\x01", draw.randbytes(3), b"\x0a\x00"))
    if draw.random() < 0.4:
        body = draw.choice((b"\x01", b"\xff" * 9 + b"\x01", bytes(8))) * (size // 8)
        body = body[:size]
        packed = varint(number << 3 | 2) + varint(len(body)) + body
        outer = draw.choice(_repeated(method) or [number])
        return packed if draw.random() < 0.5 else varint(outer << 3 | 2) + varint(len(packed)) + packed
    piece = varint(number << 3 | 2) + varint(len(entry)) + entry
    return piece * (size // len(piece))


_KINDS: dict[str, Callable[[random.Random, Method], bytes]] = {
    "random bytes": _random_bytes,
    "extreme values": _structured,
    "mutated": _mutated,
    "truncated": _truncated,
    "huge varints": _huge_varints,
    "deep nesting": _nested,
    "invalid UTF-8": _invalid_utf8,
    "wrong wire types": _wrong_wire_types,
    "enormous": _enormous,
}
_KIND_NAMES = tuple(_KINDS)
_KIND_SHARES = tuple(itertools.accumulate((12, 20, 25, 12, 10, 6, 7, 7.6, 0.4)))


def _numbers(method: Method) -> list[int]:
    return [each.number for each in fields_of(method.request.DESCRIPTOR)]


def _repeated(method: Method) -> list[int]:
    return [each.number for each in fields_of(method.request.DESCRIPTOR) if each.message is not None]
