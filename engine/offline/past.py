"""The users as they were at an earlier moment: the user state that an evaluation asks the pipeline with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.live import Leftovers
from engine.core.ragged import take_lists
from engine.core.types import AnyArray, Float64Array, Int32Array, Int64Array, RaggedRows
from engine.state.history import SnapshotHistory, UserRead


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

    def read(self, user_ids: AnyArray, users: Int32Array, now: Int64Array, cities: Sequence[str]) -> UserRead:
        """Return what was known of each user."""
        known = self.histories.read(user_ids, users, now, cities)
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


def before(matrix: Interactions, moment: int) -> Interactions:
    """Return the entries of a matrix that are older than a moment, in seconds since the epoch."""
    keep = matrix.timestamps < moment
    running = np.concatenate((np.zeros(1, np.int64), np.cumsum(keep, dtype=np.int64)))
    return Interactions(
        matrix.users,
        matrix.items,
        running[matrix.indptr],
        matrix.rows[keep],
        matrix.weights[keep],
        matrix.timestamps[keep],
    )


def last_places(known: Interactions, columns: ItemColumns) -> tuple[Float64Array, Float64Array]:
    """Return where each user was last: the coordinates of the newest known item that has any.

    Returns:
        latitude, longitude: float64[users] degrees; NaN where no known item has coordinates.
    """
    latitude, longitude = np.full(known.users, np.nan), np.full(known.users, np.nan)
    owner = np.repeat(np.arange(known.users), known.user_counts())
    placed = np.flatnonzero(~np.isnan(columns.latitude[known.rows]))
    # Entries stand newest first: written from the oldest on, the newest stays.
    oldest_first = placed[::-1]
    latitude[owner[oldest_first]] = columns.latitude[known.rows[oldest_first]]
    longitude[owner[oldest_first]] = columns.longitude[known.rows[oldest_first]]
    return latitude, longitude
