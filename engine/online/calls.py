"""Calls of one method, taken straight from gRPC's core on a thread of our own; the other methods stay with grpc.aio.

grpc.aio makes tasks and futures for every call, takes one call per turn of the event loop, and has a byte written to and
read from a socket for each event of the core. That costs about twice as much as everything that gRPC itself does for
a call, and refusing costs as much as answering. Here an event is a callable that is called, and a refused call costs
little more than what the core does in any case. `docs/overload.md` has the numbers.

It uses what grpc's own blocking server is written with (`grpc._cython.cygrpc`): a method that is registered with the core
is waited for on a completion queue of its own. That interface is not a public one. What it takes is in this module only.
"""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the stubs do not know it

from engine.core.errors import RecallError
from engine.online.turns import Turns

log = logging.getLogger(__name__)

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

_POSTED = 16
"""Calls that the core hands over without being asked again. What comes behind them is handed over one by one, after the
requests of those that were let in: of more, the requests would come after a burst of calls that are to be refused."""

_NO_DEADLINE_SECONDS = 1e9
_NO_FLAGS = 0
_NO_METADATA = cygrpc.SendInitialMetadataOperation((), _NO_FLAGS)


class Call:
    """One call. `receive` is for the thread of the calls, the other methods for any one; each is called at most once.

    Attributes:
        cancelled: whether its caller is gone.
    """

    __slots__ = ("_call", "_details", "_metadata", "_then", "cancelled")

    def __init__(self, event: Any) -> None:
        self._call = event.call
        self._details = event.call_details
        self._metadata = event.invocation_metadata
        self._then: Callable[[bytes | None], None] | None = None
        self.cancelled = False

    @property
    def metadata(self) -> Metadata:
        """The caller's metadata, pairs of key and value."""
        return self._metadata  # type: ignore[no-any-return]

    @property
    def peer(self) -> str:
        """The caller's address."""
        return self._call.peer().decode(errors="replace")  # type: ignore[no-any-return]

    @property
    def identity(self) -> Mapping[str, Sequence[bytes]]:
        """What the handshake says of the caller: properties of its certificate."""
        found = cygrpc.auth_context(self._call) or {}
        return {key.decode(errors="replace"): value for key, value in found.items()}

    def deadline(self, now: float) -> float:
        """Return the caller's deadline, infinite where there is none.

        Args:
            now: on the clock of time.monotonic(), seconds, as the result is.
        """
        left: float = self._details.deadline - time.time()
        return now + left if left < _NO_DEADLINE_SECONDS else math.inf

    def receive(self, then: Callable[[bytes | None], None]) -> None:
        """Read the request; `then` gets it, on the thread of the calls, or None where the caller is gone or sent none."""
        self._then = then
        self._call.start_server_batch((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._received)
        self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._closed)

    def answer(self, message: bytes) -> None:
        """Send a response, and end the call."""
        self._send(
            _NO_METADATA,
            cygrpc.SendMessageOperation(message, _NO_FLAGS),
            cygrpc.SendStatusFromServerOperation(None, 0, b"", _NO_FLAGS),
        )

    def fail(self, code: grpc.StatusCode, text: str, metadata: Metadata = ()) -> None:
        """End the call with a status, after its request was received."""
        number: int = code.value[0]
        self._send(
            _NO_METADATA,
            cygrpc.SendStatusFromServerOperation(tuple(metadata), number, text.encode(), _NO_FLAGS),
        )

    def refuse(self, code: grpc.StatusCode, text: str, metadata: Metadata = ()) -> None:
        """End the call with a status, instead of receiving its request."""
        number: int = code.value[0]
        self._send(
            _NO_METADATA,
            cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),
            cygrpc.SendStatusFromServerOperation(tuple(metadata), number, text.encode(), _NO_FLAGS),
        )

    def _send(self, *operations: Any) -> None:
        try:
            self._call.start_server_batch(operations, _sent)
        except ValueError:  # the server has ended
            log.debug("a call could not be answered any more")

    def _received(self, event: Any) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(event.batch_operations[0].message())

    def _closed(self, event: Any) -> None:
        if event.batch_operations[0].cancelled():
            self.cancelled = True


def _sent(event: Any) -> None:
    """Nothing is left to do when the core has sent what it was given."""


class Calls:
    """Takes the calls of one method of a server."""

    def __init__(
        self,
        server: grpc.aio.Server,
        method: str,
        handle: Callable[[Call], None],
        turns: Turns | None = None,
    ) -> None:
        """Register the method; the server must not have been started.

        Args:
            server: what listens.
            method: as "/package.Service/Method".
            handle: given each call, on the thread of the calls; it must not block.
            turns: say when the thread rests; None: never.

        Raises:
            RecallError: this grpcio has no such interface.
        """
        self._handle = handle
        self._turns = turns
        self._method = method
        self._queue = cygrpc.CompletionQueue()
        self._core = _core_of(server)
        self._core.register_completion_queue(self._queue)
        self._core.register_method(method)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; the server must have been started."""
        for _ in range(_POSTED):
            self._post()
        self._thread = threading.Thread(target=self._work, name="calls", daemon=True)
        self._thread.start()

    def close(self, patience: float | None = None) -> None:
        """End the thread once the server has ended; at most `patience` seconds are waited."""
        self._queue.shutdown()
        if self._thread is not None:
            self._thread.join(patience)

    def _post(self) -> None:
        self._core.request_registered_call(self._queue, self._queue, self._method, self._came)

    def _work(self) -> None:
        while True:
            event = self._next()
            if event.completion_type == cygrpc.CompletionType.queue_shutdown:
                return
            try:
                event.tag(event)
            except Exception:  # the thread must outlive whatever a call does
                log.exception("a call failed")
            event = None  # it holds the call, and with it the connection

    def _next(self) -> Any:
        while self._turns is not None:
            event = self._queue.poll(deadline=0)
            if event.completion_type != cygrpc.CompletionType.queue_timeout:
                return event
            if self._turns.rest():
                break
        return self._queue.poll()

    def _came(self, event: Any) -> None:
        if not event.success:  # the server ends
            return
        self._post()
        self._handle(Call(event))


def _core_of(server: grpc.aio.Server) -> Any:
    """Return the core's server behind a server of grpc.aio, which keeps it to itself."""
    for held in gc.get_referents(getattr(server, "_server", None)):
        if isinstance(held, cygrpc.Server) and hasattr(held, "request_registered_call"):
            return held
    raise RecallError(
        f"grpcio {grpc.__version__} does not let its calls be taken; install one of 1.74 to 1.85"
    )
