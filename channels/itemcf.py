"""ItemCF: items are similar when the same users like both.

Source: the recommender course (Wang Shusen, item-based collaborative filtering): an item is the sparse vector of its
users' interest scores, sim(i, j) is the cosine of two such vectors; online, last-n x top-k neighbours, scores of an item
reached twice add up, the best 100 are returned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field

from engine.core.candidates import CandidateBatch, TriggerKind
from engine.core.channel import BuildContext, Channel, LoadContext, Progress
from engine.core.errors import BuildError
from engine.core.interactions import Interactions
from engine.core.options import Online, Options, Tune
from engine.core.query import QueryBatch
from engine.core.similarity import (
    Finish,
    NeighbourBlock,
    NeighbourLists,
    SparseRows,
    power,
    top_k_products,
    write_neighbour_lists,
)
from engine.core.types import Float32Array, Float64Array, Int32Array

SECONDS_PER_DAY = 86_400


class ItemCFOptions(Options):
    """Options of ItemCF. The defaults are the course's cosine; what departs from it is off."""

    activity_exponent: Annotated[float, Field(ge=0, le=2), Tune(0.0, 1.5)] = 0.0
    """A common user counts |I_u|^-this: likes of somebody who likes everything say less. 0 in the course."""

    source_exponent: Annotated[float, Field(ge=0, le=1), Tune(0.0, 0.7)] = 0.5
    """A trigger's list is divided by (sum of its squared scores)^this; 1/2 is the cosine. With `normalize = "sum"` it
    says how much less a popular trigger says than a rare one, and 0 is a good value."""

    target_exponent: Annotated[float, Field(ge=0, le=1), Tune(0.0, 0.6)] = 0.5
    """The same for the neighbour: less than 1/2 favours popular neighbours."""

    shrinkage: Annotated[float, Field(ge=0, le=1e6), Tune(0.0, 20.0)] = 0.0
    """A similarity that rests on n common users is multiplied by n / (n + this). 0 in the course."""

    normalize: Annotated[Literal["none", "sum"], Tune(choices=("none", "sum"))] = "none"
    """`sum` divides each trigger's list, once cut, by its sum, so that every trigger has the same say."""

    amplification: Annotated[float, Field(gt=0, le=4), Tune(0.5, 2.0)] = 1.0
    """Exponent applied to every similarity kept, after `normalize`."""

    half_life_days: Annotated[float, Field(ge=0)] = 0.0
    """A like counts half when it is this old (age measured from the last event of the data); 0 is no decay."""

    neighbours: Annotated[int, Field(ge=1, le=10_000)] = 200
    """Neighbours kept per item."""

    last_n: Annotated[int, Field(ge=1, le=100_000), Online(), Tune(50, 1000, log=True)] = 200
    """Newest items of the user that are triggers."""

    recency_half_life: Annotated[float, Field(ge=0), Online(), Tune(0.0, 20.0, timed=True)] = 0.0
    """A trigger counts half for every so many newer ones of the user; 0 is all alike, as in the course."""

    top_k: Annotated[int, Field(ge=1, le=10_000), Online(), Tune(10, 200, log=True)] = 10
    """Neighbours taken per trigger."""

    source: Annotated[Literal["history", "trigger"], Online()] = "history"
    """`history`: what the user liked is what neighbours are looked up of. `trigger`: the request's trigger items are."""


class ItemCF(Channel):
    """Recalls the neighbours of what the user liked most recently; scores of an item reached twice add up."""

    Config = ItemCFOptions
    inline = True
    trigger_kind = TriggerKind.ITEM

    def __init__(self, config: ItemCFOptions, lists: NeighbourLists) -> None:
        super().__init__(config)
        self._lists = lists

    @classmethod
    def build(cls, config: ItemCFOptions, context: BuildContext) -> None:
        """Write the neighbour lists; BuildError if nobody likes anything."""
        liked = context.interactions
        if liked.entries == 0:
            raise BuildError("itemcf: no event of the data set says that a user likes an item")
        write_neighbour_lists(
            context.sink, itemcf_neighbours(liked, config, context.now, context.threads, context.progress)
        )

    @classmethod
    def load(cls, config: ItemCFOptions, context: LoadContext) -> Self:
        """Map the neighbour lists."""
        return cls(config, NeighbourLists.load(context.arrays))

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Gather last_n x top_k neighbours per query."""
        config = self.config
        items = batch.trigger_items() if config.source == "trigger" else batch.history
        return self._lists.recall(items, config.last_n, config.top_k, config.recency_half_life, k)


def itemcf_neighbours(
    liked: Interactions, config: ItemCFOptions, now: int, threads: int, progress: Progress
) -> Iterable[NeighbourBlock]:
    """Yield every item's neighbours, block by block.

    s(i, j) = n / (n + shrinkage) * (sum over u of x_ui x_uj |I_u|^-c) / |x_j|^2b, n how many users like both; the best
    stay, and sim(i, j) = (s(i, j) [/ sum of what stayed])^amplification / |x_i|^2a. With c = shrinkage = 0, a = b = 1/2
    and no normalisation that is the cosine. Damping by activity is the 1 / log(1 + |I_u|) of Breese et al. 1998 as a
    power; n / (n + shrinkage) is Herlocker's significance weighting as Bell and Koren smoothed it (2007).

    Args:
        liked: the interest matrix.
        config: options.
        now: seconds since the epoch that ages are measured from.
        threads, progress: as everywhere.
    """
    values = decayed(liked, config.half_life_days, now)
    by_item = liked.by_item()
    items = SparseRows(by_item.indptr, by_item.users, values[by_item.positions])
    users = SparseRows(liked.indptr, liked.rows, values)
    norms = squared_norms(liked.rows, values, liked.items)
    return top_k_products(
        items,
        users,
        power(liked.user_counts().astype(np.float64), -config.activity_exponent),
        power(norms, config.target_exponent),
        config.shrinkage,
        config.neighbours,
        Finish(config.normalize == "sum", config.amplification, power(norms, config.source_exponent)),
        threads,
        progress,
        "itemcf",
    )


def decayed(liked: Interactions, half_life_days: float, now: int) -> Float32Array:
    """float32[entries]: interest scores, each halved for every half-life of age."""
    if half_life_days == 0:
        return liked.weights
    ages = np.maximum(now - liked.timestamps, 0)
    return (liked.weights * np.exp2(-ages / (half_life_days * SECONDS_PER_DAY))).astype(np.float32)


def squared_norms(columns: Int32Array, values: Float32Array, size: int) -> Float64Array:
    """float64[size]: sum of squared values of each column."""
    return np.bincount(columns, weights=np.square(values, dtype=np.float64), minlength=size).astype(
        np.float64
    )
