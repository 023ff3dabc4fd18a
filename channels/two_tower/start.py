"""Where an update starts: the weights of the last model, moved to the rows and codes of today's data."""

from __future__ import annotations

from collections.abc import Mapping

from channels.two_tower.bundle import Bundle
from engine.core.errors import BuildError
from engine.core.types import AnyArray, Int64Array
from engine.models.features import Encoder, moved_codes
from engine.models.spec import Feature, ModelSpec, Side

OTHER_TOWERS = (
    "{channel}: the last model has other towers ({what}), so it cannot be trained on; build with mode full"
)


def carried_over(
    channel: str,
    spec: ModelSpec,
    encoders: tuple[Encoder, Encoder],
    item_keys: Int64Array,
    previous: Bundle,
    arrays: Mapping[str, AnyArray],
) -> dict[str, AnyArray]:
    """Return the last model's parameters in the shapes of the new one.

    Dense parameters stay as they are. Of a table of embeddings each value keeps its row, found by its id or string; what
    is new begins as code 0, missing.

    Args:
        channel: its name, for errors.
        spec: of the new model.
        encoders: of its users and items.
        item_keys: int64[items], the key of each item's id.
        previous: the last model.
        arrays: its snapshot.

    Raises:
        BuildError: the two are of different towers.
    """
    new, old = (without_sizes(each) for each in (spec, previous.spec))
    if new != old:
        what = next(name for name in ModelSpec.model_fields if getattr(new, name) != getattr(old, name))
        raise BuildError(OTHER_TOWERS.format(channel=channel, what=what))
    start = {name: array for name, array in arrays.items() if name.startswith(("user.", "item."))}
    sides: tuple[tuple[Side, Encoder, Encoder], ...] = (
        ("user", encoders[0], previous.user_encoder),
        ("item", encoders[1], previous.item_encoder),
    )
    for side, mine, theirs in sides:
        for at, feature in enumerate(mine.features):
            if feature.floats:
                continue
            moved = mine.moved(at, theirs, at)
            if moved is None:
                raise BuildError(OTHER_TOWERS.format(channel=channel, what=f"{side}_features.{at}"))
            name = f"{side}.embeddings.{at}.weight"
            start[name] = start[name][moved]
    own = "user.sequence.items.weight"
    if own in start:
        start[own] = start[own][moved_codes(item_keys, previous.item_keys)]
    return start


def without_sizes(spec: ModelSpec) -> ModelSpec:
    """Return the towers as a configuration declares them: sizes of tables that are not, are 0."""

    def sizeless(features: tuple[Feature, ...]) -> tuple[Feature, ...]:
        return tuple(
            feature if feature.lookup == "hash" else feature.model_copy(update={"size": 0})
            for feature in features
        )

    changed = {
        "user_features": sizeless(spec.user_features),
        "item_features": sizeless(spec.item_features),
        "items": 0,
    }
    return spec.model_copy(update=changed)
