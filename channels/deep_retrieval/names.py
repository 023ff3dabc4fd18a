"""Paths as people read them: "36-27-20"."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.types import Int64Array, UInt8Array
from engine.models.paths import PathSpec


def path_names(codes: Int64Array, lattice: PathSpec) -> UInt8Array:
    """Return uint8[n, width]: the nodes of paths, counted from 0, as ASCII with hyphens between them, ended by zeros.

    Args:
        codes: int64[n].
        lattice: whose paths they are.
    """
    digits = len(str(lattice.width - 1))
    names = np.zeros((codes.size, lattice.depth * (digits + 1) - 1), np.uint8)
    _write(codes, lattice.width, lattice.depth, names)
    return names


@njit(nogil=True, cache=True)
def _write(codes, width, depth, names):  # type: ignore[no-untyped-def]
    for r in range(codes.size):
        power = 1
        for _ in range(depth - 1):
            power *= width
        at = 0
        for layer in range(depth):
            node = codes[r] // power % width
            scale = 1
            while node // scale >= 10:
                scale *= 10
            while scale > 0:
                names[r, at] = 48 + node // scale % 10
                at += 1
                scale //= 10
            if layer + 1 < depth:
                names[r, at] = 45
                at += 1
                power //= width
