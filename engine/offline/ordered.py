"""Two streams of the state store, read as one: what users did and what was published, in the order of their times.

A publication of a millisecond comes before an event of the same. Either waits until it is certain that nothing of the
other that belongs before it is still to come: what is written has the store's time, so all that is earlier than the
moment of a read was there to be read. So what comes out is a function of the streams, however they are read.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from engine.core.types import AnyArray
from engine.state.events import EventBatch, EventLog
from engine.state.log import LiveLog
from engine.state.stream import START, offset_key

log = logging.getLogger(__name__)

_ENTRIES = 64
_PUBLICATIONS = 1000
_PAUSE = 0.02
"""Seconds between two reads where there is nothing. A read that blocks would not see what the other stream brings, and
stores end it up to a tenth of a second late."""

_LATEST = 2**62

Returned = TypeVar("Returned")


class Patiently(Protocol):
    """Asks the store until it answers."""

    def __call__(self, ask: Callable[[], Returned], /) -> Returned:
        """Return what `ask` does, as soon as it does not raise StateUnavailableError."""


@dataclass(frozen=True, slots=True)
class Published:
    """Publications that belong together: no event lies between them.

    Attributes:
        values: as the live log has them.
        offset: of the last one.
    """

    values: list[bytes]
    offset: str


@dataclass(frozen=True, slots=True)
class Happened:
    """An entry of the event log.

    Attributes:
        written_ms: when it was written, milliseconds since the epoch by the store's clock.
        records: `EVENT`[n].
        offset: of the entry.
    """

    written_ms: int
    records: AnyArray
    offset: str


class OrderedStreams:
    """Reads both.

    Attributes:
        events_at, news_at: offsets behind which is read; who has taken in what `take` gave sets them.
    """

    def __init__(self, events: EventLog, live: LiveLog, news_at: str, patiently: Patiently) -> None:
        """Begin at the beginning of the event log, and behind an offset of the live log."""
        self._events, self._live, self._patiently = events, live, patiently
        self.events_at, self.news_at = START, news_at
        self._entries: deque[Happened] = deque()
        self._news: deque[tuple[int, str, bytes]] = deque()
        self._events_bound = self._news_bound = 0
        self._behind = 0
        self._came = False

    @property
    def waiting(self) -> int:
        """Events in the log that were not given yet, as far as the last read knows."""
        return self._behind + sum(entry.records.size for entry in self._entries)

    def read(self) -> None:
        """Read what came; where that is nothing, after two hundredths of a second."""
        if not self._entries and not self._news:
            time.sleep(0.0 if self._came else _PAUSE)
        if not self._entries:
            batch, missed = self._patiently(lambda: self._events.read(self.events_at, _ENTRIES, 0))
            self._queue(batch, missed)
        if not self._news:
            asked = self._patiently(self._live.clock)
            found = self._patiently(lambda: self._live.read(self.news_at, _PUBLICATIONS))
            self._news.extend((offset_key(offset)[0], offset, value) for offset, value in found)
            newest = self._news[-1][0] if self._news else 0
            self._news_bound = (newest if len(found) == _PUBLICATIONS else max(newest, asked)) - 1
        self._came = bool(self._entries or self._news)

    def take(self) -> Published | Happened | None:
        """Return what comes next, and forget it; None where that is not certain yet: then `read` comes first."""
        event_at = self._entries[0].written_ms if self._entries else _LATEST
        news_at = self._news[0][0] if self._news else _LATEST
        if self._news and news_at <= event_at and news_at <= self._events_bound:
            together = []
            while self._news and self._news[0][0] <= min(event_at, self._events_bound):
                together.append(self._news.popleft())
            return Published([value for _, _, value in together], together[-1][1])
        if self._entries and event_at < news_at and event_at <= self._news_bound:
            return self._entries.popleft()
        return None

    def _queue(self, batch: EventBatch, missed: bool) -> None:
        if missed:
            found = batch.entries[0, 0] if len(batch.entries) else 0
            log.error(
                "the event log no longer has all that follows %s: what is gone is not learnt, on from %s",
                self.events_at, found or "its end",
            )  # fmt: skip
            if not len(batch.entries):
                self.events_at = self._patiently(self._events.end)
        starts = [*batch.entries[:, 1].tolist(), batch.records.size]
        for at, written in enumerate(batch.entries[:, 0].tolist()):
            records = batch.records[starts[at] : starts[at + 1]]
            self._entries.append(Happened(written, records, batch.offsets[at]))
        # Whatever came before the newest of them is there; where it was all, so is whatever came before it was asked.
        newest = self._entries[-1].written_ms if self._entries else 0
        self._events_bound = newest if len(batch.entries) == _ENTRIES else max(newest, batch.asked)
        self._behind = batch.waiting
