"""What the pipeline knows of users: the live state from the store, merged with the history of the release."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice

import numpy as np

from engine.core.errors import StateError
from engine.core.int_table import IntTable
from engine.core.keys import keys_of
from engine.core.live import Exposure, Leftovers, LiveState
from engine.core.query import History
from engine.core.types import AnyArray, Int32Array, Int64Array, RaggedRows
from engine.data.live import LiveCatalogue
from engine.state.exposure import ExposureBackend
from engine.state.history import SnapshotHistory, UserRead
from engine.state.layout import (
    CITIES_KEPT,
    STATE_SUFFIXES,
    kind_of,
    slice_suffix,
    user_prefix,
    user_tag,
)
from engine.state.records import gathered, merge_histories, sort_out
from engine.state.store import StateStore
from engine.state.writes import UserLimits

_LOG_SECONDS = 10.0

_log = logging.getLogger(__name__)


class _Codes:
    """Finds the codes of a vocabulary that grows (text -> code) by the key of the text."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self._vocabulary = vocabulary
        self._table = IntTable()
        self._known = 0

    def get(self, keys: Int64Array) -> Int32Array:
        """Return int32[n]: the code of each key; -1 where there is none."""
        if len(self._vocabulary) > self._known:
            new = list(islice(self._vocabulary.items(), self._known, None))
            self._table.put(keys_of(text for text, _ in new), np.array([code for _, code in new], np.int32))
            self._known += len(new)
        return self._table.get(keys)


class LiveUsers:
    """Reads the users of a batch from the state store; implements `UserState`.

    Entries of the live state and of the release's history are merged by item: the weight is the larger of the two (the
    points that a history stores do not say which events they count), the time the later one.
    """

    def __init__(
        self,
        store: StateStore,
        limits: UserLimits,
        catalogue: LiveCatalogue,
        snapshot: SnapshotHistory,
        points: Mapping[str, float],
        history_keep: int,
        exposure: ExposureBackend,
    ) -> None:
        """Read from a store.

        Args:
            store: where users are kept.
            limits: how much of each, as they were written with.
            catalogue: whose rows are answered.
            snapshot: the release's history.
            points: per kind of action; a kind without points says nothing about interest.
            history_keep: entries of a history that are answered at most.
            exposure: who keeps exposures.
        """
        self._store = store
        self._limits = limits
        self._head = user_prefix(store.prefix, b"")[:-1]
        self._catalogue = catalogue
        self._snapshot = snapshot
        counted = {kind_of(name): value for name, value in points.items() if value > 0}
        self._kinds = np.array(list(counted), np.uint32)
        self._points = np.array(list(counted.values()), np.float32)
        self._keep = history_keep
        self._old = [_read_only(array) for array in snapshot.arrays]
        self._exposure = exposure
        self._cities = _Codes(catalogue.columns.city_codes)
        self._tags = _Codes(catalogue.columns.tag_vocabulary)
        self._slices: list[int] = []
        self._read: tuple[bytes, ...] = STATE_SUFFIXES
        self._failing_since = 0.0
        self._logged = -_LOG_SECONDS

    def read(self, user_ids: AnyArray, users: Int32Array, now: Int64Array, cities: Sequence[str]) -> UserRead:
        """Return what is known of each user, as `UserState.read`; one round trip to the store, none for guests."""
        del now  # what is kept is kept by the server's clock
        guest = -1 if user_ids.dtype.kind == "i" else ""
        tags = [b"" if id_ == guest else user_tag(id_) for id_ in user_ids.tolist()]
        suffixes = self._suffixes(self._exposure.slice_numbers(time.time()))
        try:
            values = self._store.mget_users([b"%s%s}" % (self._head, tag) for tag in tags if tag], suffixes)
        except StateError as error:
            self._failed(error)
            return UserRead(self._snapshot.histories(users), LiveState.empty(users.size, available=False))
        if self._failing_since:
            _log.info("the state store answers again")
            self._failing_since = 0.0
        asked = np.array([bool(tag) for tag in tags])
        offsets, records, bits, damaged = gathered(values, asked, len(suffixes))
        if damaged:
            _log.warning("%d values of users in the state store are damaged and not used", damaged)
        codes = self._catalogue.columns.city_codes
        current = np.array([codes.get(city, -1) if city else -1 for city in cities], np.int32)
        return self._decoded(offsets, records, users, current, self._exposure.view(tags, bits))

    def _suffixes(self, slices: list[int]) -> tuple[bytes, ...]:
        """Return which keys are read of a user."""
        if slices != self._slices:
            self._slices, self._read = slices, (*STATE_SUFFIXES, *map(slice_suffix, slices))
        return self._read

    def _decoded(
        self,
        offsets: Int64Array,
        records: Int64Array,
        users: Int32Array,
        current: Int32Array,
        exposure: Exposure,
    ) -> UserRead:
        n = users.size
        recent, leftovers, dislikes, follows, cities, _end = offsets[::n].tolist()
        keys, kinds, values32 = records[0::3].copy(), records.view(np.uint32), records.view(np.float32)
        # STATE_SUFFIXES puts next to each other what is looked up in one index.
        items = self._catalogue.items.rows_of_keys(keys[:follows])
        authors = self._catalogue.authors.rows_of_keys(keys[dislikes:cities])
        tags = self._tags.get(keys[dislikes:follows])
        places = self._cities.get(keys[cities:])
        if leftovers > recent:
            history = self._merged(offsets[: n + 1], items, kinds, records, users)
        else:
            history = self._snapshot.histories(users)
        rows = np.empty(keys.size + n, np.int32)
        scores = np.empty(dislikes - leftovers, np.float32)
        stamps = np.empty(dislikes - leftovers, np.int64)
        recalls = np.empty(dislikes - leftovers, np.int32)
        bounds = np.empty((6, n + 1), np.int64)
        limits = self._limits
        sort_out(
            offsets, n, items, authors, tags, places, kinds, values32, records, current,
            limits.dislikes, limits.follows, CITIES_KEPT, rows, scores, stamps, recalls, bounds,
        )  # fmt: skip
        ends = [0, *accumulate(bounds[:, n].tolist())]
        parts = [rows[ends[at] : ends[at + 1]] for at in range(6)]
        ragged = [RaggedRows(part, bounds[at]) for at, part in enumerate(parts)]
        kept = parts[0].size
        live = LiveState(
            follows=ragged[4],
            disliked_items=ragged[1],
            disliked_authors=ragged[2],
            disliked_tags=ragged[3],
            cities=ragged[5],
            leftovers=Leftovers(parts[0], scores[:kept], stamps[:kept], recalls[:kept], bounds[0]),
            exposure=exposure,
            available=True,
        )
        return UserRead(history, live)

    def _merged(
        self, offsets: Int64Array, items: Int32Array, kinds: AnyArray, times: Int64Array, users: Int32Array
    ) -> History:
        indptr, old_rows, old_weights, old_times = self._old
        room = users.size * self._keep
        rows, weights = np.empty(room, np.int32), np.empty(room, np.float32)
        timestamps, ends = np.empty(room, np.int64), np.empty(offsets.size, np.int64)
        merge_histories(
            offsets, items, kinds, times, self._kinds, self._points,
            users, indptr, old_rows, old_weights, old_times,
            self._limits.recent, self._keep, rows, weights, timestamps, ends,
        )  # fmt: skip
        m = int(ends[-1])
        return History(rows[:m], weights[:m], timestamps[:m], ends)

    def _failed(self, error: StateError) -> None:
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            _log.warning("%s; requests go on with the release's history", error)


def _read_only(array: AnyArray) -> AnyArray:
    # Whether arrays are mapped or in memory: of one kind, so that the kernel is compiled once.
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view
