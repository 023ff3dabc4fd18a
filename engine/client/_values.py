"""What goes into a call and what comes out, as plain Python values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict

from engine.core.errors import RecallError

Id: TypeAlias = int | str
"""An item's or a user's id: int or str, as the server's catalogue has it."""


class Recall(TypedDict, total=False):
    """The arguments of `recall`. None is required, and None is the same as leaving an argument out."""

    user_id: int | None
    """Who asks, where the catalogue's ids are int64; `user_key` where they are strings. Neither: a guest."""

    user_key: str | None

    scene: str
    """A scene of the server; absent: its default."""

    limit: int | None
    """Candidates wanted at most."""

    recent_items: Iterable[RecentItem | tuple[Any, ...] | Id]
    """What the user did most recently, newest first; tuples (id, event, timestamp) and plain ids will do."""

    recent_mode: Literal["add", "override"]
    """Whether `recent_items` go in front of the stored history, as they do by default, or replace it."""

    exclude: Iterable[Id]
    """Items that must not come back."""

    like: Iterable[Id]
    """Items to find more like, for a scene whose channels answer from them."""

    overrides: Mapping[str, int | Literal[False]]
    """Channel -> its quota in this request; False turns it off."""

    city: str

    location: tuple[float, float] | None
    """Latitude and longitude in degrees."""

    time: int | None
    """The moment that the request speaks of, seconds since the epoch."""

    device: Mapping[str, str]
    """Free attributes of the device."""

    debug: bool
    """Adds `RecallResult.debug`."""

    request_id: str
    """Comes back in the answer."""


@dataclass(frozen=True, slots=True)
class RecentItem:
    """What the user did: item, event ("" counts as a point) and when, seconds since the epoch (None: now)."""

    id: Id
    event: str = ""
    timestamp: int | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """A channel's word for an item: its rank there, the channel's own score, and the id of what caused it."""

    channel: str
    rank: int
    score: float
    trigger: Id | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """An item, its merge score, and every channel that proposed it."""

    id: Id
    score: float
    proposals: tuple[Proposal, ...]


@dataclass(frozen=True, slots=True)
class ChannelReport:
    """How a channel fared.

    Attributes:
        channel: its name.
        status: OK, EMPTY, TIMEOUT, ERROR, SKIPPED or GATED.
        trigger_kind: what its triggers are: NONE, ITEM, USER, AUTHOR, CLUSTER, PATH or CELL.
        returned: candidates it returned.
        eligible: those of them that no filter removed.
        kept: those of them that are in the answer.
        microseconds: its share of the compute time.
        message: why, where the status is ERROR.
    """

    channel: str
    status: str
    trigger_kind: str
    returned: int
    eligible: int
    kept: int
    microseconds: int
    message: str


@dataclass(frozen=True, slots=True)
class FilterReport:
    """How a filter fared.

    Attributes:
        filter: its name.
        removed: candidates it removed; an item that several channels proposed counts for each.
        status: OK; UNAVAILABLE where it could not read what it judges by and let everything pass.
    """

    filter: str
    removed: int
    status: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """What the request named that the server's catalogue does not know."""

    user: bool
    recent_items: int
    exclude_items: int
    trigger_items: int


@dataclass(frozen=True, slots=True)
class Debug:
    """What the server says of its work.

    Attributes:
        stages: stage -> microseconds of the whole batch.
        history: what the channels saw of it, newest first.
        batch_size: requests that shared the batch.
        removed: filter -> the items that it removed, each once.
    """

    stages: Mapping[str, int]
    history: tuple[Id, ...]
    batch_size: int
    removed: Mapping[str, tuple[Id, ...]]


@dataclass(frozen=True, slots=True)
class RecallResult:
    """An answer.

    Attributes:
        request_id: the request's, or the one that the server made.
        candidates: in the order of the merged list; what was backfilled stands behind the rest.
        channels, filters: what each did.
        release: what answered; `snapshots`: the version of each component in it.
        unknown: what the request named that the catalogue does not know.
        debug: where it was asked for.
    """

    request_id: str
    candidates: tuple[Candidate, ...]
    channels: tuple[ChannelReport, ...]
    filters: tuple[FilterReport, ...]
    release: str
    snapshots: Mapping[str, str]
    unknown: Unknown
    debug: Debug | None

    @property
    def item_ids(self) -> list[Id]:
        """The candidates' ids, in the order of the list."""
        return [candidate.id for candidate in self.candidates]


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of the request ("recent_items[3].event") and what was expected of it."""

    field: str
    description: str


class InvalidRequest(RecallError):  # noqa: N818  # the name says what it is
    """The server refused the request. `violations` says which fields, and why."""

    def __init__(self, message: str, violations: tuple[Violation, ...]) -> None:
        super().__init__(message)
        self.violations = violations
