"""The lists of streaming VQ's clusters as a snapshot holds them, ready to be mapped.

What belongs to an item lies where the lists have it, so that what is read of a cluster lies together: a chunk of eight
items is read in one go, where eight rows of a table in the catalogue's order would be waited for one by one.

| name | type | what |
|---|---|---|
| `lists.offsets` | int64[K + 1] | where the list of each cluster begins |
| `lists.rows` | int32[items] | the items of cluster after cluster, by falling bias; those in none behind all |
| `lists.places` | int32[items] | where each item stands in `lists.rows` |
| `lists.bias` | float32[items] | v_bias, in that order |
| `lists.vectors` | int8[items, e rounded up to 16] | z of the ranking step, in that order, in bytes; zeros behind |
| `lists.scales` | float32[items] | z is nearly its bytes times this |
| `lists.rank_bias` | float32[items, T] | b of the ranking step, in that order |
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.models.tiles import in_wide_bytes
from engine.models.vq_spec import VqSpec

PREFIX = "lists."

_BY_ROW = ("rank.item_vectors", "rank.item_bias")


def as_served(spec: VqSpec, arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """Return the arrays of a bundle with the lists of its assignment, whatever lists it had.

    Items that a live trainer added behind the catalogue's are left out: their rows are the trainer's own, and servers
    learn from the assignment log where they are. What the ranking step has of each item is kept in the order of the
    lists only.

    Args:
        spec: of the model.
        arrays: as a training gives them: `assignment`, `item_bias`, and the rest.
    """
    items = spec.tower.items
    made = {name: array for name, array in arrays.items() if not name.startswith(PREFIX)}
    made["assignment"] = np.ascontiguousarray(arrays["assignment"][:items], np.int32)
    made["item_bias"] = np.ascontiguousarray(arrays["item_bias"][:items], np.float32)
    offsets, rows, places = sort_lists(made["assignment"], made["item_bias"], spec.clusters)
    made |= {"lists.offsets": offsets, "lists.rows": rows, "lists.places": places}
    made["lists.bias"] = made["item_bias"][rows]
    if spec.rank != "none":
        vectors, biases = (arrays[name] for name in _BY_ROW)
        made["lists.vectors"], made["lists.scales"] = in_wide_bytes(vectors, rows)
        made["lists.rank_bias"] = np.ascontiguousarray(biases[rows])
    return {name: array for name, array in made.items() if name not in _BY_ROW}


def sort_lists(
    assignment: Int32Array, biases: Float32Array, clusters: int
) -> tuple[Int64Array, Int32Array, Int32Array]:
    """Return the lists of all clusters, by falling bias, of equal bias by row.

    Args:
        assignment: int32[items], -1 where an item is in none.
        biases: float32[items].
        clusters: K.

    Returns:
        int64[K + 1], where the list of each begins; int32[items], the rows, those in no cluster behind all; int32[items],
        where each row stands among them.
    """
    there = np.where(assignment < 0, clusters, assignment)
    rows = np.lexsort((-biases, there)).astype(np.int32)
    offsets = np.zeros(clusters + 1, np.int64)
    np.cumsum(np.bincount(there, minlength=clusters + 1)[:clusters], out=offsets[1:])
    places = np.empty(rows.size, np.int32)
    places[rows] = np.arange(rows.size, dtype=np.int32)
    return offsets, rows, places
