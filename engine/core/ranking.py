"""One ranking for everybody: how channels without personalisation answer a batch."""

from __future__ import annotations

import numpy as np

from engine.core.candidates import CandidateBatch
from engine.core.types import NO_ROW, Float32Array, Int32Array


def front(rows: Int32Array, scores: Float32Array, k: Int32Array) -> CandidateBatch:
    """Return the first k[q] of one ranking for each query."""
    lengths = np.minimum(k, rows.size).astype(np.int64)
    offsets = np.zeros(k.size + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if k.size == 1:
        n = int(lengths[0])
        return CandidateBatch(
            np.asarray(rows[:n]), np.asarray(scores[:n]), np.full(n, NO_ROW, np.int32), offsets
        )
    at = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return CandidateBatch(rows[at], scores[at], np.full(at.size, NO_ROW, np.int32), offsets)
