"""Sending cases to a server, many at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from loadtest.fuzz.cases import METHODS, Case, case
from loadtest.fuzz.judging import BUSY, OUTCOMES, Tally, judge

PATIENCE_SECONDS = 60.0
"""How long an answer may take before the case has failed."""

_OWN_ERROR = "Internal error from Core"
"""What grpc.aio calls a message that was on its way out when the other side ended the stream; how it did is lost."""

_ATTEMPTS = 5


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
