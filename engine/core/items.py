"""What channels and filters see of the items while serving: a column each, rows published since the snapshot included."""

from __future__ import annotations

import numpy as np

from engine.core.growing_lists import GrowingLists
from engine.core.types import (
    NO_ROW,
    AnyArray,
    BoolArray,
    Float32Array,
    Int32Array,
    Int64Array,
)

NO_TIME = -1
"""What `published_at` holds where it is not known: before every real time, so the item counts as old."""

NEVER = np.iinfo(np.int64).max
"""What `visible_from` holds of an item that was taken down."""

_TOGETHER = {
    "keys": (np.int64, 0),
    "visible_from": (np.int64, NO_TIME),
    "published_at": (np.int64, NO_TIME),
    "authors": (np.int32, NO_ROW),
    "cities": (np.int32, NO_ROW),
}
"""What is asked of every candidate lies side by side, half a cache line an item: a candidate may be any item of millions,
so what costs is the first look at it."""

_APART = {
    "available": (np.bool_, True),
    "quality": (np.float32, np.nan),
    "latitude": (np.float32, np.nan),
    "longitude": (np.float32, np.nan),
}


_SEEN_BY = ("available", "published_at")
"""What `visible_from` is made of."""


class ItemColumns:
    """The live columns: rows [0, len) of each are items, those of the snapshot first.

    They change between two batches only, on the thread that computes them. Arrays are replaced when they grow, so read
    them from here each time and keep none.

    Attributes (properties; n rows):
        keys: int64[n], the key of each item's external id (`engine.core.keys`).
        available: bool[n], False where taken down.
        authors: int32[n], author rows; -1 where not known.
        cities: int32[n], codes of `city_codes`; -1 where not known.
        published_at: int64[n], seconds since the epoch; -1 where not known.
        visible_from: int64[n], `published_at` of what is available, `NEVER` of what was taken down.
        quality: float32[n]; NaN where not known.
        latitude, longitude: float32[n] degrees; NaN where not known.
        tag_starts, tag_counts: int64[n], int32[n]; item r has tag_codes[tag_starts[r] : tag_starts[r] + tag_counts[r]].
        tag_codes: int32[...], codes of `tag_vocabulary`.
        city_codes, tag_vocabulary: code of each string.
    """

    def __init__(self, rows: int) -> None:
        """Make the columns of `rows` items of whom nothing is known."""
        self._rows = rows
        self._columns = _blank(rows)
        self._columns["keys"][:] = np.arange(rows, dtype=np.int64)
        self._tags = GrowingLists(rows, np.int32)
        self.city_codes: dict[str, int] = {}
        self.tag_vocabulary: dict[str, int] = {}

    def __len__(self) -> int:
        return self._rows

    def _view(self, name: str) -> AnyArray:
        return self._columns[name][: self._rows]

    @property
    def keys(self) -> Int64Array:
        """int64[n]."""
        return self._view("keys")

    @property
    def available(self) -> BoolArray:
        """bool[n]."""
        return self._view("available")

    @property
    def authors(self) -> Int32Array:
        """int32[n]."""
        return self._view("authors")

    @property
    def cities(self) -> Int32Array:
        """int32[n]."""
        return self._view("cities")

    @property
    def published_at(self) -> Int64Array:
        """int64[n]."""
        return self._view("published_at")

    @property
    def visible_from(self) -> Int64Array:
        """int64[n]."""
        return self._view("visible_from")

    @property
    def quality(self) -> Float32Array:
        """float32[n]."""
        return self._view("quality")

    @property
    def latitude(self) -> Float32Array:
        """float32[n]."""
        return self._view("latitude")

    @property
    def longitude(self) -> Float32Array:
        """float32[n]."""
        return self._view("longitude")

    @property
    def tag_starts(self) -> Int64Array:
        """int64[n]."""
        return self._tags.starts

    @property
    def tag_counts(self) -> Int32Array:
        """int32[n]."""
        return self._tags.counts

    @property
    def tag_codes(self) -> Int32Array:
        """int32[...]."""
        return self._tags.data

    def set(self, name: str, values: AnyArray) -> None:
        """Fill a column of all rows: [n], of any dtype that casts to the column's."""
        self._view(name)[:] = values
        if name in _SEEN_BY:
            self._view("visible_from")[:] = np.where(self.available, self.published_at, NEVER)

    def set_tags(self, offsets: Int64Array, codes: Int32Array) -> None:
        """Fill the tags of all rows: row r has codes[offsets[r]:offsets[r + 1]]."""
        self._tags.fill(offsets, codes)

    def grow(self, rows: int) -> None:
        """Make room for `rows` items in all; new ones begin with nothing known."""
        if rows > self._columns["keys"].size:
            room = max(rows, self._columns["keys"].size * 5 // 4, 1024)
            wider = _blank(room)
            for name, column in wider.items():
                column[: self._rows] = self._view(name)
            self._columns = wider
        self._rows = max(rows, self._rows)
        self._tags.grow(self._rows)

    def put(self, name: str, rows: Int32Array, values: AnyArray) -> None:
        """Give some items (int32[m], each once) their values ([m], of any dtype that casts) in a column."""
        self._view(name)[rows] = values
        if name in _SEEN_BY:
            seen = np.where(self.available[rows], self.published_at[rows], NEVER)
            self._view("visible_from")[rows] = seen

    def put_tags(self, rows: Int32Array, counts: Int32Array, codes: Int32Array) -> None:
        """Give some items their tags; what they had is forgotten.

        Args:
            rows: int32[m], each once.
            counts: int32[m], how many tags each has.
            codes: int32[sum of counts], codes of `tag_vocabulary`, item after item.
        """
        self._tags.put(rows, counts, codes)


def _blank(rows: int) -> dict[str, AnyArray]:
    """Return the columns of items of whom nothing is known."""
    together = np.empty(rows, [(name, dtype) for name, (dtype, _) in _TOGETHER.items()])
    columns: dict[str, AnyArray] = {name: together[name] for name in _TOGETHER}
    columns |= {name: np.empty(rows, dtype) for name, (dtype, _) in _APART.items()}
    for name, (_, missing) in (_TOGETHER | _APART).items():
        columns[name][:] = missing
    return columns
