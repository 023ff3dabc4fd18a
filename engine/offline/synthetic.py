"""A synthetic interest matrix of any size, for benchmarks: users with a few interests, popular items in each."""

from __future__ import annotations

import numpy as np

from engine.core.interactions import Interactions
from engine.core.types import Int32Array, Int64Array

TOPIC_ITEMS = 500
TOPICS_PER_USER = 4
POPULARITY_EXPONENT = 0.9


def synthetic_interactions(users: int, items: int, events: int, seed: int = 1) -> Interactions:
    """Return about `events` likes: each user has a few topics and likes popular items of them most.

    Items fall into topics of 500; topics and the items in one follow a power law of exponent 0.9; activity is
    log-normal. An item liked twice by a user counts once, so a few events are lost.

    Args:
        users, items, events: sizes.
        seed: the same seed makes the same matrix.
    """
    rng = np.random.default_rng(seed)
    topics = max(1, items // TOPIC_ITEMS)
    activity = rng.lognormal(0.0, 0.8, users)
    counts = np.maximum(1, np.rint(activity * (events / activity.sum()))).astype(np.int64)
    owner = np.repeat(np.arange(users), counts)
    tastes = _power_law(rng, topics, users * TOPICS_PER_USER).reshape(users, TOPICS_PER_USER)
    topic = tastes[owner, rng.integers(0, TOPICS_PER_USER, owner.size)].astype(np.int64)
    size = items // topics
    item = topic * size + _power_law(rng, size, owner.size)
    # Item numbers carry no order of popularity in the field; here neither.
    item = rng.permutation(items)[item]
    order = np.lexsort((item, owner))
    owner, item = owner[order], item[order]
    fresh = np.ones(owner.size, np.bool_)
    fresh[1:] = (owner[1:] != owner[:-1]) | (item[1:] != item[:-1])
    owner, item = owner[fresh], item[fresh]
    # Newest first means in no order of item.
    order = np.lexsort((rng.random(owner.size), owner))
    rows: Int32Array = item[order].astype(np.int32)
    indptr: Int64Array = np.zeros(users + 1, np.int64)
    np.cumsum(np.bincount(owner, minlength=users), out=indptr[1:])
    place = np.arange(rows.size) - np.repeat(indptr[:-1], np.diff(indptr))
    return Interactions(
        users, items, indptr, rows, np.ones(rows.size, np.float32), 1_700_000_000 - place * 3600
    )


def _power_law(rng: np.random.Generator, size: int, draws: int) -> Int32Array:
    """int32[draws] in [0, size), P(rank r) about r^-0.9: inverse transform of the continuous law, no table needed."""
    power = 1.0 - POPULARITY_EXPONENT
    uniform = rng.random(draws)
    value = (1 + uniform * ((size + 1) ** power - 1)) ** (1 / power)
    drawn: Int32Array = np.minimum(value.astype(np.int32) - 1, size - 1)
    return drawn
