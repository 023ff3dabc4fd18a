"""Metrics of several processes on one page, which stays valid."""

from __future__ import annotations

import socket
from collections import Counter as Count
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine.core.errors import ConfigError
from engine.online.exposition import MetricsPage, merged


def page_of(value: float) -> str:
    registry = CollectorRegistry()
    Counter("recall_requests", "Requests.", ("scene",), registry=registry).labels('a"} b{').inc(value)
    Gauge("recall_lag", "Lag, with a \\ and\na line.", registry=registry).set(value)
    Histogram("recall_seconds", "Time.", registry=registry, buckets=(1.0, 2.0)).observe(value)
    return generate_latest(registry).decode()


def test_each_sample_says_its_worker_and_each_family_stands_once():
    own = CollectorRegistry()
    Gauge("recall_workers", "Workers.", registry=own).set(2)
    text = merged(generate_latest(own).decode(), {"0": page_of(1.0), "1": page_of(5.0)})
    heads = Count(line for line in text.splitlines() if line.startswith("#"))
    assert set(heads.values()) == {1}
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["recall_workers", ()] == 2
    assert samples["recall_lag", (("worker", "0"),)] == 1
    assert samples["recall_lag", (("worker", "1"),)] == 5
    assert samples["recall_requests_total", (("scene", 'a"} b{'), ("worker", "1"))] == 5
    assert samples["recall_seconds_bucket", (("le", "2.0"), ("worker", "0"))] == 1
    assert samples["recall_seconds_bucket", (("le", "2.0"), ("worker", "1"))] == 0
    # Every sample follows its own family's head.
    family = ""
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            family = line.split()[2]
        elif not line.startswith("#"):
            assert line.startswith(family)


def test_the_page_is_answered_over_http_and_says_when_it_cannot_be():
    texts = ["recall_a 1.0\n"]
    page = MetricsPage("127.0.0.1", 0, lambda: texts[0])
    try:
        with urlopen(f"http://127.0.0.1:{page.port}/metrics", timeout=60) as answer:
            assert answer.read() == b"recall_a 1.0\n"
            assert answer.headers["Content-Type"].startswith("text/plain")
        texts.clear()
        with pytest.raises(HTTPError) as refused:
            urlopen(f"http://127.0.0.1:{page.port}/metrics", timeout=60)
        refused.value.close()
        assert refused.value.code == 503
    finally:
        page.close()


def test_a_taken_port_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"server.metrics_port: cannot listen on 127.0.0.1:{port}: "):
            MetricsPage("127.0.0.1", port, str)
