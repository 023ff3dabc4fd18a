"""From a log to a bundle: encoders, training, index. Channels of the same towers share it."""

from __future__ import annotations

import numpy as np

from channels.two_tower.bundle import Bundle, encoders_of, keys_of_items, write_bundle
from channels.two_tower.likers import drawn_to_likers
from channels.two_tower.options import TwoTowerOptions
from channels.two_tower.start import carried_over
from engine.core.channel import BuildContext
from engine.core.errors import BuildError
from engine.core.types import AnyArray, Int32Array
from engine.models.encoded import Encoded
from engine.models.spec import ModelSpec
from engine.models.towers import ItemTower, UserTower

NO_TORCH = "training needs PyTorch, which is not installed: pip install 'recall-engine[train]'"


def build_bundle(
    channel: str,
    config: TwoTowerOptions,
    context: BuildContext,
    clusters: Int32Array | None = None,
    prompts: int = 0,
) -> None:
    """Train the towers, make the item vectors and the index, and write all of it as one bundle.

    Where `context.learnt` has the towers' weights, they are not trained.

    Args:
        channel: its name, for errors.
        config, context: of the build.
        clusters: int32[items], where the user tower has a prompt per cluster.
        prompts: how many clusters there are.

    Raises:
        BuildError: nobody likes anything, PyTorch is not installed, or the training fails.
        ConfigError: a feature is not in the data, or of another type.
        SnapshotError: what was learnt earlier is not of these towers.
    """
    liked = context.interactions
    check_liked(channel, context)
    previous = None if context.previous is None else Bundle.of(context.previous)
    spec, user_encoder, item_encoder = encoders_of(config, context, previous, prompts)
    users = user_encoder.encode(context.user_columns, np.arange(liked.users, dtype=np.int32))
    items = item_encoder.encode(context.item_columns, np.arange(liked.items, dtype=np.int32))
    encoders = user_encoder, item_encoder
    if context.learnt is not None:
        arrays = dict(context.learnt)
        UserTower.load(spec, arrays)  # that the weights are of this shape
        arrays["item_vectors"] = ItemTower.load(spec, arrays).vectors(items)
        draw(config, context, spec, users, arrays)
        write_bundle(config, context, spec, encoders, (users, items), arrays)
        return
    start = None
    if previous is not None and context.previous is not None:
        start = carried_over(channel, spec, encoders, keys_of_items(context), previous, context.previous)
    try:
        from channels.two_tower.examples import training_data
        from engine.training.trainer import train
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise BuildError(f"{channel}: {NO_TORCH}") from error
    # Without a model to go on from there is nothing to update: the first build is a full one, whatever is asked for.
    mode = context.mode if start is not None else "full"
    since = None if previous is None or mode != "incremental" else previous.learnt_until
    data = training_data(channel, config, context, users, items, since, clusters)
    trained = train(spec, config.training, data, context.progress, context.work, start, context.threads, mode)
    arrays = dict(trained.arrays)
    draw(config, context, spec, users, arrays)
    write_bundle(config, context, spec, encoders, (users, items), arrays, clusters)


def draw(
    config: TwoTowerOptions,
    context: BuildContext,
    spec: ModelSpec,
    users: Encoded,
    arrays: dict[str, AnyArray],
) -> None:
    """Draw `item_vectors` to the users who like the items, as far as the options say."""
    if config.liker_weight:
        tower = UserTower.load(spec, arrays)
        vectors = arrays["item_vectors"]
        arrays["item_vectors"] = drawn_to_likers(
            vectors, tower, users, context.interactions, config.liker_weight
        )


def check_liked(channel: str, context: BuildContext) -> None:
    """Raise BuildError where nobody likes anything."""
    if context.interactions.entries == 0:
        raise BuildError(f"{channel}: no event of the data set says that a user likes an item")
