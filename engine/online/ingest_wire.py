"""From the wire to `Writes` and changes of items: every rule that an event or an item must keep.

An entry that breaks one is refused alone, with the first rule it breaks; the others go in. Every event of a batch
passes through here, so the loop over them keeps what it needs in local names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeAlias

from recall.v1 import ingest_pb2 as pb

from engine.core.keys import key_of
from engine.data.ids import IdKind
from engine.online.checks import (
    MAX_TEXT_BYTES,
    MAX_TIME,
    bad_count,
    bad_key,
    bad_kind,
    bad_number,
    bad_range,
    bad_text,
    fits,
    is_key,
    names,
    shown,
)
from engine.state.layout import AUTHOR, ITEM, TOPIC, kind_of, user_tag
from engine.state.log import LogChange
from engine.state.writes import Writes

MAX_ENTRIES = 10_000
"""Events or changes of a request."""

MAX_ITEMS = 1_000
"""Of an exposure, and of leftovers."""

MAX_EVENT_ID_BYTES = 64
MAX_TAGS = 64
MAX_TITLE_BYTES = 4_096
MAX_AHEAD_SECONDS = 86_400
"""How far a time that orders events may lie ahead of the server's clock: what is further is a wrong clock."""

Refusals: TypeAlias = list[tuple[int, str, str]]
"""(place in the request, field, reason) of each entry that was not taken."""

_KEYS_REMEMBERED = 1 << 16


class _Breach(Exception):  # noqa: N818  # never leaves this module
    """An entry breaks a rule."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason


class EventReader:
    """Reads the events of one server: its kinds of action and its catalogue's type of id."""

    def __init__(self, kinds: Iterable[str], id_kind: IdKind, logged: bool = False) -> None:
        """Take the kinds that an action may have, those of no points too, what ids are, and whether to log events."""
        self._logged = logged
        self._kinds = {kind: kind_of(kind) for kind in kinds}
        self._id_kind = id_kind
        self._ids = _Ids(id_kind)

    def read(self, events: Iterable[pb.Event], now: float) -> tuple[Writes, Refusals, Counter[str]]:
        """Check events and collect what they write.

        Args:
            events: as they came.
            now: the server's clock, seconds since the epoch.

        Returns:
            What the good ones write, in their order; the bad ones; and how many of each kind ("action" ...) are good.
        """
        writes = Writes(self._logged)
        refused: Refusals = []
        counts: Counter[str] = Counter()
        user_field = self._ids.user
        clock = int(now)
        latest = clock + MAX_AHEAD_SECONDS
        takers = {
            "exposure": self._exposure,
            "action": self._action,
            "follow": self._follow,
            "dislike": self._dislike,
            "leftovers": self._leftovers,
        }
        for index, event in enumerate(events):
            try:
                given = event.WhichOneof("user")
                if given != user_field:
                    raise _Breach(given or "user", self._ids.wrong("user_", given))
                id_ = getattr(event, user_field)
                if id_ < 0 if user_field == "user_id" else not is_key(id_):
                    raise _Breach(user_field, _bad_id(id_))
                event_id = event.event_id.encode()
                if len(event_id) > MAX_EVENT_ID_BYTES:
                    raise _Breach("event_id", bad_text(event.event_id, MAX_EVENT_ID_BYTES))
                time = clock
                if event.HasField("timestamp"):
                    time = event.timestamp
                    if not 0 <= time <= latest:
                        raise _Breach("timestamp", _bad_time(time, clock))
                city = event.city
                if city and not fits(city, MAX_TEXT_BYTES):
                    raise _Breach("city", bad_text(city, MAX_TEXT_BYTES))
                what = event.WhichOneof("what")
                if what is None:
                    raise _Breach("what", f"expected one of {', '.join(takers)}")
                user = user_tag(id_)
                takers[what](writes, user, getattr(event, what), time, event_id)
                counts[what] += 1
                if city:
                    writes.city(user, _key(city), time)
            except _Breach as breach:
                refused.append((index, breach.field, breach.reason))
        return writes, refused, counts

    def _exposure(self, writes: Writes, user: bytes, exposure: Any, time: int, event_id: bytes) -> None:
        keys = self._ids.many(exposure, "exposure")
        if not keys:
            raise _Breach(f"exposure.{self._ids.items}", f"expected 1 to {MAX_ITEMS} entries, got 0")
        # Here it goes into the slice of the moment it arrives, whatever its time.
        writes.expose(user, keys, event_id, time)

    def _action(self, writes: Writes, user: bytes, action: Any, time: int, event_id: bytes) -> None:
        key = self._ids.one(action, "item", "action")
        kind = self._kinds.get(action.kind)
        if kind is None:
            raise _Breach("action.kind", f"expected one of {names(self._kinds)}, got {shown(action.kind)}")
        watched = math.nan
        if action.HasField("watch_seconds"):
            watched = action.watch_seconds
            if not 0 <= watched < math.inf:
                raise _Breach("action.watch_seconds", f"expected a number of 0 or more, got {watched}")
        writes.act(user, key, kind, time, watched, event_id)

    def _follow(self, writes: Writes, user: bytes, follow: Any, time: int, event_id: bytes) -> None:
        writes.follow(user, self._ids.one(follow, "author", "follow"), time, follow.undo, event_id)

    def _dislike(self, writes: Writes, user: bytes, dislike: Any, time: int, event_id: bytes) -> None:
        given = dislike.WhichOneof("what")
        undo = dislike.undo
        if given == "topic":
            topic = dislike.topic
            if not topic or not fits(topic, MAX_TEXT_BYTES):
                raise _Breach("dislike.topic", _bad_name(topic))
            writes.dislike(user, TOPIC, _key(topic), time, undo, event_id)
        elif given in ("item_id", "item_key"):
            writes.dislike(
                user, ITEM, self._ids.checked(dislike, given, "item", "dislike"), time, undo, event_id
            )
        elif given is not None:
            writes.dislike(
                user, AUTHOR, self._ids.checked(dislike, given, "author", "dislike"), time, undo, event_id
            )
        else:
            raise _Breach("dislike.what", f"expected {self._ids.item}, {self._ids.author} or topic")

    def _leftovers(self, writes: Writes, user: bytes, leftovers: Any, time: int, event_id: bytes) -> None:
        keys = self._ids.many(leftovers, "leftovers")
        scores = leftovers.scores[:]
        if scores:
            if len(scores) != len(keys):
                reason = f"expected as many as items, {len(keys)}, or none, got {len(scores)}"
                raise _Breach("leftovers.scores", reason)
            for n, score in enumerate(scores):
                if not math.isfinite(score):
                    raise _Breach(f"leftovers.scores[{n}]", f"expected a finite number, got {score}")
        writes.leftovers(user, keys, scores, time, event_id)


class ItemReader:
    """Reads changes of items, for a catalogue's type of id."""

    def __init__(self, id_kind: IdKind) -> None:
        """Take what ids are."""
        self._ids = _Ids(id_kind)

    def read(self, changes: Iterable[pb.ItemChange], now: float) -> tuple[list[LogChange], Refusals]:
        """Check changes; the times that are absent become the server's clock.

        Args:
            changes: as they came; publishing times are filled in here.
            now: the server's clock, seconds since the epoch.

        Returns:
            The good ones, in their order, and the bad ones.
        """
        good: list[LogChange] = []
        refused: Refusals = []
        for index, change in enumerate(changes):
            try:
                good.append(self._change(change, now))
            except _Breach as breach:
                refused.append((index, breach.field, breach.reason))
        return good, refused

    def _change(self, change: pb.ItemChange, now: float) -> LogChange:
        given = change.WhichOneof("id")
        wanted = self._ids.item
        if given != wanted:
            raise _Breach(given or "id", self._ids.wrong("item_", given))
        id_ = getattr(change, wanted)
        if not self._ids.is_good(id_):
            raise _Breach(wanted, _bad_id(id_))
        updated = int(now * 1000)
        if change.HasField("updated_at_ms"):
            updated = change.updated_at_ms
            latest = int(now + MAX_AHEAD_SECONDS) * 1000
            if not 0 <= updated <= latest:
                raise _Breach("updated_at_ms", _bad_time(updated, int(now * 1000)))
        what = change.WhichOneof("change")
        if what == "put":
            self._check(change.put, int(now))
            return LogChange(id_, updated, change.put)
        if what == "take_down":
            if not change.take_down:
                raise _Breach("take_down", "expected true, got false")
            return LogChange(id_, updated, None)
        raise _Breach("change", "expected put or take_down")

    def _check(self, item: pb.Item, now: int) -> None:
        author = item.WhichOneof("author")
        if author is not None:
            self._ids.checked(item, author, "author", "put")
        if not item.HasField("published_at"):
            item.published_at = now
        elif not 0 <= item.published_at <= MAX_TIME:
            raise _Breach("put.published_at", bad_range(item.published_at, 0, MAX_TIME))
        if not fits(item.title, MAX_TITLE_BYTES):
            raise _Breach("put.title", bad_text(item.title, MAX_TITLE_BYTES))
        if len(item.tags) > MAX_TAGS:
            raise _Breach("put.tags", bad_count(len(item.tags), MAX_TAGS))
        for n, tag in enumerate(item.tags):
            if not tag or not fits(tag, MAX_TEXT_BYTES):
                raise _Breach(f"put.tags[{n}]", _bad_name(tag))
        if not fits(item.city, MAX_TEXT_BYTES):
            raise _Breach("put.city", bad_text(item.city, MAX_TEXT_BYTES))
        if item.HasField("latitude") != item.HasField("longitude"):
            absent = "longitude" if item.HasField("latitude") else "latitude"
            raise _Breach(f"put.{absent}", "expected both latitude and longitude or none, got one")
        # NaN fails every comparison, as it must.
        for name, low, high in (("latitude", -90, 90), ("longitude", -180, 180), ("quality", 0, 1)):
            if item.HasField(name) and not low <= (value := getattr(item, name)) <= high:
                raise _Breach(f"put.{name}", bad_range(value, low, high))
        if item.HasField("duration_seconds") and not 0 <= item.duration_seconds < math.inf:
            reason = f"expected a number of 0 or more, got {item.duration_seconds}"
            raise _Breach("put.duration_seconds", reason)


class _Ids:
    """The fields that hold ids of a catalogue's type, and the keys of what they hold."""

    def __init__(self, kind: IdKind) -> None:
        self._kind = kind
        end = "id" if kind == "int64" else "key"
        self.user, self.item, self.author = f"user_{end}", f"item_{end}", f"author_{end}"
        self.items = f"item_{end}s"
        self._other_items = "item_keys" if kind == "int64" else "item_ids"

    def one(self, message: Any, group: str, path: str) -> int:
        """Return the key of the id in a oneof of id and key."""
        given = message.WhichOneof(group)
        if given is None:
            raise _Breach(f"{path}.{group}", f"expected {self._wanted(group)}")
        return self.checked(message, given, group, path)

    def checked(self, message: Any, given: str, prefix: str, path: str) -> int:
        """Return the key of the id in the field `given`, which may be of the wrong type."""
        if given != (self.item if prefix == "item" else self.author):
            raise _Breach(f"{path}.{given}", bad_kind(self._wanted(prefix), self._kind))
        id_ = getattr(message, given)
        if not self.is_good(id_):
            raise _Breach(f"{path}.{given}", _bad_id(id_))
        return id_ if self._kind == "int64" else _key(id_)

    def many(self, message: Any, path: str) -> list[int]:
        """Return the keys of the ids in a pair of repeated fields, in their order."""
        if getattr(message, self._other_items):
            raise _Breach(f"{path}.{self._other_items}", bad_kind(self.items, self._kind))
        ids: list[Any] = getattr(message, self.items)[:]
        if len(ids) > MAX_ITEMS:
            raise _Breach(f"{path}.{self.items}", bad_count(len(ids), MAX_ITEMS))
        if self._kind == "int64":
            if ids and min(ids) < 0:
                self._first_bad(ids, path)
            return ids
        if not all(map(is_key, ids)):
            self._first_bad(ids, path)
        return [_key(id_) for id_ in ids]

    def is_good(self, id_: Any) -> bool:
        return id_ >= 0 if self._kind == "int64" else is_key(id_)

    def wrong(self, prefix: str, given: str | None) -> str:
        wanted = self._wanted(prefix.rstrip("_"))
        return f"expected {wanted}" if given is None else bad_kind(wanted, self._kind)

    def _wanted(self, prefix: str) -> str:
        return f"{prefix}_id" if self._kind == "int64" else f"{prefix}_key"

    def _first_bad(self, ids: list[Any], path: str) -> None:
        for n, id_ in enumerate(ids):
            if not self.is_good(id_):
                raise _Breach(f"{path}.{self.items}[{n}]", _bad_id(id_))


# Hashing a string costs about as much as all the rest of an event, and items and cities come again and again.
_key = lru_cache(_KEYS_REMEMBERED)(key_of)


def _bad_id(id_: int | str) -> str:
    return bad_key(id_) if isinstance(id_, str) else bad_number(id_)


def _bad_name(text: str) -> str:
    return f"expected 1 to {MAX_TEXT_BYTES} bytes of UTF-8, got {shown(text)}"


def _bad_time(time: int, clock: int) -> str:
    return f"expected 0 or more, and at most a day ahead of the server's clock, {clock}, got {time}"
