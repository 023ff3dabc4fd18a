"""The channel contract: an offline half that builds a snapshot, an online half that answers from it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeAlias

import numpy as np

from engine.core.candidates import CandidateBatch, Candidates, TriggerKind
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.options import Options
from engine.core.query import Query, QueryBatch
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array, UInt8Array


class ArrayAppender(Protocol):
    """Writes one array of a snapshot piece by piece."""

    def append(self, part: AnyArray) -> None:
        """Write `part` behind what is there."""


class SnapshotSink(Protocol):
    """Where a build puts its arrays."""

    def write(self, name: str, array: AnyArray) -> None:
        """Write one whole array."""

    def appender(self, name: str, dtype: Any) -> AbstractContextManager[ArrayAppender]:
        """Open a 1-d array of unknown length for writing piece by piece; it is complete when the context ends."""


class Progress(Protocol):
    """How a build tells how far it is."""

    def start(self, task: str, total: int) -> None:
        """Begin a task of `total` units of work; ends the one before."""

    def advance(self, amount: int = 1) -> None:
        """Say that `amount` more units are done."""


class SilentProgress:
    """Tells nobody."""

    def start(self, task: str, total: int) -> None:
        """Do nothing."""

    def advance(self, amount: int = 1) -> None:
        """Do nothing."""


BuildMode: TypeAlias = Literal["full", "resume", "incremental"]
"""How a channel that learns is built: from nothing; on from the last snapshot; or only what is new taken in."""


@dataclass(frozen=True, slots=True)
class Events:
    """Events of the log, in the order of the file, an entry each.

    Attributes:
        users, items: int32[events], rows.
        kinds: uint8[events], positions in `kind_names`.
        kind_names: the kinds that the channel asked for and the log has.
        timestamps: int64[events], seconds since the epoch; zeros where the data has none.
    """

    users: Int32Array
    items: Int32Array
    kinds: UInt8Array
    kind_names: tuple[str, ...]
    timestamps: Int64Array


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What a build is made from.

    Attributes:
        interactions: the interest matrix.
        item_columns: columns of the catalogue by name (numeric ones as arrays of [items]), as `Catalogue.item_columns`
            says.
        now: seconds since the epoch that ages are measured from: the time of the last like, never the clock, so that
            a build can be repeated.
        sink: where the arrays go.
        progress: whom to tell.
        threads: how many cores may be used.
        follows: which user follows which author: users x author rows, newest first, weights 1; None where the data
            set has no follows.
        authors: rows in the index of authors.
        user_columns: what is known about users, as `Catalogue.user_columns` says.
        events: events of the kinds that `Channel.event_kinds` asks for, up to `now`; None where it asks for none, and in
            `recall tune`.
        mode: how to build; anything but "full" matters only to what learns.
        previous: the arrays of the last snapshot of the same channel, which `mode` may start from; None in full mode, or
            where there is none.
        learnt: the arrays that `Channel.learnt` names, learnt earlier from the same data with the same options: taken
            instead of training. None: there are none, or the training is wanted.
        work: a folder of this very build (same data, options and code) that need not exist yet: where one that is
            interrupted may leave what the next one goes on from, and a finished one what people may look at. It goes
            when it was not touched for a month. None: there is none.
    """

    interactions: Interactions
    item_columns: Mapping[str, AnyArray]
    now: int
    sink: SnapshotSink
    progress: Progress
    threads: int
    follows: Interactions | None = None
    authors: int = 0
    user_columns: Mapping[str, AnyArray] = field(default_factory=dict)
    events: Events | None = None
    mode: BuildMode = "full"
    previous: Mapping[str, AnyArray] | None = None
    learnt: Mapping[str, AnyArray] | None = None
    work: Path | None = None


@dataclass(frozen=True, slots=True)
class LoadContext:
    """What a channel or a filter is loaded from.

    Attributes:
        arrays: its snapshot's arrays, memory-mapped, read-only; empty for a filter.
        items: rows of the snapshot's catalogue; items published since have rows from here on.
        users: rows in the index of users.
        columns: the live columns of the items: keep the object, read its arrays anew for each batch.
    """

    arrays: Mapping[str, AnyArray]
    items: int
    users: int
    columns: ItemColumns


class Channel:
    """A source of candidates.

    A plugin subclasses this, sets `Config`, and implements `load` with one of `recall` (one query; the framework
    loops), `recall_batch`, or `recall_batch_async` (where it waits for the network). One that is built from data
    implements `build` too. Timing, deadlines, error policy, contract checks and reports are the framework's.
    """

    Config: ClassVar[type[Options]] = Options
    """The options of this channel; unknown keys are refused."""

    trigger_kind: ClassVar[TriggerKind] = TriggerKind.NONE
    """What the trigger column holds rows of."""

    needs_build: ClassVar[bool] = True
    """Whether `build` must have run; one that needs no snapshot sets this to False."""

    inline: ClassVar[bool] = False
    """Whether it runs on the thread that computes the batches, one channel after the other. Setting it promises compute
    on arrays in memory that ends soon whatever it is asked, writes into nothing that it is given, and returns arrays
    that nothing else writes into: nothing stops such a channel, and nothing is copied for it. Any other channel runs
    beside, on a thread of its own, and is left behind when it is late."""

    counts_recalls: ClassVar[bool] = False
    """Whether the state store is told which of its candidates each answer held, so that it can stop proposing them."""

    learnt: ClassVar[tuple[str, ...]] = ()
    """How the names of those arrays of its snapshot begin that a training gives: all that `BuildContext.learnt` must hold
    for a build without one. Empty: none can be built so."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def event_kinds(cls, config: Any) -> tuple[str, ...]:
        """Return the kinds of event that `build` reads from `BuildContext.events`; most read the interest matrix only."""
        del config
        return ()

    @classmethod
    def build(cls, config: Any, context: BuildContext) -> None:
        """Make the snapshot: write arrays to `context.sink`.

        Raises:
            BuildError: if the data lacks what this channel needs.
        """
        raise NotImplementedError(f"{cls.__name__} sets needs_build but has no build()")

    @classmethod
    def load(cls, config: Any, context: LoadContext) -> Self:
        """Return a channel that answers from the snapshot."""
        del context
        return cls(config)

    def update(self, rows: Int32Array) -> None:
        """Take note that items were published, changed or taken down; `LoadContext.columns` already says how.

        Called between two batches, on the thread that answers this channel's: for an inline channel the thread that
        computes the batches, else its own, so that it never runs at the same time as a recall of the same channel.

        Args:
            rows: int32[m], each once; rows past those of before are new items.
        """

    def assign(self, rows: Int32Array, clusters: Int32Array, biases: Float32Array) -> None:
        """Take the newest clusters of some items, from a trainer that goes on learning.

        Overriding it makes the server follow the assignment log of the channel whose snapshot this one loads
        (docs/streaming-vq.md), from the position that the array `log_position` of the snapshot names. Called as `update`
        is, and after it for items that both are about.

        Args:
            rows: int32[m], each once, of items that the catalogue has.
            clusters: int32[m], in the codebook that the snapshot's training began with.
            biases: float32[m].
        """
        raise NotImplementedError(f"{type(self).__name__} has no assign()")

    def trigger_names(self, triggers: Int64Array) -> UInt8Array:
        """Return what triggers are called in answers: uint8[m, width], UTF-8 ended by zeros.

        Only for a kind of trigger that has no index (not items, users or authors); without it, or where it fails, their
        numbers stand there. Called on the thread that computes the batches, so it must not wait.

        Args:
            triggers: int64[m], from the trigger column of this channel's answers; none is -1.
        """
        raise NotImplementedError(f"{type(self).__name__} has no trigger_names()")

    def enable(self, query: Query) -> bool:
        """Gate: whether to run for this query. Overriding it costs a Python call per query."""
        del query
        return True

    def recall(self, query: Query, k: int) -> Candidates:
        """Answer one query with at most k candidates, best first. See `Candidates` for the rules."""
        raise NotImplementedError(f"{type(self).__name__} implements neither recall() nor recall_batch()")

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Answer every query of a batch.

        Args:
            batch: the queries.
            k: int32[n], how many candidates at most, per query; 0 asks for none.

        Returns:
            Per query the best candidates, scores never increasing, ties by catalogue row.
        """
        nothing = Candidates(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32))
        return CandidateBatch.of(
            [self.recall(batch.query(q), int(k[q])) if k[q] > 0 else nothing for q in range(len(batch))]
        )

    async def recall_batch_async(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Answer as `recall_batch` does, waiting without holding a thread; overriding it makes the channel a coroutine.

        It is cancelled when the channel's deadline passes: let `asyncio.CancelledError` through.
        """
        raise NotImplementedError(f"{type(self).__name__} has no recall_batch_async()")


def gates(channel: Channel) -> bool:
    """Whether the channel overrides `enable`, so that the framework must ask it for each query."""
    return type(channel).enable is not Channel.enable


def names_triggers(channel: Channel) -> bool:
    """Whether the channel overrides `trigger_names`, so that answers hold what it calls them."""
    return type(channel).trigger_names is not Channel.trigger_names


def takes_assignments(channel: Channel) -> bool:
    """Whether the channel overrides `assign`, so that somebody must follow its assignment log."""
    return type(channel).assign is not Channel.assign


def ask(channel: Channel, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
    """Ask a channel on this thread and wait for the answer, however it is written; as `Channel.recall_batch`."""
    if waits(channel):
        return asyncio.run(channel.recall_batch_async(batch, k))
    return channel.recall_batch(batch, k)


def waits(channel: Channel) -> bool:
    """Whether the channel overrides `recall_batch_async`, so that it is asked as a coroutine."""
    return type(channel).recall_batch_async is not Channel.recall_batch_async
