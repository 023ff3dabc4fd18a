"""Items as they are now: what the live columns say of them, over what the build had."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.core.types import AnyArray, Int32Array
from engine.models.encoded import Encoded
from engine.models.features.codes import source_of
from engine.models.features.encoder import Encoder
from engine.models.features.table import take_encoded

LIVE_COLUMNS = ("item_id", "author", "city", "published_at", "quality", "latitude", "longitude", "tags")
"""Columns of items that are known of what is published live; any other feature of such an item is missing."""


def item_columns_of(columns: Any, rows: Int32Array) -> dict[str, AnyArray]:
    """Return what the live columns (`ItemColumns`) say of some items, for `Encoder.encode`: missing as there."""
    counts = columns.tag_counts[rows].astype(np.int64)
    starts = columns.tag_starts[rows]
    offsets = np.zeros(rows.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    at = np.arange(int(offsets[-1])) + np.repeat(starts - offsets[:-1], counts)
    return {
        "item_id.keys": columns.keys[rows],
        "author": columns.authors[rows],
        "city": columns.cities[rows],
        "published_at": columns.published_at[rows],
        "quality": columns.quality[rows],
        "latitude": columns.latitude[rows],
        "longitude": columns.longitude[rows],
        "tags.offsets": offsets,
        "tags.codes": columns.tag_codes[at],
    }


def encode_live(encoder: Encoder, table: Encoded, columns: Any, rows: Int32Array) -> Encoded:
    """Encode items as they are now; what the live columns do not say stays as the build had it.

    Args:
        encoder: of the item features.
        table: all items of the build, encoded; of later ones it says nothing.
        columns: the live columns, an `ItemColumns`.
        rows: int32[m].
    """
    live = encoder.encode(item_columns_of(columns, rows), rows)
    stored = take_encoded(table, rows)
    code = many = number = 0
    multi = list(live.multi)
    for feature in encoder.features:
        stays = source_of(feature.name) not in LIVE_COLUMNS
        if feature.coded:
            if stays:
                live.codes[:, code] = stored.codes[:, code]
            code += 1
        elif feature.multi:
            if stays:
                multi[many] = stored.multi[many]
            many += 1
        else:
            if stays:
                live.numbers[:, number : number + 2] = stored.numbers[:, number : number + 2]
            number += 2
    return Encoded(live.codes, tuple(multi), live.numbers)
