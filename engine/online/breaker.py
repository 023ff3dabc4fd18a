"""The circuit breaker of a channel: one that keeps failing is left out for a while instead of being asked again.

The three states are those of M. Nygard, Release It! (Pragmatic Bookshelf, 2007). Closed: asked. Open: not asked, until a
time has passed. Half open: one batch is let through as a probe; its outcome closes the circuit or opens it for longer.
How long grows by a factor of 2 with each probe that fails, up to a bound, times a random factor, so that the workers of a
fleet do not all probe a sick service at once.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum

from engine.config import BreakerConfig


class BreakerState(IntEnum):
    """What a breaker does; the numbers are those of the metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Counts how the calls of one channel went and says whether the next may be made. For one thread.

    A call is a batch, and counts by the share of its queries that failed, so that it makes no difference how many
    requests share a batch. The circuit opens at a failure when, among the newest `calls` calls of the last
    `window_seconds`, these shares add up to `failures` and to `rate` of the calls.

    Attributes:
        state: closed, half open or open; an open one becomes half open when it is next asked after its time.
        quiet: True while nothing failed lately: then nobody need ask, or tell, the breaker anything.
        last_error: why the newest call that failed did.
    """

    def __init__(
        self,
        rules: BreakerConfig,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Take the rules, a clock in seconds, and what draws evenly from [0, 1)."""
        self._rules = rules
        self._clock = clock
        self._draw = draw
        self.reset()

    def reset(self) -> None:
        """Close the circuit and forget everything."""
        self.state = BreakerState.CLOSED
        self.quiet = True
        self.last_error = ""
        self._calls: deque[tuple[float, float]] = deque(maxlen=self._rules.calls)
        self._open_seconds = self._rules.open_seconds
        self._open_until = 0.0
        self._probing = False

    def allows(self) -> bool:
        """Whether the next call may be made; where it is, `record` or `forgo` must follow."""
        if self.state is BreakerState.OPEN and self._clock() >= self._open_until:
            self.state = BreakerState.HALF_OPEN
        if self.state is BreakerState.HALF_OPEN and not self._probing:
            self._probing = True
            return True
        return self.state is BreakerState.CLOSED

    def forgo(self) -> None:
        """Take note that a call that was allowed is not made after all."""
        self._probing = False

    def record(self, failed: float, error: str = "") -> None:
        """Take note of a call.

        Args:
            failed: the share of its queries that failed, 0 to 1.
            error: why.
        """
        if failed > 0:
            self.last_error = error
        if self.state is BreakerState.HALF_OPEN:
            self._probing = False
            if failed < self._rules.rate:
                self.reset()
            else:
                self._open(min(2 * self._open_seconds, self._rules.most_seconds))
        elif self.state is BreakerState.CLOSED and not (self.quiet and failed == 0):
            self._count(failed)

    def _count(self, failed: float) -> None:
        now = self._clock()
        self._calls.append((now, failed))
        while self._calls[0][0] < now - self._rules.window_seconds:
            self._calls.popleft()
        # What stands before the first failure is dropped: as long as nothing fails nobody tells of successes either.
        while self._calls and self._calls[0][1] == 0:
            self._calls.popleft()
        self.quiet = not self._calls
        failures = sum(share for _, share in self._calls)
        # Not by a success: as others leave the window, what failed before may be a larger share.
        if (
            failed > 0
            and failures >= self._rules.failures
            and failures >= self._rules.rate * len(self._calls)
        ):
            self._open(self._rules.open_seconds)

    def _open(self, seconds: float) -> None:
        self.state = BreakerState.OPEN
        self.quiet = False
        self._calls.clear()
        self._open_seconds = seconds
        spread = self._rules.jitter * (2 * self._draw() - 1)
        self._open_until = self._clock() + seconds * (1 + spread)
