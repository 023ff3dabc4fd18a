"""The RecallService: from request bytes to response bytes, and from our errors to gRPC's."""

from __future__ import annotations

import itertools
import math
import secrets
import time
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from recall.v1 import recall_pb2 as pb

from engine.config import Config
from engine.core.errors import RequestError, StateUnavailableError
from engine.online.batcher import Batcher, ClosedError, ComputeError, DeadlinePassedError, QueueFullError
from engine.online.wire import parse

SERVICE = pb.DESCRIPTOR.services_by_name["RecallService"].full_name

STATUS_DETAILS = "grpc-status-details-bin"
"""The trailing metadata key that carries a google.rpc.Status, by gRPC's convention."""

# Peers refuse metadata beyond 8 KiB. The text is percent-encoded (three times its size at worst) and the
# details, which hold it again, are base64: with these both fit.
_MAX_MESSAGE_BYTES = 512
_MAX_VIOLATIONS_BYTES = 3072


class RecallService:
    """Answers the Recall RPC."""

    def __init__(self, config: Config, batcher: Batcher) -> None:
        """Take the configuration (limits, scenes, events) and what computes."""
        self._config = config
        self._batcher = batcher
        # Random once, then counted: a random id per request would cost a system call each.
        self._run_id = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Return the service as gRPC takes it.

        Requests come as bytes, so that one that is no message is refused as INVALID_ARGUMENT and not as a
        failure of ours; responses are bytes already.
        """
        method = grpc.unary_unary_rpc_method_handler(self.recall)
        return grpc.method_handlers_generic_handler(SERVICE, {"Recall": method})

    async def recall(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """Answer one request.

        Args:
            data: a serialized RecallRequest.
            context: of the RPC; its deadline is the request's budget.

        Returns:
            A serialized RecallResponse.
        """
        left = context.time_remaining()
        deadline = math.inf if left is None else time.monotonic() + left
        try:
            message = pb.RecallRequest.FromString(data)
            id_kind = self._batcher.replica.catalogue.id_type
            scene, request = parse(message, self._config, id_kind, deadline, int(time.time()))
        except DecodeError:
            await refuse(context, RequestError([("", "expected a serialized recall.v1.RecallRequest")]))
        except RequestError as error:
            await refuse(context, error)
        request_id = message.request_id or f"{self._run_id}-{next(self._numbers)}"
        try:
            return await self._batcher.submit(scene, request, request_id, message.debug)
        except QueueFullError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except DeadlinePassedError as error:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        except ClosedError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except StateUnavailableError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except ComputeError as error:
            await context.abort(grpc.StatusCode.INTERNAL, str(error))


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
