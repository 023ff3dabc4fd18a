"""A recall request after parsing: typed, checked, ids still external."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.core.types import AnyArray, Float32Array, Int64Array


@dataclass(frozen=True, slots=True)
class RecentItems:
    """What the caller says the user did, newest first; an item may come once per event kind.

    Attributes:
        ids: [m], external ids (int64 or str_).
        points: float32[m], the points of each event.
        timestamps: int64[m], seconds since the epoch.
        kinds: int64[m], a number per event kind, so that the same event given twice counts once.
        override: replaces the stored history instead of standing in front of it.
        passed_over: how many more were given whose event has no points.
    """

    ids: AnyArray
    points: Float32Array
    timestamps: Int64Array
    kinds: Int64Array
    override: bool
    passed_over: int = 0


@dataclass(slots=True)
class Request:
    """One query as the pipeline takes it, which nobody changes; frozen, it would take three times as long to make.

    Attributes:
        user_id: external id; None is a guest.
        limit: candidates wanted at most; None is the scene's own limit.
        now: seconds since the epoch.
        recent: the caller's own view of the history.
        excluded: external ids, or None.
        triggers: external ids of the items to find more like, or None.
        quotas: channel name -> quota of this request; 0 turns the channel off.
        latitude, longitude: degrees; NaN where not given.
        city, device: context.
        deadline: on the clock of time.monotonic(), seconds; infinite where the caller set none.
    """

    user_id: int | str | None = None
    limit: int | None = None
    now: int = 0
    recent: RecentItems | None = None
    excluded: AnyArray | None = None
    triggers: AnyArray | None = None
    quotas: dict[str, int] = field(default_factory=dict)
    latitude: float = np.nan
    longitude: float = np.nan
    city: str = ""
    device: dict[str, str] = field(default_factory=dict)
    deadline: float = np.inf
