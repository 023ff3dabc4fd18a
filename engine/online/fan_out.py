"""Asking the channels of a scene: gates, deadlines, circuit breakers, the contract, and what becomes of failures."""

from __future__ import annotations

import logging
import math
import time
from asyncio import CancelledError
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from numba import njit

from engine.core.candidates import (
    CandidateBatch,
    Candidates,
    ChannelStatus,
    TriggerKind,
    broken_rule,
    check_contract,
    largest_trigger,
)
from engine.core.channel import Channel, ask, gates
from engine.core.query import QueryBatch
from engine.core.types import Int32Array, Int64Array
from engine.online.beside import Call, Guard, Rules, said
from engine.online.breaker import Breaker, BreakerState
from engine.online.hydrate import Hydrator
from engine.online.run import Columns, Run

log = logging.getLogger(__name__)

_OK, _EMPTY = int(ChannelStatus.OK), int(ChannelStatus.EMPTY)

_SECONDS_BETWEEN_WARNINGS = 60.0
"""Of one channel that fails: every batch would say so."""

_DEGRADED = "degraded"

_BATCHES, _ARRAYS = {CandidateBatch}, {np.ndarray}

_FAILURES = (Exception, SystemExit, CancelledError)
"""Whatever a channel raises is that channel's failure alone; but Ctrl-C, where this is the main thread, ends us."""


class SceneChannels:
    """The channels of a scene, in merge order, then its fallback channels.

    Attributes:
        names: of the channels.
        channels: in the same order.
        breakers: the circuit breaker of each channel; none without guards.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        channels: Mapping[str, Channel],
        hydrator: Hydrator,
        reserve_ms: float,
        guards: Mapping[str, Guard] | None,
    ) -> None:
        """Take the channels of these names; the other arguments are those of `Pipeline`."""
        self.names = names
        self.channels = [channels[name] for name in names]
        self._hydrator = hydrator
        self._reserve = reserve_ms / 1000
        self._gated = [gates(channel) for channel in self.channels]
        self._failure_logged = [-math.inf] * len(self.channels)
        mine = {} if guards is None else {name: guards[name] for name in names}
        self.breakers: Mapping[str, Breaker] = {name: guard.breaker for name, guard in mine.items()}
        self._breakers = [self.breakers.get(name) for name in names]
        self._beside = [mine[name].beside if mine else None for name in names]
        self._largest: tuple[tuple[int | None, ...], Int64Array] = ((), np.empty(0, np.int64))

    def ask(
        self, run: Run, channels: Sequence[int], depth: Int32Array, without: frozenset[int]
    ) -> tuple[list[CandidateBatch], Columns]:
        """Ask channels, each query for as many as `depth` says; statuses, messages and times are noted in the run.

        Those that run beside the compute start first and are waited for last: they have as long as the others take for
        nothing.

        Args:
            run: the batch.
            channels: which, by their place in `names`.
            depth: int32[channels, n], changed: 0 where a channel was not asked after all.
            without: those that are not asked under the load that there is.

        Returns:
            what each answered, in this order, and the same as columns.
        """
        depths = dict(zip(channels, depth, strict=True))
        for c in without & depths.keys():
            self._shut(run, c, depths[c], ChannelStatus.GATED, _DEGRADED)
        beside = [c for c in channels if self._beside[c] is not None]
        batch = run.batch.detached() if beside else run.batch
        calls = [(c, self._start(run, c, depths[c], batch)) for c in beside]
        answers = {c: self._ask(run, c, k) for c, k in depths.items() if self._beside[c] is None}
        for c, call in calls:
            answers[c] = self._collect(run, c, depths[c], call)
        ordered = [answers[c] for c in channels]
        # Of all channels at once: each call costs a microsecond or more.
        asked = np.array([*channels])
        columns = self._columns(run, ordered, asked, depth)
        if columns is None:
            kept = [self._kept(run, c, depths[c], answers[c]) for c in channels]
            ordered = [CandidateBatch(*map(np.asarray, answer)) for answer in kept]
            columns = self._columns(run, ordered, asked, depth)
            assert columns is not None
        return ordered, columns

    def _columns(
        self, run: Run, answers: list[CandidateBatch], asked: Int64Array, depth: Int32Array
    ) -> Columns | None:
        """Put answers end to end and note their lengths; None where they must be looked at one by one.

        That is where one breaks the contract: all that `check_contract` holds one to is looked at here, of all together.
        """
        queries = depth.shape[1]
        try:
            if set(map(type, answers)) != _BATCHES or set(map(type, chain.from_iterable(answers))) != _ARRAYS:
                return None
            rows, scores, triggers, ends = zip(*answers, strict=True)
            lengths = list(map(len, rows))
            if not lengths == list(map(len, scores)) == list(map(len, triggers)):
                return None
            if set(map(len, ends)) != {queries + 1}:
                return None
            columns = Columns.end_to_end(rows, scores, triggers, queries)
            offsets = np.concatenate(ends, dtype=np.int64, casting="no")
        except (TypeError, ValueError):  # not of these types, or not of one dimension
            return None
        if not columns.fan_out.rows.ndim == columns.scores.ndim == columns.triggers.ndim == offsets.ndim == 1:
            return None
        kept = _take(
            offsets, np.array(lengths), asked, depth, self._largest_triggers(), self._hydrator.items,
            columns.fan_out.rows, columns.scores, columns.triggers, columns.fan_out.offsets, columns.keep,
            columns.removed_by, run.returned, run.status,
        )  # fmt: skip
        return columns if kept else None

    def _kept(self, run: Run, c: int, k: Int32Array, answer: CandidateBatch) -> CandidateBatch:
        """Return an answer that keeps the contract: this one, or that of a channel that failed."""
        if self._beside[c] is not None:  # its own thread checked it
            return answer
        started = time.perf_counter()
        failed_before = len(run.messages)
        try:
            self._check(answer, c, k)
        except _FAILURES as error:
            answer = self._one_by_one(run, c, k, error)
            self._note(run, c, k, len(run.messages) - failed_before)
            run.channel_us[c] += (time.perf_counter() - started) * 1e6
        return answer

    def _ask(self, run: Run, c: int, k: Int32Array) -> CandidateBatch:
        """Run one channel: gate, deadline, timing and error policy are here, once for all inline channels.

        `ask` holds what they all answered to the contract; of a channel whose breaker must hear how it went, it is done
        here.
        """
        started = time.perf_counter()
        failed_before = len(run.messages)
        if run.first_deadline < math.inf:
            self._shut_late(run, c, k)
        breaker = self._breakers[c]
        watched = breaker is not None and not breaker.quiet
        if watched and not self._passes(run, c, k):
            return CandidateBatch.empty(k.size)
        if self._gated[c]:
            self._shut_gated(run, c, k)
        if not any(k.tolist()):
            answer = CandidateBatch.empty(k.size)
        else:
            try:
                answer = ask(self.channels[c], run.batch, k)
                if watched:
                    self._check(answer, c, k)
            except _FAILURES as error:
                answer = self._one_by_one(run, c, k, error)
        if breaker is not None and (watched or len(run.messages) > failed_before):
            self._note(run, c, k, len(run.messages) - failed_before)
        run.channel_us[c] = (time.perf_counter() - started) * 1e6
        return answer

    def _start(self, run: Run, c: int, k: Int32Array, batch: QueryBatch) -> Call | None:
        """Put the batch to a channel that runs beside the compute; None where it is not asked."""
        beside = self._beside[c]
        assert beside is not None
        self._shut_late(run, c, k)
        if not k.any() or not self._passes(run, c, k):
            return None
        busy = beside.busy_seconds()
        if busy:
            self._shut(
                run, c, k, ChannelStatus.TIMEOUT, f"still at an earlier batch, since {busy * 1e3:.0f} ms"
            )
            self._note_late(run, c, counts=busy >= beside.deadline)
            return None
        now = time.monotonic()
        asked = zip(run.requests, k.tolist(), strict=True)
        first = min(request.deadline for request, wanted in asked if wanted) - self._reserve
        call = Call(
            batch,
            k.copy(),
            Rules(self._hydrator.items, self._trigger_rows(self.channels[c].trigger_kind)),
            until=min(first, now + beside.deadline),
            by_request=first < now + beside.deadline / 2,
        )
        beside.start(call)
        return call

    def _collect(self, run: Run, c: int, k: Int32Array, call: Call | None) -> CandidateBatch:
        """Wait for what was started, until its time is up."""
        beside = self._beside[c]
        assert beside is not None
        if call is None:
            return CandidateBatch.empty(k.size)
        answer = call.answer()
        if answer is None:
            beside.give_up(call)
            waited = time.monotonic() - call.began
            run.channel_us[c] = waited * 1e6
            self._shut(run, c, k, ChannelStatus.TIMEOUT, f"no answer within {waited * 1e3:.0f} ms")
            self._note_late(run, c, counts=not call.by_request)
            return CandidateBatch.empty(k.size)
        run.channel_us[c] = call.seconds * 1e6
        for q in answer.gated:
            k[q] = 0
            run.status[c, q] = ChannelStatus.GATED
        for q, error in answer.errors.items():
            if k[q]:
                k[q] = 0
                self._failed(run, c, q, error)
        self._note(run, c, k, len(answer.errors))
        return answer.batch

    def _passes(self, run: Run, c: int, k: Int32Array) -> bool:
        """Whether the channel's circuit breaker lets the batch through; where it does not, nothing is asked."""
        breaker = self._breakers[c]
        if breaker is None or not k.any() or breaker.allows():
            return True
        self._shut(run, c, k, ChannelStatus.SKIPPED, f"circuit open: {breaker.last_error}")
        return False

    def _note(self, run: Run, c: int, k: Int32Array, failed: int) -> None:
        """Tell the breaker how many queries failed; those that are left in `k` went well."""
        breaker = self._breakers[c]
        if breaker is None:
            return
        asked = failed + int(np.count_nonzero(k))
        if not asked:
            breaker.forgo()
            return
        error = (
            next((run.messages[c, q] for q in range(k.size) if (c, q) in run.messages), "") if failed else ""
        )
        self._record(c, failed / asked, error)

    def _note_late(self, run: Run, c: int, counts: bool) -> None:
        breaker = self._breakers[c]
        if breaker is None:
            return
        if counts:
            self._record(c, 1.0, next(text for (channel, _), text in run.messages.items() if channel == c))
        else:
            breaker.forgo()

    def _record(self, c: int, share: float, error: str) -> None:
        breaker = self._breakers[c]
        assert breaker is not None
        before = breaker.state
        breaker.record(share, error)
        if breaker.state is BreakerState.OPEN and before is BreakerState.CLOSED:
            log.warning("channel %s: left out for a while, its circuit is open: %s", self.names[c], error)
        elif breaker.state is BreakerState.CLOSED and before is not BreakerState.CLOSED:
            log.warning("channel %s: answers again, its circuit is closed", self.names[c])

    def _shut(self, run: Run, c: int, k: Int32Array, status: ChannelStatus, text: str) -> None:
        """Ask nothing more, and say why."""
        for q in np.flatnonzero(k).tolist():
            k[q] = 0
            run.status[c, q] = status
            run.messages[c, q] = text

    def _check(self, answer: CandidateBatch, c: int, k: Int32Array) -> None:
        triggers = self._trigger_rows(self.channels[c].trigger_kind)
        check_contract(answer, k, self._hydrator.items, self.names[c], triggers)

    def _largest_triggers(self) -> Int64Array:
        """int64[channels], what `largest_trigger` says of each; indexes grow between two batches."""
        hydrator = self._hydrator
        sizes = hydrator.items, hydrator.users, hydrator.authors
        if self._largest[0] != sizes:
            rows = [self._trigger_rows(channel.trigger_kind) for channel in self.channels]
            self._largest = sizes, np.array([largest_trigger(count) for count in rows], np.int64)
        return self._largest[1]

    def _trigger_rows(self, kind: TriggerKind) -> int | None:
        """Return how many rows the index of a kind of trigger has now; None of a kind that has no index."""
        if kind is TriggerKind.ITEM:
            return self._hydrator.items
        if kind is TriggerKind.USER:
            return self._hydrator.users
        return self._hydrator.authors if kind is TriggerKind.AUTHOR else None

    def _shut_late(self, run: Run, c: int, k: Int32Array) -> None:
        """Ask nothing for requests whose time is up, but for the reserve."""
        now = time.monotonic() + self._reserve
        if run.first_deadline > now:
            return
        for q, request in enumerate(run.requests):
            if request.deadline <= now and k[q] > 0:
                k[q] = 0
                run.status[c, q] = ChannelStatus.TIMEOUT

    def _shut_gated(self, run: Run, c: int, k: Int32Array) -> None:
        """Ask nothing where the channel's own gate says no; a gate that raises is an error of its query."""
        for q in np.flatnonzero(k > 0).tolist():
            try:
                if not self.channels[c].enable(run.batch.query(q)):
                    k[q] = 0
                    run.status[c, q] = ChannelStatus.GATED
            except _FAILURES as error:
                k[q] = 0
                self._failed(run, c, q, error)

    def _one_by_one(self, run: Run, c: int, k: Int32Array, error: BaseException) -> CandidateBatch:
        """Ask again, each query alone, so that one that makes a channel fail costs the others nothing."""
        answers: list[Candidates] = []
        for q in range(k.size):
            answers.append(CandidateBatch.empty(1).query(0))
            self._shut_late(run, c, k)
            if k[q] == 0:
                continue
            try:
                if k.size == 1:
                    raise error
                alone = ask(self.channels[c], run.batch.alone(q), k[q : q + 1])
                self._check(alone, c, k[q : q + 1])
                answers[q] = alone.query(0)
            except _FAILURES as own:
                k[q] = 0
                self._failed(run, c, q, own)
        return CandidateBatch.of(answers)

    def _failed(self, run: Run, c: int, q: int, error: BaseException) -> None:
        run.status[c, q] = ChannelStatus.ERROR
        run.messages[c, q] = said(error)
        now = time.monotonic()
        if now - self._failure_logged[c] >= _SECONDS_BETWEEN_WARNINGS:
            self._failure_logged[c] = now
            log.error("channel %s failed", self.names[c], exc_info=error)


@njit(nogil=True, cache=True)
def _take(  # type: ignore[no-untyped-def]
    ends, lengths, channels, depth, largest, items, rows, scores, triggers, offsets, keep, removed_by, returned, status
):  # fmt: skip
    """Lay answers out and note their lengths; False where one breaks the contract, and nothing is noted.

    Args:
        ends: int64[a (n + 1)], the offsets of each answer.
        lengths: int64[a], how many candidates it has.
        channels: int64[a], of which channel it is.
        depth: int32[a, n], how many candidates were asked for.
        largest: int64[channels], what `largest_trigger` says.
        items: rows in the catalogue.
        rows, scores, triggers: the answers end to end.
        offsets, keep, removed_by, returned, status: out; of `Columns` and `Run`.
    """
    n = depth.shape[1]
    for at in range(lengths.size):
        if ends[at * (n + 1)] != 0 or ends[at * (n + 1) + n] != lengths[at]:
            return False
    _lay_out(ends, n, offsets, keep, removed_by)
    if broken_rule(rows, scores, triggers, offsets, depth.reshape(-1), largest[channels], items) >= 0:
        return False
    _note_lengths(offsets, channels, depth, returned, status)
    return True


@njit(nogil=True, cache=True)
def _lay_out(ends, queries, offsets, keep, removed_by):  # type: ignore[no-untyped-def]
    """Put the offsets of answers, `queries` + 1 each, end to end, and let every candidate stay."""
    before = np.int64(0)
    offsets[0] = 0
    for segment in range(offsets.size - 1):
        c, q = segment // queries, segment % queries
        offsets[segment + 1] = before + ends[c * (queries + 1) + q + 1]
        if q + 1 == queries:
            before = offsets[segment + 1]
    for p in range(keep.size):
        keep[p] = True
        removed_by[p] = -1


@njit(nogil=True, cache=True)
def _note_lengths(offsets, channels, depth, returned, status):  # type: ignore[no-untyped-def]
    """Note what was asked and answered: `offsets` as in `FanOut`, `depth` as in `ask`."""
    n = depth.shape[1]
    for at in range(channels.size):
        c = channels[at]
        for q in range(n):
            length = offsets[at * n + q + 1] - offsets[at * n + q]
            asked = depth[at, q] > 0
            if asked or length > 0:
                returned[c, q] = length
            if asked:
                status[c, q] = _OK if length > 0 else _EMPTY
