"""Item vectors drawn towards the users who like them: one step of graph convolution, on what was trained.

An item that few users like was moved by few examples. The users who like it say more of it: their vectors are made of
all else that they like. The step is the items' half of a layer of LightGCN (He et al. 2020, section 3.1.1, equation 3).
LightGCN trains through its layers and adds them up; here a layer is applied once, after the training, and to directions
only: lengths stay what the towers say, so that popular items do not gain.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.interactions import Interactions
from engine.core.query import History
from engine.core.types import Float32Array
from engine.models.encoded import Encoded, EncodedUsers
from engine.models.features import encode_histories, take_encoded
from engine.models.towers import UserTower

BLOCK = 4096
"""Users whose vectors are computed at once."""


def drawn_to_likers(
    vectors: Float32Array, tower: UserTower, users: Encoded, liked: Interactions, weight: float
) -> Float32Array:
    """Return float32[items, d]: |v| times the direction of v / |v| + weight * s / |s|.

    s is the sum of u / |u| n_u^-0.5 over the users u who like the item, of whom each likes n_u items. An item that nobody
    likes keeps its vector.

    Args:
        vectors: float32[items, d], of the item tower.
        tower: the user tower; one vector per user.
        users: the features of all rows.
        liked: who likes what, newest first.
        weight: 0 changes nothing.
    """
    sequence_spec = tower.spec.sequence
    length = sequence_spec.length if sequence_spec.kind != "none" else 0
    sums = np.zeros_like(vectors)
    for begin in range(0, liked.users, BLOCK):
        rows = np.arange(begin, min(begin + BLOCK, liked.users), dtype=np.int32)
        offsets = liked.indptr[begin : rows[-1] + 2]
        entries = slice(offsets[0], offsets[-1])
        offsets = offsets - offsets[0]
        history = History(liked.rows[entries], liked.weights[entries], liked.timestamps[entries], offsets)
        sequence, lengths = encode_histories(history, liked.items, length)
        known = take_encoded(users, rows)
        encoded = EncodedUsers(known.codes, known.multi, known.numbers, sequence, lengths)
        directions = _directions(tower.vectors(encoded))
        directions /= np.sqrt(np.maximum(np.diff(offsets), 1)).astype(np.float32)[:, None]
        item_sums(offsets, history.rows, directions, sums)
    own = np.linalg.norm(vectors, axis=1, keepdims=True)
    moved = _directions(_directions(vectors) + np.float32(weight) * _directions(sums)) * own
    drawn: Float32Array = np.where(sums.any(1, keepdims=True), moved, vectors)
    return drawn


def _directions(vectors: Float32Array) -> Float32Array:
    """Return the vectors at length 1; those of zeros stay."""
    lengths: Float32Array = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: Float32Array = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return directions


@njit(nogil=True, cache=True)
def item_sums(indptr, rows, x, out):  # type: ignore[no-untyped-def]
    """Add x[u] to out[row] for each row of user u; x: float32[users, c], out: float32[items, c]."""
    for u in range(indptr.size - 1):
        row = x[u]
        for p in range(indptr[u], indptr[u + 1]):
            y = out[rows[p]]
            for c in range(y.size):
                y[c] += row[c]
