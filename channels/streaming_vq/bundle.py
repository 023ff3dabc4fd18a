"""A trained streaming VQ model as a snapshot holds it.

Arrays besides the parameters (`engine/models/vq_spec.py`) and the lists (`engine/models/cluster_lists.py`): `spec` uint8,
the `VqSpec` as JSON; `learnt_until` int64[1]; `item_keys` int64[items], the key of each item's id; `features.<side>.*`,
what the encoders learnt; `encoded.<side>.*`, all rows of the catalogue encoded; `log_position` uint8, text, up to where
the assignment log is in it: empty in a build, which begins a log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from channels.streaming_vq.lists import ClusterLists
from channels.streaming_vq.options import StreamingVqOptions
from channels.two_tower.bundle import keys_of_items
from engine.core.channel import BuildContext
from engine.core.errors import SnapshotError
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.models.cluster_lists import as_served
from engine.models.codebook import Codebook, sizes_of
from engine.models.encoded import Encoded
from engine.models.features import Encoder, load_encoded, save_encoded
from engine.models.spec import ModelSpec, Towers
from engine.models.vq_spec import PUBLISHED, VqSpec


class Bundle:
    """A trained model as a snapshot holds it.

    Attributes:
        spec: what it is made of.
        learnt_until: the time of the newest like it was trained on, seconds since the epoch.
        item_keys: int64[items], the key of each item's id.
        user_encoder, item_encoder: how rows are encoded.
        users, items: all rows of the build's catalogue, encoded.
        published: int64[m], keys of the items published since that a trainer has rows of; none after a build.
    """

    def __init__(self, arrays: Mapping[str, AnyArray]) -> None:
        try:
            self.spec = VqSpec.model_validate_json(bytes(arrays["spec"]))
            self.learnt_until = int(arrays["learnt_until"][0])
            self.item_keys: Int64Array = arrays["item_keys"]
            self.user_encoder = Encoder.load("user", self.spec.tower.user_features, arrays)
            self.item_encoder = Encoder.load("item", self.spec.tower.item_features, arrays)
            self.users = load_encoded(arrays, "encoded.user")
            self.items = load_encoded(arrays, "encoded.item")
        except (KeyError, ValueError) as error:
            raise SnapshotError(f"no bundle of streaming VQ: {error}", "spec") from error
        spec, items = self.spec, self.spec.tower.items
        k, d = spec.clusters, spec.tower.dimension
        self.sums: Float32Array = _array(arrays, "codebook.sums", np.float32, k, d)
        self.counts: Float32Array = _array(arrays, "codebook.counts", np.float32, k)
        self.vectors: Float32Array = _array(arrays, "codebook.vectors", np.float32, k, d)
        self.assignment: Int32Array = _array(arrays, "assignment", np.int32, items)
        self.item_bias: Float32Array = _array(arrays, "item_bias", np.float32, items)
        self.code_bias: Float32Array = _array(arrays, "bias.weight", np.float32, items + 1)
        self.offsets: Int64Array = _array(arrays, "lists.offsets", np.int64, k + 1)
        self.rows: Int32Array = _array(arrays, "lists.rows", np.int32, items)
        self.places: Int32Array = _array(arrays, "lists.places", np.int32, items)
        self.list_bias: Float32Array = _array(arrays, "lists.bias", np.float32, items)
        if self.debiases:
            self.secondary: Int32Array = _array(arrays, "secondary", np.int32, k)
        self.published: Int64Array = arrays.get(f"{PUBLISHED}keys", np.empty(0, np.int64))
        if self.published.size and spec.rank != "none":
            m, e, tasks = self.published.size, spec.rank_dimension, len(spec.tasks)
            self.published_vectors: Float32Array = _array(
                arrays, f"{PUBLISHED}rank.item_vectors", np.float32, m, e
            )
            self.published_bias: Float32Array = _array(
                arrays, f"{PUBLISHED}rank.item_bias", np.float32, m, tasks
            )
        self._check_lists()

    def _check_lists(self) -> None:
        """Refuse lists that a merge would leave the arrays by."""
        items, offsets = self.spec.tower.items, self.offsets
        if offsets[0] != 0 or offsets[-1] > items or (np.diff(offsets) < 0).any():
            raise SnapshotError(f"no offsets into {items:,} entries", "lists.offsets")
        for name, each in (("lists.rows", self.rows), ("lists.places", self.places)):
            if each.size and not 0 <= each.min() <= each.max() < items:
                raise SnapshotError(f"names items that are none of {items:,}", name)
        for name, values in (("codebook.vectors", self.vectors), ("lists.bias", self.list_bias)):
            if not np.isfinite(values).all():
                raise SnapshotError("has a value that is no number", name)

    @property
    def debiases(self) -> bool:
        """Whether the ranking step reads histories without their fullest coarser clusters."""
        return self.spec.rank == "complex" and self.spec.dropped_clusters > 0

    def lists(self) -> ClusterLists:
        """The clusters' lists, mapped, nothing assigned since."""
        return ClusterLists(self.offsets, self.rows, self.places, self.list_bias)

    def codebook(self, config: StreamingVqOptions) -> Codebook:
        """The clusters as items are assigned to them."""
        training, sizes = config.training, sizes_of(self.assignment, self.spec.clusters)
        return Codebook(self.sums, self.counts, training.decay, training.boost, training.crowding, sizes)


def _array(arrays: Mapping[str, AnyArray], name: str, dtype: type, *shape: int) -> Any:
    """Return an array, held to its type and shape."""
    array = arrays.get(name)
    if array is None:
        raise SnapshotError("the model's specification needs it, and it is not there", name)
    if array.dtype != dtype or array.shape != shape:
        raise SnapshotError(
            f"is {array.dtype}{list(array.shape)}, the model's specification says {np.dtype(dtype)}{list(shape)}",
            name,
        )
    return array


def specified(
    config: StreamingVqOptions, context: BuildContext, previous: Bundle | None
) -> tuple[VqSpec, tuple[Encoder, Encoder]]:
    """Return the specification with every size in it, and the encoders of users and items."""
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
    towers = {name: getattr(config, name) for name in Towers.model_fields}
    towers |= {"user_features": user.features, "item_features": item.features}
    return config.spec_of(ModelSpec(**towers, items=liked.items)), (user, item)


def encoded_rows(context: BuildContext, encoders: tuple[Encoder, Encoder]) -> tuple[Encoded, Encoded]:
    """Return all users and all items, encoded."""
    liked = context.interactions
    return (
        encoders[0].encode(context.user_columns, np.arange(liked.users, dtype=np.int32)),
        encoders[1].encode(context.item_columns, np.arange(liked.items, dtype=np.int32)),
    )


def write_bundle(
    context: BuildContext,
    spec: VqSpec,
    encoders: tuple[Encoder, Encoder],
    encoded: tuple[Encoded, Encoded],
    trained: Mapping[str, AnyArray],
) -> None:
    """Make the lists and write everything to `context.sink`.

    Args:
        context: of the build.
        spec: what the model is made of.
        encoders: of users and items.
        encoded: all users and all items.
        trained: what `engine.training.streaming_vq.train_streaming` gives.
    """
    sink = context.sink
    sink.write("spec", np.frombuffer(spec.model_dump_json().encode(), np.uint8))
    sink.write("learnt_until", np.array([context.now], np.int64))
    sink.write("item_keys", keys_of_items(context))
    sink.write("log_position", np.empty(0, np.uint8))
    for encoder, table in zip(encoders, encoded, strict=True):
        encoder.save(sink)
        save_encoded(sink, f"encoded.{encoder.side}", table)
    for name, array in as_served(spec, trained).items():
        sink.write(name, np.ascontiguousarray(array))
