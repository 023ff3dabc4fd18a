"""From the wire to a typed request: every rule that a RecallRequest must keep, all breaches named."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from recall.v1 import recall_pb2 as pb

from engine.config import Config, SceneConfig
from engine.core.errors import RequestError
from engine.core.types import AnyArray
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
from engine.online.request import RecentItems, Request

MAX_RECENT = 1_000
MAX_EXCLUDED = 10_000
MAX_TRIGGERS = 64
MAX_OVERRIDES = 64
MAX_DEVICE = 64
MAX_REQUEST_ID_BYTES = 128

_DEFAULT_SCENE = "default"
_NO_EVENT = -1

_Violations = list[tuple[str, str]]


def parse(
    message: pb.RecallRequest, config: Config, id_kind: IdKind, deadline: float, now: int
) -> tuple[str, Request]:
    """Check a request and make it what the pipeline takes.

    What the catalogue does not know, users and items alike, is no breach: it is counted in the answer.

    Args:
        message: as it came.
        config: limits, scenes and event names.
        id_kind: what the catalogue's ids are.
        deadline: on the clock of time.monotonic(), seconds; infinite where the caller set none.
        now: the server's clock, seconds since the epoch.

    Returns:
        The scene's name and the request.

    Raises:
        RequestError: naming every breach.
    """
    bad: _Violations = []
    scene_name = _scene_name(message.scene, config, bad)
    limit = message.limit if message.HasField("limit") else None
    if limit is not None:
        _check_range(limit, 1, config.server.max_limit, "limit", bad)
    _check_text(message.request_id, MAX_REQUEST_ID_BYTES, "request_id", bad)
    latitude = longitude = np.nan
    city = ""
    device: dict[str, str] = {}
    if message.HasField("context"):
        context = message.context
        if context.HasField("time"):
            now = context.time
            _check_range(now, 0, MAX_TIME, "context.time", bad)
        if context.HasField("location"):
            latitude, longitude = context.location.latitude, context.location.longitude
            # NaN fails both comparisons, as it must: inside, NaN means that there is no location.
            _check_range(latitude, -90, 90, "context.location.latitude", bad)
            _check_range(longitude, -180, 180, "context.location.longitude", bad)
        city = context.city
        _check_text(city, MAX_TEXT_BYTES, "context.city", bad)
        device = _device(context, bad)
    request = Request(
        user_id=_user(message, id_kind, bad),
        limit=limit,
        now=now,
        recent=_recent(message, config, id_kind, now, bad),
        excluded=_items(message, "exclude_item_", MAX_EXCLUDED, id_kind, bad),
        triggers=_items(message, "trigger_item_", MAX_TRIGGERS, id_kind, bad),
        quotas=_quotas(message, config.scenes.get(scene_name), config.server.max_limit, bad),
        latitude=latitude,
        longitude=longitude,
        city=city,
        device=device,
        deadline=deadline,
    )
    if bad:
        raise RequestError(bad)
    return scene_name, request


def _scene_name(name: str, config: Config, bad: _Violations) -> str:
    if not name:
        if _DEFAULT_SCENE in config.scenes:
            return _DEFAULT_SCENE
        if len(config.scenes) == 1:
            return next(iter(config.scenes))
        bad.append(
            ("scene", f"expected a scene, as none is called {_DEFAULT_SCENE!r}: {names(config.scenes)}")
        )
    elif name not in config.scenes:
        bad.append(("scene", f"expected one of {names(config.scenes)}, got {shown(name)}"))
    return name


def _user(message: pb.RecallRequest, id_kind: IdKind, bad: _Violations) -> int | str | None:
    given = message.WhichOneof("user")
    if given is None:
        return None
    return _id(given, getattr(message, given), "user_", given, id_kind, bad)


def _id(given: str, value: int | str, prefix: str, path: str, id_kind: IdKind, bad: _Violations) -> int | str:
    """Check one id, given in the field `prefix`id or `prefix`key; the field itself stands at `path`."""
    wanted = f"{prefix}id" if id_kind == "int64" else f"{prefix}key"
    if given != wanted:
        bad.append((path, bad_kind(wanted, id_kind)))
    elif isinstance(value, str):
        if not is_key(value):
            bad.append((path, bad_key(value)))
    elif value < 0:
        bad.append((path, bad_number(value)))
    return value


def _recent(
    message: pb.RecallRequest, config: Config, id_kind: IdKind, now: int, bad: _Violations
) -> RecentItems | None:
    mode = message.recent_mode
    if mode not in (pb.RECENT_MODE_ADD, pb.RECENT_MODE_OVERRIDE):
        bad.append(("recent_mode", f"expected RECENT_MODE_ADD or RECENT_MODE_OVERRIDE, got {mode}"))
    override = mode == pb.RECENT_MODE_OVERRIDE
    items = message.recent_items
    if not items and not override:
        return None
    if not _check_count(len(items), MAX_RECENT, "recent_items", bad):
        return None
    kinds = {event: number for number, event in enumerate(config.interest)}
    ids: list[int | str] = []
    points: list[float] = []
    times: list[int] = []
    numbers: list[int] = []
    for i, item in enumerate(items):
        at = f"recent_items[{i}]"
        given = item.WhichOneof("item")
        if given is None:
            bad.append((f"{at}.item", f"expected item_{'id' if id_kind == 'int64' else 'key'}"))
            continue
        value = _id(given, getattr(item, given), "item_", f"{at}.{given}", id_kind, bad)
        time = item.timestamp if item.HasField("timestamp") else now
        if item.HasField("timestamp"):
            _check_range(time, 0, MAX_TIME, f"{at}.timestamp", bad)
        if item.event and item.event not in kinds:
            bad.append((f"{at}.event", f"expected one of {names(kinds)}, got {shown(item.event)}"))
            continue
        worth = config.interest[item.event] if item.event else 1.0
        if worth > 0:  # an event of no points says nothing about interest, here as in the stored history
            ids.append(value)
            points.append(worth)
            times.append(time)
            numbers.append(kinds.get(item.event, _NO_EVENT))
    if bad:
        return None
    return RecentItems(
        ids=_id_array(ids, id_kind),
        points=np.array(points, np.float32),
        timestamps=np.array(times, np.int64),
        kinds=np.array(numbers, np.int64),
        override=override,
        passed_over=len(items) - len(ids),
    )


def _items(
    message: pb.RecallRequest, prefix: str, most: int, id_kind: IdKind, bad: _Violations
) -> AnyArray | None:
    """Check the items given in one of the fields `prefix`ids and `prefix`keys."""
    right, wrong = f"{prefix}ids", f"{prefix}keys"
    if id_kind == "string":
        right, wrong = wrong, right
    if getattr(message, wrong):
        bad.append((wrong, bad_kind(right, id_kind)))
    given = getattr(message, right)
    if not given or not _check_count(len(given), most, right, bad):
        return None
    if id_kind == "string":
        bad.extend((f"{right}[{i}]", bad_key(key)) for i, key in enumerate(given) if not is_key(key))
        return None if bad else _id_array(given, id_kind)
    ids = _id_array(given, id_kind)
    bad.extend((f"{right}[{i}]", bad_number(ids[i])) for i in np.flatnonzero(ids < 0).tolist())
    return ids


def _quotas(
    message: pb.RecallRequest, scene: SceneConfig | None, max_quota: int, bad: _Violations
) -> dict[str, int]:
    overrides = message.channel_overrides
    quotas: dict[str, int] = {}
    if not overrides or not _check_count(len(overrides), MAX_OVERRIDES, "channel_overrides", bad):
        return quotas
    seen: set[str] = set()
    for i, override in enumerate(overrides):
        at = f"channel_overrides[{i}]"
        name = override.channel
        # Of an unknown scene, which is a breach already, no channel is known.
        if scene is not None and name not in scene.quotas and name not in scene.fallback:
            known = names((*scene.quotas, *scene.fallback))
            bad.append((f"{at}.channel", f"expected one of {known}, got {shown(name)}"))
        elif name in seen:
            bad.append((f"{at}.channel", f"expected each channel once, got {shown(name)} again"))
        seen.add(name)
        if override.HasField("quota"):
            _check_range(override.quota, 0, max_quota, f"{at}.quota", bad)
            if override.off:
                bad.append((f"{at}.off", "expected either off or quota, got both"))
            elif override.quota > 0 and scene is not None and name in scene.fallback:
                text = f"expected 0 or nothing: {name!r} is a fallback, which has no quota"
                bad.append((f"{at}.quota", text))
            quotas[name] = override.quota
        elif override.off:
            quotas[name] = 0
    return quotas


def _device(context: pb.Context, bad: _Violations) -> dict[str, str]:
    device: dict[str, str] = {}
    if context.device and _check_count(len(context.device), MAX_DEVICE, "context.device", bad):
        device.update(context.device)
        for key, value in device.items():
            at = f"context.device[{shown(key)}]"
            _check_text(key, MAX_TEXT_BYTES, at, bad)
            _check_text(value, MAX_TEXT_BYTES, at, bad)
    return device


def _check_range(value: float, low: float, high: float, path: str, bad: _Violations) -> None:
    if not low <= value <= high:
        bad.append((path, bad_range(value, low, high)))


def _check_text(value: str, most: int, path: str, bad: _Violations) -> None:
    if not fits(value, most):
        bad.append((path, bad_text(value, most)))


def _check_count(count: int, most: int, path: str, bad: _Violations) -> bool:
    """Whether a list is no longer than allowed; one that is longer is not looked into any further."""
    if count > most:
        bad.append((path, bad_count(count, most)))
    return count <= most


def _id_array(ids: Iterable[int | str], id_kind: IdKind) -> AnyArray:
    return np.array(list(ids), np.int64 if id_kind == "int64" else np.str_)
