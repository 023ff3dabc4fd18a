"""What became of every batch, counted in arrays: one compiled pass, whatever the number of channels.

Prometheus' own counters take a lock and a lookup per label; with a dozen channels that is more than the merge costs. Here
a batch's columns are added to columns, and names come in when Prometheus collects.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numba import njit
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.core.candidates import ChannelStatus, FilterStatus
from engine.core.types import Float64Array, Int64Array

if TYPE_CHECKING:
    from engine.online.pipeline import Pipeline
    from engine.online.run import Run

SECONDS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0
)  # fmt: skip
BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

_STATUSES = tuple(status.name for status in ChannelStatus)
_SKIPPED, _GATED = int(ChannelStatus.SKIPPED), int(ChannelStatus.GATED)
_UNAVAILABLE = int(FilterStatus.UNAVAILABLE)


class Histograms:
    """Several histograms over the same bounds.

    Attributes:
        bounds: float64[b], the upper bound of each bucket but the last, which has none.
        counts: int64[rows, b + 1].
        sums: float64[rows].
    """

    def __init__(self, rows: int, bounds: Sequence[float]) -> None:
        """Take how many histograms, and the bounds."""
        self.bounds: Float64Array = np.array(bounds)
        self._labels = [*(str(bound) for bound in bounds), "+Inf"]
        self.counts: Int64Array = np.zeros((rows, self.bounds.size + 1), np.int64)
        self.sums: Float64Array = np.zeros(rows)

    def add(self, row: int, value: float) -> None:
        """Add a value to one histogram; NaN adds nothing."""
        _add(self.bounds, self.counts, self.sums, row, value)

    def buckets(self, row: int) -> list[tuple[str, float]]:
        """Return one histogram as Prometheus takes it: upper bound, and how many values are not above it."""
        return list(zip(self._labels, np.cumsum(self.counts[row]).tolist(), strict=True))


@njit(nogil=True, cache=True)
def _add(bounds, counts, sums, row, value):  # type: ignore[no-untyped-def]
    if value == value:
        bucket = 0
        while bucket < bounds.size and value > bounds[bucket]:
            bucket += 1
        counts[row, bucket] += 1
        sums[row] += value


class SceneTally:
    """The counts of one scene. For one thread, but for reading, which sees a batch wholly or not at all.

    Attributes:
        pipeline: the one that was counted last; it knows the state of its breakers.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        """Take a pipeline of the scene: those of later releases have the same channels, filters and stages."""
        channels, filters = len(pipeline.channel_names), len(pipeline.filter_names)
        self.pipeline = pipeline
        self._lock = threading.Lock()
        self._stage_names = tuple(name for name, _ in pipeline.stages)
        self._answers = np.zeros(3, np.int64)  # all, the empty, the short
        self._channels = np.zeros((channels, 2 + len(_STATUSES) + 1), np.int64)  # returned, kept, by status
        self._filters = np.zeros((filters, 2), np.int64)  # removed, could not judge
        self._degraded = np.zeros(len(pipeline.scene.degrade) + 1, np.int64)
        self._batch = Histograms(1, BATCHES)
        self._seconds = Histograms(1 + len(self._stage_names) + channels, SECONDS)

    def add(self, pipeline: Pipeline, run: Run, seconds: Sequence[float]) -> None:
        """Count a batch.

        Args:
            pipeline: of this scene.
            run: the batch.
            seconds: n, how long each request took from its arrival until its answer was on its way.
        """
        merged = run.merged
        stages = np.array([run.stage_us[name] for name in self._stage_names], np.float64)
        with self._lock:
            self.pipeline = pipeline
            _count(
                merged.offsets, run.limits, run.status, run.returned, merged.kept, run.removed, run.filter_status,
                np.array(seconds, np.float64), stages, run.channel_us, self._answers, self._channels, self._filters,
                run.degraded, self._degraded, self._batch.bounds, self._batch.counts, self._batch.sums,
                self._seconds.bounds, self._seconds.counts, self._seconds.sums,
            )  # fmt: skip

    def collect(self, scene: str, families: Families) -> None:
        """Put what was counted into the families, under the scene's name."""
        pipeline = self.pipeline
        channels, filters = pipeline.channel_names, pipeline.filter_names
        with self._lock:
            families.counter("requests", [scene], self._answers[0])
            families.counter("answers_empty", [scene], self._answers[1])
            families.counter("answers_short", [scene], self._answers[2])
            families.histogram("request_seconds", [scene], self._seconds, 0)
            families.histogram("batch_size", [scene], self._batch, 0)
            for step, count in enumerate(self._degraded[1:].tolist(), 1):
                families.counter("degraded", [scene, str(step)], count)
            for s, name in enumerate(self._stage_names):
                families.histogram("stage_seconds", [scene, name], self._seconds, 1 + s)
            for f, name in enumerate(filters):
                families.counter("filter_removed", [scene, name], self._filters[f, 0])
                families.counter("filter_unavailable", [scene, name], self._filters[f, 1])
            for c, name in enumerate(channels):
                families.counter("channel_returned", [scene, name], self._channels[c, 0])
                families.counter("channel_kept", [scene, name], self._channels[c, 1])
                row = 1 + len(self._stage_names) + c
                families.histogram("channel_seconds", [scene, name], self._seconds, row)
                for status in ChannelStatus:
                    count = self._channels[c, 2 + int(status)]
                    families.counter("channel_status", [scene, name, status.name.lower()], count)
        for name, breaker in pipeline.breakers.items():
            families.breakers[name] = int(breaker.state)


@njit(nogil=True, cache=True)
def _count(  # type: ignore[no-untyped-def]
    offsets, limits, status, returned, kept, removed, filter_status, request_seconds, stage_us, channel_us, answers,
    channels, filters, step, degraded, batch_bounds, batch_counts, batch_sums, bounds, counts, sums,
):  # fmt: skip
    """Add a batch's columns to those of `SceneTally`; a channel that no query was put to has no time."""
    n = limits.size
    degraded[step] += n
    _add(batch_bounds, batch_counts, batch_sums, 0, np.float64(n))
    for q in range(n):
        length = offsets[q + 1] - offsets[q]
        answers[0] += 1
        answers[1] += length == 0
        answers[2] += length < limits[q]
        _add(bounds, counts, sums, 0, request_seconds[q])
    for stage in range(stage_us.size):
        _add(bounds, counts, sums, 1 + stage, stage_us[stage] / 1e6)
    for c in range(status.shape[0]):
        asked = False
        for q in range(n):
            asked |= status[c, q] != _SKIPPED and status[c, q] != _GATED
            channels[c, 0] += returned[c, q]
            if c < kept.shape[0]:
                channels[c, 1] += kept[c, q]
            channels[c, 2 + status[c, q]] += 1
        if asked:
            _add(bounds, counts, sums, 1 + stage_us.size + c, channel_us[c] / 1e6)
    for f in range(removed.shape[0]):
        for q in range(n):
            filters[f, 0] += removed[f, q]
            filters[f, 1] += filter_status[f, q] == _UNAVAILABLE


_COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests answered.", ("scene",)),
    "answers_empty": ("Answers without a candidate.", ("scene",)),
    "answers_short": ("Answers with fewer candidates than were asked for.", ("scene",)),
    "degraded": ("Requests answered at a step of degrading, from 1.", ("scene", "step")),
    "filter_removed": ("Candidates removed.", ("scene", "filter")),
    "filter_unavailable": ("Requests that the filter could not judge.", ("scene", "filter")),
    "channel_returned": ("Candidates returned, before any filter.", ("scene", "channel")),
    "channel_kept": (
        "Candidates that are in answers; one of several channels counts for each.", ("scene", "channel")
    ),
    "channel_status": ("Requests by what the channel reported.", ("scene", "channel", "status")),
}  # fmt: skip
_HISTOGRAMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "request_seconds": ("Time of a request from its arrival until its answer is on its way.", ("scene",)),
    "batch_size": ("Requests that went down the pipeline together.", ("scene",)),
    "stage_seconds": ("Time of a stage for a batch.", ("scene", "stage")),
    "channel_seconds": ("Time of a channel for a batch.", ("scene", "channel")),
}


class Families:
    """The metric families while they are collected."""

    def __init__(self) -> None:
        self._counters = {
            name: CounterMetricFamily(f"recall_{name}", text, labels=labels)
            for name, (text, labels) in _COUNTERS.items()
        }
        self._histograms = {
            name: HistogramMetricFamily(f"recall_{name}", text, labels=labels)
            for name, (text, labels) in _HISTOGRAMS.items()
        }
        self.breakers: dict[str, int] = {}

    def counter(self, name: str, labels: Sequence[str], value: float) -> None:
        """Add one sample to a counter."""
        self._counters[name].add_metric(labels, float(value))

    def histogram(self, name: str, labels: Sequence[str], histograms: Histograms, row: int) -> None:
        """Add one histogram."""
        self._histograms[name].add_metric(labels, histograms.buckets(row), float(histograms.sums[row]))

    def all(self) -> Iterator[Metric]:
        """Yield every family."""
        yield from self._counters.values()
        yield from self._histograms.values()
        states = GaugeMetricFamily(
            "recall_channel_breaker",
            "The channel's circuit: 0 closed, 1 half open, 2 open.",
            labels=("channel",),
        )
        for name, state in self.breakers.items():
            states.add_metric([name], state)
        yield states


class Tally(Collector):
    """The counts of every scene, as a collector of Prometheus."""

    def __init__(self) -> None:
        self._scenes: dict[str, SceneTally] = {}

    def add(self, scene: str, pipeline: Pipeline, run: Run, seconds: Sequence[float]) -> None:
        """Count a batch; on the compute thread. Arguments as of `SceneTally.add`."""
        tally = self._scenes.get(scene)
        if tally is None:
            tally = self._scenes[scene] = SceneTally(pipeline)
        tally.add(pipeline, run, seconds)

    def collect(self) -> Iterable[Metric]:
        """Yield what was counted."""
        families = Families()
        for scene, tally in list(self._scenes.items()):
            tally.collect(scene, families)
        return families.all()
