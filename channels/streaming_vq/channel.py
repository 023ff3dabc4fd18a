"""The streaming VQ channel: clusters scored, their lists merged, what comes out ranked; items move while it serves.

Source: Bin et al. 2025, "Real-time Indexing for Large-scale Recommendation by Streaming Vector Quantization Retriever"
(arXiv 2501.08695): section 3.4 for the merge, 3.5 for the ranking step, 3.6 for several tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from typing import ClassVar, Self

import numpy as np

from channels.streaming_vq.build import LEARNT, build_bundle
from channels.streaming_vq.bundle import Bundle, encoded_rows, specified, write_bundle
from channels.streaming_vq.cut import best
from channels.streaming_vq.merge import Found, Merger, Scorer
from channels.streaming_vq.options import StreamingVqOptions
from engine.core.candidates import CandidateBatch, FanOut, TriggerKind
from engine.core.channel import BuildContext, Channel, LoadContext
from engine.core.errors import SnapshotError, StateUnavailableError
from engine.core.int_table import IntTable
from engine.core.query import QueryBatch
from engine.core.types import AnyArray, BoolArray, Float32Array, Int32Array
from engine.models.debiased import debiased
from engine.models.encoded import EncodedUsers
from engine.models.features import QueryEncoder, encode_live, take_encoded, take_users
from engine.models.rank import RankStep, task_weights
from engine.models.towers import ItemTower, UserTower


class StreamingVq(Channel):
    """Recalls the best of the clusters whose vectors are nearest to the user's; the trigger is the cluster."""

    Config = StreamingVqOptions
    inline = True
    trigger_kind = TriggerKind.CLUSTER
    learnt: ClassVar[tuple[str, ...]] = LEARNT

    def __init__(self, config: StreamingVqOptions, context: LoadContext, model: Bundle) -> None:
        super().__init__(config)
        spec = model.spec
        self._model, self._items, self._columns = model, context.items, context.columns
        self._queries = QueryEncoder(model.user_encoder, model.users, spec.tower.items, spec.read)
        self._towers = [
            UserTower.load(spec.tower, _as_user(context.arrays, name)) for name in spec.user_names
        ]
        self._item_tower = ItemTower.load(spec.tower, context.arrays)
        self._weights = task_weights(spec, config.task_weights)
        self._scorer = Scorer(model.vectors)
        self._lists = model.lists()
        self._merger = Merger(self._lists, config.chunk)
        self._codebook = model.codebook(config)
        self._rank = RankStep.load(spec, context.arrays, self._weights)
        self._groups: Int32Array = np.full(spec.tower.items + 1, -1, np.int32)
        if model.debiases:
            self._groups[1:] = np.where(model.assignment < 0, -1, model.secondary[model.assignment])
        self._published = IntTable()
        self._published.put(
            np.ascontiguousarray(model.published), np.arange(model.published.size, dtype=np.int32)
        )
        # What a trainer has said of items published since: it knows them better than what is known of them says.
        self._told: set[int] = set()
        # An evaluation asks from several threads; while serving there is one.
        self._one_at_a_time = Lock()
        available = context.columns.available
        self._lists.hide(np.flatnonzero(~available).astype(np.int32))
        # What an update runs is loaded now, not while a batch waits for the first item that is published.
        one = take_encoded(model.items, np.zeros(min(1, context.items), np.int32))
        self._codebook.assign(self._item_tower.vectors(one))

    @classmethod
    def event_kinds(cls, config: StreamingVqOptions) -> tuple[str, ...]:
        """Return the kinds that reward the tasks."""
        return tuple(dict.fromkeys(kind for task in config.training.tasks for kind in task.kinds))

    @classmethod
    def build(cls, config: StreamingVqOptions, context: BuildContext) -> None:
        """Replay the log through the trainer and write what it learnt as one bundle.

        Raises:
            BuildError: nobody likes anything, there are no times, PyTorch is not installed, or the training fails.
            ConfigError: a feature is not in the data, or of another type; or a task cannot be learnt from a log.
        """
        build_bundle("streaming_vq", config, context)

    @classmethod
    def write(
        cls, config: StreamingVqOptions, context: BuildContext, trained: Mapping[str, AnyArray]
    ) -> None:
        """Write a bundle of arrays as `engine.training.streaming_vq.train_streaming` gives them, whoever made them.

        Raises:
            ConfigError: a feature is not in the data, or of another type.
        """
        spec, encoders = specified(config, context, None)
        write_bundle(context, spec, encoders, encoded_rows(context, encoders), trained)

    @classmethod
    def load(cls, config: StreamingVqOptions, context: LoadContext) -> Self:
        """Map the bundle.

        Raises:
            SnapshotError: its parts do not fit together, as with a codebook of another size; the error names the array.
        """
        model = Bundle(context.arrays)
        if model.spec.tower.items != context.items:
            raise SnapshotError(
                f"the model is of {model.spec.tower.items:,} items, the catalogue has {context.items:,}",
                "spec",
            )
        return cls(config, context, model)

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Score the clusters for the queries that ask for something, merge their lists, rank what comes out."""
        asked = k > 0
        users = self._queries.encode(batch)
        if not asked.all():
            if not asked.any():
                return CandidateBatch.empty(len(batch))
            users = take_users(users, np.flatnonzero(asked))
        vectors, inputs = self.user_vectors(users)
        return self.search(vectors, inputs, users, batch, k)

    def user_vectors(self, users: EncodedUsers) -> tuple[Float32Array, Float32Array]:
        """Return float32[m, d], the tasks' vectors combined, and float32[m, D], what the first tower reads."""
        of_tower = self._read_by_towers(users)
        inputs = self._towers[0].inputs(of_tower)
        vectors = self._towers[0].head(inputs)
        if len(self._towers) > 1:
            # u . e is linear in u: the weighted sum of the tasks' scores is the score of the weighted sum.
            vectors = vectors * self._weights[0]
            for weight, tower in zip(self._weights[1:], self._towers[1:], strict=True):
                vectors += tower.vectors(of_tower) * weight
        return vectors, inputs

    def search(
        self,
        vectors: Float32Array,
        inputs: Float32Array,
        users: EncodedUsers,
        batch: QueryBatch,
        k: Int32Array,
    ) -> CandidateBatch:
        """Answer as `recall_batch` does, given what `user_vectors` returns for the queries whose k is above 0.

        Args:
            vectors, inputs: float32[m, d] and float32[m, D].
            users: the encoded queries; only the complex ranking step reads them.
            batch, k: all queries.
        """
        asked = k > 0
        scores = self._scorer.scores(vectors)
        with self._one_at_a_time:
            found = self._merger.merge(scores, asked, self.config.rank_list, batch.excluded)
            hidden = self._exposed(batch, found)
            if self._rank is not None:
                mine = self._rank.users(inputs)
                self._rank.score(
                    mine, asked, found.slots, found.offsets, found.scores, self._histories(users)
                )
            return best(found, found.scores, k, self._model.rows, hidden)

    def update(self, rows: Int32Array) -> None:
        """Put what was published into the cluster that its vector is nearest to, and take down what was taken down.

        Where a trainer has put an item stands: what is known of the item speaks only until then, and never of one that
        the build knew.
        """
        available = self._columns.available[rows]
        self._lists.hide(rows[~available])
        rows = rows[available]
        self._lists.show(rows)
        rows = rows[rows >= self._items]
        if rows.size == 0:
            return
        encoded = encode_live(self._model.item_encoder, self._model.items, self._columns, rows)
        vectors = self._item_tower.vectors(encoded)
        if self._rank is not None:
            self._rank.put(rows, vectors)
            at = self._published.get(np.ascontiguousarray(self._columns.keys[rows]))
            learnt = at >= 0
            if learnt.any():
                model, at = self._model, at[learnt]
                self._rank.put_learnt(rows[learnt], model.published_vectors[at], model.published_bias[at])
        untold = np.array([row not in self._told for row in rows.tolist()], np.bool_)
        rows, vectors = rows[untold], vectors[untold]
        if rows.size:
            biases = np.full(rows.size, self._model.code_bias[0], np.float32)
            self._lists.assign(rows, self._codebook.assign(vectors), biases)

    def assign(self, rows: Int32Array, clusters: Int32Array, biases: Float32Array) -> None:
        """Move items to the clusters that a trainer has put them into.

        Raises:
            ValueError: a cluster that there is not, or a bias that is no number. Nothing is moved.
        """
        self._lists.assign(rows, clusters, biases)
        new = rows[rows >= self._items]
        if new.size:
            self._told.update(new.tolist())
            # One may come before what is known of it is: then the one that stands for the unknown is ranked.
            if self._rank is not None:
                self._rank.make_room(int(new.max()) + 1)
            self._lists.hide(new[~self._columns.available[new]])
        if self._model.debiases:
            old = rows < self._items
            mine = clusters[old]
            self._groups[rows[old] + 1] = np.where(mine < 0, -1, self._model.secondary[mine])

    def _read_by_towers(self, users: EncodedUsers) -> EncodedUsers:
        """Return the queries with as much of their histories as the towers read."""
        tower = self._model.spec.tower.sequence
        length = 0 if tower.kind == "none" else tower.length
        if users.sequence.shape[1] <= length:
            return users
        newest = np.ascontiguousarray(users.sequence[:, users.sequence.shape[1] - length :])
        lengths = np.minimum(users.lengths, length).astype(np.int32)
        return EncodedUsers(users.codes, users.multi, users.numbers, newest, lengths)

    def _histories(self, users: EncodedUsers) -> tuple[Int32Array, Int32Array] | None:
        """Return the debiased histories of the queries, codes and lengths; None where nobody reads them."""
        spec = self._model.spec
        if spec.rank != "complex":
            return None
        read = users.sequence[:, max(users.sequence.shape[1] - spec.rank_read, 0) :]
        return debiased(read, self._groups, spec.dropped_clusters, spec.rank_history)

    def _exposed(self, batch: QueryBatch, found: Found) -> BoolArray | None:
        """bool[t]: what of the found the users were shown; None where nothing is kept of it, or it cannot be read.

        The filter of the scene says what becomes of a request in the second case.
        """
        exposure = batch.live.exposure
        if exposure is None or not self.config.mask_exposed:
            return None
        rows = self._lists.rows_of(found.slots[: found.offsets[-1]])
        with suppress(StateUnavailableError):
            return exposure.seen(FanOut(rows, found.offsets, len(batch)), self._columns.keys)
        return None


def _as_user(arrays: Mapping[str, AnyArray], name: str) -> Mapping[str, AnyArray]:
    """Return the arrays of one user tower under the names of the only one."""
    if name == "user":
        return arrays
    own = {
        f"user.{part.removeprefix(f'{name}.')}": array
        for part, array in arrays.items()
        if part.startswith(f"{name}.")
    }
    return own | {part: array for part, array in arrays.items() if part.startswith("item.")}
