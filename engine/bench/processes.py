"""Processes of `recall bench serve`: server, echo, client and the baseline's store, each on the core it is given."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engine.bench.echo import answer_questions, serve_echo
from engine.bench.http2 import Load, Samples, send_for
from engine.bench.kernels import bench_kernels, timed_kernels
from engine.bench.world import World
from engine.core.errors import ConfigError, RecallError
from engine.online.server import Server
from engine.online.state import open_state
from engine.state.embedded import server_binary

RECALL = "/recall.v1.RecallService/Recall"

_START_SECONDS = 300.0


class Running:
    """A process under load, and what it has used.

    Attributes:
        pid: of the process.
        port: where it listens, on 127.0.0.1.
    """

    def __init__(self, pid: int, port: int, connection: Connection | None = None) -> None:
        self.pid = pid
        self.port = port
        self._connection = connection

    def cpu(self) -> float:
        """Seconds of processor time that all its threads have used."""
        # The clock of another process's CPU time, as clock_getcpuclockid(3) makes it from a pid.
        return time.clock_gettime(~self.pid << 3 | 2)

    def resident_mb(self) -> float:
        """Memory that it has of its own, mapped snapshots not counted: VmRSS less RssFile."""
        kilobytes = {"VmRSS": 0, "RssFile": 0}
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in kilobytes:
                kilobytes[name] = int(value.split()[0])
        return (kilobytes["VmRSS"] - kilobytes["RssFile"]) / 1024

    def ask(self, *question: Any) -> Any:
        """Ask the process something, and wait for the answer."""
        assert self._connection is not None
        self._connection.send(question)
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def cores() -> tuple[int, int, int]:
    """Return which cores the server, the client and the state store get; on two, client and store share one.

    Raises:
        ConfigError: this is not Linux, or there is one core alone.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("`recall bench serve` pins processes to cores, which needs Linux")
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise ConfigError("`recall bench serve` needs two cores: one for the server, one for its client")
    return usable[0], usable[1], usable[2 % len(usable)] if len(usable) > 2 else usable[1]


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Run this thread on one core; processes that it starts meanwhile stay there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def server(world: World, core: int) -> Iterator[Running]:
    """Serve a world from one process, on a store that runs already in the folder of `world.config.store`."""
    with _spawned(_serve, (world,), core) as running:
        yield running


@contextmanager
def echo(size: int, core: int) -> Iterator[Running]:
    """Run the smallest grpc.aio server: it answers every call with the same `size` bytes."""
    with _spawned(serve_echo, (size,), core) as running:
        yield running


@contextmanager
def baseline(redis_url: str, core: int) -> Iterator[Running]:
    """Run `loadtest.baseline` on what was exported to a Redis."""
    with pinned(core):
        process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.baseline", "--redis", redis_url],
            stdout=subprocess.PIPE,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.strip().isdigit():
            raise RecallError("the baseline did not start; what it said stands above")
        yield Running(process.pid, int(line))
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def plain_redis(core: int) -> Iterator[str]:
    """Run a Valkey or Redis that keeps nothing on disk, and empty; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="recall-baseline-") as folder:
        path = f"{folder}/redis.sock"
        command = [os.fspath(server_binary()), "--port", "0", "--unixsocket", path, "--save", ""]
        command += ["--appendonly", "no", "--dir", folder]
        with pinned(core):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 30
            while not os.path.exists(path):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RecallError("the store of the baseline did not start")
                time.sleep(0.01)
            yield f"unix://{path}"
        finally:
            process.terminate()
            process.wait(30)


def drive(load: Load, core: int, mark: Callable[[], None]) -> Samples:
    """Send a load from a process of its own.

    Args:
        load: what to send.
        core: where the client runs.
        mark: called when the measurement begins and when it ends.

    Raises:
        RecallError: the client fails.
    """
    with ExitStack() as stack:
        process, connection = _start(send_for, (load,), core, stack)
        try:
            start, end = connection.recv()
            for moment in (start, end):
                time.sleep(max(0.0, moment - time.perf_counter()))
                mark()
            samples = connection.recv()
        except EOFError as error:
            raise RecallError("the client failed; what it said stands above") from error
        process.join(30)
    if isinstance(samples, Exception):
        raise RecallError(f"the client failed: {samples}")
    assert isinstance(samples, Samples)
    return samples


# --- what runs in the processes ------------------------------------------------------------------


def _serve(connection: Connection, world: World) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's; its end of the connection closes then
    with open_state(world.config) as state:
        replica = world.replica(state)
        instance = None

        async def run() -> None:
            nonlocal instance
            instance = Server(world.config, replica, state)
            port = await instance.start()
            gc.collect()
            gc.freeze()  # as a worker does
            connection.send(port)
            try:
                await asyncio.to_thread(answer_questions, connection, counts, kernels, threads, clocks)
            finally:
                await instance.stop(0)

        def counts() -> dict[str, float]:
            metrics = instance.metrics.registry if instance is not None else None
            assert metrics is not None
            return {
                "requests": metrics.get_sample_value("recall_requests_total", {"scene": "default"}) or 0.0,
                "batches": metrics.get_sample_value("recall_state_read_seconds_count") or 0.0,
                "blind": metrics.get_sample_value("recall_state_unavailable_total") or 0.0,
            }

        def kernels(messages: Sequence[bytes], batch: int) -> dict[str, Any]:
            return bench_kernels(replica, world.config, messages, batch)

        def threads() -> dict[int, str]:
            return {thread.native_id or 0: thread.name for thread in threading.enumerate()}

        timing = ExitStack()
        spent: dict[str, tuple[float, int]] = {}

        def clocks(on: bool) -> dict[str, tuple[float, int]]:
            nonlocal spent
            timing.close()
            so_far, spent = spent, {}
            if on:
                spent = timing.enter_context(timed_kernels())
            return so_far

        asyncio.run(run())


@contextmanager
def _spawned(target: Callable[..., None], arguments: tuple[Any, ...], core: int) -> Iterator[Running]:
    with ExitStack() as stack:
        process, connection = _start(target, arguments, core, stack)
        if not connection.poll(_START_SECONDS):
            raise RecallError("a server did not start in time")
        try:
            port = int(connection.recv())
        except EOFError as error:
            raise RecallError("a server did not start; what it said stands above") from error
        assert process.pid is not None
        yield Running(process.pid, port, connection)


def _start(
    target: Callable[..., None], arguments: tuple[Any, ...], core: int, stack: ExitStack
) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Start a process that gets one end of a connection; the other end closes, and it is waited for, with the stack."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *arguments), daemon=True)
    with pinned(core):
        process.start()
    there.close()

    def end() -> None:
        here.close()
        process.join(30)
        if process.is_alive():
            process.kill()
            process.join()

    stack.callback(end)
    return process, here
