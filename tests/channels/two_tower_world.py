"""A two-tower channel without a training: random weights, everything else as it is built."""

from __future__ import annotations

from typing import Any

import numpy as np

from channels.two_tower import TwoTower
from channels.two_tower.bundle import encoders_of, write_bundle
from engine.core.channel import BuildContext, LoadContext, SilentProgress
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.memory import MemorySink
from engine.core.types import AnyArray, Int32Array
from engine.models.reference import random_weights
from engine.models.towers import ItemTower

SMALL = {
    "dimension": 8,
    "sequence": {"kind": "mean", "width": 8, "length": 6},
    "item_features": [
        {"name": "item_id", "kind": "id", "dimension": 8},
        {"name": "tags", "kind": "multi", "dimension": 4},
        {"name": "author", "kind": "id", "dimension": 4},
        {"name": "quality", "kind": "numeric"},
    ],
    "item_hidden": [8],
}


def written(
    liked: Interactions,
    item_columns: dict[str, AnyArray],
    user_columns: dict[str, AnyArray] | None = None,
    seed: int = 0,
    kind: type[TwoTower] = TwoTower,
    clusters: Int32Array | None = None,
    **options: Any,
) -> dict[str, AnyArray]:
    """Return the arrays of a bundle of random weights."""
    config = kind.Config.model_validate(options)
    sink = MemorySink()
    now = int(liked.timestamps.max(initial=0))
    context = BuildContext(
        liked, item_columns, now, sink, SilentProgress(), 1, user_columns=user_columns or {}
    )
    prompts = 0 if clusters is None else int(clusters.max()) + 1
    spec, users, items = encoders_of(config, context, None, prompts)
    encoded = (
        users.encode(context.user_columns, np.arange(liked.users, dtype=np.int32)),
        items.encode(item_columns, np.arange(liked.items, dtype=np.int32)),
    )
    arrays: dict[str, AnyArray] = dict(random_weights(spec, seed))
    arrays["item_vectors"] = ItemTower.load(spec, arrays).vectors(encoded[1])
    write_bundle(config, context, spec, (users, items), encoded, arrays, clusters)
    return sink.arrays


def loaded(
    arrays: dict[str, AnyArray],
    users: int,
    items: int,
    columns: ItemColumns | None = None,
    kind: type[TwoTower] = TwoTower,
    **options: Any,
) -> TwoTower:
    """Load a bundle."""
    live = columns if columns is not None else ItemColumns(items)
    return kind.load(kind.Config.model_validate(options), LoadContext(arrays, items, users, live))
