"""Swing: items are similar when many pairs of otherwise unlike users like both.

Source: Yang et al., Large Scale Product Graph Construction for Recommendation in E-commerce, arXiv:2010.05525, section 3:
s(i, j) = sum over pairs of users u, v who both like i and j of w_u w_v / (alpha + |I_u n I_v|), w_u = 1 / sqrt(|I_u|).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

import numpy as np
from numba import njit
from pydantic import Field

from engine.core.blocks import over_blocks
from engine.core.candidates import CandidateBatch, TriggerKind
from engine.core.channel import BuildContext, Channel, LoadContext, Progress
from engine.core.errors import BuildError
from engine.core.hashing import GOLDEN, scrambled
from engine.core.options import Online, Options, Tune
from engine.core.query import QueryBatch
from engine.core.select import drain, offer, sort_key
from engine.core.similarity import (
    Finish,
    NeighbourBlock,
    NeighbourLists,
    balanced_blocks,
    buffer_size,
    power,
    product_cost,
    write_neighbour_lists,
)
from engine.core.types import AnyArray, Int32Array, Int64Array


class SwingOptions(Options):
    """Options of Swing. The defaults are the paper's."""

    alpha: Annotated[float, Field(ge=0), Tune(0.1, 30.0, log=True)] = 1.0
    """Added to the overlap of two users: the larger, the less a small circle is held back."""

    user_exponent: Annotated[float, Field(ge=0, le=2), Tune(0.0, 1.0)] = 0.5
    """w_u = |I_u|^-this. The paper's is 1/2; larger values trust active users less. (A negative exponent, which some
    programs have, would trust them more; it is refused.)"""

    single_users: Annotated[float, Field(ge=0, le=10), Tune(0.0, 1.0)] = 0.0
    """Adds this times w_u^2 / (alpha + 1) for every user u of both items, as if u had a twin who shares nothing else: so
    that items which share a single user are neighbours too. Not in the paper, where it is 0."""

    source_exponent: Annotated[float, Field(ge=0, le=2), Tune(0.0, 1.0)] = 0.0
    """A trigger's list is divided by |U_i|^this. Not in the paper, where it is 0."""

    target_exponent: Annotated[float, Field(ge=0, le=2), Tune(0.0, 0.6)] = 0.0
    """The similarity is divided by |U_j|^this, j the neighbour. Not in the paper, where it is 0."""

    normalize: Annotated[Literal["none", "sum"], Tune(choices=("none", "sum"))] = "none"
    """`sum` divides each trigger's list, once cut, by its sum, so that every trigger has the same say. The paper has
    none."""

    amplification: Annotated[float, Field(gt=0, le=4), Tune(0.5, 2.0)] = 1.0
    """Exponent applied to every similarity kept, after `normalize`. Not in the paper, where it is 1."""

    neighbours: Annotated[int, Field(ge=1, le=10_000)] = 200
    """Neighbours kept per item."""

    max_users_per_item: Annotated[int, Field(ge=2, le=20_000)] = 300
    """Users of an item beyond this are sampled (seeded): the pairs of an item are bounded by its square. The field caps
    at 600 to 1,000; docs/benchmarks.md says why it is 300 here."""

    max_items_per_user: Annotated[int, Field(ge=2, le=60_000)] = 1000
    """Items of a user beyond this are sampled (seeded)."""

    seed: Annotated[int, Field(ge=0)] = 1
    """Of the sampling."""

    last_n: Annotated[int, Field(ge=1, le=100_000), Online(), Tune(50, 1000, log=True)] = 200
    """Newest items of the user that are triggers."""

    recency_half_life: Annotated[float, Field(ge=0), Online(), Tune(0.0, 20.0, timed=True)] = 0.0
    """A trigger counts half for every so many newer ones of the user; 0 is all alike."""

    top_k: Annotated[int, Field(ge=1, le=10_000), Online(), Tune(10, 200, log=True)] = 10
    """Neighbours taken per trigger."""

    source: Annotated[Literal["history", "trigger"], Online()] = "history"
    """`history`: what the user liked is what neighbours are looked up of. `trigger`: the request's trigger items are."""


class Swing(Channel):
    """Recalls the Swing neighbours of what the user liked most recently; scores of an item reached twice add up."""

    Config = SwingOptions
    inline = True
    trigger_kind = TriggerKind.ITEM

    def __init__(self, config: SwingOptions, lists: NeighbourLists) -> None:
        super().__init__(config)
        self._lists = lists

    @classmethod
    def build(cls, config: SwingOptions, context: BuildContext) -> None:
        """Write the neighbour lists; BuildError if nobody likes anything."""
        liked = context.interactions
        if liked.entries == 0:
            raise BuildError("swing: no event of the data set says that a user likes an item")
        write_neighbour_lists(
            context.sink,
            swing_neighbours(
                liked.indptr, liked.rows, liked.items, config, context.threads, context.progress
            ),
        )

    @classmethod
    def load(cls, config: SwingOptions, context: LoadContext) -> Self:
        """Map the neighbour lists."""
        return cls(config, NeighbourLists.load(context.arrays))

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Gather last_n x top_k neighbours per query."""
        config = self.config
        items = batch.trigger_items() if config.source == "trigger" else batch.history
        return self._lists.recall(items, config.last_n, config.top_k, config.recency_half_life, k)


def swing_neighbours(
    indptr: Int64Array, rows: Int32Array, items: int, config: SwingOptions, threads: int, progress: Progress
) -> Iterable[NeighbourBlock]:
    """Yield every item's Swing neighbours, block by block.

    For a trigger i with m (sampled) users, the items that at least two of them like get the list of those users, as
    numbers below m. One pass over the lists counts the overlap of every pair, O[a, b]; a second sums
    w_a w_b / (alpha + O[a, b]) over the pairs of each list. The work is two times the number of (pair, shared item)
    incidences, which is far less than intersecting the item sets of each pair. Memory besides the inputs, per thread:
    2 m^2 bytes for the overlaps, 20 bytes an item of the catalogue, and the incidences of one item.

    Args:
        indptr, rows: who likes what, user-major; int64[users + 1], int32[entries].
        items: columns of the matrix.
        config: options.
        threads, progress: as everywhere.
    """
    indptr, rows = _sample(indptr, rows, config.max_items_per_user, config.seed)
    item_indptr, users = _by_item(indptr, rows, items)
    counts = np.maximum(np.diff(item_indptr), 1).astype(np.float64)
    item_indptr, users = _sample(item_indptr, users, config.max_users_per_item, config.seed + 1)
    activity = np.maximum(np.diff(indptr), 1).astype(np.float64)
    weights = (activity**-config.user_exponent).astype(np.float32)
    finish = Finish(config.normalize == "sum", config.amplification, power(counts, config.source_exponent))
    target = (counts**-config.target_exponent).astype(np.float32)
    longest = int(np.diff(indptr).max(initial=0))
    # Two users of one item share at least that item: the overlap 0 is never looked up.
    pair = (1.0 / (config.alpha + np.maximum(np.arange(longest + 1), 1))).astype(np.float32)
    alone = (config.single_users * weights**2 / (config.alpha + 1)).astype(np.float32)
    most = int(np.diff(item_indptr).max(initial=0))
    keep = min(config.neighbours, items)

    def work(begin: int, end: int) -> NeighbourBlock:
        lengths = np.zeros(end - begin, np.int32)
        neighbours = np.empty(keep * (end - begin), np.int32)
        similarities = np.empty(keep * (end - begin), np.float32)
        total = _swing(
            indptr, rows, item_indptr, users, weights, alone, pair, target, most, keep, begin, end, lengths,
            neighbours, similarities,
        )  # fmt: skip
        kept = similarities[:total].copy()
        finish(begin, lengths, kept)
        return NeighbourBlock(lengths, neighbours[:total].copy(), kept)

    per_item = np.diff(item_indptr)
    cost = per_item * per_item + product_cost(item_indptr, users, indptr)
    return over_blocks(work, balanced_blocks(cost, threads), threads, progress, "swing")


def _by_item(indptr: Int64Array, rows: Int32Array, items: int) -> tuple[Int64Array, Int32Array]:
    starts = np.zeros(items + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=items), out=starts[1:])
    users = np.empty(rows.size, np.int32)
    _transpose(indptr, rows, starts[:-1].copy(), users)
    return starts, users


def _sample(indptr: Int64Array, columns: Int32Array, most: int, seed: int) -> tuple[Int64Array, Int32Array]:
    """Keep at most `most` entries of each row, drawn without replacement; order within a row is kept."""
    lengths = np.diff(indptr)
    if lengths.size == 0 or int(lengths.max()) <= most:
        return indptr, columns
    kept = np.zeros(indptr.size, np.int64)
    np.cumsum(np.minimum(lengths, most), out=kept[1:])
    out = np.empty(int(kept[-1]), np.int32)
    _draw(indptr, columns, most, np.uint64(seed), kept, out)
    return kept, out


@njit(nogil=True, cache=True)
def _draw(indptr, columns, most, seed, kept, out):  # type: ignore[no-untyped-def]
    """Selection sampling (Knuth, TAOCP 2, algorithm 3.4.2 S), a generator per row so that rows do not depend on it."""
    for r in range(indptr.size - 1):
        length = indptr[r + 1] - indptr[r]
        at = kept[r]
        state = (seed + np.uint64(1)) * np.uint64(GOLDEN) + np.uint64(r) * np.uint64(0xD1B54A32D192ED03)
        for p in range(length):
            state += np.uint64(GOLDEN)  # splitmix64
            uniform = np.float64(scrambled(state) >> np.uint64(11)) / 9007199254740992.0
            if uniform * (length - p) < kept[r + 1] - at:
                out[at] = columns[indptr[r] + p]
                at += 1


@njit(nogil=True, cache=True)
def _transpose(indptr, rows, cursor, users):  # type: ignore[no-untyped-def]
    for u in range(indptr.size - 1):
        for p in range(indptr[u], indptr[u + 1]):
            users[cursor[rows[p]]] = u
            cursor[rows[p]] += 1


@njit(nogil=True, cache=True)
def _swing(  # type: ignore[no-untyped-def]
    indptr, rows, item_indptr, users, weights, alone, pair, target, most, keep, begin, end, lengths, neighbours,
    similarities,
):  # fmt: skip
    items = item_indptr.size - 1
    counts = np.zeros(items, np.int32)
    cursor = np.zeros(items, np.int64)
    sums = np.zeros(items, np.float32)
    touched = np.empty(items + 1, np.int32)
    overlap = np.zeros((most, most), np.uint16)
    trust = np.empty(most, np.float32)
    local = np.empty(1, np.uint16)
    keys = np.empty(buffer_size(keep), np.uint64)
    cell = np.empty(1, np.float32)
    bits = cell.view(np.uint32)
    zero = np.float32(0)
    written = np.int64(0)  # a literal would have `drain` compiled twice
    for i in range(begin, end):
        first = item_indptr[i]
        m = item_indptr[i + 1] - first
        found = np.uint64(0)
        for a in range(m):
            u = users[first + a]
            trust[a] = weights[u]
            for p in range(np.uint64(indptr[u]), np.uint64(indptr[u + 1])):
                j = np.uint32(rows[p])
                before = counts[j]
                touched[found] = j
                found += np.uint64(before == 0)
                counts[j] = before + 1
                sums[j] += alone[u]
        # Places of the lists of items that two users or more share; the trigger itself is in every pair.
        room = 0
        for at in range(found):
            j = touched[at]
            if counts[j] >= 2 and j != i:
                cursor[j] = room
                room += counts[j]
            else:
                cursor[j] = -1
        if room > local.size:
            local = np.empty(2 * room, np.uint16)
        for a in range(m):
            u = users[first + a]
            for p in range(np.uint64(indptr[u]), np.uint64(indptr[u + 1])):
                j = np.uint32(rows[p])
                to = cursor[j]
                if to >= 0:
                    local[np.uint64(to)] = a
                    cursor[j] = to + 1
        overlap[:m, :m] = 1
        for at in range(found):
            j = touched[at]
            if cursor[j] < 0:
                continue
            start = np.uint64(cursor[j] - counts[j])
            stop = np.uint64(cursor[j])
            for x in range(start, stop):
                one = np.uint64(local[x])
                for y in range(x + np.uint64(1), stop):
                    overlap[one, np.uint64(local[y])] += np.uint16(1)
        size = np.int64(0)
        worst = np.uint64(0)
        for at in range(found):
            j = touched[at]
            total = sums[j]
            sums[j] = zero
            if cursor[j] >= 0:
                start = np.uint64(cursor[j] - counts[j])
                stop = np.uint64(cursor[j])
                for x in range(start, stop):
                    one = np.uint64(local[x])
                    inner = zero
                    for y in range(x + np.uint64(1), stop):
                        other = np.uint64(local[y])
                        inner += trust[other] * pair[overlap[one, other]]
                    total += trust[one] * inner
            cell[0] = total * target[j]
            if cell[0] > zero and j != i:
                size, worst = offer(keys, size, keep, worst, sort_key(bits[0], j))
            counts[j] = 0
        lengths[i - begin] = min(size, keep)
        written = drain(keys, size, keep, neighbours, similarities, written)
    return written


def swing_reference(liked: AnyArray, config: SwingOptions) -> AnyArray:
    """The plain NumPy twin: sim(i, j) for every pair of items of a dense 0/1 matrix [users, items], nothing cut."""
    liked = liked.astype(np.float64)
    activity = np.maximum(liked.sum(axis=1), 1)
    popularity = np.maximum(liked.sum(axis=0), 1)
    weights = activity**-config.user_exponent
    overlap = liked @ liked.T
    scores = np.zeros((liked.shape[1], liked.shape[1]))
    for u in range(liked.shape[0]):
        scores += config.single_users * np.outer(liked[u], liked[u]) * weights[u] ** 2 / (config.alpha + 1)
        for v in range(u + 1, liked.shape[0]):
            both = liked[u] * liked[v]
            if both.any():
                scores += np.outer(both, both) * weights[u] * weights[v] / (config.alpha + overlap[u, v])
    np.fill_diagonal(scores, 0)
    scores *= popularity**-config.target_exponent
    if config.normalize == "sum":
        scores /= np.maximum(scores.sum(axis=1, keepdims=True), 1e-30)
    scaled: AnyArray = scores**config.amplification / popularity[:, None] ** config.source_exponent
    return scaled
