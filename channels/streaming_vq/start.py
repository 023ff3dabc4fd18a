"""Where an update starts: the last model's parameters, clusters and assignment, moved to the rows of today's data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from channels.streaming_vq.bundle import Bundle
from channels.two_tower.start import without_sizes
from engine.core.errors import BuildError
from engine.core.types import AnyArray, Int64Array
from engine.models.cluster_lists import PREFIX
from engine.models.features import Encoder, moved_codes
from engine.models.spec import Side
from engine.models.vq_spec import PUBLISHED, VqSpec

OTHER_MODEL = (
    "{channel}: the last model is another one ({what}), so it cannot be trained on; build with mode full"
)

_LEARNT = ("user.", "user_", "item.", "bias.", "codebook.", "rank.")
_TABLES = ("bias.weight", "rank.items.weight", "rank.bias.weight")


def carried_over(
    channel: str,
    spec: VqSpec,
    encoders: tuple[Encoder, Encoder],
    item_keys: Int64Array,
    previous: Bundle,
    arrays: Mapping[str, AnyArray],
) -> dict[str, AnyArray]:
    """Return the last training's arrays in the shapes of the new one.

    Of tables each value keeps its row, found by its id or string; what is new begins as code 0, and in no cluster. An
    item that a trainer has met since, while it followed, keeps the row that it got there. The clusters stay as they are.

    Args:
        channel: its name, for errors.
        spec: of the new model.
        encoders: of its users and items.
        item_keys: int64[items], the key of each item's id.
        previous: the last model.
        arrays: its snapshot.

    Raises:
        BuildError: the two are of different towers, clusters, tasks or ranking steps.
    """
    new, old = (
        each.model_copy(update={"tower": without_sizes(each.tower)}) for each in (spec, previous.spec)
    )
    for name in VqSpec.model_fields:
        if getattr(new, name) != getattr(old, name):
            raise BuildError(OTHER_MODEL.format(channel=channel, what=name))
    start = {
        name: array
        for name, array in arrays.items()
        if name.startswith(_LEARNT) and not name.startswith(PREFIX)
    }
    sides: tuple[tuple[Side, tuple[str, ...], Encoder, Encoder], ...] = (
        ("user", spec.user_names, encoders[0], previous.user_encoder),
        ("item", ("item",), encoders[1], previous.item_encoder),
    )
    for side, names, mine, theirs in sides:
        for at, feature in enumerate(mine.features):
            if feature.floats:
                continue
            moved = mine.moved(at, theirs, at)
            if moved is None:
                raise BuildError(OTHER_MODEL.format(channel=channel, what=f"{side}_features.{at}"))
            for name in names:
                table = f"{name}.embeddings.{at}.weight"
                start[table] = start[table][moved]
    codes = moved_codes(item_keys, previous.item_keys)
    tables = [f"{name}.sequence.{part}" for name in spec.user_names for part in ("items.weight", "weights")]
    for table in (*tables, *_TABLES):
        if table in start:
            start[table] = start[table][codes]
    # What was published since the last build, and is in this one, goes on from what the trainer learnt of it.
    places = moved_codes(item_keys, previous.published)[1:] - 1
    late = np.flatnonzero(places >= 0)
    for name in start:
        if PUBLISHED + name in arrays and late.size:
            start[name][1 + late] = arrays[PUBLISHED + name][places[late]]
    # Code 0 is nobody: in no cluster, and with the bias of whoever is not known.
    start["assignment"] = np.append(np.int32(-1), previous.assignment)[codes[1:]].astype(np.int32)
    start["item_bias"] = np.append(previous.code_bias[0], previous.item_bias)[codes[1:]].astype(np.float32)
    return start
