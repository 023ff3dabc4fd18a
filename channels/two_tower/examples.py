"""What the towers are trained on: likes, what they count for, and where hard negatives come from."""

from __future__ import annotations

import numpy as np

from channels.two_tower.options import TwoTowerOptions
from engine.core.channel import BuildContext, Events
from engine.core.errors import BuildError, ConfigError
from engine.core.interactions import Interactions
from engine.core.types import BoolArray, Float32Array, Int32Array, Int64Array
from engine.models.encoded import Encoded
from engine.training.data import TrainingData


def training_data(
    channel: str,
    config: TwoTowerOptions,
    context: BuildContext,
    users: Encoded,
    items: Encoded,
    since: int | None,
    clusters: Int32Array | None = None,
) -> TrainingData:
    """Return what a training is given.

    Args:
        channel: its name, for errors.
        config: options.
        context: of the build.
        users, items: all rows, encoded.
        since: only likes after this time are learnt, the others are history; None: all are.
        clusters: int32[items]; None: those of the column that the options name.

    Raises:
        BuildError: nothing came after `since`, or events are needed and not to be had.
        ConfigError: the column of clusters is not there.
    """
    liked = context.interactions
    weighted, rejected = bool(config.training.event_weights), bool(config.rejects)
    if (weighted or rejected) and context.events is None:
        raise BuildError(
            f"{channel}: training.event_weights and rejects need the events of the log, which `recall tune` does not give"
        )
    examples: BoolArray | None = None
    if since is not None:
        examples = liked.timestamps > since
        if not examples.any():
            raise BuildError(f"{channel}: nobody liked anything since the last model was trained")
    return TrainingData(
        interactions=liked,
        users=users,
        items=items,
        weights=event_weights(liked, context.events, config.training.event_weights)
        if weighted and context.events is not None
        else None,
        clusters=column_clusters(config, context) if config.cluster and clusters is None else clusters,
        rejects=reject_matrix(liked, context.events, config.rejects)
        if rejected and context.events is not None
        else None,
        examples=examples,
    )


def event_weights(liked: Interactions, events: Events, weights: dict[str, float]) -> Float32Array:
    """float32[entries]: the sum of the weights of the kinds of event between user and item; 1 where none has a weight."""
    total = np.zeros(liked.entries, np.float32)
    found = np.zeros(liked.entries, np.bool_)
    pairs = _pairs(liked)
    order = np.argsort(pairs)
    in_order = pairs[order]
    for kind, weight in weights.items():
        if kind not in events.kind_names:
            continue
        mine = events.kinds == events.kind_names.index(kind)
        wanted = np.unique(events.users[mine].astype(np.int64) * liked.items + events.items[mine])
        at = np.minimum(np.searchsorted(in_order, wanted), pairs.size - 1)
        entries = order[at[in_order[at] == wanted]]
        total[entries] += np.float32(weight)
        found[entries] = True
    total[~found] = 1.0
    return total


def reject_matrix(liked: Interactions, events: Events, kinds: tuple[str, ...]) -> Interactions:
    """Return users x items that ranking threw out and that the user never liked; newest first."""
    of_kinds = np.isin(events.kinds, [at for at, name in enumerate(events.kind_names) if name in kinds])
    users, items = events.users[of_kinds].astype(np.int64), events.items[of_kinds]
    pairs, first = np.unique(users * liked.items + items, return_index=True)
    thrown = ~np.isin(pairs, _pairs(liked))
    pairs, times = pairs[thrown], events.timestamps[of_kinds][first[thrown]]
    owners = pairs // liked.items
    order = np.lexsort((-times, owners))
    indptr = np.zeros(liked.users + 1, np.int64)
    np.cumsum(np.bincount(owners, minlength=liked.users), out=indptr[1:])
    return Interactions(
        liked.users,
        liked.items,
        indptr,
        (pairs % liked.items)[order].astype(np.int32),
        np.ones(pairs.size, np.float32),
        times[order],
    )


def _pairs(liked: Interactions) -> Int64Array:
    owner = np.repeat(np.arange(liked.users, dtype=np.int64), liked.user_counts())
    return owner * liked.items + liked.rows


def column_clusters(config: TwoTowerOptions, context: BuildContext) -> Int32Array:
    """int32[items]: the code of each item's string in the column `cluster`, 0 where it has none."""
    if (
        f"{config.cluster}.vocabulary.offsets" not in context.item_columns
        or config.cluster not in context.item_columns
    ):
        there = [
            name.partition(".")[0] for name in context.item_columns if name.endswith(".vocabulary.offsets")
        ]
        strings = [name for name in there if name in context.item_columns]
        raise ConfigError(
            f"items.parquet has no column {config.cluster!r} of strings; it has {', '.join(strings) or 'none'}",
            "cluster",
        )
    return (context.item_columns[config.cluster] + 1).astype(np.int32)
