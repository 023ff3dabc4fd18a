"""A streaming VQ channel without a training: random weights and clusters, everything else as it is built."""

from __future__ import annotations

from typing import Any

import numpy as np

from channels.streaming_vq import StreamingVq, StreamingVqOptions
from channels.streaming_vq.bundle import specified
from engine.core.channel import BuildContext, LoadContext, SilentProgress
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.memory import MemorySink
from engine.core.types import AnyArray
from engine.models.rank import random_rank
from engine.models.reference import random_weights
from engine.models.vq_spec import VqSpec

SMALL: dict[str, Any] = {
    "dimension": 8,
    "user_features": [{"name": "user_id", "kind": "id", "dimension": 8}],
    "item_features": [
        {"name": "item_id", "kind": "id", "dimension": 8},
        {"name": "tags", "kind": "multi", "dimension": 4},
    ],
    "sequence": {"kind": "mean", "width": 8, "length": 6},
    "clusters": 6,
    "rank_dimension": 4,
    "rank_hidden": [6],
    "rank_history": 3,
    "rank_read": 8,
    "secondary_clusters": 3,
    "dropped_clusters": 1,
    "rank_list": 60,
    "chunk": 2,
}


def random_training(spec: VqSpec, seed: int = 0) -> dict[str, AnyArray]:
    """Return arrays as a training gives them, at random; of each 20 items one is in no cluster."""
    random = np.random.default_rng((seed, 0xD6))
    items, k, d = spec.tower.items, spec.clusters, spec.tower.dimension
    arrays: dict[str, AnyArray] = {}
    for at, name in enumerate(spec.user_names):
        for part, array in random_weights(spec.tower, seed + at).items():
            side, _, rest = part.partition(".")
            arrays[f"{name}.{rest}" if side == "user" else part] = array
    arrays |= random_rank(spec, seed)
    arrays["codebook.vectors"] = random.standard_normal((k, d)).astype(np.float32)
    arrays["codebook.counts"] = random.random(k).astype(np.float32) + np.float32(0.5)
    arrays["codebook.sums"] = arrays["codebook.vectors"] * arrays["codebook.counts"][:, None]
    arrays["bias.weight"] = random.standard_normal(items + 1).astype(np.float32)
    arrays["assignment"] = random.integers(0, k, items).astype(np.int32)
    arrays["assignment"][::20] = -1
    arrays["item_bias"] = arrays["bias.weight"][1:].copy()
    if spec.rank != "none":
        arrays["rank.item_vectors"] = random.standard_normal((items, spec.rank_dimension)).astype(np.float32)
        arrays["rank.item_bias"] = random.standard_normal((items, len(spec.tasks))).astype(np.float32)
    if spec.rank == "complex":
        arrays["secondary"] = random.integers(0, spec.secondary_clusters, k).astype(np.int32)
    return arrays


def written(
    liked: Interactions, item_columns: dict[str, AnyArray], seed: int = 0, **options: Any
) -> dict[str, AnyArray]:
    """Return the arrays of a bundle of random weights."""
    config = StreamingVqOptions.model_validate(options)
    sink = MemorySink()
    context = BuildContext(
        liked, item_columns, int(liked.timestamps.max(initial=0)), sink, SilentProgress(), 1
    )
    spec, _ = specified(config, context, None)
    StreamingVq.write(config, context, random_training(spec, seed))
    return sink.arrays


def loaded(
    arrays: dict[str, AnyArray], users: int, items: int, columns: ItemColumns | None = None, **options: Any
) -> StreamingVq:
    """Load a bundle."""
    live = columns if columns is not None else ItemColumns(items)
    return StreamingVq.load(
        StreamingVqOptions.model_validate(options), LoadContext(arrays, items, users, live)
    )
