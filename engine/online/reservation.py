"""A port that is kept while workers that share it come and go."""

from __future__ import annotations

import socket
from typing import Any

from engine.core.errors import ConfigError


class Reservation:
    """Keeps a port for this user's listeners that share it (SO_REUSEPORT), by sockets that are bound and do not listen.

    Another server must find the port taken, and a port that another listens on, sharing or not, is an error. So the
    address is tried without sharing first.

    Attributes:
        port: which.
    """

    def __init__(self, host: str, port: int) -> None:
        """Reserve a port; 0: any.

        Raises:
            ConfigError: it is taken, or there is no such address.
        """
        self.port = port
        self._sockets: list[socket.socket] = []
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, address in dict.fromkeys(found):
                if self.port:
                    with socket.socket(family, kind, protocol) as probe:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        _bind(probe, address, self.port)
                        probe.listen()
                self._reserve(family, kind, protocol, address)
        except OSError as error:
            self.__exit__()
            text = f"cannot listen on {where}: {error.strerror or error}"
            raise ConfigError(text, "server.port") from error

    def _reserve(self, family: int, kind: int, protocol: int, address: Any) -> None:
        held = socket.socket(family, kind, protocol)
        self._sockets.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            _bind(held, address, self.port)
        except OSError:
            # Connections of a server that did not share the port may still be ending.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(held, address, self.port)
        self.port = held.getsockname()[1]

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        for held in self._sockets:
            held.close()


def _bind(to: socket.socket, address: Any, port: int) -> None:
    if to.family == socket.AF_INET6:
        to.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    to.bind((address[0], port, *address[2:]))
