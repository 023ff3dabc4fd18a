"""The two-tower channel: built by training, served by a tower in NumPy and a vector index.

Sources: Huang et al. 2013 (DSSM) for the two towers; Yi et al. 2019 for training them with in-batch negatives; the
recommender course (Wang Shusen, vector recall) for how they serve. `engine/models/spec.py` names those of the parts.
"""

from __future__ import annotations

from threading import Lock
from typing import ClassVar, Self

import numpy as np

from channels.two_tower.answers import as_batch, nearest_triggers
from channels.two_tower.build import build_bundle
from channels.two_tower.bundle import Bundle
from channels.two_tower.options import TwoTowerOptions
from engine.core.candidates import CandidateBatch, TriggerKind
from engine.core.channel import BuildContext, Channel, LoadContext
from engine.core.errors import SnapshotError
from engine.core.items import ItemColumns
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Float32Array, Int32Array
from engine.models.encoded import Encoded
from engine.models.features import QueryEncoder, encode_live, take_encoded
from engine.models.towers import ItemTower, UserTower


class TwoTower(Channel):
    """Recalls the items whose vectors are nearest to the user's; the trigger is the nearest of their newest items."""

    Config = TwoTowerOptions
    inline = True
    trigger_kind = TriggerKind.ITEM
    learnt: ClassVar[tuple[str, ...]] = ("user.", "item.")
    bundle: ClassVar[type[Bundle]] = Bundle
    """What its snapshot is read as."""

    def __init__(self, config: TwoTowerOptions, context: LoadContext, model: Bundle) -> None:
        super().__init__(config)
        spec = model.spec
        length = spec.sequence.length if spec.sequence.kind != "none" else 0
        self._model = model
        self._items = context.items
        self._columns: ItemColumns = context.columns
        self._queries = QueryEncoder(model.user_encoder, model.users, spec.items, length)
        self._tower = UserTower.load(spec, context.arrays)
        self._item_tower = ItemTower.load(spec, context.arrays)
        self._new = _NewVectors(context.items, spec.dimension)
        self._forbidden: BoolArray | None = None
        # An evaluation asks from several threads; while serving there is one.
        self._one_at_a_time = Lock()
        self._notice_taken_down()
        # What an update runs is loaded now, not while a batch waits for the first item that is published.
        self._item_tower.vectors(take_encoded(model.items, np.zeros(min(1, context.items), np.int32)))

    @classmethod
    def event_kinds(cls, config: TwoTowerOptions) -> tuple[str, ...]:
        """Return the kinds with a weight of their own, and those that say that ranking threw an item out."""
        return tuple(dict.fromkeys((*config.training.event_weights, *config.rejects)))

    @classmethod
    def build(cls, config: TwoTowerOptions, context: BuildContext) -> None:
        """Train the towers, make the item vectors and the index, and write all of it as one bundle.

        Raises:
            BuildError: nobody likes anything, PyTorch is not installed, or the training fails.
            ConfigError: a feature is not in the data, or of another type.
            SnapshotError: what was learnt earlier is not of these towers.
        """
        build_bundle("two_tower", config, context)

    @classmethod
    def load(cls, config: TwoTowerOptions, context: LoadContext) -> Self:
        """Map the bundle.

        Raises:
            SnapshotError: its parts do not fit together: model and index of different runs, other shapes than the
                specification's.
        """
        model = cls.bundle.of(context.arrays, config)
        if model.spec.items != context.items:
            raise SnapshotError(
                f"the model is of {model.spec.items:,} items, the catalogue has {context.items:,}", "spec"
            )
        return cls(config, context, model)

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Encode the batch, compute its vectors, search, and look for the trigger of each candidate."""
        assert self._model.index is not None
        if not k.any():
            return CandidateBatch.empty(len(batch))
        vectors = self._tower.vectors(self._queries.encode(batch))
        interests = self._model.spec.vectors_per_user
        # A vector of zeros says nothing of the user: it would find items in the order of their rows.
        wanted = np.where(vectors.any(1), k if interests == 1 else np.repeat(k, interests), np.int32(0))
        with self._one_at_a_time:
            rows, scores = self._model.index.search_masked(vectors, wanted, self._forbidden)
        answer = as_batch(rows, scores, interests, k)
        nearest_triggers(
            answer, batch.history, self.config.trigger_items, self._model.vectors, *self._new.arrays
        )
        return answer

    def update(self, rows: Int32Array) -> None:
        """Give what was published or changed a vector of what is known of it, and stop recalling what was taken down.

        An item that is new to the model has no embedding of its own: code 0 stands in, and its features say the rest. One
        of which no feature is known gets no vector, as all such would have the same.
        """
        self._notice_taken_down()
        rows = rows[self._columns.available[rows]]
        encoded = encode_live(self._model.item_encoder, self._model.items, self._columns, rows)
        changed = _something_known(encoded) & (
            (rows >= self._items) | _differs(encoded, take_encoded(self._model.items, rows))
        )
        rows = rows[changed]
        if rows.size == 0:
            return
        vectors = self._item_tower.vectors(take_encoded(encoded, np.flatnonzero(changed).astype(np.int32)))
        self._make_searchable(rows, vectors)
        self._new.put(rows, vectors)

    def _make_searchable(self, rows: Int32Array, vectors: Float32Array) -> None:
        assert self._model.index is not None
        self._model.index.add(rows, vectors)

    def _notice_taken_down(self) -> None:
        available = self._columns.available
        self._forbidden = None if available.all() else ~available


class _NewVectors:
    """The vectors of items that the build did not know, or knew otherwise, where triggers are looked for.

    Attributes:
        arrays: (`place` int32[rows], which vector of the other each row has, -1 for that of the build; float32[m, d]).
    """

    def __init__(self, items: int, dimension: int) -> None:
        self._items = items
        self._place = np.empty(0, np.int32)
        self._vectors = np.empty((0, dimension), np.float32)
        self._count = 0

    @property
    def arrays(self) -> tuple[Int32Array, Float32Array]:
        return self._place, self._vectors

    def put(self, rows: Int32Array, vectors: Float32Array) -> None:
        """Take the vectors of some rows, each once."""
        most = max(int(rows.max()) + 1, self._items)
        if most > self._place.size:
            place = np.full(max(most, self._place.size * 5 // 4), -1, np.int32)
            place[: self._place.size] = self._place
            self._place = place
        fresh = self._place[rows] < 0
        self._place[rows[fresh]] = self._count + np.arange(int(fresh.sum()), dtype=np.int32)
        self._count += int(fresh.sum())
        if self._count > len(self._vectors):
            wider = np.empty((max(self._count * 5 // 4, 1024), vectors.shape[1]), np.float32)
            wider[: len(self._vectors)] = self._vectors
            self._vectors = wider
        self._vectors[self._place[rows]] = vectors


def _something_known(encoded: Encoded) -> BoolArray:
    """bool[n]: whether any feature of a row is known."""
    known: BoolArray = (encoded.codes != 0).any(1) | (encoded.numbers[:, 1::2] == 0).any(1)
    for many in encoded.multi:
        known |= np.diff(many.offsets) > 0
    return known


def _differs(one: Encoded, other: Encoded) -> BoolArray:
    """bool[n]: whether rows of two tables of the same features differ."""
    differs: BoolArray = (one.codes != other.codes).any(1) | (one.numbers != other.numbers).any(1)
    for a, b in zip(one.multi, other.multi, strict=True):
        for r in np.flatnonzero(~differs).tolist():
            mine, theirs = (m.codes[m.offsets[r] : m.offsets[r + 1]] for m in (a, b))
            differs[r] = mine.size != theirs.size or bool((mine != theirs).any())
    return differs
