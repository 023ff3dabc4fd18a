"""From a log to a bundle: encoders, training, lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from channels.streaming_vq.bundle import Bundle, encoded_rows, specified, write_bundle
from channels.streaming_vq.options import StreamingVqOptions
from channels.streaming_vq.start import carried_over
from channels.two_tower.build import NO_TORCH, check_liked
from channels.two_tower.bundle import keys_of_items
from engine.core.channel import BuildContext, Events
from engine.core.errors import BuildError, ConfigError
from engine.core.interactions import Interactions
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.models.encoded import Encoded
from engine.models.streaming_options import Task
from engine.models.towers import ItemTower
from engine.models.vq_spec import VqSpec

if TYPE_CHECKING:
    from engine.training.impressions import ImpressionLog

LEARNT = ("user.", "user_", "item.", "bias.", "codebook.", "rank.", "assignment", "item_bias", "secondary")
"""How the names of the arrays begin that a training gives, those aside that follow from others."""


def build_bundle(channel: str, config: StreamingVqOptions, context: BuildContext) -> None:
    """Replay the log through the trainer and write what it learnt as one bundle.

    Where `context.learnt` has what an earlier training gave, that is written.

    Args:
        channel: its name, for errors.
        config, context: of the build.

    Raises:
        BuildError: nobody likes anything, there are no times, PyTorch is not installed, or the training fails.
        ConfigError: a feature is not in the data, or of another type; or a task cannot be learnt from a log.
        SnapshotError: what was learnt earlier is not of these towers.
    """
    liked = context.interactions
    check_liked(channel, context)
    previous = None if context.previous is None else Bundle(context.previous)
    spec, encoders = specified(config, context, previous)
    users, items = encoded_rows(context, encoders)
    if context.learnt is not None:
        write_bundle(context, spec, encoders, (users, items), _with_ranked(spec, context.learnt, items))
        return
    start = None
    if previous is not None and context.previous is not None:
        start = carried_over(channel, spec, encoders, keys_of_items(context), previous, context.previous)
    try:
        from engine.training.data import TrainingData
        from engine.training.streaming_vq import train_streaming
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise BuildError(f"{channel}: {NO_TORCH}") from error
    # Without a model to go on from there is nothing to update: the first build is a full one, whatever is asked for.
    mode = context.mode if start is not None else "full"
    since = previous.learnt_until if previous is not None and mode == "incremental" else None
    examples = None
    if since is not None:
        examples = liked.timestamps > since
        if not examples.any():
            raise BuildError(f"{channel}: nobody liked anything since the last model was trained")
    trained = train_streaming(
        spec,
        config.training,
        TrainingData(liked, users, items, examples=examples),
        context.progress,
        context.work,
        start,
        context.threads,
        mode,
        log=_log_of(channel, config.training.tasks, context, since),
    )
    write_bundle(context, spec, encoders, (users, items), trained.arrays)


def _with_ranked(spec: VqSpec, learnt: Mapping[str, AnyArray], items: Encoded) -> dict[str, AnyArray]:
    """Return what was learnt with what the ranking step has of each item (`engine/models/vq_spec.py`)."""
    vectors = ItemTower.load(spec.tower, learnt).vectors(items)  # where the weights are of this shape
    made = dict(learnt)
    if spec.rank != "none":
        made["rank.item_vectors"] = (
            learnt["rank.items.weight"][1:] + vectors @ learnt["rank.project.weight"].T
        )
        made["rank.item_bias"] = learnt["rank.bias.weight"][1:]
    return made


def _log_of(
    channel: str, tasks: tuple[Task, ...], context: BuildContext, since: int | None
) -> ImpressionLog | None:
    """Return impressions with a reward per task; None where one task learns what the data set calls a positive."""
    if len(tasks) == 1 and not tasks[0].kinds and tasks[0].reward == "one":
        return None
    from engine.training.impressions import ImpressionLog

    for at, task in enumerate(tasks):
        if task.reward == "log_value":
            raise ConfigError(
                "a build reads no values of events: the reward of a task is 'one', but for a trainer that follows",
                f"training.tasks.{at}.reward",
            )
    if context.events is None and any(task.kinds for task in tasks):
        raise BuildError(
            f"{channel}: training.tasks needs the events of the log, which `recall tune` does not give"
        )
    users, items, rewards, times = rewards_of(tasks, context.interactions, context.events)
    if since is not None:
        new = times > since
        users, items, rewards, times = users[new], items[new], rewards[new], times[new]
    return ImpressionLog.of(users, items, rewards, times)


def rewards_of(
    tasks: tuple[Task, ...], liked: Interactions, events: Events | None
) -> tuple[Int32Array, Int32Array, Float32Array, Int64Array]:
    """Return users, items, float32[n, tasks] rewards and times of every pair of a user and an item that a task rewards.

    A pair is one impression, at the time of the first event that counts. A task without kinds rewards what users like.

    Args:
        tasks: each with the reward 1.
        liked: users x items.
        events: of the kinds of all tasks; None where no task has a kind.
    """
    pairs: list[Int64Array] = []
    times: list[Int64Array] = []
    whose: list[Int64Array] = []
    for at, task in enumerate(tasks):
        if task.kinds:
            assert events is not None
            wanted = [number for number, name in enumerate(events.kind_names) if name in task.kinds]
            mine = np.isin(events.kinds, wanted)
            pairs.append(events.users[mine].astype(np.int64) * liked.items + events.items[mine])
            times.append(events.timestamps[mine])
        else:
            owners = np.repeat(np.arange(liked.users, dtype=np.int64), liked.user_counts())
            pairs.append(owners * liked.items + liked.rows)
            times.append(liked.timestamps)
        whose.append(np.full(pairs[-1].size, at, np.int64))
    pair, place = np.unique(np.concatenate(pairs), return_inverse=True)
    rewards = np.zeros((pair.size, len(tasks)), np.float32)
    rewards[place, np.concatenate(whose)] = 1
    first = np.full(pair.size, np.iinfo(np.int64).max)
    np.minimum.at(first, place, np.concatenate(times))
    return (
        (pair // liked.items).astype(np.int32),
        (pair % liked.items).astype(np.int32),
        rewards,
        first,
    )
