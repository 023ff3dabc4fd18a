"""The catalogue while serving: a snapshot's, and what was published, changed or taken down since."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from engine.core.int_table import IntTable
from engine.core.items import ItemColumns
from engine.core.keys import keys_of, keys_of_cells
from engine.core.types import NO_ROW, AnyArray, Int32Array, Int64Array
from engine.data.catalogue import AUTHOR, Catalogue
from engine.data.columns import TextColumn
from engine.data.ids import IdIndex, IdKind


class LiveIds:
    """An `IdIndex` that takes new ids: theirs are the rows past its end, in the order in which they came."""

    def __init__(self, base: IdIndex) -> None:
        self._base = base
        self._first = len(base)
        self._new: list[int | str] = []
        self._rows_of_new = IntTable()
        # Strings are found by key in the state store's records; integers are their own keys.
        self._rows_of_keys = IntTable()
        if base.kind == "string" and self._first:
            rows = np.arange(self._first, dtype=np.int32)
            self._rows_of_keys.put(keys_of_cells(base.encoded(rows)), rows)

    @property
    def kind(self) -> IdKind:
        """Whether ids are integers or strings."""
        return self._base.kind

    def __len__(self) -> int:
        return self._first + len(self._new)

    def add(self, ids: list[int | str]) -> Int32Array:
        """Return int32[n]: the row of each id; one not known before gets the next row."""
        rows = self.rows(ids)
        keys = keys_of(ids)
        for at in np.flatnonzero(rows == NO_ROW).tolist():
            known = self._rows_of_new.get(keys[at : at + 1])
            if known[0] == NO_ROW:
                known = np.array([len(self)], np.int32)
                self._new.append(ids[at])
                self._rows_of_new.put(keys[at : at + 1], known)
            rows[at] = known[0]
        return rows

    def rows(self, ids: Any) -> Int32Array:
        """Return int32[n]: the row of each id; -1 for one that is not known. `ids` as `IdIndex.rows` takes them."""
        rows = self._base.rows(ids)
        if self._new and rows.size:
            unknown = np.flatnonzero(rows == NO_ROW)
            if unknown.size:
                wanted = ids if isinstance(ids, (np.ndarray, list)) else ids.to_pylist()
                keys = (
                    np.asarray(wanted, np.int64)[unknown]
                    if self.kind == "int64"
                    else keys_of(str(wanted[at]) for at in unknown.tolist())
                )
                rows[unknown] = self._rows_of_new.get(keys)
        return rows

    def rows_of_keys(self, keys: Int64Array) -> Int32Array:
        """Return int32[n]: the row of each key (`engine.core.keys`); -1 for one that is not known."""
        rows = self._base.rows(keys) if self.kind == "int64" else self._rows_of_keys.get(keys)
        if self._new and rows.size:
            unknown = np.flatnonzero(rows == NO_ROW)
            if unknown.size:
                rows[unknown] = self._rows_of_new.get(keys[unknown])
        return rows

    def keys(self, rows: Int32Array) -> Int64Array:
        """Return int64[n]: the keys of some rows."""
        encoded = self.encoded(rows)
        return encoded if encoded.ndim == 1 else keys_of_cells(encoded)

    def encoded(self, rows: Int32Array) -> AnyArray:
        """Return ids as they go on the wire, as `IdIndex.encoded` does."""
        if not self._new or not rows.size or int(rows.max()) < self._first:
            return self._base.encoded(rows)
        new = np.flatnonzero(rows >= self._first)
        ids = [self._new[row - self._first] for row in rows[new].tolist()]
        if self.kind == "int64":
            encoded = np.empty(rows.size, np.int64)
            old = np.flatnonzero(rows < self._first)
            encoded[old] = self._base.encoded(rows[old])
            encoded[new] = ids
            return encoded
        cells = np.array([str(id_).encode() for id_ in ids], np.bytes_)
        old = np.flatnonzero(rows < self._first)
        known = self._base.encoded(rows[old])
        wide = np.zeros((rows.size, max(known.shape[1], cells.dtype.itemsize)), np.uint8)
        wide[old, : known.shape[1]] = known
        wide[new, : cells.dtype.itemsize] = cells.view(np.uint8).reshape(new.size, cells.dtype.itemsize)
        return wide

    def ids(self, rows: Int32Array) -> AnyArray:
        """Return the external ids of some rows, each in [0, len): int64[n], or str_[n]."""
        encoded = self.encoded(np.asarray(rows, np.int32))
        if encoded.ndim == 1:
            return encoded
        if not encoded.shape[0]:
            return np.empty(0, np.str_)
        return np.char.decode(np.ascontiguousarray(encoded).view(f"S{encoded.shape[1]}")[:, 0], "utf-8")


class LiveCatalogue:
    """What the pipeline asks of the catalogue.

    Attributes:
        base: the snapshot's catalogue.
        items, authors: ids, of those that came since too.
        users: ids of the snapshot.
        columns: the live columns of the items.
    """

    def __init__(self, base: Catalogue) -> None:
        self.base = base
        self.items = LiveIds(base.items)
        self.authors = LiveIds(base.authors)
        self.users = base.users
        self.columns = columns_of(base)

    @classmethod
    def of(cls, base: Catalogue) -> Self:
        """Return the live form of a snapshot's catalogue."""
        return cls(base)

    @property
    def id_type(self) -> IdKind:
        """Whether ids are integers or strings."""
        return self.items.kind


def columns_of(catalogue: Catalogue) -> ItemColumns:
    """Return the live columns of a snapshot's catalogue, as copies that may be changed."""
    rows = len(catalogue.items)
    columns = ItemColumns(rows)
    encoded = catalogue.items.encoded(np.arange(rows, dtype=np.int32))
    columns.set("keys", encoded if encoded.ndim == 1 else keys_of_cells(encoded))
    numeric = {
        "authors": AUTHOR,
        "published_at": "published_at",
        "quality": "quality",
        "latitude": "latitude",
        "longitude": "longitude",
    }
    for column, name in numeric.items():
        if name in catalogue.numeric:
            columns.set(column, catalogue.numeric[name])
    if "city" in catalogue.coded:
        columns.set("cities", catalogue.coded["city"].codes)
        columns.city_codes = _codes(catalogue.coded["city"].vocabulary)
    if "tags" in catalogue.tags:
        columns.set_tags(catalogue.tags["tags"].offsets, catalogue.tags["tags"].codes)
        columns.tag_vocabulary = _codes(catalogue.tags["tags"].vocabulary)
    return columns


def _codes(vocabulary: TextColumn) -> dict[str, int]:
    return {text: code for code, text in enumerate(vocabulary.arrow().to_pylist())}
