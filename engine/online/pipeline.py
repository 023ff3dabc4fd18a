"""The pipeline of a scene: hydrate -> fan out -> mask -> merge -> fill. What `serve` runs and `eval` measures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from engine.config import SceneConfig
from engine.core.candidates import CandidateBatch, ChannelStatus, FilterStatus
from engine.core.channel import Channel
from engine.core.filter import Filter
from engine.core.merge import merge
from engine.core.types import Int32Array
from engine.online.beside import Guard
from engine.online.fan_out import SceneChannels
from engine.online.hydrate import Hydrator
from engine.online.mask import SceneFilters
from engine.online.request import Request
from engine.online.run import Columns, Run

_SKIPPED = int(ChannelStatus.SKIPPED)


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
        self._quotas = np.array([[*scene.quotas.values(), *(0 for _ in scene.fallback)]], np.int32).T
        self._weights = np.array([scene.weights.get(name, 1.0) for name in self.channel_names], np.float64)
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
            removed=np.zeros((len(self.filter_names), n), np.int32),
            filter_status=np.full((len(self.filter_names), n), FilterStatus.OK, np.int32),
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
        extra = self._filters.overfetch(run.batch)
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
        run.answers = self._ask(run, range(self._first_fallback), depth)
        run.columns = Columns.of(run.answers, len(run.requests))

    def _ask(self, run: Run, channels: Sequence[int], depth: Int32Array) -> list[CandidateBatch]:
        return self._channels.ask(run, channels, depth, without=self._steps[run.degraded][2])

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
        if self.scene.depth:
            self._deepen(run)
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
        answers = self._ask(run, channels, depths)
        more = Columns.of(answers, len(run.requests))
        self._filters.mask(run, more)
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
        for c, answer in zip(channels, self._ask(run, channels, depths), strict=True):
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
