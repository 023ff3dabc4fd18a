"""Rehearsal: what serving live state will run is run once before, so that every kernel is compiled by then.

A compilation takes seconds, in which nobody is answered. The first caller with follows, leftovers or exposures, and the
first item published, must not be the ones to start it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
from recall.v1 import ingest_pb2 as pb

from engine.config import Config
from engine.core import exposure
from engine.core.types import AnyArray, Int32Array
from engine.data.catalogue import Catalogue
from engine.data.changes import ItemChanges
from engine.data.ids import IdIndex, IdKind
from engine.data.live import LiveCatalogue, LiveIds
from engine.online.encode import encode
from engine.online.hydrate import Hydrator
from engine.online.pipeline import Pipeline
from engine.online.replica import Replica
from engine.online.request import Request
from engine.online.state import State
from engine.state.history import SnapshotHistory
from engine.state.layout import (
    AUTHOR,
    CITIES,
    DISLIKES,
    FOLLOWS,
    ITEM,
    LEFTOVERS,
    RECENT,
    RECORD,
    TOPIC,
    kind_of,
)
from engine.state.recall_counts import Recalled, counted
from engine.state.replies import Values
from engine.state.store import StateStore


def rehearse(config: Config, replica: Replica, state: State) -> None:
    """Answer users who did everything, in every scene, and tell every channel of an item; nothing is changed by it.

    Whatever a scene raises is raised.
    """
    catalogue = replica.catalogue
    if not len(catalogue.items) or not len(catalogue.users):
        return
    some = np.zeros(1, np.int32)
    empty = np.empty(0, np.int64) if catalogue.id_type == "int64" else np.empty(0, "S1")
    new = LiveIds(IdIndex(empty))
    new.rows(new.ids(new.add(_as_new(catalogue.items.ids(some)))))
    new.keys(some)
    replica.update(some)
    _take_in_items(catalogue.id_type)
    users = state.live_users(catalogue, _history(len(catalogue.users)), _made_up(config, catalogue, state))
    hydrator = Hydrator(catalogue.items, catalogue.users, users, catalogue.authors, catalogue.columns)
    known = catalogue.users.ids(some).tolist()[0]
    unknown = -2 if catalogue.id_type == "int64" else "\x01"
    columns = catalogue.columns
    located = np.flatnonzero(columns.latitude == columns.latitude)[:1]
    where = (
        (float(columns.latitude[located[0]]), float(columns.longitude[located[0]]))
        if located.size
        else (0.0, 0.0)
    )
    requests = [
        Request(user_id=user, latitude=where[0], longitude=where[1], city=next(iter(columns.city_codes), "-"))
        for user in (known, unknown)
    ]
    for name, scene in config.scenes.items():
        pipeline = Pipeline(
            scene, dict(replica.channels), dict(replica.filters), hydrator, guards=replica.guards or None
        )
        for batch in ([requests[0]], [requests[1]], requests):
            run = pipeline.run(batch)
            encode(replica, pipeline, run, [f"rehearsal of {name}"] * len(batch), [True] * len(batch))
            if run.batch.live.exposure is not None:
                run.batch.live.exposure.measure(1)
            counted([Recalled(b"", catalogue.items.keys(some), run.hydrated.leftovers(0))])


def _take_in_items(kind: IdKind) -> None:
    """Take one item that has everything into a catalogue of nothing, as the tail of the live log does."""
    item = pb.Item(
        published_at=1_600_000_000,
        title="a title",
        tags=["a", "b"],
        city="a city",
        latitude=1.0,
        longitude=1.0,
        quality=0.5,
        duration_seconds=1.0,
    )
    id_ = {"item_id": 1} if kind == "int64" else {"item_key": "1"}
    if kind == "int64":
        item.author_id = 1
    else:
        item.author_key = "1"
    put = pb.ItemChange(updated_at_ms=1, put=item, **id_)
    down = pb.ItemChange(updated_at_ms=2, take_down=True, **id_)
    catalogue = LiveCatalogue.of(Catalogue.of_nothing(kind))
    for change in (put, down):
        catalogue.apply(ItemChanges.parse([change.SerializeToString()], kind))


def _as_new(ids: AnyArray) -> AnyArray:
    return ids if ids.dtype.kind == "i" else np.char.encode(ids, "utf-8")


class _MadeUpStore:
    """Knows the same of every user; stands in for a `StateStore` that is only asked for users."""

    prefix = "rehearsal"

    def __init__(self, values: dict[bytes, bytes], bits: bytes) -> None:
        self._values = values
        self._bits = bits

    def ask_users(self, users: Sequence[bytes], suffixes: Sequence[bytes]) -> Callable[[], Values]:
        values = [self._values.get(suffix, self._bits) for _ in users for suffix in suffixes]
        return partial(Values.of, values)


def _made_up(config: Config, catalogue: LiveCatalogue, state: State) -> StateStore:
    items = catalogue.items.keys(np.arange(min(2, len(catalogue.items)), dtype=np.int32)).tolist()
    authors = [7]
    if len(catalogue.authors):
        authors = catalogue.authors.keys(np.zeros(1, np.int32)).tolist()
    acted = kind_of(next(kind for kind, points in config.interest.items() if points > 0))
    values = {
        RECENT: _records([(item, acted) for item in items]),
        LEFTOVERS: _records([(item, 1) for item in items]),
        DISLIKES: _records([(items[-1], ITEM), (8, AUTHOR), (9, TOPIC)]),
        FOLLOWS: _records([(author, AUTHOR) for author in authors]),
        CITIES: _records([(10, ITEM)]),
    }
    bits = exposure.add(None, items[-1:], state.exposure.layout)
    return cast(StateStore, _MadeUpStore(values, bits))


def _records(known: list[tuple[int, int]]) -> bytes:
    records = np.zeros(len(known), RECORD)
    records["key"] = [key for key, _ in known]
    records["kind"] = [kind for _, kind in known]
    records["value"] = 1.0
    records["time"] = 1_600_000_000
    return records.tobytes()


def _history(users: int) -> SnapshotHistory:
    """The first user knows the first item."""
    indptr = np.ones(users + 1, np.int64)
    indptr[0] = 0
    rows: Int32Array = np.zeros(1, np.int32)
    return SnapshotHistory(
        {
            "indptr": indptr,
            "rows": rows,
            "weights": np.ones(1, np.float32),
            "timestamps": np.ones(1, np.int64),
        }
    )
