"""The clients: a blocking one and one for asyncio."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from recall.v1 import recall_pb2 as pb
from recall.v1 import recall_pb2_grpc

from engine.client._messages import to_message, to_result, translated
from engine.client._values import Recall, RecallResult

MAX_RESPONSE_BYTES = 64 << 20

_SERVICE = pb.DESCRIPTOR.services_by_name["RecallService"].full_name
_HEALTH_REQUEST = health_pb2.HealthCheckRequest(service=_SERVICE)
_POLL_SECONDS = 0.05
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
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


class RecallClient:
    """A blocking client. Safe to share between threads; close it, or use it as a context manager."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = 1.0,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Make a client; it connects with the first call.

        Args:
            target: "host:port", or any other gRPC target.
            timeout: seconds that a call may take, retries included, unless it says otherwise; None: no end.
            max_response_bytes: larger answers are refused.
            credentials: for TLS; None is a plain connection.
            options: more gRPC channel arguments; they win over those that are set here.
        """
        self._timeout = timeout
        settings = _options(max_response_bytes, options)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, settings)
        else:
            self._channel = grpc.secure_channel(target, credentials, settings)
        self._recall = recall_pb2_grpc.RecallServiceStub(self._channel).Recall  # type: ignore[no-untyped-call]
        self._check = health_pb2_grpc.HealthStub(self._channel).Check

    def recall(self, *, timeout: float | None = None, **arguments: Unpack[Recall]) -> RecallResult:
        """Ask for candidates.

        Args:
            timeout: seconds; None is the client's own.
            arguments: see `Recall`.

        Raises:
            InvalidRequest: the server refuses an argument.
            ValueError, TypeError: an argument cannot even be sent.
            grpc.RpcError: any other failure; DEADLINE_EXCEEDED when the time is up.
        """
        request = to_message(**arguments)
        try:
            response = self._recall(request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise translated(error) from error
        return to_result(response)

    def wait_ready(self, timeout: float = 10.0) -> None:
        """Wait until the server says that it serves.

        Raises:
            TimeoutError: it did not within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            try:
                if _serves(self._check(_HEALTH_REQUEST, timeout=left, wait_for_ready=True)):
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


class AsyncRecallClient:
    """The client for asyncio. Make it on the event loop; close it, or use it as a context manager."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = 1.0,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Make a client; arguments as in `RecallClient`."""
        self._timeout = timeout
        settings = _options(max_response_bytes, options)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, settings)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, settings)
        self._recall = recall_pb2_grpc.RecallServiceStub(self._channel).Recall  # type: ignore[no-untyped-call]
        self._check = health_pb2_grpc.HealthStub(self._channel).Check

    async def recall(self, *, timeout: float | None = None, **arguments: Unpack[Recall]) -> RecallResult:
        """Ask for candidates; arguments and errors as in `RecallClient.recall`."""
        request = to_message(**arguments)
        try:
            response = await self._recall(request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise translated(error) from error
        return to_result(response)

    async def wait_ready(self, timeout: float = 10.0) -> None:
        """Wait until the server says that it serves.

        Raises:
            TimeoutError: it did not within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            try:
                if _serves(await self._check(_HEALTH_REQUEST, timeout=left, wait_for_ready=True)):
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


def _options(max_response_bytes: int, more: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    settings: dict[str, Any] = {
        # Notices a peer that died behind a silent network; servers of this project allow one ping every 10 s.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 5_000,
        "grpc.max_receive_message_length": max_response_bytes,
        "grpc.enable_retries": 1,
        "grpc.service_config": json.dumps(_SERVICE_CONFIG),
    }
    return list((settings | dict(more)).items())


def _serves(response: health_pb2.HealthCheckResponse) -> bool:
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _only_not_ready(error: Any) -> None:
    """Raise a failed health check again unless it means no more than "not yet"."""
    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise error
