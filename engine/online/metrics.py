"""Numbers of the running server, for Prometheus to collect."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from engine.online.pipeline import Pipeline, Run

MEASURED_BATCHES = 32
"""The exposure bits of one batch in so many are measured."""

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """The metrics of one server, in a registry of their own, so that several servers fit into one process.

    Every name begins with `recall_`; docs/operations.md lists them with what they mean.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._batches = 0
        self.requests = self._counter("requests", "Requests answered.", "scene")
        self.channel_returned = self._counter(
            "channel_returned", "Candidates returned, before any filter.", "scene", "channel"
        )
        self.channel_kept = self._counter(
            "channel_kept", "Candidates that are in answers; one of several channels counts for each.",
            "scene", "channel",
        )  # fmt: skip
        self.filter_removed = self._counter("filter_removed", "Candidates removed.", "scene", "filter")
        self.ingest_events = self._counter(
            "ingest_events", "Events reported; outcome: accepted, duplicate, refused.", "outcome"
        )
        self.ingest_kinds = self._counter("ingest_kinds", "Events not refused, duplicates included.", "kind")
        self.ingest_seconds = self._histogram("ingest_seconds", "Time of a commit to the state store.")
        self.items_changed = self._counter(
            "items_changed", "Changes of items sent here; outcome: accepted, stale, refused.", "outcome"
        )
        self.log_lag_seconds = self._gauge(
            "log_lag_seconds",
            "Age of the newest live-log entry taken in while there are newer ones or nobody knows; else 0.",
        )
        self.log_entries_applied = self._counter("log_entries_applied", "Live-log entries taken in.")
        self.log_resyncs = self._counter(
            "log_resyncs", "Times that entries were missed and the table of items was read instead."
        )
        self.update_failures = self._counter(
            "update_failures", "Updates that a channel or filter failed at.", "component"
        )
        self.state_read_seconds = self._histogram(
            "state_read_seconds", "Time of a batch's read of user state."
        )
        self.state_unavailable = self._counter(
            "state_unavailable", "Batches whose user state could not be read."
        )
        self.recalls_dropped = self._counter(
            "recalls_dropped", "Notes of which leftovers were recalled that were not written."
        )
        self.exposure_probes = self._counter(
            "exposure_probes", "Items never shown that exposure bits were asked for, to measure them."
        )
        self.exposure_false_positives = self._counter(
            "exposure_false_positives", "Of those probes, how many the bits took for shown."
        )
        self.exposure_bits = self._counter("exposure_bits", "Bits looked at while measuring the fill.")
        self.exposure_bits_set = self._counter("exposure_bits_set", "Of those bits, how many were set.")

    def count(self, scene: str, pipeline: Pipeline, run: Run) -> None:
        """Count what became of a batch; on the compute thread."""
        self._batches += 1
        self.requests.labels(scene).inc(len(run.requests))
        returned = run.returned.sum(axis=1).tolist()
        kept = run.merged.kept.sum(axis=1).tolist()
        for c, name in enumerate(pipeline.channel_names):
            if returned[c]:
                self.channel_returned.labels(scene, name).inc(returned[c])
            if c < len(kept) and kept[c]:
                self.channel_kept.labels(scene, name).inc(kept[c])
        for name, removed in zip(pipeline.filter_names, run.removed.sum(axis=1).tolist(), strict=True):
            if removed:
                self.filter_removed.labels(scene, name).inc(removed)
        exposure = run.batch.live.exposure if self._batches % MEASURED_BATCHES == 0 else None
        if exposure is not None:
            probes, positives, bits_set, bits = exposure.measure(self._batches)
            self.exposure_probes.inc(probes)
            self.exposure_false_positives.inc(positives)
            self.exposure_bits_set.inc(bits_set)
            self.exposure_bits.inc(bits)

    def serve(self, host: str, port: int) -> MetricsServer:
        """Answer `GET /metrics` over HTTP on a thread of its own.

        Raises:
            ConfigError: if the address cannot be listened on.
        """
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            text = f"cannot listen on {host}:{port}: {error.strerror}"
            raise ConfigError(text, "server.metrics_port") from error
        return MetricsServer(server, thread)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"recall_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"recall_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"recall_{name}", text, registry=self.registry, buckets=_SECONDS)


class MetricsServer:
    """The HTTP server that answers with a `Metrics`; `port` is where."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        self.port: int = server.server_port

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
