"""The RecallService: from request bytes to response bytes, and from our errors to gRPC's."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from recall.v1 import recall_pb2 as pb

from engine.config import Config
from engine.core.errors import RecallError, RequestError, StateUnavailableError
from engine.online.batcher import Batcher, ClosedError, ComputeError, DeadlinePassedError, QueueFullError
from engine.online.calls import Call, Metadata
from engine.online.metrics import Metrics
from engine.online.security import Gate
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


_NO_MESSAGE = "expected a serialized recall.v1.RecallRequest"

_CODES: Mapping[type[RecallError], grpc.StatusCode] = {
    DeadlinePassedError: grpc.StatusCode.DEADLINE_EXCEEDED,
    ClosedError: grpc.StatusCode.UNAVAILABLE,
    StateUnavailableError: grpc.StatusCode.UNAVAILABLE,
    ComputeError: grpc.StatusCode.INTERNAL,
}


class RecallService:
    """Answers the Recall RPC."""

    def __init__(
        self,
        config: Config,
        batcher: Batcher,
        metrics: Metrics | None = None,
        traces: bool = False,
        gates: Sequence[Gate] = (),
    ) -> None:
        """Take what is needed.

        Args:
            config: limits, scenes, events.
            batcher: what computes.
            metrics: told of calls that fail.
            traces: whether the caller's trace context is looked for.
            gates: who may call.
        """
        self._config = config
        self._batcher = batcher
        self._metrics = metrics
        self._traces = traces
        self._gates = gates
        # Random once, then counted: a random id per request would cost a system call each.
        self._run_id = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def begin(self, call: Call) -> None:
        """Take a call: refuse it, or read its request; on the thread of the calls, as all that leads to the queue."""
        for gate in self._gates:
            refusal = gate.refusal(METHOD, call)
            if refusal is not None:
                call.refuse(*refusal)
                return
        now = time.monotonic()
        deadline = call.deadline(now)
        text = self._batcher.admission.refusal(deadline, now)
        if text:
            call.refuse(*self._exhausted(text))
        else:
            self._batcher.admission.expect()
            call.receive(partial(self._received, call, deadline))

    def _received(self, call: Call, deadline: float, data: bytes | None) -> None:
        """Put one request into the queue.

        Args:
            call: of the request.
            deadline: the request's budget, on the clock of time.monotonic(), seconds.
            data: a serialized RecallRequest; None where there was none.
        """
        self._batcher.admission.arrived()
        if data is None:  # or the caller is gone, and hears nothing of it
            call.fail(grpc.StatusCode.INVALID_ARGUMENT, *_bad_request(RequestError([("", _NO_MESSAGE)])))
            return
        try:
            message = pb.RecallRequest.FromString(data)
            id_kind = self._batcher.replica.catalogue.id_type
            scene, request = parse(message, self._config, id_kind, deadline, int(time.time()))
        except DecodeError:
            self._refuse(call, RequestError([("", _NO_MESSAGE)]))
        except RequestError as error:
            self._refuse(call, error)
        else:
            request_id = message.request_id or f"{self._run_id}-{next(self._numbers)}"
            trace = sampled_trace(call.metadata) if self._traces else ""
            reply = _Reply(call, self)
            try:
                self._batcher.submit(scene, request, request_id, reply, message.debug, trace)
            except RecallError as error:
                reply.deliver(error)

    def _refuse(self, call: Call, error: RequestError) -> None:
        self._count(grpc.StatusCode.INVALID_ARGUMENT)
        call.fail(grpc.StatusCode.INVALID_ARGUMENT, *_bad_request(error))

    def fail(self, call: Call, error: RecallError) -> None:
        """End a call whose request was received, but cannot be answered."""
        if isinstance(error, QueueFullError):
            call.fail(*self._exhausted(str(error)))
        else:
            code = _CODES.get(type(error), grpc.StatusCode.INTERNAL)
            self._count(code)
            call.fail(code, str(error))

    def _exhausted(self, text: str) -> tuple[grpc.StatusCode, str, Metadata]:
        self._count(grpc.StatusCode.RESOURCE_EXHAUSTED)
        pushback = str(self._batcher.admission.pushback_ms())
        return grpc.StatusCode.RESOURCE_EXHAUSTED, text, ((PUSHBACK, pushback),)

    def _count(self, code: grpc.StatusCode) -> None:
        if self._metrics is not None:
            self._metrics.calls_failed.labels(code.name).inc()


class _Reply:
    """Brings an outcome to the caller."""

    __slots__ = ("_call", "_service")

    def __init__(self, call: Call, service: RecallService) -> None:
        self._call = call
        self._service = service

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more."""
        return self._call.cancelled

    def deliver(self, outcome: bytes | RecallError) -> None:
        """Send the response, or the status that says why there is none."""
        if isinstance(outcome, bytes):
            self._call.answer(outcome)
        else:
            self._service.fail(self._call, outcome)


async def refuse(context: grpc.aio.ServicerContext[bytes, bytes], error: RequestError) -> NoReturn:
    """End an RPC of grpc.aio with INVALID_ARGUMENT and a google.rpc.BadRequest that names the fields."""
    text, metadata = _bad_request(error)
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text, trailing_metadata=tuple(metadata))


def _bad_request(error: RequestError) -> tuple[str, Metadata]:
    """Return what says that a request is wrong: a text, and trailing metadata with a google.rpc.BadRequest."""
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
    return text, ((STATUS_DETAILS, status.SerializeToString()),)
