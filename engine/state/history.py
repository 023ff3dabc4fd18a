"""User history: what each user did most recently. One interface; the snapshot answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from engine.core.channel import SnapshotSink
from engine.core.interactions import Interactions
from engine.core.live import LiveState
from engine.core.query import History
from engine.core.ragged import alone_first, take_lists
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.core.writable import writable

HISTORY = "history"
"""The snapshot component that holds the histories."""


def no_leftovers(q: int) -> bytes:
    """Return what `UserRead.leftovers` returns where nothing is stored."""
    del q
    return b""


class UserRead(NamedTuple):
    """What is known of the users of a batch.

    Attributes:
        history: their histories.
        live: the rest.
        leftovers: returns the leftovers of the user at a place in the batch as they lie in the store, for `Recalled`.
    """

    history: History
    live: LiveState
    leftovers: Callable[[int], bytes] = no_leftovers


ReadUsers: TypeAlias = Callable[[Int32Array, Int64Array, Int32Array], UserRead]
"""Returns what is known of users that were asked for. Never raises because a store does not answer: `live.available`
says so. Its arguments, of each user:

- int32[n], the row of the user index, -1 where it does not know the user;
- int64[n], seconds since the epoch, the moment that the query speaks of;
- int32[n], the code of the city where the request says that the user is, which stands first in `live.cities`; -1 where it
  does not, or the catalogue does not know the city.
"""


class UserState(Protocol):
    """Where the pipeline reads users from, once per batch."""

    def ask(self, user_ids: AnyArray) -> ReadUsers:
        """Ask for users, and return what reads them, to be called once: what is done in between, a store works beside.

        Args:
            user_ids: [n] external ids (int64, or str_); -1 or "" for a guest.
        """


class SnapshotHistory:
    """The history as it was when the release was built."""

    def __init__(self, arrays: Mapping[str, AnyArray]) -> None:
        self._indptr = writable(arrays["indptr"])
        self._rows = writable(arrays["rows"])
        self._weights = writable(arrays["weights"])
        self._timestamps = writable(arrays["timestamps"])

    def ask(self, user_ids: AnyArray) -> ReadUsers:
        """Return `read`: nobody need be asked."""
        del user_ids
        return self.read

    def read(self, users: Int32Array, now: Int64Array, cities: Int32Array) -> UserRead:
        """Return the stored history of each user, empty where the user is unknown; nothing else is kept here."""
        del now
        return UserRead(self.histories(users), LiveState.empty(users.size, cities=alone_first(cities)))

    @property
    def arrays(self) -> tuple[Int64Array, Int32Array, Float32Array, Int64Array]:
        """The arrays of all users, for kernels: indptr, and rows, weights and timestamps end to end."""
        return self._indptr, self._rows, self._weights, self._timestamps

    def histories(self, users: Int32Array) -> History:
        """Return the stored history of each user row; empty where it is -1."""
        # Copies: what a plugin did by mistake to the history of a query must not stay in the index.
        if users.size == 1:  # the common case under light load
            u = int(users[0])
            part = slice(int(self._indptr[u]), int(self._indptr[u + 1])) if u >= 0 else slice(0, 0)
            offsets = np.array([0, part.stop - part.start], np.int64)
            return History(
                self._rows[part].copy(), self._weights[part].copy(), self._timestamps[part].copy(), offsets
            )
        offsets, positions = take_lists(self._indptr, users)
        return History(self._rows[positions], self._weights[positions], self._timestamps[positions], offsets)


def write_history(sink: SnapshotSink, liked: Interactions, keep: int) -> None:
    """Write each user's newest `keep` items."""
    kept = liked.newest(keep)
    sink.write("indptr", kept.indptr)
    sink.write("rows", kept.rows)
    sink.write("weights", kept.weights)
    sink.write("timestamps", kept.timestamps)
