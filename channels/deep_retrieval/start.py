"""Where an update starts: the last model's parameters, scores and paths, moved to the rows and codes of today's data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from channels.deep_retrieval.bundle import Bundle, DeepRetrievalSpec
from engine.core.errors import BuildError
from engine.core.types import AnyArray, Int64Array
from engine.models.features import Encoder, moved_codes
from engine.models.spec import Feature

OTHER_MODEL = (
    "{channel}: the last model is another one ({what}), so it cannot be trained on; build with mode full"
)


def carried_over(
    channel: str,
    spec: DeepRetrievalSpec,
    user_encoder: Encoder,
    item_keys: Int64Array,
    previous: Bundle,
    arrays: Mapping[str, AnyArray],
) -> dict[str, AnyArray]:
    """Return the last training's arrays in the shapes of the new one.

    Of tables each value keeps its row, found by its id or string. An item that is new has zeros for a vector, the bias of
    the least likely item, no scores, and no path: training begins it on random ones.

    Args:
        channel: its name, for errors.
        spec: of the new model.
        user_encoder: of its users.
        item_keys: int64[items], the key of each item's id.
        previous: the last model.
        arrays: its snapshot.

    Raises:
        BuildError: the two are of different towers or lattices, or of different J or S.
    """
    for name in ("lattice", "paths", "kept_paths"):
        if getattr(spec, name) != getattr(previous.spec, name):
            raise BuildError(OTHER_MODEL.format(channel=channel, what=name))
    new, old = (_without_sizes(each) for each in (spec, previous.spec))
    if new != old:
        what = next(name for name in new if new[name] != old[name])
        raise BuildError(OTHER_MODEL.format(channel=channel, what=what))
    start = {name: array for name, array in arrays.items() if name.startswith(("user.", "paths."))}
    for at, feature in enumerate(user_encoder.features):
        if feature.floats:
            continue
        moved = user_encoder.moved(at, previous.user_encoder, at)
        if moved is None:
            raise BuildError(OTHER_MODEL.format(channel=channel, what=f"user_features.{at}"))
        name = f"user.embeddings.{at}.weight"
        start[name] = start[name][moved]
    codes = moved_codes(item_keys, previous.item_keys)
    own = "user.sequence.items.weight"
    if own in start:
        start[own] = start[own][codes]
    rows = codes[1:] - 1
    new_items = rows < 0
    least = previous.bias.min() if previous.bias.size else np.float32(0)
    for name, array, missing in (
        ("rank.vectors", previous.vectors, np.float32(0)),
        ("rank.bias", previous.bias, least),
        ("assignment", previous.assignment, np.int64(-1)),
        ("scores.paths", previous.score_paths, np.int64(-1)),
        ("scores.values", previous.score_values, np.float32(0)),
    ):
        taken = array[rows] if len(array) else np.empty((rows.size, *array.shape[1:]), array.dtype)
        taken[new_items] = missing
        start[name] = taken
    return start


def _without_sizes(spec: DeepRetrievalSpec) -> dict[str, object]:
    def sizeless(feature: Feature) -> Feature:
        return feature if feature.lookup == "hash" else feature.model_copy(update={"size": 0})

    tower = spec.tower.model_copy(
        update={"user_features": tuple(map(sizeless, spec.tower.user_features)), "items": 0}
    )
    return {name: getattr(tower, name) for name in type(tower).model_fields}
