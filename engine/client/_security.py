"""How a client proves who it is and whom it believes: TLS, a certificate of its own, a token."""

from __future__ import annotations

import functools
import ipaddress
from pathlib import Path
from typing import Any, TypeAlias, TypedDict
from urllib.parse import unquote

import grpc

Pem: TypeAlias = str | Path | bytes
"""A PEM file, or its content as bytes."""


class Security(TypedDict, total=False):
    """The arguments of every client that have to do with security; all may be absent.

    Attributes:
        tls: speak TLS, and believe the authorities that gRPC ships with; `ca` and `certificate` imply it.
        ca: the authorities to believe instead.
        certificate, key: the client's own certificate, with the chain behind it, and its private key.
        token: sent with each call, for a server that asks for one.
        insecure: whether a token may go to another machine without TLS, for anybody on the way to read.
    """

    tls: bool
    ca: Pem | None
    certificate: Pem | None
    key: Pem | None
    token: str | None
    insecure: bool


class Access:
    """What `Security` says, for one target; its text shows nothing of it.

    Attributes:
        credentials: what a channel is secured with; None is a plain one.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: bool = False,
        ca: Pem | None = None,
        certificate: Pem | None = None,
        key: Pem | None = None,
        token: str | None = None,
        insecure: bool = False,
    ) -> None:
        """Read the files; the arguments are those of `Security`.

        Args:
            target: who gets the token.

        Raises:
            ValueError: a certificate without its key or the other way round; what can be no token, or others could
                read on its way.
            OSError: a file cannot be read.
        """
        if (certificate is None) != (key is None):
            raise ValueError("a certificate and its key are given together, or neither")
        self.credentials: grpc.ChannelCredentials | None = None
        if tls or ca is not None or certificate is not None:
            self.credentials = grpc.ssl_channel_credentials(_pem(ca), _pem(key), _pem(certificate))
        self._metadata: tuple[tuple[str, str], ...] = ()
        if token is None:
            return
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("a token is of printable ASCII without blanks")
        if self.credentials is None and not insecure and not is_local(target):
            raise ValueError(
                f"without TLS others could read the token on its way to {target}; insecure sends it so"
            )
        self._metadata = (("authorization", f"Bearer {token}"),)

    def on(self, method: Any) -> Any:
        """Return an RPC's method as one that sends the token, where there is one."""
        return functools.partial(method, metadata=self._metadata) if self._metadata else method


def is_local(target: str) -> bool:
    """Whether a gRPC target is on this machine."""
    scheme, separator, rest = target.partition(":")
    if separator and scheme in ("unix", "unix-abstract"):
        return True
    if separator and scheme in ("dns", "ipv4", "ipv6"):
        target = rest.rpartition("/")[2]
    host = unquote(target).rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _pem(given: Pem | None) -> bytes | None:
    return given if given is None or isinstance(given, bytes) else Path(given).read_bytes()
