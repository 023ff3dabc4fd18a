"""A Deep Retrieval channel without a training: random weights, paths and scores, everything else as it is built."""

from __future__ import annotations

from typing import Any

import numpy as np

from channels.deep_retrieval import DeepRetrieval, DeepRetrievalOptions
from channels.deep_retrieval.bundle import DeepRetrievalSpec, specified
from engine.core.channel import BuildContext, LoadContext, SilentProgress
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.memory import MemorySink
from engine.core.types import AnyArray, Int64Array
from engine.models.paths import random_paths
from engine.models.reference import random_weights

SMALL: dict[str, Any] = {
    "dimension": 8,
    "sequence": {"kind": "gru", "width": 8, "length": 6},
    "item_features": [
        {"name": "tags", "kind": "multi", "dimension": 1},
        {"name": "author", "kind": "id", "dimension": 1},
    ],
    "width": 5,
    "depth": 3,
    "path_hidden": [6],
    "paths": 2,
    "kept_paths": 4,
    "beam": 30,
}


def random_training(spec: DeepRetrievalSpec, seed: int = 0) -> dict[str, AnyArray]:
    """Return arrays as a training gives them, at random: the paths of an item are the first J of its S kept ones."""
    random = np.random.default_rng((seed, 0xD3))
    items, kept = spec.tower.items, spec.kept_paths
    arrays: dict[str, AnyArray] = {
        name: array for name, array in random_weights(spec.tower, seed).items() if name.startswith("user.")
    }
    arrays |= random_paths(spec.lattice, seed)
    paths: Int64Array = np.argsort(random.random((items, spec.lattice.paths)), axis=1)[:, :kept].astype(
        np.int64
    )
    arrays["scores.paths"] = paths
    arrays["scores.values"] = -np.sort(-random.random((items, kept)), axis=1).astype(np.float32)
    arrays["assignment"] = np.sort(paths[:, : spec.paths], axis=1)
    arrays["rank.vectors"] = random.standard_normal((items, spec.lattice.dimension)).astype(np.float32)
    arrays["rank.bias"] = random.standard_normal(items).astype(np.float32)
    return arrays


def written(
    liked: Interactions, item_columns: dict[str, AnyArray], seed: int = 0, **options: Any
) -> dict[str, AnyArray]:
    """Return the arrays of a bundle of random weights."""
    config = DeepRetrievalOptions.model_validate(options)
    sink = MemorySink()
    now = int(liked.timestamps.max(initial=0))
    context = BuildContext(liked, item_columns, now, sink, SilentProgress(), 1)
    spec, _, _ = specified(config, context, None)
    DeepRetrieval.write(config, context, random_training(spec, seed))
    return sink.arrays


def loaded(
    arrays: dict[str, AnyArray], users: int, items: int, columns: ItemColumns | None = None, **options: Any
) -> DeepRetrieval:
    """Load a bundle."""
    live = columns if columns is not None else ItemColumns(items)
    return DeepRetrieval.load(
        DeepRetrievalOptions.model_validate(options), LoadContext(arrays, items, users, live)
    )
