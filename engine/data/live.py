"""The catalogue while serving: a snapshot's, and what was published, changed or taken down since."""

from __future__ import annotations

from typing import Any, Self, TypeAlias

import numpy as np
from numba import njit

from engine.core.growing_lists import GrowingLists
from engine.core.int_table import IntTable, slot_of
from engine.core.items import ItemColumns
from engine.core.keys import keys_of, keys_of_cells
from engine.core.types import NO_ROW, AnyArray, Int32Array, Int64Array, UInt8Array
from engine.data.catalogue import AUTHOR, Catalogue, ItemText
from engine.data.changes import ItemChanges, codes_of
from engine.data.columns import TextColumn
from engine.data.ids import IdIndex, IdKind, find_integers

KeyTables: TypeAlias = tuple[Int64Array, Int32Array, Int64Array, Int32Array, Int64Array, Int32Array]
"""What `find_keys` looks keys up in: values and table of integer ids, then keys and rows of string ids and of new ids."""


_NO_NUMBERS = np.empty(0, np.int64)


class LiveIds:
    """An `IdIndex` that takes new ids: theirs are the rows past its end, in the order in which they came.

    A new id takes 8 bytes (a string: the width of the longest that is new), and about 36 in the table.
    """

    def __init__(self, base: IdIndex) -> None:
        self._base = base
        self._first = len(base)
        self._count = 0
        # Integers, or the bytes of strings, of which the first `_count` are there.
        self._new: AnyArray = np.empty(0, np.int64 if base.kind == "int64" else "S1")
        self._rows_of_new = IntTable()
        # Strings are found by key in the state store's records; integers are their own keys.
        self._rows_of_keys = IntTable()
        self._integers = (base if base.kind == "int64" else IdIndex(np.empty(0, np.int64))).tables
        if base.kind == "string" and self._first:
            rows = np.arange(self._first, dtype=np.int32)
            self._rows_of_keys.put(keys_of_cells(base.encoded(rows)), rows)

    @property
    def kind(self) -> IdKind:
        """Whether ids are integers or strings."""
        return self._base.kind

    def __len__(self) -> int:
        return self._first + self._count

    def add(self, ids: AnyArray) -> Int32Array:
        """Return int32[n]: the row of each id; one not known before gets the next row.

        Args:
            ids: int64[n], or S[n]: strings as UTF-8.
        """
        rows = self.rows(ids)
        new = np.flatnonzero(rows == NO_ROW)
        if new.size:
            keys = self._keys_of(ids[new])
            # The first place of each, as the table keeps the last.
            first = IntTable()
            first.put(keys[::-1].copy(), np.arange(new.size - 1, -1, -1, dtype=np.int32))
            leads = first.get(keys) == np.arange(new.size)
            self._append(ids[new[leads]], keys[leads])
            rows[new] = self._rows_of_new.get(keys)
        return rows

    def _append(self, cells: AnyArray, keys: Int64Array) -> None:
        end = self._count + cells.size
        if end > self._new.size or cells.dtype.itemsize > self._new.dtype.itemsize:
            room = max(end, self._new.size * 5 // 4, 1024)
            wider: AnyArray = np.zeros(room, np.promote_types(cells.dtype, self._new.dtype))
            wider[: self._count] = self._new[: self._count]
            self._new = wider
        self._new[self._count : end] = cells
        first = self._first + self._count
        self._rows_of_new.put(keys, np.arange(first, first + cells.size, dtype=np.int32))
        self._count = end

    def _keys_of(self, ids: AnyArray) -> Int64Array:
        if ids.dtype.kind == "i":
            return ids.astype(np.int64, copy=False)
        return keys_of_cells(_bytes_of(ids)) if ids.dtype.kind == "S" else keys_of(ids.tolist())

    def rows(self, ids: Any) -> Int32Array:
        """Return int32[n]: the row of each id; -1 for one that is not known. `ids` as `IdIndex.rows` takes them."""
        rows = self._base.rows(ids)
        if self._count and rows.size:
            unknown = np.flatnonzero(rows == NO_ROW)
            if unknown.size:
                wanted = ids if isinstance(ids, (np.ndarray, list)) else ids.to_pylist()
                if not isinstance(wanted, np.ndarray):
                    wanted = np.array(wanted, np.int64 if self.kind == "int64" else np.str_)
                keys = self._keys_of(wanted[unknown])
                rows[unknown] = self._rows_of_new.get(keys)
        return rows

    @property
    def key_tables(self) -> KeyTables:
        """What `find_keys` takes; as it is until the next id is added."""
        return *self._integers, *self._rows_of_keys.arrays, *self._rows_of_new.arrays

    @property
    def numbers(self) -> tuple[Int64Array, Int64Array]:
        """int64[...] twice: ids of the rows of the index, and of those past its end; of strings none.

        As it is until the next id is added; behind the last id there is room, which means nothing.
        """
        return self._base.numbers, self._new if self.kind == "int64" else _NO_NUMBERS

    def keys(self, rows: Int32Array) -> Int64Array:
        """Return int64[n]: the keys of some rows."""
        encoded = self.encoded(rows)
        return encoded if encoded.ndim == 1 else keys_of_cells(encoded)

    def encoded(self, rows: Int32Array) -> AnyArray:
        """Return ids as they go on the wire, as `IdIndex.encoded` does."""
        if not self._count or not rows.size or int(rows.max()) < self._first:
            return self._base.encoded(rows)
        is_new = rows >= self._first
        old = np.flatnonzero(~is_new)
        new = np.flatnonzero(is_new)
        known = self._base.encoded(rows[old])
        fresh = self._new[rows[new] - self._first]
        if self.kind == "int64":
            encoded = np.empty(rows.size, np.int64)
            encoded[old], encoded[new] = known, fresh
            return encoded
        cells = _bytes_of(fresh)
        wide = np.zeros((rows.size, max(known.shape[1], cells.shape[1])), np.uint8)
        wide[old, : known.shape[1]] = known
        wide[new, : cells.shape[1]] = cells
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
        # UTF-8 and a zero byte, so that an empty title differs from one that is as the snapshot has it.
        self._titles = GrowingLists(len(base.items), np.uint8)

    @classmethod
    def of(cls, base: Catalogue) -> Self:
        """Return the live form of a snapshot's catalogue."""
        return cls(base)

    @property
    def id_type(self) -> IdKind:
        """Whether ids are integers or strings."""
        return self.items.kind

    def apply(self, changes: ItemChanges) -> Int32Array:
        """Take in what was published, changed or taken down: doing so twice changes nothing more.

        A published item that is new gets the next row, and so does its author. All that is known of an item is
        replaced. One that is taken down keeps its row and columns and is no longer available; taking down what is not
        known does nothing.

        Returns:
            int32[m], the rows of the items changed, each once.
        """
        gone = self.items.rows(changes.taken_down)
        gone = gone[np.flatnonzero(gone != NO_ROW)]
        if not changes.ids.size:
            self.columns.put("available", gone, np.zeros(gone.size, np.bool_))
            return gone
        rows = self.items.add(changes.ids)
        columns = self.columns
        columns.grow(len(self.items))
        self._titles.grow(len(self.items))
        columns.put("available", gone, np.zeros(gone.size, np.bool_))
        columns.put("available", rows, np.ones(rows.size, np.bool_))
        columns.put("keys", rows, self.items.keys(rows))
        authors = np.full(rows.size, NO_ROW, np.int32)
        authors[changes.has_author] = self.authors.add(changes.authors[changes.has_author])
        columns.put("authors", rows, authors)
        columns.put("cities", rows, codes_of(changes.cities, columns.city_codes))
        columns.put("published_at", rows, changes.published_at)
        columns.put("quality", rows, changes.quality)
        columns.put("latitude", rows, changes.latitude)
        columns.put("longitude", rows, changes.longitude)
        columns.put_tags(rows, changes.tag_counts, codes_of(changes.tags, columns.tag_vocabulary))
        titles = changes.titles
        counts = np.diff(titles.offsets).astype(np.int32) + 1
        ended = np.insert(titles.data, titles.offsets[1:], 0)
        self._titles.put(rows, counts, ended)
        changed: Int32Array = np.concatenate((gone, rows))
        return changed

    def describe_items(self, rows: Int32Array) -> list[ItemText]:
        """Return how people see some items, as `Catalogue.describe_items` does, as they are now."""
        described = []
        tags = {code: tag for tag, code in self.columns.tag_vocabulary.items()}
        for row in np.asarray(rows, np.int32).tolist():
            title = self._titles.take(row).tobytes()
            if not title:  # as the snapshot has it
                described += self.base.describe_items(np.array([row], np.int32))
                continue
            author = self.columns.authors[row : row + 1]
            start = int(self.columns.tag_starts[row])
            codes = self.columns.tag_codes[start : start + int(self.columns.tag_counts[row])]
            described.append(
                ItemText(
                    self.items.ids(np.array([row], np.int32)).tolist()[0],
                    title[:-1].decode(),
                    self._author_name(author) if author[0] != NO_ROW else "",
                    tuple(tags[code] for code in codes.tolist()),
                )
            )
        return described

    def _author_name(self, author: Int32Array) -> str:
        name = self.base.author_names.take(author)[0] if author[0] < len(self.base.authors) else ""
        return name or str(self.authors.ids(author).tolist()[0])


@njit(nogil=True, cache=True)
def find_keys(keys, values, table, key_keys, key_rows, new_keys, new_rows, rows):  # type: ignore[no-untyped-def]
    """Find the rows of keys in `KeyTables`.

    Args:
        keys: int64[n].
        values, table, key_keys, key_rows, new_keys, new_rows: of `LiveIds.key_tables`.
        rows: int32[n], out: -1 for a key that is not known.
    """
    find_integers(values, table, keys, rows)
    for k in range(keys.size):
        if rows[k] < 0:
            rows[k] = key_rows[slot_of(keys[k], key_keys, key_rows)]
        if rows[k] < 0:
            rows[k] = new_rows[slot_of(keys[k], new_keys, new_rows)]


def _bytes_of(cells: AnyArray) -> UInt8Array:
    """S{width}[n] as uint8[n, width]."""
    return np.ascontiguousarray(cells).view(np.uint8).reshape(cells.size, cells.dtype.itemsize)


def columns_of(catalogue: Catalogue) -> ItemColumns:
    """Return the live columns of a snapshot's catalogue, as copies that may be changed."""
    rows = len(catalogue.items)
    columns = ItemColumns(rows)
    encoded = catalogue.items.encoded(np.arange(rows, dtype=np.int32))
    columns.set("keys", encoded if encoded.ndim == 1 else keys_of_cells(encoded))
    if catalogue.available is not None:
        columns.set("available", catalogue.available)
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
