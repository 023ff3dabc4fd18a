"""The connection to the state store: a Redis or Valkey server, or a cluster of them, over redis-py's connections."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

from redis import connection as redis_connection
from redis.exceptions import (
    ClusterDownError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)

from engine.core.errors import StateError, StateUnavailableError
from engine.state.cluster import Cluster
from engine.state.lookout import Lookout
from engine.state.nodes import (
    COMMAND_SECONDS,
    Argument,
    Command,
    Connection,
    Node,
    begin,
    connection_options,
    exchange,
    one_line,
    read_values,
)
from engine.state.replies import Values
from engine.state.url import SCHEMES, address_of

_redis: Any = redis_connection

_TEMPLATES_KEPT = 512
_PASSING = (OutOfMemoryError, ReadOnlyError, ClusterDownError, TryAgainError, MovedError)
_PASSING_WORDS = ("MISCONF", "NOREPLICAS", "BUSY")
"""Error replies that speak of the server's condition and not of the command."""


@dataclass(frozen=True)
class Script:
    """A Lua script that the store runs; it is sent once, and by its hash from then on."""

    source: str

    @functools.cached_property
    def sha(self) -> str:
        """The SHA-1 by which the server knows it."""
        return hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


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
        if scheme not in SCHEMES:
            raise StateError(
                f"the state store's URL must begin with {', '.join(f'{name}://' for name in SCHEMES)}"
            )
        options = connection_options(SCHEMES[scheme] + url[len(scheme) :], self.address)
        connection_class = options.pop("connection_class", _redis.Connection)
        self._cluster = (
            Cluster(options, connection_class, self.address) if scheme.endswith("+cluster") else None
        )
        self.clustered = self._cluster is not None
        self._node = Node(self.address, options, connection_class)
        self._lookout = Lookout()
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
            reply = exchange([(node, [("PING",)])], COMMAND_SECONDS)[0][0]
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
        return exchange([(self._node, commands)], seconds)[0]

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
                exchange([(node, [("SCRIPT", "LOAD", script.source)])], COMMAND_SECONDS)
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
        return self.ask_users(users, suffixes)()

    def ask_users(self, users: Sequence[bytes], suffixes: Sequence[bytes]) -> Callable[[], Values]:
        """Send what `mget_users` asks; what is returned reads the answer, to be called once.

        Both may raise what `mget_users` raises. A cluster is asked only then: it may have to be asked again.
        """
        if not users:
            return functools.partial(Values.of, ())
        kinds = tuple(suffixes)
        if self._cluster is not None:
            return functools.partial(self._of_cluster, self._cluster, users, kinds)
        packed = [b"*%d\r\n$4\r\nMGET\r\n" % (len(users) * len(kinds) + 1)]
        packed += [self._template(len(user), kinds).replace(b"\0", user) for user in users]
        read = functools.partial(self._read, len(users) * len(kinds))
        return functools.partial(
            self._received, begin([(self._node, [b"".join(packed)], read)], self._timeout)
        )

    def _read(self, width: int, connection: Connection) -> Values | Exception:
        self._lookout.look(connection._sock)
        return read_values(connection, arrays=1, width=width)

    def _received(self, receive: Callable[[], list[Values | Exception]]) -> Values:
        reply = receive()[0]
        if isinstance(reply, Exception):
            raise self.refused(reply)
        return reply

    def _of_cluster(self, cluster: Cluster, users: Sequence[bytes], suffixes: tuple[bytes, ...]) -> Values:
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
        text = f"the state store at {self.address} refused a command: {one_line(reply)}"
        passing = isinstance(reply, _PASSING) or str(reply).startswith(_PASSING_WORDS)
        return StateUnavailableError(text) if passing else StateError(text)

    def _nodes(self) -> Iterable[Node]:
        return [self._node] if self._cluster is None else self._cluster.nodes()
