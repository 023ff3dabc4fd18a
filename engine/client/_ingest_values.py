"""What is reported and published, and what comes back, as plain Python values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from engine.client._values import Id


@dataclass(frozen=True, slots=True)
class Exposure:
    """The user was shown items."""

    items: Sequence[Id]


@dataclass(frozen=True, slots=True)
class Action:
    """The user did something with an item: click, like, collect ...; `watch_seconds` None: not known."""

    item: Id
    kind: str
    watch_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Follow:
    """The user follows an author, or with `undo` does so no more."""

    author: Id
    undo: bool = False


@dataclass(frozen=True, slots=True)
class Dislike:
    """The user does not want to see one of: an item, an author, a topic; `undo` takes it back."""

    item: Id | None = None
    author: Id | None = None
    topic: str | None = None
    undo: bool = False


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What the fine ranking put high and the user was not shown, best first, with the ranker's scores or none."""

    items: Sequence[Id]
    scores: Sequence[float] = ()


What: TypeAlias = Exposure | Action | Follow | Dislike | Leftovers


@dataclass(frozen=True, slots=True)
class Event:
    """What happened.

    Attributes:
        user: who.
        what: did or was shown what.
        event_id: makes sending the event again harmless; "" lets the client make one, which covers its own retries.
        timestamp: seconds since the epoch; None: the server's clock.
        city: where the user was; "": not known.
    """

    user: Id
    what: What
    event_id: str = ""
    timestamp: int | None = None
    city: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """An item to publish; what is absent here is not known of it afterwards.

    Attributes:
        id: its id.
        author: who made it.
        published_at: seconds since the epoch; None: the server's clock.
        title, tags, city: "" and () where not known.
        location: latitude and longitude in degrees.
        quality: 0 to 1.
        duration_seconds: how long it plays.
        updated_at_ms: milliseconds since the epoch at the source; of two changes of an item the later wins. None: the
            server's clock.
    """

    id: Id
    author: Id | None = None
    published_at: int | None = None
    title: str = ""
    tags: Sequence[str] = ()
    city: str = ""
    location: tuple[float, float] | None = None
    quality: float | None = None
    duration_seconds: float | None = None
    updated_at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class TakeDown:
    """An item to take down; `updated_at_ms` as in `Item`."""

    id: Id
    updated_at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one entry was not taken: its place in what was sent, the field, and what was expected of it."""

    index: int
    field: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReportResult:
    """What became of a batch of events: went in now, had gone in before by their event_id, and those refused."""

    accepted: int
    duplicates: int
    refused: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Everything of a stream up to and with the batch of this offset is durable; the rest speaks of that batch."""

    offset: int
    accepted: int
    duplicates: int
    refused: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class UpsertResult:
    """What became of changes of items.

    Attributes:
        accepted: how many went in.
        stale: how many of these were older than what was there, and changed nothing.
        refused: those that were not taken.
        log_offset: the position in the live log behind these changes.
    """

    accepted: int
    stale: int
    refused: tuple[Refusal, ...]
    log_offset: str
