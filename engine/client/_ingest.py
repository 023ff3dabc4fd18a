"""The clients of the ingest service: a blocking one and one for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, Unpack

import grpc
from recall.v1 import ingest_pb2 as pb
from recall.v1 import ingest_pb2_grpc

from engine.client._connection import MAX_RESPONSE_BYTES, AsyncConnection, BlockingConnection
from engine.client._ingest_messages import (
    EventWriter,
    acknowledged,
    add_changes,
    report_result,
    upsert_result,
)
from engine.client._ingest_values import Acknowledged, Event, Item, ReportResult, TakeDown, UpsertResult
from engine.client._messages import translated
from engine.client._security import Security

Batch: TypeAlias = tuple[int, Iterable[Event | pb.Event]]
"""An offset of the caller's own, and events."""

IN_FLIGHT = 8
"""Batches of a stream that may be unanswered."""

_SERVICE = pb.DESCRIPTOR.services_by_name["IngestService"].full_name
_TIMEOUT = 10.0
_PATIENCE = 30.0
_BACKOFF = (0.05, 1.0)
_OWN_ERROR = "Internal error from Core"
# CANCELLED, which nobody here asked for, is what gRPC makes of a call that a stopping server did not take.
_TEMPORARY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)


class IngestClient(BlockingConnection):
    """A blocking client. Safe to share between threads; close it, or use it as a context manager."""

    _service = _SERVICE
    _retried = ("Report", "UpsertItems")

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = _TIMEOUT,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        options: Sequence[tuple[str, Any]] = (),
        **security: Unpack[Security],
    ) -> None:
        """Make a client; arguments as in `RecallClient`, but for a longer timeout."""
        super().__init__(
            target,
            timeout=timeout,
            max_response_bytes=max_response_bytes,
            options=options,
            **security,
        )
        self._writer = EventWriter()

    def _bind(self, channel: grpc.Channel) -> None:
        stub = ingest_pb2_grpc.IngestServiceStub(channel)  # type: ignore[no-untyped-call]
        methods = stub.Report, stub.ReportStream, stub.UpsertItems
        self._report, self._report_stream, self._upsert = map(self._access.on, methods)

    def report(self, events: Iterable[Event | pb.Event], *, timeout: float | None = None) -> ReportResult:
        """Report a batch of events; returns when the good ones are durable.

        An event without an event_id gets one, so that the retries of a server that is unavailable count once.

        Args:
            events: at most 10,000; messages of `recall.v1.ingest_pb2` will do.
            timeout: seconds; None is the client's own.

        Raises:
            InvalidRequest: the server refuses the batch as a whole.
            ValueError, TypeError: an event cannot even be sent.
            grpc.RpcError: any other failure; sending the same events again, with their event_ids, is harmless.
        """
        request = pb.ReportRequest()
        self._writer.add(events, request.events)
        try:
            response = self._report(request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise translated(error) from error
        return report_result(response)

    def upsert_items(
        self, changes: Iterable[Item | TakeDown | pb.ItemChange], *, timeout: float | None = None
    ) -> UpsertResult:
        """Publish, change and take down items; returns when the good changes are durable.

        Args:
            changes: at most 10,000; messages of `recall.v1.ingest_pb2` will do.
            timeout: seconds; None is the client's own.

        Raises:
            InvalidRequest, ValueError, TypeError, grpc.RpcError: as `report`.
        """
        request = pb.UpsertItemsRequest()
        add_changes(changes, request.changes)
        try:
            response = self._upsert(request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise translated(error) from error
        return upsert_result(response)

    def stream(
        self, batches: Iterable[Batch], *, in_flight: int = IN_FLIGHT, patience: float = _PATIENCE
    ) -> Iterator[Acknowledged]:
        """Send batches one after another without waiting for each answer; yields the answers, in order.

        To resume after a failure, begin behind the last offset that was yielded. A source that keeps one waiting holds
        up the answers too: for such a one use `open_stream`.

        Args:
            batches: offsets of the caller's own, and events, at most 10,000 each; taken as fast as the server does.
            in_flight: batches that may be unanswered.
            patience: as in `open_stream`.

        Raises:
            as `EventStream.receive`.
        """
        with self.open_stream(patience=patience) as stream:
            for offset, events in batches:
                while stream.pending >= in_flight and (answer := stream.receive()):
                    yield answer
                stream.send(offset, events)
                while answer := stream.receive(0):
                    yield answer
            while answer := stream.receive():
                yield answer

    def open_stream(self, *, patience: float = _PATIENCE) -> EventStream:
        """Open a stream of batches.

        Args:
            patience: seconds that the server may be unavailable or full, while what it did not answer is sent again.
        """
        return EventStream(self._report_stream, self._writer, patience)


class EventStream:
    """Batches on their way, in order. What the server did not answer is kept, and sent again when it comes back.

    For one thread; close it, or use it as a context manager.
    """

    def __init__(self, method: Any, writer: EventWriter, patience: float) -> None:
        self._method = method
        self._writer = writer
        self._retry = _Retry(patience)
        self._unanswered: deque[pb.ReportStreamRequest] = deque()
        self._call = _Call(method, ())

    @property
    def pending(self) -> int:
        """How many batches are not answered."""
        return len(self._unanswered)

    def send(self, offset: int, events: Iterable[Event | pb.Event]) -> None:
        """Send a batch, without waiting.

        Raises:
            ValueError, TypeError: an event cannot be sent.
        """
        message = pb.ReportStreamRequest(offset=offset)
        self._writer.add(events, message.events)
        self._unanswered.append(message)
        self._call.requests.put(message)

    def receive(self, timeout: float | None = None) -> Acknowledged | None:
        """Return the next answer; None where nothing is pending, or when it does not come within `timeout` seconds.

        Raises:
            InvalidRequest: the server refuses a batch as a whole.
            grpc.RpcError, ConnectionError: the stream failed, for longer than patience lasts where that may pass.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self._unanswered:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                answer = (
                    self._call.answers.get(timeout=left) if left != 0 else self._call.answers.get_nowait()
                )
            except queue.Empty:
                return None
            if isinstance(answer, pb.ReportStreamResponse):
                self._unanswered.popleft()
                self._retry.reset()
                return acknowledged(answer)
            self._again(answer)
        return None

    def close(self) -> None:
        """End the stream; what is pending may have gone in or not."""
        self._call.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _again(self, error: Any) -> None:
        """After a failure: open the stream anew and send what was not answered, or raise."""
        time.sleep(self._retry.delay(error))
        self._call.end()
        self._call = _Call(self._method, self._unanswered)


class _Call:
    """One RPC of a stream: what goes out and what comes in, each through a queue."""

    def __init__(self, method: Any, first: Iterable[pb.ReportStreamRequest]) -> None:
        self.requests: queue.SimpleQueue[pb.ReportStreamRequest | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[pb.ReportStreamResponse | grpc.RpcError | None] = queue.SimpleQueue()
        for message in first:
            self.requests.put(message)
        self._call = method(iter(self.requests.get, None))
        threading.Thread(target=self._receive, name="ingest-answers", daemon=True).start()

    def end(self) -> None:
        """Send nothing more and hear nothing more."""
        self.requests.put(None)
        self._call.cancel()

    def _receive(self) -> None:
        try:
            for response in self._call:
                self.answers.put(response)
            self.answers.put(None)
        except grpc.RpcError as error:
            self.answers.put(error)


class AsyncIngestClient(AsyncConnection):
    """The client for asyncio. Make it on the event loop; close it, or use it as a context manager."""

    _service = _SERVICE
    _retried = ("Report", "UpsertItems")

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = _TIMEOUT,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        options: Sequence[tuple[str, Any]] = (),
        **security: Unpack[Security],
    ) -> None:
        """Make a client; arguments as in `IngestClient`."""
        super().__init__(
            target,
            timeout=timeout,
            max_response_bytes=max_response_bytes,
            options=options,
            **security,
        )
        self._writer = EventWriter()

    def _bind(self, channel: grpc.aio.Channel) -> None:
        stub = ingest_pb2_grpc.IngestServiceStub(channel)  # type: ignore[no-untyped-call]
        methods = stub.Report, stub.ReportStream, stub.UpsertItems
        self._report, self._report_stream, self._upsert = map(self._access.on, methods)

    async def report(
        self, events: Iterable[Event | pb.Event], *, timeout: float | None = None
    ) -> ReportResult:
        """Report a batch of events; arguments and errors as in `IngestClient.report`."""
        request = pb.ReportRequest()
        self._writer.add(events, request.events)
        try:
            response = await self._report(request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise translated(error) from error
        return report_result(response)

    async def upsert_items(
        self, changes: Iterable[Item | TakeDown | pb.ItemChange], *, timeout: float | None = None
    ) -> UpsertResult:
        """Publish, change and take down items; arguments and errors as in `IngestClient.upsert_items`."""
        request = pb.UpsertItemsRequest()
        add_changes(changes, request.changes)
        try:
            response = await self._upsert(request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise translated(error) from error
        return upsert_result(response)

    async def stream(
        self,
        batches: AsyncIterable[Batch] | Iterable[Batch],
        *,
        in_flight: int = IN_FLIGHT,
        patience: float = _PATIENCE,
    ) -> AsyncIterator[Acknowledged]:
        """Send batches without waiting for each answer; yields the answers, in order, as soon as they come.

        Arguments and errors as in `IngestClient.stream`; a source that keeps one waiting holds nothing up here.
        """
        retry = _Retry(patience)
        unanswered: deque[pb.ReportStreamRequest] = deque()
        source = aiter(_asynchronous(batches))
        upcoming: asyncio.Future[Batch | None] | None = asyncio.ensure_future(_next(source))
        call: Any = None
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            while upcoming is not None or unanswered:
                try:
                    if call is None:
                        call = self._report_stream()
                        answer = asyncio.ensure_future(call.read())
                        for message in unanswered:
                            await _write(call, message)
                    awaited: list[asyncio.Future[Any]] = [answer]
                    if upcoming is not None and len(unanswered) < in_flight:
                        awaited.append(upcoming)
                    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                    response = answer.result() if answer.done() else None
                except grpc.RpcError as error:
                    failure = await _failure(call, error)
                    call = None
                    if _passes(failure) and not unanswered and upcoming is not None and not upcoming.done():
                        # A server ends a stream on which nothing comes. Nothing is lost; another is opened in time.
                        await asyncio.wait((upcoming,))
                        retry.reset()
                    else:
                        await asyncio.sleep(retry.delay(failure))
                    continue
                if response is grpc.aio.EOF:  # type: ignore[attr-defined]
                    await asyncio.sleep(retry.delay(None))
                    call = None
                elif response is not None:
                    retry.reset()
                    unanswered.popleft()
                    answer = asyncio.ensure_future(call.read())
                    yield acknowledged(response)
                elif upcoming is not None:
                    batch = upcoming.result()
                    upcoming = None if batch is None else asyncio.ensure_future(_next(source))
                    if batch is not None:
                        message = pb.ReportStreamRequest(offset=batch[0])
                        self._writer.add(batch[1], message.events)
                        unanswered.append(message)
                        await _write(call, message)
        finally:
            answer.cancel()
            if upcoming is not None:
                upcoming.cancel()
            if call is not None:
                call.cancel()


async def _write(call: Any, message: pb.ReportStreamRequest) -> None:
    """Send a message; where the stream has failed meanwhile, reading from it says how, so this does not."""
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
        await call.write(message)


async def _failure(call: Any, error: Any) -> Any:
    """Return why a stream failed; None where that cannot be told.

    A message that is on its way out when the server ends the stream makes grpc.aio report an error of its own, until
    the server's word has come in.
    """
    if error.details() != _OWN_ERROR:
        return error
    await asyncio.sleep(_BACKOFF[0])
    code, details = await call.code(), await call.details()
    if details == _OWN_ERROR:
        return None
    return grpc.aio.AioRpcError(
        code, await call.initial_metadata(), await call.trailing_metadata(), details, None
    )


async def _next(source: AsyncIterator[Batch]) -> Batch | None:
    return await anext(source, None)


async def _asynchronous(batches: AsyncIterable[Batch] | Iterable[Batch]) -> AsyncIterator[Batch]:
    if isinstance(batches, AsyncIterable):
        async for batch in batches:
            yield batch
    else:
        for batch in batches:
            yield batch


def _passes(error: Any) -> bool:
    """Whether a failure may pass; None is a stream that the other side ended."""
    return error is None or error.code() in _TEMPORARY


class _Retry:
    """Whether and when a stream that failed is opened again."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.reset()

    def reset(self) -> None:
        """Note that the server answered."""
        self._since: float | None = None
        self._next = _BACKOFF[0]

    def delay(self, error: Any) -> float:
        """Return the seconds to wait after a failure; None is a stream that the other side ended.

        Raises:
            InvalidRequest, grpc.RpcError, ConnectionError: the failure, where it will not pass or patience is over.
        """
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        wait, self._next = self._next, min(2 * self._next, _BACKOFF[1])
        if now + wait > self._since + self._patience or not _passes(error):
            if error is None:
                raise ConnectionError("the server ended the stream without answering everything")
            raise translated(error) from error
        return wait
