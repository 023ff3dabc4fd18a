"""Numbers of the running server, for Prometheus to collect."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from engine.core.errors import ConfigError
from engine.online.tally import SECONDS, Tally

if TYPE_CHECKING:
    from engine.online.admission import Admission
    from engine.online.answered import Answered

MEASURED_BATCHES = 32
"""The exposure bits of one batch in so many are measured."""


class Metrics:
    """The metrics of one server, in a registry of their own, so that several servers fit into one process.

    Every name begins with `recall_`; docs/operations.md lists them with what they mean.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._batches = 0
        self._tally = Tally()
        self.registry.register(self._tally)
        self.calls_failed = self._counter(
            "calls_failed", "Calls of Recall that ended with another status than OK.", "code"
        )
        self.refused = self._counter("refused", "Requests refused for overload.")
        self.in_flight = self._gauge("in_flight", "Requests waiting and being computed.")
        self.in_flight_limit = self._gauge("in_flight_limit", "How many requests may be in flight, now.")
        self.compute_busy = self._gauge(
            "compute_busy", "Share of time that the compute thread computes, over a quarter of a second."
        )
        self.impressions = self._counter(
            "impressions", "Items shown to the users whose impressions are credited."
        )
        self.impressions_credited = self._counter(
            "impressions_credited", "Of these, items that the channel recalled.", "channel"
        )
        self.impressions_unknown = self._counter(
            "impressions_unknown", "Of these, items that none of the user's newest answers held."
        )
        self.impressions_dropped = self._counter(
            "impressions_dropped", "Answers and reports of these users that could not be noted."
        )
        self.telemetry_dropped = self._counter(
            "telemetry_dropped", "Requests chosen for a line or spans that could not be written in time."
        )
        self.ingest_events = self._counter(
            "ingest_events", "Events reported; outcome: accepted, duplicate, refused.", "outcome"
        )
        self.ingest_kinds = self._counter("ingest_kinds", "Events not refused, duplicates included.", "kind")
        self.ingest_seconds = self._histogram("ingest_seconds", "Time of a commit to the state store.")
        self.event_log_events = self._counter("event_log_events", "Events written to the event log.")
        self.event_log_lost = self._counter(
            "event_log_lost", "Events acknowledged that could not be written to the event log."
        )
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
        self.assignments_lag_seconds = self._gauge(
            "assignments_lag_seconds",
            "Age of the newest assignments taken in while there are newer ones or nobody knows; else 0.",
            "channel",
        )
        self.assignments_applied = self._counter(
            "assignments_applied", "Assignments of items to clusters taken in.", "channel"
        )
        self.assignments_resyncs = self._counter(
            "assignments_resyncs", "Times that some were missed and the table was read instead.", "channel"
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

    def count(self, answered: Answered) -> None:
        """Count what became of a batch; on the compute thread."""
        self._batches += 1
        run = answered.run
        self._tally.add(answered.scene, answered.pipeline, run, answered.seconds)
        exposure = run.batch.live.exposure if self._batches % MEASURED_BATCHES == 0 else None
        if exposure is not None:
            probes, positives, bits_set, bits = exposure.measure(self._batches)
            self.exposure_probes.inc(probes)
            self.exposure_false_positives.inc(positives)
            self.exposure_bits_set.inc(bits_set)
            self.exposure_bits.inc(bits)

    def watch(self, admission: Admission) -> None:
        """Show what an `Admission` says; it is read when the metrics are."""
        admission.on_refused = self.refused.inc
        self.in_flight.set_function(lambda: admission.in_flight)
        self.in_flight_limit.set_function(lambda: admission.limit)
        self.compute_busy.set_function(lambda: admission.busy)

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

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"recall_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"recall_{name}", text, registry=self.registry, buckets=SECONDS)


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
