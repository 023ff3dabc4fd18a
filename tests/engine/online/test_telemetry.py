"""What is told of requests: counts of a batch, lines in the log, spans in the caller's trace."""

from __future__ import annotations

import json
import logging
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from online_world import make_world, serving
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import Histogram
from prometheus_client.core import CollectorRegistry
from recall.v1 import recall_pb2 as pb

from engine.config import TelemetryConfig
from engine.core.candidates import ChannelStatus, FilterStatus
from engine.online.answered import Answered
from engine.online.metrics import Metrics
from engine.online.notes import Notes
from engine.online.recalls import _recalled
from engine.online.request import Request
from engine.online.tally import BATCHES, SECONDS, Histograms, _count
from engine.online.telemetry import Telemetry, line, sampled_trace

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01"


def answered(world, *requests, seconds=0.25):
    pipeline = world.replica.pipelines["default"]
    run = pipeline.run(list(requests))
    n = len(requests)
    ids = [f"r{q}" for q in range(n)]
    return Answered(
        "default", pipeline, run, "r-1", ids, [""] * n, [1.0] * n, 1.0 + seconds / 2, 1.0 + seconds
    )


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


@given(values=st.lists(st.floats(0, 10), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_histograms_are_those_of_prometheus(values):
    bounds = (0.1, 0.5, 1.0, 2.5)
    registry = CollectorRegistry()
    theirs = Histogram("h", "", registry=registry, buckets=bounds)
    ours = Histograms(2, bounds)
    for each in values:
        theirs.observe(each)
        for row in (0, 1):
            ours.add(row, each)
    ours.add(1, math.nan)
    wanted = [
        registry.get_sample_value("h_bucket", {"le": le}) for le in ("0.1", "0.5", "1.0", "2.5", "+Inf")
    ]
    for row in (0, 1):
        assert [count for _, count in ours.buckets(row)] == wanted
        assert ours.sums[row] == pytest.approx(sum(values))


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_a_pass_over_a_batch_counts_what_numpy_counts(seed):
    rng = np.random.default_rng(seed)
    n, c, main, f = rng.integers(1, 5), rng.integers(1, 5), rng.integers(1, 4), rng.integers(0, 3)
    main = min(main, c)
    offsets = np.concatenate(([0], np.cumsum(rng.integers(0, 4, n))))
    limits = rng.integers(1, 4, n).astype(np.int32)
    status = rng.integers(1, 7, (c, n)).astype(np.int32)
    returned = rng.integers(0, 9, (c, n)).astype(np.int32)
    kept = rng.integers(0, 9, (main, n)).astype(np.int32)
    removed = rng.integers(0, 9, (f, n)).astype(np.int32)
    judged = rng.integers(0, 3, (f, n)).astype(np.int32)
    requests, stages, channel_us = rng.random(n), rng.random(2) * 1e5, rng.random(c) * 1e5
    answers, channels, filters = np.zeros(3, np.int64), np.zeros((c, 9), np.int64), np.zeros((f, 2), np.int64)
    seconds, batch = Histograms(1 + 2 + int(c), SECONDS), Histograms(1, BATCHES)
    step, degraded = int(rng.integers(0, 3)), np.zeros(3, np.int64)
    _count(
        offsets, limits, status, returned, kept, removed, judged, requests, stages, channel_us, answers, channels,
        filters, step, degraded, batch.bounds, batch.counts, batch.sums, seconds.bounds, seconds.counts, seconds.sums,
    )  # fmt: skip
    lengths = np.diff(offsets)
    assert degraded.tolist() == [n if at == step else 0 for at in range(3)]
    assert dict(batch.buckets(0)) == {"+Inf": 1} | {str(bound): n <= bound for bound in BATCHES}
    assert answers.tolist() == [n, (lengths == 0).sum(), (lengths < limits).sum()]
    assert channels[:, 0].tolist() == returned.sum(1).tolist()
    assert channels[:main, 1].tolist() == kept.sum(1).tolist()
    for value in range(1, 7):
        assert channels[:, 2 + value].tolist() == (status == value).sum(1).tolist()
    assert (
        filters.tolist()
        == np.stack((removed.sum(1), (judged == FilterStatus.UNAVAILABLE).sum(1)), 1).tolist()
    )
    asked = ~np.isin(status, (ChannelStatus.SKIPPED, ChannelStatus.GATED)).all(1)
    expected = [requests.sum(), *(stages / 1e6), *np.where(asked, channel_us / 1e6, 0)]
    assert seconds.sums == pytest.approx(expected)
    assert seconds.counts.sum(1).tolist() == [n, 1, 1, *asked.astype(int).tolist()]


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_what_a_channel_that_counts_proposed_is_noted(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 5, 3)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    rows, keys = rng.integers(0, 100, offsets[-1]).astype(np.int32), rng.integers(0, 1 << 60, 100)
    proposal_offsets = np.concatenate(([0], np.cumsum(rng.integers(1, 4, rows.size)))).astype(np.int64)
    channels = rng.integers(0, 3, proposal_offsets[-1]).astype(np.int32)
    counts = rng.random(3) < 0.5
    out, ends = np.empty(rows.size, np.int64), np.empty(4, np.int64)
    _recalled(offsets, rows, proposal_offsets, channels, counts, keys, out, ends)
    for q in range(3):
        expected = [
            int(keys[rows[i]])
            for i in range(offsets[q], offsets[q + 1])
            if counts[channels[proposal_offsets[i] : proposal_offsets[i + 1]]].any()
        ]
        assert out[ends[q] : ends[q + 1]].tolist() == expected


def test_a_batch_is_counted(world):
    metrics = Metrics()
    one = answered(world, Request(user_id=1), Request(user_id=2), Request(limit=3))
    metrics.count(one)
    metrics.count(answered(world, Request(user_id=1, quotas={"crowd": 0})))
    assert value(metrics, "recall_requests_total", scene="default") == 4
    assert value(metrics, "recall_request_seconds_count", scene="default") == 4
    assert value(metrics, "recall_request_seconds_bucket", scene="default", le="0.1") == 0
    assert value(metrics, "recall_request_seconds_bucket", scene="default", le="0.25") == 4
    assert value(metrics, "recall_batch_size_bucket", scene="default", le="2.0") == 1
    assert value(metrics, "recall_batch_size_sum", scene="default") == 4
    run = one.run
    for c, name in enumerate(("similar", "crowd", "top")):
        labels = {"scene": "default", "channel": name}
        asked = 2 if name != "crowd" else 1
        assert value(metrics, "recall_channel_seconds_count", **labels) == asked
        assert value(metrics, "recall_channel_returned_total", **labels) >= run.returned[c].sum()
    labels = {"scene": "default", "channel": "crowd"}
    assert value(metrics, "recall_channel_status_total", **labels, status="skipped") == 1
    statuses = [
        value(metrics, "recall_channel_status_total", **labels, status=s) for s in ("ok", "empty", "gated")
    ]
    assert sum(statuses) == 3
    assert value(metrics, "recall_stage_seconds_count", scene="default", stage="merge") == 2
    assert (
        value(metrics, "recall_filter_removed_total", scene="default", filter="seen") == run.removed[0].sum()
    )
    lengths = np.diff(run.merged.offsets)
    assert value(metrics, "recall_answers_short_total", scene="default") >= np.count_nonzero(
        lengths < run.limits
    )


def test_a_line_says_what_became_of_a_request(world):
    one = answered(world, Request(user_id=1), Request())
    told = json.loads(json.dumps(line(one, 0)))
    assert (told["request_id"], told["user"], told["scene"], told["release"]) == ("r0", 1, "default", "r-1")
    assert told["candidates"] == one.run.merged.offsets[1]
    assert (told["milliseconds"], told["waited_milliseconds"], told["batch"]) == (250.0, 125.0, 2)
    assert told["channels"]["similar"]["status"] == "OK"
    assert told["channels"]["similar"]["returned"] == one.run.returned[0, 0]
    assert set(told["filters"]) == {"seen", "excluded"}
    assert json.loads(json.dumps(line(one, 1)))["user"] is None


def test_slow_requests_and_a_share_are_logged(world, caplog):
    fast, slow = answered(world, Request(), seconds=0.01), answered(world, Request(), seconds=0.3)
    draws = iter([0.4, 0.6])
    telemetry = Telemetry(
        TelemetryConfig(slow_ms=200.0, request_log=0.5), lambda _: None, lambda: next(draws)
    )
    with caplog.at_level(logging.INFO, "recall.requests"):
        for each in (slow, fast, fast):
            telemetry.note(each)
        telemetry.close(10)
    times = [json.loads(record.getMessage())["milliseconds"] for record in caplog.records]
    assert times == [300.0, 10.0]


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        (None, ""),
        ((("other", "x"),), ""),
        ((("traceparent", SAMPLED),), SAMPLED),
        ((("traceparent", SAMPLED[:-2] + "00"),), ""),
        ((("traceparent", "nonsense"),), ""),
        ((("traceparent", "00-a-b-zz"),), ""),
    ],
)
def test_only_sampled_traces_are_followed(metadata, wanted):
    assert sampled_trace(metadata) == wanted


class Collector(BaseHTTPRequestHandler):
    """Takes spans as an OTLP collector does."""

    spans: ClassVar[list] = []

    def do_POST(self):  # http.server's name
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


async def test_a_sampled_call_becomes_spans_in_the_callers_trace():
    Collector.spans = []
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    try:
        traced = TelemetryConfig(traces=f"http://127.0.0.1:{collector.server_port}/v1/traces")
        world = make_world()
        world.config = world.config.model_copy(update={"telemetry": traced})
        async with serving(world) as client:
            stub = client._channel.unary_unary("/recall.v1.RecallService/Recall")
            request = pb.RecallRequest(user_id=1, request_id="seen").SerializeToString()
            await stub(request, metadata=(("traceparent", SAMPLED),))
            await stub(request, metadata=(("traceparent", SAMPLED[:-2] + "00"),))
            await stub(request)
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    names = [span.name for span in Collector.spans]
    assert names.count("Recall") == 1
    assert {"queue", "hydrate", "fan_out", "mask", "merge", "fill", "encode", "channel similar"} <= set(names)
    assert {span.trace_id.hex() for span in Collector.spans} == {TRACE}
    spans = {span.name: span for span in Collector.spans}
    assert spans["Recall"].parent_span_id.hex() == "b7ad6b7169203331"
    assert spans["channel similar"].parent_span_id == spans["fan_out"].span_id
    for span in Collector.spans:
        assert spans["Recall"].start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano


def test_notes_are_bounded_and_a_failure_ends_nothing(caplog):
    handled, dropped, go = [], [], threading.Event()

    def handle(notes):
        go.wait(60)
        if "bad" in notes:
            raise RuntimeError("on purpose")
        handled.extend(notes)

    notes = Notes("some", handle, dropped.append, most=3)
    for text in ("bad", "a", "b", "c", "d"):
        notes.put(text)
    assert 1 <= sum(dropped) <= 2  # the thread may have taken the first already
    go.set()
    notes.close(60)
    assert "could not be handled" in caplog.text
    late = Notes("more", handled.extend, dropped.append)
    late.put("e")
    late.close(60)
    assert handled[-1] == "e"
