"""A trained model as a snapshot holds it: towers, encoders, item vectors and their index, of one training.

`engine/models/spec.py` names the parameters. Besides them: `spec` uint8, the `ModelSpec` as JSON; `run` uint8, which the
index has in its header too; `learnt_until` int64[1]; `item_keys` int64[items]; `features.<side>.*`, what the encoders
learnt; `encoded.<side>.*`, all rows of the catalogue encoded; `item_vectors` float32[items, d]; `index.*`. Where the user
tower has a prompt per cluster, there are `clusters` int32[items], and per cluster k `cluster.<k>.vectors`, `index.<k>.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Self

import numpy as np

from channels.two_tower.options import TwoTowerOptions
from engine.ann import IndexKind, VectorIndex, build_index, load_index
from engine.core.channel import BuildContext
from engine.core.errors import SnapshotError
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.models.encoded import Encoded
from engine.models.features import Encoder, load_encoded, save_encoded
from engine.models.spec import ModelSpec, Towers

EXACT_BELOW = 4096
"""In a cluster of fewer items every vector is compared, whatever the kind of index."""


class Bundle:
    """A trained model as a snapshot holds it.

    Attributes:
        spec: the towers.
        run: which training it comes from.
        learnt_until: the time of the newest like it was trained on, seconds since the epoch.
        item_keys: int64[items], the key of each item's id.
        user_encoder, item_encoder: how rows are encoded.
        users, items: all rows of the build's catalogue, encoded.
        vectors: float32[items, d].
        index: of these vectors; None where the bundle is only read to train on.
    """

    def __init__(self, arrays: Mapping[str, AnyArray]) -> None:
        try:
            self.spec = ModelSpec.model_validate_json(bytes(arrays["spec"]))
            self.run = bytes(arrays["run"]).decode()
            self.learnt_until = int(arrays["learnt_until"][0])
            self.item_keys = arrays["item_keys"]
            self.user_encoder = Encoder.load("user", self.spec.user_features, arrays)
            self.item_encoder = Encoder.load("item", self.spec.item_features, arrays)
            self.users = load_encoded(arrays, "encoded.user")
            self.items = load_encoded(arrays, "encoded.item")
            self.vectors: Float32Array = arrays["item_vectors"]
        except (KeyError, ValueError) as error:
            raise SnapshotError(f"no bundle of a two-tower model: {error}", "spec") from error
        shape = (self.spec.items, self.spec.dimension)
        if self.vectors.shape != shape or self.vectors.dtype != np.float32:
            raise SnapshotError(
                f"is {self.vectors.dtype}{list(self.vectors.shape)}, the model's specification says "
                f"float32{list(shape)}",
                "item_vectors",
            )
        self.index: VectorIndex | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, AnyArray], config: TwoTowerOptions | None = None) -> Self:
        """Read a bundle; with the options its index too.

        Raises:
            SnapshotError: as `TwoTower.load`.
        """
        bundle = cls(arrays)
        if config is not None:
            bundle.load_indexes(arrays, config)
        return bundle

    def load_indexes(self, arrays: Mapping[str, AnyArray], config: TwoTowerOptions) -> None:
        """Read the index; SnapshotError as `TwoTower.load`."""
        self.index = self._index(arrays, "index.", self.vectors, config)

    def _index(
        self, arrays: Mapping[str, AnyArray], prefix: str, vectors: Float32Array, config: TwoTowerOptions
    ) -> VectorIndex:
        own = {name.removeprefix(prefix): each for name, each in arrays.items() if name.startswith(prefix)}
        return load_index(own, vectors, config.index_options, self.run)


def encoders_of(
    config: TwoTowerOptions, context: BuildContext, previous: Bundle | None, prompts: int = 0
) -> tuple[ModelSpec, Encoder, Encoder]:
    """Return the specification with every size in it, and the encoders of both sides."""
    liked = context.interactions
    user = Encoder.fit(
        "user",
        config.features("user"),
        liked.users,
        context.user_columns,
        "user_features",
        None if previous is None else previous.user_encoder,
    )
    item = Encoder.fit(
        "item",
        config.features("item"),
        liked.items,
        context.item_columns,
        "item_features",
        None if previous is None else previous.item_encoder,
    )
    towers: dict[str, Any] = {name: getattr(config, name) for name in Towers.model_fields}
    towers |= {"user_features": user.features, "item_features": item.features}
    return ModelSpec(**towers, items=liked.items, prompts=prompts), user, item


def keys_of_items(context: BuildContext) -> Int64Array:
    """int64[items]: the key of each item's id, or its row where the build knows no ids."""
    rows = np.arange(context.interactions.items, dtype=np.int64)
    keys: Int64Array = context.item_columns.get("item_id.keys", rows)
    return keys


def write_bundle(
    config: TwoTowerOptions,
    context: BuildContext,
    spec: ModelSpec,
    encoders: tuple[Encoder, Encoder],
    encoded: tuple[Encoded, Encoded],
    arrays: Mapping[str, AnyArray],
    clusters: Int32Array | None = None,
) -> None:
    """Build the index, or one per cluster, and write everything to `context.sink`.

    Args:
        config, context: of the build.
        spec: of the towers.
        encoders: of users and items.
        encoded: all users and all items.
        arrays: `user.*`, `item.*` and `item_vectors`.
        clusters: int32[items], where the user tower has a prompt per cluster.

    Raises:
        BuildError: a vector is not finite.
    """
    run = _run_of(arrays)
    vectors = np.ascontiguousarray(arrays["item_vectors"])
    sink = context.sink
    sink.write("spec", np.frombuffer(spec.model_dump_json().encode(), np.uint8))
    sink.write("run", np.frombuffer(run.encode(), np.uint8))
    sink.write("learnt_until", np.array([context.now], np.int64))
    sink.write("item_keys", keys_of_items(context))
    for encoder, table in zip(encoders, encoded, strict=True):
        encoder.save(sink)
        save_encoded(sink, f"encoded.{encoder.side}", table)
    for name, array in arrays.items():
        sink.write(name, array)
    if clusters is None:
        _write_index(config, context, run, "index", config.index, vectors)
        return
    sink.write("clusters", clusters)
    for cluster in range(spec.prompts):
        # Its vectors are stored once more, together, so that they are mapped and not copied by whoever serves.
        part = vectors[clusters == cluster]
        sink.write(f"cluster.{cluster}.vectors", part)
        kind = config.index if len(part) >= EXACT_BELOW else "exact"
        _write_index(config, context, run, f"index.{cluster}", kind, part)


def _write_index(
    config: TwoTowerOptions,
    context: BuildContext,
    run: str,
    name: str,
    kind: IndexKind,
    vectors: Float32Array,
) -> None:
    index = build_index(kind, vectors, config.index_options, context.threads, context.progress, run)
    for part, array in index.arrays().items():
        context.sink.write(f"{name}.{part}", array)


def _run_of(arrays: Mapping[str, AnyArray]) -> str:
    """Name a run by what came out of it, so that equal trainings have equal names."""
    digest = blake2b(digest_size=12)
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
