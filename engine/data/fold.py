"""Folding: what was published, changed or taken down since a data set was written becomes part of its catalogue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from engine.core.items import NO_TIME
from engine.core.types import NO_ROW, AnyArray, Int32Array, Int64Array
from engine.data.catalogue import AUTHOR, Catalogue
from engine.data.changes import ItemChanges, codes_of, in_order
from engine.data.columns import MISSING_INT, CodedColumn, TagColumn, TextColumn
from engine.data.ids import IdIndex


def fold(catalogue: Catalogue, table: Iterable[bytes]) -> tuple[Catalogue, str]:
    """Return a catalogue with the live items in it.

    An item that was published or changed live has what the table says, whatever the data set says; columns that the
    live protocol does not have keep the data set's value. One that was taken down stays, because events may name it,
    and is not available; where the data set does not know it there is nothing to keep.

    Args:
        catalogue: of the data set.
        table: the newest recall.v1.ItemChange of every live item, serialized, in any order; repeated ones must be
            oldest first.

    Returns:
        The catalogue, and a digest of the table: 16 hex digits, the same for the same changes; "" for none.
    """
    kind = catalogue.id_type
    # In order of id, so that the same table gives the same arrays whatever order it comes in.
    ordered = in_order(list(table), kind)
    if not ordered:
        return catalogue, ""
    digest = blake2b(digest_size=8)
    for message in ordered:
        digest.update(message)
    return _folded(catalogue, ItemChanges.parse(ordered, kind)), digest.hexdigest()


def _folded(catalogue: Catalogue, changes: ItemChanges) -> Catalogue:
    authors, author_rows, author_names = _with_authors(catalogue, changes)
    items = _union(catalogue.items, changes.ids)
    # Where each item's row was; -1 for one that is new.
    source = catalogue.items.rows(_ids_of(items))
    put = items.rows(changes.ids)
    gone = items.rows(changes.taken_down)
    available = np.ones(len(items), np.bool_)
    if catalogue.available is not None:
        available[source >= 0] = catalogue.available[source[source >= 0]]
    available[put] = True
    available[gone[gone != NO_ROW]] = False
    move = _Mover(source, put)
    numeric = {
        name: move.numbers(values, _missing(name, values)) for name, values in catalogue.numeric.items()
    }
    if AUTHOR in numeric:
        known = numeric[AUTHOR] >= 0
        numeric[AUTHOR][known] = author_rows[numeric[AUTHOR][known]]
    new_authors = np.full(put.size, NO_ROW, np.int32)
    new_authors[changes.has_author] = authors.rows(changes.authors[changes.has_author])
    for name, values in (
        (AUTHOR, new_authors),
        ("published_at", changes.published_at),
        ("latitude", changes.latitude),
        ("longitude", changes.longitude),
        ("quality", changes.quality),
        ("duration_seconds", changes.duration_seconds),
    ):
        missing = _missing(name, values)
        if name not in numeric and (values == values).any() and (values != missing).any():
            numeric[name] = np.full(len(items), missing, values.dtype)
        if name in numeric:
            numeric[name][put] = values
    coded = {name: move.coded(column) for name, column in catalogue.coded.items()}
    if "city" in coded or len(changes.cities.vocabulary):
        coded["city"] = _with_cities(coded.get("city"), len(items), put, changes.cities)
    texts = {name: move.texts(column) for name, column in catalogue.texts.items()}
    if "title" in texts or changes.titles.data.size:
        titles = texts["title"].arrow().to_pylist() if "title" in texts else [""] * len(items)
        for row, title in zip(put.tolist(), changes.titles.arrow().to_pylist(), strict=True):
            titles[row] = title
        texts["title"] = TextColumn.of(pa.array(titles, pa.large_string()))
    tags = {name: move.tags(column) for name, column in catalogue.tags.items()}
    if "tags" in tags or len(changes.tags):
        tags["tags"] = _with_tags(tags.get("tags"), len(items), put, changes)
    return replace(
        catalogue,
        items=items,
        authors=authors,
        author_names=author_names,
        numeric=numeric,
        coded=coded,
        texts=texts,
        tags=tags,
        available=available,
    )


class _Mover:
    """Moves columns to the rows of the new index."""

    def __init__(self, source: Int32Array, put: Int32Array) -> None:
        self._source = source
        self._old = source >= 0
        self._put = put
        self._taken = pa.array(source, mask=~self._old)

    def numbers(self, values: AnyArray, missing: Any) -> AnyArray:
        moved = np.full(self._source.size, missing, values.dtype)
        moved[self._old] = values[self._source[self._old]]
        return moved

    def coded(self, column: CodedColumn) -> CodedColumn:
        return CodedColumn(self.numbers(column.codes, NO_ROW).astype(np.int32, copy=False), column.vocabulary)

    def texts(self, column: TextColumn) -> TextColumn:
        return TextColumn.of(column.arrow().take(self._taken))

    def tags(self, column: TagColumn) -> TagColumn:
        counts = self.numbers(np.diff(column.offsets), 0)
        starts = self.numbers(column.offsets[:-1], 0)
        return TagColumn(_offsets(counts), _gather(column.codes, starts, counts), column.vocabulary)


def _with_authors(catalogue: Catalogue, changes: ItemChanges) -> tuple[IdIndex, Int32Array, TextColumn]:
    """Return the index with the new authors in it, the new row of each old one, and the names."""
    authors = _union(catalogue.authors, changes.authors[changes.has_author])
    moved = authors.rows(_ids_of(catalogue.authors))
    source = catalogue.authors.rows(_ids_of(authors))
    names = catalogue.author_names.arrow().take(pa.array(source, mask=source < 0))
    return authors, moved, TextColumn.of(names)


def _with_cities(column: CodedColumn | None, rows: int, put: Int32Array, cities: CodedColumn) -> CodedColumn:
    vocabulary = [] if column is None else column.vocabulary.arrow().to_pylist()
    known = {city: code for code, city in enumerate(vocabulary)}
    codes = np.full(rows, NO_ROW, np.int32) if column is None else column.codes
    codes[put] = codes_of(cities, known)
    return CodedColumn(codes, TextColumn.of(pa.array(list(known), pa.large_string())))


def _with_tags(column: TagColumn | None, rows: int, put: Int32Array, changes: ItemChanges) -> TagColumn:
    vocabulary = [] if column is None else column.vocabulary.arrow().to_pylist()
    known = {tag: code for code, tag in enumerate(vocabulary)}
    new = codes_of(changes.tags, known)
    old = np.empty(0, np.int32) if column is None else column.codes
    offsets = np.zeros(rows + 1, np.int64) if column is None else column.offsets
    counts, starts = np.diff(offsets), offsets[:-1].copy()
    # The new tags stand behind the old ones; gathering then puts each where its row is.
    counts[put] = changes.tag_counts
    starts[put] = old.size + _offsets(changes.tag_counts)[:-1]
    codes = _gather(np.concatenate((old, new)), starts, counts)
    return TagColumn(_offsets(counts), codes, TextColumn.of(pa.array(list(known), pa.large_string())))


def _union(index: IdIndex, ids: AnyArray) -> IdIndex:
    if not ids.size:
        return index
    if index.kind == "int64":
        return IdIndex.of(np.concatenate((_ids_of(index), ids)))
    return IdIndex.of(
        pa.array([*_ids_of(index).tolist(), *(id_.decode() for id_ in ids.tolist())], pa.large_string())
    )


def _ids_of(index: IdIndex) -> AnyArray:
    return index.ids(np.arange(len(index), dtype=np.int32))


def _missing(name: str, values: AnyArray) -> Any:
    if values.dtype.kind == "f":
        return np.nan
    return {AUTHOR: NO_ROW, "published_at": NO_TIME}.get(name, MISSING_INT)


def _offsets(counts: AnyArray) -> Int64Array:
    offsets = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _gather(values: Int32Array, starts: AnyArray, counts: AnyArray) -> Int32Array:
    """Return the pieces [starts[i], starts[i] + counts[i]) end to end."""
    ends = np.cumsum(counts, dtype=np.int64)
    at = np.arange(int(ends[-1]) if ends.size else 0) + np.repeat(starts - (ends - counts), counts)
    gathered: Int32Array = values[at]
    return gathered
