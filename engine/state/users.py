"""What the pipeline knows of users: the live state from the store, merged with the history of the release."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NoReturn, Self

import numpy as np

from engine.core.errors import StateError
from engine.core.exposure import ExposureBits
from engine.core.int_table import IntTable
from engine.core.keys import keys_of
from engine.core.live import Exposure, Leftovers, LiveState
from engine.core.query import History
from engine.core.ragged import alone_first
from engine.core.types import AnyArray, BoolArray, Int32Array, Int64Array, RaggedRows
from engine.data.live import LiveCatalogue
from engine.state.exposure import ExposureBackend
from engine.state.history import ReadUsers, SnapshotHistory, UserRead
from engine.state.layout import (
    CITIES_KEPT,
    LEFTOVERS,
    RECORD,
    STATE_SUFFIXES,
    kind_of,
    slice_suffix,
    user_prefix,
    user_tag,
)
from engine.state.records import read_histories, sort_out
from engine.state.replies import Values
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

    @property
    def tables(self) -> tuple[Int64Array, Int32Array]:
        """`IntTable.arrays`: the keys and codes of all that is known now."""
        if len(self._vocabulary) > self._known:
            new = list(islice(self._vocabulary.items(), self._known, None))
            self._table.put(keys_of(text for text, _ in new), np.array([code for _, code in new], np.int32))
            self._known += len(new)
        return self._table.arrays


_LEFTOVERS_AT = STATE_SUFFIXES.index(LEFTOVERS)

_SORTED_OUT = ("leftovers", "disliked_items", "disliked_authors", "disliked_tags", "follows", "cities")


class _ReadState(LiveState):
    """A `LiveState` whose parts but `exposure` are sorted out when the first of them is asked for."""

    __slots__ = ("_sort_out",)

    _sort_out: Callable[[], Sequence[Leftovers | RaggedRows]]

    @classmethod
    def of(cls, exposure: Exposure, sort_out: Callable[[], Sequence[Leftovers | RaggedRows]]) -> Self:
        """Return the state that a function sorts out, called once at most: _SORTED_OUT in this order."""
        state = cls.__new__(cls)
        for name, value in (("exposure", exposure), ("available", True), ("_sort_out", sort_out)):
            object.__setattr__(state, name, value)
        return state

    def __getattr__(self, name: str) -> Any:
        # Asked only for what the slots do not hold yet.
        if name not in _SORTED_OUT:
            raise AttributeError(name)
        for part, value in zip(_SORTED_OUT, self._sort_out(), strict=True):
            object.__setattr__(self, part, value)
        return object.__getattribute__(self, name)


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
        self._old = snapshot.arrays
        self._exposure = exposure
        self._cities = _Codes(catalogue.columns.city_codes)
        self._tags = _Codes(catalogue.columns.tag_vocabulary)
        self._slices: list[int] = []
        self._read: tuple[bytes, ...] = STATE_SUFFIXES
        self._failing_since = 0.0
        self._logged = -_LOG_SECONDS

    def ask(self, user_ids: AnyArray) -> ReadUsers:
        """Ask for users, as `UserState.ask`; one round trip to the store, none for guests."""
        guest = -1 if user_ids.dtype.kind == "i" else ""
        tags = [b"" if id_ == guest else user_tag(id_) for id_ in user_ids.tolist()]
        suffixes = self._suffixes(self._exposure.slice_numbers(time.time()))
        try:
            receive = self._store.ask_users([b"%s%s}" % (self._head, tag) for tag in tags if tag], suffixes)
        except StateError as error:
            receive = partial(_raise, error)
        return partial(self._receive, receive, tags, len(suffixes))

    def _receive(
        self,
        receive: Callable[[], Values],
        tags: Sequence[bytes],
        width: int,
        users: Int32Array,
        now: Int64Array,
        cities: Int32Array,
    ) -> UserRead:
        """Read users of these tags who were asked for, `width` values of each."""
        del now  # what is kept is kept by the server's clock
        try:
            values = receive()
        except StateError as error:
            self._failed(error)
            live = LiveState.empty(users.size, available=False, cities=alone_first(cities))
            return UserRead(self._snapshot.histories(users), live)
        if self._failing_since:
            _log.info("the state store answers again")
            self._failing_since = 0.0
        asked = np.array([bool(tag) for tag in tags])
        history, bits = self._histories(values, asked, width, users)
        rest = partial(self._sorted_out, values, asked, width, cities)
        live = _ReadState.of(self._exposure.view(tags, bits), rest)
        return UserRead(history, live, partial(_leftovers, values, asked, width))

    def _suffixes(self, slices: list[int]) -> tuple[bytes, ...]:
        """Return which keys are read of a user."""
        if slices != self._slices:
            self._slices, self._read = slices, (*STATE_SUFFIXES, *map(slice_suffix, slices))
        return self._read

    def _histories(
        self, values: Values, asked: BoolArray, width: int, users: Int32Array
    ) -> tuple[History, ExposureBits]:
        """Return the histories of the users, merged with the release's, and their exposure bits."""
        n = users.size
        room = n * self._keep
        rows, weights = np.empty(room, np.int32), np.empty(room, np.float32)
        timestamps, ends, owned = (
            np.empty(room, np.int64),
            np.empty(n + 1, np.int64),
            np.empty(n + 1, np.int64),
        )
        spans = np.empty((len(values), 2), np.int64)
        indptr, old_rows, old_weights, old_times = self._old
        damaged = read_histories(
            values.content, values.starts, values.sizes, asked, width, *self._catalogue.items.key_tables,
            self._kinds, self._points, users, indptr, old_rows, old_weights, old_times, self._limits.recent, self._keep,
            rows, weights, timestamps, ends, spans, owned,
        )  # fmt: skip
        if damaged:
            _log.warning("%d values of users in the state store are damaged and not used", damaged)
        bits = ExposureBits(values.content, spans[: int(owned[n])], owned)
        m = int(ends[n])
        if m < 0:
            return self._snapshot.histories(users), bits
        return History(rows[:m], weights[:m], timestamps[:m], ends), bits

    def _sorted_out(
        self, values: Values, asked: BoolArray, width: int, current: Int32Array
    ) -> list[Leftovers | RaggedRows]:
        """Return what the records other than recent actions say, in the order of _SORTED_OUT."""
        n = asked.size
        room = values.content.size // RECORD.itemsize + n
        rows, scores = np.empty(room, np.int32), np.empty(room, np.float32)
        stamps, recalls = np.empty(room, np.int64), np.empty(room, np.int32)
        bounds = np.empty((len(_SORTED_OUT), n + 1), np.int64)
        limits, catalogue = self._limits, self._catalogue
        sort_out(
            values.content, values.starts, values.sizes, asked, width,
            *catalogue.items.key_tables, *catalogue.authors.key_tables, *self._tags.tables, *self._cities.tables,
            current, limits.dislikes, limits.follows, CITIES_KEPT, rows, scores, stamps, recalls, bounds,
        )  # fmt: skip
        first = end = int(bounds[0, n])
        parts: list[Leftovers | RaggedRows] = [
            Leftovers(rows[:first], scores[:first], stamps[:first], recalls[:first], bounds[0])
        ]
        for offsets in bounds[1:]:
            start, end = end, end + int(offsets[n])
            parts.append(RaggedRows(rows[start:end], offsets))
        return parts

    def _failed(self, error: StateError) -> None:
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            _log.warning("%s; requests go on with the release's history", error)


def _leftovers(values: Values, asked: BoolArray, width: int, q: int) -> bytes:
    """Return the leftovers of the user at a place in the batch, as they were read."""
    if not asked[q]:
        return b""
    return values[width * int(np.count_nonzero(asked[:q])) + _LEFTOVERS_AT] or b""


def _raise(error: StateError) -> NoReturn:
    raise error
