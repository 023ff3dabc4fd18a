"""Tune: search each channel's declared options on the validation part of a protocol. The test part is never looked at."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from engine.config import Config
from engine.core.channel import Progress, SilentProgress
from engine.core.errors import ConfigError
from engine.core.options import Tune, tunable
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog
from engine.offline.build import usable_cores
from engine.offline.evaluate import World, known_follows, restricted, scene_of
from engine.offline.metrics import MEANS, ranking_metrics
from engine.offline.protocols import Protocol, cut

Values: TypeAlias = dict[str, Any]
"""Options of a channel: name -> value."""

USERS = 6_000
"""Validation users asked per trial: the spread of a mean over so many is far below what options change."""

SEED = 7
STARTUP_SHARE = 0.25
"""Share of the trials that are drawn at random before the sampler begins to learn."""

IMPORTANCE_TRIALS = 10
"""With fewer, what mattered is a guess."""


@dataclass(frozen=True)
class Tuned:
    """What a search found for one channel.

    Attributes:
        best: the metric of the best options, on validation.
        default: the metric of the options it began with.
        options: the options that were searched, at their best; those it began with where nothing was better.
        before: the same options as they were when it began.
        importance: how much of the metric's variation each option explains, largest first; empty for few trials.
        trials: how many were run.
    """

    best: float
    default: float
    options: Values
    before: Values
    importance: dict[str, float]
    trials: int


def tune(
    config: Config,
    dataset: Dataset,
    protocol: Protocol,
    channels: Sequence[str],
    metric: str,
    trials: int,
    progress: Progress,
    scene: str = "default",
    threads: int | None = None,
    seed: int = SEED,
) -> Iterator[tuple[str, Tuned]]:
    """Search each channel's options with a tree-structured Parzen estimator (Optuna's, seeded).

    Args:
        config: where the search begins: the first trial is the configuration as it is.
        dataset: an open data set.
        protocol: its validation part is used.
        channels: which channels; each is tuned alone.
        metric: like "recall@20".
        trials: per channel.
        progress: told of each trial.
        scene: whose merge settings are used.
        threads: cores to use; None for all.
        seed: of the sampler; the same seed finds the same options.

    Yields:
        Each channel with what was found for it, once its search has ended, so that an interruption loses one only.

    Raises:
        ConfigError: an unknown channel or metric, a channel without declared options, or Optuna is not installed.
        DatasetError: the data lacks what the protocol needs.
    """
    optuna = _optuna()
    k = depth_of(metric)
    if scene not in config.scenes:
        raise ConfigError(f"no scene is called {scene!r}; known: {', '.join(config.scenes)}", "scene")
    searched = {channel: _searched(config, channel) for channel in channels}
    threads = threads or usable_cores()
    progress.start("reading", 1)
    catalogue = Catalogue.from_dataset(dataset)
    events = EventLog.read(dataset, catalogue)
    split = restricted(cut(config, events, protocol, "validation"), USERS)
    follows = known_follows(dataset, catalogue, split, events.timed)
    progress.advance()

    def measure(channel: str, values: Values) -> float:
        changed = config.with_channel_options({channel: values})
        world = World.in_memory(changed, catalogue, split, [channel], SilentProgress(), threads, follows)
        lists = world.lists(scene_of(config.scenes[scene], [channel], k), split.users, k, threads)
        progress.advance()
        return ranking_metrics(lists, split.truth, len(catalogue.items), [k])[metric]

    for channel, declared in searched.items():
        marks = {option: mark for option, mark in declared.items() if events.timed or not mark.timed}
        progress.start(f"tuning {channel}", trials)
        current = config.channels[channel].model_dump()
        before = {option: current[option] for option in marks}
        inside = {option: _clipped(value, marks[option]) for option, value in before.items()}
        # A value outside the range searched cannot be a trial, but it is where the search begins all the same.
        default = measure(channel, {}) if inside != before else None
        with _quiet(optuna):
            startup = max(5, int(trials * STARTUP_SHARE))
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=startup)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.enqueue_trial(inside)

        fields = type(config.channels[channel]).model_fields
        for _ in range(trials if default is None else trials - 1):
            # Asked and told, not `optimize`: that one logs a traceback of every error and of Ctrl-C.
            trial = study.ask()
            values = {
                name: _suggest(trial, name, mark, fields[name].annotation) for name, mark in marks.items()
            }
            study.tell(trial, measure(channel, values))
        yield channel, _tuned(optuna, study, before, default)


def depth_of(metric: str) -> int:
    """Return the K of a metric like recall@20; ConfigError if it is no metric."""
    name, _, depth = metric.partition("@")
    whole = depth.isascii() and depth.isdecimal() and len(depth) <= 6 and 1 <= int(depth) <= 100_000
    if name not in (*MEANS, "coverage") or not whole:
        known = ", ".join(f"{each}@K" for each in MEANS)
        raise ConfigError(f"expected {known} or coverage@K, got {metric!r}", "metric")
    return int(depth)


def write_params(path: Path, found: Mapping[str, Tuned], comment: str, start: Mapping[str, Values]) -> None:
    """Write options as TOML, one table per channel: what `build`, `eval` and `tune` itself take as --params.

    Args:
        path: the file; one that is there is replaced once the new one is whole.
        found: per channel what was found.
        comment: goes to the top.
        start: what the search was given as parameters; what it did not change of these stays.

    Raises:
        ConfigError: the file cannot be written.
    """
    lines = [f"# {line}" for line in comment.splitlines()]
    for channel in dict.fromkeys((*start, *found)):
        words = ""
        if channel in found:
            words = f"  # {found[channel].best:.4f} on validation, {found[channel].default:.4f} before"
        values = {**start.get(channel, {}), **(found[channel].options if channel in found else {})}
        lines += ["", f"[{channel}]{words}"]
        # For strings, numbers, truth values and lists of them, JSON and TOML are the same.
        lines += [f"{option} = {json.dumps(value)}" for option, value in values.items()]
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", str(path)) from error


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("tuning needs Optuna: pip install 'recall-engine[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep back that some of Optuna's parts are experimental: which are differs by version, and none is our user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _searched(config: Config, channel: str) -> dict[str, Tune]:
    if channel not in config.channels:
        raise ConfigError(
            f"no channel is called {channel!r}; declared: {', '.join(config.channels)}", "channels"
        )
    marks = tunable(type(config.channels[channel]))
    if not marks:
        raise ConfigError("declares no options to tune", f"channels.{channel}")
    return marks


def _suggest(trial: Any, option: str, mark: Tune, kind: Any) -> int | float | str:
    if mark.choices:
        return str(trial.suggest_categorical(option, mark.choices))
    if kind is int:
        return int(trial.suggest_int(option, int(mark.low), int(mark.high), log=mark.log))
    return float(trial.suggest_float(option, mark.low, mark.high, log=mark.log))


def _clipped(value: Any, mark: Tune) -> Any:
    if mark.choices:
        return value if value in mark.choices else mark.choices[0]
    return type(value)(min(max(value, mark.low), mark.high))


def _tuned(optuna: Any, study: Any, before: Values, default: float | None) -> Tuned:
    # One that waits was put first, and not reached where the default alone used up the trials.
    values = [float(trial.value) for trial in study.trials if trial.value is not None]
    measured = len(values) + (default is not None)
    if default is None:
        default = values[0]
    best = max([default, *values])
    # Of two that are equally good, what is there already.
    options = dict(study.best_params) if best > default else before
    return Tuned(best, default, options, before, _importance(optuna, study), measured)


def _importance(optuna: Any, study: Any) -> dict[str, float]:
    if len(study.trials) < IMPORTANCE_TRIALS or len({trial.value for trial in study.trials}) < 2:
        return {}
    with _quiet(optuna):
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items()}
