"""Array types and the ragged form that batches are made of."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
UInt64Array: TypeAlias = npt.NDArray[np.uint64]
Int8Array: TypeAlias = npt.NDArray[np.int8]
Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
AnyArray: TypeAlias = npt.NDArray[Any]

NO_ROW = -1
"""What a lookup answers for an id it does not know, and what a column holds where nothing applies."""


class RaggedRows(NamedTuple):
    """One list of catalogue rows per query: query q owns rows[offsets[q]:offsets[q + 1]]."""

    rows: Int32Array
    offsets: Int64Array

    @classmethod
    def empty(cls, size: int) -> RaggedRows:
        """Return `size` empty lists."""
        return cls(np.empty(0, np.int32), np.zeros(size + 1, np.int64))

    @classmethod
    def of(cls, lists: list[Int32Array]) -> RaggedRows:
        """Return the lists end to end."""
        if not lists:
            return cls.empty(0)
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([part.size for part in lists], out=offsets[1:])
        return cls(np.concatenate(lists).astype(np.int32, copy=False), offsets)

    def alone(self, q: int) -> RaggedRows:
        """Return query q's list as that of a batch of one, without copying."""
        part = slice(int(self.offsets[q]), int(self.offsets[q + 1]))
        return RaggedRows(self.rows[part], np.array([0, part.stop - part.start], np.int64))

    @property
    def lengths(self) -> Int64Array:
        """int64[queries]: the length of each list."""
        return self.offsets[1:] - self.offsets[:-1]
