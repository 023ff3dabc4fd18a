"""The RecallService: from request bytes to response bytes, and from our errors to gRPC's."""

from __future__ import annotations

import itertools
import math
import secrets
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from recall.v1 import recall_pb2 as pb

from engine.config import Config
from engine.core.errors import RecallError, RequestError, StateUnavailableError
from engine.online.admission import Admission
from engine.online.batcher import Batcher, ClosedError, ComputeError, DeadlinePassedError, QueueFullError
from engine.online.metrics import Metrics
from engine.online.telemetry import sampled_trace
from engine.online.wire import parse

SERVICE = pb.DESCRIPTOR.services_by_name["RecallService"].full_name

METHOD = f"/{SERVICE}/Recall"

PUSHBACK = "grpc-retry-pushback-ms"
"""The trailing metadata key by which gRPC's clients learn when to try again, where they are set to retry at all."""

STATUS_DETAILS = "grpc-status-details-bin"
"""The trailing metadata key that carries a google.rpc.Status, by gRPC's convention."""

# Peers refuse metadata beyond 8 KiB. The text is percent-encoded (three times its size at worst) and the
# details, which hold it again, are base64: with these both fit.
_MAX_MESSAGE_BYTES = 512
_MAX_VIOLATIONS_BYTES = 3072


_CODES: Mapping[type[RecallError], grpc.StatusCode] = {
    DeadlinePassedError: grpc.StatusCode.DEADLINE_EXCEEDED,
    ClosedError: grpc.StatusCode.UNAVAILABLE,
    StateUnavailableError: grpc.StatusCode.UNAVAILABLE,
    ComputeError: grpc.StatusCode.INTERNAL,
}


class RecallService:
    """Answers the Recall RPC."""

    def __init__(
        self, config: Config, batcher: Batcher, metrics: Metrics | None = None, traces: bool = False
    ) -> None:
        """Take what is needed.

        Args:
            config: limits, scenes, events.
            batcher: what computes.
            metrics: told of calls that fail.
            traces: whether the caller's trace context is looked for.
        """
        self._config = config
        self._batcher = batcher
        self._metrics = metrics
        self._traces = traces
        # Random once, then counted: a random id per request would cost a system call each.
        self._run_id = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Return the service as gRPC takes it.

        Requests come as bytes, so that one that is no message is refused as INVALID_ARGUMENT and not as a
        failure of ours; responses are bytes already.
        """
        return _Handlers(self, self._batcher.admission)

    async def recall(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """Answer one request.

        Args:
            data: a serialized RecallRequest.
            context: of the RPC; its deadline is the request's budget.

        Returns:
            A serialized RecallResponse.
        """
        now = time.monotonic()
        left = context.time_remaining()
        deadline = math.inf if left is None else now + left
        refusal = self._batcher.admission.refusal(deadline, now)
        if refusal:
            await self._turn_away(context, refusal)
        try:
            message = pb.RecallRequest.FromString(data)
            id_kind = self._batcher.replica.catalogue.id_type
            scene, request = parse(message, self._config, id_kind, deadline, int(time.time()))
        except DecodeError:
            self._count(grpc.StatusCode.INVALID_ARGUMENT)
            await refuse(context, RequestError([("", "expected a serialized recall.v1.RecallRequest")]))
        except RequestError as error:
            self._count(grpc.StatusCode.INVALID_ARGUMENT)
            await refuse(context, error)
        request_id = message.request_id or f"{self._run_id}-{next(self._numbers)}"
        trace = sampled_trace(context.invocation_metadata()) if self._traces else ""
        try:
            return await self._batcher.submit(scene, request, request_id, message.debug, trace)
        except QueueFullError as error:
            await self._turn_away(context, str(error))
        except RecallError as error:
            code = _CODES.get(type(error), grpc.StatusCode.INTERNAL)
            self._count(code)
            await context.abort(code, str(error))

    def _count(self, code: grpc.StatusCode) -> None:
        if self._metrics is not None:
            self._metrics.calls_failed.labels(code.name).inc()

    async def shed(self, stream: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> NoReturn:
        """Refuse a call without reading its request."""
        del stream
        await self._turn_away(context, "the requests in flight are not getting fewer; try again later")

    async def _turn_away(self, context: grpc.aio.ServicerContext[bytes, bytes], text: str) -> NoReturn:
        self._count(grpc.StatusCode.RESOURCE_EXHAUSTED)
        pushback = str(self._batcher.admission.pushback_ms())
        await context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED, text, trailing_metadata=((PUSHBACK, pushback),)
        )


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # the stubs alone are generic
    """Finds the method of a call; at the limit on requests in flight it takes its time (`Admission.room`)."""

    def __init__(self, service: RecallService, admission: Admission) -> None:
        self._admission = admission
        self._recall = grpc.unary_unary_rpc_method_handler(service.recall)
        # Of a stream nothing is read before its handler asks for it.
        self._shed = grpc.stream_stream_rpc_method_handler(service.shed)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return what answers a call, None for a method of another service."""
        if details.method != METHOD:
            return None
        return self._recall if self._admission.room() else self._shed


async def refuse(context: grpc.aio.ServicerContext[bytes, bytes], error: RequestError) -> NoReturn:
    """End the RPC with INVALID_ARGUMENT and a google.rpc.BadRequest that names the fields."""
    bad = error_details_pb2.BadRequest()
    for n, (field, text) in enumerate(error.violations):
        bad.field_violations.add(field=field, description=text)
        if bad.ByteSize() > _MAX_VIOLATIONS_BYTES:
            del bad.field_violations[-1]
            bad.field_violations.add(description=f"and {len(error.violations) - n} more")
            break
    first = "; ".join(
        f"{violation.field}: {violation.description}" if violation.field else violation.description
        for violation in bad.field_violations
    )
    cut = first.encode()
    text = (
        first if len(cut) <= _MAX_MESSAGE_BYTES else f"{cut[:_MAX_MESSAGE_BYTES].decode(errors='ignore')}..."
    )
    details = AnyMessage()
    details.Pack(bad)
    status = status_pb2.Status(
        code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=text, details=[details]
    )
    await context.abort(
        grpc.StatusCode.INVALID_ARGUMENT,
        text,
        trailing_metadata=((STATUS_DETAILS, status.SerializeToString()),),
    )
