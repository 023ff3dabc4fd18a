"""Waiting for a reply that is about to come, without letting the core fall asleep.

A core with nothing to do sleeps, and on a virtual machine to sleep and be woken costs tens of microseconds: about what a
state store on the same machine takes for its answer. So who waits for one keeps looking for a while and only then
sleeps, as Linux does when it is a guest itself (cpuidle-haltpoll, 200 us).
"""

from __future__ import annotations

import select
import time
from typing import Any

_LOOK_SECONDS = 0.0002

_MOST_PASSED_OVER = 256


class Lookout:
    """Looks out for replies of one store.

    Where it looked for nothing, as it does where the store is far away or has to work on this very core, it passes over
    the next reply, then two, four and so on: looking costs such a store's users a microsecond a reply.
    """

    def __init__(self) -> None:
        """Begin by looking."""
        self._passing_over = 0
        self._next = 1

    def look(self, socket: Any) -> bool:
        """Look until something can be read, for a fifth of a millisecond at most.

        Args:
            socket: a `socket`, or one of TLS that holds nothing yet.

        Returns:
            whether something can be; False also where this reply was passed over.
        """
        if self._passing_over:
            self._passing_over -= 1
            return False
        poller = _poller(socket)
        until = time.perf_counter() + _LOOK_SECONDS
        while not poller.poll(0):
            if time.perf_counter() >= until:
                self._passing_over = self._next
                self._next = min(2 * self._next, _MOST_PASSED_OVER)
                return False
        self._next = 1
        return True


def readable(socket: Any) -> bool:
    """Whether something can be read from a socket right now, be it that the other side has closed it."""
    pending = getattr(socket, "pending", None)  # of TLS
    return bool(_poller(socket).poll(0) or (pending is not None and pending()))


def _poller(socket: Any) -> select.poll:
    poller = select.poll()
    poller.register(socket, select.POLLIN)
    return poller
