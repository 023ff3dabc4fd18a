"""Candidates as columns: what a channel answers."""

from __future__ import annotations

from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numba import njit

from engine.core.errors import ContractError
from engine.core.hashing import spread
from engine.core.types import NO_ROW, Float32Array, Int32Array, Int64Array


class TriggerKind(IntEnum):
    """What a channel's trigger column holds rows of. Values are those of recall.v1.TriggerKind."""

    NONE = 0
    ITEM = 1
    USER = 2
    AUTHOR = 3
    CLUSTER = 4
    PATH = 5
    CELL = 6


class FilterStatus(IntEnum):
    """How a filter fared for one query. Values are those of recall.v1.FilterStatus."""

    OK = 1
    UNAVAILABLE = 2


class ChannelStatus(IntEnum):
    """How a channel fared for one query. Values are those of recall.v1.ChannelStatus."""

    OK = 1
    EMPTY = 2
    TIMEOUT = 3
    ERROR = 4
    SKIPPED = 5
    GATED = 6


class Candidates(NamedTuple):
    """One query's answer from one channel, best first.

    Attributes:
        rows: int32[m], catalogue rows, each at most once.
        scores: float32[m], finite, never increasing, in the channel's own unit.
        triggers: int32[m], rows of the channel's trigger kind, or -1 where nothing particular caused it.
    """

    rows: Int32Array
    scores: Float32Array
    triggers: Int32Array


class CandidateBatch(NamedTuple):
    """The answers to a batch of queries, end to end: query q owns [offsets[q], offsets[q + 1]) of every column."""

    rows: Int32Array
    scores: Float32Array
    triggers: Int32Array
    offsets: Int64Array

    @classmethod
    def empty(cls, size: int) -> CandidateBatch:
        """Return the answer "nothing" to `size` queries."""
        return cls(
            np.empty(0, np.int32),
            np.empty(0, np.float32),
            np.empty(0, np.int32),
            np.zeros(size + 1, np.int64),
        )

    @classmethod
    def of(cls, answers: list[Candidates]) -> CandidateBatch:
        """Put single answers end to end."""
        if not answers:
            return cls.empty(0)
        offsets = np.zeros(len(answers) + 1, np.int64)
        np.cumsum([answer.rows.size for answer in answers], out=offsets[1:])
        return cls(
            np.concatenate([answer.rows for answer in answers]).astype(np.int32, copy=False),
            np.concatenate([answer.scores for answer in answers]).astype(np.float32, copy=False),
            np.concatenate([answer.triggers for answer in answers]).astype(np.int32, copy=False),
            offsets,
        )

    def query(self, q: int) -> Candidates:
        """Return query q's share, without copying."""
        part = slice(int(self.offsets[q]), int(self.offsets[q + 1]))
        return Candidates(self.rows[part], self.scores[part], self.triggers[part])


class FanOut(NamedTuple):
    """The candidates of all channels for a batch, channel after channel, as filters and the merge see them.

    Segment s = channel * queries + query owns [offsets[s], offsets[s + 1]).

    Attributes:
        rows: int32[m], catalogue rows.
        offsets: int64[channels * queries + 1].
        queries: how many queries the batch has.
    """

    rows: Int32Array
    offsets: Int64Array
    queries: int

    def query_of_candidate(self) -> Int32Array:
        """int32[m]: which query each candidate belongs to."""
        segments = self.offsets.size - 1
        owner = np.tile(np.arange(self.queries, dtype=np.int32), segments // max(self.queries, 1))
        return np.repeat(owner, np.diff(self.offsets))

    def alone(self, q: int) -> tuple[FanOut, Int64Array]:
        """Return query q's candidates as the fan-out of a batch of one, and int64[...], where they stand in this."""
        begins, ends = self.offsets[:-1][q :: self.queries], self.offsets[1:][q :: self.queries]
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(ends - begins)))
        positions = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], ends - begins)
        return FanOut(self.rows[positions], offsets, 1), positions


def own_copy(answer: CandidateBatch, k: Int32Array, channel: str) -> CandidateBatch:
    """Return an answer in arrays that its channel knows nothing of, so that what is checked is what is used.

    Args:
        answer: whatever the channel returned.
        k: int32[n], how many it was asked for, per query.
        channel: its name, for the error.

    Raises:
        ContractError: it is no batch of arrays, or has more candidates than were asked for; such a one is not copied.
    """
    check_form(answer, k, channel)
    if answer.rows.size > int(k.sum()):
        raise ContractError(f"channel {channel!r}: {_RULES[1]}")
    return CandidateBatch(
        np.array(answer.rows, order="C"),
        np.array(answer.scores, order="C"),
        np.array(answer.triggers, order="C"),
        np.array(answer.offsets, order="C"),
    )


def check_distinct(answer: CandidateBatch, channel: str) -> None:
    """Hold an answer that keeps the rest of the contract to its last rule: within a query no row comes twice.

    The merge hears a channel that repeats a row once, so that nothing depends on this; it says who is at fault.

    Raises:
        ContractError: naming the channel.
    """
    if _repeats(answer.rows, answer.offsets):
        raise ContractError(f"channel {channel!r}: returned a row twice in one query")


@njit(nogil=True, cache=True)
def _repeats(rows, offsets):  # type: ignore[no-untyped-def]
    """Whether a row comes twice within a query."""
    longest = 0
    for q in range(offsets.size - 1):
        longest = max(longest, offsets[q + 1] - offsets[q])
    capacity = 2
    while capacity < 2 * longest:
        capacity *= 2
    mask = capacity - 1
    table = np.empty(capacity, np.int32)
    for q in range(offsets.size - 1):
        table[:] = -1
        for p in range(offsets[q], offsets[q + 1]):
            at = spread(rows[p]) & mask
            while table[at] != -1:
                if table[at] == rows[p]:
                    return True
                at = (at + 1) & mask
            table[at] = rows[p]
    return False


def repeats_reference(rows: Int32Array, offsets: Int64Array) -> bool:
    """The plain Python twin of `_repeats`."""
    lists = [rows[a:b].tolist() for a, b in pairwise(offsets.tolist())]
    return any(len(set(mine)) < len(mine) for mine in lists)


def check_contract(
    answer: CandidateBatch, k: Int32Array, items: int, channel: str, trigger_rows: int | None = None
) -> None:
    """Hold a channel's answer to the contract of `Candidates`, but for `check_distinct`.

    Args:
        answer: what the channel returned.
        k: int32[n], how many it was asked for, per query.
        items: rows in the catalogue.
        channel: its name, for the error.
        trigger_rows: rows in the index that its triggers are rows of; None where no index is.

    Raises:
        ContractError: naming the channel and the first rule it broke.
    """
    check_form(answer, k, channel)
    broken = broken_rule(*answer, k, np.array([largest_trigger(trigger_rows)]), items)
    if broken >= 0:
        raise ContractError(f"channel {channel!r}: {_RULES[broken]}")


def largest_trigger(rows: int | None) -> int:
    """Return the largest trigger that there may be where the index of its kind has so many rows; None: no index is."""
    return _LARGEST if rows is None else rows - 1


def check_form(answer: CandidateBatch, k: Int32Array, channel: str) -> None:
    """Refuse what is no batch of arrays of the right types and sizes; arguments and errors as of `check_contract`."""
    if not isinstance(answer, CandidateBatch):
        raise ContractError(
            f"channel {channel!r}: expected a CandidateBatch of arrays, got {type(answer).__name__}"
        )
    rows, scores, triggers, offsets = answer
    try:
        fits = rows.dtype == _INT32 and scores.dtype == _FLOAT32 and triggers.dtype == _INT32
        fits_offsets = offsets.dtype == _INT64 and offsets.shape == (k.size + 1,)
        flat = rows.ndim == scores.ndim == triggers.ndim == 1
    except AttributeError:  # asking costs nothing where they are arrays
        raise ContractError(
            f"channel {channel!r}: rows, scores, triggers and offsets must be arrays"
        ) from None
    if not fits:
        raise ContractError(f"channel {channel!r}: rows and triggers must be int32 arrays, scores float32")
    if not flat:
        raise ContractError(f"channel {channel!r}: rows, scores and triggers must be 1-d arrays")
    if not fits_offsets or offsets[0] != 0 or offsets[-1] != rows.size:
        raise ContractError(
            f"channel {channel!r}: offsets must be int64 and run from 0 to {rows.size} in {k.size + 1} steps"
        )
    if not (rows.size == scores.size == triggers.size):
        raise ContractError(f"channel {channel!r}: rows, scores and triggers must have one length")


_INT32, _INT64, _FLOAT32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)
_LARGEST = int(np.iinfo(np.int32).max)

_RULES = (
    "offsets must not decrease",
    "returned more candidates than it was asked for",
    "returned a row outside the catalogue",
    "returned a negative trigger other than -1",
    "returned a score that is not finite",
    "scores must not increase within a query",
    "returned a trigger outside the index of its kind",
)


@njit(nogil=True, cache=True)
def broken_rule(rows, scores, triggers, offsets, k, largest, items):  # type: ignore[no-untyped-def]
    """Return the number of the first rule that answers break, or -1.

    Args:
        rows, scores, triggers: of some channels, end to end, each as `check_form` wants it.
        offsets: int64[channels n + 1]; segment channel * n + query owns as in `FanOut`.
        k: int32[channels n], how many each was asked for, per query.
        largest: int64[channels], what `largest_trigger` says.
        items: rows in the catalogue.
    """
    for s in range(k.size):
        if offsets[s + 1] < offsets[s]:
            return 0
        if offsets[s + 1] - offsets[s] > k[s]:
            return 1
    queries = k.size // largest.size
    for s in range(k.size):
        most = largest[s // queries]
        for p in range(offsets[s], offsets[s + 1]):
            if rows[p] < 0 or rows[p] >= items:
                return 2
            if triggers[p] < NO_ROW:
                return 3
            if not np.isfinite(scores[p]):
                return 4
            if p > offsets[s] and scores[p] > scores[p - 1]:
                return 5
            if triggers[p] > most:
                return 6
    return -1
