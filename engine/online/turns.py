"""Turns of the two threads that a request goes through: one waits for calls, the other computes batches.

They share the interpreter's lock, and in a server of one worker a core that core too. A call that comes while a batch is
computed has to wait for the batch to end; to take it in at once only changes threads, twice an event, and costs the
compute its caches. So while anything is in flight the thread of the calls rests, and the compute thread itself takes in
what has come, and refuses what is too much, between two batches: under load no thread waits for the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from engine.online.admission import Admission

_REST_SECONDS = 0.025
"""How long a batch may take before the thread of the calls looks at what has come meanwhile."""

_TAKING_SECONDS = 0.025
"""How long the compute takes calls in at most: some hundreds of them. What it leaves waits, with all that comes later."""


class Turns:
    """Says which of the two threads takes calls in.

    Attributes:
        take: takes in what has come, without waiting for more, for about as many seconds as it is told at most; from any
            thread. Whoever takes calls puts it here.
    """

    def __init__(self, admission: Admission) -> None:
        """Begin, with nobody who takes calls.

        Args:
            admission: knows whether anything is in flight.
        """
        self.take: Callable[[float], None] = _nothing
        self._admission = admission
        self._changed = threading.Condition()
        self._batches = 0

    def rest(self) -> bool:
        """All that had come is taken in; on the thread of the calls.

        Returns:
            Whether nothing is in flight, so that the thread may wait for the next event however long. Else a batch has
            taken long, and the thread should see what has come meanwhile.
        """
        with self._changed:
            while self._admission.in_flight:
                batches = self._batches
                if not self._changed.wait(_REST_SECONDS) and batches == self._batches:
                    return False
        return True

    def batch_ended(self) -> None:
        """Take in what has come meanwhile; on the compute thread, before it drains the next batch."""
        self.take(_TAKING_SECONDS)
        self._batches += 1
        if not self._admission.in_flight:
            with self._changed:
                self._changed.notify()


def _nothing(seconds: float) -> None:
    """There is nobody who takes calls."""
