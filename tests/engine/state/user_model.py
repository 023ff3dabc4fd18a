"""The rules of user state in plain Python: what the store's script is held to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.core.exposure import ExposureLayout, add
from engine.state.layout import AUTHOR, GONE, ITEM, RECORD, slice_suffix, user_prefix
from engine.state.store import StateStore
from engine.state.writes import UserLimits

Record = tuple[int, int, float, int]


@dataclass
class UserModel:
    """One user: lists of (key, kind, value, time) as they lie in the store."""

    limits: UserLimits
    layout: ExposureLayout
    records: dict[str, list[Record]] = field(default_factory=lambda: {name: [] for name in "rfdcp"})
    ids: list[bytes] = field(default_factory=list)
    bits: bytes = b""

    def commit(self, events: list[tuple[Any, ...]]) -> int:
        """Apply (method of Writes, arguments, event id); return the number of duplicates."""
        duplicates, fresh, shown, cities = 0, [], [], {}
        limits = self.limits
        for name, arguments, event in events:
            if name == "city":
                key, time = arguments
                cities[key] = max(time, cities.get(key, time))
                continue
            if event and limits.event_ids:
                if event in self.ids or event in fresh:
                    duplicates += 1
                    continue
                fresh.append(event)
            if name == "act":
                key, kind, time, watched = arguments
                self._put("r", limits.recent, (key, kind, watched, time))
            elif name == "follow":
                key, time, undo = arguments
                self._put("f", limits.follows, (key, AUTHOR, float(not undo), time))
            elif name == "dislike":
                what, key, time, undo = arguments
                self._put("d", limits.dislikes, (key, what, float(not undo), time))
            elif name == "leftovers":
                keys, scores, time = arguments
                new: dict[int, Record] = {}
                for at, key in enumerate(keys):
                    new.setdefault(key, (key, 1, scores[at] if scores else 0.0, time))
                old = [record for record in self.records["c"] if record[0] not in new and record[1] != GONE]
                if new or old:
                    self.records["c"] = [*new.values(), *old][: limits.leftovers]
            else:
                for key in arguments[0]:
                    self._mark(key, lambda _: GONE)
                    shown.append(key)
        for key, time in cities.items():
            self._put("p", 8, (key, ITEM, 1.0, time))
        if fresh:
            self.ids += fresh
            if len(self.ids) > most(limits.event_ids):
                self.ids = self.ids[-limits.event_ids :]
        if shown:
            self.bits = add(self.bits, shown, self.layout)
        return duplicates

    def recall(self, keys: list[int]) -> None:
        """Count recalls of leftovers."""
        for key in keys:
            self._mark(key, lambda kind: kind if kind == GONE else kind + 1)

    def _put(self, name: str, cap: int, record: Record) -> None:
        records = self.records[name]
        for at, old in enumerate(records):
            if old[:2] == record[:2]:
                if record[3] >= old[3]:
                    records[at] = record
                return
        records.append(record)
        if len(records) > most(cap):
            dropped = sorted(range(len(records)), key=lambda at: (records[at][3], at))[: len(records) - cap]
            self.records[name] = [record for at, record in enumerate(records) if at not in dropped]

    def _mark(self, key: int, change: Any) -> None:
        self.records["c"] = [
            (record[0], change(record[1]), *record[2:]) if record[0] == key else record
            for record in self.records["c"]
        ]


def most(cap: int) -> int:
    """What lies in the store before the oldest are dropped."""
    return cap + max(4, cap // 4)


def stored(store: StateStore, user: bytes, slice_number: int, layout: ExposureLayout) -> dict[str, Any]:
    """What the store holds of a user, in the model's form; bits without zeros at their end."""
    del layout
    prefix = user_prefix(store.prefix, user)
    found: dict[str, Any] = {}
    for name in "rfdcp":
        value = store.execute("GET", prefix + b":" + name.encode()) or b""
        records = np.frombuffer(value, RECORD)
        found[name] = [tuple(record) for record in records[records["kind"] != 0].tolist()]
        assert not records[len(found[name]) :].tobytes().strip(b"\0")
    ids = store.execute("GET", prefix + b":e") or b""
    found["ids"] = ids[8:].rstrip(b"\0")
    bits = store.execute("GET", prefix + b":" + slice_suffix(slice_number)) or b""
    found["bits"] = bits[:16] + bits[16:].rstrip(b"\0")
    return found


def small_limits() -> UserLimits:
    """Limits that a few events go beyond."""
    return dataclasses.replace(UserLimits(), recent=5, follows=4, dislikes=3, leftovers=4, event_ids=6)
