"""A cluster of nodes: which of them has the slot of a key, and following slots that move."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

from engine.core.errors import StateError, StateUnavailableError
from engine.state.nodes import (
    COMMAND_SECONDS,
    REST_SECONDS,
    Answer,
    Argument,
    Command,
    Connection,
    Node,
    Part,
    converse,
    exchange,
    in_pieces,
    one_line,
    plainly,
    read_values,
)
from engine.state.replies import Values

_SLOTS = 16384
_REDIRECTS = 8

_log = logging.getLogger(__name__)


class Cluster:
    """The nodes of a cluster, and which of them has which slot."""

    def __init__(
        self, options: dict[str, Any], connection_class: Callable[..., Connection], address: str
    ) -> None:
        self._connection_class = connection_class
        self._address = address
        self._options = {**options, "db": 0}
        self._lock = threading.Lock()
        self._refreshed = 0.0
        self._slots: list[Node | None] = [None] * _SLOTS
        self._known: dict[tuple[str, int], Node] = {}
        self._seed = self._at(options.get("host", "localhost"), options.get("port", 6379))
        self._known.clear()

    def nodes(self) -> list[Node]:
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
                    reply = exchange([(node, [("CLUSTER", "SLOTS")])], timeout)[0][0]
                except StateUnavailableError as error:
                    failure = error
                    continue
                if isinstance(reply, Exception):
                    failure = StateError(f"{node.address} is no cluster's node: {one_line(reply)}")
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
        slots: list[Node | None] = [None] * _SLOTS
        owners: dict[tuple[str, int], Node] = {}
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

    def _at(self, host: str, port: int) -> Node:
        known = self._known.get((host, port))
        options = {**self._options, "host": host, "port": port}
        return known or Node(f"{host}:{port}", options, self._connection_class)

    def run(self, commands: Sequence[Command], timeout: float) -> list[Any]:
        """Run each command on the node that has its key; follow where slots have moved to."""
        if not self._known:
            self.refresh(timeout)
        replies: list[Any] = [None] * len(commands)
        waiting = list(range(len(commands)))
        for attempt in range(_REDIRECTS):
            parts = self._parts(commands, waiting, timeout)
            answers = self._asked(
                [(node, *plainly([commands[at] for at in mine])) for node, mine in parts], timeout
            )
            for (_node, mine), answer in zip(parts, answers, strict=True):
                for at, reply in zip(mine, answer, strict=True):
                    replies[at] = reply
            again = []
            for at in waiting:
                reply = replies[at]
                if isinstance(reply, AskError) and not isinstance(reply, MovedError):
                    target = self._at(reply.host, reply.port)
                    replies[at] = exchange([(target, [("ASKING",), commands[at]])], timeout)[0][1]
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
                in_pieces([commands[at] for at in mine]),
                functools.partial(read_values, arrays=len(mine), width=width),
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
    ) -> list[tuple[Node, list[int]]]:
        """Return which of some commands are for which node."""
        by_node: dict[int, tuple[Node, list[int]]] = {}
        for at in which:
            node = self._node_of(commands[at], timeout)
            by_node.setdefault(id(node), (node, []))[1].append(at)
        return list(by_node.values())

    def _asked(self, parts: Sequence[Part[Answer]], timeout: float) -> list[Answer]:
        try:
            return converse(parts, timeout)
        except StateUnavailableError:
            # Perhaps another node has taken the place of the one that failed: the next call shall know.
            self._refresh_quietly(timeout)
            raise

    def _node_of(self, command: Command, timeout: float) -> Node:
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
