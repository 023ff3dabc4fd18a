"""Which code a value has: hours, hashed keys, the codes of another build; and where features are read from."""

from __future__ import annotations

import numpy as np

from engine.core.types import AnyArray, Int32Array, Int64Array
from engine.models.spec import CONTEXT, HOURS

AUTHOR = "author"
CITY = f"{CONTEXT}city"
DEVICE = f"{CONTEXT}device."


def source_of(name: str) -> str:
    """Return the catalogue's column that a feature is read from: of a request's, the user's column of the same name."""
    if name == CITY:
        return "city"
    return name.removeprefix(DEVICE)


def hour_codes(timestamps: Int64Array) -> Int32Array:
    """Return int32[n]: the code of `context.hour` at some times, seconds since the epoch; 0 for 0, not known."""
    return np.where(timestamps > 0, timestamps // 3600 % HOURS + 1, 0).astype(np.int32)


def hash_codes(keys: AnyArray, size: int) -> Int32Array:
    """Return int32[n]: keys spread over the codes 1 to size - 1 (the finaliser of SplitMix64, Steele et al. 2014)."""
    z = keys.astype(np.int64).view(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (1 + z % np.uint64(size - 1)).astype(np.int32)


def moved_codes(now: Int64Array, then: Int64Array) -> Int64Array:
    """Return int64[now.size + 1]: for code 0, then 1 + position in `now`, the code of the same key in `then`, or 0."""
    order = np.argsort(then, kind="stable")
    place = np.minimum(np.searchsorted(then[order], now), max(then.size - 1, 0))
    found = order[place] if then.size else np.zeros(now.size, np.int64)
    same = (then[found] == now) if then.size else np.zeros(now.size, np.bool_)
    return np.concatenate((np.zeros(1, np.int64), np.where(same, found + 1, 0)))
