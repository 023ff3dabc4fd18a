"""From a Kafka topic to the ingest service, at least once: the extra `kafka`.

A message is a serialized `recall.v1.Event`, or the same in protobuf's JSON form. Its position is committed to Kafka only
when the server has acknowledged it; one without an event_id gets its position as such, so that what Kafka delivers
again counts once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from recall.v1 import ingest_pb2 as pb

from engine.client._ingest import IN_FLIGHT, EventStream, IngestClient
from engine.core.errors import ConfigError

log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.2
"""How long one wait for messages or answers may last: how soon a stop is seen, too."""

_BUSY_SECONDS = 0.01
"""The same while answers are awaited."""

_DRAIN_SECONDS = 10.0
"""How long what is under way may take when partitions are taken away, or at the end."""

_MAX_EVENT_ID_BYTES = 64


@dataclass(slots=True)
class _Sent:
    """A batch under way: where each event came from, and where every partition stands behind it."""

    positions: list[tuple[int, int]]
    behind: dict[int, int]
    epochs: dict[int, int]


class KafkaFeed:
    """Feeds a topic to a server.

    Attributes:
        counts: messages by outcome: accepted, duplicates, refused, undecodable.
    """

    def __init__(
        self,
        client: IngestClient,
        brokers: str,
        topic: str,
        group: str,
        *,
        batch: int = 1000,
        patience: float = float("inf"),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a consumer; it joins the group when run.

        Args:
            client: of the server.
            brokers: "host:port", several with commas between them.
            topic: read from its beginning where the group has no position yet.
            group: consumers of one group share the partitions.
            batch: messages sent together at most.
            patience: seconds that the server may be unavailable before `run` gives up.
            options: more settings of librdkafka: security, for example.

        Raises:
            ConfigError: the extra is not installed, or librdkafka refuses a setting.
        """
        try:
            import confluent_kafka as kafka
        except ImportError as error:
            text = "Kafka needs the package confluent-kafka: pip install 'recall-engine[kafka]'"
            raise ConfigError(text) from error
        settings = {
            "bootstrap.servers": brokers,
            "group.id": group,
            "auto.offset.reset": "earliest",
            # Positions are stored here when the server has acknowledged; librdkafka commits what is stored: now and
            # then, when partitions are taken away, and on close.
            "enable.auto.commit": True,
            "auto.commit.interval.ms": 1000,
            "enable.auto.offset.store": False,
            **(options or {}),
        }
        try:
            self._consumer = kafka.Consumer(settings, logger=log)
        except (kafka.KafkaException, ValueError, TypeError) as error:
            raise ConfigError(f"Kafka: {_said(error)}") from error
        self._kafka = kafka
        self._client = client
        self._topic = topic
        self._id_prefix = _id_prefix(topic)
        self._batch = batch
        self._patience = patience
        self._sent: dict[int, _Sent] = {}
        self._numbers = 0
        self._epochs: Counter[int] = Counter()
        self._paused = False
        self._held: list[Any] = []
        self.counts: Counter[str] = Counter()

    def run(self, stop: threading.Event) -> None:
        """Feed until told to stop; then wait for the answers under way, commit, and leave the group.

        Args:
            stop: ends it when set.

        Raises:
            grpc.RpcError, ConnectionError: the server stayed unavailable for longer than patience lasts.
            KafkaFailedError: Kafka cannot be used any more.
        """
        try:
            with self._client.open_stream(patience=self._patience) as stream:

                def on_revoke(consumer: Any, partitions: Sequence[Any]) -> None:
                    del consumer
                    self._drain(stream)
                    self._part_with(partitions)

                self._consumer.subscribe([self._topic], on_revoke=on_revoke, on_lost=self._on_lost)
                while not stop.is_set():
                    self._step(stream)
                self._drain(stream)
        finally:
            self._consumer.close()

    def _step(self, stream: EventStream) -> None:
        """Take messages where there is room for them, and answers where there are any."""
        if stream.pending < IN_FLIGHT:
            self._pause(False)
            wait = _BUSY_SECONDS if stream.pending else _WAIT_SECONDS
            messages = self._held or self._consumer.consume(self._batch, wait)
            self._held = []
            self._send(messages, stream)
            while self._receive(stream, 0):
                pass
        else:
            # The consumer must be asked all the same, or Kafka takes it for dead.
            self._pause(True)
            message = self._consumer.poll(0)
            if message is not None:  # of a partition that was assigned since
                self._held.append(message)
            self._receive(stream, _WAIT_SECONDS)

    def _send(self, messages: Sequence[Any], stream: EventStream) -> None:
        events: list[pb.Event] = []
        sent = _Sent([], {}, {})
        for message in messages:
            if message.error() is not None:
                self._complain(message.error())
                continue
            partition, offset = message.partition(), message.offset()
            sent.behind[partition] = offset + 1
            sent.epochs[partition] = self._epochs[partition]
            try:
                event = decoded(message.value())
            except ValueError as error:
                self.counts["undecodable"] += 1
                log.warning("%s[%d]@%d cannot be decoded: %s", self._topic, partition, offset, error)
                continue
            if not event.event_id:
                event.event_id = f"{self._id_prefix}-{partition}-{offset}"
            events.append(event)
            sent.positions.append((partition, offset))
        if sent.behind:
            # A batch of nothing but undecodable messages goes too: its positions wait their turn behind the others.
            self._numbers += 1
            self._sent[self._numbers] = sent
            stream.send(self._numbers, events)

    def _receive(self, stream: EventStream, timeout: float) -> bool:
        answer = stream.receive(timeout)
        if answer is None:
            return False
        sent = self._sent.pop(answer.offset)
        self.counts["accepted"] += answer.accepted
        self.counts["duplicates"] += answer.duplicates
        self.counts["refused"] += len(answer.refused)
        for refusal in answer.refused:
            partition, offset = sent.positions[refusal.index]
            log.warning(
                "%s[%d]@%d is refused: %s: %s", self._topic, partition, offset, refusal.field, refusal.reason
            )
        offsets = [
            self._kafka.TopicPartition(self._topic, partition, offset)
            for partition, offset in sent.behind.items()
            if sent.epochs[partition] == self._epochs[partition]
        ]
        if offsets:
            try:
                self._consumer.store_offsets(offsets=offsets)
            except self._kafka.KafkaException as error:  # no longer ours
                log.info("positions are not committed: %s", _said(error))
        return True

    def _drain(self, stream: EventStream) -> None:
        """Wait for the answers under way, though not for ever."""
        end = time.monotonic() + _DRAIN_SECONDS
        while stream.pending and (left := end - time.monotonic()) > 0:
            self._receive(stream, left)

    def _on_lost(self, consumer: Any, partitions: Sequence[Any]) -> None:
        """Partitions went to others without our doing."""
        del consumer
        self._part_with(partitions)

    def _part_with(self, partitions: Sequence[Any]) -> None:
        """See that nothing of theirs is committed by us any more, and that they can be read should they come back."""
        self._epochs.update(each.partition for each in partitions)
        # A partition that leaves while it is paused is still paused when it comes back, and in between cannot be resumed.
        self._pause(False)

    def _pause(self, wanted: bool) -> None:
        if wanted != self._paused:
            assigned = self._consumer.assignment()
            (self._consumer.pause if wanted else self._consumer.resume)(assigned)
            self._paused = wanted

    def _complain(self, error: Any) -> None:
        if error.fatal():
            raise KafkaFailedError(f"Kafka: {error.str()}")
        log.warning("Kafka: %s", error.str())


class KafkaFailedError(ConnectionError):
    """Kafka cannot be used any more; the text is librdkafka's."""


def decoded(value: bytes | None) -> pb.Event:
    """Return the event of a message.

    Raises:
        ValueError: it is none.
    """
    if value is None:
        raise ValueError("it is empty")
    # No serialized event begins with a brace: that would be a group, of a field that there is not.
    if value[:1] == b"{":
        try:
            return json_format.Parse(value, pb.Event())
        except json_format.ParseError as error:
            raise ValueError(f"bad JSON: {str(error)[:200]}") from error
    try:
        return pb.Event.FromString(value)
    except DecodeError as error:
        raise ValueError("it is no serialized recall.v1.Event") from error


def _id_prefix(topic: str) -> str:
    room = _MAX_EVENT_ID_BYTES - len("-2147483647-9223372036854775807")
    return topic if len(topic) <= room else blake2b(topic.encode(), digest_size=16).hexdigest()


def _said(error: Exception) -> str:
    first = error.args[0] if error.args else error
    return str(first.str() if hasattr(first, "str") else first)
