"""Users and items as the towers read them: codes and floats, a row each. Training and serving share the shapes.

Columns stand in the order of the tower's features: those with one code in `codes`, those with many in `multi`, plain
numbers in `numbers`. Code 0 is "missing or unknown" everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.types import Float32Array, Int32Array, Int64Array


@dataclass(frozen=True, slots=True)
class Multi:
    """A feature with any number of codes per row; row r has codes[offsets[r]:offsets[r + 1]].

    Attributes:
        codes: int32[m], 1 or more; what is unknown is left out, so that a row may have none.
        offsets: int64[n + 1].
    """

    codes: Int32Array
    offsets: Int64Array


@dataclass(frozen=True, slots=True)
class Encoded:
    """n rows of features.

    Attributes:
        codes: int32[n, features of one code].
        multi: one per feature of many codes.
        numbers: float32[n, 2 x plain numeric features]: value (0 where missing), then 1 where missing, else 0.
    """

    codes: Int32Array
    multi: tuple[Multi, ...]
    numbers: Float32Array

    def __len__(self) -> int:
        return int(self.codes.shape[0])


EncodedItems = Encoded
"""The features of items, row by row of the catalogue in a build."""


@dataclass(frozen=True, slots=True)
class EncodedUsers(Encoded):
    """The features of n users or queries, and what each did.

    Attributes:
        sequence: int32[n, t], item codes (row + 1) right-aligned, newest last, 0 is padding; t may be anything from 0 to
            the length of the specification (a batch is padded to its own longest).
        lengths: int32[n], entries of `sequence` that are no padding.
    """

    sequence: Int32Array
    lengths: Int32Array
