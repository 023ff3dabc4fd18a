"""What the towers read, as tensors: features row by row, and histories end to end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.core.interactions import Interactions
from engine.core.types import AnyArray, Int32Array, Int64Array
from engine.models.encoded import Encoded, EncodedUsers


@dataclass(frozen=True, slots=True)
class Features:
    """`Encoded` as tensors.

    Attributes:
        codes: int64[n, features of one code].
        multi: per feature of many codes int64[m] codes, and the offsets int64[n + 1] in NumPy.
        numbers: float32[n, 2 x plain numbers].
    """

    codes: Tensor
    multi: tuple[tuple[Tensor, Int64Array], ...]
    numbers: Tensor

    @classmethod
    def of(cls, encoded: Encoded, device: torch.device | str = "cpu") -> Features:
        """Return the rows as tensors on a device."""
        return cls(
            tensor(encoded.codes, device).long(),
            tuple((tensor(many.codes, device).long(), many.offsets) for many in encoded.multi),
            tensor(encoded.numbers, device),
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """Histories end to end, oldest item first: user r did codes[offsets[r]:offsets[r + 1]].

    Attributes:
        codes: int64[t], item codes (row + 1).
        offsets: int64[n + 1] in NumPy: the plan of the rectangles is made from it.
    """

    codes: Tensor
    offsets: Int64Array

    @classmethod
    def of(cls, users: EncodedUsers, device: torch.device | str = "cpu") -> Packed:
        """Return the right-aligned sequences of `users` packed."""
        offsets = np.zeros(len(users) + 1, np.int64)
        np.cumsum(users.lengths, out=offsets[1:])
        return cls(tensor(users.sequence[users.sequence > 0], device).long(), offsets)

    def __len__(self) -> int:
        return int(self.offsets.size - 1)

    @property
    def lengths(self) -> Int64Array:
        """int64[n]: how many items each did."""
        return np.diff(self.offsets)


def tensor(array: AnyArray, device: torch.device | str = "cpu") -> Tensor:
    """Return an array as a tensor, without a copy where it can be written to and stays on the CPU."""
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def history(matrix: Interactions, users: Int32Array, length: int, device: torch.device) -> Packed:
    """Return the newest items of users, oldest first, as serving gives them to the tower."""
    lengths = np.minimum(matrix.indptr[users + 1] - matrix.indptr[users], length)
    offsets = np.zeros(users.size + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    at = np.repeat(matrix.indptr[users] + lengths - 1 + offsets[:-1], lengths) - np.arange(int(offsets[-1]))
    return Packed(tensor(matrix.rows[at] + np.int32(1), device).long(), offsets)
