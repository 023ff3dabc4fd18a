"""Who may call what: callers are told apart by token and certificate, and held to the allow-lists."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import grpc
from grpc_health.v1 import health
from recall.v1 import ingest_pb2, recall_pb2

from engine.config import Config, SecurityConfig
from engine.core.errors import ConfigError
from engine.online.calls import Call
from engine.online.security.tokens import Tokens

Service: TypeAlias = Literal["recall", "ingest", "admin"]
"""What callers are allowed: one of the two APIs, or everything else that is not health, which is reflection."""

EVERYBODY = "*"
"""In an allow-list: every caller with a known token or an accepted certificate."""

_SERVICES: dict[str, Service | None] = {
    recall_pb2.DESCRIPTOR.services_by_name["RecallService"].full_name: "recall",
    ingest_pb2.DESCRIPTOR.services_by_name["IngestService"].full_name: "ingest",
    health.SERVICE_NAME: None,  # open: load balancers have no token
}

_MOST_SHOWN = 8

_UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
_DENIED = grpc.StatusCode.PERMISSION_DENIED

_log = logging.getLogger(__name__)


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
