"""Between plain values and the ingest service's messages."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable
from typing import Any

from recall.v1 import ingest_pb2 as pb

from engine.client._ingest_values import (
    Acknowledged,
    Action,
    Dislike,
    Event,
    Exposure,
    Follow,
    Item,
    Leftovers,
    Refusal,
    ReportResult,
    TakeDown,
    UpsertResult,
)
from engine.client._values import Id


class EventWriter:
    """Makes messages of events, with an event_id for each that has none."""

    def __init__(self) -> None:
        # Random once, then counted.
        self._run = secrets.token_hex(8)
        self._numbers = itertools.count(1)

    def add(self, events: Iterable[Event | pb.Event], to: Any) -> None:
        """Append events to a repeated field.

        Raises:
            TypeError, ValueError: an event that cannot be sent.
        """
        for event in events:
            if isinstance(event, pb.Event):
                to.append(event)
            else:
                _fill(to.add(), event)
            if not event.event_id:
                to[-1].event_id = f"{self._run}-{next(self._numbers)}"


def _fill(message: pb.Event, event: Event) -> None:
    _set(message, "user", event.user)
    if event.event_id:
        message.event_id = event.event_id
    if event.timestamp is not None:
        message.timestamp = event.timestamp
    if event.city:
        message.city = event.city
    what = event.what
    if isinstance(what, Exposure):
        message.exposure.SetInParent()
        _extend(message.exposure, what.items)
    elif isinstance(what, Action):
        _set(message.action, "item", what.item)
        message.action.kind = what.kind
        if what.watch_seconds is not None:
            message.action.watch_seconds = what.watch_seconds
    elif isinstance(what, Follow):
        _set(message.follow, "author", what.author)
        message.follow.undo = what.undo
    elif isinstance(what, Dislike):
        given = [name for name in ("item", "author", "topic") if getattr(what, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a dislike names one of item, author and topic, got {' and '.join(given) or 'none'}"
            )
        if what.topic is not None:
            message.dislike.topic = what.topic
        else:
            _set(message.dislike, given[0], getattr(what, given[0]))
        message.dislike.undo = what.undo
    elif isinstance(what, Leftovers):
        message.leftovers.SetInParent()
        _extend(message.leftovers, what.items)
        message.leftovers.scores.extend(what.scores)
    else:
        raise TypeError(f"expected an Exposure, Action, Follow, Dislike or Leftovers, got {what!r}")


def add_changes(changes: Iterable[Item | TakeDown | pb.ItemChange], to: Any) -> None:
    """Append changes of items to a repeated field.

    Raises:
        TypeError, ValueError: a change that cannot be sent.
    """
    for change in changes:
        message = to.add()
        if isinstance(change, pb.ItemChange):
            message.CopyFrom(change)
            continue
        if not isinstance(change, Item | TakeDown):
            raise TypeError(f"expected an Item or a TakeDown, got {change!r}")
        _set(message, "item", change.id)
        if change.updated_at_ms is not None:
            message.updated_at_ms = change.updated_at_ms
        if isinstance(change, TakeDown):
            message.take_down = True
        else:
            _fill_item(message.put, change)


def _fill_item(message: pb.Item, item: Item) -> None:
    message.SetInParent()
    if item.author is not None:
        _set(message, "author", item.author)
    message.MergeFrom(
        pb.Item(
            published_at=item.published_at,
            title=item.title,
            tags=item.tags,
            city=item.city,
            quality=item.quality,
            duration_seconds=item.duration_seconds,
        )
    )
    if item.location is not None:
        message.latitude, message.longitude = item.location


def _set(message: Any, prefix: str, id_: Id) -> None:
    """Set the field of an id, by its type."""
    setattr(message, f"{prefix}_key" if isinstance(id_, str) else f"{prefix}_id", id_)


def _extend(message: Any, items: Iterable[Id]) -> None:
    for item in items:
        (message.item_keys if isinstance(item, str) else message.item_ids).append(item)


def report_result(response: pb.ReportResponse) -> ReportResult:
    """Return an answer in plain values."""
    return ReportResult(response.accepted, response.duplicates, _refused(response))


def acknowledged(response: pb.ReportStreamResponse) -> Acknowledged:
    """Return an answer of a stream in plain values."""
    return Acknowledged(response.offset, response.accepted, response.duplicates, _refused(response))


def upsert_result(response: pb.UpsertItemsResponse) -> UpsertResult:
    """Return an answer in plain values."""
    return UpsertResult(response.accepted, response.stale, _refused(response), response.log_offset)


def _refused(response: Any) -> tuple[Refusal, ...]:
    return tuple(Refusal(each.index, each.field, each.reason) for each in response.refused)
