"""What a batch is worth to Deep Retrieval: the likelihood of the labels' paths, and the softmax that reranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.core.errors import ConfigError
from engine.core.types import Float32Array, Int32Array, Int64Array
from engine.models.path_options import PathTrainingOptions
from engine.models.paths import PathSpec
from engine.models.spec import ModelSpec
from engine.training import losses
from engine.training.batches import Batch
from engine.training.data import TrainingData
from engine.training.export import reads_one, taken
from engine.training.negatives import AliasTable, Owned, log_expected
from engine.training.objective import at_times, hour_column, some_unknown
from engine.training.paths import PathModel, Ranker, with_one
from engine.training.tensors import Features, Packed, tensor
from engine.training.towers import UserTower


@dataclass(frozen=True, slots=True)
class Examples:
    """What of a batch is learnt.

    Attributes:
        queries: float32[n, e], the users' vectors, with their graph.
        labels: int32[n], item rows.
        weights: float32[n].
        owners: int32[n], which user of the batch each example is from.
    """

    queries: Tensor
    labels: Int32Array
    weights: Tensor
    owners: Int32Array


class PathObjective:
    """The two losses of a batch.

    Q_str = sum over examples of log sum over the J paths of the label of p(path | user) (section 2.1), Q_softmax the
    sampled softmax with logQ (section 2.3). The penalty of the paths' sizes does not depend on what gradients move.

    Args:
        spec: of the user tower; lattice: of the paths.
        options: of the training.
        data: what is trained on.
        user, paths, ranker: the parts of the model.
        every: each item of a history is an example.
    """

    def __init__(
        self,
        spec: ModelSpec,
        lattice: PathSpec,
        options: PathTrainingOptions,
        data: TrainingData,
        user: UserTower,
        paths: PathModel,
        ranker: Ranker,
        every: bool,
    ) -> None:
        self._spec, self._lattice, self._options, self._data, self._every = (
            spec, lattice, options, data, every,
        )  # fmt: skip
        self._user, self._paths, self._ranker = user, paths, ranker
        self._device = next(paths.parameters()).device
        matrix = data.interactions
        self._owned = Owned.of(matrix)
        self._popular = AliasTable(matrix.item_counts().astype(np.float64) ** options.popularity_power)
        if not options.negatives and matrix.items > losses.FULL_SOFTMAX_ITEMS:
            raise ConfigError(
                f"0 compares with every item in each step; {matrix.items:,} are more than "
                f"{losses.FULL_SOFTMAX_ITEMS:,}: draw some",
                "training.negatives",
            )
        self._hour = hour_column(spec)

    def examples(self, batch: Batch, random: np.random.Generator) -> Examples:
        """Return the examples of a batch, those that weigh nothing left out."""
        options, spec = self._options, self._spec
        features = taken(self._data.users, batch.users)
        if self._hour is not None:
            newest = batch.offsets[1:] - 1 if self._every else np.arange(batch.users.size)
            features = at_times(
                features, self._hour, self._data.interactions.timestamps[batch.entries[newest]]
            )
        if options.feature_dropout and not reads_one(spec, "user"):
            features = some_unknown(features, options.feature_dropout, random)
        history = Packed(self._tensor(batch.history).long(), batch.offsets)
        queries = self._user(Features.of(features, self._device), history, None, self._every)
        owners = np.arange(batch.users.size, dtype=np.int32)
        if self._every:
            owners = np.repeat(owners, np.diff(batch.offsets))
        labels, weights = batch.positives, batch.weights
        if not weights.all():
            learnt = np.flatnonzero(weights)
            labels, weights, owners = labels[learnt], weights[learnt], owners[learnt]
            queries = queries[self._tensor(learnt)]
        return Examples(queries, labels, self._tensor(weights), owners)

    def path_loss(self, examples: Examples, assignment: Int64Array) -> tuple[Tensor, Float32Array]:
        """Return the mean of -log sum_j p(c_j | user), and float32[n, J], p(c_j | user) of the labels' own paths.

        Args:
            examples: n of them.
            assignment: int64[items, J], -1 where there are fewer, of which p is 0.
        """
        codes = assignment[examples.labels]
        none = codes < 0
        nodes = self._tensor(self._lattice.nodes(np.maximum(codes, 0)))
        each = self._paths(examples.queries, nodes)
        if none.any():
            each = each.masked_fill(self._tensor(none), -torch.inf)
        loss = -torch.logsumexp(each, 1)
        mean = (loss * examples.weights).sum() / examples.weights.sum()
        return mean, each.detach().exp().cpu().numpy()

    def softmax_loss(self, batch: Batch, examples: Examples, random: np.random.Generator) -> Tensor:
        """Return the mean loss of the softmax: of all items; or sampled with logQ, without items that the user has."""
        options = self._options
        queries, labels = with_one(examples.queries), self._tensor(examples.labels).long()
        if not options.negatives:
            return losses.full_softmax(queries, self._ranker.whole(), labels, examples.weights, 1.0)
        drawn = self._popular.draw(random, options.negatives)
        count, chances = options.negatives, self._popular.probabilities
        right = self._ranker(labels)
        own = (queries * right).sum(1) - self._tensor(log_expected([(count, chances[examples.labels])]))
        return losses.shared_softmax(
            queries,
            self._ranker(self._tensor(drawn).long()),
            self._tensor(log_expected([(count, chances[drawn])])),
            self._tensor(self._owned.shared(batch.users, drawn)),
            self._tensor(examples.owners).long(),
            own.unsqueeze(1),
            examples.weights,
        )

    def _tensor(self, array: np.typing.NDArray[np.generic]) -> Tensor:
        return tensor(array, self._device)
