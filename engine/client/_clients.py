"""The clients of the recall service: a blocking one and one for asyncio."""

from __future__ import annotations

from typing import Unpack

import grpc
from recall.v1 import recall_pb2 as pb
from recall.v1 import recall_pb2_grpc

from engine.client._connection import AsyncConnection, BlockingConnection
from engine.client._messages import to_message, to_result, translated
from engine.client._values import Recall, RecallResult

_SERVICE = pb.DESCRIPTOR.services_by_name["RecallService"].full_name


class RecallClient(BlockingConnection):
    """A blocking client. Safe to share between threads; close it, or use it as a context manager."""

    _service = _health_name = _SERVICE
    _retried = ("Recall",)

    def _bind(self, channel: grpc.Channel) -> None:
        stub = recall_pb2_grpc.RecallServiceStub(channel)  # type: ignore[no-untyped-call]
        self._recall = self._access.on(stub.Recall)

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


class AsyncRecallClient(AsyncConnection):
    """The client for asyncio. Make it on the event loop; close it, or use it as a context manager."""

    _service = _health_name = _SERVICE
    _retried = ("Recall",)

    def _bind(self, channel: grpc.aio.Channel) -> None:
        stub = recall_pb2_grpc.RecallServiceStub(channel)  # type: ignore[no-untyped-call]
        self._recall = self._access.on(stub.Recall)

    async def recall(self, *, timeout: float | None = None, **arguments: Unpack[Recall]) -> RecallResult:
        """Ask for candidates; arguments and errors as in `RecallClient.recall`."""
        request = to_message(**arguments)
        try:
            response = await self._recall(request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise translated(error) from error
        return to_result(response)
