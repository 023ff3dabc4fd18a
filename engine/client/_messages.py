"""Between plain values and the wire's messages."""

from __future__ import annotations

from typing import Any, Unpack

import grpc
from google.rpc import error_details_pb2, status_pb2
from recall.v1 import recall_pb2 as pb

from engine.client._values import (
    Candidate,
    ChannelReport,
    Debug,
    FilterReport,
    Id,
    InvalidRequest,
    Proposal,
    Recall,
    RecallResult,
    RecentItem,
    Unknown,
    Violation,
)

_MODES = {"add": pb.RECENT_MODE_ADD, "override": pb.RECENT_MODE_OVERRIDE}


def to_message(**arguments: Unpack[Recall]) -> pb.RecallRequest:
    """Return the request that the arguments of `recall` make.

    Raises:
        TypeError, ValueError: a name or a value that cannot be sent.
    """
    for name in arguments:
        if name not in Recall.__annotations__:
            raise TypeError(f"recall() has no argument {name!r}")
    mode = arguments.get("recent_mode") or "add"
    if mode not in _MODES:
        raise ValueError(f"recent_mode: expected 'add' or 'override', got {mode!r}")
    message = pb.RecallRequest(
        user_id=arguments.get("user_id"),
        scene=arguments.get("scene"),
        limit=arguments.get("limit"),
        recent_mode=_MODES[mode],
        debug=arguments.get("debug") or False,
        request_id=arguments.get("request_id"),
    )
    user_key = arguments.get("user_key")
    if user_key is not None:
        if message.HasField("user_id"):
            raise ValueError("expected user_id or user_key, got both")
        message.user_key = user_key
    for given in arguments.get("recent_items") or ():
        recent = _recent_item(given)
        item = message.recent_items.add(event=recent.event, timestamp=recent.timestamp)
        if isinstance(recent.id, str):
            item.item_key = recent.id
        else:
            item.item_id = recent.id
    for excluded in arguments.get("exclude") or ():
        if isinstance(excluded, str):
            message.exclude_item_keys.append(excluded)
        else:
            message.exclude_item_ids.append(excluded)
    for trigger in arguments.get("like") or ():
        if isinstance(trigger, str):
            message.trigger_item_keys.append(trigger)
        else:
            message.trigger_item_ids.append(trigger)
    for channel, quota in (arguments.get("overrides") or {}).items():
        if quota is True:
            raise ValueError(f"overrides[{channel!r}]: expected a quota or False, got True")
        off = quota is False
        message.channel_overrides.add(channel=channel, off=off, quota=None if off else quota)
    _add_context(message.context, arguments)
    return message


def _recent_item(given: RecentItem | tuple[Any, ...] | Id) -> RecentItem:
    if isinstance(given, RecentItem):
        return given
    # A string is no sequence of arguments.
    return RecentItem(*given) if isinstance(given, tuple | list) else RecentItem(given)


def _add_context(context: pb.Context, arguments: Recall) -> None:
    context.MergeFrom(pb.Context(city=arguments.get("city"), time=arguments.get("time")))
    context.device.update(arguments.get("device") or {})
    location = arguments.get("location")
    if location is not None:
        context.location.latitude, context.location.longitude = location


def to_result(response: pb.RecallResponse) -> RecallResult:
    """Return an answer in plain values."""
    return RecallResult(
        request_id=response.request_id,
        candidates=tuple(
            Candidate(
                _one_of(candidate, "item"),
                candidate.score,
                tuple(
                    Proposal(p.channel, p.rank, p.score, _one_of(p, "trigger")) for p in candidate.proposals
                ),
            )
            for candidate in response.candidates
        ),
        channels=tuple(
            ChannelReport(
                report.channel,
                _enum_name(pb.ChannelStatus, report.status, "CHANNEL_STATUS_"),
                _enum_name(pb.TriggerKind, report.trigger_kind, "TRIGGER_KIND_"),
                report.returned,
                report.eligible,
                report.kept,
                report.microseconds,
                report.message,
            )
            for report in response.channels
        ),
        filters=tuple(
            FilterReport(
                report.filter,
                report.removed,
                _enum_name(pb.FilterStatus, report.status, "FILTER_STATUS_"),
            )
            for report in response.filters
        ),
        release=response.release,
        snapshots=dict(response.snapshots),
        unknown=Unknown(
            response.unknown.user,
            response.unknown.recent_items,
            response.unknown.exclude_items,
            response.unknown.trigger_items,
        ),
        debug=_debug(response.debug) if response.HasField("debug") else None,
    )


def _debug(debug: pb.DebugInfo) -> Debug:
    return Debug(
        stages={stage.stage: stage.microseconds for stage in debug.stages},
        history=(*debug.history_item_ids, *debug.history_item_keys),
        batch_size=debug.batch_size,
        removed={one.filter: (*one.item_ids, *one.item_keys) for one in debug.removed},
    )


def _one_of(message: Any, group: str) -> Any:
    field = message.WhichOneof(group)
    return None if field is None else getattr(message, field)


def _enum_name(enum: Any, number: int, prefix: str) -> str:
    """The value's name without its prefix; the number itself where a newer server knows more than we do."""
    known = enum.DESCRIPTOR.values_by_number.get(number)
    return str(number) if known is None else known.name.removeprefix(prefix)


def translated(error: Any) -> Exception:
    """Return the InvalidRequest that a failed call means, else the failure itself."""
    if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
        return error  # type: ignore[no-any-return]
    violations: list[Violation] = []
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                bad = error_details_pb2.BadRequest()
                if detail.Unpack(bad):
                    violations += [Violation(one.field, one.description) for one in bad.field_violations]
    return InvalidRequest(error.details() or "invalid argument", tuple(violations))
