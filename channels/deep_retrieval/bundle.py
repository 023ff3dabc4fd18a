"""A trained Deep Retrieval model as a snapshot holds it: user tower, lattice, lists of the paths, ranker.

Arrays besides the parameters (`user.*`: `engine/models/spec.py`; `paths.*`: `engine/models/paths.py`):

| name | type | what |
|---|---|---|
| `spec` | uint8 | the `DeepRetrievalSpec` as JSON |
| `learnt_until` | int64[1] | the time of the newest like, seconds since the epoch |
| `item_keys` | int64[items] | the key of each item's id |
| `features.<side>.*`, `encoded.<side>.*` | | what the encoders learnt, and all users and items encoded |
| `assignment` | int64[items, J] | codes of each item's paths, -1 behind them where there are fewer |
| `lists.paths`, `lists.offsets`, `lists.rows` | int64[P], int64[P + 1], int32 | paths that have items, and these |
| `lists.vectors`, `lists.scales` | int8[n, e rounded up to 16], float32[n] | the ranker's, in bytes, as `lists.rows` |
| `lists.bias` | float32[n] | the ranker's, in that order |
| `scores.paths`, `scores.values` | int64, float32 [items, S] | paths whose scores are kept, -1 where fewer |
| `rank.vectors`, `rank.bias` | float32 [items, e], [items] | the ranker |
| `similar.offsets`, `similar.items` | int64[groups + 1], int32 | who speaks for each group (`placement.py`) |
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from channels.deep_retrieval.lists import invert
from channels.deep_retrieval.options import DeepRetrievalOptions
from channels.deep_retrieval.placement import Placement, members_of
from channels.two_tower.bundle import keys_of_items
from engine.core.channel import BuildContext
from engine.core.errors import SnapshotError
from engine.core.options import Options
from engine.core.types import AnyArray, Float32Array, Int8Array, Int32Array, Int64Array
from engine.models.features import Encoder, load_encoded, save_encoded, take_encoded
from engine.models.paths import PathSpec
from engine.models.spec import Feature, ModelSpec, Towers
from engine.models.tiles import in_wide_bytes, widened

_PLACED_AT_ONCE = 65_536


class DeepRetrievalSpec(Options):
    """What a snapshot of the channel is made of."""

    tower: ModelSpec
    """The user tower; it says how many items there are."""

    lattice: PathSpec
    """The paths and their networks."""

    item_features: tuple[Feature, ...] = ()
    """By which items are similar, with their sizes."""

    paths: int = Field(ge=1)
    """J, paths of an item at most."""

    kept_paths: int = Field(ge=1)
    """S, paths whose scores are kept for each item."""


class Bundle:
    """A trained model as a snapshot holds it.

    Attributes:
        spec: what it is made of.
        learnt_until: the time of the newest like it was trained on, seconds since the epoch.
        item_keys: int64[items], the key of each item's id.
        user_encoder, item_encoder: how rows are encoded.
        users, items: all rows of the build's catalogue, encoded.
        assignment, score_paths, score_values, codes, offsets, rows, vectors, bias: as the module says.
        list_vectors, list_scales, list_bias: `lists.vectors`, `lists.scales` and `lists.bias`.
        group_offsets, group_items: who speaks for each group.
    """

    def __init__(self, arrays: Mapping[str, AnyArray]) -> None:
        try:
            self.spec = DeepRetrievalSpec.model_validate_json(bytes(arrays["spec"]))
            self.learnt_until = int(arrays["learnt_until"][0])
            self.item_keys: Int64Array = arrays["item_keys"]
            self.user_encoder = Encoder.load("user", self.spec.tower.user_features, arrays)
            self.item_encoder = Encoder.load("item", self.spec.item_features, arrays)
            self.users = load_encoded(arrays, "encoded.user")
            self.items = load_encoded(arrays, "encoded.item")
        except (KeyError, ValueError) as error:
            raise SnapshotError(f"no bundle of Deep Retrieval: {error}", "spec") from error
        spec = self.spec
        items, e = spec.tower.items, spec.lattice.dimension
        kept = (items, spec.kept_paths)
        self.assignment: Int64Array = _array(arrays, "assignment", np.int64, items, spec.paths)
        self.score_paths: Int64Array = _array(arrays, "scores.paths", np.int64, *kept)
        self.score_values: Float32Array = _array(arrays, "scores.values", np.float32, *kept)
        self.vectors: Float32Array = _array(arrays, "rank.vectors", np.float32, items, e)
        self.bias: Float32Array = _array(arrays, "rank.bias", np.float32, items)
        self.codes: Int64Array = _array(arrays, "lists.paths", np.int64, None)
        self.offsets: Int64Array = _array(arrays, "lists.offsets", np.int64, self.codes.size + 1)
        self.rows: Int32Array = _array(arrays, "lists.rows", np.int32, None)
        t = self.rows.size
        self.list_vectors: Int8Array = _array(arrays, "lists.vectors", np.int8, t, widened(e))
        self.list_scales: Float32Array = _array(arrays, "lists.scales", np.float32, t)
        self.list_bias: Float32Array = _array(arrays, "lists.bias", np.float32, t)
        groups = sum(feature.size for feature in spec.item_features)
        self.group_offsets: Int64Array = _array(arrays, "similar.offsets", np.int64, groups + 1)
        self.group_items: Int32Array = _array(arrays, "similar.items", np.int32, None)
        self._check_lists()

    def _check_lists(self) -> None:
        """Refuse lists that a search would leave the arrays by."""
        items, paths = self.spec.tower.items, self.spec.lattice.paths
        codes, rows = self.codes, self.rows
        if codes.size and not (codes[0] >= 0 and codes[-1] < paths and (np.diff(codes) > 0).all()):
            raise SnapshotError(f"not rising codes of {paths:,} paths", "lists.paths")
        for name, offsets, whole in (
            ("lists.offsets", self.offsets, rows.size),
            ("similar.offsets", self.group_offsets, self.group_items.size),
        ):
            if offsets[0] != 0 or offsets[-1] != whole or (np.diff(offsets) < 0).any():
                raise SnapshotError(f"no offsets into {whole:,} entries", name)
        for name, each in (("lists.rows", rows), ("similar.items", self.group_items)):
            if each.size and not 0 <= each.min() <= each.max() < items:
                raise SnapshotError(f"names items that are none of {items:,}", name)

    @property
    def placement(self) -> Placement:
        """How items without events are placed."""
        return Placement(
            self.spec.item_features,
            self.group_offsets,
            self.group_items,
            self.score_paths,
            self.score_values,
            self.codes,
            self.vectors,
            self.bias,
        )


def _array(arrays: Mapping[str, AnyArray], name: str, dtype: type, *shape: int | None) -> AnyArray:
    """Return an array, held to its type and shape (None: any length)."""
    array = arrays.get(name)
    if array is None:
        raise SnapshotError("the model's specification needs it, and it is not there", name)
    fits = array.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        wanted = [("n" if want is None else want) for want in shape]
        raise SnapshotError(
            f"is {array.dtype}{list(array.shape)}, the model's specification says "
            f"{np.dtype(dtype)}[{', '.join(map(str, wanted))}]",
            name,
        )
    return array


def specified(
    config: DeepRetrievalOptions, context: BuildContext, previous: Bundle | None
) -> tuple[DeepRetrievalSpec, Encoder, Encoder]:
    """Return the specification with every size in it, and the encoders of users and items."""
    liked = context.interactions
    user = Encoder.fit(
        "user",
        config.user_features,
        liked.users,
        context.user_columns,
        "user_features",
        None if previous is None else previous.user_encoder,
    )
    item = Encoder.fit(
        "item",
        config.item_features,
        liked.items,
        context.item_columns,
        "item_features",
        None if previous is None else previous.item_encoder,
    )
    towers = {name: getattr(config.towers, name) for name in Towers.model_fields}
    tower = ModelSpec(**towers | {"user_features": user.features}, items=liked.items)
    spec = DeepRetrievalSpec(
        tower=tower,
        lattice=config.lattice,
        item_features=item.features,
        paths=config.paths,
        kept_paths=config.kept_paths,
    )
    return spec, user, item


def write_bundle(
    context: BuildContext,
    spec: DeepRetrievalSpec,
    user_encoder: Encoder,
    item_encoder: Encoder,
    trained: Mapping[str, AnyArray],
) -> None:
    """Place the items without an event, make the lists, and write everything to `context.sink`.

    Args:
        context: of the build.
        spec: what the model is made of.
        user_encoder, item_encoder: of users and items.
        trained: what `engine.training.deep_retrieval.train_paths` gives.
    """
    sink = context.sink
    liked = context.interactions
    users = user_encoder.encode(context.user_columns, np.arange(liked.users, dtype=np.int32))
    items = item_encoder.encode(context.item_columns, np.arange(liked.items, dtype=np.int32))
    likes = liked.item_counts().astype(np.int64)
    assignment = np.array(trained["assignment"], np.int64)
    vectors, bias = (np.array(trained[name], np.float32) for name in ("rank.vectors", "rank.bias"))
    score_paths, score_values = trained["scores.paths"], trained["scores.values"]
    cold = np.flatnonzero(likes == 0).astype(np.int32)
    assignment[cold] = -1
    placed = (assignment >= 0).sum(1)
    groups = members_of(spec.item_features, items, likes, placed)
    if cold.size and spec.item_features:
        codes = np.unique(assignment[assignment >= 0])
        placement = Placement(
            spec.item_features, *groups, score_paths, score_values, codes, vectors.copy(), bias.copy()
        )
        for start in range(0, cold.size, _PLACED_AT_ONCE):
            rows = cold[start : start + _PLACED_AT_ONCE]
            places, means, level = placement.place(take_encoded(items, rows), spec.paths)
            found = places[:, 0] >= 0
            rows, places = rows[found], places[found]
            assignment[rows] = np.where(places >= 0, codes[places], -1)
            vectors[rows], bias[rows] = means[found], level[found]
    made = dict(trained) | {"assignment": assignment, "rank.vectors": vectors, "rank.bias": bias}
    made |= dict(zip(("lists.paths", "lists.offsets", "lists.rows"), invert(assignment), strict=True))
    rows = made["lists.rows"]
    made["lists.vectors"], made["lists.scales"] = in_wide_bytes(vectors, rows)
    made["lists.bias"] = bias[rows]
    made |= dict(zip(("similar.offsets", "similar.items"), groups, strict=True))
    sink.write("spec", np.frombuffer(spec.model_dump_json().encode(), np.uint8))
    sink.write("learnt_until", np.array([context.now], np.int64))
    sink.write("item_keys", keys_of_items(context))
    for encoder, table in ((user_encoder, users), (item_encoder, items)):
        encoder.save(sink)
        save_encoded(sink, f"encoded.{encoder.side}", table)
    for name, array in made.items():
        sink.write(name, np.ascontiguousarray(array))
