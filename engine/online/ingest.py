"""The IngestService: what users do and what is published, taken in and acknowledged once it is durable."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from recall.v1 import ingest_pb2 as pb

from engine.config import Config
from engine.core.errors import RecallError, RequestError, StateUnavailableError
from engine.data.ids import IdKind
from engine.online.batcher import ClosedError, QueueFullError
from engine.online.checks import bad_count
from engine.online.committer import Committer, Lane
from engine.online.impressions import Impressions
from engine.online.ingest_wire import MAX_ENTRIES, EventReader, ItemReader, Refusals
from engine.online.metrics import Metrics
from engine.online.security import IdleWatch
from engine.online.service import refuse
from engine.state.events import EventLog
from engine.state.log import LiveLog, LogChange, PublishResult
from engine.state.writes import CommitResult, UserStore, Writes

INGEST_SERVICE = pb.DESCRIPTOR.services_by_name["IngestService"].full_name

IN_FLIGHT = 8
"""Messages of a stream that may be unanswered; the next one is not read before."""

_SMALL_BYTES = 8_192
"""Up to here a request is read on the event loop; a larger one would hold up the others for milliseconds."""

_UNIT_BYTES = 64
"""An event has that many or fewer; one that has more counts as several in the queue."""

_AGAIN = "send the same again, events with an event_id count once"

_M = TypeVar("_M", bound=Message)
_Context = grpc.aio.ServicerContext[bytes, bytes]


@dataclass(slots=True)
class _Read:
    """A request of events, checked.

    Attributes:
        writes: what the good ones write.
        counts: good ones of each kind.
        refused: the bad ones.
        size: units in the queue.
        offset: of a message of a stream.
    """

    writes: Writes
    counts: Counter[str]
    refused: Refusals
    size: int
    offset: int = 0


class IngestService:
    """Answers Report, ReportStream and UpsertItems."""

    def __init__(
        self,
        config: Config,
        id_kind: IdKind,
        users: UserStore,
        log: LiveLog,
        metrics: Metrics | None = None,
        impressions: Impressions | None = None,
        events: EventLog | None = None,
    ) -> None:
        """Start the thread that commits; must be called on the event loop that serves.

        Args:
            config: says which kinds of action there are.
            id_kind: what the catalogue's ids are.
            users: takes what users did.
            log: takes what became of items.
            metrics: told of every event.
            impressions: told of every exposure.
            events: takes what users did once more; None: there is no event log.
        """
        self._events = EventReader(config.interest, id_kind, events is not None)
        self._items = ItemReader(id_kind)
        self._metrics = metrics
        self._impressions = impressions
        self._committer = Committer(users, log, metrics, events)
        self._reading = ThreadPoolExecutor(1, "ingest")
        self._streams: set[asyncio.Task[None]] = set()
        self._idle_seconds = config.security.stream_idle_seconds

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Return the service as gRPC takes it: requests and responses are bytes, as in `RecallService.handlers`."""
        methods = {
            "Report": grpc.unary_unary_rpc_method_handler(self.report),
            "ReportStream": grpc.stream_stream_rpc_method_handler(self.report_stream),
            "UpsertItems": grpc.unary_unary_rpc_method_handler(self.upsert_items),
        }
        return grpc.method_handlers_generic_handler(INGEST_SERVICE, methods)

    async def close(self, patience: float = math.inf) -> None:
        """Refuse what is new, finish and answer what came before, and end the streams. Call it before the server stops.

        Args:
            patience: seconds after which a store that hangs is left to itself.
        """
        for stream in self._streams:
            stream.cancel()
        await self._committer.close(patience)
        self._reading.shutdown(wait=False)

    async def report(self, data: bytes, context: _Context) -> bytes:
        """Take a batch of events.

        Args:
            data: a serialized ReportRequest.
            context: of the RPC.

        Returns:
            A serialized ReportResponse, when the good events are durable.
        """
        try:
            read = await self._off_loop(self._read_report, data)
            result = await self._committer.commit(read.writes, read.size)
        except RecallError as error:
            await _abort(context, error)
        return self._answer(pb.ReportResponse(), read, result)

    async def report_stream(self, requests: AsyncIterator[bytes], context: _Context) -> None:
        """Take messages of events, and answer each, in order, when all up to it is durable.

        Args:
            requests: serialized ReportStreamRequests.
            context: of the RPC.
        """
        unanswered: asyncio.Queue[tuple[_Read, asyncio.Future[CommitResult]] | RecallError | None] = (
            asyncio.Queue()
        )
        slots = asyncio.Semaphore(IN_FLIGHT)
        reader = asyncio.create_task(self._take(requests, unanswered, slots))
        self._streams.add(reader)
        try:
            while (entry := await unanswered.get()) is not None:
                if isinstance(entry, RecallError):
                    raise entry
                read, durable = entry
                result = await durable
                await context.write(self._answer(pb.ReportStreamResponse(offset=read.offset), read, result))
                slots.release()
        except RecallError as error:
            await _abort(context, error)
        finally:
            self._streams.discard(reader)
            reader.cancel()
            while not unanswered.empty():
                left = unanswered.get_nowait()
                if isinstance(left, tuple):
                    left[1].cancel()

    async def upsert_items(self, data: bytes, context: _Context) -> bytes:
        """Publish, change and take down items.

        Args:
            data: a serialized UpsertItemsRequest.
            context: of the RPC.

        Returns:
            A serialized UpsertItemsResponse, when the good changes are durable.
        """
        try:
            changes, refused = await self._off_loop(self._read_changes, data)
            result = await self._committer.publish(changes, _size(len(changes), data))
        except RecallError as error:
            await _abort(context, error)
        return self._published(changes, refused, result)

    async def _take(
        self,
        requests: AsyncIterator[bytes],
        unanswered: asyncio.Queue[tuple[_Read, asyncio.Future[CommitResult]] | RecallError | None],
        slots: asyncio.Semaphore,
    ) -> None:
        """Read a stream and line its messages up, at most as many as may be unanswered; say how it ended."""
        lane = Lane()
        end: RecallError | None = None
        watch = IdleWatch(self._idle_seconds)
        try:
            await slots.acquire()
            async for data in requests:
                watch.alive = True
                read = await self._off_loop(self._read_message, data)
                await self._committer.room()
                unanswered.put_nowait((read, self._committer.enqueue(read.writes, read.size, lane)))
                await slots.acquire()
        except asyncio.CancelledError:
            end = ClosedError(watch.reason or "the server is shutting down")
        except RecallError as error:
            end = error
        finally:
            watch.end()
        unanswered.put_nowait(end)

    async def _off_loop(self, read: Any, data: bytes) -> Any:
        """Read a request: a small one here, a large one beside the event loop."""
        if len(data) <= _SMALL_BYTES:
            return read(data)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reading, read, data)
        except RuntimeError as error:  # it was shut down
            raise ClosedError("the server is shutting down") from error

    def _read_report(self, data: bytes) -> _Read:
        return self._read_events(_message(pb.ReportRequest, data).events, data)

    def _read_message(self, data: bytes) -> _Read:
        message = _message(pb.ReportStreamRequest, data)
        read = self._read_events(message.events, data)
        read.offset = message.offset
        return read

    def _read_events(self, events: Sequence[pb.Event], data: bytes) -> _Read:
        _check_count(len(events), "events")
        writes, refused, counts = self._events.read(events, time.time())
        return _Read(writes, counts, refused, _size(len(events), data))

    def _read_changes(self, data: bytes) -> tuple[list[LogChange], Refusals]:
        changes = _message(pb.UpsertItemsRequest, data).changes
        _check_count(len(changes), "changes")
        return self._items.read(changes, time.time())

    def _answer(self, response: Any, read: _Read, result: CommitResult) -> bytes:
        if self._impressions is not None and read.writes.exposures:
            self._impressions.exposed(read.writes.exposures)
        response.accepted = result.accepted
        response.duplicates = result.duplicates
        _add_refusals(response, read.refused)
        if self._metrics is not None:
            outcomes = {
                "accepted": result.accepted,
                "duplicate": result.duplicates,
                "refused": len(read.refused),
            }
            for outcome, count in outcomes.items():
                self._metrics.ingest_events.labels(outcome).inc(count)
            for kind, count in read.counts.items():
                self._metrics.ingest_kinds.labels(kind).inc(count)
        return response.SerializeToString()  # type: ignore[no-any-return]

    def _published(self, changes: Sequence[LogChange], refused: Refusals, result: PublishResult) -> bytes:
        response = pb.UpsertItemsResponse(accepted=len(changes), stale=result.stale, log_offset=result.offset)
        _add_refusals(response, refused)
        if self._metrics is not None:
            counts = {"accepted": len(changes) - result.stale, "stale": result.stale, "refused": len(refused)}
            for outcome, count in counts.items():
                self._metrics.items_changed.labels(outcome).inc(count)
        return response.SerializeToString()


def _message(kind: type[_M], data: bytes) -> _M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise RequestError([("", f"expected a serialized {kind.DESCRIPTOR.full_name}")]) from error


def _check_count(count: int, field: str) -> None:
    if count > MAX_ENTRIES:
        raise RequestError([(field, bad_count(count, MAX_ENTRIES))])


def _size(entries: int, data: bytes) -> int:
    return max(entries, len(data) // _UNIT_BYTES)


def _add_refusals(response: Any, refused: Refusals) -> None:
    for index, field, reason in refused:
        response.refused.add(index=index, field=field, reason=reason)


async def _abort(context: _Context, error: RecallError) -> NoReturn:
    """End the RPC with the status that an error stands for."""
    if isinstance(error, RequestError):
        await refuse(context, error)
    text = str(error)
    if isinstance(error, StateUnavailableError):
        await context.abort(grpc.StatusCode.UNAVAILABLE, f"{text}; {_AGAIN}")
    if isinstance(error, ClosedError):
        await context.abort(grpc.StatusCode.UNAVAILABLE, text)
    if isinstance(error, QueueFullError):
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
    await context.abort(grpc.StatusCode.INTERNAL, text)
