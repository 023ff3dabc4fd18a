"""The catalogue: external ids <-> rows of items, users and authors, and what is known about each item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa

from engine.core.channel import SnapshotSink
from engine.core.items import NO_TIME
from engine.core.types import NO_ROW, AnyArray, BoolArray, Int32Array
from engine.data.columns import CodedColumn, TagColumn, TextColumn, numbers
from engine.data.dataset import Dataset
from engine.data.form import File, is_number, is_tags, is_text
from engine.data.ids import IdIndex, IdKind

AUTHOR = "author"
"""The numeric column that holds each item's author row; made from `author_id`."""


@dataclass(frozen=True, slots=True)
class ItemText:
    """An item as people see it. `author` is the author's name, else the id, else ""."""

    id: int | str
    title: str
    author: str
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Who and what there is. A column has a value per row of `items`; one that the data lacks is not there.

    Attributes:
        items, users, authors: the ids.
        author_names: one per author row; "" where not known.
        numeric: `published_at` int64 (-1 missing), `latitude`, `longitude` float64 degrees, `quality`,
            `duration_seconds` float32 (NaN missing), `author` int32 author rows (-1 missing), and the feature
            columns: int64 (`MISSING_INT` missing), float32 or float64 (NaN missing).
        coded: `city` and other columns of strings.
        texts: `title`.
        tags: `tags` and other columns of lists of strings.
        skipped: columns of items.parquet whose type has no place here.
        available: bool[items], False where the item was taken down; None where none was.
    """

    items: IdIndex
    users: IdIndex
    authors: IdIndex
    author_names: TextColumn
    numeric: Mapping[str, AnyArray]
    coded: Mapping[str, CodedColumn]
    texts: Mapping[str, TextColumn]
    tags: Mapping[str, TagColumn]
    skipped: tuple[str, ...]
    available: BoolArray | None = None

    @classmethod
    def of_nothing(cls, kind: IdKind) -> Self:
        """Return the catalogue of no items, users and authors."""
        index = IdIndex(np.empty(0, np.int64 if kind == "int64" else "S1"))
        no_names = TextColumn.of(pa.array([], pa.large_string()))
        return cls(index, index, index, no_names, {}, {}, {}, {}, ())

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> Self:
        """Make the catalogue of a data set: every item, user and author that any of its files names.

        Raises:
            DatasetError: if a file cannot be read.
        """
        items = dataset.index(("items", "item_id"), ("interactions", "item_id"))
        authors = dataset.index(("authors", "author_id"), ("items", "author_id"), ("follows", "author_id"))
        numeric: dict[str, AnyArray] = {}
        coded: dict[str, CodedColumn] = {}
        texts: dict[str, TextColumn] = {}
        tags: dict[str, TagColumn] = {}
        skipped: list[str] = []
        align = _Aligner(dataset, "items", "item_id", items)
        for name, type_ in align.columns():
            if name == "author_id":
                numeric[AUTHOR] = authors.rows(align.read(name))
            elif name == AUTHOR:
                skipped.append(name)
            elif name in _REALS:
                numeric[name] = _real(align.read(name), _REALS[name])
            elif name == "published_at":
                numeric[name] = numbers(align.read(name).cast(pa.int64()), NO_TIME)
            elif is_number(type_) or pa.types.is_boolean(type_):
                numeric[name] = numbers(align.read(name))
            elif name == "title":
                texts[name] = TextColumn.of(align.read(name))
            elif is_text(type_):
                coded[name] = CodedColumn.of(align.read(name))
            elif is_tags(type_):
                tags[name] = TagColumn.of(align.read(name))
            else:
                skipped.append(name)
        return cls(
            items=items,
            users=dataset.index(("users", "user_id"), ("interactions", "user_id"), ("follows", "user_id")),
            authors=authors,
            author_names=_author_names(dataset, authors),
            numeric=numeric,
            coded=coded,
            texts=texts,
            tags=tags,
            skipped=tuple(skipped),
        )

    @property
    def id_type(self) -> IdKind:
        """Whether ids are integers or strings."""
        return self.items.kind

    def item_columns(self) -> dict[str, AnyArray]:
        """Return the columns as plain arrays, for `BuildContext.item_columns`.

        Returns:
            Under its name each numeric column and the codes (int32, -1 missing) of each coded one, [items];
            a tag column as `<name>.offsets` (int64[items + 1]) and `<name>.codes` (int32).
        """
        columns: dict[str, AnyArray] = {name: column.codes for name, column in self.coded.items()}
        columns |= self.numeric
        for name, tags in self.tags.items():
            columns |= {f"{name}.offsets": tags.offsets, f"{name}.codes": tags.codes}
        return columns

    def describe_items(self, rows: Int32Array) -> list[ItemText]:
        """Return how people see some items: for explanations, not for requests.

        Raises:
            IndexError: if a row lies outside the catalogue.
        """
        rows = np.asarray(rows, np.int32)
        blank = [""] * rows.size
        titles = self.texts["title"].take(rows) if "title" in self.texts else blank
        tags = self.tags["tags"].take(rows) if "tags" in self.tags else [[] for _ in blank]
        authors = blank
        if AUTHOR in self.numeric:
            author_rows = self.numeric[AUTHOR][rows]
            known = np.maximum(author_rows, 0)
            names = self.author_names.take(known) if len(self.authors) else blank
            ids = self.authors.ids(known).tolist() if len(self.authors) else blank
            authors = [
                "" if row == NO_ROW else name or str(id_)
                for row, name, id_ in zip(author_rows.tolist(), names, ids, strict=True)
            ]
        return [
            ItemText(id_, title, author, tuple(item_tags))
            for id_, title, author, item_tags in zip(
                self.items.ids(rows).tolist(), titles, authors, tags, strict=True
            )
        ]

    def save(self, sink: SnapshotSink) -> None:
        """Write the catalogue's arrays."""
        self.items.save(sink, "items")
        self.users.save(sink, "users")
        self.authors.save(sink, "authors")
        self.author_names.save(sink, "author_names")
        if self.available is not None:
            sink.write("available", self.available)
        # Columns are numbered: their names come from people and need not be names of files.
        directory: list[str] = []
        for name, array in self.numeric.items():
            sink.write(f"column.{len(directory)}.numbers", array)
            directory.append(f"numeric:{name}")
        for family in ("coded", "texts", "tags"):
            for name, column in getattr(self, family).items():
                column.save(sink, f"column.{len(directory)}")
                directory.append(f"{family}:{name}")
        directory.extend(f"skipped:{name}" for name in self.skipped)
        TextColumn.of(pa.array(directory, pa.large_string())).save(sink, "columns")

    @classmethod
    def load(cls, arrays: Mapping[str, AnyArray]) -> Self:
        """Return what `save` wrote; the arrays are used as they are, mapped and read-only."""
        families: dict[str, dict[str, Any]] = {
            "numeric": {},
            "coded": {},
            "texts": {},
            "tags": {},
            "skipped": {},
        }
        loaders = {"coded": CodedColumn.load, "texts": TextColumn.load, "tags": TagColumn.load}
        for number, entry in enumerate(TextColumn.load(arrays, "columns").arrow().to_pylist()):
            family, _, name = entry.partition(":")
            if family == "numeric":
                families[family][name] = np.asarray(arrays[f"column.{number}.numbers"])
            else:
                loader = loaders.get(family)
                families[family][name] = loader(arrays, f"column.{number}") if loader else None
        return cls(
            items=IdIndex.load(arrays, "items"),
            users=IdIndex.load(arrays, "users"),
            authors=IdIndex.load(arrays, "authors"),
            author_names=TextColumn.load(arrays, "author_names"),
            numeric=families["numeric"],
            coded=families["coded"],
            texts=families["texts"],
            tags=families["tags"],
            skipped=tuple(families["skipped"]),
            available=arrays.get("available"),
        )


_REALS = {
    "latitude": np.float64,
    "longitude": np.float64,
    "quality": np.float32,
    "duration_seconds": np.float32,
}


class _Aligner:
    """Reads columns of a file in the order of an index; rows that the file lacks are null."""

    def __init__(self, dataset: Dataset, file: File, key: str, index: IdIndex) -> None:
        self._dataset, self._file, self._key = dataset, file, key
        self._source: Any = pa.nulls(len(index), pa.int64())
        if dataset.has(file):
            rows = index.rows(dataset.column(file, key))
            source = np.full(len(index), NO_ROW, np.int64)
            source[rows] = np.arange(rows.size)
            self._source = pa.array(source, mask=source == NO_ROW)

    def columns(self) -> list[tuple[str, Any]]:
        """Return (name, pyarrow type) of the file's columns but the key."""
        schema = self._dataset.schemas.get(self._file, ())
        return [(field.name, field.type) for field in schema if field.name != self._key]

    def read(self, column: str) -> Any:
        values = self._dataset.column(self._file, column)
        if is_text(values.type):
            # Large strings: taking from plain ones fails at 2 GiB.
            values = values.cast(pa.large_string())
        return values.combine_chunks().take(self._source)


def _real(values: Any, dtype: Any) -> AnyArray:
    """A column of integers or floats as floats; NaN where missing."""
    return numbers(values.cast(pa.float64(), safe=False)).astype(dtype, copy=False)


def _author_names(dataset: Dataset, authors: IdIndex) -> TextColumn:
    align = _Aligner(dataset, "authors", "author_id", authors)
    if dataset.has("authors", "name"):
        return TextColumn.of(align.read("name"))
    return TextColumn.of(pa.nulls(len(authors), pa.large_string()))
