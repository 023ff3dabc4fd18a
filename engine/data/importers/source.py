"""Reads published files, from a folder or a zip archive, in pieces."""

from __future__ import annotations

import csv
import fnmatch
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv

from engine.core.errors import DatasetError

BLOCK_BYTES = 1 << 23
"""How much of a file is parsed at once; no line may be longer."""

_DEPTH = 3
"""How many folders deep files are looked for: archives hold a folder, some a folder in it."""


class Source:
    """The files of a published data set. Use as a context."""

    def __init__(self, path: Path) -> None:
        """Open a folder or a zip archive.

        Raises:
            DatasetError: it is neither.
        """
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        if path.is_dir():
            self._names = sorted(_files_below(path, _DEPTH))
        elif zipfile.is_zipfile(path):
            self._archive = zipfile.ZipFile(path)
            self._names = sorted(name for name in self._archive.namelist() if not name.endswith("/"))
        else:
            raise DatasetError(
                "is neither a folder nor a zip archive; unpack other archives first", str(path)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._archive is not None:
            self._archive.close()

    def matching(self, pattern: str) -> list[str]:
        """Return the files whose own name matches (`*` as in a shell), sorted: those of the topmost folder.

        Raises:
            DatasetError: they lie in several folders of one depth: this is more than one data set.
        """
        found = [
            PurePosixPath(name) for name in self._names if fnmatch.fnmatch(PurePosixPath(name).name, pattern)
        ]
        top = min((len(name.parts) for name in found), default=0)
        found = [name for name in found if len(name.parts) == top]
        folders = sorted({str(name.parent) for name in found})
        if len(folders) > 1:
            raise DatasetError(f"holds {pattern} in {', '.join(folders)}; name one of these", str(self.path))
        return [str(name) for name in found]

    def has(self, pattern: str) -> bool:
        """Whether any file matches."""
        return bool(self.matching(pattern))

    def find(self, pattern: str) -> list[str]:
        """Return the files that match, at least one.

        Raises:
            DatasetError: there is none, or see `matching`.
        """
        found = self.matching(pattern)
        if not found:
            raise DatasetError(f"is missing from {self.path}", pattern)
        return found

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file that `find` returned."""
        if self._archive is None:
            with open(self.path / name, "rb") as file:
                yield file
        else:
            with self._archive.open(name) as member:
                yield member

    def batches(
        self,
        pattern: str,
        columns: Mapping[str, Any],
        *,
        optional: Mapping[str, Any] | None = None,
        layout: Sequence[str] | None = None,
        delimiter: str = ",",
        encoding: str = "utf-8",
    ) -> Iterator[Any]:
        """Stream columns of all files that match as `pyarrow.RecordBatch`es.

        Args:
            pattern: the file's name, `*` as in a shell.
            columns: pyarrow types by column name, in the order wanted.
            optional: more of them; one that a file lacks comes as nulls.
            layout: the names of all columns, for a file without a header; such files have no quotes either.
            delimiter: between the values.
            encoding: of the text.

        Raises:
            DatasetError: no file matches, a column is missing, or a value is not of its type.
        """
        wanted = dict(columns) | dict(optional or {})
        for name in self.find(pattern):
            present = list(layout) if layout is not None else self._header(name, delimiter)
            self._require(columns, present, name)
            read = pv.ReadOptions(column_names=layout, block_size=BLOCK_BYTES, encoding=encoding)
            parse = pv.ParseOptions(delimiter=delimiter, quote_char='"' if layout is None else False)
            convert = pv.ConvertOptions(
                column_types=wanted, include_columns=list(wanted), include_missing_columns=True
            )
            with self.open(name) as file, parsing(name), pv.open_csv(file, read, parse, convert) as reader:
                yield from reader

    def table(self, pattern: str, columns: Mapping[str, Any], **options: Any) -> Any:
        """Return what `batches` streams as one `pyarrow.Table`: for files that are small."""
        return pa.Table.from_batches(
            self.batches(pattern, columns, **options),
            pa.schema(list(columns.items()) + list(options.get("optional", {}).items())),
        )

    def inferred(self, pattern: str, columns: Mapping[str, Any]) -> Any:
        """Return all columns of all files that match as one `pyarrow.Table`: for small feature files.

        Args:
            pattern: the file's name, `*` as in a shell.
            columns: pyarrow types of columns that must be there; those of others follow from their values.

        Raises:
            DatasetError: as `batches`.
        """
        tables = []
        for name in self.find(pattern):
            self._require(columns, self._header(name, ","), name)
            # In one block: a column's type must follow from all of its values, not from the first ones.
            read = pv.ReadOptions(block_size=1 << 30)
            with self.open(name) as file, parsing(name):
                tables.append(
                    pv.read_csv(file, read, convert_options=pv.ConvertOptions(column_types=columns))
                )
        with parsing(pattern):
            return pa.concat_tables(tables, promote_options="permissive")

    @staticmethod
    def _require(columns: Iterable[str], present: list[str], name: str) -> None:
        for column in columns:
            if column not in present:
                raise DatasetError(f"is missing; the file has {', '.join(present) or 'none'}", name, column)

    def _header(self, name: str, delimiter: str) -> list[str]:
        with self.open(name) as file:
            line = file.readline().decode("utf-8-sig", "replace")
        return next(csv.reader([line], delimiter=delimiter), [])


@contextmanager
def parsing(name: str) -> Iterator[None]:
    """Turn what pyarrow raises about a file's content into a `DatasetError`."""
    try:
        yield
    except pa.ArrowException as error:
        raise DatasetError(f"is not as published: {' '.join(str(error).split())[:300]}", name) from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"is not as published: {error}", name) from error


def lines(text: str) -> Any:
    """Return the lines of a text as a pyarrow array, trimmed, without empty ones."""
    trimmed = pc.utf8_trim_whitespace(pc.split_pattern(pa.array([text]), "\n").flatten())
    return trimmed.filter(pc.not_equal(trimmed, ""))


def constant(value: str, rows: int) -> Any:
    """Return a string column that says the same in every row."""
    return pa.repeat(pa.scalar(value), rows)


def split_tags(values: Any, separator: str, absent: str = "") -> Any:
    """Return a column of tag lists from joined strings; null, "" and `absent` give an empty list."""
    tags = pc.split_pattern(values, separator)
    nothing = pc.fill_null(pc.or_(pc.equal(values, ""), pc.equal(values, absent)), True)
    # A null list stands for "unknown" in Parquet; here it is known that there are none.
    empty = pa.scalar([], pa.list_(pa.string()))
    return pc.if_else(nothing, empty, tags)


def lists(counts: Any, values: Any) -> Any:
    """Return a column of lists: `counts` (int64[n]) says how many of `values` go to each row, in order."""
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _files_below(folder: Path, depth: int, prefix: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_file():
            yield prefix + entry.name
        elif entry.is_dir() and depth > 1:
            yield from _files_below(entry, depth - 1, f"{prefix}{entry.name}/")
