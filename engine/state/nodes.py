"""The servers that a state store is made of, a node each: their connections, and how commands are sent to them.

Commands go out as packed buffers, one per node and call, and their replies are read in order. redis-py's own pipeline
costs several times the processor time per command, and its cluster pipeline refuses scripts and MGET.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

from hiredis import pack_command
from redis import connection as redis_connection
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from engine.core.errors import StateError, StateUnavailableError
from engine.state.lookout import readable
from engine.state.replies import OtherReplyError, Values, receive_values
from engine.state.url import UNREADABLE

Argument: TypeAlias = bytes | str | int | float
Command: TypeAlias = Sequence[Argument]
Connection: TypeAlias = Any
"""A connection of redis-py, whose methods have no types."""

Answer = TypeVar("Answer")

_redis: Any = redis_connection

COMMAND_SECONDS = 5.0
"""How long a command other than the users' read may take: a disk that is busy holds an fsync for seconds."""

REST_SECONDS = 0.25
"""How long a node that failed is not asked again."""

_PIECE = 16
"""Commands sent together."""


@dataclass
class Node:
    """One server: its idle connections, and when it may be asked again after it failed."""

    address: str
    options: dict[str, Any] = field(repr=False)  # the password is among them
    connection_class: Callable[..., Connection]
    # By time limit: a connection carries its own.
    idle: dict[float, list[Connection]] = field(default_factory=dict)
    rests_until: float = 0.0
    rests_for: float = 0.0  # the time limit up to which commands are not asked meanwhile
    failure: str = ""

    def take(self, timeout: float) -> Connection:
        """Return a connection that is open and has nothing left to read."""
        if time.monotonic() < self.rests_until and timeout <= self.rests_for:
            raise StateUnavailableError(self.failure)
        idle = self.idle.setdefault(timeout, [])
        try:
            while idle:
                connection = idle.pop()
                if not _stale(connection):
                    return connection
                connection.disconnect()
            connection = self.connection_class(
                **self.options, socket_timeout=timeout, socket_connect_timeout=timeout
            )
            connection.connect()
            return connection
        except IndexError:  # another thread took the last one
            return self.take(timeout)
        except (RedisError, OSError) as error:
            raise self.failed(error, timeout) from None

    def give(self, connection: Connection, timeout: float) -> None:
        """Take a connection back whose replies have all been read."""
        self.idle[timeout].append(connection)

    def failed(self, error: Exception, timeout: float) -> StateUnavailableError:
        """Return the error to raise; the node rests for a moment.

        That it took longer than the users' read may take says nothing about a write, which may take much longer.
        """
        self.failure = f"the state store at {self.address} does not answer: {one_line(error)}"
        self.rests_until = time.monotonic() + REST_SECONDS
        self.rests_for = timeout if isinstance(error, (RedisTimeoutError, TimeoutError)) else math.inf
        return StateUnavailableError(self.failure)

    def close(self) -> None:
        """Close the connections that are not in use."""
        for idle in list(self.idle.values()):
            while idle:
                idle.pop().disconnect()


Part: TypeAlias = tuple[Node, Iterable[bytes], Callable[[Connection], Answer]]
"""A node, what is sent to it, and what reads its answer."""


def exchange(parts: Sequence[tuple[Node, Sequence[Command]]], timeout: float) -> list[list[Any]]:
    """Send each node its commands, then read all replies: as many round trips as there are nodes, at the same time."""
    return converse([(node, *plainly(commands)) for node, commands in parts], timeout)


def converse(parts: Sequence[Part[Answer]], timeout: float) -> list[Answer]:
    """Send each node what is for it, then read what each answers."""
    return begin(parts, timeout)()


def begin(parts: Sequence[Part[Answer]], timeout: float) -> Callable[[], list[Answer]]:
    """Send each node what is for it; what is returned reads what each answers, to be called once.

    Where it never is, the connections are lost, and nobody else reads those answers.
    """
    connections: list[Connection] = []
    try:
        for node, pieces, _read in parts:
            connection = node.take(timeout)
            connections.append(connection)
            for piece in pieces:  # past redis-py, which has as much to do for it as the system
                connection._sock.sendall(piece)
    except BaseException as error:
        for connection in connections:
            connection.disconnect()
        if isinstance(error, (RedisError, OSError)):
            raise node.failed(error, timeout) from None
        raise
    return partial(_receive, parts, connections, timeout)


def _receive(
    parts: Sequence[Part[Answer]], connections: Sequence[Connection], timeout: float
) -> list[Answer]:
    answers: list[Answer] = []
    try:
        for (node, _pieces, read), connection in zip(parts, connections, strict=True):
            answers.append(read(connection))
            node.give(connection, timeout)
    except (RedisError, OSError) as error:
        raise node.failed(error, timeout) from None
    finally:
        for connection in connections[len(answers) :]:
            connection.disconnect()
    return answers


def plainly(commands: Sequence[Command]) -> tuple[Iterable[bytes], Callable[[Connection], list[Any]]]:
    """Return commands as they are sent, and what reads a list of their replies."""
    return in_pieces(commands), lambda connection: [_reply(connection) for _ in commands]


def in_pieces(commands: Sequence[Command]) -> Iterable[bytes]:
    """Return commands as they are sent."""
    # In pieces, so that the node works on the first while the next is packed. Without the look at every word that
    # redis-py takes first: that is five times slower.
    for start in range(0, len(commands), _PIECE):
        piece = commands[start : start + _PIECE]
        yield b"".join([pack_command(tuple(command)) for command in piece])  # type: ignore[arg-type]


def _reply(connection: Connection) -> Any:
    try:
        return connection.read_response(disable_decoding=True, disconnect_on_error=False)
    except ResponseError as error:
        return error


def read_values(connection: Connection, arrays: int, width: int) -> Values | Exception:
    """Read arrays of values past redis-py, which has read all else to the end; or the first error among them."""
    try:
        return receive_values(connection._sock, arrays, width)
    except TimeoutError:
        raise RedisTimeoutError("Timeout reading from socket") from None
    except OtherReplyError as other:
        # To redis-py with it, which tells errors apart.
        connection._parser._reader.feed(other.content)
        replies = [_reply(connection) for _ in range(arrays - other.arrays)]
        return next((reply for reply in replies if isinstance(reply, Exception)), ResponseError(str(other)))


def _stale(connection: Connection) -> bool:
    """Whether an idle connection is of no use: the server has closed it, or something unasked-for waits in it."""
    try:
        if connection._sock is None or connection._parser._reader.has_data():
            return True
        return readable(connection._sock)
    except (RedisError, OSError, ValueError):  # ValueError: it was closed
        return True


def connection_options(url: str, address: str) -> dict[str, Any]:
    """Return what redis-py's connections are made with; errors never quote the URL."""
    try:
        if address == UNREADABLE:
            raise ValueError
        options = dict(_redis.parse_url(url))
        options |= {
            "decode_responses": False,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "health_check_interval": 0,
        }
        for name in ("socket_timeout", "socket_connect_timeout"):
            options.pop(name, None)
        connection_class = options.get("connection_class", _redis.Connection)
        connection_class(**{name: value for name, value in options.items() if name != "connection_class"})
    except TypeError as error:
        name = str(error).rpartition(" argument ")[2] or "?"
        raise StateError(f"the URL of the state store at {address} has an unknown option {name}") from None
    except (ValueError, RedisError) as error:
        why = one_line(error)
        if isinstance(error, ValueError) and not why.startswith("Invalid value for"):
            # It may quote what it took for host and port, and that may be a part of the password.
            why = "it cannot be taken apart; in user and password, percent-encode what is no letter or digit"
        raise StateError(f"the URL of the state store at {address} is wrong: {why}") from None
    return options


def one_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
