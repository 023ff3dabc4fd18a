"""The control channel between the supervisor and a worker: JSON, a line per message, over a pair of Unix sockets.

The supervisor asks, the worker answers; a worker says nothing unasked. An answer has the `id` of its question, and comes
when it is ready, whatever was asked before it.

    {"id": 1, "do": "start", "config": "<TOML>", "store": "<folder>", "server": {...}, "state_url": "", "release": "R"}
    {"id": 1, "ok": {"release": "R"}}          loaded and warm; it does not listen yet
    {"id": 2, "do": "listen"}                  listens and says SERVING
    {"id": 3, "do": "ping"}                    answered between two batches
    {"id": 4, "do": "metrics"}                 ok: {"text": "<Prometheus' text format>"}
    {"id": 5, "do": "prepare", "release": "S"} loads S beside R and warms it up
    {"id": 6, "do": "swap"}                    S answers from the next batch on; or
    {"id": 6, "do": "abandon"}                 S is let go
    {"id": 7, "do": "stop"}                    drains and exits
    {"id": 5, "error": "SnapshotError", "text": "one sentence"}    instead of "ok"

start, listen, prepare, swap and abandon are done one after another, ping, metrics and stop at once. The end of the
channel tells either side that the other has ended: a worker whose supervisor is gone drains and exits.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from typing import Any

from engine.core.errors import RecallError

MAX_LINE_BYTES = 64 << 20
"""The longest message: a configuration, or the metrics of a worker, with much to spare."""


class WorkerError(RecallError):
    """A worker could not do what it was asked to.

    `kind` is the name of the error's class there.
    """

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


class WorkerLostError(RecallError):
    """The worker's process has ended, or its control channel."""


def line_of(message: dict[str, Any]) -> bytes:
    """Return a message as it goes over the channel."""
    return json.dumps(message).encode() + b"\n"


async def connect(
    control: socket.socket,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return the streams of a control channel's end, which belongs to them from now on."""
    control.setblocking(False)
    return await asyncio.open_unix_connection(sock=control, limit=MAX_LINE_BYTES)


class Control:
    """The supervisor's end of a control channel."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take the streams, and begin to read answers."""
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._ended = False
        self._reading = asyncio.create_task(self._read())

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Ask the worker for something and return what it answers.

        Raises:
            WorkerError: it could not.
            WorkerLostError: it has ended.
        """
        if self._ended:
            raise WorkerLostError("the worker has ended")
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._writer.write(line_of({"id": number, "do": command, **arguments}))
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    def tell(self, command: str) -> None:
        """Tell the worker something that has no answer."""
        if not self._ended:
            self._writer.write(line_of({"id": next(self._numbers), "do": command}))

    @property
    def over(self) -> bool:
        """Whether the worker has closed its end."""
        return self._ended

    async def ended(self) -> None:
        """Return when the worker has closed its end."""
        await asyncio.wait((self._reading,))

    async def close(self) -> None:
        """Close this end: a worker that still runs drains and exits."""
        self._reading.cancel()
        await self.ended()
        self._writer.close()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                answer = self._waiting.get(message["id"])
                if answer is None or answer.done():
                    continue
                if "error" in message:
                    answer.set_exception(WorkerError(message["text"], message["error"]))
                else:
                    answer.set_result(message["ok"])
        except (OSError, ValueError):
            pass  # cut off in the middle
        finally:
            self._ended = True
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(WorkerLostError("the worker has ended"))
