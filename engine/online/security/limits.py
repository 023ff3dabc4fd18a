"""Limits of connections, messages and pings, and of streams on which nothing comes."""

from __future__ import annotations

import asyncio
from typing import Any

from engine.config import Config


def options(config: Config) -> list[tuple[str, Any]]:
    """Return the channel arguments of a server: its limits, and what it bears of pings."""
    limits = config.security
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        # A response is bounded by max_limit.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_concurrent_streams", limits.max_streams),
        # Between the two gRPC refuses at random; equal, they are one limit.
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        ("grpc.server_handshake_timeout_ms", round(limits.handshake_seconds * 1000)),
        ("grpc.max_connection_idle_ms", round(limits.idle_seconds * 1000)),
        # A peer that died behind a silent network would hold its connection for ever.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Clients may ask every 10 s whether we live (by default twice in 5 minutes is too much); who asks more often
        # is cut off at the third time.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


class IdleWatch:
    """Cancels the task that makes it once nothing was heard of its caller for so long, at most twice as long.

    To be heard costs an attribute, as it happens with every message of a stream.

    Attributes:
        alive: set it whenever the caller is heard.
        reason: why the task was cancelled; empty where that was not done from here.
    """

    def __init__(self, seconds: float) -> None:
        """Begin to watch the current task."""
        self.alive = True
        self.reason = ""
        self._seconds = seconds
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def end(self) -> None:
        """Watch no longer."""
        self._timer.cancel()

    def _look(self) -> None:
        if self.alive or self._task is None:
            self.alive = False
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)
        else:
            self.reason = f"nothing came on the stream for {self._seconds:g} s"
            self._task.cancel()
