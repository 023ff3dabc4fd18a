"""The filters of a scene: what they remove, and what becomes of those that cannot read what they judge by."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

import numpy as np

from engine.config import SceneConfig
from engine.core.candidates import FanOut, FilterStatus
from engine.core.errors import ContractError, StateUnavailableError
from engine.core.filter import Filter
from engine.core.members import drop
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Int32Array
from engine.online.run import Columns, Run

log = logging.getLogger(__name__)

_BOOL = np.dtype(np.bool_)

_SECONDS_BETWEEN_WARNINGS = 60.0
"""Of one filter that cannot judge: every batch would say so."""


class SceneFilters:
    """The filters of a scene, in the order they are asked.

    Attributes:
        names: of the filters.
        filters: in the same order.
    """

    def __init__(self, scene: SceneConfig, filters: Mapping[str, Filter]) -> None:
        """Take those of the filters that the scene names."""
        self.names = scene.filters
        self.filters = [filters[name] for name in scene.filters]
        self._fail_open = [name in scene.fail_open for name in scene.filters]
        self._warned = [-math.inf] * len(self.filters)

    def overfetch(self, batch: QueryBatch) -> Int32Array:
        """int32[n]: how far behind the quota a channel must reach so that what filters remove costs it nothing."""
        extra = np.zeros(len(batch), np.int64)
        for component in self.filters:
            try:
                more = component.overfetch(batch)
            except StateUnavailableError:  # keep() will say so too, and then it counts
                continue
            if more is not None:
                extra += more.astype(np.int64, copy=False)
        return extra.astype(np.int32)

    def mask(self, run: Run, columns: Columns) -> None:
        """Ask every filter which candidates of the columns stay; what it removed is noted in them and in the run."""
        if columns.keep.size == 0:
            return
        batch = run.batch
        for f in range(len(self.filters)):
            try:
                stays = self._judge(f, batch, columns.fan_out)
            except StateUnavailableError as error:
                stays = self._judge_alone(run, f, columns.fan_out, error)
            if stays is not None:
                drop(columns.keep, columns.removed_by, stays, columns.fan_out, f, run.removed)

    def _judge(self, f: int, batch: QueryBatch, candidates: FanOut) -> BoolArray | None:
        stays = self.filters[f].keep(batch, candidates)
        if stays is not None and (stays.dtype != _BOOL or stays.shape != candidates.rows.shape):
            raise ContractError(f"filter {self.names[f]!r}: keep() must return bool[{candidates.rows.size}]")
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
        name = self.names[f]
        run.filter_status[f, q] = FilterStatus.UNAVAILABLE
        if not self._fail_open[f]:
            run.refused.setdefault(q, StateUnavailableError(f"filter {name!r}: {error}"))
        now = time.monotonic()
        if now - self._warned[f] >= _SECONDS_BETWEEN_WARNINGS:
            self._warned[f] = now
            what = "the scene goes on without it" if self._fail_open[f] else "requests are refused"
            log.warning("filter %s: %s; %s", name, error, what)
