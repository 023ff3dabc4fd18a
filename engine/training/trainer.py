"""Training of a pair of towers: epochs, validation, checkpoints, and what stops a run that goes wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.core.channel import Progress
from engine.core.errors import BuildError, ConfigError
from engine.core.types import AnyArray, Float32Array, Float64Array
from engine.models.options import WHOLE, Mode, TrainingOptions
from engine.models.spec import ModelSpec
from engine.training import checkpoint, curves, export
from engine.training.batches import Batch, ByUser, Pairs, Sequences, keep_probabilities
from engine.training.data import TrainingData
from engine.training.objective import Objective
from engine.training.optimizers import Optimizer, lazy_tables
from engine.training.towers import build_item_tower, build_user_tower
from engine.training.validation import HeldOut, hold_out, recall

LEAST_REFERENCE = 0.01
"""A first loss below this counts as this: an update may begin where all is well, and grow from next to nothing."""

FADE = 0.9
"""How much of the running loss stays from one batch to the next."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished training.

    Attributes:
        arrays: float32 by name: `user.<parameter>`, `item.<parameter>`, `item_vectors`.
        curves: per epoch `loss` (mean of its examples), `recall` (of what is held out, where something is), `seconds`.
        epochs: epochs done.
        best: the epoch whose weights these are, from 1.
        seconds: what training took, in all the processes that had a part in it.
    """

    arrays: dict[str, AnyArray]
    curves: dict[str, list[float]]
    epochs: int
    best: int
    seconds: float


def train(
    spec: ModelSpec,
    options: TrainingOptions,
    data: TrainingData,
    progress: Progress,
    work: Path | None = None,
    start: Mapping[str, AnyArray] | None = None,
    threads: int = 1,
    mode: Mode = "full",
) -> Trained:
    """Train the towers.

    The same specification, options, data, start and threads on the same machine and device give the same arrays.
    Trains on the accelerator where torch has CUDA, else on `threads` cores.

    Args:
        spec: of the model, sizes known.
        options: of the training.
        data: positives and features.
        progress: told of each epoch's examples.
        work: where a checkpoint is kept after each epoch, which a later call for the same training goes on from, and
            where `curves.png` is written; None: nowhere.
        start: arrays of an earlier `Trained`, in the shapes of `spec`, for `resume` and `incremental`.
        threads: cores to use.
        mode: `full` begins at random; `resume` does one shuffled pass from `start`; `incremental` one pass in order of
            time (pairs) in which only embeddings of ids move.

    Raises:
        ConfigError: if the options cannot work with the data.
        BuildError: if there is nothing to learn from, the loss is no number or grows, or memory does not suffice.
    """
    with torch_threads(threads):
        return _Run(spec, options, data, progress, work, start, mode).train()


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set torch's threads and random state, and put back what was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _State:
    """What changes from epoch to epoch."""

    epoch: int = 0
    best: int = 0
    reference: float = 0.0
    seconds: float = 0.0
    curves: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "recall": [], "seconds": []})


class _Run:
    def __init__(
        self,
        spec: ModelSpec,
        options: TrainingOptions,
        data: TrainingData,
        progress: Progress,
        work: Path | None,
        start: Mapping[str, AnyArray] | None,
        mode: Mode,
    ) -> None:
        if mode != "full" and start is None:
            raise BuildError(
                f"an update ({mode}) needs the arrays of an earlier training, and there are none"
            )
        self._spec, self._options, self._progress, self._work = spec, options, progress, work
        self._identity = checkpoint.identity(spec, options, data, start, mode)
        self._mode: Mode = mode
        self._epochs = options.epochs if mode == "full" else 1
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._items = data.items

        timed = bool(np.any(data.interactions.timestamps > 0))
        self._held_out: HeldOut | None = None
        if options.validation and mode == "full":
            data, self._held_out = hold_out(data, options.validation, timed, options.seed)
        self._data = data
        every = spec.sequence.kind in ("gru", "sasrec")
        self._batches, learnt = _batches(spec, options, data, timed, every, mode)
        if not self._batches.batches(0):
            raise BuildError(
                "there is no positive to learn from: the log has no example with a history and a weight"
            )

        torch.manual_seed(options.seed)
        # Initialised on the CPU: the same there and on an accelerator.
        self._user, self._item = (
            build_user_tower(spec, options.dropout),
            build_item_tower(spec, options.dropout),
        )
        if mode != "full" and start is not None:
            begin_at(self._user, start, "user.")
            begin_at(self._item, start, "item.")
        if self._user.sequence is not None and spec.sequence.weighted:
            self._user.sequence.weigh(data.interactions.item_counts(), spec.sequence.item_exponent)
        if spec.popularity_exponent:
            self._item.measure(data.interactions.item_counts())
        self._user.to(self._device)
        self._item.to(self._device)
        self._optimizer = self._make_optimizer()
        self._objective = Objective(
            spec, options, data, data.interactions, learnt, self._user, self._item, every
        )
        self._state = _State()
        self._kept: dict[str, torch.Tensor] = {}

    def train(self) -> Trained:
        self._resume()
        options, state = self._options, self._state
        while state.epoch < self._epochs and not self._patience_is_over():
            began = time.monotonic()
            loss = self._epoch(state.epoch)
            state.epoch += 1
            state.curves["loss"].append(loss)
            if self._held_out is None:
                state.best = state.epoch
            else:
                found = recall(
                    self._spec, self._user, self._item, self._data, self._held_out, options.recall_at,
                    options.temperature,
                )  # fmt: skip
                if found > max(state.curves["recall"], default=-1.0):
                    state.best = state.epoch
                    self._kept = {name: value.detach().clone() for name, value in self._weights().items()}
                state.curves["recall"].append(found)
            spent = time.monotonic() - began
            state.seconds += spent
            state.curves["seconds"].append(spent)
            if self._work is not None:
                self._save(self._work)
        if self._kept:
            self._load_weights(self._kept)
        if self._mode == "full":
            export.mean_for_unknown(self._spec, self._user, self._item)
        arrays = export.arrays(self._spec, self._user, self._item, self._items)
        if self._work is not None:
            curves.draw(state.curves, options.recall_at, self._work / curves.FILE)
            checkpoint.remove(self._work)
        return Trained(arrays, state.curves, state.epoch, state.best, state.seconds)

    def _epoch(self, epoch: int) -> float:
        """Do one pass and return the mean loss of its batches."""
        state, options = self._state, self._options
        batches = self._batches.batches(epoch)
        self._progress.start(self._title(), batches)
        self._user.train()
        self._item.train()
        total, done, running = 0.0, 0, 0.0
        for number, batch in enumerate(self._batches.epoch(epoch)):
            if batch.weights.any():
                self._optimizer.set_rate(self._rate(epoch, number, batches))
                loss = self._step(batch, epoch, number)
                total, done = total + loss, done + 1
                running = loss if done == 1 else FADE * running + (1 - FADE) * loss
                if epoch == 0 and done == 1:
                    state.reference = loss
                elif running > options.diverged * max(state.reference, LEAST_REFERENCE):
                    raise BuildError(
                        f"training diverges: the loss is {running:.4g} at epoch {epoch + 1}, batch {number + 1}, and was "
                        f"{state.reference:.4g} at first; a smaller learning_rate may help"
                    )
            self._progress.advance()
        return total / max(done, 1)

    def _rate(self, epoch: int, number: int, batches: int) -> float:
        """Return the step size of a batch."""
        options = self._options
        done = (epoch + number / batches) / self._epochs
        rate = options.learning_rate * (1 - done if options.decay == "linear" else 1)
        if options.warmup:
            rate *= min(1.0, (done + 1 / (batches * self._epochs)) / options.warmup)
        return rate

    def _step(self, batch: Batch, epoch: int, number: int) -> float:
        seeds = np.random.SeedSequence((self._options.seed, epoch, number))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        try:
            self._optimizer.zero()
            loss = self._objective.loss(batch, np.random.default_rng(seeds))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise BuildError(
                    f"the loss is {value} at epoch {epoch + 1}, batch {number + 1}: look for NaN or huge values in "
                    "numeric features, or take a smaller learning_rate"
                )
            loss.backward()
            self._optimizer.step()
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            raise BuildError(
                f"memory does not suffice for a batch of {batch.users.size:,} (epoch {epoch + 1}, batch {number + 1}): "
                "take a smaller training.batch, or fewer negatives"
            ) from error
        return value

    def _title(self) -> str:
        """Return what the progress shows of the epoch that begins: its number, how the last one did, the time left."""
        state = self._state
        parts = [f"epoch {state.epoch + 1}/{self._epochs}"]
        if state.epoch:
            parts.append(f"loss {state.curves['loss'][-1]:.4g}")
            if state.curves["recall"]:
                parts.append(f"recall@{self._options.recall_at} {state.curves['recall'][-1]:.4f}")
            left = state.seconds / state.epoch * (self._epochs - state.epoch)
            parts.append(f"{left:.0f} s left" if left < 100 else f"{left / 60:.0f} min left")
        return ", ".join(parts)

    def _patience_is_over(self) -> bool:
        state = self._state
        return self._held_out is not None and state.epoch - state.best >= self._options.patience

    def _make_optimizer(self) -> Optimizer:
        options = self._options
        parameters = dict(self._parameters())
        if self._mode == "incremental":
            moving = _id_tables(self._spec)
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in moving)
            parameters = {name: parameters[name] for name in moving if name in parameters}
        tables = [
            (f"{side}.{name}", module)
            for side, tower in (("user", self._user), ("item", self._item))
            for name, module in tower.named_modules()
            # A loss over the whole catalogue reads the item tower's tables whole.
            if side == "user" or options.loss not in WHOLE
        ]
        lazy = lazy_tables(tables, self._device)
        return Optimizer(parameters, lazy, options.optimizer, options.learning_rate, options.weight_decay)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((f"user.{name}", value) for name, value in self._user.named_parameters())
        yield from ((f"item.{name}", value) for name, value in self._item.named_parameters())

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach() for name, value in self._parameters()}

    def _load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._parameters():
                value.copy_(weights[name])

    def _save(self, work: Path) -> None:
        state, streaming = self._state, self._objective.streaming
        checkpoint.save(
            work,
            {
                "identity": self._identity,
                "weights": self._weights(),
                "kept": self._kept,
                "optimizer": self._optimizer.state(),
                "streaming": None
                if streaming is None
                else (streaming.step, torch.from_numpy(streaming.last), torch.from_numpy(streaming.gap)),
                "state": (state.epoch, state.best, state.reference, state.seconds, state.curves),
            },
        )

    def _resume(self) -> None:
        saved: dict[str, Any] | None = None
        if self._work is not None:
            saved = checkpoint.load(self._work, self._identity)
        if saved is None:
            return
        self._load_weights(saved["weights"])
        self._kept = {name: value.to(self._device) for name, value in saved["kept"].items()}
        self._optimizer.load(saved["optimizer"])
        if self._objective.streaming is not None:
            step, last, gap = saved["streaming"]
            self._objective.streaming.step = step
            self._objective.streaming.last[:] = last.numpy()
            self._objective.streaming.gap[:] = gap.numpy()
        epoch, best, reference, seconds, kept_curves = saved["state"]
        self._state = _State(epoch, best, reference, seconds, kept_curves)


def _batches(
    spec: ModelSpec, options: TrainingOptions, data: TrainingData, timed: bool, every: bool, mode: Mode
) -> tuple[Pairs | Sequences, Float64Array]:
    """Return the batches, and float64[items]: how often each item is a positive in an epoch."""
    matrix = data.interactions
    weights = example_weights(data)
    keep = keep_probabilities(matrix, options.hot_threshold)
    length = 0 if spec.sequence.kind == "none" else spec.sequence.length
    if options.order == "time" and (every or options.loss == "user_softmax"):
        raise ConfigError(
            f'"time" is the order of pairs, and {spec.sequence.kind if every else "user_softmax"} learns users whole',
            "training.order",
        )
    if every and not timed:
        raise BuildError(
            f"{spec.sequence.kind} learns from the order of events, and this log has no times: take mean"
        )
    learnt = weights > 0 if data.examples is None else data.examples & (weights > 0)
    counted = np.bincount(
        matrix.rows[learnt], None if keep is None else keep[learnt], minlength=matrix.items
    ).astype(np.float64)
    if every:
        return Sequences(matrix, weights, data.examples, length, keep, options.batch, options.seed), counted
    by_user = options.loss == "user_softmax"
    past = timed and not by_user if options.history == "auto" else options.history == "past"
    if past and not timed:
        raise BuildError('training.history = "past" needs times, and this log has none')
    if options.order == "time" and not timed:
        raise BuildError('training.order = "time" needs times, and this log has none')
    in_order = (mode == "incremental" and timed) or options.order == "time"
    kind = ByUser if by_user else Pairs
    if options.history == "whole":
        length = 0  # the history is read once for each user, not for each pair
    batches = kind(matrix, weights, data.examples, length, past, keep, options.batch, options.seed, in_order)
    return batches, counted


def example_weights(data: TrainingData) -> Float32Array:
    """Return float32[entries]: how much each positive counts; BuildError where one is below 0 or no number."""
    weights = np.ones(data.interactions.entries, np.float32) if data.weights is None else data.weights
    if weights.size and not (np.isfinite(weights).all() and weights.min() >= 0):
        raise BuildError("the weights of the examples must be numbers of 0 or more")
    return weights


def _id_tables(spec: ModelSpec) -> set[str]:
    """Return the names of the parameters that an incremental update moves: embeddings of ids."""
    names = {
        f"{side}.embeddings.{at}.weight"
        for side in ("user", "item")
        for at, feature in enumerate(spec.user_features if side == "user" else spec.item_features)
        if feature.kind == "id"
    }
    return names | {"user.sequence.items.weight"}


def begin_at(part: nn.Module, start: Mapping[str, AnyArray], prefix: str) -> None:
    """Set the parameters of a part of a model from arrays; BuildError where one is missing or of another shape."""
    with torch.no_grad():
        for name, value in part.named_parameters():
            given = start.get(prefix + name)
            if given is None or tuple(given.shape) != tuple(value.shape):
                had = "is missing" if given is None else f"has shape {list(given.shape)}"
                raise BuildError(
                    f"the earlier model is another one: {prefix}{name} {had}, and shape {list(value.shape)} is needed"
                )
            value.copy_(torch.from_numpy(np.array(given, np.float32)))


def is_memory(error: BaseException) -> bool:
    """Return whether an error says that memory does not suffice."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)
