"""The interest matrix: who liked what, how much and when, as CSR."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from engine.core.types import Float32Array, Int32Array, Int64Array


@dataclass(frozen=True, slots=True)
class Interactions:
    """Users x items, one entry per pair; user u owns [indptr[u], indptr[u + 1]), newest first.

    Attributes:
        users, items: the matrix's shape.
        indptr: int64[users + 1].
        rows: int32[entries], item rows.
        weights: float32[entries], interest scores: the points of the distinct events the user gave the item.
        timestamps: int64[entries], the last such event, seconds since the epoch; 0 where unknown.
    """

    users: int
    items: int
    indptr: Int64Array
    rows: Int32Array
    weights: Float32Array
    timestamps: Int64Array

    @property
    def entries(self) -> int:
        """How many (user, item) pairs there are."""
        return int(self.rows.size)

    def by_item(self) -> ItemMajor:
        """Return the transpose: users of each item, in rising order of user row."""
        indptr, users, positions = _transpose(self.indptr, self.rows, self.items)
        return ItemMajor(indptr, users, positions)

    def newest(self, keep: int) -> Interactions:
        """Return the matrix with each user's newest `keep` entries only."""
        lengths = np.minimum(self.user_counts(), keep)
        indptr = np.zeros(self.users + 1, np.int64)
        np.cumsum(lengths, out=indptr[1:])
        at = np.arange(indptr[-1]) + np.repeat(self.indptr[:-1] - indptr[:-1], lengths)
        return Interactions(
            self.users, self.items, indptr, self.rows[at], self.weights[at], self.timestamps[at]
        )

    def user_counts(self) -> Int64Array:
        """int64[users]: how many items each user has."""
        return np.diff(self.indptr)

    def item_counts(self) -> Int64Array:
        """int64[items]: how many users each item has."""
        return np.bincount(self.rows, minlength=self.items).astype(np.int64, copy=False)


@dataclass(frozen=True, slots=True)
class ItemMajor:
    """The transposed matrix; item i owns [indptr[i], indptr[i + 1]).

    Attributes:
        indptr: int64[items + 1].
        users: int32[entries], user rows, rising within an item.
        positions: int64[entries] (or int32 where they fit), where the entry stands in the user-major arrays.
    """

    indptr: Int64Array
    users: Int32Array
    positions: Int32Array | Int64Array


def _transpose(
    indptr: Int64Array, rows: Int32Array, items: int
) -> tuple[Int64Array, Int32Array, Int32Array | Int64Array]:
    positions: Int32Array | Int64Array = (
        np.empty(rows.size, np.int32) if rows.size < 2**31 else np.empty(rows.size, np.int64)
    )
    users = np.empty(rows.size, np.int32)
    starts = np.zeros(items + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=items), out=starts[1:])
    _scatter(indptr, rows, starts[:-1].copy(), users, positions)
    return starts, users, positions


@njit(nogil=True, cache=True)
def _scatter(indptr, rows, cursor, users, positions):  # type: ignore[no-untyped-def]
    """Counting sort of the entries by item; user order is kept."""
    for u in range(indptr.size - 1):
        for p in range(indptr[u], indptr[u + 1]):
            at = cursor[rows[p]]
            cursor[rows[p]] = at + 1
            users[at] = u
            positions[at] = p
