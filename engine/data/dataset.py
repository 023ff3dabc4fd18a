"""A data set on disk: a directory of Parquet files and a `dataset.toml`, checked when it is opened."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.core.errors import DatasetError
from engine.data import form
from engine.data.form import File, file_name
from engine.data.ids import IdIndex, IdKind

TOML = "dataset.toml"

BATCH_ROWS = 1 << 17
"""Rows of a streamed batch: large enough to forget Python's share, small enough for a megabyte per column."""

_ROW_GROUP = 1 << 18
_CODED = ("event", "split")
"""Columns of few values, which readers get dictionary-encoded."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set whose files have been checked; immutable. Files are read when asked for, never kept.

    Attributes:
        path: the directory.
        name: what `dataset.toml` calls it, or the directory's name.
        id_type: what its ids are.
        meta: all of `dataset.toml`.
        schemas: the pyarrow schema of each file that is there.
        rows: how many rows each of them has.
    """

    path: Path
    name: str
    id_type: IdKind
    meta: Mapping[str, Any]
    schemas: Mapping[File, Any]
    rows: Mapping[File, int]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a data set and hold every file to the form. Reads each file once, in small pieces.

        Raises:
            DatasetError: naming the file, the column and the rule it breaks, with how many rows break it.
        """
        path = Path(path)
        if not path.is_dir():
            raise DatasetError("is not a directory", str(path))
        meta = _read_toml(path)
        id_type = meta.get("id_type", "int64")
        if id_type not in ("int64", "string"):
            raise DatasetError(f'id_type must be "int64" or "string", not {id_type!r}', TOML)
        if not (path / file_name("interactions")).is_file():
            raise DatasetError(f"is missing from {path}", file_name("interactions"))
        present = [file for file in form.FILES if (path / file_name(file)).is_file()]
        schemas: dict[File, Any] = {}
        rows: dict[File, int] = {}
        for file in present:
            with _opened(path, file) as parquet:
                schemas[file] = _without_nothing(parquet.schema_arrow)
                rows[file] = parquet.metadata.num_rows
        dataset = cls(path, str(meta.get("name", path.resolve().name)), id_type, meta, schemas, rows)
        for file in present:
            dataset._check(file)
        return dataset

    def has(self, file: File, column: str | None = None) -> bool:
        """Whether a file, and if given a column of it, is there."""
        return file in self.schemas and (column is None or column in self.schemas[file].names)

    def batches(self, file: File, columns: Sequence[str]) -> Iterator[Any]:
        """Stream columns of a file as `pyarrow.RecordBatch`es of at most `BATCH_ROWS` rows, in file order.

        `event` and `split` of the interactions come dictionary-encoded. Memory: one batch, and the pages of
        the Parquet file it is decoded from.

        Raises:
            DatasetError: if the file cannot be read.
        """
        coded = [name for name in columns if file == "interactions" and name in _CODED]
        with _opened(self.path, file, coded) as parquet:
            yield from parquet.iter_batches(batch_size=BATCH_ROWS, columns=list(columns))

    def column(self, file: File, column: str) -> Any:
        """Read one column of a file whole, as a `pyarrow.ChunkedArray`.

        Raises:
            DatasetError: if the file cannot be read.
        """
        with _opened(self.path, file) as parquet:
            return parquet.read(columns=[column]).column(column)

    def index(self, *sources: tuple[File, str]) -> IdIndex:
        """Return the index of all ids in some (file, column) pairs, skipping nulls and pairs not there.

        Memory: a few times the distinct ids.
        """
        found = _Distinct(pa.large_string() if self.id_type == "string" else pa.int64())
        for file, column in sources:
            if self.has(file, column):
                for batch in self.batches(file, [column]):
                    found.add(batch.column(0))
        return IdIndex.of(found.values())

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with any byte of the files that the form knows."""
        whole = hashlib.blake2b(digest_size=8)
        for name in (TOML, *(file_name(file) for file in self.schemas)):
            with open(self.path / name, "rb") as stream:
                digest = hashlib.file_digest(stream, hashlib.blake2b).digest()
            whole.update(name.encode() + b"\0" + digest)
        return whole.hexdigest()

    def _check(self, file: File) -> None:
        name, schema = file_name(file), self.schemas[file]
        columns = form.form(self.id_type)[file]
        form.check_types(name, schema, columns)
        if file == "interactions" and not ({"timestamp", "split"} & set(schema.names)):
            raise DatasetError("has neither timestamp nor split; one of them is needed", name)
        if file == "interactions" and not self.rows[file]:
            raise DatasetError("holds no rows", name)
        present = [column for column in columns if column.name in schema.names]
        if file in ("items", "users"):
            known = {column.name for column in columns}
            texts = [field.name for field in schema if form.is_text(field.type) or form.is_tags(field.type)]
            present += [form.feature_column(text) for text in texts if text not in known]
        rows = form.check_values(name, present, self.batches(file, [column.name for column in present]))
        if rows != self.rows[file]:
            raise DatasetError(f"holds {rows:,} rows, but says that it has {self.rows[file]:,}", name)
        for column in present:
            if column.unique and (twice := self.rows[file] - len(self.index((file, column.name)))):
                text = f"{twice:,} of {self.rows[file]:,} rows repeat an id that stands before"
                raise DatasetError(text, name, column.name)


def write_dataset(
    path: str | Path,
    interactions: Any,
    *,
    items: Any = None,
    users: Any = None,
    follows: Any = None,
    authors: Any = None,
    meta: Mapping[str, Any],
) -> Dataset:
    """Write a data set, replacing one that is there, and open it: what is written is known to be right.

    `dataset.toml` is written last: a directory without it is no data set.

    Args:
        path: the directory; made if need be.
        interactions: a `pyarrow.Table`, or an iterable of record batches or tables of one schema.
        items, users, follows, authors: the same, or None for no such file.
        meta: the keys of `dataset.toml`: strings, numbers, truth values, lists and dicts of them.

    Raises:
        DatasetError: if the interactions hold nothing, or what was written breaks a rule.
        TypeError: if `meta` holds anything else.
    """
    path = Path(path)
    text = "".join(f"{_toml_key(key)} = {to_toml(value)}\n" for key, value in meta.items())
    path.mkdir(parents=True, exist_ok=True)
    (path / TOML).unlink(missing_ok=True)
    parts = {
        "interactions": interactions,
        "items": items,
        "users": users,
        "follows": follows,
        "authors": authors,
    }
    for file in form.FILES:
        if parts[file] is None:
            (path / file_name(file)).unlink(missing_ok=True)
        else:
            _write_parquet(path / file_name(file), parts[file])
    (path / TOML).write_text(text, encoding="utf-8")
    return Dataset.open(path)


class _Distinct:
    """Collects the distinct values of a stream; memory stays near four times what it holds in the end."""

    def __init__(self, type_: Any) -> None:
        self._type = type_
        self._merged = pa.array([], type_)
        self._parts: list[Any] = []
        self._pending = 0

    def add(self, values: Any) -> None:
        part = pc.unique(values.cast(self._type).drop_null())
        self._parts.append(part)
        self._pending += len(part)
        # Merging only when as much again has come keeps the work linear.
        if self._pending > max(len(self._merged), 4 * BATCH_ROWS):
            self.values()

    def values(self) -> Any:
        """Return the distinct values so far."""
        self._merged = pc.unique(pa.chunked_array([self._merged, *self._parts], self._type))
        self._parts, self._pending = [], 0
        return self._merged


@contextmanager
def _opened(path: Path, file: File, coded: Sequence[str] = ()) -> Iterator[Any]:
    """Open a Parquet file for streaming; what pyarrow raises inside becomes a `DatasetError`."""
    try:
        # Without pre-buffering, and through small buffers: a row group may be as large as the file.
        parquet = pq.ParquetFile(
            path / file_name(file),
            read_dictionary=coded,
            pre_buffer=False,
            buffer_size=1 << 20,
            page_checksum_verification=True,
        )
        with parquet:
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:200]
        raise DatasetError(f"cannot be read as Parquet: {said}", file_name(file)) from error


def _without_nothing(schema: Any) -> Any:
    # A column of type null is how some writers store one without values: as good as absent.
    return pa.schema([field for field in schema if not pa.types.is_null(field.type)])


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path / TOML, "rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        raise DatasetError(f"is missing from {path}; every data set has one", TOML) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise DatasetError(f"cannot be read as TOML: {error}", TOML) from error


def _write_parquet(path: Path, data: Any) -> None:
    parts: Iterable[Any] = [data] if isinstance(data, pa.Table) else data
    writer = None
    waiting: list[Any] = []
    rows = 0
    try:
        for part in parts:
            table = part if isinstance(part, pa.Table) else pa.Table.from_batches([part])
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True)
            waiting.append(table)
            # A row group per part would be thousands of tiny ones.
            rows += table.num_rows
            if rows >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting), row_group_size=_ROW_GROUP)
                waiting, rows = [], 0
        if writer is None:
            raise DatasetError("holds no rows", path.name)
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=_ROW_GROUP)
    finally:
        if writer is not None:
            writer.close()


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else to_toml(key)


def to_toml(value: Any) -> str:
    """Return a value as TOML has it on one line; TypeError where it has none."""
    match value:
        case str():
            # JSON's strings are TOML's, but for DEL.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool():
            return str(value).lower()
        case int() | np.integer():
            return str(int(value))
        case float() | np.floating():
            return repr(float(value))
        case list() | tuple():
            return f"[{', '.join(map(to_toml, value))}]"
        case Mapping():
            return f"{{ {', '.join(f'{_toml_key(key)} = {to_toml(part)}' for key, part in value.items())} }}"
    raise TypeError(f"{value!r} has no place in a TOML file")
