"""Send malformed requests to a real server: each must be refused as INVALID_ARGUMENT, or answered.

    python -m loadtest.fuzz --cases 1000000 --json fuzz.json

A server process of its own, the four RPCs, several processes that send over several connections with many calls under way
on each. Case n of a seed is always the same bytes, whatever ran before it: `--first N --cases 1` sends it again. A case
fails where the status is anything but OK or INVALID_ARGUMENT, where an answer cannot be read or does not add up, or where
the server is gone. One that a busy server refuses is sent again. The bytes of cases that fail are written to the folder
`--failures`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import random
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
from google.protobuf.message import DecodeError
from recall.v1 import ingest_pb2, recall_pb2

from engine.client import RecallClient
from engine.data.dataset import write_dataset
from loadtest.servers import ServerProcess, built

MAX_BYTES = 4 << 20
"""The largest request that a server takes by default."""

PATIENCE_SECONDS = 60.0
"""How long an answer may take before the case has failed."""

FAILURES_KEPT = 100
_STOCK = 1_000

_INT64 = (
    0,
    1,
    2,
    17,
    1_000,
    1_700_000_000,
    4_102_444_800,
    2**31 - 1,
    2**31,
    2**53,
    2**63 - 1,
    -1,
    -(2**31),
    -(2**63),
)
_FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 90.0, 91.0, -180.0, 181.0, 1e-310, 1e38, 3.5e38, 1e308)
_FLOATS += (float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "",
    "x",
    "click",
    "like",
    "default",
    "related",
    "itemcf",
    "fresh",
    "1",
    "\0",
    "a\0b",
    "\ufeff",
    "日本",
    "🍞" * 9,
)
_TEXTS += (
    "ü" * 128,
    "x" * 256,
    "x" * 257,
    "y" * 5_000,
    "\u202e\r\n\x1b[31m",
    "%s%n{0}",
    "'; --",
    "../../etc/passwd",
)
_BAD_UTF8 = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"abc\xf5\x80\x80\x80", b"\xe2\x82", b"x" * 200 + b"\x80")

OUTCOMES = ("OK", "INVALID_ARGUMENT")

BUSY = ("RESOURCE_EXHAUSTED", "CANCELLED")
"""Statuses of a call that an overloaded server, or gRPC in front of it, did not take."""

MOST_BUSY = 0.001
"""Share of the cases that a run may end without having been taken."""


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


# --- making cases ------------------------------------------------------------------------------------------


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
        return _message(draw, method.request.DESCRIPTOR, 0)
    # Messages of one type end to end are one again, so a stock makes many more than it has.
    stock = _stock(method)
    return draw.choice(stock) + (draw.choice(stock) if draw.random() < 0.3 else b"")


@functools.cache
def _stock(method: Method) -> list[bytes]:
    """Return some messages that are the same in every run: making one takes longer than to send it."""
    draw = random.Random(method.path)
    return [_message(draw, method.request.DESCRIPTOR, 0) for _ in range(_STOCK)]


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
        out += _varint(number << 3 | draw.choice((0, 2)))
        huge = draw.choice((2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, draw.getrandbits(64), len(out) + 9))
        out += draw.choice(
            (_varint(huge), b"\xff" * 10, b"\x80" * 10 + b"\x01", b"\x80\x80\x00", b"\xff" * 9 + b"\x01")
        )
        if draw.random() < 0.5:
            out += draw.randbytes(draw.randrange(12))
    return bytes(out)


def _nested(draw: random.Random, method: Method) -> bytes:
    """Groups in groups, and messages in messages, known fields and unknown ones."""
    depth = draw.choice((2, 50, 99, 100, 101, 200, 5_000))
    number = draw.choice((*_numbers(method), 200))
    if draw.random() < 0.5:
        inner = _varint(number << 3 | 3) * depth
        return inner + (_varint(number << 3 | 4) * draw.choice((depth, depth - 1, depth + 1, 0)))
    data = b"\x08\x01"
    for _ in range(min(depth, 300)):
        data = _varint(number << 3 | 2) + _varint(len(data)) + data
    return data


def _invalid_utf8(draw: random.Random, method: Method) -> bytes:
    """A well-formed message whose strings hold bytes that are no UTF-8."""
    return _message(draw, method.request.DESCRIPTOR, 0, bad_text=True)


def _wrong_wire_types(draw: random.Random, method: Method) -> bytes:
    """Every field with a type of the wire that is not its own, inner messages included."""
    inner = b"".join(_any_field(draw, n) for n in range(1, 16) if draw.random() < 0.7)
    parts = [_any_field(draw, number) for number in _numbers(method) if draw.random() < 0.7]
    repeated = _repeated(method)
    if repeated:
        parts.append(_varint(draw.choice(repeated) << 3 | 2) + _varint(len(inner)) + inner)
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
        packed = _varint(number << 3 | 2) + _varint(len(body)) + body
        outer = draw.choice(_repeated(method) or [number])
        return packed if draw.random() < 0.5 else _varint(outer << 3 | 2) + _varint(len(packed)) + packed
    piece = _varint(number << 3 | 2) + _varint(len(entry)) + entry
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


def _message(draw: random.Random, descriptor: Any, depth: int, bad_text: bool = False) -> bytes:
    """Serialize a message of a type, field by field, from values at and beyond the edges."""
    out = bytearray()
    for each in _fields(descriptor):
        # A request with everything in it at once is refused for one reason; most cases leave most fields out.
        chance = 0.9 if each.is_container else 0.35
        if draw.random() > chance:
            continue
        times = draw.choice((0, 1, 1, 2, 5, 30 if depth else 3)) if each.repeated else 1
        if each.repeated and each.packable and draw.random() < 0.8:
            body = b"".join(_scalar(draw, each) for _ in range(times))
            out += _varint(each.number << 3 | 2) + _varint(len(body)) + body
            continue
        for _ in range(times):
            if each.message is not None:
                body = _message(draw, each.message, depth + 1, bad_text) if depth < 4 else b""
                out += _varint(each.number << 3 | 2) + _varint(len(body)) + body
            elif each.text:
                body = _text(draw, each.name, bad_text)
                out += _varint(each.number << 3 | 2) + _varint(len(body)) + body
            else:
                out += _varint(each.number << 3 | each.wire_type) + _scalar(draw, each)
    return bytes(out)


@dataclass(frozen=True)
class _Field:
    """What is needed of a field's descriptor, looked up once: descriptors are slow to ask."""

    name: str
    number: int
    repeated: bool
    message: Any
    text: bool
    wire_type: int
    form: str

    @property
    def packable(self) -> bool:
        return self.message is None and not self.text

    @property
    def is_container(self) -> bool:
        return self.repeated and self.message is not None


_known_fields: dict[str, list[_Field]] = {}


def _fields(descriptor: Any) -> list[_Field]:
    found = _known_fields.get(descriptor.full_name)
    if found is None:
        found = [_field(each) for each in descriptor.fields]
        _known_fields[descriptor.full_name] = found
    return found


def _field(each: Any) -> _Field:
    forms = {each.TYPE_DOUBLE: (1, "<d"), each.TYPE_FLOAT: (5, "<f")}
    wire_type, form = forms.get(each.type, (0, ""))
    return _Field(
        name=each.name,
        number=each.number,
        repeated=each.is_repeated,
        message=each.message_type,
        text=each.type in (each.TYPE_STRING, each.TYPE_BYTES),
        wire_type=wire_type,
        form=form,
    )


def _scalar(draw: random.Random, each: _Field) -> bytes:
    if each.form == "<f":
        value = draw.choice(_FLOATS)
        return struct.pack("<f", value if abs(value) < 3e38 or value != value else float("inf"))
    if each.form:
        return struct.pack(each.form, draw.choice(_FLOATS))
    return _varint(draw.choice(_INT64) if draw.random() < 0.5 else draw.randrange(10_000))


def _text(draw: random.Random, name: str, bad: bool) -> bytes:
    if bad and draw.random() < 0.7:
        return draw.choice(_BAD_UTF8)
    if name in ("kind", "event") and draw.random() < 0.7:
        return b"click"
    if name == "scene" and draw.random() < 0.7:
        return b""
    return draw.choice(_TEXTS).encode()


def _any_field(draw: random.Random, number: int) -> bytes:
    kind = draw.randrange(8)
    tag = _varint(number << 3 | kind)
    if kind == 0:
        return tag + _varint(draw.getrandbits(draw.choice((7, 32, 64))))
    if kind == 1:
        return tag + draw.randbytes(8)
    if kind == 2:
        body = draw.randbytes(draw.randrange(20))
        return tag + _varint(len(body)) + body
    return tag + draw.randbytes(4)


def _numbers(method: Method) -> list[int]:
    return [each.number for each in _fields(method.request.DESCRIPTOR)]


def _repeated(method: Method) -> list[int]:
    return [each.number for each in _fields(method.request.DESCRIPTOR) if each.message is not None]


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# --- judging answers ---------------------------------------------------------------------------------------


def judge(sent: Case, answers: list[bytes]) -> str:
    """Return what is wrong with the answers to a case whose status is OK; "" where nothing is."""
    if len(answers) != len(sent.messages):
        return f"{len(answers)} answers to {len(sent.messages)} messages"
    for data, answer in zip(sent.messages, answers, strict=True):
        try:
            asked = sent.method.request.FromString(data)
        except DecodeError:
            return "no message, and not refused"
        try:
            got = sent.method.response.FromString(answer)
        except DecodeError:
            return "the answer cannot be read"
        wrong = _recall_is_wrong(asked, got) if sent.method is METHODS[0] else _ingest_is_wrong(asked, got)
        if wrong:
            return wrong
    return ""


def _recall_is_wrong(asked: Any, got: Any) -> str:
    if asked.HasField("limit") and len(got.candidates) > asked.limit:
        return f"{len(got.candidates)} candidates, the limit is {asked.limit}"
    broken = [report.channel for report in got.channels if report.status == recall_pb2.CHANNEL_STATUS_ERROR]
    return f"channels failed: {', '.join(broken)}" if broken else ""


def _ingest_is_wrong(asked: Any, got: Any) -> str:
    count = len(asked.changes if hasattr(asked, "changes") else asked.events)
    answered = got.accepted + len(got.refused) + getattr(got, "duplicates", 0)
    return "" if answered == count else f"{answered} of {count} entries answered"


# --- sending them ------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the cases.

    Attributes:
        outcomes: (method, kind, status) -> cases.
        failures: the first that failed: number, method, kind, why.
        failed: how many did.
    """

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0

    def add(self, other: Tally) -> None:
        """Count what another process sent."""
        self.outcomes += other.outcomes
        self.failed += other.failed
        self.failures = (self.failures + other.failures)[:FAILURES_KEPT]

    def note(self, sent: Case, status: str, wrong: str, folder: Path | None) -> None:
        """Count a case; keep one that failed."""
        self.outcomes[sent.method.name, sent.kind, status] += 1
        if status not in (*OUTCOMES, *BUSY) and not wrong:
            wrong = status
        if not wrong:
            return
        self.failed += 1
        if self.failed > FAILURES_KEPT:
            return
        failure = {"case": sent.number, "method": sent.method.name, "kind": sent.kind, "why": wrong}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files = [folder / f"{sent.number}-{sent.method.name}-{n}.bin" for n in range(len(sent.messages))]
            for file, message in zip(files, sent.messages, strict=True):
                file.write_bytes(message)
            failure["files"] = [str(file) for file in files]
        self.failures.append(failure)


def send(
    target: str, seed: int, numbers: range, connections: int, in_flight: int, folder: Path | None
) -> tuple[Tally, float]:
    """Send cases over some connections, so many under way on each; a streamed one is a call of its own.

    Args:
        target: the server.
        seed, numbers: which cases.
        connections: to the server.
        in_flight: calls under way on each.
        folder: where the bytes of cases that fail go.

    Returns:
        What became of them, and the seconds of processor time that it took.
    """
    began = time.process_time()
    tally = Tally()
    asyncio.run(_send(target, (case(seed, n) for n in numbers), tally, connections, in_flight, folder))
    return tally, time.process_time() - began


async def _send(
    target: str, cases: Iterator[Case], tally: Tally, connections: int, in_flight: int, folder: Path | None
) -> None:
    """Send cases over some connections, so many under way on each; a streamed one is a call of its own."""

    async def work(calls: dict[str, Any]) -> None:
        for each in cases:
            for attempt in range(_ATTEMPTS):
                status, answers = await _call(calls[each.method.name], each)
                if _OWN_ERROR not in status and status not in BUSY:
                    break
                await asyncio.sleep(0.01 * attempt)
            wrong = judge(each, answers) if status == "OK" else ""
            tally.note(each, status, wrong, folder)

    async with contextlib.AsyncExitStack() as stack:
        workers = []
        for _ in range(connections):
            options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
            limits = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target, (*options, *limits)))
            calls = {
                method.name: (channel.stream_stream if method.streams else channel.unary_unary)(method.path)
                for method in METHODS
            }
            workers += [work(calls) for _ in range(in_flight)]
        await asyncio.gather(*workers)


async def _call(call: Any, sent: Case) -> tuple[str, list[bytes]]:
    if sent.method.streams:
        return await _stream(call(timeout=PATIENCE_SECONDS), sent.messages)
    try:
        return "OK", [await call(sent.messages[0], timeout=PATIENCE_SECONDS)]
    except grpc.RpcError as error:
        return _status(error.code(), error.details()), []


async def _stream(stream: Any, messages: tuple[bytes, ...]) -> tuple[str, list[bytes]]:
    answers = []
    # The server ends a stream at the first message it cannot read; its status says so, and not what fails after that.
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
        for message in messages:
            await stream.write(message)
            answer = await stream.read()
            if answer is grpc.aio.EOF:
                break
            answers.append(answer)
        await stream.done_writing()
    return _status(await stream.code(), await stream.details()), answers


def _status(code: grpc.StatusCode, details: str | None) -> str:
    if code.name in OUTCOMES or (code.name in BUSY and _OWN_ERROR not in (details or "")):
        return code.name
    return f"{code.name}: {details}"[:300]


_OWN_ERROR = "Internal error from Core"
"""What grpc.aio calls a message that was on its way out when the other side ended the stream; how it did is lost."""

_ATTEMPTS = 5


def run(
    folder: Path,
    cases: int,
    seed: int = 1,
    first: int = 0,
    ids: str = "int64",
    small: bool = False,
    processes: int = 1,
    workers: int = 1,
    connections: int = 4,
    in_flight: int = 4,
    failures: Path | None = None,
) -> dict[str, Any]:
    """Build a release in a folder, serve it, and send cases `first` to `first + cases`.

    Args:
        folder: for the release, the state store and the log.
        cases: how many.
        seed: which.
        first: number of the first.
        ids: "int64" or "string".
        small: whether to serve a few hundred items instead of the bundled sample, whose ids are int64.
        processes: that send.
        workers: of the server.
        connections: of each process.
        in_flight: calls under way on each.
        failures: where the bytes of cases that fail go; None: nowhere.

    Returns:
        The report.
    """
    built(folder, small_data(folder / "data", ids) if small or ids == "string" else None)
    config = Path(__file__).parents[1] / "engine" / "recall.toml"
    server = ServerProcess(folder, config, workers=workers)
    server.start()
    tally, used = Tally(), 0.0
    try:
        server.wait_for_log(f"{workers} of {workers} workers serve")
        before = resident(server)
        began = time.monotonic()
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            shares = [range(first + n, first + cases, processes) for n in range(processes)]
            asked = [
                pool.submit(send, server.target, seed, share, connections, in_flight, failures)
                for share in shares
            ]
            for each in asked:
                part, seconds = each.result()
                tally.add(part)
                used += seconds
        spent = time.monotonic() - began
        after = resident(server)
        alive = serves(server.target)
    finally:
        server.stop()
    log = server.log_text().splitlines()
    bad = [line for line in log if " ERROR " in line or " CRITICAL " in line or line.startswith("Traceback")]
    outcomes: dict[str, Any] = {}
    for (method, kind, status), count in sorted(tally.outcomes.items()):
        outcomes.setdefault(method, {}).setdefault(kind, {})[status] = count
    return {
        "seed": seed,
        "first": first,
        "cases": tally.outcomes.total(),
        "ids": ids,
        "seconds": round(spent, 1),
        "cases_per_second": round(tally.outcomes.total() / spent, 1),
        "client_cpu_microseconds_per_case": round(used / max(tally.outcomes.total(), 1) * 1e6, 1),
        "failed": tally.failed,
        "failures": tally.failures,
        "serves_afterwards": alive,
        "errors_in_the_log": len(bad),
        "first_errors_in_the_log": bad[:10],
        "resident_bytes": {"before": before, "after": after},
        "statuses": _by_status(tally),
        "outcomes": outcomes,
    }


def passed(report: dict[str, Any]) -> bool:
    """Whether a run found nothing."""
    busy = sum(report["statuses"][status] for status in BUSY)
    sound = not report["failed"] and not report["errors_in_the_log"] and busy <= MOST_BUSY * report["cases"]
    return sound and bool(report["serves_afterwards"])


def _by_status(tally: Tally) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (_method, _kind, status), count in tally.outcomes.items():
        counts[status] += count
    return counts


def serves(target: str) -> bool:
    """Whether a server answers an ordinary request."""
    try:
        with RecallClient(target, timeout=10.0) as client:
            client.wait_ready(10.0)
            return bool(client.recall(limit=10).candidates)
    except (grpc.RpcError, TimeoutError):
        return False


def resident(server: ServerProcess) -> int:
    """Resident bytes of a server and the processes it has started; 0 where the system does not say."""
    total, waiting = 0, [server.pid]
    page = os.sysconf("SC_PAGE_SIZE")
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            total += int((process / "statm").read_text().split()[1]) * page
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, IndexError):
            continue
    return total


def small_data(folder: Path, ids: str) -> Path:
    """Write a small data set whose ids are of a type, and return its folder."""
    draw = random.Random(1)
    rows = [(draw.randrange(60), draw.randrange(200)) for _ in range(2_000)]
    columns = {
        "user_id": [user if ids == "int64" else f"user-{user}" for user, _ in rows],
        "item_id": [item if ids == "int64" else f"item-{item}" for _, item in rows],
        "event": ["click"] * len(rows),
        "timestamp": [1_700_000_000 + n for n in range(len(rows))],
    }
    write_dataset(folder, pa.table(columns), meta={"name": "small", "id_type": ids})
    return folder


def main() -> None:
    """Run it from the command line; exit status 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--ids", choices=("int64", "string"), default="int64")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that send")
    parser.add_argument("--workers", type=int, default=1, help="of the server")
    parser.add_argument("--connections", type=int, default=4, help="of each process")
    parser.add_argument("--in-flight", type=int, default=4, help="calls under way on each connection")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--json", type=Path, help="write the report there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recall-fuzz-") as folder:
        report = run(
            Path(folder),
            arguments.cases,
            arguments.seed,
            arguments.first,
            arguments.ids,
            processes=arguments.processes,
            workers=arguments.workers,
            connections=arguments.connections,
            in_flight=arguments.in_flight,
            failures=arguments.failures,
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{report['cases']:,} cases in {report['seconds']:,} s ({report['cases_per_second']:,} a second): "
        f"{report['failed']:,} failed; {report['statuses']}; {report['errors_in_the_log']} errors in the server's log"
    )
    for failure in report["failures"][:20]:
        print(f"case {failure['case']}: {failure['method']}, {failure['kind']}: {failure['why']}")
    for line in report["first_errors_in_the_log"]:
        print(line)
    raise SystemExit(0 if passed(report) else 1)


if __name__ == "__main__":
    main()
