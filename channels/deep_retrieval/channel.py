"""The Deep Retrieval channel: the likeliest paths of a user by beam search, their items, the best of these.

Source: Gao et al. 2020, "Learning a Retrievable Structure for Large-Scale Recommendations" (arXiv 2007.07203): algorithm
1 for the search, section 2.3 for the ranker. What is published live is placed as `placement.py` says; the paper waits for
the next training.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from typing import ClassVar, Self

import numpy as np

from channels.deep_retrieval.build import LEARNT, build_bundle
from channels.deep_retrieval.bundle import Bundle, specified, write_bundle
from channels.deep_retrieval.lists import PathLists
from channels.deep_retrieval.names import path_names
from channels.deep_retrieval.options import DeepRetrievalOptions
from channels.deep_retrieval.rerank import Ranker, first_of
from engine.core.candidates import CandidateBatch, FanOut, TriggerKind
from engine.core.channel import BuildContext, Channel, LoadContext
from engine.core.errors import SnapshotError, StateUnavailableError
from engine.core.query import QueryBatch
from engine.core.types import AnyArray, BoolArray, Float32Array, Int32Array, Int64Array, UInt8Array
from engine.models.features import QueryEncoder, item_columns_of, take_encoded, take_users
from engine.models.paths import PathModel
from engine.models.towers import UserTower


class DeepRetrieval(Channel):
    """Recalls what lies on the likeliest paths of a user; the trigger is the path."""

    Config = DeepRetrievalOptions
    inline = True
    trigger_kind = TriggerKind.PATH
    learnt: ClassVar[tuple[str, ...]] = LEARNT

    def __init__(self, config: DeepRetrievalOptions, context: LoadContext, model: Bundle) -> None:
        super().__init__(config)
        tower, lattice = model.spec.tower, model.spec.lattice
        length = tower.sequence.length if tower.sequence.kind != "none" else 0
        self._model = model
        self._columns = context.columns
        self._queries = QueryEncoder(model.user_encoder, model.users, tower.items, length)
        self._tower = UserTower.load(tower, context.arrays)
        self._paths = PathModel.load(lattice, context.arrays)
        self._beam = min(config.beam, lattice.paths)
        self._lists = PathLists(
            lattice.paths, model.codes, model.offsets, model.rows, model.list_vectors, model.list_scales,
            model.list_bias,
        )  # fmt: skip
        self._ranker = Ranker(tower.items, lattice.dimension)
        self._placement = model.placement
        self._placed: dict[int, Int32Array] = {}
        # An evaluation asks from several threads; while serving there is one.
        self._one_at_a_time = Lock()
        # What an update runs is loaded now, not while a batch waits for the first item that is published.
        self._placement.place(take_encoded(model.items, np.zeros(min(1, tower.items), np.int32)), 1)

    @classmethod
    def build(cls, config: DeepRetrievalOptions, context: BuildContext) -> None:
        """Train the model, put the items on paths, and write all of it as one bundle.

        Raises:
            BuildError: nobody likes anything, PyTorch is not installed, or the training fails.
            ConfigError: a feature is not in the data, or of another type; or the lattice is too small for the items.
        """
        build_bundle("deep_retrieval", config, context)

    @classmethod
    def write(
        cls, config: DeepRetrievalOptions, context: BuildContext, trained: Mapping[str, AnyArray]
    ) -> None:
        """Write a bundle of arrays as `engine.training.deep_retrieval.train_paths` gives them, whoever made them.

        Raises:
            ConfigError: a feature is not in the data, or of another type.
        """
        write_bundle(context, *specified(config, context, None), trained)

    @classmethod
    def load(cls, config: DeepRetrievalOptions, context: LoadContext) -> Self:
        """Map the bundle.

        Raises:
            SnapshotError: its parts do not fit together; the error names the array.
        """
        model = Bundle(context.arrays)
        if model.spec.tower.items != context.items:
            raise SnapshotError(
                f"the model is of {model.spec.tower.items:,} items, the catalogue has {context.items:,}",
                "spec",
            )
        return cls(config, context, model)

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Search the paths of the queries that ask for something, gather what is on them, and rerank it."""
        asked = k > 0
        users = self._queries.encode(batch)
        if not asked.all():
            if not asked.any():
                return CandidateBatch.empty(len(batch))
            users = take_users(users, np.flatnonzero(asked))
        return self.search(self._tower.vectors(users), batch, k)

    def search(self, vectors: Float32Array, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Answer as `recall_batch` does, given the vectors float32[m, e] of the queries whose k is above 0."""
        return self.gather(vectors, *self._paths.beam(vectors, self._beam), batch, k)

    def gather(
        self, vectors: Float32Array, paths: Int64Array, logs: Float32Array, batch: QueryBatch, k: Int32Array
    ) -> CandidateBatch:
        """Answer as `search` does, given the paths too: int64[m, B] and float32[m, B], as `PathModel.beam` gives them."""
        wanted = k
        while True:
            with self._one_at_a_time:
                found = self._ranker.best(
                    vectors, paths, logs, wanted, self._lists, self._columns.available, batch.excluded,
                    self.config.rerank,
                )  # fmt: skip
            hidden = self._exposed(batch, found)
            if hidden is None:
                return found if wanted is k else first_of(found, np.zeros(found.rows.size, np.bool_), k)
            answer = first_of(found, hidden, k)
            short = (np.diff(answer.offsets) < k) & (np.diff(found.offsets) == wanted)
            if not short.any():
                return answer
            # More are ranked where what was shown takes places, and only there: nobody's answer depends on the others.
            wanted = np.where(short, 4 * wanted, wanted).astype(np.int32)

    def trigger_names(self, triggers: Int64Array) -> UInt8Array:
        """Return paths as their nodes, "36-27-20", counted from 0."""
        return path_names(self._model.codes[triggers], self._model.spec.lattice)

    def update(self, rows: Int32Array) -> None:
        """Place what was published or changed on the paths of what is similar.

        An item that the build knew stays where the training put it. One that is similar to nothing is on no path. What is
        taken down stays on its paths and is passed over.
        """
        rows = rows[(rows >= self._model.spec.tower.items) & self._columns.available[rows]]
        if rows.size == 0:
            return
        encoded = self._model.item_encoder.encode(item_columns_of(self._columns, rows), rows)
        places, vectors, bias = self._placement.place(encoded, self._model.spec.paths)
        self._ranker.put(rows, vectors, bias)
        nowhere = np.empty(0, np.int32)
        for row, mine in zip(rows.tolist(), places, strict=True):
            now = mine[mine >= 0]
            self._lists.move(row, self._placed.get(row, nowhere), now)
            self._placed[row] = now

    def _exposed(self, batch: QueryBatch, found: CandidateBatch) -> BoolArray | None:
        """bool[t]: what of the found the users were shown; None where nothing is kept of it, or it cannot be read.

        The filter of the scene says what becomes of a request in the second case.
        """
        exposure = batch.live.exposure
        if exposure is None or not self.config.mask_exposed:
            return None
        with suppress(StateUnavailableError):
            return exposure.seen(FanOut(found.rows, found.offsets, len(batch)), self._columns.keys)
        return None
