"""Training of Deep Retrieval: the paths of items and the model that finds them, by turns (Gao et al. 2020)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.core.channel import Progress, SilentProgress
from engine.core.errors import BuildError, ConfigError
from engine.core.types import AnyArray, Float32Array, Float64Array
from engine.models.assignment import (
    add_own,
    add_scores,
    assign,
    empty_scores,
    moved_share,
    path_sizes,
    random_paths,
    scores_of,
    with_own,
)
from engine.models.options import Mode
from engine.models.path_options import PathTrainingOptions
from engine.models.paths import PathSpec
from engine.models.spec import ModelSpec
from engine.training import checkpoint, curves
from engine.training.batches import Batch, Pairs
from engine.training.data import TrainingData
from engine.training.optimizers import Optimizer, lazy_tables
from engine.training.path_objective import Examples, PathObjective
from engine.training.path_validation import recall_of_paths
from engine.training.paths import PathModel, Ranker
from engine.training.tensors import tensor
from engine.training.towers import build_user_tower
from engine.training.trainer import FADE, LEAST_REFERENCE, begin_at, example_weights, is_memory, torch_threads
from engine.training.validation import HeldOut, hold_out
from engine.training.windows import Windows


@dataclass(frozen=True, slots=True)
class TrainedPaths:
    """A finished training.

    Attributes:
        arrays: by name: float32 `user.<parameter>`, `paths.<parameter>`, `rank.vectors` [items, e], `rank.bias` [items];
            `assignment` int64[items, J], codes of each item's paths in the order chosen, -1 behind them where there are
            fewer;
            `scores.paths` int64[items, S], `scores.values` float32[items, S], best first, -1 and 0 where empty.
        curves: per epoch `loss` (of both parts), `path_loss`, `softmax_loss`, `recall` (of what is held out, where
            something is), `exact` (the same of all items by the softmax alone), `largest` (items on the fullest path),
            `moved` (share of the items whose paths the M-step changed), `seconds`.
        epochs: epochs done.
        best: the epoch whose model this is, from 1.
        seconds: what training took, in all the processes that had a part in it.
    """

    arrays: dict[str, AnyArray]
    curves: dict[str, list[float]]
    epochs: int
    best: int
    seconds: float


def train_paths(
    spec: ModelSpec,
    paths: PathSpec,
    options: PathTrainingOptions,
    data: TrainingData,
    progress: Progress,
    work: Path | None = None,
    start: Mapping[str, AnyArray] | None = None,
    threads: int = 1,
    mode: Mode = "full",
    *,
    per_item: int = 3,
    kept: int = 20,
) -> TrainedPaths:
    """Train the user tower, the paths' layers, the softmax and the assignment of items to paths.

    The same specifications, options, data and start on the same machine, device and threads give the same arrays.

    Args:
        spec: of the user tower: `metric = "inner"`, `tie_items = False`, a sequence of one vector, `dimension` that of
            `paths`, `items` known. What it says of an item tower is not looked at: items are rows of a table here.
        paths: of the lattice and its layers.
        options: of the training.
        data: positives and the users' features; `data.items` is not read (an `Encoded` of no features will do).
        progress: told of each epoch's batches and each M-step's items.
        work: where a checkpoint is kept after each epoch, which a later call for the same training goes on from, and
            where `curves.png` is written; None: nowhere.
        start: arrays of an earlier `TrainedPaths`, in the shapes of `spec` and `paths`, for `resume` and `incremental`.
            Rows of `assignment` that are all -1 (new items) begin on random paths.
        threads: cores to use.
        mode: `full` begins at random; `resume` does one shuffled pass from `start`; `incremental` is the paper's
            streaming: one pass over `data.examples` in order of time, in which everything learns.
        per_item: J, paths of an item (the channel's option `paths`).
        kept: S, paths whose scores are kept for each item (`kept_paths`).

    Raises:
        ConfigError: J exceeds S, or S the number of paths; or the options cannot work with the data.
        BuildError: if there is nothing to learn from, the loss is no number or grows, or memory does not suffice.
    """
    if per_item > kept:
        raise ConfigError(
            f"{per_item} paths are chosen among the {kept} whose scores are kept (kept_paths): they are too few",
            "paths",
        )
    if kept > paths.paths:
        raise ConfigError(
            f"{kept} are more than the {paths.paths:,} paths of width {paths.width} and depth {paths.depth}",
            "kept_paths",
        )
    with torch_threads(threads):
        run = _Run(spec, paths, options, data, progress, work, start, threads, mode, per_item, kept)
        return run.train()


CURVES = ("loss", "path_loss", "softmax_loss", "recall", "exact", "largest", "moved", "seconds")


@dataclass
class _State:
    """What changes from epoch to epoch."""

    epoch: int = 0
    best: int = 0
    reference: float = 0.0
    seconds: float = 0.0
    curves: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CURVES})


class _Run:
    def __init__(
        self,
        spec: ModelSpec,
        lattice: PathSpec,
        options: PathTrainingOptions,
        data: TrainingData,
        progress: Progress,
        work: Path | None,
        start: Mapping[str, AnyArray] | None,
        threads: int,
        mode: Mode,
        per_item: int,
        kept: int,
    ) -> None:
        if mode != "full" and start is None:
            raise BuildError(
                f"an update ({mode}) needs the arrays of an earlier training, and there are none"
            )
        if spec.tied_feature is not None:
            raise ConfigError("there is no item tower here whose table the sequence could share", "tie_items")
        if spec.vectors_per_user > 1:
            raise ConfigError(
                f"{spec.sequence.kind} has several vectors of a user: take one that has one", "sequence"
            )
        if spec.dimension != lattice.dimension:
            raise ConfigError(
                f"the user tower's vectors have {spec.dimension} dimensions, the paths' layers read {lattice.dimension}",
                "dimension",
            )
        self._spec, self._lattice, self._options = spec, lattice, options
        self._progress, self._work, self._threads, self._mode = progress, work, threads, mode
        self._per_item, self._kept_paths = per_item, kept
        self._identity = " ".join(
            (
                checkpoint.identity(spec, options, data, start, mode),
                lattice.model_dump_json(),
                f"{per_item} {kept}",
            )
        )
        self._epochs = options.epochs + options.fixed_epochs if mode == "full" else 1
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        timed = bool(np.any(data.interactions.timestamps > 0))
        self._held_out: HeldOut | None = None
        if options.validation and mode == "full":
            data, self._held_out = hold_out(data, options.validation, timed, options.seed)
        self._data = data
        weights = example_weights(data)
        every = spec.sequence.kind in ("gru", "sasrec") and mode != "incremental"
        self._batches = _batches(spec, options, data, weights, timed, every, mode)
        if not self._batches.batches(0):
            raise BuildError(
                "there is no positive to learn from: the log has no example with a history and a weight"
            )
        self._counts = np.bincount(data.interactions.rows[weights > 0], minlength=spec.items).astype(
            np.float64
        )

        torch.manual_seed(options.seed)
        # Initialised on the CPU: the same there and on an accelerator.
        self._user = build_user_tower(spec, options.dropout)
        self._paths = PathModel(lattice, options.dropout)
        self._ranker = Ranker(spec.items, spec.dimension)
        self._model = nn.ModuleDict({"user": self._user, "paths": self._paths, "rank": self._ranker})
        random = np.random.default_rng((options.seed, 0x9A7B5))
        self._assignment = random_paths(spec.items, per_item, lattice.paths, random)
        self._score_paths, self._scores = empty_scores(spec.items, kept)
        self._own = np.zeros(self._assignment.shape, np.float32)
        if mode != "full" and start is not None:
            self._begin_at(start)
        if self._user.sequence is not None and spec.sequence.weighted:
            self._user.sequence.weigh(data.interactions.item_counts(), spec.sequence.item_exponent)
        self._model.to(self._device)
        self._optimizer = self._make_optimizer()
        self._objective = PathObjective(
            spec, lattice, options, data, self._user, self._paths, self._ranker, every
        )
        self._state = _State()
        self._best: dict[str, Tensor] = {}

    def train(self) -> TrainedPaths:
        self._resume()
        state = self._state
        with ThreadPoolExecutor(self._threads, thread_name_prefix="build") as self._pool:
            while state.epoch < self._epochs and not self._patience_is_over():
                began = time.monotonic()
                self._epoch(state.epoch)
                before = self._assignment
                self._assign(self._progress)
                state.curves["largest"].append(float(path_sizes(self._assignment)[1].max(initial=0)))
                state.curves["moved"].append(moved_share(before, self._assignment))
                state.epoch += 1
                if self._held_out is None:
                    state.best = state.epoch
                else:
                    self._validate(self._held_out)
                spent = time.monotonic() - began
                state.seconds += spent
                state.curves["seconds"].append(spent)
                if self._work is not None:
                    self._save(self._work)
        if self._best:
            self._load(self._best)
        if self._work is not None:
            curves.draw(state.curves, self._options.recall_at, self._work / curves.FILE)
            checkpoint.remove(self._work)
        return TrainedPaths(self._arrays(), state.curves, state.epoch, state.best, state.seconds)

    def _epoch(self, epoch: int) -> None:
        """Do one pass of E-steps."""
        state, options = self._state, self._options
        batches = self._batches.batches(epoch)
        self._progress.start(self._title(), batches)
        self._model.train()
        self._ranker.requires_grad_(self._mode != "full" or epoch < options.epochs)
        sums, done, running = np.zeros(2), 0, 0.0
        for number, batch in enumerate(self._batches.epoch(epoch)):
            if batch.weights.any():
                left = 1 - (epoch + number / batches) / self._epochs if options.decay == "linear" else 1.0
                self._optimizer.set_rate(options.learning_rate * left)
                parts = self._step(batch, epoch, number)
                sums, done = sums + parts, done + 1
                loss = self._sum(parts)
                running = loss if done == 1 else FADE * running + (1 - FADE) * loss
                if epoch == 0 and done == 1:
                    state.reference = loss
                elif running > options.diverged * max(state.reference, LEAST_REFERENCE):
                    raise BuildError(
                        f"training diverges: the loss is {running:.4g} at epoch {epoch + 1}, batch {number + 1}, and was "
                        f"{state.reference:.4g} at first; a smaller learning_rate may help"
                    )
                if options.assign_every and done % options.assign_every == 0 and number + 1 < batches:
                    self._assign(SilentProgress())
            self._progress.advance()
        means = sums / max(done, 1)
        for name, value in zip(("path_loss", "softmax_loss"), means.tolist(), strict=True):
            state.curves[name].append(value)
        state.curves["loss"].append(self._sum(means))

    def _sum(self, parts: Float64Array) -> float:
        return float(parts[0] + self._options.softmax_weight * parts[1])

    def _step(self, batch: Batch, epoch: int, number: int) -> Float64Array:
        """Learn a batch and score its paths; return both losses."""
        options, objective = self._options, self._objective
        seeds = np.random.SeedSequence((options.seed, epoch, number))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        random = np.random.default_rng(seeds)
        try:
            self._optimizer.zero()
            examples = objective.examples(batch, random)
            by_path, own = objective.path_loss(examples, self._assignment)
            by_softmax = objective.softmax_loss(batch, examples, random)
            values = np.array([float(by_path.detach()), float(by_softmax.detach())])
            if not np.isfinite(values).all():
                raise BuildError(
                    f"the loss is {self._sum(values)} at epoch {epoch + 1}, batch {number + 1}: look for NaN or huge "
                    "values in numeric features, or take a smaller learning_rate"
                )
            (by_path + options.softmax_weight * by_softmax).backward()
            self._score(examples, own, random)
            self._optimizer.step()
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            raise BuildError(
                f"memory does not suffice for a batch of {batch.positives.size:,} (epoch {epoch + 1}, batch {number + 1}"
                "): take a smaller training.batch, or fewer negatives"
            ) from error
        return values

    def _score(self, examples: Examples, own: Float32Array, random: np.random.Generator) -> None:
        """Take the paths that beam search finds for the examples into the scores of their labels.

        Args:
            examples: of a batch.
            own: float32[n, J], probabilities of the paths that the labels have.
            random: says which examples count, where not all do.
        """
        queries, labels = examples.queries.detach(), examples.labels
        if self._options.scored_share < 1:
            some = np.flatnonzero(random.random(labels.size) < self._options.scored_share)
            queries, labels, own = queries[tensor(some, self._device)], labels[some], own[some]
        found, logs = self._paths.beam(queries, self._kept_paths, self._threads)
        probabilities = np.maximum(np.exp(logs), np.finfo(np.float32).tiny)
        add_scores(
            self._score_paths, self._scores, labels, found, probabilities, self._options.score_decay, self._pool,
            self._threads,
        )  # fmt: skip
        add_own(self._own, labels, own, self._options.score_decay)

    def _assign(self, progress: Progress) -> None:
        """Do an M-step."""
        options = self._options
        paths, scores = with_own(self._score_paths, self._scores, self._assignment, self._own)
        self._assignment = assign(
            paths, scores, self._counts, self._per_item, options.penalty, options.passes, self._threads, progress,
            self._assignment,
        )  # fmt: skip
        scores_of(self._assignment, paths, scores, self._own)

    def _validate(self, held_out: HeldOut) -> None:
        state, options = self._state, self._options
        found, exact = recall_of_paths(
            self._spec, self._user, self._paths, self._ranker, self._assignment, self._data, held_out,
            options.recall_at, options.recall_beam,
        )  # fmt: skip
        if found > max(state.curves["recall"], default=-1.0):
            state.best = state.epoch
            self._best = {name: value.clone() for name, value in self._everything().items()}
        state.curves["recall"].append(found)
        state.curves["exact"].append(exact)

    def _title(self) -> str:
        """Return what the progress shows of the epoch that begins: its number, how the last one did, the time left."""
        state = self._state
        parts = [f"epoch {state.epoch + 1}/{self._epochs}"]
        if state.epoch:
            shown = state.curves
            parts.append(f"loss {shown['path_loss'][-1]:.4g} + {shown['softmax_loss'][-1]:.4g}")
            if shown["recall"]:
                parts.append(f"recall@{self._options.recall_at} {shown['recall'][-1]:.4f}")
            parts.append(f"fullest path {shown['largest'][-1]:,.0f}")
            left = state.seconds / state.epoch * (self._epochs - state.epoch)
            parts.append(f"{left:.0f} s left" if left < 100 else f"{left / 60:.0f} min left")
        return ", ".join(parts)

    def _patience_is_over(self) -> bool:
        state = self._state
        return self._held_out is not None and state.epoch - state.best >= self._options.patience

    def _make_optimizer(self) -> Optimizer:
        options = self._options
        tables = [(f"user.{name}", module) for name, module in self._user.named_modules()]
        if options.negatives:  # else the softmax reads its tables whole
            tables += [(f"rank.{name}", module) for name, module in self._ranker.named_modules()]
        lazy = lazy_tables(tables, self._device)
        parameters = dict(self._model.named_parameters())
        return Optimizer(parameters, lazy, options.optimizer, options.learning_rate, options.weight_decay)

    def _begin_at(self, start: Mapping[str, AnyArray]) -> None:
        """Begin with an earlier model; BuildError where it is of another shape."""
        items, per_item, kept = self._spec.items, self._per_item, self._kept_paths
        shapes = {
            "rank.vectors": (items, self._spec.dimension), "rank.bias": (items,), "assignment": (items, per_item),
            "scores.paths": (items, kept), "scores.values": (items, kept),
        }  # fmt: skip
        for name, shape in shapes.items():
            if name not in start or start[name].shape != shape:
                had = f"has shape {list(start[name].shape)}" if name in start else "is missing"
                raise BuildError(
                    f"the earlier model is another one: {name} {had}, and shape {list(shape)} is needed"
                )
        begin_at(self._user, start, "user.")
        begin_at(self._paths, start, "paths.")
        ranks = {"vectors.weight": start["rank.vectors"], "bias.weight": start["rank.bias"][:, None]}
        begin_at(self._ranker, ranks, "")
        placed = (start["assignment"] >= 0).any(1)
        self._assignment[placed] = start["assignment"][placed]
        self._score_paths = np.array(start["scores.paths"], np.int64)
        self._scores = np.array(start["scores.values"], np.float32)
        scores_of(self._assignment, self._score_paths, self._scores, self._own)
        most = max(int(self._assignment.max(initial=-1)), int(self._score_paths.max(initial=-1)))
        if most >= self._lattice.paths:
            raise BuildError(
                f"the earlier model is another one: it has path {most}, and there are {self._lattice.paths:,}"
            )

    def _everything(self) -> dict[str, Tensor]:
        """Return all that is learnt."""
        made = {name: value.detach() for name, value in self._model.named_parameters()}
        made["assignment"] = torch.from_numpy(self._assignment)
        made["scores.paths"] = torch.from_numpy(self._score_paths)
        made["scores.values"] = torch.from_numpy(self._scores)
        made["scores.own"] = torch.from_numpy(self._own)
        return made

    def _load(self, everything: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._model.named_parameters():
                value.copy_(everything[name])
        self._assignment = everything["assignment"].numpy().copy()
        self._score_paths = everything["scores.paths"].numpy().copy()
        self._scores = everything["scores.values"].numpy().copy()
        self._own = everything["scores.own"].numpy().copy()

    def _arrays(self) -> dict[str, AnyArray]:
        def array(value: Tensor) -> AnyArray:
            copied: AnyArray = value.detach().cpu().numpy().astype(np.float32, copy=True)
            return copied

        made: dict[str, AnyArray] = {}
        for side, part in (("user", self._user), ("paths", self._paths)):
            made |= {f"{side}.{name}": array(value) for name, value in part.state_dict().items()}
        made["rank.vectors"] = array(self._ranker.vectors.weight)
        made["rank.bias"] = array(self._ranker.bias.weight[:, 0])
        made["assignment"] = self._assignment
        made["scores.paths"], made["scores.values"] = self._score_paths, self._scores
        return made

    def _save(self, work: Path) -> None:
        state = self._state
        checkpoint.save(
            work,
            {
                "identity": self._identity,
                "model": self._everything(),
                "best": self._best,
                "optimizer": self._optimizer.state(),
                "state": (state.epoch, state.best, state.reference, state.seconds, state.curves),
            },
        )

    def _resume(self) -> None:
        saved: dict[str, Any] | None = None
        if self._work is not None:
            saved = checkpoint.load(self._work, self._identity)
        if saved is None:
            return
        self._load(saved["model"])
        self._best = saved["best"]
        self._optimizer.load(saved["optimizer"])
        self._state = _State(*saved["state"])


def _batches(
    spec: ModelSpec,
    options: PathTrainingOptions,
    data: TrainingData,
    weights: Float32Array,
    timed: bool,
    every: bool,
    mode: Mode,
) -> Pairs | Windows:
    kind, length = spec.sequence.kind, spec.sequence.length
    if every:
        if options.order == "time":
            raise ConfigError(f'"time" is the order of pairs, and {kind} learns windows', "training.order")
        if not timed:
            raise BuildError(f"{kind} learns from the order of events, and this log has no times: take mean")
        return Windows(
            data.interactions, weights, data.examples, length, options.horizon, options.batch, options.seed
        )
    if mode == "incremental" and not timed:
        raise BuildError("an incremental update goes by time, and this log has none")
    if options.order == "time" and not timed:
        raise BuildError('training.order = "time" needs times, and this log has none')
    length = 0 if kind == "none" else length
    in_order = mode == "incremental" or options.order == "time"
    return Pairs(
        data.interactions, weights, data.examples, length, timed, None, options.batch, options.seed, in_order
    )
