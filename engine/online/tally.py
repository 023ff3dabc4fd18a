"""What became of every batch, counted in arrays: a few additions a batch, whatever the number of channels.

Prometheus' own counters take a lock and a lookup per label; with a dozen channels that is more than the merge costs. Here
a batch's columns are added to columns, and names come in when Prometheus collects.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.core.candidates import ChannelStatus, FilterStatus
from engine.core.types import AnyArray, Float64Array, Int64Array

if TYPE_CHECKING:
    from engine.online.pipeline import Pipeline, Run

SECONDS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0
)  # fmt: skip
BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

_STATUSES = tuple(status.name for status in ChannelStatus)
_UNAVAILABLE = int(FilterStatus.UNAVAILABLE)


class Histograms:
    """Several histograms over the same bounds."""

    def __init__(self, rows: int, bounds: Sequence[float]) -> None:
        """Take how many histograms, and the upper bound of each bucket but the last, which has none."""
        self._bounds = np.array(bounds)
        self._labels = [*(str(bound) for bound in bounds), "+Inf"]
        self.counts: Int64Array = np.zeros((rows, self._bounds.size + 1), np.int64)
        self.sums: Float64Array = np.zeros(rows)
        self._rows = np.arange(rows)

    def add(self, values: AnyArray) -> None:
        """Add one value to each histogram; NaN adds nothing."""
        there = values == values
        self.counts[self._rows, np.searchsorted(self._bounds, values)] += there
        self.sums += np.where(there, values, 0.0)

    def add_many(self, row: int, values: AnyArray) -> None:
        """Add several values to one histogram."""
        places = np.searchsorted(self._bounds, values)
        self.counts[row] += np.bincount(places, minlength=self._bounds.size + 1)
        self.sums[row] += values.sum()

    def buckets(self, row: int) -> list[tuple[str, float]]:
        """Return one histogram as Prometheus takes it: upper bound, and how many values are not above it."""
        return list(zip(self._labels, np.cumsum(self.counts[row]).tolist(), strict=True))


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
        self._requests = np.zeros(1, np.int64)
        self._empty = np.zeros(1, np.int64)
        self._short = np.zeros(1, np.int64)
        self._returned = np.zeros(channels, np.int64)
        self._kept = np.zeros(channels, np.int64)
        self._status = np.zeros((channels, len(_STATUSES) + 1), np.int64)
        self._removed = np.zeros(filters, np.int64)
        self._unavailable = np.zeros(filters, np.int64)
        self._degraded = np.zeros(len(pipeline.scene.degrade) + 1, np.int64)
        self._latency = Histograms(1, SECONDS)
        self._batch = Histograms(1, BATCHES)
        self._stages = Histograms(len(self._stage_names), SECONDS)
        self._channels = Histograms(channels, SECONDS)
        # A channel's row, so that the statuses of all channels are counted at once.
        self._status_base = np.arange(channels)[:, None] * (len(_STATUSES) + 1)

    def add(self, pipeline: Pipeline, run: Run, seconds: Sequence[float]) -> None:
        """Count a batch.

        Args:
            pipeline: of this scene.
            run: the batch.
            seconds: n, how long each request took from its arrival until its answer was on its way.
        """
        merged = run.merged
        lengths = merged.offsets[1:] - merged.offsets[:-1]
        status = np.bincount((self._status_base + run.status).ravel(), minlength=self._status.size)
        kept = merged.kept.sum(axis=1)
        ran = run.channel_us.copy()
        ran[~_asked(run)] = np.nan
        stages = np.fromiter((run.stage_us[name] for name in self._stage_names), np.float64)
        with self._lock:
            self.pipeline = pipeline
            self._requests += len(run.requests)
            self._empty += np.count_nonzero(lengths == 0)
            self._short += np.count_nonzero(lengths < run.limits)
            self._returned += run.returned.sum(axis=1)
            self._kept[: kept.size] += kept
            self._status += status.reshape(self._status.shape)
            self._removed += run.removed.sum(axis=1)
            self._unavailable += (run.filter_status == _UNAVAILABLE).sum(axis=1)
            self._degraded[run.degraded] += len(run.requests)
            self._latency.add_many(0, np.array(seconds))
            self._batch.add(np.array([len(run.requests)], np.float64))
            self._stages.add(stages / 1e6)
            self._channels.add(ran / 1e6)

    def collect(self, scene: str, families: Families) -> None:
        """Put what was counted into the families, under the scene's name."""
        pipeline = self.pipeline
        channels, filters = pipeline.channel_names, pipeline.filter_names
        with self._lock:
            families.counter("requests", [scene], self._requests[0])
            families.counter("answers_empty", [scene], self._empty[0])
            families.counter("answers_short", [scene], self._short[0])
            families.histogram("request_seconds", [scene], self._latency, 0)
            families.histogram("batch_size", [scene], self._batch, 0)
            for step, count in enumerate(self._degraded[1:].tolist(), 1):
                families.counter("degraded", [scene, str(step)], count)
            for s, name in enumerate(self._stage_names):
                families.histogram("stage_seconds", [scene, name], self._stages, s)
            for f, name in enumerate(filters):
                families.counter("filter_removed", [scene, name], self._removed[f])
                families.counter("filter_unavailable", [scene, name], self._unavailable[f])
            for c, name in enumerate(channels):
                families.counter("channel_returned", [scene, name], self._returned[c])
                families.counter("channel_kept", [scene, name], self._kept[c])
                families.histogram("channel_seconds", [scene, name], self._channels, c)
                for status in ChannelStatus:
                    families.counter(
                        "channel_status", [scene, name, status.name.lower()], self._status[c, int(status)]
                    )
        for name, breaker in pipeline.breakers.items():
            families.breakers[name] = int(breaker.state)


def _asked(run: Run) -> AnyArray:
    """bool[channels]: which channels ran for any query."""
    idle = (run.status == int(ChannelStatus.SKIPPED)) | (run.status == int(ChannelStatus.GATED))
    asked: AnyArray = ~idle.all(axis=1)
    return asked


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
