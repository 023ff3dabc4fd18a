"""The merge: many channels' candidates -> one list per query, by quota, without duplicates, all provenance kept.

Depends on nothing of the project. Three modes decide which items are taken and in which order:

- `quota`: channel after channel in config order takes its quota; an item that an earlier channel took costs the later
  one nothing. Where the quotas sum to more than the limit they shrink in proportion (largest remainder). What was taken
  is ordered by merge score.
- `snake`: channels take turns, one item a turn, first to last, then last to first, and so on, each up to its quota.
  The order is that of the draft.
- `rank_fusion`: whatever stands within its channel's quota competes by merge score.

In every mode a list that is still short is backfilled with what the channels had beyond their quotas, in config order.
The merge score of an item is weighted reciprocal-rank fusion over every channel that proposed it,
sum of weight / (rank_constant + rank), rank from 1 (Cormack, Clarke, Buettcher: Reciprocal Rank Fusion, SIGIR 2009,
where the constant is 60 and the weights are 1). Ties go to the lower catalogue row.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from engine.core.hashing import spread
from engine.core.select import row_of, sort_digits, sort_key


class MergeMode(IntEnum):
    """How items are taken; see the module's text."""

    QUOTA = 0
    SNAKE = 1
    RANK_FUSION = 2


class Merged(NamedTuple):
    """The merged lists of a batch; query q owns items [offsets[q], offsets[q + 1]).

    Attributes:
        offsets: int64[n + 1].
        rows: int32[m], catalogue rows in the order of the list, each at most once per query. What was backfilled stands
            behind what was taken, so scores may rise there.
        scores: float32[m], merge scores.
        proposal_offsets: int64[m + 1]; item i's proposals are [proposal_offsets[i], proposal_offsets[i + 1]).
        proposal_channels: int32[p], channel numbers, rising within an item.
        proposal_ranks: int32[p], from 1, among what no filter removed.
        proposal_sources: int64[p], where the candidate stands in the input columns.
        eligible: int32[channels, n], distinct candidates that no filter removed.
        kept: int32[channels, n], how many items of the list the channel proposed.
    """

    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    proposal_offsets: npt.NDArray[np.int64]
    proposal_channels: npt.NDArray[np.int32]
    proposal_ranks: npt.NDArray[np.int32]
    proposal_sources: npt.NDArray[np.int64]
    eligible: npt.NDArray[np.int32]
    kept: npt.NDArray[np.int32]


def merge(
    rows: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    keep: npt.NDArray[np.bool_],
    quotas: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float64],
    limits: npt.NDArray[np.int32],
    mode: MergeMode,
    rank_constant: float,
) -> Merged:
    """Merge a fan-out.

    Args:
        rows: int32[m], candidates of all channels, each channel's best first.
        offsets: int64[channels * n + 1]; segment channel * n + query owns [offsets[s], offsets[s + 1]).
        keep: bool[m], False where a filter removed the candidate; such a one uses up no quota.
        quotas: int32[channels, n]; a channel of quota 0 only backfills.
        weights: float64[channels], of the merge score.
        limits: int32[n], length of each merged list at most.
        mode: which items are taken.
        rank_constant: of the merge score; positive.
    """
    channels, queries = quotas.shape
    m = rows.size
    out_offsets = np.zeros(queries + 1, np.int64)
    out_rows = np.empty(m, np.int32)
    out_scores = np.empty(m, np.float32)
    proposal_offsets = np.zeros(m + 1, np.int64)
    proposal_channels = np.empty(m, np.int32)
    proposal_ranks = np.empty(m, np.int32)
    proposal_sources = np.empty(m, np.int64)
    eligible = np.zeros((channels, queries), np.int32)
    kept = np.zeros((channels, queries), np.int32)
    items, proposals = _merge(
        rows, offsets, keep, quotas, weights, limits, int(mode), float(rank_constant), out_offsets, out_rows,
        out_scores, proposal_offsets, proposal_channels, proposal_ranks, proposal_sources, eligible, kept,
    )  # fmt: skip
    return Merged(
        out_offsets, out_rows[:items], out_scores[:items], proposal_offsets[: items + 1],
        proposal_channels[:proposals], proposal_ranks[:proposals], proposal_sources[:proposals], eligible, kept,
    )  # fmt: skip


@njit(nogil=True, cache=True)
def _merge(  # type: ignore[no-untyped-def]
    rows, offsets, keep, quotas, weights, limits, mode, rank_constant, out_offsets, out_rows, out_scores,
    proposal_offsets, proposal_channels, proposal_ranks, proposal_sources, eligible, kept,
):  # fmt: skip
    channels, queries = quotas.shape
    largest = 1
    for q in range(queries):
        size = 0
        for c in range(channels):
            size += offsets[c * queries + q + 1] - offsets[c * queries + q]
        largest = max(largest, size)
    capacity = 2
    while capacity < 2 * largest:
        capacity *= 2
    mask = capacity - 1
    table = np.full(capacity, -1, np.int32)
    slot_row = np.empty(largest, np.int32)
    slot_score = np.empty(largest, np.float64)
    slot_last = np.empty(largest, np.int32)
    slot_count = np.empty(largest, np.int32)
    slot_taken = np.empty(largest, np.bool_)
    slot_cursor = np.empty(largest, np.int64)
    # The query's kept, distinct candidates, channel after channel: their slot and their place in the input.
    own_slot = np.empty(largest, np.int32)
    own_source = np.empty(largest, np.int64)
    begin = np.zeros(channels + 1, np.int64)
    chosen = np.empty(largest, np.int32)
    share = np.empty(channels, np.int64)
    taken = np.empty(channels, np.int64)
    cursor = np.empty(channels, np.int64)
    items = 0
    proposals = 0
    for q in range(queries):
        slots = 0
        size = 0
        for c in range(channels):
            rank = 0
            for p in range(offsets[c * queries + q], offsets[c * queries + q + 1]):
                if not keep[p]:
                    continue
                at = spread(rows[p]) & mask
                while table[at] != -1 and slot_row[table[at]] != rows[p]:
                    at = (at + 1) & mask
                slot = table[at]
                if slot == -1:
                    slot = slots
                    slots += 1
                    table[at] = slot
                    slot_row[slot] = rows[p]
                    slot_score[slot] = 0.0
                    slot_last[slot] = -1
                    slot_count[slot] = 0
                    slot_taken[slot] = False
                if slot_last[slot] == c:
                    continue  # a channel that repeats an item is heard once
                slot_last[slot] = c
                rank += 1
                slot_score[slot] += weights[c] / (rank_constant + rank)
                slot_count[slot] += 1
                own_slot[size] = slot
                own_source[size] = p
                size += 1
            eligible[c, q] = rank
            begin[c + 1] = size

        limit = limits[q]
        count = np.int64(0)  # a literal would have `_order` compiled twice
        if mode == 1:
            for c in range(channels):
                taken[c] = 0
                cursor[c] = begin[c]
            turn = 0
            idle = 0
            while count < limit and idle < 2 * channels:
                place = turn % (2 * channels)
                c = place if place < channels else 2 * channels - 1 - place
                turn += 1
                idle += 1
                while cursor[c] < begin[c + 1] and slot_taken[own_slot[cursor[c]]]:
                    cursor[c] += 1
                if taken[c] < quotas[c, q] and cursor[c] < begin[c + 1]:
                    slot = own_slot[cursor[c]]
                    slot_taken[slot] = True
                    chosen[count] = slot
                    count += 1
                    taken[c] += 1
                    idle = 0
        elif mode == 2:
            for c in range(channels):
                for at in range(begin[c], min(begin[c + 1], begin[c] + quotas[c, q])):
                    slot = own_slot[at]
                    if not slot_taken[slot]:
                        slot_taken[slot] = True
                        chosen[count] = slot
                        count += 1
            _order(chosen, count, slot_score, slot_row, table)
            for at in range(limit, count):
                slot_taken[chosen[at]] = False
            count = min(count, limit)
        else:
            _shares(quotas[:, q], limit, share)
            for c in range(channels):
                left = share[c]
                for at in range(begin[c], begin[c + 1]):
                    if left == 0 or count == limit:
                        break
                    slot = own_slot[at]
                    if not slot_taken[slot]:
                        slot_taken[slot] = True
                        chosen[count] = slot
                        count += 1
                        left -= 1
            _order(chosen, count, slot_score, slot_row, table)
        for at in range(size):
            if count == limit:
                break
            slot = own_slot[at]
            if not slot_taken[slot]:
                slot_taken[slot] = True
                chosen[count] = slot
                count += 1

        for i in range(count):
            slot = chosen[i]
            out_rows[items] = slot_row[slot]
            out_scores[items] = slot_score[slot]
            slot_cursor[slot] = proposals
            proposals += slot_count[slot]
            items += 1
            proposal_offsets[items] = proposals
        for c in range(channels):
            for at in range(begin[c], begin[c + 1]):
                slot = own_slot[at]
                if slot_taken[slot]:
                    to = slot_cursor[slot]
                    slot_cursor[slot] = to + 1
                    proposal_channels[to] = c
                    proposal_ranks[to] = at - begin[c] + 1
                    proposal_sources[to] = own_source[at]
                    kept[c, q] += 1
        out_offsets[q + 1] = items
        table[:] = -1
    return items, proposals


@njit(nogil=True, cache=True)
def _order(chosen, count, scores, rows, table):  # type: ignore[no-untyped-def]
    """Sort chosen[:count] by score descending, then row; the hash table says which slot a row has."""
    values = np.empty(count, np.float32)
    for i in range(count):
        values[i] = scores[chosen[i]]
    bits = values.view(np.uint32)
    lines = np.empty((2, count), np.uint64)
    for i in range(count):
        lines[0, i] = sort_key(bits[i], rows[chosen[i]])
    keys = lines[sort_digits(lines, count, 0)]
    mask = table.size - 1
    for i in range(count):
        row = row_of(keys[count - 1 - i])
        at = spread(row) & mask
        while rows[table[at]] != row:
            at = (at + 1) & mask
        chosen[i] = table[at]


@njit(nogil=True, cache=True)
def _shares(quotas, limit, share):  # type: ignore[no-untyped-def]
    """Shrink quotas to a limit they exceed, in proportion, by largest remainder; equals in config order."""
    total = 0
    for c in range(quotas.size):
        share[c] = quotas[c]
        total += quotas[c]
    if total <= limit:
        return
    given = 0
    for c in range(quotas.size):
        share[c] = np.int64(quotas[c]) * limit // total
        given += share[c]
    remainder = np.empty(quotas.size, np.int64)
    for c in range(quotas.size):
        remainder[c] = np.int64(quotas[c]) * limit % total
    while given < limit:
        best = 0
        for c in range(1, quotas.size):
            if remainder[c] > remainder[best]:
                best = c
        remainder[best] = -1
        share[best] += 1
        given += 1


def merge_reference(
    rows: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    keep: npt.NDArray[np.bool_],
    quotas: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float64],
    limits: npt.NDArray[np.int32],
    mode: MergeMode,
    rank_constant: float,
) -> list[list[tuple[int, float, list[tuple[int, int, int]]]]]:
    """The plain Python twin of `merge`, one query at a time.

    Returns:
        Per query the items as (row, score, [(channel, rank, source), ...]).
    """
    channels, queries = quotas.shape
    return [
        _merge_one(
            [range(int(offsets[c * queries + q]), int(offsets[c * queries + q + 1])) for c in range(channels)],
            rows, keep, [int(x) for x in quotas[:, q]], weights, int(limits[q]), mode, rank_constant,
        )
        for q in range(queries)
    ]  # fmt: skip


def _merge_one(
    segments: list[range],
    rows: npt.NDArray[np.int32],
    keep: npt.NDArray[np.bool_],
    quotas: list[int],
    weights: npt.NDArray[np.float64],
    limit: int,
    mode: MergeMode,
    rank_constant: float,
) -> list[tuple[int, float, list[tuple[int, int, int]]]]:
    lists: list[list[int]] = []
    proposals: dict[int, list[tuple[int, int, int]]] = {}
    scores: dict[int, float] = {}
    for c, segment in enumerate(segments):
        mine: list[int] = []
        for p in segment:
            row = int(rows[p])
            if keep[p] and row not in mine:
                mine.append(row)
                proposals.setdefault(row, []).append((c, len(mine), p))
                scores[row] = scores.get(row, 0.0) + float(weights[c]) / (rank_constant + len(mine))
        lists.append(mine)

    def by_score(row: int) -> Any:
        return (-np.float32(scores[row]), row)

    picked: list[int] = []
    if mode is MergeMode.QUOTA:
        total = sum(quotas)
        if total > limit:
            shrunk = [quota * limit // total for quota in quotas]
            order = sorted(range(len(quotas)), key=lambda c: (-(quotas[c] * limit % total), c))
            for c in order[: limit - sum(shrunk)]:
                shrunk[c] += 1
            quotas = shrunk
        for mine, quota in zip(lists, quotas, strict=True):
            fresh = [row for row in mine if row not in picked][:quota]
            picked += fresh[: limit - len(picked)]
        picked.sort(key=by_score)
    elif mode is MergeMode.SNAKE:
        counts = [0] * len(lists)
        forward = list(range(len(lists)))
        progress = True
        while progress and len(picked) < limit:
            progress = False
            for c in forward + forward[::-1]:
                fresh = [row for row in lists[c] if row not in picked][:1]
                if fresh and counts[c] < quotas[c] and len(picked) < limit:
                    picked += fresh
                    counts[c] += 1
                    progress = True
    else:
        pool = {row for mine, quota in zip(lists, quotas, strict=True) for row in mine[:quota]}
        picked = sorted(pool, key=by_score)[:limit]
    for mine in lists:
        picked += [row for row in mine if row not in picked][: limit - len(picked)]
    return [(row, scores[row], proposals[row]) for row in picked]
