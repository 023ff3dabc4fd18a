"""Real servers for the tests of the state store: embedded, Debian's redis-server, a cluster, TLS."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.core.errors import StateError, StateUnavailableError
from engine.state.embedded import server_binary
from engine.state.store import StateStore


def redis_server() -> Path:
    """The distribution's redis-server; skips the test where there is none."""
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("redis-server is not on PATH (Debian: apt-get install redis-server)")
    return Path(found)


def free_ports(count: int) -> list[int]:
    """Ports that the system gave out just now, all at once so that they differ; a cluster's have room for its bus."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            one = held.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            ports.append(one.getsockname()[1])
        return ports


@contextlib.contextmanager
def server(binary: Path, folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server of the test's own, ended with it."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [str(binary), "--save", "", "--dir", str(folder), "--logfile", str(folder / "log"), *options],
        env={**os.environ, "LC_ALL": "C"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def connected(url: str, timeout_ms: float = 2000.0) -> StateStore:
    """The store behind a URL, as soon as it answers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return StateStore.connect(url, "test", timeout_ms)
        except StateUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """Three nodes that share the slots; yields the URL."""
    binary = server_binary()
    for _ in range(5):  # the bus may meet a port that somebody took meanwhile
        ports, buses = free_ports(3), free_ports(3)
        with contextlib.ExitStack() as running:
            processes = [
                running.enter_context(
                    server(
                        binary,
                        folder / str(port),
                        *("--port", str(port), "--cluster-enabled", "yes", "--cluster-port", str(bus)),
                        *("--appendonly", "yes", "--bind", "127.0.0.1"),
                    )
                )
                for port, bus in zip(ports, buses, strict=True)
            ]
            time.sleep(0.2)
            if any(process.poll() is not None for process in processes):
                continue
            nodes = [connected(f"redis://127.0.0.1:{port}") for port in ports]
            for at, node in enumerate(nodes):
                node.execute("CLUSTER", "ADDSLOTSRANGE", 16384 * at // 3, 16384 * (at + 1) // 3 - 1)
                node.execute("CLUSTER", "SET-CONFIG-EPOCH", at + 1)
            for port, bus in zip(ports[1:], buses[1:], strict=True):
                nodes[0].execute("CLUSTER", "MEET", "127.0.0.1", port, bus)
            deadline = time.monotonic() + 60
            while not all(
                b"cluster_state:ok" in node.execute("CLUSTER", "INFO") for node in nodes
            ) or not all(len(node.execute("CLUSTER", "SLOTS")) == 3 for node in nodes):
                if time.monotonic() > deadline:
                    raise StateError("the test's cluster does not come up")
                time.sleep(0.05)
            for node in nodes:
                node.close()
            yield f"redis+cluster://127.0.0.1:{ports[0]}"
            return
    pytest.skip("no free ports for a cluster")
