"""Who may talk to the server, and how much of it: TLS, callers and what they may call, limits of connections.

Nothing of this is on the path of a request where nothing of it is configured. docs/security.md has the threat model.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import inspect
import ipaddress
import logging
import os
import re
import ssl
import stat
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias

import grpc
from grpc_health.v1 import health
from recall.v1 import ingest_pb2, recall_pb2

from engine.config import Config, SecurityConfig
from engine.core.errors import ConfigError
from engine.online.calls import Call

Service: TypeAlias = Literal["recall", "ingest", "admin"]
"""What callers are allowed: one of the two APIs, or everything else that is not health, which is reflection."""

TOKENS_VARIABLE = "RECALL_TOKENS"
"""Environment variable with tokens, written as in the file: they count besides those of `security.tokens`."""

EVERYBODY = "*"
"""In an allow-list: every caller with a known token or an accepted certificate."""

LOOK_SECONDS = 1.0
"""How often the file of tokens is looked at, when there are calls."""

EXPIRY_DAYS = 14
"""A certificate that ends within so many days is warned of."""

_SERVICES: dict[str, Service | None] = {
    recall_pb2.DESCRIPTOR.services_by_name["RecallService"].full_name: "recall",
    ingest_pb2.DESCRIPTOR.services_by_name["IngestService"].full_name: "ingest",
    health.SERVICE_NAME: None,  # open: load balancers have no token
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_PREFIX_BYTES = 8
_MOST_SHOWN = 8

_log = logging.getLogger(__name__)


def options(config: Config) -> list[tuple[str, Any]]:
    """Return the channel arguments of a server: its limits, and what it bears of pings."""
    limits = config.security
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        # A response is bounded by max_limit.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_concurrent_streams", limits.max_streams),
        # Between the two gRPC refuses at random; equal, they are one limit.
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        ("grpc.server_handshake_timeout_ms", round(limits.handshake_seconds * 1000)),
        ("grpc.max_connection_idle_ms", round(limits.idle_seconds * 1000)),
        # A peer that died behind a silent network would hold its connection for ever.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Clients may ask every 10 s whether we live (by default twice in 5 minutes is too much); who asks more often
        # is cut off at the third time.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def credentials(config: Config) -> grpc.ServerCredentials | None:
    """Return what a server's port is secured with; None is a plain one. Files that change are read again.

    Raises:
        ConfigError: a file cannot be read or used, or without TLS others than this machine could connect.
    """
    check_address(config)
    settings, host = config.security, config.server.host
    if not is_loopback(host):
        named = settings.client_ca or settings.tokens or os.environ.get(TOKENS_VARIABLE)
        lacks = [
            *([] if settings.certificate else ["encryption"]),
            *([] if named else ["a check of who calls"]),
        ]
        if lacks:
            _log.warning("%s is open to others, without %s", host, " and without ".join(lacks))
    if not settings.certificate:
        return None
    pair = _KeyPair(settings)
    return grpc.dynamic_ssl_server_credentials(
        pair.configuration, pair.changed, require_client_authentication=bool(settings.client_ca)
    )


def interceptors(config: Config) -> tuple[Gate, ...]:
    """Return what checks callers; nothing where every caller may call everything.

    Raises:
        ConfigError: the tokens cannot be read, or an allow-list names nobody that there is.
    """
    settings = config.security
    tokens = Tokens.of(settings)
    lists = _allowed(settings)
    if tokens is None and not settings.client_ca:
        for service, allowed in lists.items():
            if allowed != {EVERYBODY}:
                text = "nobody can be told apart: set security.tokens, or security.client_ca"
                raise ConfigError(text, f"security.allow.{service}")
        return ()
    _check_names(lists, tokens, bool(settings.client_ca))
    if tokens is None and all(EVERYBODY in allowed for allowed in lists.values()):
        return ()  # the handshake has seen to it
    return (Gate(lists, tokens, bool(settings.client_ca)),)


def check(config: Config) -> None:
    """Look at all that `credentials` and `interceptors` would need.

    Raises:
        ConfigError: a server would not start with it.
    """
    credentials(config)
    interceptors(config)


def check_address(config: Config) -> None:
    """Refuse to listen in plain text where others than this machine can connect.

    Raises:
        ConfigError: `server.host`, or `server.metrics_host` while there are metrics, is such an address, and
            `server.insecure` is not set.
    """
    server, settings = config.server, config.security
    for one, other in (("key", "certificate"), ("certificate", "key"), ("client_ca", "certificate")):
        if getattr(settings, one) and not getattr(settings, other):
            raise ConfigError(f"is needed too, as security.{one} is set", f"security.{other}")
    if server.insecure:
        return
    if not settings.certificate and not is_loopback(server.host):
        text = (
            f"{server.host} is open to others without encryption: set security.certificate and security.key, or say "
            "that it is meant with server.insecure = true or --insecure"
        )
        raise ConfigError(text, "server.host")
    if server.metrics_port and not is_loopback(server.metrics_host):
        text = (
            f"{server.metrics_host} is open to others, and metrics have neither encryption nor a check of who asks: "
            "say that it is meant with server.insecure = true or --insecure"
        )
        raise ConfigError(text, "server.metrics_host")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address; of names only localhost is known to be such a one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Tokens:
    """The tokens that are known, by their SHA-256; the tokens themselves are nowhere."""

    def __init__(self, file: Path | None, variable: str) -> None:
        """Read them.

        Args:
            file: lines NAME:SHA256; empty ones and those that begin with # say nothing. None: no file.
            variable: more of them, with white space or commas between them.

        Raises:
            ConfigError: they cannot be read, or a line is wrong; lines are never quoted, as a token may stand there.
        """
        self._file = file
        self._fixed = _read_tokens(re.split(r"[\s,]+", variable), TOKENS_VARIABLE, "entry")
        self._signature: Any = None
        self._next_look = 0.0
        self._known: dict[bytes, tuple[bytes, str]] = {}
        if file is None:
            self._take({})
        else:
            self._signature, read = _read_token_file(file)
            self._take(read)
            self._next_look = time.monotonic() + LOOK_SECONDS

    @classmethod
    def of(cls, settings: SecurityConfig) -> Tokens | None:
        """Return those of the configuration and the environment; None where neither has any."""
        variable = os.environ.get(TOKENS_VARIABLE, "").strip()
        if not settings.tokens and not variable:
            return None
        return cls(Path(settings.tokens) if settings.tokens else None, variable)

    @property
    def names(self) -> frozenset[str]:
        """The names of their holders, as allow-lists have them."""
        return frozenset(name for _, name in self._known.values())

    def holder(self, token: str) -> str | None:
        """Return whose token it is, as allow-lists have it ("token:NAME"); None where nobody's.

        What it takes does not tell how much of a token is right: only hashes are looked up and compared.
        """
        if self._file is not None and time.monotonic() >= self._next_look:
            self._look(self._file)
        digest = hashlib.sha256(token.encode()).digest()
        found = self._known.get(digest[:_PREFIX_BYTES])
        if found is None or not hmac.compare_digest(found[0], digest):
            return None
        return found[1]

    def _take(self, read: Mapping[bytes, str]) -> None:
        merged = {**read, **self._fixed}
        self._known = {digest[:_PREFIX_BYTES]: (digest, f"token:{name}") for digest, name in merged.items()}

    def _look(self, file: Path) -> None:
        """Read the file again where it has changed; one that is wrong leaves all as it is."""
        self._next_look = time.monotonic() + LOOK_SECONDS
        signature = _signature(file)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._signature, read = _read_token_file(file)
        except ConfigError as error:
            _log.error("the tokens stay as they were: %s", error)
            return
        self._take(read)
        _log.info("tokens read anew: %s", ", ".join(sorted(self.names)) or "none")


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets a call through where its caller may make it."""

    def __init__(
        self, allowed: Mapping[Service, frozenset[str]], tokens: Tokens | None, certificates: bool
    ) -> None:
        """Take who may call what.

        Args:
            allowed: per service the names: "token:NAME", "certificate:NAME", or `EVERYBODY`.
            tokens: those that are known; None where there are none.
            certificates: whether the handshake asks every client for a certificate.
        """
        self._allowed = allowed
        self._tokens = tokens
        self._certificates = certificates
        self._guarded: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._refusals = _Refusals()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the method's handler, or one that refuses before it reads anything."""
        method = handler_call_details.method
        service = _service_of(method)
        if service is None:
            return await continuation(handler_call_details)
        caller, refused = self._by_token(service, handler_call_details.invocation_metadata)
        if refused is not None:
            return self._refuse(*refused, method)
        if self._is_allowed(service, caller):
            return await continuation(handler_call_details)
        return await self._by_certificate(
            continuation, handler_call_details, self._allowed[service], service, caller
        )

    def refusal(self, method: str, call: Call) -> tuple[grpc.StatusCode, str] | None:
        """Return status and text with which a call that is not grpc.aio's is refused; None where it is let through."""
        service = _service_of(method)
        if service is None:
            return None
        caller, refused = self._by_token(service, call.metadata)
        if refused is None and not self._is_allowed(service, caller):
            names = certificate_names(call.identity)
            if self._allowed[service].isdisjoint(names):
                refused = _DENIED, _denied(caller, names, service)
        if refused is not None:
            self._refusals.note(method, call.peer, refused[1])
        return refused

    def _is_allowed(self, service: Service, caller: str | None) -> bool:
        return EVERYBODY in self._allowed[service] or caller in self._allowed[service]

    def _by_token(
        self, service: Service, metadata: Iterable[tuple[str, str | bytes]]
    ) -> tuple[str | None, tuple[grpc.StatusCode, str] | None]:
        """Return whose token a call has, and why it is refused; neither where the certificate decides."""
        caller = None
        if self._tokens is not None:
            for key, value in metadata:
                if key == "authorization":
                    scheme, _, token = str(value).partition(" ")
                    if scheme.lower() != "bearer" or caller is not None:
                        return None, (_UNAUTHENTICATED, "expected one authorization: Bearer TOKEN")
                    caller = self._tokens.holder(token.strip())
                    if caller is None:
                        return None, (_UNAUTHENTICATED, "the token is not known")
            if caller is None and not self._certificates:
                return None, (
                    _UNAUTHENTICATED,
                    "expected a token, as metadata: authorization: Bearer TOKEN",
                )
        if not self._certificates and not self._is_allowed(service, caller):
            return caller, (_DENIED, f"{caller} may not call {service}")
        return caller, None

    async def _by_certificate(
        self, continuation: Any, details: Any, allowed: frozenset[str], service: Service, caller: str | None
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return a handler that looks at the certificate first, which is known only once there is a context."""
        handler = await continuation(details)
        if handler is None:  # no such method
            return handler  # type: ignore[return-value]
        if caller is not None:  # rare: one who has a token, but not for this
            return self._guard(handler, allowed, service, details.method, caller)
        guarded = self._guarded.get(details.method)
        if guarded is None:
            guarded = self._guard(handler, allowed, service, details.method, None)
            self._guarded[details.method] = guarded
        return guarded

    def _guard(
        self, handler: Any, allowed: frozenset[str], service: Service, method: str, caller: str | None
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def admit(context: Any) -> None:
            names = certificate_names(context.auth_context())
            if allowed.isdisjoint(names):
                text = _denied(caller, names, service)
                self._refusals.note(method, context.peer(), text)
                await context.abort(_DENIED, text)

        return _before(handler, admit)

    def _refuse(self, code: grpc.StatusCode, text: str, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(requests: Any, context: Any) -> None:
            self._refusals.note(method, context.peer(), text)
            await context.abort(code, text)

        # As a stream it is called at once, before anything of the request is read, whatever the method is.
        return grpc.stream_stream_rpc_method_handler(refuse)


def certificate_names(peer: Mapping[str, Iterable[bytes]]) -> list[str]:
    """Return the names of a client's certificate as allow-lists have them: common name and subject alternative names.

    Args:
        peer: the authentication context of a call.
    """
    keys = ("x509_common_name", "x509_subject_alternative_name")
    return [f"certificate:{name.decode(errors='replace')}" for key in keys for name in peer.get(key, ())]


def _service_of(method: str) -> Service | None:
    """What has no list of its own is admin: a service that is added later is not open by an oversight."""
    return _SERVICES.get(method[1 : method.rfind("/")], "admin")


def _denied(caller: str | None, names: Sequence[str], service: Service) -> str:
    callers = [*([caller] if caller else []), *names[:_MOST_SHOWN]]
    return f"{', '.join(callers) or 'a certificate without a name'} may not call {service}"


_UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
_DENIED = grpc.StatusCode.PERMISSION_DENIED


def _before(handler: Any, admit: Callable[[Any], Awaitable[None]]) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler that asks `admit`, which aborts or returns, and then does what the given one does."""
    kinds = {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
    }
    name, make = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    inner = getattr(handler, name)

    async def guarded(request: Any, context: Any) -> Any:
        await admit(context)
        answer = inner(request, context)
        if inspect.isasyncgen(answer):
            async for message in answer:
                await context.write(message)
            return None
        return await answer

    made: Any = make
    return made(guarded, handler.request_deserializer, handler.response_serializer)  # type: ignore[no-any-return]


class _Refusals:
    """Tells the log who was refused, at most once a second: who is refused must not be able to fill the disk."""

    def __init__(self) -> None:
        self._next = 0.0
        self._unsaid = 0

    def note(self, method: str, peer: str, text: str) -> None:
        now = time.monotonic()
        if now < self._next:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} calls more since the last such line)" if self._unsaid else ""
        _log.warning("refused %.100r from %s: %s%s", method, peer, text, more)
        self._next, self._unsaid = now + 1.0, 0


class _KeyPair:
    """The certificate, its key and the clients' authorities, and whether their files have changed."""

    def __init__(self, settings: SecurityConfig) -> None:
        self._files = {
            name: Path(value)
            for name in ("certificate", "key", "client_ca")
            if (value := getattr(settings, name))
        }
        self._signature = self._look()
        self.configuration = self._read()

    def changed(self) -> Any:
        """Return what is new; None where nothing is. gRPC calls it in every handshake, from a thread of its own."""
        signature = self._look()
        if signature == self._signature:
            return None
        # Remembered even if they are refused, so that a wrong file is told of once and not in every handshake.
        self._signature = signature
        try:
            self.configuration = self._read()
        except ConfigError as error:
            _log.error("the certificate stays as it was: %s", error)
            return None
        _log.info("certificate read anew from %s", self._files["certificate"])
        return self.configuration

    def _look(self) -> list[Any]:
        return [_signature(file) for file in self._files.values()]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pem = {name: _read_file(file, f"security.{name}") for name, file in self._files.items()}
        _warn_of_readers(self._files["key"], "security.key")
        if b"ENCRYPTED" in pem["key"]:
            raise ConfigError("is encrypted, and nobody is here to give the passphrase", "security.key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._files["certificate"], self._files["key"], lambda: "")
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(*_what_is_wrong(error)) from None
        _check_validity(pem["certificate"], "security.certificate")
        authorities = pem.get("client_ca")
        if authorities is not None:
            try:
                context.load_verify_locations(self._files["client_ca"])
            except ssl.SSLError as error:
                text = f"has no certificates in PEM form: {error.reason or error}"
                raise ConfigError(text, "security.client_ca") from None
        return grpc.ssl_server_certificate_configuration([(pem["key"], pem["certificate"])], authorities)


def _what_is_wrong(error: OSError) -> tuple[str, str]:
    """Return what a certificate and key that cannot be used together lack, and the name of the key at fault."""
    reason = getattr(error, "reason", None) or str(error)
    if reason == "KEY_VALUES_MISMATCH":
        return "is not the key of security.certificate", "security.key"
    return f"this and security.key cannot be used as a certificate in PEM form and its key: {reason}", (
        "security.certificate"
    )


def _check_validity(pem: bytes, field: str) -> None:
    """Warn of a certificate that is not valid now, or not much longer: a clock may be wrong, and clients decide."""
    try:
        begin, end = validity(ssl.PEM_cert_to_DER_cert(_first_certificate(pem)))
    except (ValueError, IndexError):
        _log.warning("%s: cannot see how long it is valid", field)
        return
    now = datetime.now(UTC)
    if now < begin:
        _log.warning("%s: is not valid before %s; clients will refuse it", field, begin)
    elif now > end:
        _log.warning("%s: expired on %s; clients will refuse it", field, end)
    elif now + timedelta(days=EXPIRY_DAYS) > end:
        _log.warning("%s: expires on %s", field, end)


def _first_certificate(pem: bytes) -> str:
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    at = pem.index(begin)
    return pem[at : pem.index(end, at) + len(end)].decode("ascii")


def validity(der: bytes) -> tuple[datetime, datetime]:
    """Return from when to when a certificate is valid (RFC 5280, section 4.1).

    Args:
        der: the certificate as DER.

    Raises:
        ValueError, IndexError: it is not one.
    """
    _, at, _ = _element(der, 0)  # the certificate
    _, at, _ = _element(der, at)  # what is signed of it
    tag, _, end = _element(der, at)
    if tag == 0xA0:  # the version, which may be absent
        at = end
    for _ in range(3):  # serial number, algorithm, issuer
        at = _element(der, at)[2]
    _, at, _ = _element(der, at)
    times = []
    for _ in range(2):
        tag, begin, at = _element(der, at)
        form = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}.get(tag)
        if form is None:
            raise ValueError("expected a time")
        times.append(datetime.strptime(der[begin:at].decode("ascii"), form).replace(tzinfo=UTC))
    return times[0], times[1]


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Return the tag of the DER element at a place, where its content begins, and where it ends."""
    tag, length, at = der[at], der[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        length, at = int.from_bytes(der[at : at + size], "big"), at + size
    return tag, at, at + length


def _read_token_file(file: Path) -> tuple[Any, dict[bytes, str]]:
    signature = _signature(file)
    text = _read_file(file, "security.tokens").decode("utf-8", "replace")
    if _mode(file) & (stat.S_IWGRP | stat.S_IWOTH):
        text = f"{file} may be written by others than its owner, who could let themselves in; chmod go-w it"
        raise ConfigError(text, "security.tokens")
    _warn_of_readers(file, "security.tokens")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return signature, _read_tokens(lines, "security.tokens", "line")


def _read_tokens(lines: Iterable[str], field: str, unit: str) -> dict[bytes, str]:
    known: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        name, _, digest = line.rpartition(":")
        if not _NAME.fullmatch(name) or not _DIGEST.fullmatch(digest):
            text = (
                f"{unit} {number}: expected NAME:SHA256, a name and the 64 hex digits of the token's SHA-256"
            )
            raise ConfigError(text, field)
        if known.setdefault(bytes.fromhex(digest), name) != name:
            raise ConfigError(f"{unit} {number}: this token is another name's already", field)
    return known


def _allowed(settings: SecurityConfig) -> dict[Service, frozenset[str]]:
    allow = settings.allow
    return {
        "recall": frozenset(allow.recall),
        "ingest": frozenset(allow.ingest),
        "admin": frozenset(allow.admin),
    }


def _check_names(lists: Mapping[Service, frozenset[str]], tokens: Tokens | None, certificates: bool) -> None:
    for service, allowed in lists.items():
        for name in sorted(allowed - {EVERYBODY}):
            field = f"security.allow.{service}"
            if name.startswith("certificate:") and not certificates:
                raise ConfigError(
                    f"{name!r} needs security.client_ca, by which certificates are checked", field
                )
            if name.startswith("token:") and (tokens is None or name not in tokens.names):
                known = ", ".join(sorted(tokens.names)) if tokens is not None else ""
                raise ConfigError(f"there is no {name!r} in security.tokens; known: {known or 'none'}", field)


def _read_file(file: Path, field: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", field) from error


def _warn_of_readers(file: Path, field: str) -> None:
    if _mode(file) & stat.S_IROTH:
        _log.warning("%s: %s may be read by everybody on this machine; chmod o-r it", field, file)


def _mode(file: Path) -> int:
    try:
        return file.stat().st_mode
    except OSError:
        return 0


class IdleWatch:
    """Cancels the task that makes it once nothing was heard of its caller for so long, at most twice as long.

    To be heard costs an attribute, as it happens with every message of a stream.

    Attributes:
        alive: set it whenever the caller is heard.
        reason: why the task was cancelled; empty where that was not done from here.
    """

    def __init__(self, seconds: float) -> None:
        """Begin to watch the current task."""
        self.alive = True
        self.reason = ""
        self._seconds = seconds
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def end(self) -> None:
        """Watch no longer."""
        self._timer.cancel()

    def _look(self) -> None:
        if self.alive or self._task is None:
            self.alive = False
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)
        else:
            self.reason = f"nothing came on the stream for {self._seconds:g} s"
            self._task.cancel()


@dataclass(frozen=True)
class _Gone:
    """Stands for a file that is not there."""


def _signature(file: Path) -> Any:
    """Return something that is another when a file has changed."""
    try:
        status = file.stat()
    except OSError:
        return _Gone()
    return status.st_mtime_ns, status.st_size, status.st_ino
