"""What is told of single requests: a line in the log, and spans in the caller's trace.

A thread of its own writes both, of the requests that a sample or the caller chose; what it cannot take in time is
dropped.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.config import TelemetryConfig
from engine.core.candidates import ChannelStatus, FilterStatus
from engine.core.errors import ConfigError
from engine.online.answered import Answered
from engine.online.notes import Notes

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)

requests_log = logging.getLogger("recall.requests")
"""Gets one line of JSON per request that is logged."""

MOST_WAITING = 1000
"""Requests that wait to be written; a batch stays in memory as long as one of its requests waits."""

TRACEPARENT = "traceparent"
"""The metadata key of the caller's trace context, https://www.w3.org/TR/trace-context/."""

_SAMPLED = 1

_Note = tuple[Answered, int, bool]


def sampled_trace(metadata: Any) -> str:
    """Return the caller's `traceparent` where it wants the request traced, else "".

    Args:
        metadata: of the call, pairs of key and value; None where there is none.
    """
    for key, value in metadata or ():
        if key == TRACEPARENT:
            flags = value.rsplit("-", 1)[-1] if isinstance(value, str) else ""
            return value if len(flags) == 2 and _is_sampled(flags) else ""
    return ""


def _is_sampled(flags: str) -> bool:
    try:
        return bool(int(flags, 16) & _SAMPLED)
    except ValueError:
        return False


class Telemetry:
    """Writes lines and spans.

    Attributes:
        traces: whether callers' trace contexts are wanted.
    """

    def __init__(
        self,
        config: TelemetryConfig,
        dropped: Callable[[int], None],
        draw: Callable[[], float] | None = None,
    ) -> None:
        """Begin.

        Args:
            config: what is logged, and where spans go.
            dropped: told of requests that were chosen and could not be written.
            draw: draws evenly from [0, 1); a random generator of its own where not given.

        Raises:
            ConfigError: spans are wanted and OpenTelemetry is not installed.
        """
        self._config = config
        self._draw = random.Random().random if draw is None else draw
        self._slow = config.slow_ms / 1000
        self._provider = _provider(config.traces) if config.traces else None
        self.traces = self._provider is not None
        self._tracer = None if self._provider is None else self._provider.get_tracer("recall")
        self._notes: Notes[_Note] = Notes("telemetry", self._write, dropped, MOST_WAITING)

    def note(self, answered: Answered) -> None:
        """Choose what is written of a batch; on the compute thread."""
        if not (self._slow or self._config.request_log or self.traces):
            return
        for q, seconds in enumerate(answered.seconds):
            logged = bool(self._slow and seconds >= self._slow) or self._draw() < self._config.request_log
            if logged or answered.traces[q]:
                self._notes.put((answered, q, logged))

    def close(self, patience: float | None = None) -> None:
        """Write what waits, at most `patience` seconds long, and stop."""
        self._notes.close(patience)
        if self._provider is not None:
            self._provider.shutdown()

    def _write(self, notes: Sequence[_Note]) -> None:
        for answered, q, logged in notes:
            if logged:
                requests_log.info("%s", json.dumps(line(answered, q)))
            if self._tracer is not None and answered.traces[q]:
                _trace(self._tracer, answered, q)


def line(answered: Answered, q: int) -> dict[str, Any]:
    """Return what is logged of one request; docs/operations.md lists the fields."""
    run, request = answered.run, answered.run.requests[q]
    merged = run.merged
    micro = [int(value) for value in run.channel_us.tolist()]
    kept = merged.kept[:, q].tolist()
    return {
        "request_id": answered.request_ids[q],
        "scene": answered.scene,
        "user": request.user_id,
        "limit": int(run.limits[q]),
        "candidates": 0 if q in run.refused else int(merged.offsets[q + 1] - merged.offsets[q]),
        "refused": str(run.refused[q]) if q in run.refused else "",
        "degraded": run.degraded,
        "history": int(run.batch.history.offsets[q + 1] - run.batch.history.offsets[q]),
        "milliseconds": round((answered.ended - answered.came[q]) * 1000, 3),
        "waited_milliseconds": round((answered.began - answered.came[q]) * 1000, 3),
        "batch": len(run.requests),
        "stages_microseconds": {name: int(spent) for name, spent in run.stage_us.items()},
        "channels": {
            name: {
                "status": ChannelStatus(int(run.status[c, q])).name,
                "returned": int(run.returned[c, q]),
                "kept": kept[c] if c < len(kept) else 0,
                "microseconds": micro[c],
                **({"message": run.messages[c, q]} if (c, q) in run.messages else {}),
            }
            for c, name in enumerate(answered.pipeline.channel_names)
        },
        "filters": {
            name: int(run.removed[f, q])
            if run.filter_status[f, q] == FilterStatus.OK
            else FilterStatus(int(run.filter_status[f, q])).name
            for f, name in enumerate(answered.pipeline.filter_names)
        },
        "release": answered.release,
        "traceparent": answered.traces[q],
    }


def _provider(endpoint: str) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            "spans need OpenTelemetry: install recall-engine[traces]", "telemetry.traces"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "recall"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


def _trace(tracer: Tracer, answered: Answered, q: int) -> None:
    """Make the spans of one request: the whole, the wait, each stage, each channel inside the fan-out."""
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    run = answered.run
    epoch = time.time() - time.monotonic()

    def moment(monotonic: float) -> int:
        return int((epoch + monotonic) * 1e9)

    parent = TraceContextTextMapPropagator().extract({TRACEPARENT: answered.traces[q]})
    whole = tracer.start_span(
        "Recall", context=parent, kind=SpanKind.SERVER, start_time=moment(answered.came[q])
    )
    whole.set_attributes(
        {
            "recall.scene": answered.scene,
            "recall.request_id": answered.request_ids[q],
            "recall.batch": len(run.requests),
            "recall.degraded": run.degraded,
            "recall.candidates": int(run.merged.offsets[q + 1] - run.merged.offsets[q]),
        }
    )
    inside = set_span_in_context(whole)

    def part(name: str, begin: float, seconds: float, context: Any, status: str = "") -> Span:
        span = tracer.start_span(name, context=context, start_time=moment(begin))
        if status:
            span.set_attribute("recall.status", status)
        span.end(moment(begin + seconds))
        return span

    names = answered.pipeline.channel_names
    main = len(answered.pipeline.scene.quotas)
    asked = {"fan_out": range(main), "fill": range(main, len(names))}
    part("queue", answered.came[q], answered.began - answered.came[q], inside)
    at = answered.began
    for name, spent in run.stage_us.items():
        stage = part(name, at, spent / 1e6, inside)
        begin = at
        for c in asked.get(name, ()):
            status = ChannelStatus(int(run.status[c, q]))
            if status not in (ChannelStatus.SKIPPED, ChannelStatus.GATED):
                # One after another; one that runs beside the others stands where it was waited for.
                seconds = run.channel_us[c] / 1e6
                part(f"channel {names[c]}", begin, seconds, set_span_in_context(stage), status.name)
                begin += seconds
        at += spent / 1e6
    part("encode", at, answered.ended - at, inside)
    whole.end(moment(answered.ended))
