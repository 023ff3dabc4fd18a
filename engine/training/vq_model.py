"""The towers, biases and ranking step of streaming VQ, and what they lose on a batch; `engine/models/vq_spec.py` has the
formulas and the names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engine.core.types import BoolArray, Float32Array, Int32Array, Int64Array
from engine.models.debiased import debiased
from engine.models.encoded import Encoded, EncodedUsers
from engine.models.features import take_encoded, take_users
from engine.models.spec import ITEM_ID, ModelSpec
from engine.models.streaming_options import StreamingOptions
from engine.models.vq_spec import VqSpec
from engine.training.export import mean_for_unknown, reads_one
from engine.training.objective import at_times, hour_column, some_unknown
from engine.training.rank import RankStep
from engine.training.tensors import Features, Packed, tensor
from engine.training.towers import ItemTower, UserTower, build_item_tower, build_user_tower
from engine.training.vq_losses import (
    mask_histories,
    own_items,
    rewarded_softmax,
    shared_softmax,
    similarity,
    straight_through,
)


@dataclass(frozen=True, slots=True)
class Columns:
    """What the examples of a step are compared with: m distinct items.

    Attributes:
        vectors: float32[m, d], v, some of them of items with features hidden.
        clusters: float32[m, d], e of the cluster of each.
        biases: float32[m].
        codes: int64[m].
        shift: float32[m], log of how likely each is to be a column.
        own: int64[n], the column of each impression's item.
    """

    vectors: Tensor
    clusters: Tensor
    biases: Tensor
    codes: Tensor
    shift: Tensor
    own: Int64Array


class VqModel(nn.ModuleDict):
    """The parts, by the prefix of their arrays: `user` or `user_<task>`, `item`, `bias`, `rank`."""

    def __init__(self, spec: VqSpec, options: StreamingOptions, spare: int = 0) -> None:
        """Begin at what torch's random generator gives; biases at 0.

        Args:
            spec, options: of the model and of its training.
            spare: rows that the tables of items have for those to come, behind those of the build.
        """
        items = spec.tower.items + spare
        users = {name: build_user_tower(spec.tower) for name in spec.user_names}
        item = build_item_tower(_with_room(spec.tower, spare))
        bias = nn.Embedding(items + 1, 1, _weight=torch.zeros(items + 1, 1))
        rank = None if spec.rank == "none" else RankStep(spec, spare)
        super().__init__({**users, "item": item, "bias": bias, **({} if rank is None else {"rank": rank})})
        self._spec, self._options, self._coded = spec, options, items
        self._hour = hour_column(spec.tower)

    # Parts have their place, and their name, in the dict alone: an attribute would be a second one.

    @property
    def _towers(self) -> list[UserTower]:
        return [cast(UserTower, self[name]) for name in self._spec.user_names]

    @property
    def _item(self) -> ItemTower:
        return cast(ItemTower, self["item"])

    @property
    def _bias(self) -> nn.Embedding:
        return cast(nn.Embedding, self["bias"])

    @property
    def _rank(self) -> RankStep | None:
        return cast(RankStep, self["rank"]) if self._spec.rank != "none" else None

    @property
    def _tied(self) -> nn.Embedding | None:
        tied = self._spec.tower.tied_feature
        return None if tied is None else cast(nn.Embedding, self._item.embeddings[str(tied)])

    # --- items -------------------------------------------------------------------------------------------------

    def codes(self, rows: Int32Array) -> Tensor:
        """Return int64[n]: the code of each item; 0 of those published since for whom no row was spare."""
        return tensor(np.where(rows < self._coded, rows + 1, 0).astype(np.int64))

    def item_tables(self) -> dict[str, nn.Embedding]:
        """Return the tables that have a row per code of an item, by the names of their parameters."""
        tables = {"bias.weight": self._bias}
        at = id_table(self._spec.tower)
        if at is not None:
            tables[f"item.embeddings.{at}.weight"] = cast(nn.Embedding, self._item.embeddings[str(at)])
        if self._rank is not None:
            tables |= {"rank.items.weight": self._rank.items, "rank.bias.weight": self._rank.bias}
        return tables

    def biases(self, codes: Tensor) -> Tensor:
        """Return float32[n], zeros where items have no bias."""
        made: Tensor = self._bias(codes)[:, 0]
        return made if self._options.bias else torch.zeros_like(made)

    def item_vectors(self, items: Encoded) -> Tensor:
        """Return float32[m, d]."""
        made: Tensor = self._item(Features.of(items))
        return made

    def partly_hidden(self, items: Encoded, vectors: Tensor, random: np.random.Generator) -> Tensor:
        """Return the vectors with those of some items made from fewer features, so that the missing code is trained."""
        share = self._options.feature_dropout
        if not share or reads_one(self._spec.tower, "item"):
            return vectors
        hidden = some_unknown(items, share, random)
        changed = (hidden.codes != items.codes).any(1) | (hidden.numbers != items.numbers).any(1)
        rows = np.flatnonzero(changed).astype(np.int32)
        if not rows.size:
            return vectors
        index = np.arange(len(items))
        index[rows] = len(items) + np.arange(rows.size)
        return torch.cat([vectors, self.item_vectors(take_encoded(hidden, rows))])[tensor(index)]

    def ranked_items(self, items: Encoded, rows: Int32Array) -> tuple[Float32Array, Float32Array]:
        """Return float32[m, e] and float32[m, T]: z and the biases of the ranking step, of items that are given."""
        assert self._rank is not None
        with torch.no_grad():
            codes = self.codes(rows)
            vectors = self._rank.item_vectors(codes, self.item_vectors(items))
            return vectors.numpy(), self._rank.bias(codes).numpy()

    def settle(self) -> None:
        """Give whatever stands for unknown items, and is not learnt, the mean of the known ones."""
        for tower in self._towers:
            mean_for_unknown(self._spec.tower, tower, self._item)
        tables = [self._bias] if self._rank is None else [self._bias, self._rank.items, self._rank.bias]
        with torch.no_grad():
            for table in tables:
                table.weight[0] = table.weight[1 : self._spec.tower.items + 1].mean(0)

    def weigh(self, counts: Int64Array) -> None:
        """Set the weights of the weighted mean of histories from int64[items], how many users like each item."""
        for tower in self._towers:
            if tower.sequence is not None:
                tower.sequence.weigh(counts, self._spec.tower.sequence.item_exponent)

    # --- losses ------------------------------------------------------------------------------------------------

    def losses(
        self,
        users: Int32Array,
        encoded: EncodedUsers,
        rewards: Float32Array,
        timestamps: Int64Array,
        columns: Columns,
        groups: Int32Array,
        random: np.random.Generator,
    ) -> dict[str, Tensor]:
        """Return the losses of a batch, by name: `auxiliary`, `index`, `similarity`, `rank`, those that are asked for.

        Args:
            users, encoded, rewards, timestamps: as of `ImpressionBatch`; some reward is above 0.
            columns: what the batch is compared with.
            groups: int32[items + 1], the coarser cluster of each item code, by which histories are debiased.
            random: of what is hidden and drawn.
        """
        options = self._options
        total = sum(task.weight for task in options.tasks)
        rows = np.flatnonzero((rewards > 0).any(1))
        masked = own_items(users, columns.own, columns.codes.shape[0])
        # Only whoever made something of an impression is an example; the others have been compared with already.
        encoded = self._known_items(encoded)
        if rows.size < users.size:
            encoded = take_users(encoded, rows)
            rewards, masked, timestamps = rewards[rows], masked[rows], timestamps[rows]
        mask_histories(encoded.sequence, columns.codes.numpy(), columns.own[rows], masked)
        own = columns.own[rows]
        features, history = self._features(encoded, timestamps, random), self._packed(encoded)
        quantised = straight_through(columns.vectors, columns.clusters)
        shift = columns.biases / options.temperature - columns.shift
        made: dict[str, Tensor] = {}

        def add(name: str, loss: Tensor, weight: float) -> None:
            loss = loss * (weight / total)
            made[name] = made[name] + loss if name in made else loss

        first = None
        for at, (task, tower) in enumerate(zip(options.tasks, self._towers, strict=True)):
            reward = np.ascontiguousarray(rewards[:, at])
            if at == 0 and self._rank is not None:
                first = tower.inputs(features, history, self._tied)
            if not task.weight or not (reward > 0).any():
                continue
            x = first if at == 0 and first is not None else tower.inputs(features, history, self._tied)
            queries = tower.head(x) / options.temperature
            for name, vectors, asked in (
                ("auxiliary", columns.vectors, options.auxiliary_weight),
                ("index", quantised, options.index_weight),
            ):
                if asked:
                    add(name, shared_softmax(queries, vectors, shift, masked, own, reward), task.weight)
        if options.similarity_weight:
            there = tensor(np.unique(columns.own))
            made["similarity"] = similarity(columns.vectors[there], columns.clusters[there])
        if self._rank is not None and first is not None:
            for at, loss in self._rank_losses(
                self._rank, first, encoded, rewards, masked, columns, own, groups, random
            ):
                add("rank", loss, options.tasks[at].weight)
        return made

    def _rank_losses(
        self,
        rank: RankStep,
        x: Tensor,
        encoded: EncodedUsers,
        rewards: Float32Array,
        masked: BoolArray,
        columns: Columns,
        own: Int64Array,
        groups: Int32Array,
        random: np.random.Generator,
    ) -> list[tuple[int, Tensor]]:
        """Return the ranking step's loss of each task that has a reward."""
        tasks = [
            at for at, task in enumerate(self._options.tasks) if task.weight and (rewards[:, at] > 0).any()
        ]
        users = rank.user_vectors(x)
        items = rank.item_vectors(columns.codes, columns.vectors.detach())
        biases = rank.bias(columns.codes)
        if not rank.complex:
            return [
                (at, shared_softmax(
                    rank.of_task(users, at), items, biases[:, at] - columns.shift, masked, own,
                    np.ascontiguousarray(rewards[:, at]),
                ))
                for at in tasks
            ]  # fmt: skip
        spec, (n, count) = self._spec, masked.shape
        drawn = random.integers(0, count, (n, self._options.rank_negatives))
        mine = own[:, None]
        unfit = np.take_along_axis(masked, drawn, 1) | (drawn == mine)
        chosen = tensor(np.concatenate((mine, drawn), 1))
        hits = torch.from_numpy(np.concatenate((np.zeros((n, 1), np.bool_), unfit), 1))
        read = encoded.sequence[:, -spec.rank_read :] if encoded.sequence.shape[1] else encoded.sequence
        history, lengths = debiased(read, groups, spec.dropped_clusters, spec.rank_history)
        scores = rank.crossed(
            users, F.embedding(chosen, items), F.embedding(chosen, biases), history, lengths
        )
        scores = scores - F.embedding(chosen, columns.shift[:, None])
        right = torch.zeros(n, dtype=torch.int64)
        return [
            (
                at,
                rewarded_softmax(
                    scores[..., at].masked_fill(hits, -torch.inf), right, tensor(rewards[:, at])
                ),
            )
            for at in tasks
        ]

    def _known_items(self, encoded: EncodedUsers) -> EncodedUsers:
        """Return the users without the items of their histories that were published since the build."""
        codes = encoded.sequence
        if not codes.size or codes.max() <= self._spec.tower.items:
            return encoded
        order = np.argsort((codes > 0) & (codes <= self._spec.tower.items), axis=1, kind="stable")
        known = np.where(codes > self._spec.tower.items, 0, codes)
        sequence = np.take_along_axis(known, order, 1)
        lengths = np.count_nonzero(sequence, axis=1).astype(np.int32)
        return EncodedUsers(encoded.codes, encoded.multi, encoded.numbers, sequence, lengths)

    def _features(
        self, encoded: EncodedUsers, timestamps: Int64Array, random: np.random.Generator
    ) -> Features:
        features: Encoded = encoded
        if self._hour is not None:
            features = at_times(features, self._hour, timestamps)
        if self._options.feature_dropout and not reads_one(self._spec.tower, "user"):
            features = some_unknown(features, self._options.feature_dropout, random)
        return Features.of(features)

    def _packed(self, encoded: EncodedUsers) -> Packed:
        """Return what the towers read of the histories, end to end."""
        tower: ModelSpec = self._spec.tower
        length = 0 if tower.sequence.kind == "none" else tower.sequence.length
        sequence = encoded.sequence[:, max(encoded.sequence.shape[1] - length, 0) :]
        lengths = np.minimum(encoded.lengths, length)
        offsets = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Packed(tensor(sequence[sequence > 0].astype(np.int64)), offsets)


def id_table(tower: ModelSpec) -> int | None:
    """Return which item feature has a row of its own for each item; None where none has."""
    features = enumerate(tower.features("item"))
    return next((at for at, each in features if each.name == ITEM_ID and each.lookup == "table"), None)


def _with_room(tower: ModelSpec, spare: int) -> ModelSpec:
    """Return the towers with so many more rows in the table of item ids."""
    own, features = id_table(tower), tower.features("item")
    wider = tuple(
        each.model_copy(update={"size": each.size + spare}) if at == own else each
        for at, each in enumerate(features)
    )
    return tower.model_copy(update={"item_features": wider})
