"""From a log to a bundle: encoders, training, lists."""

from __future__ import annotations

import numpy as np

from channels.deep_retrieval.bundle import Bundle, specified, write_bundle
from channels.deep_retrieval.options import DeepRetrievalOptions
from channels.deep_retrieval.start import carried_over
from channels.two_tower.build import NO_TORCH, check_liked
from channels.two_tower.bundle import keys_of_items
from engine.core.channel import BuildContext
from engine.core.errors import BuildError, ConfigError
from engine.models.encoded import Encoded

LEARNT = ("user.", "paths.", "rank.", "assignment", "scores.")
"""How the names of the arrays begin that a training gives."""

CROWD = 1000
"""Items of the average path at most: a beam of 50 would reach as many thousands, no less work than comparing all."""


def build_bundle(channel: str, config: DeepRetrievalOptions, context: BuildContext) -> None:
    """Train the user tower, the lattice and the ranker, put the items on paths, and write all of it as one bundle.

    Where `context.learnt` has what an earlier training gave, that is written.

    Args:
        channel: its name, for errors.
        config, context: of the build.

    Raises:
        BuildError: nobody likes anything, PyTorch is not installed, or the training fails.
        ConfigError: a feature is not in the data, or of another type; or the lattice is too small for the items.
    """
    liked = context.interactions
    check_liked(channel, context)
    check_room(config, liked.items)
    previous = None if context.previous is None else Bundle(context.previous)
    spec, user_encoder, item_encoder = specified(config, context, previous)
    if context.learnt is not None:
        write_bundle(context, spec, user_encoder, item_encoder, context.learnt)
        return
    users = user_encoder.encode(context.user_columns, np.arange(liked.users, dtype=np.int32))
    start = None
    if previous is not None and context.previous is not None:
        start = carried_over(channel, spec, user_encoder, keys_of_items(context), previous, context.previous)
    try:
        from engine.training.data import TrainingData
        from engine.training.deep_retrieval import train_paths
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise BuildError(f"{channel}: {NO_TORCH}") from error
    # Without a model to go on from there is nothing to update: the first build is a full one, whatever is asked for.
    mode = context.mode if start is not None else "full"
    examples = None
    if previous is not None and mode == "incremental":
        examples = liked.timestamps > previous.learnt_until
        if not examples.any():
            raise BuildError(f"{channel}: nobody liked anything since the last model was trained")
    nothing = Encoded(np.empty((liked.items, 0), np.int32), (), np.empty((liked.items, 0), np.float32))
    trained = train_paths(
        spec.tower,
        spec.lattice,
        config.training,
        TrainingData(liked, users, nothing, examples=examples),
        context.progress,
        context.work,
        start,
        context.threads,
        mode,
        per_item=spec.paths,
        kept=spec.kept_paths,
    )
    write_bundle(context, spec, user_encoder, item_encoder, trained.arrays)


def check_room(config: DeepRetrievalOptions, items: int) -> None:
    """Raise ConfigError where there are too few paths for the items."""
    needed = -(-items * config.paths // CROWD)
    if config.lattice.paths < needed:
        width = next(width for width in range(config.width, needed + 1) if width**config.depth >= needed)
        raise ConfigError(
            f"{config.width}^{config.depth} = {config.lattice.paths:,} paths are too few for {items:,} items with "
            f"{config.paths} paths each: {needed:,} are needed, {CROWD:,} items on each; take {width} or more, "
            "or more depth",
            "width",
        )
