"""The users as they were at an earlier moment: the user state that an evaluation asks the pipeline with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.live import Leftovers
from engine.core.ragged import take_lists
from engine.core.types import NO_ROW, AnyArray, BoolArray, Float64Array, Int32Array, Int64Array, RaggedRows
from engine.state.history import ReadUsers, SnapshotHistory, UserRead


@dataclass(frozen=True)
class PastLeftovers:
    """What a ranking of an earlier moment left over; user u owns [indptr[u], indptr[u + 1]).

    Attributes:
        indptr: int64[users + 1].
        rows: int32[m], catalogue rows, best first.
        moment: when that was, seconds since the epoch.
    """

    indptr: Int64Array
    rows: Int32Array
    moment: int


@dataclass(frozen=True)
class PastState:
    """A `UserState` of an earlier moment.

    Attributes:
        histories: what each user had done.
        follows: users x authors as they were then; None where the data set has no follows.
        leftovers: of an earlier ranking; None for none.
    """

    histories: SnapshotHistory
    follows: Interactions | None = None
    leftovers: PastLeftovers | None = None

    def ask(self, user_ids: AnyArray) -> ReadUsers:
        """Return `read`: nobody need be asked."""
        del user_ids
        return self.read

    def read(self, users: Int32Array, now: Int64Array, cities: Int32Array) -> UserRead:
        """Return what was known of each user."""
        known = self.histories.read(users, now, cities)
        live = known.live
        if self.follows is not None:
            offsets, positions = take_lists(self.follows.indptr, users)
            live = replace(live, follows=RaggedRows(self.follows.rows[positions], offsets))
        if self.leftovers is not None:
            live = replace(live, leftovers=self._leftovers(self.leftovers, users))
        return UserRead(known.history, live)

    def _leftovers(self, past: PastLeftovers, users: Int32Array) -> Leftovers:
        offsets, positions = take_lists(past.indptr, users)
        place = np.arange(positions.size) - np.repeat(offsets[:-1], np.diff(offsets))
        return Leftovers(
            rows=past.rows[positions],
            scores=(1 / (1 + place)).astype(np.float32),
            timestamps=np.full(positions.size, past.moment, np.int64),
            recalls=np.zeros(positions.size, np.int32),
            offsets=offsets,
        )


@dataclass(frozen=True)
class Places:
    """Where users were last: what the newest known item that says so says.

    Attributes:
        latitude, longitude: float64[users] degrees; NaN where no known item has coordinates.
        cities: int32[users], codes of `ItemColumns.city_codes`; -1 where no known item has a city.
    """

    latitude: Float64Array
    longitude: Float64Array
    cities: Int32Array

    @classmethod
    def of(cls, known: Interactions, columns: ItemColumns) -> Places:
        """Return where the users of an interest matrix were last."""
        owner = np.repeat(np.arange(known.users), known.user_counts())

        def newest(values: AnyArray, there: BoolArray, missing: float) -> AnyArray:
            # Entries stand newest first: written from the oldest on, the newest stays.
            oldest_first = np.flatnonzero(there[known.rows])[::-1]
            found = np.full(known.users, missing, values.dtype)
            found[owner[oldest_first]] = values[known.rows[oldest_first]]
            return found

        placed = ~np.isnan(columns.latitude)
        return cls(
            newest(columns.latitude.astype(np.float64), placed, np.nan),
            newest(columns.longitude.astype(np.float64), placed, np.nan),
            newest(columns.cities, columns.cities >= 0, NO_ROW),
        )
