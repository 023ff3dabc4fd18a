"""The Kafka feed against librdkafka's own mock cluster, which lives in a producer's process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from ingest_world import ingesting
from recall.v1 import ingest_pb2 as pb

from engine.client import IngestClient
from engine.client._ingest import IN_FLIGHT
from engine.client.kafka import KafkaFeed, decoded
from engine.state.layout import RECENT

kafka = pytest.importorskip("confluent_kafka")

FAST = {"session.timeout.ms": 3000, "heartbeat.interval.ms": 200, "log_level": 0}
"""What a consumer that is killed leaves to others soon."""


class Cluster:
    """A producer with brokers of its own."""

    def __init__(self) -> None:
        self.producer = kafka.Producer({"test.mock.num.brokers": 2, "bootstrap.servers": "", "log_level": 0})
        found = self.producer.list_topics(timeout=60).brokers.values()
        self.brokers = ",".join(str(each).split("/")[0] for each in found)


@pytest.fixture(scope="module")
def cluster():
    return Cluster()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with ingesting(tmp_path_factory.mktemp("store")) as running:
        yield running


def click(user: int, item: int, **fields) -> pb.Event:
    return pb.Event(
        user_id=user, timestamp=1000 + item, action=pb.Action(item_id=item, kind="click"), **fields
    )


def produce(cluster, topic: str, values, key: str = "k") -> None:
    for value in values:
        data = value.SerializeToString() if isinstance(value, pb.Event) else value
        cluster.producer.produce(topic, data, key=key)
    assert cluster.producer.flush(60) == 0


@contextmanager
def feeding(world, cluster, topic: str, group: str = "g", **settings):
    with IngestClient(world.target) as client:
        feed = KafkaFeed(client, cluster.brokers, topic, group, options=FAST, **settings)
        stop = threading.Event()
        failed: list[BaseException] = []

        def run() -> None:
            try:
                feed.run(stop)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield feed
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()
        assert not failed, failed


def until(true, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def items_of(world, user: int) -> list[int]:
    return [key for key, *_ in world.records(user, RECENT)]


def committed(cluster, topic: str, group: str, partitions: int) -> int:
    consumer = kafka.Consumer({"bootstrap.servers": cluster.brokers, "group.id": group, "log_level": 0})
    try:
        wanted = [kafka.TopicPartition(topic, partition) for partition in range(partitions)]
        return sum(max(0, each.offset) for each in consumer.committed(wanted, timeout=60))
    finally:
        consumer.close()


def test_messages_reach_the_store_and_positions_are_committed(world, cluster):
    produce(cluster, "plain", [click(1, n) for n in range(50)])
    with feeding(world, cluster, "plain", batch=7) as feed:
        until(lambda: feed.counts["accepted"] == 50)
    assert items_of(world, 1) == list(range(50))
    assert committed(cluster, "plain", "g", 4) == 50


def test_json_is_taken_and_what_is_neither_is_logged_with_its_position(world, cluster, caplog):
    values = [
        json.dumps({"userId": 2, "timestamp": "1001", "action": {"itemId": "1", "kind": "click"}}).encode(),
        b"\xff\xff\xff",
        b"{no json",
        None,
        click(-2, 1),
        click(2, 2),
    ]
    topic = "mixed" * 40  # too long to stand in an event id
    produce(cluster, topic, values)
    with feeding(world, cluster, topic) as feed:
        until(lambda: feed.counts["accepted"] == 2)
    assert feed.counts == {"accepted": 2, "duplicates": 0, "refused": 1, "undecodable": 3}
    assert items_of(world, 2) == [1, 2]
    said = [record.getMessage() for record in caplog.records if record.name == "engine.client.kafka"]
    assert sum("cannot be decoded" in text for text in said) == 3
    assert sum("]@4 is refused: user_id: expected 0 or more, got -2" in text for text in said) == 1
    assert committed(cluster, topic, "g", 4) == 6  # none of them holds the others up


def test_what_kafka_delivers_again_counts_once(world, cluster):
    produce(cluster, "twice", [click(3, n) for n in range(20)])
    with feeding(world, cluster, "twice", "one") as one, feeding(world, cluster, "twice", "two") as two:
        until(lambda: one.counts["accepted"] + two.counts["accepted"] == 20)
        until(lambda: one.counts["duplicates"] + two.counts["duplicates"] == 20)
    assert items_of(world, 3) == list(range(20))


def test_nothing_is_committed_while_the_store_is_away_and_nothing_is_lost(cluster, tmp_path):
    with ingesting(tmp_path, durability="always") as own, IngestClient(own.target):
        produce(cluster, "away", [click(4, n) for n in range(10)])
        own.embedded.stop()
        with feeding(own, cluster, "away", batch=2) as feed:
            time.sleep(1.5)  # several batches wait for their answers, more messages for room
            assert not feed.counts["accepted"]
            assert committed(cluster, "away", "g", 4) == 0
            own.embedded.start()
            until(lambda: feed.counts["accepted"] + feed.counts["duplicates"] == 10)
        assert items_of(own, 4) == list(range(10))


def test_partitions_move_to_a_second_consumer_and_every_message_counts_once(world, cluster):
    for n in range(40):
        produce(cluster, "shared", [click(5, n)], key=str(n))
    with feeding(world, cluster, "shared", batch=3) as first:
        until(lambda: first.counts["accepted"] == 40)
        with feeding(world, cluster, "shared", batch=3) as second:
            done = 40
            end = time.monotonic() + 90
            while not second.counts["accepted"] and time.monotonic() < end:
                for n in range(done, done + 8):
                    produce(cluster, "shared", [click(5, n)], key=str(n))
                done += 8
                time.sleep(0.1)
            assert second.counts["accepted"], "the second consumer got no partition"
            until(lambda: first.counts["accepted"] + second.counts["accepted"] == done)
    assert set(items_of(world, 5)) >= set(range(max(0, done - 100), done))
    # A commit that meets a rebalance may be refused; what is not acknowledged is never committed.
    assert 0 < committed(cluster, "shared", "g", 4) <= done


def test_a_consumer_that_was_full_when_partitions_moved_reads_on(cluster, tmp_path):
    with ingesting(tmp_path, durability="always") as own:
        own.embedded.stop()
        produce(cluster, "full", [click(6, n) for n in range(40)])
        with feeding(own, cluster, "full", batch=1) as first:
            until(lambda: len(first._sent) == IN_FLIGHT)  # its partitions are paused
            with feeding(own, cluster, "full", batch=1) as second:
                time.sleep(2)  # it gives its partitions away when the answers under way have come
                own.embedded.start()
                until(lambda: first._epochs)
                for n in range(40, 80):
                    produce(cluster, "full", [click(6, n)], key=str(n))
                until(lambda: set(items_of(own, 6)) == set(range(80)))
                assert first.counts["accepted"] > IN_FLIGHT
                assert second.counts["accepted"]


def test_a_consumer_that_is_killed_loses_nothing_and_another_one_goes_on(world, cluster):
    command = [sys.executable, "-m", "engine", "ingest", "--kafka", cluster.brokers, "--topic", "killed"]
    command += ["--group", "k", "--target", world.target, "--batch", "20"]
    for name, value in FAST.items():
        command += ["--kafka-option", f"{name}={value}"]
    total = 3000

    def stored() -> int:
        return sum(len(items_of(world, 1000 + user)) for user in range(100))

    def send(first: int, end: int) -> None:
        for n in range(first, end):  # a user's events lie in one partition
            data = click(1000 + n % 100, n).SerializeToString()
            cluster.producer.produce("killed", data, key=str(n % 100))
        assert cluster.producer.flush(60) == 0

    send(0, total // 2)
    victim, heir = (subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2))
    try:
        until(lambda: stored() > 100)
        os.kill(victim.pid, signal.SIGKILL)
        send(total // 2, total)
        until(lambda: stored() == total)
    finally:
        victim.kill()
        victim.communicate()
        os.kill(heir.pid, signal.SIGTERM)
        _, errors = heir.communicate(timeout=60)
    assert heir.returncode == 0, errors
    assert "killed: " in errors
    for user in range(100):
        assert items_of(world, 1000 + user) == list(range(user, total, 100))
    assert committed(cluster, "killed", "k", 4) == total


@pytest.mark.parametrize("value", [None, b"{", b"\x0a", b'{"user_id": "x"}', b'{"colour": 1}'])
def test_what_is_no_event_cannot_be_decoded(value):
    with pytest.raises(ValueError, match=r"it is empty|bad JSON|no serialized"):
        decoded(value)
