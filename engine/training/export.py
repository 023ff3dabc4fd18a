"""From trained towers to the arrays that serving reads."""

from __future__ import annotations

import numpy as np
import torch

from engine.core.types import AnyArray, Float32Array, Int32Array
from engine.models.encoded import Encoded, Multi
from engine.models.spec import ModelSpec, Side
from engine.training.tensors import Features
from engine.training.towers import ItemTower, UserTower

BLOCK = 8192
"""Items whose vectors are computed at once."""


def arrays(spec: ModelSpec, user: UserTower, item: ItemTower, items: Encoded) -> dict[str, AnyArray]:
    """Return `user.<parameter>`, `item.<parameter>` and `item_vectors`, float32.

    Args:
        spec: of the towers.
        user, item: the trained towers.
        items: the features of the whole catalogue.
    """
    made: dict[str, AnyArray] = {}
    sides: tuple[tuple[Side, UserTower | ItemTower], ...] = (("user", user), ("item", item))
    for side, tower in sides:
        for name, value in tower.state_dict().items():
            made[f"{side}.{name}"] = value.detach().cpu().numpy().astype(np.float32, copy=True)
    made["item_vectors"] = item_vectors(spec, item, items)
    return made


def item_vectors(spec: ModelSpec, tower: ItemTower, items: Encoded) -> Float32Array:
    """Return float32[items, dimension], computed a block at a time."""
    device = next(tower.parameters()).device
    vectors = np.empty((len(items), spec.dimension), np.float32)
    was = tower.training
    tower.eval()
    with torch.no_grad():
        for begin in range(0, len(items), BLOCK):
            rows = np.arange(begin, min(begin + BLOCK, len(items)), dtype=np.int32)
            vectors[begin : begin + rows.size] = tower(Features.of(taken(items, rows), device)).cpu().numpy()
    tower.train(was)
    return vectors


def taken(encoded: Encoded, rows: Int32Array) -> Encoded:
    """Return some rows of the features, in the order of `rows`."""
    multi = []
    for many in encoded.multi:
        begins = many.offsets[rows]
        lengths = many.offsets[rows + 1] - begins
        offsets = np.zeros(rows.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        at = np.arange(int(offsets[-1])) + np.repeat(begins - offsets[:-1], lengths)
        multi.append(Multi(many.codes[at], offsets))
    return Encoded(encoded.codes[rows], tuple(multi), encoded.numbers[rows])


def mean_for_unknown(spec: ModelSpec, user: UserTower, item: ItemTower) -> None:
    """Give code 0 of every table that training never hid the mean of its rows.

    Hiding (`feature_dropout`) trains code 0 where a tower reads something else beside. An id that is all a tower reads is
    not hidden; one that nobody knows is then taken for an average one.
    """
    towers: tuple[UserTower | ItemTower, ...] = (user, item)
    with torch.no_grad():
        sides: tuple[Side, Side] = ("user", "item")
        for tower, side in zip(towers, sides, strict=True):
            if reads_one(spec, side) and "0" in tower.embeddings:
                # A trainer that follows has rows beyond the specification's, for items to come.
                known = tower.embeddings["0"].weight[1 : spec.features(side)[0].size]
                if known.shape[0]:
                    tower.embeddings["0"].weight[0] = known.mean(0)


def reads_one(spec: ModelSpec, side: Side) -> bool:
    """Return whether the tower's one feature is all that it reads."""
    return len(spec.features(side)) == 1 and not (side == "user" and spec.sequence.kind != "none")
