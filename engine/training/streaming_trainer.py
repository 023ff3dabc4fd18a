"""The streaming trainer of streaming VQ: towers, codebook and ranking step learn from impressions as they come.

Source: Bin et al. 2025, "Real-time Indexing for Large-scale Recommendation by Streaming Vector Quantization Retriever".
What a step does, in this order: it notes how often the items come (`frequency.py`); makes the vectors of the batch's
items; assigns them by the codebook as it stands; does a gradient step on L_aux + L_ind (`vq_losses.py`), the ranking
step's loss added, in which items receive the gradient of their clusters; and moves the codebook by the same vectors
(`members.py`; with `centres = "moving"` by `engine/models/codebook.py`). Everything random is a function of (seed, step),
and a step reads nothing but the batch and the state: the same impressions from the same state give the same assignments,
bit for bit.

Where this deviates from the paper, besides what those modules say:

- The codebook begins at the vectors that items have at first; the paper does not say where its own begins.
- Tables of embeddings take large steps, since most of their rows are read seldom and a stream passes once; dense layers,
  which every example moves, take smaller ones (`dense_rate`). With one size the ranking step of a one-pass training found
  no more than popularity does (docs/benchmarks.md).
- What users were shown and did nothing of moves the clusters (its reward weighs 1, eq. 12) and is no negative of theirs.
- The ranking step learns by a softmax over the columns as the index step does, and does not move the index step's item
  vectors; it shares the embeddings of the user's features, and these it moves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.core.errors import BuildError, ConfigError, SnapshotError
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.models.codebook import Codebook, coarse_clusters, occurrence_weights, sizes_of
from engine.models.encoded import Encoded, Multi
from engine.models.features import take_encoded
from engine.models.streaming_options import StreamingOptions
from engine.models.vq_spec import PUBLISHED, VqSpec
from engine.training.frequency import Intervals
from engine.training.impressions import ImpressionBatch
from engine.training.members import Members
from engine.training.optimizers import Optimizer, lazy_tables
from engine.training.replay import Memory
from engine.training.trainer import begin_at
from engine.training.vq_losses import column_logs
from engine.training.vq_model import Columns, VqModel, id_table

BLOCK = 8192
"""Items of the candidate stream whose vectors are made at once."""

SETTLE_EVERY = 100
"""Steps between two looks at what is not learnt from each batch: the rows of unknown items, the coarser clusters."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    Attributes:
        items: int32[m], the distinct items of the batch, rising.
        clusters: int32[m], where they are now.
        biases: float32[m], their biases.
        losses: by name (`auxiliary`, `index`, `similarity`, `rank`), means over the tasks by weight; what is not
            asked for is not there.
        loss: the sum that was learnt; NaN where no impression of the batch has a reward, so that only the codebook moved.
    """

    items: Int32Array
    clusters: Int32Array
    biases: Float32Array
    losses: dict[str, float]
    loss: float


class StreamingTrainer:
    """Learns impressions batch by batch, on the CPU. One thread uses it; torch's threads are the caller's to set.

    Attributes:
        spec, options: as given.
        items: the features of all items, those published since the build at the end.
        codebook: the clusters.
        assignment: int32[n], the cluster of each item as it was last assigned; -1: not yet.
        biases: float32[n], likewise.
        steps: steps done.
    """

    def __init__(
        self,
        spec: VqSpec,
        options: StreamingOptions,
        items: Encoded,
        arrays: Mapping[str, AnyArray] | None = None,
        threads: int = 1,
        spare: int = 0,
    ) -> None:
        """Begin at random, or where an earlier training was.

        Args:
            spec: of the model; `spec.tower.items` items have embeddings of their own.
            options: of the training; `tasks` has the names of `spec.tasks`.
            items: the features of all items, `spec.tower.items` rows or more.
            arrays: an earlier model's, as `arrays` returns them, in the shapes of `spec`; None: begin at random. Rows of
                `assignment` may be -1 or missing at the end.
            threads: cores that assign items to clusters.
            spare: how many of the items that are added later get embeddings of their own, too.

        Raises:
            ConfigError: there are more clusters than items, or the tasks are others.
            BuildError: the arrays are of another model.
        """
        known = spec.tower.items
        if spec.clusters > known:
            raise ConfigError(
                f"{spec.clusters:,} clusters are more than the {known:,} items: most would be empty",
                "clusters",
            )
        names = tuple(task.name for task in options.tasks)
        if names != spec.tasks:
            raise ConfigError(
                f"the model has the tasks {', '.join(spec.tasks)}, the training {', '.join(names)}", "tasks"
            )
        if len(items) < known:
            raise BuildError(f"features of {len(items):,} items are given, and the model has {known:,}")
        self.spec, self.options, self.items = spec, options, items
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="assign") if threads > 1 else None
        self._known, self._coded = known, known + spare
        self._published: Mapping[str, AnyArray] = {}
        self._etas = np.array([task.eta for task in options.tasks], np.float64)
        self._weights = {
            "auxiliary": options.auxiliary_weight, "index": options.index_weight,
            "similarity": options.similarity_weight, "rank": options.rank_weight,
        }  # fmt: skip
        self._debiases = spec.rank == "complex" and spec.dropped_clusters > 0
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            self._model = VqModel(spec, options, spare)
        self._optimizers = self._made_optimizers()
        n = len(items)
        self.steps = 0
        self.assignment = np.full(n, -1, np.int32)
        self.biases = np.zeros(n, np.float32)
        self._intervals = Intervals(n, options.frequency_rate)
        self._memory = Memory(options.memory if options.replay else 0, spec.read)
        self._members = (
            Members(n, spec.clusters, spec.tower.dimension) if options.centres == "members" else None
        )
        self._cursor = 0
        self._groups = np.full(known + 1, -1, np.int32)
        self._secondary = np.zeros(spec.clusters, np.int32)
        if arrays is None:
            self.codebook = Codebook.at(
                self._first_clusters(), options.decay, options.boost, options.crowding
            )
        else:
            self._begin_at(arrays)
        self._settle()

    # --- the streams -------------------------------------------------------------------------------------------

    def step(self, batch: ImpressionBatch) -> StepResult:
        """Learn a batch of the impression stream.

        Raises:
            BuildError: a reward is below 0 or no number, an item row is not there, or the loss is no number.
        """
        options = self.options
        batch.check(len(self.items), self.spec.tasks)
        random = np.random.default_rng((options.seed, self.steps))
        new, fresh = batch, len(batch)
        batch = self._memory.draw(new, round(options.replay * fresh), random)
        drawn = random.integers(0, len(self.items), options.negatives, dtype=np.int32)
        rows, place = np.unique(np.concatenate((batch.items, drawn)), return_inverse=True)
        own: Int64Array = place[: len(batch)].astype(np.int64)
        self._intervals.update(new.items)
        deltas = self._intervals.of(rows)

        features = take_encoded(self.items, rows)
        vectors = self._model.item_vectors(features)
        plain = vectors.detach().numpy()
        there = np.zeros(rows.size, np.bool_)
        there[own[:fresh]] = True
        # Items that are drawn or come from memory stand for the cluster that they were last put in: most of the time goes
        # into assigning.
        clusters = self.assignment[rows]
        clusters[there] = self.codebook.place(
            plain[there], rows[there], self.assignment, self._pool, self._threads
        )
        nowhere = clusters < 0
        clusters[nowhere] = self.codebook.assign(plain[nowhere], self._pool, self._threads)
        codes = self._model.codes(rows)
        biases = self._model.biases(codes)
        result = (rows[there], clusters[there], biases.detach().numpy()[there])

        losses: dict[str, Tensor] = {}
        if (batch.rewards > 0).any():
            shift = column_logs(deltas, len(batch), options.negatives, len(self.items))
            columns = Columns(
                self._model.partly_hidden(features, vectors, random),
                torch.from_numpy(self.codebook.vectors[clusters]), biases, codes, torch.from_numpy(shift), own,
            )  # fmt: skip
            losses = self._model.losses(
                batch.users, batch.encoded, batch.rewards, batch.timestamps, columns, self._groups, random
            )
        own = own[:fresh]
        loss = self._learn(losses)
        if self._members is None:
            weights = occurrence_weights(new.rewards, self._etas, deltas[own], options.beta)
            self.codebook.update(clusters[own], plain[own], weights)
        else:
            counted = occurrence_weights(new.rewards, self._etas, np.ones(fresh), 0.0)
            self._members.reward(new.items, counted, options.frequency_rate)
            self._hold(rows[there], clusters[there], plain[there])
        if options.replay:
            self._memory.keep(new, random)
        self._note(*result)
        self.steps += 1
        if self.steps % SETTLE_EVERY == 0:
            self._settle()
        return StepResult(*result, {name: float(value.detach()) for name, value in losses.items()}, loss)

    def assign(self, rows: Int32Array) -> tuple[Int32Array, Float32Array]:
        """Put items where they belong now, without learning: the candidate stream.

        Args:
            rows: int32[n], item rows.

        Returns:
            int32[n] clusters and float32[n] biases.
        """
        clusters, biases = np.empty(rows.size, np.int32), np.empty(rows.size, np.float32)
        with torch.no_grad():
            for begin in range(0, rows.size, BLOCK):
                part = slice(begin, begin + BLOCK)
                vectors = self._model.item_vectors(take_encoded(self.items, rows[part])).numpy()
                clusters[part] = self.codebook.place(
                    vectors, rows[part], self.assignment, self._pool, self._threads
                )
                biases[part] = self._model.biases(self._model.codes(rows[part])).numpy()
                self._hold(rows[part], clusters[part], vectors)
        self._note(rows, clusters, biases)
        return clusters, biases

    def candidates(self, count: int) -> Int32Array:
        """Return int32[count], at most all: the items whose turn it is in the candidate stream."""
        n = len(self.items)
        rows = (self._cursor + np.arange(min(count, n))) % n
        self._cursor = int((self._cursor + rows.size) % n)
        return rows.astype(np.int32)

    def add_items(self, items: Encoded, learnt: Int32Array | None = None) -> Int32Array:
        """Take in items published since, and return int32[m], their rows: the next ones.

        While rows of the tables are spare, each has one of its own. That begins as what stands for unknown items, so that
        an item is known by its features before it is by its events. Later ones share the row of the unknown.

        Args:
            items: their features.
            learnt: int32[m], where they stand among the published items of the arrays that the trainer began with, whose
                rows they go on from; -1: nowhere.
        """
        before = len(self.items)
        n = before + len(items)
        codes = np.arange(before, min(n, self._coded)) + 1
        self._begin_rows(codes, np.full(len(items), -1, np.int32) if learnt is None else learnt)
        self.items = _joined(self.items, items)
        at = id_table(self.spec.tower)
        if at is not None:
            column = sum(feature.coded for feature in self.spec.tower.item_features[:at])
            self.items.codes[codes - 1, column] = codes
        self.assignment = np.concatenate((self.assignment, np.full(n - before, -1, np.int32)))
        self.biases = np.concatenate((self.biases, np.zeros(n - before, np.float32)))
        self._intervals.grow(n)
        if self._members is not None:
            self._members.grow(n)
        return np.arange(before, n, dtype=np.int32)

    @property
    def learning(self) -> int:
        """How many of the items that were added have rows of their own."""
        return max(0, min(len(self.items), self._coded) - self._known)

    def weigh(self, counts: Int64Array) -> None:
        """Set the weights of a weighted mean of histories from int64[items], how many users like each item."""
        if self.spec.tower.sequence.weighted:
            self._model.weigh(counts)

    # --- what is kept ------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, AnyArray]:
        """Return the model as a bundle has it: the arrays that `engine/models/vq_spec.py` lists, copies."""
        made: dict[str, AnyArray] = {
            name: value.detach().numpy().astype(np.float32, copy=True)
            for name, value in self._model.state_dict().items()
        }
        made["bias.weight"] = made["bias.weight"][:, 0].copy()
        codes, learning = self._known + 1, self.learning
        if self._coded > self._known:
            for name in self._model.item_tables():
                made[PUBLISHED + name] = made[name][codes : codes + learning].copy()
                made[name] = made[name][:codes].copy()
        book = self.codebook
        made["codebook.sums"], made["codebook.counts"] = book.sums.copy(), book.counts.copy()
        made["codebook.vectors"] = book.vectors.copy()
        made["assignment"], made["item_bias"] = self.assignment.copy(), self.biases.copy()
        if self._debiases:
            made["secondary"] = self._coarse()
        if self.spec.rank != "none":
            n, spec = len(self.items), self.spec
            vectors = np.empty((n, spec.rank_dimension), np.float32)
            biases = np.empty((n, len(spec.tasks)), np.float32)
            for begin in range(0, n, BLOCK):
                rows = np.arange(begin, min(begin + BLOCK, n), dtype=np.int32)
                part = self._model.ranked_items(take_encoded(self.items, rows), rows)
                vectors[begin : begin + rows.size], biases[begin : begin + rows.size] = part
            made["rank.item_vectors"], made["rank.item_bias"] = vectors, biases
            if self._coded > self._known:
                own = slice(self._known, self._known + learning)
                made[f"{PUBLISHED}rank.item_vectors"] = vectors[own].copy()
                made[f"{PUBLISHED}rank.item_bias"] = biases[own].copy()
        return made

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on, a copy: tensors, numbers and lists, as `torch.save` takes them."""
        published = take_encoded(self.items, np.arange(self._known, len(self.items), dtype=np.int32))
        intervals, members = self._intervals, {} if self._members is None else self._members.state()
        arrays: dict[str, AnyArray] = {
            "sums": self.codebook.sums, "counts": self.codebook.counts,
            "last": intervals.last, "gap": intervals.gap, "seen": intervals.seen,
            "assignment": self.assignment, "biases": self.biases,
            "groups": self._groups, "secondary": self._secondary,
            "codes": published.codes, "numbers": published.numbers,
        }  # fmt: skip
        for at, many in enumerate(published.multi):
            arrays |= {f"multi.{at}.codes": many.codes, f"multi.{at}.offsets": many.offsets}
        return {
            "model": copy.deepcopy(dict(self._model.state_dict())),
            "optimizers": [copy.deepcopy(each.state()) for each in self._optimizers],
            "arrays": {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()},
            "memory": {name: torch.from_numpy(array) for name, array in self._memory.state().items()},
            "members": {name: torch.from_numpy(array.copy()) for name, array in members.items()},
            "place": (self.steps, self._cursor, intervals.now),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of a trainer of the same specification, options and catalogue.

        Raises:
            SnapshotError: it is of another one.
        """
        try:
            self._restore(copy.deepcopy(state))
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise SnapshotError(f"the state of the training is of another model: {error}", "state") from error

    def _restore(self, state: dict[str, Any]) -> None:
        arrays = {name: value.numpy() for name, value in state["arrays"].items()}
        own = take_encoded(self.items, np.arange(self._known, dtype=np.int32))
        multi = tuple(
            Multi(arrays[f"multi.{at}.codes"], arrays[f"multi.{at}.offsets"]) for at in range(len(own.multi))
        )
        self.items = _joined(own, Encoded(arrays["codes"], multi, arrays["numbers"]))
        if arrays["assignment"].size != len(self.items) or arrays["sums"].shape != self.codebook.sums.shape:
            raise ValueError("it has other items or clusters")
        self._model.load_state_dict(state["model"])
        for optimizer, kept in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load(kept)
        self._intervals.last, self._intervals.gap = arrays["last"], arrays["gap"]
        self._intervals.seen = arrays["seen"]
        self.assignment, self.biases = arrays["assignment"], arrays["biases"]
        self._memory.load({name: value.numpy() for name, value in state["memory"].items()})
        if self._members is not None:
            self._members.load({name: value.numpy() for name, value in state["members"].items()})
        self.codebook = self._codebook_of(arrays["sums"], arrays["counts"])
        self._groups, self._secondary = arrays["groups"], arrays["secondary"]
        self.steps, self._cursor, self._intervals.now = state["place"]

    # --- parts of a step ---------------------------------------------------------------------------------------

    def _learn(self, losses: dict[str, Tensor]) -> float:
        """Do a gradient step; return the weighted sum, NaN where there is nothing to learn."""
        if not losses:
            return float("nan")
        total = torch.stack([self._weights[name] * loss for name, loss in losses.items()]).sum()
        value = float(total.detach())
        if not np.isfinite(value):
            raise BuildError(
                f"the loss is {value} at step {self.steps + 1}: look for NaN or huge values in numeric features, or take "
                "a smaller learning_rate"
            )
        for optimizer in self._optimizers:
            optimizer.zero()
        total.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        return value

    def _made_optimizers(self) -> tuple[Optimizer, ...]:
        """Of the tables, and of the dense layers."""
        options, model = self.options, self._model
        lazy = lazy_tables(model.named_modules(), torch.device("cpu"))
        in_tables = {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        }
        every = dict(model.named_parameters())
        parts = (
            ({name: every[name] for name in every if name in in_tables}, options.learning_rate),
            (
                {name: every[name] for name in every if name not in in_tables},
                options.dense_rate * options.learning_rate,
            ),
        )
        return tuple(
            Optimizer(part, lazy & set(part), "adam", rate, options.weight_decay)
            for part, rate in parts
            if part
        )

    def _hold(self, rows: Int32Array, clusters: Int32Array, vectors: Float32Array) -> None:
        """Let distinct items count where they are now, if clusters are the means of their items."""
        if self._members is not None:
            rates = self._intervals.of(rows) ** (self.options.beta - 1.0)
            self._members.put(rows, clusters, vectors, rates, self.codebook)

    def _note(self, rows: Int32Array, clusters: Int32Array, biases: Float32Array) -> None:
        """Keep where items are now."""
        self.assignment[rows], self.biases[rows] = clusters, biases
        if self._debiases:
            known = rows < self._known
            self._groups[rows[known] + 1] = self._secondary[clusters[known]]

    def _settle(self) -> None:
        """Bring up to date what is not learnt from each batch."""
        self._model.settle()
        if self._debiases:
            self._secondary = self._coarse()
            placed = np.flatnonzero(self.assignment[: self._known] >= 0)
            self._groups[placed + 1] = self._secondary[self.assignment[placed]]

    def _coarse(self) -> Int32Array:
        return coarse_clusters(self.codebook.vectors, self.spec.secondary_clusters, self.options.seed)

    def _first_clusters(self) -> Float32Array:
        """float32[K, d]: vectors of items, with so little noise that those of equal items differ."""
        random = np.random.default_rng((self.options.seed, 0xC0DE))
        rows = np.sort(random.choice(self._known, self.spec.clusters, replace=False)).astype(np.int32)
        with torch.no_grad():
            vectors = self._model.item_vectors(take_encoded(self.items, rows)).numpy()
        noise = random.standard_normal(vectors.shape, np.float32)
        return np.asarray(vectors + np.float32(1e-3 * vectors.std()) * noise, np.float32)

    def _begin_at(self, arrays: Mapping[str, AnyArray]) -> None:
        """Begin with an earlier model; BuildError where it is of another shape."""
        spec = self.spec
        shapes = {
            "codebook.sums": (spec.clusters, spec.tower.dimension), "codebook.counts": (spec.clusters,),
            "bias.weight": (spec.tower.items + 1,),
        }  # fmt: skip
        for name, shape in shapes.items():
            if name not in arrays or arrays[name].shape != shape:
                had = f"has shape {list(arrays[name].shape)}" if name in arrays else "is missing"
                raise BuildError(
                    f"the earlier model is another one: {name} {had}, and shape {list(shape)} is needed"
                )
        tables = {name: arrays[name] for name in self._model.item_tables() if name in arrays}
        if self._coded > self._known:  # what is spare begins with the item that gets it
            spare = self._coded - self._known
            tables = {
                name: np.concatenate((table, np.zeros((spare, *table.shape[1:]), np.float32)))
                for name, table in tables.items()
            }
        tables["bias.weight"] = tables["bias.weight"][:, None]
        begin_at(self._model, {**arrays, **tables}, "")
        self._published = {
            name: arrays[PUBLISHED + name] for name in self._model.item_tables() if PUBLISHED + name in arrays
        }
        with torch.no_grad():
            for name, value in self._model.named_buffers():
                if name in arrays and arrays[name].shape == tuple(value.shape):
                    value.copy_(torch.from_numpy(np.array(arrays[name])))
        for name, mine in (("assignment", self.assignment), ("item_bias", self.biases)):
            given = arrays.get(name, mine[:0])[: mine.size]
            mine[: given.size] = given
        if int(self.assignment.max(initial=-1)) >= spec.clusters:
            raise BuildError(
                f"the earlier model is another one: it has cluster {int(self.assignment.max())}, and there are "
                f"{spec.clusters:,}"
            )
        self.codebook = self._codebook_of(arrays["codebook.sums"], arrays["codebook.counts"])
        if self._members is not None:
            self._members.begin(self.codebook, self.assignment)

    def _begin_rows(self, codes: Int64Array, learnt: Int32Array) -> None:
        """Set the rows of items that are new: as an earlier training left them, else as that of the unknown."""
        if not codes.size:
            return
        carried = np.flatnonzero(learnt[: codes.size] >= 0)
        with torch.no_grad():
            for name, table in self._model.item_tables().items():
                table.weight[codes] = table.weight[0].clone()
                if carried.size and name in self._published:
                    rows = self._published[name][learnt[carried]].reshape(carried.size, -1)
                    table.weight[codes[carried]] = torch.from_numpy(np.array(rows, np.float32))

    def _codebook_of(self, sums: Float32Array, counts: Float32Array) -> Codebook:
        """The clusters, with the items that are in them now."""
        options = self.options
        sizes = sizes_of(self.assignment, self.spec.clusters)
        return Codebook(sums, counts, options.decay, options.boost, options.crowding, sizes)


def _joined(first: Encoded, second: Encoded) -> Encoded:
    """Return the rows of both, one after the other."""
    multi = tuple(
        Multi(
            np.concatenate((one.codes, other.codes)),
            np.concatenate((one.offsets, one.offsets[-1] + other.offsets[1:])),
        )
        for one, other in zip(first.multi, second.multi, strict=True)
    )
    return Encoded(
        np.concatenate((first.codes, second.codes)), multi, np.concatenate((first.numbers, second.numbers))
    )
