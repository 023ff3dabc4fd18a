"""The catalogue: external ids <-> rows of items, users and authors, and what is known about each item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa

from engine.core.channel import SnapshotSink
from engine.core.items import NO_TIME
from engine.core.keys import keys_of_cells
from engine.core.types import NO_ROW, AnyArray, BoolArray, Int32Array, Int64Array
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
class UserColumns:
    """What is known about each user: the feature columns of users.parquet, a value per row of the index of users.

    Attributes:
        numeric: int64 (`MISSING_INT` missing), float32 or float64 (NaN missing).
        coded: `city` and other columns of strings.
        tags: columns of lists of strings.
    """

    numeric: Mapping[str, AnyArray]
    coded: Mapping[str, CodedColumn]
    tags: Mapping[str, TagColumn]


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
        skipped: columns of items.parquet and users.parquet whose type has no place here; those of users as `users.NAME`.
        available: bool[items], False where the item was taken down; None where none was.
        of_users: what is known about each user.
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
    of_users: UserColumns = field(default_factory=lambda: UserColumns({}, {}, {}))

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
        users = dataset.index(("users", "user_id"), ("interactions", "user_id"), ("follows", "user_id"))
        of_users, skipped_of_users = _user_columns(dataset, users)
        return cls(
            items=items,
            users=users,
            authors=authors,
            author_names=_author_names(dataset, authors),
            numeric=numeric,
            coded=coded,
            texts=texts,
            tags=tags,
            skipped=(*skipped, *(f"users.{name}" for name in skipped_of_users)),
            of_users=of_users,
        )

    @property
    def id_type(self) -> IdKind:
        """Whether ids are integers or strings."""
        return self.items.kind

    def item_columns(self) -> dict[str, AnyArray]:
        """Return the columns as plain arrays, for `BuildContext.item_columns`.

        Returns:
            Under its name each numeric column and the codes (int32, -1 missing) of each coded one, [items];
            a tag column as `<name>.offsets` (int64[items + 1]) and `<name>.codes` (int32). What the codes of both stand
            for: `<name>.vocabulary.offsets` and `.data`, a `TextColumn`. `item_id.keys` and `author.keys`: int64, the
            key (`engine.core.keys`) of each item's and each author row's id.
        """
        columns = _plain_columns(self.numeric, self.coded, self.tags)
        return columns | {"item_id.keys": _keys(self.items), "author.keys": _keys(self.authors)}

    def user_columns(self) -> dict[str, AnyArray]:
        """Return what is known about users, for `BuildContext.user_columns`: as `item_columns`, with `user_id.keys`."""
        of_users = self.of_users
        columns = _plain_columns(of_users.numeric, of_users.coded, of_users.tags)
        return columns | {"user_id.keys": _keys(self.users)}

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
        for name, array in self.of_users.numeric.items():
            sink.write(f"column.{len(directory)}.numbers", array)
            directory.append(f"users.numeric:{name}")
        for family in ("coded", "tags"):
            for name, column in getattr(self.of_users, family).items():
                column.save(sink, f"column.{len(directory)}")
                directory.append(f"users.{family}:{name}")
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
            "users.numeric": {},
            "users.coded": {},
            "users.tags": {},
        }
        loaders = {"coded": CodedColumn.load, "texts": TextColumn.load, "tags": TagColumn.load}
        for number, entry in enumerate(TextColumn.load(arrays, "columns").arrow().to_pylist()):
            family, _, name = entry.partition(":")
            if family.endswith("numeric"):
                families[family][name] = np.asarray(arrays[f"column.{number}.numbers"])
            else:
                loader = loaders.get(family.removeprefix("users."))
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
            of_users=UserColumns(families["users.numeric"], families["users.coded"], families["users.tags"]),
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


def _user_columns(dataset: Dataset, users: IdIndex) -> tuple[UserColumns, list[str]]:
    """Return the feature columns of users.parquet, and the names of those whose type has no place."""
    numeric: dict[str, AnyArray] = {}
    coded: dict[str, CodedColumn] = {}
    tags: dict[str, TagColumn] = {}
    skipped: list[str] = []
    align = _Aligner(dataset, "users", "user_id", users)
    for name, type_ in align.columns():
        if is_number(type_) or pa.types.is_boolean(type_):
            numeric[name] = numbers(align.read(name))
        elif is_text(type_):
            coded[name] = CodedColumn.of(align.read(name))
        elif is_tags(type_):
            tags[name] = TagColumn.of(align.read(name))
        else:
            skipped.append(name)
    return UserColumns(numeric, coded, tags), skipped


def _plain_columns(
    numeric: Mapping[str, AnyArray], coded: Mapping[str, CodedColumn], tags: Mapping[str, TagColumn]
) -> dict[str, AnyArray]:
    columns: dict[str, AnyArray] = {name: column.codes for name, column in coded.items()}
    columns |= numeric
    for name, column in tags.items():
        columns |= {f"{name}.offsets": column.offsets, f"{name}.codes": column.codes}
    texts = {name: column.vocabulary for name, column in coded.items()}
    texts |= {name: column.vocabulary for name, column in tags.items()}
    for name, text in texts.items():
        columns |= {f"{name}.vocabulary.offsets": text.offsets, f"{name}.vocabulary.data": text.data}
    return columns


def _keys(index: IdIndex) -> Int64Array:
    encoded = index.encoded(np.arange(len(index), dtype=np.int32))
    return encoded if encoded.ndim == 1 else keys_of_cells(encoded)


def _real(values: Any, dtype: Any) -> AnyArray:
    """A column of integers or floats as floats; NaN where missing."""
    return numbers(values.cast(pa.float64(), safe=False)).astype(dtype, copy=False)


def _author_names(dataset: Dataset, authors: IdIndex) -> TextColumn:
    align = _Aligner(dataset, "authors", "author_id", authors)
    if dataset.has("authors", "name"):
        return TextColumn.of(align.read("name"))
    return TextColumn.of(pa.nulls(len(authors), pa.large_string()))
