"""The loss of one batch: histories to queries, positives and negatives to item vectors, scores to a loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.core.errors import BuildError, ConfigError
from engine.core.interactions import Interactions
from engine.core.types import BoolArray, Float32Array, Float64Array, Int32Array, Int64Array
from engine.models.encoded import Encoded
from engine.models.options import LISTWISE, WHOLE, TrainingOptions
from engine.models.spec import HOUR, HOURS, ModelSpec, Side
from engine.training import losses
from engine.training.batches import Batch, by_task
from engine.training.data import TrainingData
from engine.training.export import reads_one, taken
from engine.training.layers import unit
from engine.training.negatives import (
    AliasTable,
    ClusterNegatives,
    Owned,
    RejectNegatives,
    StreamingFrequency,
    log_expected,
)
from engine.training.self_supervised import mutual_information, two_views, view_loss
from engine.training.tensors import Features, Packed, history, tensor
from engine.training.towers import ItemTower, UserTower

SHARED_CAP = 4096
"""Most positives of a batch that are negatives of the others: scores are examples times these."""

POOL = 256
"""Items that interpolated negatives choose the hardest from where the batch shares none."""

VIEWS = 1024
"""Items per step that the self-supervised loss looks at, at most."""


class Objective:
    """What a batch is worth.

    Args:
        spec, options: the model and its training.
        data: features, clusters, rejects.
        matrix: the interest matrix that is trained on: what is held out is not in it.
        learnt: float64[items], how often each item is a positive in an epoch.
        user, item: the towers.
        every: sequences: each entry of a history is an example.
    """

    def __init__(
        self,
        spec: ModelSpec,
        options: TrainingOptions,
        data: TrainingData,
        matrix: Interactions,
        learnt: Float64Array,
        user: UserTower,
        item: ItemTower,
        every: bool,
    ) -> None:
        self._spec, self._options, self._data, self._every = spec, options, data, every
        self._user, self._item = user, item
        self._device = next(item.parameters()).device
        self._owned = Owned.of(matrix)
        # Sampling follows all that the users did, so that an update by few events knows what is popular.
        weights = matrix.item_counts().astype(np.float64) ** options.popularity_power
        wanted = {source: count for source, count in options.negatives.items() if count}
        if spec.prompts and data.clusters is None:
            raise BuildError("prompts are those of clusters, and there are none")
        self._tasks = data.clusters if spec.prompts else None
        if options.loss in WHOLE:
            wanted = {}
            if matrix.items > losses.FULL_SOFTMAX_ITEMS:
                raise ConfigError(
                    f"{options.loss} reads every item in each step; {matrix.items:,} are more than "
                    f"{losses.FULL_SOFTMAX_ITEMS:,}: take softmax",
                    "training.loss",
                )
        self._matrix = matrix
        if options.loss == "user_softmax":
            if every or spec.vectors_per_user > 1 or spec.prompts:
                raise ConfigError(
                    f"user_softmax needs one vector of a user, not {spec.sequence.kind} or prompts: take full_softmax",
                    "training.loss",
                )
            counts = np.maximum(matrix.item_counts(), 1).astype(np.float64)
            logs = options.negative_power * np.log(counts / counts.mean())
            self._counted = self._tensor(logs.astype(np.float32))
        self._wanted = wanted
        self._popular = AliasTable(weights)
        self._clusters = self._rejects = None
        if "cluster" in wanted:
            if data.clusters is None:
                raise BuildError("negatives of the positive's cluster need clusters, and there are none")
            self._clusters = ClusterNegatives(data.clusters, weights)
        if "reject" in wanted:
            if data.rejects is None or not data.rejects.entries:
                raise BuildError(
                    "negatives from ranking's rejects need reject events in the log, and there are none"
                )
            self._rejects = RejectNegatives(data.rejects)
        self._batch_share = learnt / max(float(learnt.sum()), 1.0)
        self.streaming = StreamingFrequency(matrix.items) if options.logq == "streaming" else None
        self._hour = hour_column(spec)
        self._related = (
            mutual_information(data.items, spec.item_features)
            if options.self_supervised
            else np.empty((0, 0))
        )

    def loss(self, batch: Batch, random: np.random.Generator) -> Tensor:
        """Return the mean loss of a batch's examples, a scalar with its graph."""
        options = self._options
        if self.streaming is not None:
            self.streaming.update(batch.positives)
        if self._tasks is not None:
            made = self._by_task(by_task(batch, self._tasks, self._spec.prompts, self._every), random)
            return made + options.self_supervised * self._views(random) if options.self_supervised else made
        if options.loss == "user_softmax":
            made = self._by_user(batch, random)
            return made + options.self_supervised * self._views(random) if options.self_supervised else made
        queries, positives, weights, owners = self._examples(batch, random)
        if options.loss == "full_softmax":
            vectors = self._vectors(None, random)
            target = self._tensor(positives).long()
            if self._spec.vectors_per_user > 1:
                queries = _best(queries, vectors[target])
            made = losses.full_softmax(queries, vectors, target, weights, options.temperature)
        else:
            made = self._sampled(batch, queries, positives, weights, owners, random)
        if options.self_supervised:
            made = made + options.self_supervised * self._views(random)
        return made

    def _by_task(self, batch: Batch, random: np.random.Generator) -> Tensor:
        """Return the loss inside the clusters plus the cross-entropy of the intent, each a mean of the same examples."""
        assert self._tasks is not None
        assert batch.tasks is not None
        assert self._user.intent is not None
        queries, positives, weights, owners = self._examples(batch, random)
        owners = np.arange(batch.users.size, dtype=np.int32) if owners is None else owners
        whole = batch.tasks[owners] == self._spec.prompts
        asked, inside = np.flatnonzero(whole), np.flatnonzero(~whole)
        logits = self._user.intent(queries[self._tensor(asked)])
        right = self._tensor(self._tasks[positives[asked]]).long()
        counts = weights[self._tensor(asked)]
        intent = (F.cross_entropy(logits, right, reduction="none") * counts).sum() / counts.sum()
        at = self._tensor(inside)
        return intent + self._sampled(
            batch, queries[at], positives[inside], weights[at], owners[inside], random
        )

    def _by_user(self, batch: Batch, random: np.random.Generator) -> Tensor:
        """Return `user_softmax`: negatives meet the vector of the whole history, a like that of the others."""
        options, matrix = self._options, self._matrix
        begins = np.flatnonzero(np.diff(batch.users, prepend=-1))
        ends = np.append(begins, batch.users.size)
        users = batch.users[begins]
        tied = self._spec.tied_feature
        table = None if tied is None else self._item.embeddings[str(tied)]
        length = self._spec.sequence.length if self._spec.sequence.kind != "none" else 0
        features = self._dropped(taken(self._data.users, users), "user", random)
        queries = self._user(
            Features.of(features, self._device), history(matrix, users, length, self._device), table
        )
        target, weights = self._tensor(batch.positives).long(), self._tensor(batch.weights)
        vectors = self._vectors(None, random)
        if options.history == "whole" or not length:
            mine = queries.repeat_interleave(self._tensor(np.diff(ends)), 0)
        else:
            mine = self._examples(batch, random)[0]
        scores = (mine * vectors[target]).sum(1) / options.temperature
        return losses.user_softmax(
            queries / options.temperature,
            vectors,
            self._counted,
            self._owned.lists(users),
            scores,
            ends,
            weights,
        )

    def _examples(
        self, batch: Batch, random: np.random.Generator
    ) -> tuple[Tensor, Int32Array, Tensor, Int32Array | None]:
        """Return queries, item rows of their positives, weights, and which history of the batch each is from."""
        features = taken(self._data.users, batch.users)
        if self._hour is not None:
            newest = batch.offsets[1:] - 1 if self._every else np.arange(batch.users.size)
            times = self._data.interactions.timestamps[batch.entries[newest]]
            features = at_times(features, self._hour, times)
        features = self._dropped(features, "user", random)
        history = Packed(self._tensor(batch.history).long(), batch.offsets)
        tied = self._spec.tied_feature
        table = None if tied is None else self._item.embeddings[str(tied)]
        tasks = None if batch.tasks is None else self._tensor(batch.tasks).long()
        positives, weights, owners = batch.positives, batch.weights, None
        learnt = None if weights.all() else np.flatnonzero(weights)
        if self._every:
            owners = np.repeat(np.arange(batch.users.size, dtype=np.int32), np.diff(batch.offsets))
        which = learnt if self._every else None
        queries = self._user(Features.of(features, self._device), history, table, self._every, tasks, which)
        if learnt is not None:
            positives, weights = positives[learnt], weights[learnt]
            queries = queries if self._every else queries[self._tensor(learnt)]
            owners = None if owners is None else owners[learnt]
        if self._spec.vectors_per_user > 1:
            queries = queries.view(-1, self._spec.vectors_per_user, self._spec.dimension)
        return queries, positives, self._tensor(weights), owners

    def _sampled(
        self,
        batch: Batch,
        queries: Tensor,
        positives: Int32Array,
        weights: Tensor,
        owners: Int32Array | None,
        random: np.random.Generator,
    ) -> Tensor:
        options, count = self._options, positives.size
        users = batch.users if owners is None else batch.users[owners]
        in_batch = self._in_batch(count, random)
        listwise = options.loss in LISTWISE or options.loss == "gbce"
        popular = self._wanted.get("popular", 0)
        if options.loss == "full_softmax":
            drawn = np.arange(len(self._data.items), dtype=np.int32)  # with tasks; those of the cluster count
        else:
            drawn = self._popular.draw(random, popular if listwise else 0)
        pool_only = "interpolated" in self._wanted and not in_batch.size and not drawn.size
        if pool_only:
            drawn = self._popular.draw(random, POOL)
        own, own_masked = self._own(positives, users, 0 if listwise else popular, random)

        # All vectors in one pass of the tower: positives, what the batch shares, then each example's own.
        vectors = self._vectors(np.concatenate([positives, drawn, own.ravel()]), random)
        right = vectors[:count]
        if queries.dim() == 3:
            queries = _best(queries, right)
        shared_rows = np.concatenate([positives[in_batch], drawn])
        shared = torch.cat([right[self._tensor(in_batch)], vectors[count : count + drawn.size]])
        own_vectors = vectors[count + drawn.size :].view(count, own.shape[1], self._spec.dimension)

        queries = queries / options.temperature
        positive = (queries * right).sum(1)
        own_scores = torch.einsum("nd,ncd->nc", queries, own_vectors)
        own_hits = self._tensor(own_masked)
        hits = self._tensor(self._not_asked(batch, shared_rows))
        rows = None if owners is None else self._tensor(owners).long()
        if "interpolated" in self._wanted:
            mixed = self._interpolated(queries, right, shared, hits if rows is None else hits[rows], random)
            own_scores = torch.cat([own_scores, torch.einsum("nd,ncd->nc", queries, mixed)], 1)
            own_hits = F.pad(own_hits, (0, mixed.shape[1]))
        if pool_only:
            shared_rows, shared, hits = shared_rows[:0], shared[:0], hits[:, :0]
        shift, shifts, own_shifts = self._expected(
            positives, shared_rows, own, in_batch.size, popular, listwise
        )
        if options.loss in LISTWISE and shared_rows.size:
            # The hard negatives beside are masked by -inf, and are no draws of the corpus: not corrected.
            beside = torch.cat(
                [(positive - shift).unsqueeze(1), own_scores.masked_fill(own_hits, -torch.inf)], 1
            )
            if self._tasks is None:
                return losses.shared_softmax(queries, shared, shifts, hits, rows, beside, weights)
            of, columns = self._tasks[positives], self._tasks[shared_rows]
            return softmax_inside(queries, shared, shifts, hits, rows, beside, weights, of, columns)
        negative = torch.cat([queries @ shared.T, own_scores], 1)
        masked = torch.cat([hits if rows is None else hits[rows], own_hits], 1)
        if options.loss in LISTWISE:
            return losses.softmax(positive, negative, masked, weights)
        if options.loss == "bce":
            return losses.bce(positive, negative, masked, weights)
        if options.loss == "gbce":
            return losses.gbce(
                positive, negative, masked, weights, options.calibration, len(self._data.items)
            )
        if options.loss == "nce":
            columns = torch.cat([shifts.expand(count, -1), own_shifts], 1)
            columns = F.pad(columns, (0, negative.shape[1] - columns.shape[1]))
            return losses.nce(positive, negative, masked, weights, shift, columns)
        if options.loss == "hinge":
            return losses.hinge(positive, negative, masked, weights, options.margin)
        return losses.logistic(positive, negative, masked, weights)

    def _in_batch(self, count: int, random: np.random.Generator) -> Int32Array:
        """Return which positives of the batch are negatives of the others."""
        wanted = self._wanted.get("in_batch", 0)
        most = min(count if wanted == 1 else wanted, SHARED_CAP, count)
        if most == 0:
            return np.empty(0, np.int32)
        if most == count:
            return np.arange(count, dtype=np.int32)
        return random.choice(count, most, replace=False).astype(np.int32)

    def _own(
        self, positives: Int32Array, users: Int32Array, popular: int, random: np.random.Generator
    ) -> tuple[Int32Array, BoolArray]:
        """Return int32[n, c], the negatives drawn for each example, and bool[n, c]: those that do not count."""
        parts, gone = [np.empty((positives.size, 0), np.int32)], [np.empty((positives.size, 0), np.bool_)]
        if popular:
            parts.append(self._popular.draw(random, (positives.size, popular)))
            gone.append(self._owned.own(users, parts[-1]))
        if self._clusters is not None:
            parts.append(self._clusters.draw(random, positives, self._wanted["cluster"]))
            gone.append(self._owned.own(users, parts[-1]))
        if self._rejects is not None:
            rows, found = self._rejects.draw(random, users, self._wanted["reject"])
            parts.append(rows)
            gone.append(self._owned.own(users, rows) | ~found[:, None])
        own, masked = np.concatenate(parts, 1), np.concatenate(gone, 1)
        if self._tasks is not None:
            masked |= self._tasks[own] != self._tasks[positives][:, None]
        return own, masked

    def _not_asked(self, batch: Batch, shared: Int32Array) -> BoolArray:
        """Return bool[n, m]: which shared negatives a history has not: its user has the item, or its task is another."""
        hits = self._owned.shared(batch.users, shared)
        if self._tasks is not None and batch.tasks is not None:
            hits |= self._tasks[shared] != batch.tasks[:, None]
        return hits

    def _expected(
        self,
        positives: Int32Array,
        shared: Int32Array,
        own: Int32Array,
        in_batch: int,
        popular: int,
        listwise: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log of the expected draws of the positives [n], the shared negatives [m] and each example's own [n, c].

        Hard negatives are no draws from the corpus and are not corrected: 0. Without draws, or without logQ, all are 0.
        """
        loss, sources = self._options.loss, []
        if loss == "nce" or (loss == "softmax" and self._options.logq != "none"):
            if in_batch and self.streaming is not None:
                sources.append((1, self.streaming.probabilities))
            elif in_batch:
                sources.append((in_batch, lambda rows: self._batch_share[rows]))
            if popular:
                sources.append((popular, lambda rows: self._popular.probabilities[rows]))

        def expected(rows: Int32Array) -> Float32Array:
            if not sources:
                return np.zeros(rows.shape, np.float32)
            return log_expected([(count, of(rows)) for count, of in sources])

        own_shifts = np.zeros(own.shape, np.float32)
        if not listwise:
            own_shifts[:, :popular] = expected(own[:, :popular])
        return self._tensor(expected(positives)), self._tensor(expected(shared)), self._tensor(own_shifts)

    def _interpolated(
        self,
        queries: Tensor,
        right: Tensor,
        shared: Tensor,
        masked: Tensor,
        random: np.random.Generator,
    ) -> Tensor:
        """Return float32[n, count, d]: alpha v+ + (1 - alpha) v-, v- the shared negatives that score highest.

        alpha is uniform in 0 to `interpolation`. The positive's part is held fixed: it must not be pushed off.
        """
        count = min(self._wanted["interpolated"], shared.shape[0])
        with torch.no_grad():
            hardest = (queries @ shared.T).masked_fill(masked, -torch.inf).topk(count, 1).indices
        alpha = self._tensor(
            random.random((queries.shape[0], count, 1), np.float32) * np.float32(self._options.interpolation)
        )
        mixed = alpha * right.detach().unsqueeze(1) + (1 - alpha) * shared[hardest]
        return unit(mixed) if self._spec.metric == "cosine" else mixed

    def _vectors(self, rows: Int32Array | None, random: np.random.Generator) -> Tensor:
        """Return the vectors of items, None: all; where more are asked for than there are, each is computed once."""
        items = self._data.items
        if rows is not None and rows.size >= len(items):
            return self._vectors(None, random)[self._tensor(rows).long()]
        asked = items if rows is None else taken(items, rows)
        vectors: Tensor = self._item(Features.of(self._dropped(asked, "item", random), self._device))
        return vectors

    def _dropped(self, features: Encoded, side: Side, random: np.random.Generator) -> Encoded:
        """Return the features with some unknown, so that what serving does without is trained."""
        share = self._options.feature_dropout
        if not share or reads_one(self._spec, side):
            return features
        return some_unknown(features, share, random)

    def _views(self, random: np.random.Generator) -> Tensor:
        options, items = self._options, self._data.items
        rows = random.choice(len(items), min(VIEWS, options.batch, len(items)), replace=False).astype(
            np.int32
        )
        mask = options.masks[int(random.integers(len(options.masks)))]
        views = two_views(taken(items, rows), self._spec.item_features, mask, self._related, random)
        first, second = (self._item(Features.of(view, self._device)) for view in views)
        return view_loss(first, second, options.temperature)

    def _tensor(self, array: np.typing.NDArray[np.generic]) -> Tensor:
        return tensor(array, self._device)


def hour_column(spec: ModelSpec) -> int | None:
    """Return the column of the user features' codes that is the hour of the day; None: there is none."""
    names = [feature.name for feature in spec.user_features if feature.coded]
    return names.index(HOUR) if HOUR in names else None


def at_times(features: Encoded, column: int, times: Int64Array) -> Encoded:
    """Return the features with the hour of int64[n] times in its column."""
    codes = features.codes.copy()
    codes[:, column] = np.where(times > 0, times // 3600 % HOURS + 1, 0)
    return Encoded(codes, features.multi, features.numbers)


def some_unknown(features: Encoded, share: float, random: np.random.Generator) -> Encoded:
    """Return the features with a share of them unknown."""
    codes = np.where(random.random(features.codes.shape, np.float32) < share, 0, features.codes)
    numbers = features.numbers
    if numbers.shape[1]:
        gone = random.random((numbers.shape[0], numbers.shape[1] // 2), np.float32) < share
        numbers = numbers.copy()
        numbers[:, 0::2][gone], numbers[:, 1::2][gone] = 0.0, 1.0
    return Encoded(codes.astype(np.int32, copy=False), features.multi, numbers)


def _best(queries: Tensor, right: Tensor) -> Tensor:
    """Return each example's interest that likes its positive most: float32[n, d] (Cen et al. 2020, eq. 7)."""
    scores = torch.einsum("nkd,nd->nk", queries, right)
    return queries[torch.arange(queries.shape[0], device=queries.device), scores.argmax(1)]


def softmax_inside(
    queries: Tensor,
    shared: Tensor,
    shifts: Tensor,
    masked: Tensor,
    owners: Tensor | None,
    own: Tensor,
    weights: Tensor,
    of: Int32Array,
    columns: Int32Array,
) -> Tensor:
    """Return `losses.shared_softmax`, the scores of each task's examples with the negatives of that task alone.

    Those of the other tasks are masked: of ten tasks nine of ten scores.

    Args: as `losses.shared_softmax`; of: int32[n], columns: int32[m], the tasks of the positives and of the negatives.
    """
    whole, total = weights.sum(), queries.new_zeros(())
    for task in np.unique(of):
        mine, its = (tensor(np.flatnonzero(each == task), queries.device) for each in (of, columns))
        hits = masked[mine][:, its] if owners is None else masked[:, its]
        part = losses.shared_softmax(
            queries[mine], shared[its], shifts[its], hits, None if owners is None else owners[mine], own[mine],
            weights[mine],
        )  # fmt: skip
        total = total + part * (weights[mine].sum() / whole)
    return total
