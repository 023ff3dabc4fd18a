"""The smallest grpc.aio server: every call gets the same bytes. What it can do is the ceiling of what we can."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import grpc

ECHO = "/bench.Echo/Echo"


def serve_echo(connection: Connection, size: int) -> None:
    """Answer with `size` bytes; sends the port over the connection, and ends when its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer = bytes(size)

    async def handle(_: bytes, __: Any) -> bytes:
        return answer

    async def run() -> None:
        instance = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        service, _, method = ECHO[1:].partition("/")
        handler = grpc.method_handlers_generic_handler(
            service, {method: grpc.unary_unary_rpc_method_handler(handle)}
        )
        instance.add_generic_rpc_handlers((handler,))
        port = instance.add_insecure_port("127.0.0.1:0")
        await instance.start()
        connection.send(port)
        try:
            await asyncio.to_thread(answer_questions, connection)
        finally:
            await instance.stop(0)

    asyncio.run(run())


def answer_questions(connection: Connection, *known: Callable[..., Any]) -> None:
    """Answer questions, each the name of a function and its arguments, until the other end closes."""
    functions = {function.__name__: function for function in known}
    try:
        while True:
            name, *arguments = connection.recv()
            try:
                connection.send(functions[name](*arguments))
            except Exception as error:  # who asked gets it
                connection.send(error)
    except EOFError:
        return
