"""Notes that the request path leaves for a thread of their own: bounded, handled together, dropped beyond the bound."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

Note = TypeVar("Note")

PAUSE_SECONDS = 0.05
"""How often the thread looks. To be woken for each note would cost the compute thread more than the note."""


class Notes(Generic[Note]):
    """Takes notes from any thread and has them handled, in order, on its own."""

    def __init__(
        self,
        name: str,
        handle: Callable[[Sequence[Note]], None],
        dropped: Callable[[int], None],
        together: int = 256,
        most: int = 10_000,
    ) -> None:
        """Start the thread.

        Args:
            name: of the thread.
            handle: handles some notes; what it raises is logged, and these notes are dropped.
            dropped: told how many notes were dropped.
            together: notes that are handled together at most.
            most: how many may wait; more are dropped.
        """
        self._name = name
        self._handle = handle
        self._dropped = dropped
        self._together = together
        self._most = most
        self._waiting: deque[Note] = deque()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, note: Note) -> None:
        """Leave a note."""
        if len(self._waiting) >= self._most:
            self._dropped(1)
        else:
            self._waiting.append(note)

    def close(self, patience: float | None = None) -> None:
        """Handle what waits, and stop; at most `patience` seconds are waited."""
        self._closing.set()
        self._thread.join(patience)  # a daemon: it ends with the process

    def _work(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(PAUSE_SECONDS)
            while self._waiting:
                # Nobody else takes from it.
                notes = [self._waiting.popleft() for _ in range(min(self._together, len(self._waiting)))]
                try:
                    self._handle(notes)
                except Exception:  # the thread must outlive whatever a note does
                    self._dropped(len(notes))
                    log.exception("%s: %d notes could not be handled", self._name, len(notes))
