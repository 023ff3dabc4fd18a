"""Columns of the catalogue as arrays: numbers, text, tags and dictionary-coded strings.

Every column is a few NumPy arrays, so that a snapshot stores it as it is and a server maps it into memory.
The `take` methods make Python strings: they are for the few rows that a person looks at, never for a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from engine.core.channel import SnapshotSink
from engine.core.types import NO_ROW, AnyArray, Int32Array, Int64Array

MISSING_INT = int(np.iinfo(np.int64).min)
"""What an int64 column holds where there is no value; float columns hold NaN."""


@dataclass(frozen=True, slots=True)
class TextColumn:
    """Strings end to end; string r is data[offsets[r]:offsets[r + 1]]. A missing string is "".

    Attributes:
        offsets: int64[n + 1].
        data: uint8[bytes], UTF-8.
    """

    offsets: Int64Array
    data: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, values: Any) -> Self:
        """Return the column of a pyarrow string array (plain, large, chunked or dictionary-encoded)."""
        return cls(*string_parts(values))

    def __len__(self) -> int:
        return int(self.offsets.size) - 1

    def take(self, rows: Int32Array) -> list[str]:
        """Return the strings of some rows.

        Raises:
            IndexError: if a row lies outside the column.
        """
        taken: list[str] = self.arrow().take(pa.array(rows)).to_pylist()
        return taken

    def arrow(self) -> Any:
        """Return the column as a `pyarrow.LargeStringArray`, without copying."""
        return pa.LargeStringArray.from_buffers(
            len(self), pa.py_buffer(self.offsets), pa.py_buffer(self.data)
        )

    def save(self, sink: SnapshotSink, prefix: str) -> None:
        """Write the arrays `prefix.offsets` and `prefix.data`."""
        sink.write(f"{prefix}.offsets", self.offsets)
        sink.write(f"{prefix}.data", self.data)

    @classmethod
    def load(cls, arrays: Mapping[str, AnyArray], prefix: str) -> Self:
        """Return what `save` wrote."""
        return cls(np.asarray(arrays[f"{prefix}.offsets"]), np.asarray(arrays[f"{prefix}.data"]))


@dataclass(frozen=True, slots=True)
class CodedColumn:
    """One string of few per row: a city, a kind.

    Attributes:
        codes: int32[n], rows of the vocabulary; -1 where missing.
        vocabulary: each string once, in order of first appearance.
    """

    codes: Int32Array
    vocabulary: TextColumn

    @classmethod
    def of(cls, values: Any) -> Self:
        """Return the column of a pyarrow string array (plain, large, chunked or dictionary-encoded)."""
        return cls(*_encode(_one_string_array(values)))

    def __len__(self) -> int:
        return int(self.codes.size)

    def take(self, rows: Int32Array) -> list[str]:
        """Return the strings of some rows; "" where missing."""
        codes = self.codes[rows]
        taken: list[str] = (
            self.vocabulary.arrow().take(pa.array(codes, mask=codes < 0)).fill_null("").to_pylist()
        )
        return taken

    def save(self, sink: SnapshotSink, prefix: str) -> None:
        """Write the arrays `prefix.codes` and `prefix.vocabulary.*`."""
        sink.write(f"{prefix}.codes", self.codes)
        self.vocabulary.save(sink, f"{prefix}.vocabulary")

    @classmethod
    def load(cls, arrays: Mapping[str, AnyArray], prefix: str) -> Self:
        """Return what `save` wrote."""
        return cls(np.asarray(arrays[f"{prefix}.codes"]), TextColumn.load(arrays, f"{prefix}.vocabulary"))


@dataclass(frozen=True, slots=True)
class TagColumn:
    """Several strings of few per row; row r has codes[offsets[r]:offsets[r + 1]].

    Attributes:
        offsets: int64[n + 1].
        codes: int32[m], rows of the vocabulary.
        vocabulary: each string once, in order of first appearance.
    """

    offsets: Int64Array
    codes: Int32Array
    vocabulary: TextColumn

    @classmethod
    def of(cls, values: Any) -> Self:
        """Return the column of a pyarrow array of lists of strings; missing: an empty list, no tag."""
        array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        offsets = np.zeros(len(array) + 1, np.int64)
        np.cumsum(_numpy(pc.list_value_length(array).fill_null(0)), out=offsets[1:])
        codes, vocabulary = _encode(_one_string_array(array.flatten()))
        present = codes >= 0
        if not present.all():
            kept_before = np.concatenate([[0], np.cumsum(present)])
            offsets, codes = kept_before[offsets], codes[present]
        return cls(offsets, codes, vocabulary)

    def __len__(self) -> int:
        return int(self.offsets.size) - 1

    def take(self, rows: Int32Array) -> list[list[str]]:
        """Return the tags of some rows."""
        codes = [self.codes[self.offsets[row] : self.offsets[row + 1]] for row in np.asarray(rows).tolist()]
        return [self.vocabulary.take(part) for part in codes]

    def save(self, sink: SnapshotSink, prefix: str) -> None:
        """Write the arrays `prefix.offsets`, `prefix.codes` and `prefix.vocabulary.*`."""
        sink.write(f"{prefix}.offsets", self.offsets)
        sink.write(f"{prefix}.codes", self.codes)
        self.vocabulary.save(sink, f"{prefix}.vocabulary")

    @classmethod
    def load(cls, arrays: Mapping[str, AnyArray], prefix: str) -> Self:
        """Return what `save` wrote."""
        offsets, codes = np.asarray(arrays[f"{prefix}.offsets"]), np.asarray(arrays[f"{prefix}.codes"])
        return cls(offsets, codes, TextColumn.load(arrays, f"{prefix}.vocabulary"))


def numbers(values: Any, missing: int = MISSING_INT) -> AnyArray:
    """Return a pyarrow column of numbers or truth values as an array.

    Args:
        values: integers and truth values become int64; uint64, which may not fit, and float64 become
            float64; shorter floats become float32.
        missing: what stands for null among integers; among floats it is NaN.

    Returns:
        int64[n], float32[n] or float64[n].
    """
    if pa.types.is_floating(values.type) or pa.types.is_uint64(values.type):
        short = pa.types.is_float16(values.type) or pa.types.is_float32(values.type)
        return _numpy(
            values.cast(pa.float32() if short else pa.float64(), safe=False).fill_null(float("nan"))
        )
    return _numpy(values.cast(pa.int64()).fill_null(missing))


def string_parts(values: Any) -> tuple[Int64Array, npt.NDArray[np.uint8]]:
    """Return the offsets (int64[n + 1], from 0) and UTF-8 bytes (uint8) of pyarrow strings; null is ""."""
    array = _one_string_array(values).fill_null("")
    _, offset_buffer, data_buffer = array.buffers()
    if len(array) == 0 or data_buffer is None:
        return np.zeros(len(array) + 1, np.int64), np.empty(0, np.uint8)
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], data


def _one_string_array(values: Any) -> Any:
    # Large strings first: putting chunks of plain ones together fails at 2 GiB.
    array = values.cast(pa.large_string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _encode(strings: Any) -> tuple[Int32Array, TextColumn]:
    encoded = pc.dictionary_encode(strings)
    codes = _numpy(encoded.indices.fill_null(NO_ROW)).astype(np.int32, copy=False)
    return codes, TextColumn.of(encoded.dictionary)


def _numpy(values: Any) -> AnyArray:
    # The two pyarrow classes disagree about the argument: a chunked array always copies.
    array: AnyArray = (
        values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(zero_copy_only=False)
    )
    return array
