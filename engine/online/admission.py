"""How many requests are taken in: a limit that adapts to how long they wait for their turn, and what happens beyond it.

The limit follows Gradient2 of Netflix' library concurrency-limits (described in "Performance Under Load", Netflix
Technology Blog, 2018): new limit = limit x gradient + headroom. The gradient is between 1/2 and 1 and falls as the
measured latency rises over the one wanted, the headroom is the root of the limit, the limit goes a part of the way
(`smoothing`) at each measurement, and stays as it is while less than half of it is in use. Departures:

- The latency looked at is the wait for the turn, not the whole time. A batch takes longer the more requests share it,
  and that is what makes it cheap a request: an algorithm that sees the whole time takes sharing for congestion, and
  lowers the limit until batches are small and throughput is lost. The wait says only what stands in front, and counts
  from when a call can have come, not from when it was taken in.
- It is compared with a target that is configured, not with a long average of itself. Under load that lasts the average
  comes to be the overload, and the limit creeps up.
- It is measured once per batch, of the request that waited longest.
- The limit does not fall below two batches, one that is computed and one that waits for it; while calls are refused, not
  below one. Then more than a batch waits outside whenever one ends, and who waits inside only waits a batch longer.

Beyond the limit calls are refused before their requests are read (`engine/online/calls.py`), all that came during a batch
together when it ends (`engine/online/turns.py`): that costs little more than what gRPC's core does for any call. Those of
them that are let in are counted at once, as the requests of all of them are read after the last of them was looked at.

What the steps of degrading go by is how much of the limit was in use at most during the last batch: when a batch is
drained the calls that wait at the limit have not been taken in yet.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from engine.config import OverloadConfig

_PACE_SMOOTHING = 0.2
_BUSY_SECONDS = 0.25
_LEAST_GRADIENT = 0.5

_REMEMBERED_SECONDS = 1.0

_OVER_SECONDS = 0.2
"""So long without a batch, and an overload is over."""


class Admission:
    """Counts the requests in flight, waiting and being computed, and says whether one more is taken in.

    The thread that takes calls asks `refusal` and calls `expect`, `enter` and `settle`, the compute thread `leave`.

    Attributes:
        limit: requests in flight at most, now.
        in_flight: how many there are.
        pace: seconds of compute a request, averaged over the last batches.
        busy: the share of time that batches were computed, averaged over the last quarter of a second or so.
        on_refused: called for each request that is refused.
    """

    def __init__(self, rules: OverloadConfig, max_batch: int, max_queue: int) -> None:
        """Take the rules; the limit begins at four batches and stays between one batch and `max_queue`."""
        self._target = rules.target_ms / 1000
        self._smoothing = rules.smoothing
        self._batch = float(max_batch)
        self._most = max(2 * self._batch, float(max_queue))
        self._lock = threading.Lock()
        self.limit = min(4 * self._batch, self._most)
        self.in_flight = 0
        self._expected = 0
        self._refused = False
        self.pace = 0.0
        self.busy = 0.0
        self._ended = time.monotonic()
        self._most_in_flight = 0
        self._used = 0.0
        self.on_refused: Callable[[], None] = _nothing

    @property
    def load(self) -> float:
        """The share of the limit that is in use, or was at most in the last batch; that is forgotten after a second."""
        recent = time.monotonic() - self._ended < _REMEMBERED_SECONDS
        return max(self.in_flight / self.limit, self._used if recent else 0.0)

    def refusal(self, deadline: float, now: float) -> str:
        """Say why a request cannot be taken in; "" where it can.

        Those that are expected count: who is asked about must not be one of them.

        Args:
            deadline: the caller's, on the clock of `now`, seconds; infinite where there is none.
            now: on the clock of time.monotonic(), seconds.
        """
        if self.limit < 2 * self._batch and now - self._ended > _OVER_SECONDS:
            self.limit = 2 * self._batch
        text = ""
        count = self.in_flight + self._expected
        if count + 1 > self.limit:
            self._refused = True
            text = f"{count} requests are in flight already; try again later"
        elif count * self.pace > max(deadline - now, 0.0) > 0:
            text = "what waits already takes longer than the deadline allows; try again later"
        if text:
            self.on_refused()
        return text

    def pushback_ms(self) -> int:
        """Return after how many milliseconds what is in flight now should be done."""
        return math.ceil(self.in_flight * self.pace * 1000)

    def expect(self) -> None:
        """Count a call whose request is to be read."""
        self._expected += 1

    def arrived(self) -> None:
        """Take note that a request that was expected has been read, or never will be."""
        self._expected = max(0, self._expected - 1)

    def settle(self) -> None:
        """Expect nobody: all that had come is taken in. Who sends a call without its request must keep nobody out."""
        self._expected = 0

    def enter(self) -> None:
        """Count one more in flight."""
        with self._lock:
            self.in_flight += 1
            self._most_in_flight = max(self._most_in_flight, self.in_flight)

    def leave(self, requests: int, wait: float, compute: float) -> None:
        """Take note of a batch.

        Args:
            requests: how many it had.
            wait: how long the one that waited longest may have, seconds.
            compute: how long the batch took, seconds.
        """
        with self._lock:
            self._used = self._most_in_flight / self.limit
            if self.in_flight >= self.limit / 2:
                self._adapt(wait)
            self.limit = max(self.limit, self._batch if self._refused else 2 * self._batch)
            self._refused = False
            ended = time.monotonic()
            passed = max(ended - self._ended, compute, 1e-9)
            self._ended = ended
            self.busy += -math.expm1(-passed / _BUSY_SECONDS) * (compute / passed - self.busy)
            pace = compute / requests
            self.pace += _PACE_SMOOTHING * (pace - self.pace)
            self.in_flight -= requests
            self._most_in_flight = self.in_flight

    def _adapt(self, wait: float) -> None:
        gradient = min(1.0, max(_LEAST_GRADIENT, self._target / max(wait, 1e-9)))
        wanted = self.limit * gradient + math.sqrt(self.limit)
        limit = self.limit + self._smoothing * (wanted - self.limit)
        self.limit = min(self._most, limit)


def _nothing() -> None:
    """Nobody counts."""
