"""UserCF: users are similar when they like the same items, the more so the less popular the items are.

Source: the recommender course (Wang Shusen, user-based collaborative filtering): sim(u, v) = sum over the items l
that both like of 1 / log(1 + n_l), divided by sqrt(|J_u| |J_v|), n_l how many users like l; online, top-k similar users
x their last-n items, scores of an item reached twice add up, the best 100 are returned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Self

import numpy as np
from pydantic import Field

from engine.core.candidates import CandidateBatch, TriggerKind
from engine.core.channel import BuildContext, Channel, LoadContext, Progress
from engine.core.errors import BuildError
from engine.core.gather import gather_top_k
from engine.core.interactions import Interactions
from engine.core.options import Online, Options, Tune
from engine.core.query import QueryBatch
from engine.core.ragged import take_lists
from engine.core.similarity import (
    Finish,
    NeighbourBlock,
    NeighbourLists,
    SparseRows,
    power,
    top_k_products,
    write_neighbour_lists,
)
from engine.core.types import Float32Array, Int32Array, Int64Array
from engine.core.writable import writable


class UserCFOptions(Options):
    """Options of UserCF. The defaults are the course's; what departs from it is off."""

    item_exponent: Annotated[float, Field(ge=0, le=2), Tune(0.0, 1.0)] = 0.0
    """An item that n users like counts n^-this in the similarity, besides the course's 1 / log(1 + n)."""

    target_exponent: Annotated[float, Field(ge=0, le=1), Tune(0.1, 0.9)] = 0.5
    """The similarity is divided by (number of items of the neighbour)^this; 1/2 in the course."""

    amplification: Annotated[float, Field(gt=0, le=4), Tune(0.5, 2.5)] = 1.0
    """Exponent applied to every similarity kept."""

    candidate_exponent: Annotated[float, Field(ge=0, le=1), Tune(0.0, 0.6)] = 0.0
    """A recalled item that n users like scores n^-this of what its neighbours give it. 0 in the course."""

    neighbours: Annotated[int, Field(ge=1, le=10_000)] = 200
    """Similar users kept per user."""

    items_kept: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Newest items kept of each user: last-n can be no larger."""

    last_n: Annotated[int, Field(ge=1, le=100_000), Online()] = 200
    """Newest items taken of each similar user."""

    top_k: Annotated[int, Field(ge=1, le=10_000), Online(), Tune(10, 200, log=True)] = 10
    """Similar users asked."""


class UserCF(Channel):
    """Recalls what similar users liked most recently; the trigger is the user who gave most."""

    Config = UserCFOptions
    inline = True
    trigger_kind = TriggerKind.USER

    def __init__(
        self,
        config: UserCFOptions,
        similar: NeighbourLists,
        indptr: Int64Array,
        rows: Int32Array,
        weights: Float32Array,
    ) -> None:
        super().__init__(config)
        self._similar = similar
        self._indptr = indptr
        self._rows = rows
        self._weights = weights

    @classmethod
    def build(cls, config: UserCFOptions, context: BuildContext) -> None:
        """Write each user's similar users and newest items; BuildError if nobody likes anything."""
        liked = context.interactions
        if liked.entries == 0:
            raise BuildError("usercf: no event of the data set says that a user likes an item")
        write_neighbour_lists(
            context.sink, usercf_neighbours(liked, config, context.threads, context.progress)
        )
        kept = liked.newest(config.items_kept)
        discount = power(liked.item_counts().astype(np.float64), -config.candidate_exponent)
        context.sink.write("items.indptr", kept.indptr)
        context.sink.write("items.rows", kept.rows)
        context.sink.write("items.weights", kept.weights * discount[kept.rows])

    @classmethod
    def load(cls, config: UserCFOptions, context: LoadContext) -> Self:
        """Map the lists."""
        arrays = context.arrays
        return cls(
            config,
            NeighbourLists.load(arrays),
            writable(arrays["items.indptr"]),
            writable(arrays["items.rows"]),
            writable(arrays["items.weights"]),
        )

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Gather top_k similar users x their last_n items per query."""
        offsets, positions = take_lists(self._similar.indptr, batch.users)
        return gather_top_k(
            offsets,
            self._similar.neighbours[positions],
            self._similar.similarities[positions],
            self._indptr,
            self._rows,
            self._weights,
            self.config.top_k,
            self.config.last_n,
            k,
        )


def usercf_neighbours(
    liked: Interactions, config: UserCFOptions, threads: int, progress: Progress
) -> Iterable[NeighbourBlock]:
    """Yield every user's similar users, block by block.

    sim(u, v) = (sum over items l both like of n_l^-c / log(1 + n_l) / |J_v|^b) ^ amplification / |J_u|^1/2; with c = 0
    and b = 1/2 the course's. What is u's own changes no ranking of u's, so it has no option. Likes count as 0 or 1 here,
    as in the course; how much somebody likes an item enters when the item is recalled.

    Args:
        liked: the interest matrix.
        config: options.
        threads, progress: as everywhere.
    """
    by_item = liked.by_item()
    ones = np.ones(liked.entries, np.float32)
    popularity = liked.item_counts().astype(np.float64)
    rarity = power(np.log1p(np.maximum(popularity, 1)), -1.0) * power(popularity, -config.item_exponent)
    activity = liked.user_counts().astype(np.float64)
    return top_k_products(
        SparseRows(liked.indptr, liked.rows, ones),
        SparseRows(by_item.indptr, by_item.users, ones),
        rarity,
        power(activity, config.target_exponent),
        0.0,
        config.neighbours,
        Finish(False, config.amplification, power(activity, 0.5)),
        threads,
        progress,
        "usercf",
    )
