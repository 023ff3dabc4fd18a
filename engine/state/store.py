"""The connection to the state store: a Redis or Valkey server, or a cluster of them, over redis-py's connections.

Commands go out as packed buffers, one per node and call, and their replies are read in order. redis-py's own pipeline
costs several times the processor time per command, and its cluster pipeline refuses scripts and MGET.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Self, TypeAlias, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np
from hiredis import pack_command
from redis import connection as redis_connection
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from engine.core.errors import StateError, StateUnavailableError
from engine.state.replies import OtherReplyError, Values, receive_values

Argument: TypeAlias = bytes | str | int | float
Command: TypeAlias = Sequence[Argument]
Connection: TypeAlias = Any
"""A connection of redis-py, whose methods have no types."""

Answer = TypeVar("Answer")

_redis: Any = redis_connection

URL_VARIABLE = "RECALL_STATE_URL"
"""Environment variable that stands in for `state.url`; the way to keep a password out of the configuration."""

COMMAND_SECONDS = 5.0
"""How long a command other than the users' read may take: a disk that is busy holds an fsync for seconds."""

REST_SECONDS = 0.25
"""How long a node that failed is not asked again."""

_UNREADABLE = "(unreadable URL)"
_SLOTS = 16384

_PIECE = 16
"""Commands sent together."""

_REDIRECTS = 8
_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
    "redis+cluster": "redis",
    "rediss+cluster": "rediss",
}
_TEMPLATES_KEPT = 512
_PASSING = (OutOfMemoryError, ReadOnlyError, ClusterDownError, TryAgainError, MovedError)
_PASSING_WORDS = ("MISCONF", "NOREPLICAS", "BUSY")
"""Error replies that speak of the server's condition and not of the command."""

_log = logging.getLogger(__name__)


def state_url(configured: str, password_file: str = "") -> str:
    """Return the URL of the state store: the environment's RECALL_STATE_URL, or what the configuration says.

    Args:
        configured: `state.url`.
        password_file: a file whose first line is the password, instead of one in the URL; empty: none.

    Raises:
        StateError: the file cannot be read, or there is no URL that the password could be for.
    """
    url = os.environ.get(URL_VARIABLE) or configured
    if not password_file:
        return url
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise StateError("state.password_file is set, but no URL of a store that asks for a password")
    try:
        with open(password_file, encoding="utf-8") as file:
            password = file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise StateError(f"state.password_file: {password_file} cannot be read: {why}") from None
    if not password:
        raise StateError(f"state.password_file: the first line of {password_file} is empty")
    before, at, where = rest.rpartition("@")
    user = before.partition(":")[0] if at else ""
    return f"{scheme}://{user}:{quote(password, safe='')}@{where}"


def address_of(url: str) -> str:
    """Return a URL as it may be shown: without user, password and options."""
    try:
        parts = urlsplit(url)
        where = parts.path if parts.scheme == "unix" else (parts.netloc.rpartition("@")[2] or "localhost")
        # A password that is not percent-encoded may end what is taken for the host.
        broken = bool(parts.netloc) and "@" in f"{parts.path}{parts.query}{parts.fragment}"
    except ValueError:
        broken = True
    return _UNREADABLE if broken else f"{parts.scheme}://{where}"


@dataclass(frozen=True)
class Script:
    """A Lua script that the store runs; it is sent once, and by its hash from then on."""

    source: str

    @functools.cached_property
    def sha(self) -> str:
        """The SHA-1 by which the server knows it."""
        return hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


@dataclass
class _Node:
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
        self.failure = f"the state store at {self.address} does not answer: {_one_line(error)}"
        self.rests_until = time.monotonic() + REST_SECONDS
        self.rests_for = timeout if isinstance(error, (RedisTimeoutError, TimeoutError)) else math.inf
        return StateUnavailableError(self.failure)

    def close(self) -> None:
        for idle in list(self.idle.values()):
            while idle:
                idle.pop().disconnect()


_Part: TypeAlias = tuple[_Node, Iterable[bytes], Callable[[Connection], Answer]]
"""A node, what is sent to it, and what reads its answer."""


class StateStore:
    """A connection to the state store; safe to use from several threads.

    Attributes:
        prefix: stands before every key.
        address: where the store is, without credentials.
        clustered: whether it is a cluster, in which a script sees keys of one slot only.
    """

    def __init__(self, url: str, prefix: str, timeout_ms: float) -> None:
        """Prepare a connection without making it; the arguments are those of `connect`."""
        self.prefix = prefix
        self.address = address_of(url)
        self._timeout = timeout_ms / 1000
        scheme = url.partition("://")[0].lower() if "://" in url else ""
        if scheme not in _SCHEMES:
            raise StateError(
                f"the state store's URL must begin with {', '.join(f'{name}://' for name in _SCHEMES)}"
            )
        options = _options(_SCHEMES[scheme] + url[len(scheme) :], self.address)
        connection_class = options.pop("connection_class", _redis.Connection)
        self._cluster = (
            _Cluster(options, connection_class, self.address) if scheme.endswith("+cluster") else None
        )
        self.clustered = self._cluster is not None
        self._node = _Node(self.address, options, connection_class)
        self._templates: dict[tuple[int, tuple[bytes, ...]], bytes] = {}

    @classmethod
    def connect(cls, url: str, prefix: str, timeout_ms: float) -> Self:
        """Return a store that has answered.

        Args:
            url: `redis://`, `rediss://` (TLS), `unix://`, `redis+cluster://` or `rediss+cluster://`; user, password
                and TLS options stand in it as redis-py takes them (`rediss://:secret@host:6380/0?ssl_ca_certs=ca.pem`).
            prefix: stands before every key.
            timeout_ms: how long the read of a batch's users may take; other commands have `COMMAND_SECONDS`.

        Raises:
            StateError: if the URL is wrong.
            StateUnavailableError: if nothing answers there.
        """
        store = cls(url, prefix, timeout_ms)
        try:
            store.ping()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close the connections that are not in use."""
        for node in self._nodes():
            node.close()

    def ping(self) -> None:
        """Ask every node for a sign of life; StateUnavailableError if one gives none."""
        if self._cluster is not None:
            self._cluster.refresh()
        for node in self._nodes():
            reply = _exchange([(node, [("PING",)])], COMMAND_SECONDS)[0][0]
            if isinstance(reply, Exception):
                raise node.failed(reply, COMMAND_SECONDS)

    def execute(self, *command: Argument, timeout: float | None = None) -> Any:
        """Run one command and return its raw reply: bytes, integers, None and lists of these.

        Args:
            command: its words. In a cluster its first key says where it runs.
            timeout: seconds; `COMMAND_SECONDS` where absent. A blocking command needs more than it blocks.

        Raises:
            StateUnavailableError: on trouble with the connection or the server's condition.
            StateError: if the server refuses the command.
        """
        reply = self.pipeline([command], timeout)[0]
        if isinstance(reply, Exception):
            raise self.refused(reply)
        return reply

    def pipeline(self, commands: Sequence[Command], timeout: float | None = None) -> list[Any]:
        """Run commands in one round trip (per node of a cluster) and return their raw replies in order.

        They are not atomic together. An error reply stands as an exception in its place; `refused` says which error
        of ours it is. StateUnavailableError: some of the commands may have been run.
        """
        if not commands:
            return []
        seconds = COMMAND_SECONDS if timeout is None else timeout
        if self._cluster is not None:
            return self._cluster.run(commands, seconds)
        return _exchange([(self._node, commands)], seconds)[0]

    def run_script(
        self,
        script: Script,
        calls: Sequence[tuple[Sequence[bytes], Sequence[Argument]]],
        timeout: float | None = None,
    ) -> list[Any]:
        """Run a script once per call (its keys, of one slot, and its arguments), pipelined; return the replies.

        A node that does not know the script gets it, and the calls it refused once more. Errors stand in their place.
        """
        commands = [("EVALSHA", script.sha, len(keys), *keys, *arguments) for keys, arguments in calls]
        replies = self.pipeline(commands, timeout)
        unknown = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            for node in self._nodes():
                _exchange([(node, [("SCRIPT", "LOAD", script.source)])], COMMAND_SECONDS)
            for at, reply in zip(
                unknown, self.pipeline([commands[at] for at in unknown], timeout), strict=True
            ):
                replies[at] = reply
        return replies

    def mget_users(self, users: Sequence[bytes], suffixes: Sequence[bytes]) -> Values:
        """Read some keys of several users in one round trip (per node of a cluster).

        Args:
            users: `layout.user_prefix` of each.
            suffixes: what to read of each user, in this order.

        Returns:
            the values of the first user, then those of the next, ...; of everyone, or an error is raised.

        Raises:
            StateUnavailableError: if the store does not answer within `timeout_ms`.
        """
        if not users:
            return Values.of([])
        kinds = tuple(suffixes)
        if self._cluster is not None:
            return self._of_cluster(self._cluster, users, kinds)
        packed = [b"*%d\r\n$4\r\nMGET\r\n" % (len(users) * len(kinds) + 1)]
        packed += [self._template(len(user), kinds).replace(b"\0", user) for user in users]
        read = functools.partial(_values, arrays=1, width=len(users) * len(kinds))
        reply = _converse([(self._node, [b"".join(packed)], read)], self._timeout)[0]
        if isinstance(reply, Exception):
            raise self.refused(reply)
        return reply

    def _of_cluster(self, cluster: _Cluster, users: Sequence[bytes], suffixes: tuple[bytes, ...]) -> Values:
        """Read users who may be on several nodes, each on one."""
        commands: list[Command] = [
            [b"MGET", *(b"%s:%s" % (user, suffix) for suffix in suffixes)] for user in users
        ]
        values = cluster.values(commands, len(suffixes), self._timeout)
        if values is None:  # slots are on their way, perhaps: this follows them
            replies = cluster.run(commands, self._timeout)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise self.refused(reply)
            values = Values.of(chain.from_iterable(replies))
        return values

    def _template(self, length: int, suffixes: tuple[bytes, ...]) -> bytes:
        """Return the packed keys of any user whose name is `length` bytes long, a NUL in its place."""
        template = self._templates.get((length, suffixes))
        if template is None:
            if len(self._templates) >= _TEMPLATES_KEPT:
                self._templates.clear()
            template = b"".join(
                b"$%d\r\n\0:%s\r\n" % (length + 1 + len(suffix), suffix) for suffix in suffixes
            )
            self._templates[length, suffixes] = template
        return template

    def refused(self, reply: Exception) -> StateError:
        """Return the error of ours that an error reply means."""
        text = f"the state store at {self.address} refused a command: {_one_line(reply)}"
        passing = isinstance(reply, _PASSING) or str(reply).startswith(_PASSING_WORDS)
        return StateUnavailableError(text) if passing else StateError(text)

    def _nodes(self) -> Iterable[_Node]:
        return [self._node] if self._cluster is None else self._cluster.nodes()


class _Cluster:
    """The nodes of a cluster, and which of them has which slot."""

    def __init__(
        self, options: dict[str, Any], connection_class: Callable[..., Connection], address: str
    ) -> None:
        self._connection_class = connection_class
        self._address = address
        self._options = {**options, "db": 0}
        self._lock = threading.Lock()
        self._refreshed = 0.0
        self._slots: list[_Node | None] = [None] * _SLOTS
        self._known: dict[tuple[str, int], _Node] = {}
        self._seed = self._at(options.get("host", "localhost"), options.get("port", 6379))
        self._known.clear()

    def nodes(self) -> list[_Node]:
        """Return the nodes that have slots."""
        return list(self._known.values())

    def refresh(self, timeout: float = COMMAND_SECONDS) -> None:
        """Ask the nodes, one after another until one answers, which slots are where."""
        with self._lock:
            if time.monotonic() - self._refreshed < REST_SECONDS and self._known:
                return
            failure: Exception | None = None
            for node in [*self._known.values(), self._seed]:
                try:
                    reply = _exchange([(node, [("CLUSTER", "SLOTS")])], timeout)[0][0]
                except StateUnavailableError as error:
                    failure = error
                    continue
                if isinstance(reply, Exception):
                    failure = StateError(f"{node.address} is no cluster's node: {_one_line(reply)}")
                    continue
                if not reply:
                    failure = StateUnavailableError(
                        f"the cluster at {self._address} has given out no slots yet"
                    )
                    continue
                self._learn(reply, str(node.options["host"]))
                return
            raise failure or StateUnavailableError(f"no node of the cluster at {self._address} answers")

    def _learn(self, ranges: list[Any], host: str) -> None:
        slots: list[_Node | None] = [None] * _SLOTS
        owners: dict[tuple[str, int], _Node] = {}
        for first, last, owner, *_replicas in ranges:
            # No host means the one that was asked.
            at = (owner[0].decode() if owner[0] else host), int(owner[1])
            node = owners.setdefault(at, self._known.get(at) or self._at(*at))
            slots[first : last + 1] = [node] * (last + 1 - first)
        gone = [node for at, node in self._known.items() if at not in owners]
        self._slots, self._known = slots, owners
        self._refreshed = time.monotonic()
        for node in gone:
            node.close()

    def _at(self, host: str, port: int) -> _Node:
        known = self._known.get((host, port))
        options = {**self._options, "host": host, "port": port}
        return known or _Node(f"{host}:{port}", options, self._connection_class)

    def run(self, commands: Sequence[Command], timeout: float) -> list[Any]:
        """Run each command on the node that has its key; follow where slots have moved to."""
        if not self._known:
            self.refresh(timeout)
        replies: list[Any] = [None] * len(commands)
        waiting = list(range(len(commands)))
        for attempt in range(_REDIRECTS):
            parts = self._parts(commands, waiting, timeout)
            answers = self._asked(
                [(node, *_plainly([commands[at] for at in mine])) for node, mine in parts], timeout
            )
            for (_node, mine), answer in zip(parts, answers, strict=True):
                for at, reply in zip(mine, answer, strict=True):
                    replies[at] = reply
            again = []
            for at in waiting:
                reply = replies[at]
                if isinstance(reply, AskError) and not isinstance(reply, MovedError):
                    target = self._at(reply.host, reply.port)
                    replies[at] = _exchange([(target, [("ASKING",), commands[at]])], timeout)[0][1]
                elif isinstance(reply, (MovedError, TryAgainError, ClusterDownError)):
                    again.append(at)
            if not again:
                break
            waiting = again
            if attempt + 1 < _REDIRECTS:
                if attempt:
                    time.sleep(0.02 * attempt)
                moved = next((replies[at] for at in again if isinstance(replies[at], MovedError)), None)
                if moved is not None:
                    self._slots[moved.slot_id] = self._at(
                        moved.host or self._seed.options["host"], moved.port
                    )
                self._refresh_quietly(timeout)
        return replies

    def values(self, commands: Sequence[Command], width: int, timeout: float) -> Values | None:
        """Run MGETs of `width` keys, each on the node that has its keys; None where one has an error for an answer."""
        if not self._known:
            self.refresh(timeout)
        parts = self._parts(commands, range(len(commands)), timeout)
        asked = [
            (
                node,
                _pieces([commands[at] for at in mine]),
                functools.partial(_values, arrays=len(mine), width=width),
            )
            for node, mine in parts
        ]
        found = []
        for answer, (_node, mine) in zip(self._asked(asked, timeout), parts, strict=True):
            if isinstance(answer, Exception):
                return None
            found.append((answer, np.add.outer(np.array(mine) * width, np.arange(width)).reshape(-1)))
        return Values.joined(found)

    def _parts(
        self, commands: Sequence[Command], which: Iterable[int], timeout: float
    ) -> list[tuple[_Node, list[int]]]:
        """Return which of some commands are for which node."""
        by_node: dict[int, tuple[_Node, list[int]]] = {}
        for at in which:
            node = self._node_of(commands[at], timeout)
            by_node.setdefault(id(node), (node, []))[1].append(at)
        return list(by_node.values())

    def _asked(self, parts: Sequence[_Part[Answer]], timeout: float) -> list[Answer]:
        try:
            return _converse(parts, timeout)
        except StateUnavailableError:
            # Perhaps another node has taken the place of the one that failed: the next call shall know.
            self._refresh_quietly(timeout)
            raise

    def _node_of(self, command: Command, timeout: float) -> _Node:
        key = _key_of(command)
        node = next(iter(self._known.values())) if key is None else self._slots[key_slot(key)]
        if node is None:
            self._refresh_quietly(timeout)
            raise StateUnavailableError(f"no node of the cluster at {self._address} has the slot of a key")
        return node

    def _refresh_quietly(self, timeout: float) -> None:
        try:
            self.refresh(timeout)
        except StateError as error:
            _log.debug("the cluster's slots could not be read: %s", error)


def _exchange(parts: Sequence[tuple[_Node, Sequence[Command]]], timeout: float) -> list[list[Any]]:
    """Send each node its commands, then read all replies: as many round trips as there are nodes, at the same time."""
    return _converse([(node, *_plainly(commands)) for node, commands in parts], timeout)


def _converse(parts: Sequence[_Part[Answer]], timeout: float) -> list[Answer]:
    """Send each node what is for it, then read what each answers."""
    connections: list[Connection] = []
    answers: list[Answer] = []
    try:
        for node, pieces, _read in parts:
            connection = node.take(timeout)
            connections.append(connection)
            with _blaming(node, timeout):
                connection.send_packed_command(pieces, check_health=False)
        for (node, _pieces, read), connection in zip(parts, connections, strict=True):
            with _blaming(node, timeout):
                answers.append(read(connection))
            node.give(connection, timeout)
    finally:
        for connection in connections[len(answers) :]:
            connection.disconnect()
    return answers


class _blaming:  # noqa: N801 - reads as a clause
    """Turns trouble with a connection into the node's error."""

    def __init__(self, node: _Node, timeout: float) -> None:
        self._node = node
        self._timeout = timeout

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (RedisError, OSError)):
            raise self._node.failed(error, self._timeout) from None


def _plainly(commands: Sequence[Command]) -> tuple[Iterable[bytes], Callable[[Connection], list[Any]]]:
    """Return commands as they are sent, and what reads a list of their replies."""
    return _pieces(commands), lambda connection: [_reply(connection) for _ in commands]


def _pieces(commands: Sequence[Command]) -> Iterable[bytes]:
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


def _values(connection: Connection, arrays: int, width: int) -> Values | Exception:
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
        return bool(connection.can_read(0))
    except (RedisError, OSError):
        return True


def _options(url: str, address: str) -> dict[str, Any]:
    """Return what redis-py's connections are made with; errors never quote the URL."""
    try:
        if address == _UNREADABLE:
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
        why = _one_line(error)
        if isinstance(error, ValueError) and not why.startswith("Invalid value for"):
            # It may quote what it took for host and port, and that may be a part of the password.
            why = "it cannot be taken apart; in user and password, percent-encode what is no letter or digit"
        raise StateError(f"the URL of the state store at {address} is wrong: {why}") from None
    return options


def _key_of(command: Command) -> bytes | None:
    """Return the key by which a cluster routes a command; None for one that any node may run."""
    name = _bytes(command[0]).upper().decode()
    if name in ("EVAL", "EVALSHA"):
        at = 3 if int(command[2]) else 0
    elif name in ("XREAD", "XREADGROUP"):
        at = next((n + 1 for n, word in enumerate(command) if n and _bytes(word).upper() == b"STREAMS"), 0)
    elif name in ("XINFO", "MEMORY", "OBJECT", "XGROUP"):
        at = 2
    elif name in (
        "PING",
        "INFO",
        "CONFIG",
        "SCRIPT",
        "TIME",
        "CLUSTER",
        "DBSIZE",
        "COMMAND",
        "ECHO",
        "CLIENT",
    ):
        at = 0
    else:
        at = 1
    if not at or at >= len(command):
        return None
    return _bytes(command[at])


def _bytes(word: Argument) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
