"""The load client against a real gRPC server: what it counts is what the server did."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import grpc
import numpy as np
import pytest

from engine.bench import h2load
from engine.bench.http2 import Load, send

PATH = "/test.Sizes/Answer"


class Sizes:
    """Answers a request of n in text with n bytes; refuses a request of "no"."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._lock = Lock()

    def answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        with self._lock:
            self.asked.append(request)
        if request == b"no":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return bytes(int(request))


@pytest.fixture
def sizes():
    service = Sizes()
    server = grpc.server(ThreadPoolExecutor(4))
    handler = grpc.unary_unary_rpc_method_handler(service.answer)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Sizes", {"Answer": handler}),)
    )
    service.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service
    server.stop(0).wait()


def test_a_closed_loop_counts_every_answer_and_draws_from_all_messages(sizes):
    messages = [b"0", b"10", b"70000", b"3000000"]  # none, one frame, several, more than an HTTP/2 window
    load = Load(sizes.port, PATH, messages, connections=3, in_flight=6, seconds=0.5, warm_up=0.1)
    samples = send(load)
    assert samples.answered.all()
    assert samples.completed == samples.answered.size > 0
    assert set(sizes.asked) == set(messages)  # the first seven drawn are all of them
    assert set(samples.sizes.tolist()) <= {5 + int(each) for each in messages}
    assert (samples.waits > 0).all()
    assert samples.rate == samples.completed / samples.seconds


def test_a_call_that_ends_without_a_message_counts_as_refused(sizes):
    load = Load(sizes.port, PATH, [b"1", b"no"], connections=1, in_flight=4, seconds=0.3, warm_up=0.05)
    samples = send(load)
    assert 0 < samples.answered.mean() < 1
    assert samples.completed == samples.answered.sum()
    assert (samples.sizes[~samples.answered] == 0).all()


def test_an_open_loop_sends_when_requests_are_due(sizes):
    load = Load(sizes.port, PATH, [b"5"], connections=2, rate=200.0, seconds=0.5, warm_up=0.1)
    samples = send(load)
    assert samples.waits.size == pytest.approx(100, abs=2)
    assert samples.answered.all()
    assert np.isfinite(samples.waits).all()
    assert samples.delays.size == samples.waits.size
    assert (samples.delays >= 0).all()
    assert (samples.delays < samples.waits).all()
    assert 0 < samples.p99_from_sent_ms() <= samples.percentiles()["p99_ms"]


def test_a_server_that_goes_away_is_an_error(sizes):
    with pytest.raises(ConnectionError):
        send(Load(1, PATH, [b"1"]))


@pytest.mark.skipif(not h2load.installed(), reason="h2load is not installed (nghttp2)")
def test_h2load_sends_a_message_of_each_process_and_its_logs_are_put_together(sizes):
    marks: list[int] = []
    messages = [b"1", b"20", b"300"]
    samples = h2load.send(sizes.port, PATH, messages, 6, 0.5, 0.2, lambda: marks.append(len(sizes.asked)))
    assert set(sizes.asked) == set(messages)
    assert samples.answered.all()
    assert marks[1] > marks[0] > 0
    assert 0 < samples.completed <= len(sizes.asked)
