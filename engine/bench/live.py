"""`recall bench live`: how long after its acknowledgement a published item is recalled, on every worker, under load."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from recall.v1 import ingest_pb2, ingest_pb2_grpc, recall_pb2, recall_pb2_grpc

from engine.bench.report import circumstances
from engine.bench.sentinel import Sentinel
from engine.client import RecallClient
from engine.config import default_config_path
from engine.core.channel import Progress
from engine.core.errors import RecallError
from engine.data.sample import sample_path
from engine.online.kernels import COMPILED

CHANNELS = {"live_geo": "geo", "live_authors": "followed_authors"}
"""The channels that must recall what is published, and the plugins that they are."""

AUTHORS = 100
"""Authors that publish by turns: an author channel takes only the newest posts of each."""

WORKERS_LOG = "workers.log"
LIMIT = 300
FIRST_ID = 10**12
PLACE = (31.2304, 121.4737)

_WATCH_SECONDS = 0.02
"""Between an answer and the next question of a watcher: part of every latency, half of it on average."""

_START_SECONDS = 300.0
_END_SECONDS = 10.0


def bench_live(
    folder: Path, rate: float, seconds: float, workers: int, load: float, progress: Progress
) -> dict[str, Any]:
    """Serve the bundled sample from several processes with one embedded store, publish, and wait for each item.

    One thread publishes, an item a call, to the workers by turns. One thread per worker asks it over and over for a
    user who is where the items are and follows their authors, and notes when each item first comes back from each
    channel. Other threads ask for random users.

    Args:
        folder: where the store is made; empty.
        rate: items published a second.
        seconds: how long.
        workers: server processes.
        load: requests of other users a second, over all workers.
        progress: told of each second.

    Returns:
        The report; latencies are from the acknowledgement to the end of the first answer that holds the item. What the
        machine did meanwhile stands beside them, as `Sentinel` finds it, and `compiled_while_serving`: kernels that a
        worker compiled, each of which holds up everything in it for a second or so.

    Raises:
        RecallError: a server does not come up.
    """
    config = folder / "live.toml"
    config.write_text(_configuration(), encoding="utf-8")
    store = folder / "store"
    progress.start("building", 1)
    _run("build", str(sample_path()), "--config", str(config), "--store", str(store))
    progress.advance()
    progress.start("starting the workers", workers)
    with ExitStack() as stack:
        targets = []
        for _ in range(workers):
            targets.append(stack.enter_context(_worker(config, store)))
            progress.advance()
        run = _Run([RecallClient(target, timeout=10.0) for target in targets], targets)
        with Sentinel() as sentinel:
            report = run.measure(rate, seconds, load, progress)
        log = (folder / WORKERS_LOG).read_text(encoding="utf-8", errors="replace")
        return circumstances() | report | sentinel.findings | {"compiled_while_serving": log.count(COMPILED)}


class _Run:
    """Publishers, watchers and load against running workers."""

    def __init__(self, clients: list[RecallClient], targets: list[str]) -> None:
        import grpc

        self._clients = clients
        channels = [grpc.insecure_channel(target) for target in targets]
        self._recall = [recall_pb2_grpc.RecallServiceStub(channel).Recall for channel in channels]  # type: ignore[no-untyped-call]
        self._ingest = [ingest_pb2_grpc.IngestServiceStub(channel) for channel in channels]  # type: ignore[no-untyped-call]
        self._acknowledged: dict[int, float] = {}
        self._seen: list[dict[tuple[str, int], float]] = [{} for _ in targets]
        self._ack_ms: list[float] = []
        self._recall_ms: list[float] = []
        self._ended = threading.Event()
        self._spent = 0.0

    def measure(self, rate: float, seconds: float, load: float, progress: Progress) -> dict[str, Any]:
        reader = 1
        follows = [
            ingest_pb2.Event(user_id=reader, follow=ingest_pb2.Follow(author_id=FIRST_ID + author))
            for author in range(AUTHORS)
        ]
        self._ingest[0].Report(ingest_pb2.ReportRequest(events=follows))
        threads = [threading.Thread(target=self._watch, args=(at, reader)) for at in range(len(self._recall))]
        if load:
            threads += [
                threading.Thread(target=self._load, args=(at, load)) for at in range(len(self._recall))
            ]
        for thread in threads:
            thread.start()
        try:
            published = self._publish(rate, seconds, progress)
            deadline = time.monotonic() + _END_SECONDS
            wanted = len(CHANNELS) * published
            while time.monotonic() < deadline and any(len(seen) < wanted for seen in self._seen):
                time.sleep(0.01)
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()
        return self._report(rate, seconds, load, published)

    def _publish(self, rate: float, seconds: float, progress: Progress) -> int:
        """Publish at the moments that are due, whether or not what came before is acknowledged."""
        progress.start("publishing", int(seconds))
        began = time.perf_counter()
        turns = itertools.cycle(self._ingest)
        count = int(rate * seconds)
        calls = []
        for n in range(count):
            time.sleep(max(0.0, began + n / rate - time.perf_counter()))
            item = ingest_pb2.Item(
                author_id=FIRST_ID + n % AUTHORS,
                latitude=PLACE[0],
                longitude=PLACE[1],
                quality=1.0,
                title=f"live {n}",
            )
            change = ingest_pb2.ItemChange(item_id=FIRST_ID + n, put=item)
            call = next(turns).UpsertItems.future(ingest_pb2.UpsertItemsRequest(changes=[change]), timeout=30)
            call.add_done_callback(partial(self._acknowledge, FIRST_ID + n, time.perf_counter()))
            calls.append(call)
            if n % max(1, int(rate)) == 0:
                progress.advance()
        if any(call.result().accepted != 1 for call in calls):
            raise RecallError("an item was refused")
        self._spent = time.perf_counter() - began
        return count

    def _acknowledge(self, item: int, sent: float, call: Any) -> None:
        now = time.perf_counter()
        if call.exception() is None:
            self._acknowledged[item] = now
            self._ack_ms.append((now - sent) * 1e3)

    def _watch(self, at: int, user: int) -> None:
        request = recall_pb2.RecallRequest(
            user_id=user,
            scene="live",
            limit=LIMIT,
            context=recall_pb2.Context(location=recall_pb2.Location(latitude=PLACE[0], longitude=PLACE[1])),
        )
        seen = self._seen[at]
        while not self._ended.wait(_WATCH_SECONDS):
            answer = self._recall[at](request)
            now = time.perf_counter()
            for candidate in answer.candidates:
                if candidate.item_id >= FIRST_ID:
                    for proposal in candidate.proposals:
                        seen.setdefault((proposal.channel, candidate.item_id), now)

    def _load(self, at: int, load: float) -> None:
        pause = len(self._recall) / load
        users = random.Random(at)
        due = time.perf_counter()
        while not self._ended.is_set():
            due += pause
            sent = time.perf_counter()
            self._recall[at](recall_pb2.RecallRequest(user_id=users.randrange(10**6)))
            self._recall_ms.append((time.perf_counter() - sent) * 1e3)
            time.sleep(max(0.0, due - time.perf_counter()))

    def _report(self, rate: float, seconds: float, load: float, published: int) -> dict[str, Any]:
        report: dict[str, Any] = {
            "rate": rate,
            "seconds": seconds,
            "workers": len(self._recall),
            "load": load,
            "published": published,
            "published_in_s": round(self._spent, 1),
            "channels": {},
        }
        for name, plugin in CHANNELS.items():
            waits = [
                # An answer may overtake the acknowledgement.
                max(0.0, seen[name, item] - acknowledged) * 1e3
                for seen in self._seen
                for item, acknowledged in self._acknowledged.items()
                if (name, item) in seen
            ]
            unseen = published * len(self._seen) - len(waits)
            report["channels"][plugin] = _percentiles(waits) | {"never_seen": unseen}
        report["acknowledged_ms"] = _percentiles(self._ack_ms)
        report["recall_ms"] = _percentiles(self._recall_ms)
        return report


def _percentiles(milliseconds: list[float]) -> dict[str, float]:
    if not milliseconds:
        return {"p50": float("nan"), "p99": float("nan"), "max": float("nan")}
    p50, p99, most = np.percentile(milliseconds, [50, 99, 100]).tolist()
    return {"p50": round(p50, 1), "p99": round(p99, 1), "max": round(most, 1)}


def _configuration() -> str:
    """Return the configuration that ships with the package, with a scene of the channels that are watched."""
    lines = [default_config_path().read_text(encoding="utf-8")]
    for name, plugin in CHANNELS.items():
        lines += [f"\n[channels.{name}]", f'type = "{plugin}"']
    lines += ["\n[scenes.live]", f"limit = {LIMIT}", "fallback = []", "\n[scenes.live.quotas]"]
    lines += [f"{name} = {LIMIT}" for name in CHANNELS]
    return "\n".join(lines) + "\n"


@contextmanager
def _worker(config: Path, store: Path) -> Iterator[str]:
    """Run `recall serve` in a process of its own; yields where it listens."""
    command = [*_RECALL, "serve", "--config", str(config), "--store", str(store), "--port", "0"]
    # Its log goes to a file: a pipe that nobody reads would fill up and stop it.
    with (config.parent / WORKERS_LOG).open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment())
    try:
        killer = threading.Timer(_START_SECONDS, process.kill)
        killer.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        killer.cancel()
        if "Serving on " not in line:
            raise RecallError(f"a worker did not come up; see {log.name}")
        yield line.split()[2].rstrip(".")
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


_RECALL = (sys.executable, "-u", "-m", "engine")


def _run(*arguments: str) -> None:
    done = subprocess.run(
        [*_RECALL, *arguments], capture_output=True, text=True, env=_environment(), check=False
    )
    if done.returncode:
        raise RecallError(f"recall {arguments[0]} failed: {done.stderr.strip().splitlines()[-1:]}")


def _environment() -> dict[str, str]:
    # The workers use the embedded store of the bench, whatever the environment names.
    return {name: value for name, value in os.environ.items() if name != "RECALL_STATE_URL"}
