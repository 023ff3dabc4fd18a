"""What a training is given."""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.interactions import Interactions
from engine.core.types import BoolArray, Float32Array, Int32Array
from engine.models.encoded import Encoded


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Positives, features, and where hard negatives come from.

    Attributes:
        interactions: users x items, newest first: who liked what.
        users: the features of all users, encoded.
        items: the features of all items, encoded.
        weights: float32[entries], how much each positive counts (multi-objective weights); None: all alike.
        clusters: int32[items], the cluster of each item; needed for `cluster` negatives, and where the user tower has
            prompts, whose tasks they are.
        rejects: users x items, what ranking threw out; needed for `reject` negatives.
        examples: bool[entries], which entries are learnt as positives (those of an incremental update); None: all. The
            others are history only.
    """

    interactions: Interactions
    users: Encoded
    items: Encoded
    weights: Float32Array | None = None
    clusters: Int32Array | None = None
    rejects: Interactions | None = None
    examples: BoolArray | None = None
