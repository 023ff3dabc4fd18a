"""Metrics: one registry per server, answered over HTTP, and an address that is taken is one sentence."""

from __future__ import annotations

import socket
from urllib.request import urlopen

import pytest

from engine.core.errors import ConfigError
from engine.online.metrics import Metrics


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.ingest_events.labels("accepted").inc(3)
    assert first.registry.get_sample_value("recall_ingest_events_total", {"outcome": "accepted"}) == 3
    assert second.registry.get_sample_value("recall_ingest_events_total", {"outcome": "accepted"}) is None


def test_they_are_answered_over_http() -> None:
    metrics = Metrics()
    metrics.ingest_kinds.labels("follow").inc(7)
    server = metrics.serve("127.0.0.1", 0)
    try:
        with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    finally:
        server.close()
    assert 'recall_ingest_kinds_total{kind="follow"} 7.0' in text
    assert "recall_log_lag_seconds 0.0" in text


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"server.metrics_port: cannot listen on 127.0.0.1:{port}: "):
            Metrics().serve("127.0.0.1", port)
