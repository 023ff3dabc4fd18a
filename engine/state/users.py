"""What the pipeline knows of users: the live state from the store, merged with the history of the release."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, islice

import numpy as np
from numba import njit

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
    AUTHOR,
    CITIES_KEPT,
    GONE,
    ITEM,
    RECORD,
    STATE_SUFFIXES,
    kind_of,
    slice_suffix,
    user_prefix,
    user_tag,
)
from engine.state.store import StateStore
from engine.state.writes import UserLimits

_WORDS = RECORD.itemsize // 8
_LOG_SECONDS = 10.0
_RUN = 16

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
        n = users.size
        guest = -1 if user_ids.dtype.kind == "i" else ""
        tags = [b"" if id_ == guest else user_tag(id_) for id_ in user_ids.tolist()]
        suffixes = self._suffixes(self._exposure.slice_numbers(time.time()))
        width, kept = len(suffixes), len(STATE_SUFFIXES)
        try:
            found = self._store.mget_users([b"%s%s}" % (self._head, tag) for tag in tags if tag], suffixes)
        except StateError as error:
            self._failed(error)
            return UserRead(self._snapshot.histories(users), LiveState.empty(n, available=False))
        if self._failing_since:
            _log.info("the state store answers again")
            self._failing_since = 0.0
        if len(found) < n * width:
            answered = iter(found)
            found = [next(answered) if tag else None for tag in tags for _ in range(width)]
        exposure = self._exposure.view(
            tags, [found[at + kept : at + width] for at in range(0, n * width, width)]
        )
        values = [value or b"" for at in range(kept) for value in found[at::width]]
        content = b"".join(values)
        if len(content) % RECORD.itemsize:
            values, content = self._whole(values)
        current = [self._catalogue.columns.city_codes.get(city, -1) if city else -1 for city in cities]
        if not content:
            here = RaggedRows.of([np.array([city] if city >= 0 else [], np.int32) for city in current])
            live = replace(LiveState.empty(n), cities=here, exposure=exposure)
            return UserRead(self._snapshot.histories(users), live)
        return self._decoded(values, content, users, np.array(current, np.int32), exposure)

    def _suffixes(self, slices: list[int]) -> tuple[bytes, ...]:
        """Return which keys are read of a user."""
        if slices != self._slices:
            self._slices, self._read = slices, (*STATE_SUFFIXES, *map(slice_suffix, slices))
        return self._read

    def _whole(self, values: list[bytes]) -> tuple[list[bytes], bytes]:
        """Return the values that consist of whole records, and these end to end; any other is damaged."""
        damaged = sum(1 for value in values if len(value) % RECORD.itemsize)
        if damaged:
            _log.warning("%d values of users in the state store are damaged and not used", damaged)
            values = [value if len(value) % RECORD.itemsize == 0 else b"" for value in values]
        return values, b"".join(values)

    def _decoded(
        self, values: list[bytes], content: bytes, users: Int32Array, current: Int32Array, exposure: Exposure
    ) -> UserRead:
        n = users.size
        offsets = np.array([0, *accumulate(map(len, values))]) // RECORD.itemsize
        recent, leftovers, dislikes, follows, cities = (int(offsets[kind * n]) for kind in range(5))
        words = np.frombuffer(content, np.int64).reshape(-1, _WORDS)
        keys = np.ascontiguousarray(words[:, 0])
        kinds = np.frombuffer(content, np.uint32)
        values32 = np.frombuffer(content, np.float32)
        # STATE_SUFFIXES puts next to each other what is looked up in one index.
        items = self._catalogue.items.rows_of_keys(keys[:follows])
        authors = self._catalogue.authors.rows_of_keys(keys[dislikes:cities])
        tags = self._tags.get(keys[dislikes:follows])
        places = self._cities.get(keys[cities:])
        times = words.reshape(-1)
        if leftovers > recent:
            history = self._merged(offsets[: n + 1], items, kinds, times, users)
        else:
            history = self._snapshot.histories(users)
        rows = np.empty(keys.size + n, np.int32)
        scores = np.empty(dislikes - leftovers, np.float32)
        stamps = np.empty(dislikes - leftovers, np.int64)
        recalls = np.empty(dislikes - leftovers, np.int32)
        bounds = np.empty((6, n + 1), np.int64)
        limits = self._limits
        _decode(
            offsets, n, items, authors, tags, places, kinds, values32, times, current,
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


@njit(nogil=True, cache=True)
def newest_first(times, first, n, order, spare):  # type: ignore[no-untyped-def]
    """Put the records [first, first + n) in order: the latest time first, of one time the later record first.

    Args:
        times: int64[...], records of three words, the last of which is the time.
        first, n: which records.
        order: int64[>= n], the record numbers, out.
        spare: int64[>= n], overwritten.
    """
    in_order = True
    for i in range(n):
        order[i] = first + n - 1 - i
        if i and times[3 * order[i] + 2] > times[3 * order[i - 1] + 2]:
            in_order = False
    if in_order:  # records are appended as things happen
        return
    for start in range(0, n, _RUN):
        for i in range(start + 1, min(start + _RUN, n)):
            record = order[i]
            moment = times[3 * record + 2]
            j = i
            while j > start and times[3 * order[j - 1] + 2] < moment:
                order[j] = order[j - 1]
                j -= 1
            order[j] = record
    width = _RUN
    while width < n:
        for start in range(0, n - width, 2 * width):
            middle, end = start + width, min(start + 2 * width, n)
            if times[3 * order[middle - 1] + 2] >= times[3 * order[middle] + 2]:
                continue
            for i in range(start, middle):
                spare[i] = order[i]
            left, right, to = start, middle, start
            while left < middle:
                if right < end and times[3 * order[right] + 2] > times[3 * spare[left] + 2]:
                    order[to] = order[right]
                    right += 1
                else:
                    order[to] = spare[left]
                    left += 1
                to += 1
        width *= 2


@njit(nogil=True, cache=True)
def _used(kinds, first, last):  # type: ignore[no-untyped-def]
    """Return how many of the records [first, last) are in use: behind them is room for more."""
    while last > first and kinds[6 * last - 4] == 0:
        last -= 1
    return last - first


@njit(nogil=True, cache=True)
def merge_histories(  # type: ignore[no-untyped-def]
    offsets, items, kinds, times, point_kinds, points, users, indptr, old_rows, old_weights, old_times,
    recent, keep, rows, weights, timestamps, ends,
):  # fmt: skip
    """Merge the recent actions of users into their histories.

    Args:
        offsets: int64[n + 1]; user u has the records [offsets[u], offsets[u + 1]).
        items: int32[...], the row of each record's item; -1 where it is not known.
        kinds: uint32[...], the records as 6 words each; word 2 is the kind.
        times: int64[...], the records as 3 words each; word 2 is the time.
        point_kinds, points: uint32[p], float32[p]: what a kind is worth.
        users: int32[n], whose histories; -1 for none.
        indptr, old_rows, old_weights, old_times: the histories of all users, newest first, an item once.
        recent: records per user that count, the newest.
        keep: the longest history answered.
        rows, weights, timestamps: int32, float32, int64[n keep], out.
        ends: int64[n + 1], out: where each user's part is.
    """
    most = 1
    for u in range(offsets.size - 1):
        most = max(most, offsets[u + 1] - offsets[u])
    size = 16
    while size < 2 * most:
        size *= 2
    order, spare = np.empty(most, np.int64), np.empty(most, np.int64)
    owner, entry = np.zeros(size, np.int32), np.empty(size, np.int32)
    live_rows, live_weights, live_times = (
        np.empty(most, np.int32),
        np.empty(most, np.float32),
        np.empty(most, np.int64),
    )
    only = np.empty(keep, np.int64)
    to = ends[0] = 0
    for u in range(offsets.size - 1):
        n = _used(kinds, offsets[u], offsets[u + 1])
        newest_first(times, offsets[u], n, order, spare)
        live = 0
        kind, worth = (
            np.uint32(0),
            np.float32(0),
        )  # people do the same again: the last kind's points are at hand
        for i in range(min(n, recent)):
            record = order[i]
            row = items[record]
            if kinds[6 * record + 2] != kind:
                kind, worth = kinds[6 * record + 2], np.float32(0)
                for p in range(point_kinds.size):
                    if point_kinds[p] == kind:
                        worth = points[p]
            if row < 0 or worth <= 0:
                continue
            at = _place(row, u, owner, entry, live_rows)
            if owner[at] == u + 1:
                live_weights[entry[at]] += worth
            else:
                owner[at], entry[at] = u + 1, live
                live_rows[live], live_weights[live], live_times[live] = row, worth, times[3 * record + 2]
                live += 1
        # What both have is answered once, as a live entry; `fresh` are the entries that only the history has.
        begin = indptr[users[u]] if users[u] >= 0 else 0
        end = indptr[users[u] + 1] if users[u] >= 0 else 0
        fresh = 0
        in_order = True
        for j in range(begin, end):
            at = _place(old_rows[j], u, owner, entry, live_rows)
            if owner[at] != u + 1:
                if fresh < keep:
                    only[fresh] = j
                    fresh += 1
                continue
            e = entry[at]
            live_weights[e] = max(live_weights[e], old_weights[j])
            if old_times[j] > live_times[e]:
                live_times[e] = old_times[j]
                in_order = False
        if in_order:
            for i in range(live):
                spare[i] = i
        else:
            _entries_newest_first(live_times, live, spare)
        i = j = 0
        for _ in range(min(keep, live + fresh)):
            if i < live and (j == fresh or live_times[spare[i]] >= old_times[only[j]]):
                e = spare[i]
                rows[to], weights[to], timestamps[to] = live_rows[e], live_weights[e], live_times[e]
                i += 1
            else:
                rows[to], weights[to], timestamps[to] = (
                    old_rows[only[j]],
                    old_weights[only[j]],
                    old_times[only[j]],
                )
                j += 1
            to += 1
        ends[u + 1] = to


@njit(nogil=True, cache=True, inline="always")
def _place(row, u, owner, entry, live_rows):  # type: ignore[no-untyped-def]
    """Return where user u's entry of a row stands in the table, or the place where it would."""
    mask = owner.size - 1
    at = (np.uint32(row) * np.uint32(0x9E3779B1) >> np.uint32(7)) & np.uint32(mask)
    while owner[at] == u + 1 and live_rows[entry[at]] != row:
        at = np.uint32(at + 1) & np.uint32(mask)
    return at


@njit(nogil=True, cache=True)
def _entries_newest_first(times, n, order):  # type: ignore[no-untyped-def]
    """Sort n entries by time, stable: only a history newer than the actions puts some out of their order."""
    for i in range(n):
        j = i
        while j > 0 and times[order[j - 1]] < times[i]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i


@njit(nogil=True, cache=True)
def _decode(  # type: ignore[no-untyped-def]
    offsets, n, items, authors, tags, places, kinds, values, times, current, most_dislikes, most_follows, most_cities,
    rows, scores, stamps, recalls, bounds,
):  # fmt: skip
    """Sort out leftovers, dislikes, follows and cities.

    Args:
        offsets: int64[5 n + 1]; the records of key k (of STATE_SUFFIXES) of user u begin at offsets[k n + u].
        items, authors, tags, places: int32, what the keys of the records stand for; they begin with the records of
            key 0, 2, 2 and 4.
        kinds, values, times: the records as uint32, float32 and int64.
        current: int32[n], the code of the city where the user is; -1 where not known.
        most_dislikes, most_follows, most_cities: records that count, the newest.
        rows: int32[...], out: leftovers, disliked items, authors and tags, follows, cities, one after another.
        scores, stamps, recalls: of the leftovers, out.
        bounds: int64[6, n + 1], out: offsets of the users in each of the six.
    """
    dislikes, cities = offsets[2 * n], offsets[4 * n]
    most = 1
    for u in range(2 * n, 5 * n):
        most = max(most, offsets[u + 1] - offsets[u])
    order, spare = np.empty(most, np.int64), np.empty(most, np.int64)
    to = start = 0
    bounds[0, 0] = 0
    for u in range(n):
        for record in range(offsets[n + u], offsets[n + u + 1]):
            kind = kinds[6 * record + 2]
            if kind != 0 and kind != GONE and items[record] >= 0:
                rows[to], scores[to], stamps[to] = (
                    items[record],
                    values[6 * record + 3],
                    times[3 * record + 2],
                )
                recalls[to] = np.int32(min(kind - 1, 0x7FFFFFFF))
                to += 1
        bounds[0, u + 1] = to - start
    for part in range(1, 4):
        bounds[part, 0], start = 0, to
        for u in range(n):
            first = offsets[2 * n + u]
            used = _used(kinds, first, offsets[2 * n + u + 1])
            newest_first(times, first, used, order, spare)
            for i in range(min(used, most_dislikes)):
                record = order[i]
                kind = kinds[6 * record + 2]
                if kind != part or values[6 * record + 3] <= 0:
                    continue
                if kind == ITEM:
                    row = items[record]
                elif kind == AUTHOR:
                    row = authors[record - dislikes]
                else:
                    row = tags[record - dislikes]
                if row >= 0:
                    rows[to] = row
                    to += 1
            bounds[part, u + 1] = to - start
    bounds[4, 0], start = 0, to
    for u in range(n):
        first = offsets[3 * n + u]
        used = _used(kinds, first, offsets[3 * n + u + 1])
        newest_first(times, first, used, order, spare)
        for i in range(min(used, most_follows)):
            row = authors[order[i] - dislikes]
            if values[6 * order[i] + 3] > 0 and row >= 0:
                rows[to] = row
                to += 1
        bounds[4, u + 1] = to - start
    bounds[5, 0], start = 0, to
    for u in range(n):
        if current[u] >= 0:
            rows[to] = current[u]
            to += 1
        first = offsets[4 * n + u]
        used = _used(kinds, first, offsets[4 * n + u + 1])
        newest_first(times, first, used, order, spare)
        for i in range(min(used, most_cities)):
            row = places[order[i] - cities]
            if row >= 0 and row != current[u]:
                rows[to] = row
                to += 1
        bounds[5, u + 1] = to - start
