"""Certificates made by openssl, tokens, raw HTTP/2, and servers secured with them."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from online_world import PATIENCE, World

from engine.config import Config, SecurityConfig
from engine.online.server import Server

TOKENS = {"web": "kangaroo-web-0123456789", "feed": "kangaroo-feed-0123456789"}
"""Recognisable, so that a test can look for them where they must not be."""


class Authority:
    """A certificate authority in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not on PATH")
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.ca = folder / "ca.pem"
        self._openssl(
            "req", "-x509", *_NEW_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-days", "9", "-subj", "/CN=ca"
        )

    def issue(
        self, name: str, names: str = "IP:127.0.0.1", days: int = 30, file: str = ""
    ) -> tuple[Path, Path]:
        """Make a certificate and its key; returns their files. `days` below 0 is one that has expired."""
        file = file or name
        key, request, extensions = f"{file}.key", f"{file}.csr", self.folder / f"{file}.ext"
        self._openssl("req", *_NEW_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        extensions.write_text(f"subjectAltName={names}\n")
        sign = ("x509", "-req", "-in", request, "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        when = (
            ("-days", str(days))
            if days > 0
            else ("-not_before", "20200101000000Z", "-not_after", "20210101000000Z")
        )
        if days <= 0 and "-not_after" not in self._help("x509"):
            when = ("-days", str(days))
        self._openssl(*sign, *when, "-extfile", extensions.name, "-out", f"{file}.pem")
        self.folder.joinpath(key).chmod(0o600)
        return self.folder / f"{file}.pem", self.folder / key

    def _help(self, command: str) -> str:
        return subprocess.run(
            ["openssl", command, "-help"], capture_output=True, text=True, check=False
        ).stderr

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def line(name: str, token: str) -> str:
    return f"{name}:{hashlib.sha256(token.encode()).hexdigest()}\n"


def tokens_file(folder: Path) -> Path:
    file = folder / "tokens"
    file.write_text("# who may come in\n\n" + "".join(line(name, token) for name, token in TOKENS.items()))
    file.chmod(0o600)
    return file


def secured(world: World, **security: Any) -> World:
    changed = world.config.model_copy(update={"security": SecurityConfig(**security)})
    return dataclasses.replace(world, config=changed)


def with_server(config: Config, **server: Any) -> Config:
    return config.model_copy(update={"server": config.server.model_copy(update=server)})


@asynccontextmanager
async def running(world: World, **security: Any) -> AsyncIterator[int]:
    """The port of a server on this event loop."""
    world = secured(world, **security)
    server = Server(world.config, world.replica)
    port = await server.start()
    try:
        yield port
    finally:
        await server.stop(1)


# --- HTTP/2 by hand (RFC 9113) -----------------------------------------------------------------------------

SETTINGS, PING, GOAWAY = 4, 6, 7
MAX_CONCURRENT_STREAMS = 3


def frame(kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + bytes(4) + payload


class Raw:
    """A connection that has said hello, or has not."""

    def __init__(self, port: int, hello: bool = True) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        if hello:
            self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS) + frame(SETTINGS, 1))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """(kind, payload) of what comes, until the server closes."""
        with self._socket, self._socket.makefile("rb") as file:
            try:
                while len(header := file.read(9)) == 9:
                    yield header[3], file.read(int.from_bytes(header[:3], "big"))
            except ConnectionResetError:
                return
