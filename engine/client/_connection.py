"""What all clients are: a channel to a server, with its settings, a wait for health, and an end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.client._security import Access, Security

MAX_RESPONSE_BYTES = 64 << 20

_POLL_SECONDS = 0.05


class BlockingConnection:
    """A channel whose calls block."""

    _service = ""
    """The service's full name."""

    _retried: tuple[str, ...] = ()
    """Its methods that are tried again where the server is unavailable."""

    _health_name = ""
    """What the health service is asked about; the server as a whole."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = 1.0,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        options: Sequence[tuple[str, Any]] = (),
        **security: Unpack[Security],
    ) -> None:
        """Make a client; it connects with the first call.

        Args:
            target: "host:port", or any other gRPC target.
            timeout: seconds that a call may take, retries included, unless it says otherwise; None: no end.
            max_response_bytes: larger answers are refused.
            options: more gRPC channel arguments; they win over those that are set here.
            security: TLS, a certificate, a token; see `Security`. Without any it is a plain connection.

        Raises:
            ValueError, OSError: what `security` says cannot be done.
        """
        self._timeout = timeout
        self._access = Access(target, **security)
        credentials = self._access.credentials
        settings = _options(self._service, self._retried, max_response_bytes, options)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, settings)
        else:
            self._channel = grpc.secure_channel(target, credentials, settings)
        self._check = health_pb2_grpc.HealthStub(self._channel).Check
        self._bind(self._channel)

    def _bind(self, channel: grpc.Channel) -> None:
        """Take the service's methods from the channel."""
        raise NotImplementedError

    def wait_ready(self, timeout: float = 10.0) -> None:
        """Wait until the server says that it serves.

        Raises:
            TimeoutError: it did not within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        request = health_pb2.HealthCheckRequest(service=self._health_name)
        while (left := end - time.monotonic()) > 0:
            try:
                if _serves(self._check(request, timeout=left, wait_for_ready=True)):
                    return
            except grpc.RpcError as error:
                _only_not_ready(error)
            time.sleep(_POLL_SECONDS)
        raise TimeoutError(f"the server did not become ready within {timeout:g} s")

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncConnection:
    """A channel whose calls are awaited. Made on the event loop."""

    _service = ""
    _retried: tuple[str, ...] = ()
    _health_name = ""

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = 1.0,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        options: Sequence[tuple[str, Any]] = (),
        **security: Unpack[Security],
    ) -> None:
        """Make a client; arguments as in the blocking one."""
        self._timeout = timeout
        self._access = Access(target, **security)
        credentials = self._access.credentials
        settings = _options(self._service, self._retried, max_response_bytes, options)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, settings)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, settings)
        self._check = health_pb2_grpc.HealthStub(self._channel).Check
        self._bind(self._channel)

    def _bind(self, channel: grpc.aio.Channel) -> None:
        """Take the service's methods from the channel."""
        raise NotImplementedError

    async def wait_ready(self, timeout: float = 10.0) -> None:
        """Wait until the server says that it serves.

        Raises:
            TimeoutError: it did not within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        request = health_pb2.HealthCheckRequest(service=self._health_name)
        while (left := end - time.monotonic()) > 0:
            try:
                if _serves(await self._check(request, timeout=left, wait_for_ready=True)):
                    return
            except grpc.RpcError as error:
                _only_not_ready(error)
            await asyncio.sleep(_POLL_SECONDS)
        raise TimeoutError(f"the server did not become ready within {timeout:g} s")

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _options(
    service: str, methods: Sequence[str], max_response_bytes: int, more: Sequence[tuple[str, Any]]
) -> list[tuple[str, Any]]:
    retries = {
        "methodConfig": [
            {
                "name": [{"service": service, "method": method} for method in methods],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
    settings: dict[str, Any] = {
        # Notices a peer that died behind a silent network; servers of this project allow one ping every 10 s.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
        # Each client has a connection of its own. gRPC would let all of a process share one, and a server that has
        # several workers gives a connection to one of them.
        "grpc.use_local_subchannel_pool": 1,
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 5_000,
        "grpc.max_receive_message_length": max_response_bytes,
        "grpc.enable_retries": 1,
        "grpc.service_config": json.dumps(retries),
    }
    return list((settings | dict(more)).items())


def _serves(response: health_pb2.HealthCheckResponse) -> bool:
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _only_not_ready(error: Any) -> None:
    """Raise a failed health check again unless it means no more than "not yet"."""
    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise error
