"""Posting lists: the items of an author, a cell, a city, newest first; a snapshot's, and over them what changed since.

A row stands in one list at most. The snapshot is CSR. What `update` says of a row goes into the overlay
(`posting_overlay.py`); from then on the snapshot's own entry of that row no longer counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from pydantic import Field

from engine.core.candidates import CandidateBatch
from engine.core.channel import SnapshotSink
from engine.core.items import ItemColumns
from engine.core.options import Online, Options
from engine.core.posting_overlay import PostingOverlay
from engine.core.posting_reader import read_lists
from engine.core.types import (
    AnyArray,
    BoolArray,
    Float32Array,
    Int32Array,
    Int64Array,
    RaggedRows,
)
from engine.core.writable import writable

SECONDS_PER_DAY = 86_400
NO_KEY = -1
"""The key of a row that stands in no list."""


class GateOptions(Options):
    """Which items of a posting list may be recalled."""

    min_quality: Annotated[float, Field(ge=0, le=1), Online()] = 0.0
    """Items of lower quality, or of none that is known, are left out; 0 lets all pass."""

    max_age_days: Annotated[float, Field(ge=0), Online()] = 0.0
    """Older items, and those of no known time, are left out; 0 lets all pass."""


class PostOptions(GateOptions):
    """Options of a channel that weighs posting lists against each other."""

    half_life_days: Annotated[float, Field(gt=0), Online()] = 7.0
    """An item scores one less for every so many days of age: as much as half the weight of its list."""


class Wanted(NamedTuple):
    """The lists that a batch asks for; query q owns [offsets[q], offsets[q + 1]).

    Attributes:
        offsets: int64[n + 1].
        keys: int64[m]; a key asked twice by a query counts once, with its larger weight.
        weights: float32[m]; a list of weight 0 is passed over.
        triggers: int32[m], the trigger of what is recalled from the list.
    """

    offsets: Int64Array
    keys: Int64Array
    weights: Float32Array
    triggers: Int32Array

    @classmethod
    def alike(cls, lists: RaggedRows) -> Wanted:
        """Ask for lists whose keys are rows of an index, all of weight 1, each its own trigger."""
        return cls(
            lists.offsets, lists.rows.astype(np.int64), np.ones(lists.rows.size, np.float32), lists.rows
        )


class Reading(NamedTuple):
    """How lists are read.

    Attributes:
        half_life: seconds in which an item's score falls by one.
        min_quality, max_age: what is left out; as in `GateOptions`, but the age in seconds.
        lists: how many lists of a query are read, from the front; 0 for all.
        per_list: newest items taken of each list; 0 for as many as are asked for.
        lead, thin: after the first `lead` lists of a query the others are read only where those gave fewer than `thin`
            items; 0 for always.
    """

    half_life: float
    min_quality: float = 0.0
    max_age: float = 0.0
    lists: int = 0
    per_list: int = 0
    lead: int = 0
    thin: int = 0

    @classmethod
    def of(
        cls, options: PostOptions, lists: int = 0, per_list: int = 0, lead: int = 0, thin: int = 0
    ) -> Self:
        """Return the reading that a channel's options ask for."""
        return cls(
            options.half_life_days * SECONDS_PER_DAY,
            options.min_quality,
            options.max_age_days * SECONDS_PER_DAY,
            lists,
            per_list,
            lead,
            thin,
        )


def write_posting_lists(
    sink: SnapshotSink, keys: Int64Array, published: Int64Array | None, lists: int = 0
) -> None:
    """Write the posting lists of a catalogue.

    Args:
        sink: where they go: `posts.keys`, `posts.indptr`, `posts.rows`, `posts.times`.
        keys: int64[items], the list of each row; `NO_KEY` for none.
        published: int64[items], seconds since the epoch, -1 where unknown; None: unknown for all.
        lists: keys are below it and number the lists themselves; 0: keys are any numbers from 0.
    """
    times = np.full(keys.size, -1, np.int64) if published is None else published
    rows = np.flatnonzero(keys >= 0)
    rows = rows[np.lexsort((rows, -times[rows], keys[rows]))]
    ordered = keys[rows]
    if lists:
        starts = np.searchsorted(ordered, np.arange(lists + 1))
        distinct = np.empty(0, np.int64)
    else:
        first = np.flatnonzero(
            np.concatenate((np.ones(min(ordered.size, 1), np.bool_), np.diff(ordered) != 0))
        )
        starts = np.concatenate((first, [ordered.size]))
        distinct = ordered[first]
    sink.write("posts.keys", distinct.astype(np.int64))
    sink.write("posts.indptr", starts.astype(np.int64))
    sink.write("posts.rows", rows.astype(np.int32))
    sink.write("posts.times", times[rows].astype(np.int64))


class PostingLists:
    """Newest-first lists of a snapshot with an overlay. Changed and read on one thread."""

    def __init__(
        self, keys: Int64Array, indptr: Int64Array, rows: Int32Array, times: Int64Array, columns: ItemColumns
    ) -> None:
        """Take what `write_posting_lists` wrote.

        Args:
            keys: int64[lists], rising; empty where keys number the lists.
            indptr: int64[lists + 1].
            rows, times: int32[m], int64[m], newest first within a list; of one time the lower row first.
            columns: the live columns.
        """
        self._base = (keys, indptr, rows, times)
        self._columns = columns
        self._overlay = PostingOverlay(len(columns))
        self._arrays: tuple[AnyArray, ...] = (*self._base, *self._overlay.arrays)
        gone = np.flatnonzero(~columns.available).astype(np.int32)
        if gone.size:
            self.update(gone, np.full(gone.size, NO_KEY, np.int64))

    @classmethod
    def load(cls, arrays: Mapping[str, AnyArray], columns: ItemColumns) -> Self:
        """Map the lists of a snapshot."""
        keys, indptr, rows, times = (
            writable(arrays[f"posts.{name}"]) for name in ("keys", "indptr", "rows", "times")
        )
        return cls(keys, indptr, rows, times, columns)

    @property
    def bytes_in_memory(self) -> int:
        """What the overlay takes."""
        return self._overlay.bytes_in_memory

    def update(self, rows: Int32Array, keys: Int64Array) -> None:
        """Put rows where they stand now; time and availability are read from the live columns.

        Args:
            rows: int32[m].
            keys: int64[m], the list of each; `NO_KEY` for none.
        """
        keys = np.where(self._columns.available[rows], keys, NO_KEY)
        self._overlay.put(rows, keys, self._columns.published_at[rows], len(self._columns))
        # Put together once a change, not once a batch.
        self._arrays = (*self._base, *self._overlay.arrays)

    def read(self, wanted: Wanted, reading: Reading, now: Int64Array, k: Int32Array) -> CandidateBatch:
        """Return the best k items of each query's lists.

        Of each list the newest valid items are taken: published by now, within the gates; one that was taken down stands
        in no list, as `update` has heard of it. An item's score is log2(weight of its list) - age / half-life, which is
        the logarithm of weight x 2^(-age / half-life): that itself would be 0 in float32 for all that is older than 149
        half-lives. An unknown time is that of the epoch.

        Args:
            wanted: which lists.
            reading: how.
            now: int64[n], seconds since the epoch, which ages are measured from.
            k: int32[n].

        Returns:
            The best items of each query, ties by row; triggers are those of the lists.
        """
        room = sum(k.tolist())
        rows = np.empty(room, np.int32)
        scores = np.empty(room, np.float32)
        triggers = np.empty(room, np.int32)
        offsets = np.empty(k.size + 1, np.int64)
        arguments: tuple[Any, ...] = (
            *wanted, now, k, *reading, *self._arrays, self._columns.quality, rows, scores, triggers, offsets,
        )  # fmt: skip
        total = read_lists(*arguments)
        if total < room:
            rows, scores, triggers = rows[:total], scores[:total], triggers[:total]
        return CandidateBatch(rows, scores, triggers, offsets)


def read_reference(
    keys: Int64Array,
    published: Int64Array,
    available: BoolArray,
    quality: Float32Array,
    wanted: Wanted,
    reading: Reading,
    now: Int64Array,
    k: Int32Array,
) -> CandidateBatch:
    """The plain twin of `PostingLists.read`, without any structure: every item as it stands now is looked at.

    Args:
        keys, published, available, quality: [items], as they stand now.
        wanted, reading, now, k: as in `PostingLists.read`.
    """
    offsets = np.zeros(k.size + 1, np.int64)
    answers: list[tuple[float, int, int]] = []
    for q in range(k.size):
        begin, end = int(wanted.offsets[q]), int(wanted.offsets[q + 1])
        end = min(end, begin + reading.lists) if reading.lists else end
        found: list[tuple[float, int, int]] = []
        each = min(reading.per_list, int(k[q])) if reading.per_list else int(k[q])
        for p in range(begin, end if k[q] > 0 else begin):
            key, place = int(wanted.keys[p]), p - begin
            if reading.thin and place == reading.lead and len(found) >= reading.thin:
                break
            same = [other for other in range(begin, end) if wanted.keys[other] == key]
            if (
                key < 0
                or p != max(same, key=lambda other: (wanted.weights[other], -other))
                or wanted.weights[p] <= 0
            ):
                continue
            ages = now[q] - published
            valid = (keys == key) & available & (ages >= 0)
            if reading.max_age:
                valid &= ages <= reading.max_age
            if reading.min_quality:
                valid &= quality >= reading.min_quality
            members = np.flatnonzero(valid)
            newest = members[np.lexsort((members, ages[members]))].tolist()
            for row in newest[: max(each, reading.thin) if place < reading.lead else each]:
                log = math.log2(wanted.weights[p])
                score = float(np.float32(log - int(ages[row]) / reading.half_life))
                found.append((score, row, int(wanted.triggers[p])))
        best = sorted(found, key=lambda each: (-each[0], each[1]))[: int(k[q])]
        answers += best
        offsets[q + 1] = offsets[q] + len(best)
    return CandidateBatch(
        np.array([row for _, row, _ in answers], np.int32),
        np.array([score for score, _, _ in answers], np.float32),
        np.array([trigger for _, _, trigger in answers], np.int32),
        offsets,
    )
