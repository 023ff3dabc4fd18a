"""The pipeline of a scene: hydrate -> fan out -> mask -> merge -> fill. What `serve` runs and `eval` measures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
from numba import njit

from engine.config import SceneConfig
from engine.core.candidates import CandidateBatch, ChannelStatus, FilterStatus
from engine.core.channel import Channel
from engine.core.filter import Filter
from engine.core.merge import merge
from engine.core.types import BoolArray, Int32Array, Int64Array
from engine.online.beside import Guard
from engine.online.fan_out import SceneChannels
from engine.online.hydrate import Hydrator
from engine.online.mask import SceneFilters
from engine.online.request import Request
from engine.online.run import Columns, Run

_SKIPPED = int(ChannelStatus.SKIPPED)
_OK = int(ChannelStatus.OK)


class _Step(NamedTuple):
    """A step of degrading: from which load, which share of the candidates, and which channels are asked."""

    at: float
    limit: float
    without: frozenset[int]
    asked: BoolArray


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
        self._channels = SceneChannels(self.channel_names, channels, hydrator, reserve_ms, guards)
        self.channels = self._channels.channels
        self.breakers = self._channels.breakers
        self._filters = SceneFilters(scene, filters)
        self._hydrator = hydrator
        self._first_fallback = len(scene.quotas)
        # What stands in a run before its stages, a column a query, is copied in one go: a step costs microseconds.
        blank = (
            [*scene.quotas.values(), *(0 for _ in scene.fallback)],
            [_SKIPPED] * len(self.channel_names),
            [0] * len(self.channel_names),
            [0] * len(self.filter_names),
            [int(FilterStatus.OK)] * len(self.filter_names),
        )
        self._blank = np.array([list(chain(*blank))], np.int32).T
        ends = accumulate((len(part) for part in blank), initial=0)
        self._parts = [slice(*span) for span in pairwise(ends)]
        self._weights = np.array([scene.weights.get(name, 1.0) for name in self.channel_names], np.float64)
        self._steps = [_Step(0.0, 1.0, frozenset(), np.ones(self._first_fallback, np.bool_))]
        for step in scene.degrade:
            asked = np.array([name not in step.without for name in scene.quotas], np.bool_)
            without = frozenset(self.channel_names.index(name) for name in step.without)
            self._steps.append(_Step(step.at, step.limit, without, asked))
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
        while step and load < self._steps[step].at:
            step -= 1
        return step

    def run(
        self, requests: Sequence[Request], degraded: int = 0, meanwhile: Callable[[], None] | None = None
    ) -> Run:
        """Answer requests together; the answers stand in the returned run's columns, in the order of the requests.

        Args:
            requests: one or more.
            degraded: the step of degrading, as `step_at` says.
            meanwhile: called while the state store works on the batch.
        """
        columns = self._blank.repeat(len(requests), axis=1)
        quotas, status, returned, removed, filter_status = [columns[rows] for rows in self._parts]
        run = Run(
            requests=requests,
            limits=np.array([self.scene.limit if r.limit is None else r.limit for r in requests], np.int32),
            quotas=quotas,
            status=status,
            returned=returned,
            removed=removed,
            filter_status=filter_status,
            channel_us=np.zeros(len(self.channel_names)),
            first_deadline=min([request.deadline for request in requests], default=math.inf),
            degraded=degraded,
            meanwhile=meanwhile,
        )
        started = time.perf_counter()
        for name, stage in self.stages:
            stage(run)
            ended = time.perf_counter()
            run.stage_us[name] = (ended - started) * 1e6
            started = ended
        return run

    def _hydrate(self, run: Run) -> None:
        run.hydrated = self._hydrator(run.requests, run.meanwhile)

    def _fan_out(self, run: Run) -> None:
        step = self._steps[run.degraded]
        off: list[tuple[int, int]] = []
        for q, request in enumerate(run.requests):
            for name, quota in request.quotas.items():
                c = self.channel_names.index(name)
                run.quotas[c, q] = quota
                if quota == 0:
                    off.append((c, q))
        if run.degraded:
            run.limits = np.ceil(run.limits * step.limit).astype(np.int32)
            run.quotas = np.ceil(run.quotas * step.limit).astype(np.int32)
        quotas = run.quotas[: self._first_fallback]
        run.depth, run.whole_depth = depths(
            quotas, run.limits, self._filters.overfetch(run.batch), step.asked, self.scene.depth
        )
        for c, q in off:
            if c < self._first_fallback:
                run.depth[c, q] = run.whole_depth[c, q] = 0
        run.answers, run.columns = self._ask(run, range(self._first_fallback), run.depth.copy())

    def _ask(
        self, run: Run, channels: Sequence[int], depth: Int32Array
    ) -> tuple[list[CandidateBatch], Columns]:
        return self._channels.ask(run, channels, depth, without=self._steps[run.degraded].without)

    def _mask(self, run: Run) -> None:
        self._filters.mask(run, run.columns)

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
        if self.scene.depth and not run.degraded:  # a step of degrading is there to do less
            self._deepen(run)
        # No list is longer than its limit, so none is short where the sums are the same.
        if run.merged.rows.size == sum(run.limits.tolist()):
            return
        lengths = run.merged.offsets[1:] - run.merged.offsets[:-1]
        short = lengths < run.limits
        if not short.any() or self._first_fallback == len(self.channel_names):
            return
        # What stands in the list already may stand in front of the fallback's list too.
        depth = np.where(short, run.limits + self._filters.overfetch(run.batch) + lengths, 0).astype(np.int32)
        channels = range(self._first_fallback, len(self.channel_names))
        depths = np.tile(depth, (len(channels), 1))
        for q, request in enumerate(run.requests):
            for name, quota in request.quotas.items():
                if quota == 0 and (c := self.channel_names.index(name)) in channels:
                    depths[c - self._first_fallback, q] = 0
        _, more = self._ask(run, channels, depths)
        self._filters.mask(run, more)
        run.columns = run.columns.followed_by(more)
        run.quotas[self._first_fallback :] = 0
        self._merge_first(run, len(self.channel_names))

    def _deepen(self, run: Run) -> None:
        """Where an answer is short ask once more, as deep as it is long, those channels that may have more.

        What they answer replaces what they did before. One that now fails is left with that, and says that it failed; one
        that there is no time for is not to blame.
        """
        mine = slice(0, self._first_fallback)
        again = np.empty(run.depth.shape, np.bool_)
        merged = run.merged
        if not _may_have_more(
            merged.offsets, merged.eligible, run.limits, run.quotas[mine], run.status[mine], run.returned[mine],
            run.depth, run.whole_depth, again,
        ):  # fmt: skip
            return
        channels = np.flatnonzero(again.any(axis=1)).tolist()
        returned, spent = run.returned[mine].copy(), run.channel_us[channels]
        before = run.status.copy()
        depths = np.where(again, run.whole_depth, 0)[channels].astype(np.int32)
        answers, _ = self._ask(run, channels, depths)
        for c, answer in zip(channels, answers, strict=True):
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
        self._filters.mask(run, run.columns)
        self._merge(run)


def depths(
    quotas: Int32Array, limits: Int32Array, extra: Int32Array, asked: BoolArray, factor: float
) -> tuple[Int32Array, Int32Array]:
    """Return how many candidates each channel is asked for first, and how many at most.

    At most as many as the answer is long, so that each channel could backfill all that the others leave over. First
    `factor` times its quota; where the quotas of those that are asked sum to less than the answer is long, each gives
    more than its own.

    Args:
        quotas: int32[channels, n].
        limits: int32[n], how long each answer is.
        extra: int32[n], how many filters may remove.
        asked: bool[channels], which channels are asked at all.
        factor: 0: all at once.

    Returns:
        int32[channels, n] twice.
    """
    first, most = np.empty(quotas.shape, np.int32), np.empty(quotas.shape, np.int32)
    _depths(quotas, limits, extra, asked, float(factor), first, most)
    return first, most


@njit(nogil=True, cache=True)
def _depths(quotas, limits, extra, asked, factor, first, most):  # type: ignore[no-untyped-def]
    channels, n = quotas.shape
    for q in range(n):
        total = 0
        for c in range(channels):
            if asked[c]:
                total += quotas[c, q]
        stretch = max(1.0, limits[q] / max(total, 1))
        for c in range(channels):
            most[c, q] = max(quotas[c, q], limits[q]) + extra[q]
            first[c, q] = most[c, q]
            if factor > 0:
                first[c, q] = min(most[c, q], np.int32(np.ceil(quotas[c, q] * stretch * factor)))


def depths_reference(
    quotas: Int32Array, limits: Int32Array, extra: Int32Array, asked: BoolArray, factor: float
) -> tuple[Int32Array, Int32Array]:
    """The plain NumPy twin of `depths`."""
    most = (np.maximum(quotas, limits) + extra).astype(np.int32)
    if not factor:
        return most, most
    stretch = np.maximum(1.0, limits / np.maximum(quotas[asked].sum(axis=0), 1))
    return np.minimum(most, np.ceil(quotas * stretch * factor).astype(np.int32)), most


@njit(nogil=True, cache=True)
def _may_have_more(  # type: ignore[no-untyped-def]
    offsets, eligible, limits, quotas, status, returned, depth, whole_depth, again
):
    """Say in `again`, bool[channels, n], who is to be asked more deeply, and return whether anybody is.

    That is who gave all that was asked for, or was asked for nothing yet, where the answer is short or the channel's own
    quota is not filled.
    """
    found = False
    for q in range(limits.size):
        short = offsets[q + 1] - offsets[q] < limits[q]
        for c in range(depth.shape[0]):
            reached = status[c, q] == _OK and returned[c, q] >= depth[c, q]
            unasked = status[c, q] == _SKIPPED and depth[c, q] == 0
            wanting = short or eligible[c, q] < quotas[c, q]
            again[c, q] = (reached or unasked) and wanting and depth[c, q] < whole_depth[c, q]
            found |= again[c, q]
    return found


def may_have_more_reference(
    offsets: Int64Array,
    eligible: Int32Array,
    limits: Int32Array,
    quotas: Int32Array,
    status: Int32Array,
    returned: Int32Array,
    depth: Int32Array,
    whole_depth: Int32Array,
) -> BoolArray:
    """The plain NumPy twin of `_may_have_more`: bool[channels, n]."""
    reached = (status == _OK) & (returned >= depth)
    unasked = (status == _SKIPPED) & (depth == 0)
    wanting = (np.diff(offsets) < limits) | (eligible < quotas)
    again: BoolArray = (reached | unasked) & wanting & (depth < whole_depth)
    return again
