"""The towers as torch modules: `engine/models/spec.py` has the formulas and the names; a test holds both sides equal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engine.core.types import Int64Array
from engine.models.spec import ModelSpec, Side, tower_shape
from engine.training.layers import DeepCross, Fibinet, Senet, dropped, linear, table_of, unit
from engine.training.pooling import pooled
from engine.training.sequences import SequenceEncoder
from engine.training.tensors import Features, Packed


def build_user_tower(spec: ModelSpec, dropout: float = 0.0) -> UserTower:
    """Return the user tower of a specification, freshly initialised from torch's random generator."""
    return UserTower(spec, dropout)


def build_item_tower(spec: ModelSpec, dropout: float = 0.0) -> ItemTower:
    """Return the item tower of a specification, freshly initialised from torch's random generator."""
    return ItemTower(spec, dropout)


class _Tower(nn.Module):
    """What both towers share: embeddings, cross, MLP, and the length of the result."""

    def __init__(self, spec: ModelSpec, side: Side, dropout: float) -> None:
        super().__init__()
        self.spec, self.dropout = spec, dropout
        self.features = spec.features(side)
        shape = tower_shape(spec, side)
        self.embeddings = nn.ModuleDict(
            {
                str(at): table_of(feature.size, feature.dimension)
                for at, feature in enumerate(self.features)
                if not feature.floats
            }
        )
        self.fields, self.summed = shape.fields, shape.summed
        crosses: dict[str, type[DeepCross] | type[Senet]] = {
            "dcn": DeepCross,
            "senet": Senet,
            "fibinet": Fibinet,
        }
        self.cross = crosses[shape.cross](spec, shape.fields, shape.width) if shape.cross != "none" else None
        self.layers = nn.ModuleList(linear(inner, outer) for inner, outer in shape.layers)

    def _embedded(self, features: Features) -> list[Tensor]:
        made, code, many = [], 0, 0
        for at, feature in enumerate(self.features):
            if feature.coded:
                made.append(self.embeddings[str(at)](features.codes[:, code]))
                code += 1
            elif feature.multi:
                codes, offsets = features.multi[many]
                made.append(pooled(self.embeddings[str(at)], codes, offsets))
                many += 1
        return made

    def joined(self, fields: list[Tensor], numbers: Tensor) -> Tensor:
        """Return float32[n, width]: what the tower reads, the fields side by side or added up, then the numbers."""
        if self.summed:
            total = fields[0]
            for field in fields[1:]:
                total = total + field
            fields = [total]
        parts = [*fields, numbers] if numbers.shape[1] else fields
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _head(self, fields: list[Tensor], numbers: Tensor) -> Tensor:
        return self.head(self.joined(fields, numbers))

    def head(self, x: Tensor) -> Tensor:
        """Return float32[n, dimension], the vectors of what `joined` gives."""
        if self.cross is not None:
            x = self.cross(x)
        for at, layer in enumerate(self.layers):
            x = layer(x)
            if at + 1 < len(self.layers):
                x = dropped(F.relu(x), self.dropout, self.training)
        if self.spec.metric == "cosine":
            x = unit(x)
        return x


class ItemTower(_Tower):
    """Vectors of items from their features."""

    def __init__(self, spec: ModelSpec, dropout: float = 0.0) -> None:
        super().__init__(spec, "item", dropout)
        if spec.popularity_exponent:
            self.register_buffer("lengths", torch.ones(spec.items + 1))

    def measure(self, counts: Int64Array) -> None:
        """Set the lengths of the vectors from int64[items], how many users like each item."""
        liked = np.maximum(counts, 1).astype(np.float64)
        lengths = (np.concatenate([[1.0], liked]) / liked.mean()) ** self.spec.popularity_exponent
        self.get_buffer("lengths")[:] = torch.from_numpy(lengths.astype(np.float32))

    def forward(self, features: Features) -> Tensor:
        """Return float32[m, dimension]."""
        vectors = self._head(self._embedded(features), features.numbers)
        if self.spec.popularity_exponent:
            lengths = self.get_buffer("lengths")[features.codes[:, self.spec.item_code]]
            vectors = vectors * lengths.unsqueeze(1)
        return vectors


class UserTower(_Tower):
    """Query vectors of users from their features and what they did."""

    def __init__(self, spec: ModelSpec, dropout: float = 0.0) -> None:
        super().__init__(spec, "user", dropout)
        self.sequence = None if spec.sequence.kind == "none" else SequenceEncoder(spec, dropout)
        self.intent = linear(spec.dimension, spec.prompts) if spec.prompts else None

    def forward(
        self,
        features: Features,
        history: Packed,
        items: nn.Embedding | None = None,
        every: bool = False,
        tasks: Tensor | None = None,
        which: Int64Array | None = None,
    ) -> Tensor:
        """Return the query vectors.

        Args:
            features: of n users.
            history: what they did.
            items: the item tower's table of ids where the sequence shares it (`tie_items`).
            every: give a vector for every prefix of every history, instead of the whole ones alone (gru, sasrec).
            tasks: int64[n], the prompt of each history; where the tower has prompts.
            which: int64[m], rising, with `every`: the rows that are wanted, for which alone is computed what the others
                have no part in; None: all.

        Returns:
            float32[n * interests, dimension], a user's interests one after the other; with `every` float32[t, dimension],
            row r from the history up to and with entry r; of these the rows `which`.
        """
        fields, numbers = self._embedded(features), features.numbers
        if self.sequence is None:
            return self._head(fields, numbers)
        vectors = self.sequence(history, items, every, tasks, which)
        if every or self.spec.vectors_per_user > 1:
            # Each vector of a sequence goes through the rest as a row of its own, beside its user's features.
            lengths = history.lengths if which is None else np.diff(np.searchsorted(which, history.offsets))
            repeats = torch.as_tensor(lengths, device=vectors.device) if every else self.spec.vectors_per_user
            fields = [field.repeat_interleave(repeats, 0) for field in fields]
            numbers = numbers.repeat_interleave(repeats, 0)
        return self._head([*fields, vectors], numbers)

    def inputs(self, features: Features, history: Packed, items: nn.Embedding | None = None) -> Tensor:
        """Return what `head` makes the vectors of, in a tower of one vector per user; arguments as of `forward`."""
        fields = self._embedded(features)
        if self.sequence is not None:
            fields = [*fields, self.sequence(history, items, False, None)]
        return self.joined(fields, features.numbers)
