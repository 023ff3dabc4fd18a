"""Turns of the two threads that a request goes through: one takes calls in, the other computes batches.

They share the interpreter's lock, and in a server of one worker a core that core too. A call that comes while a batch is
computed has to wait for the batch to end; to take it in at once only changes threads, twice an event, and costs the
compute its caches. So while something is in flight the thread of the calls rests until the batch ends. Then it takes in
what has come, and refuses what is too much, all together, before the next batch is drained.
"""

from __future__ import annotations

import math
import threading
import time

from engine.online.admission import Admission

_REST_SECONDS = 0.025
"""How long the thread of the calls rests at most; during a batch that takes longer it looks at what has come."""

_TAKING_SECONDS = 0.005
"""How long the compute waits for calls to be taken in at most: some hundred of them."""


class Turns:
    """Says when each of the two threads goes on.

    Attributes:
        since: from when on a call may have come that is taken in now, on the clock of time.monotonic(), seconds; infinite
            while each is taken in as it comes.
    """

    def __init__(self, admission: Admission) -> None:
        """Begin.

        Args:
            admission: knows whether anything is in flight.
        """
        self._admission = admission
        self.since = math.inf
        self._changed = threading.Condition()
        self._ended = 0
        self._resting = False
        self._taking = False

    def rest(self) -> bool:
        """All that had come is taken in; on the thread of the calls.

        Returns:
            Whether nothing is in flight, so that the thread may wait for the next event however long. Else it has rested
            until a batch ended, and should see what has come meanwhile.
        """
        self._admission.settle()
        with self._changed:
            self._taking = False
            self._changed.notify_all()
            if not self._admission.in_flight:
                self.since = math.inf
                return True
            self.since = time.monotonic()
            ended = self._ended
            self._resting = True
            self._changed.wait_for(lambda: self._ended != ended, _REST_SECONDS)
            self._resting = False
            return False

    def batch_ended(self) -> None:
        """Let what has come meanwhile be taken in; on the compute thread, before it drains the next batch."""
        with self._changed:
            self._ended += 1
            if self._resting:
                self._taking = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._taking, _TAKING_SECONDS)
