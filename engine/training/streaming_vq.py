"""Training of streaming VQ over a whole log, in order of time: what a build does, and what a stream would have done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np

from engine.core.channel import Progress
from engine.core.errors import BuildError, ConfigError
from engine.core.types import AnyArray, Int32Array
from engine.models.codebook import balance_of
from engine.models.options import Mode
from engine.models.streaming_options import StreamingOptions
from engine.models.vq_spec import VqSpec
from engine.training import checkpoint, curves
from engine.training.data import TrainingData
from engine.training.impressions import ImpressionBatch, ImpressionLog, check_rewards
from engine.training.streaming_trainer import StepResult, StreamingTrainer
from engine.training.trainer import FADE, LEAST_REFERENCE, example_weights, is_memory, torch_threads

__all__ = [
    "ImpressionBatch",
    "ImpressionLog",
    "StepResult",
    "StreamingTrainer",
    "TrainedStream",
    "train_streaming",
]

CURVES = ("loss", "auxiliary", "index", "similarity", "rank", "largest", "spread", "empty", "seconds")

PARTS = 20
"""Parts of a pass after each of which the curves have a point and a checkpoint is kept."""


@dataclass(frozen=True, slots=True)
class TrainedStream:
    """A finished training.

    Attributes:
        arrays: the model as `StreamingTrainer.arrays` returns it, every item assigned by the last codebook.
        curves: a point after each part of a pass: `loss`, `auxiliary`, `index`, `similarity`, `rank`, means over
            the part, 0 where not asked for; `largest` (share of the items in the fullest cluster), `spread` (p99 of the
            clusters' sizes over their median, 0 where that is 0), `empty` (share of the clusters), `seconds`.
        steps: steps done.
        seconds: what training took, in all the processes that had a part in it.
        streamed: int32[items], the clusters as the streams left them, before every item was assigned; -1: none yet.
    """

    arrays: dict[str, AnyArray]
    curves: dict[str, list[float]]
    steps: int
    seconds: float
    streamed: Int32Array


@dataclass
class _Pass:
    """What changes from part to part."""

    done: int = 0
    reference: float = 0.0
    running: float = 0.0
    owed: float = 0.0
    seconds: float = 0.0
    curves: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CURVES})


def train_streaming(
    spec: VqSpec,
    options: StreamingOptions,
    data: TrainingData,
    progress: Progress,
    work: Path | None = None,
    start: Mapping[str, AnyArray] | None = None,
    threads: int = 1,
    mode: Mode = "full",
    *,
    log: ImpressionLog | None = None,
) -> TrainedStream:
    """Replay a log in order of time, the candidate stream mixed in; at the end every item is assigned once more.

    With several epochs all passes but the last are shuffled.

    The same specifications, options, data and start on the same machine and threads give the same arrays.

    Args:
        spec: of the model.
        options: of the training.
        data: what users liked, from which histories are made, and the features of both sides. Without `log` its entries
            (those of `data.examples`, where given) are the impressions, their weights the rewards of the one task.
        progress: told of the batches of each pass.
        work: where a checkpoint is kept, which a later call for the same training goes on from, and where `curves.png` is
            written; None: nowhere.
        start: arrays of an earlier training, for `resume` and `incremental`.
        threads: cores to use.
        mode: `full` begins at random and does `options.epochs` passes; the others do one from `start`.
        log: impressions with rewards of every task.

    Raises:
        ConfigError: the options cannot work with the data: more clusters than items, several tasks and no `log`.
        BuildError: there is nothing to learn from or no order of time, a reward is below 0 or no number, the loss is no
            number or grows, or memory does not suffice.
    """
    if mode != "full" and start is None:
        raise BuildError(f"an update ({mode}) needs the arrays of an earlier training, and there are none")
    if log is None:
        if len(spec.tasks) > 1:
            raise ConfigError("several tasks need a log that has the rewards of each", "tasks")
        weights = example_weights(data)
        if data.examples is not None:
            weights = np.where(data.examples, weights, np.float32(0))
        log = ImpressionLog.of_positives(data.interactions, weights)
    check_rewards(log.rewards, spec.tasks)
    if not (log.rewards > 0).any():
        raise BuildError("there is nothing to learn from: no impression of the log has a reward")
    if not (log.timestamps > 0).any():
        raise BuildError("streaming VQ learns a log in order of time, and this one has no times")
    with torch_threads(threads):
        return _Replay(spec, options, data, log, progress, work, start, threads, mode).train()


class _Replay:
    def __init__(
        self,
        spec: VqSpec,
        options: StreamingOptions,
        data: TrainingData,
        log: ImpressionLog,
        progress: Progress,
        work: Path | None,
        start: Mapping[str, AnyArray] | None,
        threads: int,
        mode: Mode,
    ) -> None:
        self._spec, self._options, self._data, self._log = spec, options, data, log
        self._progress, self._work = progress, work
        self._passes = options.epochs if mode == "full" else 1
        self._trainer = StreamingTrainer(spec, options, data.items, start, threads)
        if start is None:
            self._trainer.weigh(data.interactions.item_counts())
        self._batches = -(-len(log) // options.batch)
        digest = sha256(spec.model_dump_json().encode())
        for array in (log.users, log.items, log.rewards, log.timestamps):
            digest.update(np.ascontiguousarray(array).data)
        self._identity = f"{checkpoint.identity(spec.tower, options, data, start, mode)} {digest.hexdigest()}"
        self._state = _Pass()

    def train(self) -> TrainedStream:
        self._resume()
        state, trainer = self._state, self._trainer
        points = {max(1, self._batches * part // PARTS) for part in range(1, PARTS + 1)}
        while state.done < self._passes * self._batches:
            number = state.done // self._batches
            self._progress.start(self._title(number), self._batches)
            self._progress.advance(state.done % self._batches)
            self._pass(number, state.done % self._batches, points)
        began = time.monotonic()
        streamed = trainer.assignment.copy()
        trainer.assign(np.arange(len(trainer.items), dtype=np.int32))
        arrays = trainer.arrays()
        state.seconds += time.monotonic() - began
        if self._work is not None:
            curves.draw(state.curves, 0, self._work / curves.FILE)
            checkpoint.remove(self._work)
        return TrainedStream(arrays, state.curves, trainer.steps, state.seconds, streamed)

    def _pass(self, number: int, first: int, points: set[int]) -> None:
        """Do the rest of a pass, from a batch on."""
        options, state, trainer = self._options, self._state, self._trainer
        began = time.monotonic()
        log = self._log
        if number + 1 < self._passes:
            log = log.shuffled(np.random.default_rng((options.seed, 0x5AFF, number)))
        sums: dict[str, list[float]] = {name: [] for name in CURVES[:5]}
        batches = log.batches(
            options.batch, self._data.interactions, self._data.users, self._spec.read, first * options.batch
        )
        for at, batch in enumerate(batches, first + 1):
            result = self._step(batch)
            for name, value in {"loss": result.loss, **result.losses}.items():
                sums[name].append(value)
            state.owed += options.candidate_share * len(batch)
            if state.owed >= min(options.batch, len(trainer.items)):
                trainer.assign(trainer.candidates(int(state.owed)))
                state.owed -= int(state.owed)
            self._progress.advance()
            state.done += 1
            if at in points:
                spent = time.monotonic() - began
                began += spent
                self._point(sums, spent)
                sums = {name: [] for name in sums}

    def _step(self, batch: ImpressionBatch) -> StepResult:
        state, options = self._state, self._options
        try:
            result = self._trainer.step(batch)
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            raise BuildError(
                f"memory does not suffice for a batch of {len(batch):,}: take a smaller training.batch"
            ) from error
        if np.isfinite(result.loss):
            state.running = (
                FADE * state.running + (1 - FADE) * result.loss if state.reference else result.loss
            )
            state.reference = state.reference or max(result.loss, LEAST_REFERENCE)
            if state.running > options.diverged * state.reference:
                raise BuildError(
                    f"training diverges: the loss is {state.running:.4g} at step {self._trainer.steps}, and was "
                    f"{state.reference:.4g} at first; a smaller learning_rate may help"
                )
        return result

    def _point(self, sums: dict[str, list[float]], spent: float) -> None:
        state = self._state
        for name, values in sums.items():
            there = [value for value in values if np.isfinite(value)]
            state.curves[name].append(float(np.mean(there)) if there else 0.0)
        balance = balance_of(self._trainer.assignment, self._spec.clusters)
        state.curves["largest"].append(balance.largest)
        state.curves["spread"].append(balance.spread if np.isfinite(balance.spread) else 0.0)
        state.curves["empty"].append(balance.empty)
        state.curves["seconds"].append(spent)
        state.seconds += spent
        if self._work is not None:
            self._save(self._work)

    def _title(self, number: int) -> str:
        shown = self._state.curves
        parts = [f"pass {number + 1}/{self._passes}"]
        if shown["loss"]:
            parts.append(f"loss {shown['loss'][-1]:.4g}")
            parts.append(f"fullest cluster {shown['largest'][-1]:.1%}, empty {shown['empty'][-1]:.1%}")
        return ", ".join(parts)

    def _save(self, work: Path) -> None:
        state = self._state
        place = (state.done, state.reference, state.running, state.owed, state.seconds, state.curves)
        checkpoint.save(work, {"identity": self._identity, "trainer": self._trainer.state(), "place": place})

    def _resume(self) -> None:
        saved = None if self._work is None else checkpoint.load(self._work, self._identity)
        if saved is not None:
            self._trainer.restore(saved["trainer"])
            self._state = _Pass(*saved["place"])
