"""The pipeline of a scene: hydrate -> fan out -> mask -> merge -> fill. What `serve` runs and `eval` measures."""

from __future__ import annotations

import logging
import math
import time
from asyncio import CancelledError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.config import SceneConfig
from engine.core.candidates import (
    CandidateBatch,
    Candidates,
    ChannelStatus,
    FanOut,
    FilterStatus,
    TriggerKind,
    check_contract,
)
from engine.core.channel import Channel, ask, gates
from engine.core.errors import ContractError, StateUnavailableError
from engine.core.filter import Filter
from engine.core.members import drop
from engine.core.merge import Merged, merge
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Float32Array, Float64Array, Int8Array, Int32Array
from engine.online.beside import Call, Guard, Rules, said
from engine.online.breaker import Breaker, BreakerState
from engine.online.hydrate import Hydrated, Hydrator
from engine.online.request import Request

log = logging.getLogger(__name__)

_SKIPPED = int(ChannelStatus.SKIPPED)
_EMPTY = int(ChannelStatus.EMPTY)  # OK is one less

_SECONDS_BETWEEN_WARNINGS = 60.0
"""Of one filter that cannot judge, or one channel that fails: every batch would say so."""

_DEGRADED = "degraded"

_FAILURES = (Exception, SystemExit, CancelledError)
"""Whatever a channel raises is that channel's failure alone; but Ctrl-C, where this is the main thread, ends us."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The candidates of some channels for a batch, channel after channel: what filters and the merge work on.

    Of the filters `keep` says whether none removed the candidate, and `removed_by` which one did: int8[m], its place
    in the scene's filters, or -1.
    """

    fan_out: FanOut
    scores: Float32Array
    triggers: Int32Array
    keep: BoolArray
    removed_by: Int8Array

    @classmethod
    def of(cls, answers: Sequence[CandidateBatch], queries: int) -> Columns:
        """Put the answers end to end."""
        rows = np.concatenate([answer.rows for answer in answers])
        ends = np.concatenate([answer.offsets for answer in answers]).reshape(len(answers), queries + 1)
        offsets = np.zeros(len(answers) * queries + 1, np.int64)
        before = ends[:, -1].cumsum() - ends[:, -1]
        np.add(ends[:, 1:], before[:, None], out=offsets[1:].reshape(len(answers), queries))
        return cls(
            FanOut(rows, offsets, queries),
            np.concatenate([answer.scores for answer in answers]),
            np.concatenate([answer.triggers for answer in answers]),
            np.ones(rows.size, np.bool_),
            np.full(rows.size, -1, np.int8),
        )

    def followed_by(self, other: Columns) -> Columns:
        """Return these channels and then the other's."""
        offsets = np.concatenate((self.fan_out.offsets, other.fan_out.offsets[1:] + self.fan_out.rows.size))
        return Columns(
            FanOut(np.concatenate((self.fan_out.rows, other.fan_out.rows)), offsets, self.fan_out.queries),
            np.concatenate((self.scores, other.scores)),
            np.concatenate((self.triggers, other.triggers)),
            np.concatenate((self.keep, other.keep)),
            np.concatenate((self.removed_by, other.removed_by)),
        )


@dataclass(slots=True)
class Run:
    """One batch on its way down the stages; each stage fills in its part.

    Channel axes are the scene's channels in merge order, then its fallback channels. `refused` are the queries that
    cannot be answered because a filter could not read what it judges by, with the filter's name; their columns mean
    nothing. `first_deadline` is the earliest of the requests'. `depth` and `whole_depth`, int32[channels but fallback,
    n], are how many candidates each was asked for first, and how many it may be asked for at all; `answers` what they
    answered.
    """

    requests: Sequence[Request]
    limits: Int32Array
    quotas: Int32Array
    status: Int32Array
    returned: Int32Array
    removed: Int32Array
    filter_status: Int32Array
    channel_us: Float64Array
    first_deadline: float
    messages: dict[tuple[int, int], str] = field(default_factory=dict)
    stage_us: dict[str, float] = field(default_factory=dict)
    refused: dict[int, StateUnavailableError] = field(default_factory=dict)
    degraded: int = 0
    hydrated: Hydrated = field(init=False)
    depth: Int32Array = field(init=False)
    whole_depth: Int32Array = field(init=False)
    answers: list[CandidateBatch] = field(init=False)
    columns: Columns = field(init=False)
    merged: Merged = field(init=False)

    @property
    def batch(self) -> QueryBatch:
        """The batch as the channels see it."""
        return self.hydrated.batch

    def removed_rows(self, q: int) -> list[Int32Array]:
        """Return the items of query q that each filter removed, each once per filter, in rising order of row."""
        mine, positions = self.columns.fan_out.alone(q)
        removed_by = self.columns.removed_by[positions]
        return [np.unique(mine.rows[removed_by == f]) for f in range(self.removed.shape[0])]


class Pipeline:
    """One scene's channels, filters and merge over one loaded release.

    Without guards it is safe to use from several threads at once: every channel then runs on the thread that asks, to its
    end. With guards it is for one thread.

    Attributes:
        breakers: the circuit breaker of each channel; none without guards.
    """

    def __init__(
        self,
        scene: SceneConfig,
        channels: dict[str, Channel],
        filters: dict[str, Filter],
        hydrator: Hydrator,
        reserve_ms: float = 0.0,
        guards: Mapping[str, Guard] | None = None,
    ) -> None:
        """Make a pipeline.

        Args:
            scene: the scene's configuration.
            channels: every channel it names, fallback included.
            filters: every filter it names.
            hydrator: looks ids up and reads histories.
            reserve_ms: the part of a request's deadline inside which no channel starts, and none is waited for.
            guards: keep the channels from harming each other; by name.
        """
        self.scene = scene
        self.channel_names = (*scene.quotas, *scene.fallback)
        self.filter_names = scene.filters
        self.channels = [channels[name] for name in self.channel_names]
        self._filters = [filters[name] for name in scene.filters]
        self._hydrator = hydrator
        self._fail_open = [name in scene.fail_open for name in scene.filters]
        self._warned = [-math.inf] * len(self._filters)
        self._reserve = reserve_ms / 1000
        self._first_fallback = len(scene.quotas)
        self._quotas = np.array([[*scene.quotas.values(), *(0 for _ in scene.fallback)]], np.int32).T
        self._weights = np.array([scene.weights.get(name, 1.0) for name in self.channel_names], np.float64)
        self._gated = [gates(channel) for channel in self.channels]
        self._failure_logged = [-math.inf] * len(self.channels)
        mine = {} if guards is None else {name: guards[name] for name in self.channel_names}
        self.breakers: Mapping[str, Breaker] = {name: guard.breaker for name, guard in mine.items()}
        self._breakers = [self.breakers.get(name) for name in self.channel_names]
        self._beside = [mine[name].beside if mine else None for name in self.channel_names]
        self._steps = [(0.0, 1.0, frozenset[int]())] + [
            (step.at, step.limit, frozenset(self.channel_names.index(name) for name in step.without))
            for step in scene.degrade
        ]
        self.stages: tuple[tuple[str, Callable[[Run], None]], ...] = (
            ("hydrate", self._hydrate),
            ("fan_out", self._fan_out),
            ("mask", self._mask),
            ("merge", self._merge),
            ("fill", self._fill),
        )

    def step_at(self, load: float) -> int:
        """Return the step of degrading for a load, the share in use of the limit on requests in flight; 0 is none."""
        step = len(self._steps) - 1
        while step and load < self._steps[step][0]:
            step -= 1
        return step

    def run(self, requests: Sequence[Request], degraded: int = 0) -> Run:
        """Answer requests together; the answers stand in the returned run's columns, in the order of the requests.

        Args:
            requests: one or more.
            degraded: the step of degrading, as `step_at` says.
        """
        n = len(requests)
        channels = len(self.channel_names)
        run = Run(
            requests=requests,
            limits=np.array([self.scene.limit if r.limit is None else r.limit for r in requests], np.int32),
            quotas=self._quotas.repeat(n, axis=1),
            status=np.full((channels, n), _SKIPPED, np.int32),
            returned=np.zeros((channels, n), np.int32),
            removed=np.zeros((len(self._filters), n), np.int32),
            filter_status=np.full((len(self._filters), n), FilterStatus.OK, np.int32),
            channel_us=np.zeros(channels),
            first_deadline=min((request.deadline for request in requests), default=math.inf),
            degraded=degraded,
        )
        started = time.perf_counter()
        for name, stage in self.stages:
            stage(run)
            ended = time.perf_counter()
            run.stage_us[name] = (ended - started) * 1e6
            started = ended
        return run

    def _hydrate(self, run: Run) -> None:
        run.hydrated = self._hydrator(run.requests)

    def _fan_out(self, run: Run) -> None:
        off: list[tuple[int, int]] = []
        for q, request in enumerate(run.requests):
            for name, quota in request.quotas.items():
                c = self.channel_names.index(name)
                run.quotas[c, q] = quota
                if quota == 0:
                    off.append((c, q))
        if run.degraded:
            factor = self._steps[run.degraded][1]
            run.limits = np.ceil(run.limits * factor).astype(np.int32)
            run.quotas = np.ceil(run.quotas * factor).astype(np.int32)
        # As deep as the answer is long, so that each channel could backfill all that the others leave over.
        quotas = run.quotas[: self._first_fallback]
        extra = self._overfetch(run.batch)
        run.whole_depth = np.maximum(quotas, run.limits) + extra
        for c, q in off:
            if c < self._first_fallback:
                run.whole_depth[c, q] = 0
        depth = run.whole_depth.copy()
        if self.scene.depth:
            # Of quotas that sum to less than the answer is long each channel gives more than its own.
            stretch = np.maximum(1.0, run.limits / np.maximum(quotas.sum(axis=0), 1))
            np.minimum(depth, np.ceil(quotas * stretch * self.scene.depth).astype(np.int32), out=depth)
        run.depth = depth.copy()
        run.answers = self._ask_all(run, range(self._first_fallback), depth)
        run.columns = Columns.of(run.answers, len(run.requests))

    def _overfetch(self, batch: QueryBatch) -> Int32Array:
        """int32[n]: how far behind the quota a channel must reach so that what filters remove costs it nothing."""
        extra = np.zeros(len(batch), np.int32)
        for component in self._filters:
            try:
                more = component.overfetch(batch)
            except StateUnavailableError:  # keep() will say so too, and then it counts
                continue
            if more is not None:
                extra += more.astype(np.int32)
        return extra

    def _ask_all(self, run: Run, channels: Sequence[int], depth: Int32Array) -> list[CandidateBatch]:
        """Ask channels, each query for as many as `depth` int32[channels, n] says, which is changed.

        Those that run beside the compute start first and are waited for last: they have as long as the others take for
        nothing.
        """
        without = self._steps[run.degraded][2]
        depths = {c: depth[at] for at, c in enumerate(channels)}
        for c in without & depths.keys():
            self._shut(run, c, depths[c], ChannelStatus.GATED, _DEGRADED)
        beside = [c for c in channels if self._beside[c] is not None]
        batch = run.batch.detached() if beside else run.batch
        calls = [(c, self._start(run, c, depths[c], batch)) for c in beside]
        answers = {c: self._ask(run, c, depths[c]) for c in channels if self._beside[c] is None}
        for c, call in calls:
            answers[c] = self._collect(run, c, depths[c], call)
        ordered = [answers[c] for c in channels]
        # Of all channels at once: each operation on short arrays costs a microsecond or more.
        ends = np.concatenate([answer.offsets for answer in ordered]).reshape(len(ordered), -1)
        lengths, mine = ends[:, 1:] - ends[:, :-1], np.array(channels)
        asked = depth > 0
        run.returned[mine] = np.where(asked | (lengths > 0), lengths, run.returned[mine])
        run.status[mine] = np.where(asked, _EMPTY - (lengths > 0), run.status[mine])
        return ordered

    def _ask(self, run: Run, c: int, k: Int32Array) -> CandidateBatch:
        """Run one channel: gate, deadline, contract, timing and error policy are here, once for all inline channels."""
        started = time.perf_counter()
        failed_before = len(run.messages)
        self._shut_late(run, c, k)
        breaker = self._breakers[c]
        watched = breaker is not None and not breaker.quiet
        if watched and not self._passes(run, c, k):
            return CandidateBatch.empty(k.size)
        if self._gated[c]:
            self._shut_gated(run, c, k)
        answer = None
        if any(k.tolist()):
            try:
                answer = self._answer(run, c, run.batch, k)
            except _FAILURES as error:
                answer = self._one_by_one(run, c, k, error)
        if breaker is not None and (watched or len(run.messages) > failed_before):
            self._note(run, c, k, len(run.messages) - failed_before)
        run.channel_us[c] = (time.perf_counter() - started) * 1e6
        return CandidateBatch.empty(k.size) if answer is None else answer

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
            log.warning(
                "channel %s: left out for a while, its circuit is open: %s", self.channel_names[c], error
            )
        elif breaker.state is BreakerState.CLOSED and before is not BreakerState.CLOSED:
            log.warning("channel %s: answers again, its circuit is closed", self.channel_names[c])

    def _shut(self, run: Run, c: int, k: Int32Array, status: ChannelStatus, text: str) -> None:
        """Ask nothing more, and say why."""
        for q in np.flatnonzero(k).tolist():
            k[q] = 0
            run.status[c, q] = status
            run.messages[c, q] = text

    def _answer(self, run: Run, c: int, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        channel = self.channels[c]
        answer = ask(channel, batch, k)
        triggers = self._trigger_rows(channel.trigger_kind)
        check_contract(answer, k, self._hydrator.items, self.channel_names[c], triggers)
        return answer

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
                answers[q] = self._answer(run, c, run.batch.alone(q), k[q : q + 1]).query(0)
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
            log.error("channel %s failed", self.channel_names[c], exc_info=error)

    def _mask(self, run: Run) -> None:
        self._filter(run, run.columns)

    def _filter(self, run: Run, columns: Columns) -> None:
        if columns.keep.size == 0:
            return
        for f in range(len(self._filters)):
            try:
                stays = self._judge(f, run.batch, columns.fan_out)
            except StateUnavailableError as error:
                stays = self._judge_alone(run, f, columns.fan_out, error)
            if stays is not None:
                run.removed[f] += drop(columns.keep, columns.removed_by, stays, columns.fan_out, f)

    def _judge(self, f: int, batch: QueryBatch, candidates: FanOut) -> BoolArray | None:
        stays = self._filters[f].keep(batch, candidates)
        if stays is not None and (stays.dtype != np.bool_ or stays.shape != candidates.rows.shape):
            raise ContractError(
                f"filter {self.filter_names[f]!r}: keep() must return bool[{candidates.rows.size}]"
            )
        return stays

    def _judge_alone(self, run: Run, f: int, candidates: FanOut, error: StateUnavailableError) -> BoolArray:
        """Ask again, each query alone, so that one whose state cannot be read takes no neighbour along."""
        stays = np.ones(candidates.rows.size, np.bool_)
        for q in range(candidates.queries):
            try:
                if candidates.queries == 1:
                    raise error
                mine, positions = candidates.alone(q)
                verdict = self._judge(f, run.batch.alone(q), mine)
                if verdict is not None:
                    stays[positions] = verdict
            except StateUnavailableError as own:
                self._cannot_judge(run, f, q, own)
        return stays

    def _cannot_judge(self, run: Run, f: int, q: int, error: StateUnavailableError) -> None:
        name = self.filter_names[f]
        run.filter_status[f, q] = FilterStatus.UNAVAILABLE
        if not self._fail_open[f]:
            run.refused.setdefault(q, StateUnavailableError(f"filter {name!r}: {error}"))
        now = time.monotonic()
        if now - self._warned[f] >= _SECONDS_BETWEEN_WARNINGS:
            self._warned[f] = now
            what = "the scene goes on without it" if self._fail_open[f] else "requests are refused"
            log.warning("filter %s: %s; %s", name, error, what)

    def _merge(self, run: Run) -> None:
        self._merge_first(run, self._first_fallback)

    def _merge_first(self, run: Run, channels: int) -> None:
        run.merged = merge(
            run.columns.fan_out.rows,
            run.columns.fan_out.offsets,
            run.columns.keep,
            run.quotas[:channels],
            self._weights[:channels],
            run.limits,
            self.scene.merge,
            self.scene.rank_constant,
        )

    def _fill(self, run: Run) -> None:
        """Where an answer is short ask the channels for more, then the fallback channels, which only backfill."""
        if self.scene.depth:
            self._deepen(run)
        lengths = run.merged.offsets[1:] - run.merged.offsets[:-1]
        short = lengths < run.limits
        if not short.any() or self._first_fallback == len(self.channel_names):
            return
        # What stands in the list already may stand in front of the fallback's list too.
        depth = np.where(short, run.limits + self._overfetch(run.batch) + lengths, 0).astype(np.int32)
        channels = range(self._first_fallback, len(self.channel_names))
        depths = np.tile(depth, (len(channels), 1))
        for q, request in enumerate(run.requests):
            for name, quota in request.quotas.items():
                if quota == 0 and (c := self.channel_names.index(name)) in channels:
                    depths[c - self._first_fallback, q] = 0
        answers = self._ask_all(run, channels, depths)
        more = Columns.of(answers, len(run.requests))
        self._filter(run, more)
        run.columns = run.columns.followed_by(more)
        run.quotas[self._first_fallback :] = 0
        self._merge_first(run, len(self.channel_names))

    def _deepen(self, run: Run) -> None:
        """Where an answer is short ask once more, as deep as it is long, those channels that may have more.

        What they answer replaces what they did before. One that now fails is left with that, and says that it failed; one
        that there is no time for is not to blame.
        """
        lengths = run.merged.offsets[1:] - run.merged.offsets[:-1]
        mine = slice(0, self._first_fallback)
        status, returned = run.status[mine], run.returned[mine].copy()
        reached = (status == ChannelStatus.OK) & (returned >= run.depth)
        unasked = (status == _SKIPPED) & (run.depth == 0)
        wanting = (lengths < run.limits) | (run.merged.eligible < run.quotas[mine])
        again = (reached | unasked) & (run.depth < run.whole_depth) & wanting
        channels = np.flatnonzero(again.any(axis=1)).tolist()
        if not channels:
            return
        spent = run.channel_us[channels]
        before = run.status.copy()
        depths = np.where(again, run.whole_depth, 0)[channels].astype(np.int32)
        for c, answer in zip(channels, self._ask_all(run, channels, depths), strict=True):
            taken = again[c] & (run.status[c] == ChannelStatus.OK)
            run.returned[c] = np.where(taken, run.returned[c], returned[c])
            parts = [(answer if new else run.answers[c]).query(q) for q, new in enumerate(taken.tolist())]
            run.answers[c] = CandidateBatch.of(parts)
        late = again & (run.status[mine] == ChannelStatus.TIMEOUT)
        np.copyto(run.status[mine], before[mine], where=late)
        for c, q in np.argwhere(late).tolist():
            run.messages.pop((c, q), None)
        run.channel_us[channels] += spent
        run.columns = Columns.of(run.answers, len(run.requests))
        run.removed[:] = 0
        self._filter(run, run.columns)
        self._merge(run)
