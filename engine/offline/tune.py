"""Tune: search each channel's declared options on the validation part of a protocol. The test part is never looked at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.core.channel import Progress, SilentProgress
from engine.core.errors import ConfigError
from engine.core.options import Tune, tunable
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog
from engine.offline.build import usable_cores
from engine.offline.evaluate import World, restricted, scene_of
from engine.offline.metrics import ranking_metrics
from engine.offline.protocols import Protocol, cut

USERS = 6_000
"""Validation users asked per trial: the spread of a mean over so many is far below what options change."""

SEED = 7
STARTUP_SHARE = 0.25


@dataclass(frozen=True)
class Tuned:
    """What a search found for one channel.

    Attributes:
        best: the metric of the best options, on validation.
        default: the metric of the options it began with.
        options: the best options that were searched.
        importance: how much of the metric's variation each option explains, largest first; empty for few trials.
        trials: how many were run.
    """

    best: float
    default: float
    options: dict[str, int | float | str]
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
) -> dict[str, Tuned]:
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

    Raises:
        ConfigError: an unknown channel or metric, a channel without declared options, or Optuna is not installed.
        DatasetError: the data lacks what the protocol needs.
    """
    optuna = _optuna()
    name, _, depth = metric.partition("@")
    if name not in ("recall", "ndcg", "hit", "coverage") or not depth.isdigit() or int(depth) < 1:
        raise ConfigError(f"expected recall@K, ndcg@K, hit@K or coverage@K, got {metric!r}", "metric")
    if scene not in config.scenes:
        raise ConfigError(f"no scene is called {scene!r}; known: {', '.join(config.scenes)}", "scene")
    searched: dict[str, dict[str, Tune]] = {}
    for channel in channels:
        if channel not in config.channels:
            raise ConfigError(
                f"no channel is called {channel!r}; declared: {', '.join(config.channels)}", "channels"
            )
        searched[channel] = tunable(type(config.channels[channel]))
        if not searched[channel]:
            raise ConfigError("declares no options to tune", f"channels.{channel}")
    threads = threads or usable_cores()
    k = int(depth)
    catalogue = Catalogue.from_dataset(dataset)
    split = cut(config, EventLog.read(dataset, catalogue), protocol, "validation")
    split = restricted(split, USERS)

    def measure(changed: Config, channel: str) -> float:
        world = World.in_memory(changed, catalogue, split, [channel], SilentProgress(), threads)
        lists = world.lists(scene_of(config.scenes[scene], [channel], k), split.users, k, threads)
        return ranking_metrics(lists, split.truth, len(catalogue.items), [k])[metric]

    found: dict[str, Tuned] = {}
    for channel, options in searched.items():
        progress.start(f"tuning {channel}", trials)
        sampler = optuna.samplers.TPESampler(
            seed=SEED, multivariate=True, n_startup_trials=max(5, int(trials * STARTUP_SHARE))
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        current = config.channels[channel].model_dump()
        study.enqueue_trial({option: _clipped(current[option], mark) for option, mark in options.items()})

        def objective(trial: Any, channel: str = channel, options: dict[str, Tune] = options) -> float:
            values = {
                option: _suggest(trial, option, mark, channel, config) for option, mark in options.items()
            }
            value = measure(config.with_channel_options({channel: values}), channel)
            progress.advance()
            return value

        study.optimize(objective, n_trials=trials)
        found[channel] = Tuned(
            best=float(study.best_value),
            default=float(study.trials[0].value),
            options=dict(study.best_params),
            importance=_importance(optuna, study),
            trials=len(study.trials),
        )
    return found


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("tuning needs Optuna: pip install 'recall-engine[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggest(trial: Any, option: str, mark: Tune, channel: str, config: Config) -> int | float | str:
    if mark.choices:
        return str(trial.suggest_categorical(option, mark.choices))
    kind = type(config.channels[channel]).model_fields[option].annotation
    if kind is int:
        return int(trial.suggest_int(option, int(mark.low), int(mark.high), log=mark.log))
    return float(trial.suggest_float(option, mark.low, mark.high, log=mark.log))


def _clipped(value: Any, mark: Tune) -> Any:
    if mark.choices:
        return value
    return type(value)(min(max(value, mark.low), mark.high))


def _importance(optuna: Any, study: Any) -> dict[str, float]:
    if len(study.trials) < 10 or len({trial.value for trial in study.trials}) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return {
        name: float(value)
        for name, value in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
    }


def write_params(path: Path, found: dict[str, Tuned], comment: str) -> None:
    """Write the best options as TOML, one table per channel: what `build` and `eval` take as --params."""
    lines = [f"# {line}" for line in comment.splitlines()]
    for channel, tuned in found.items():
        lines += ["", f"[{channel}]  # {tuned.best:.4f} on validation, {tuned.default:.4f} before"]
        lines += [f"{option} = {json.dumps(value)}" for option, value in tuned.options.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
