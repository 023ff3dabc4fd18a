"""A run: a server process of its own, cases sent by several processes, and the report."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa

from engine.client import RecallClient
from engine.data.dataset import write_dataset
from loadtest.fuzz.judging import BUSY, Tally
from loadtest.fuzz.sending import send
from loadtest.servers import ServerProcess, built

MOST_BUSY = 0.001
"""Share of the cases that a run may end without having been taken."""


def run(
    folder: Path,
    cases: int,
    seed: int = 1,
    first: int = 0,
    ids: str = "int64",
    small: bool = False,
    processes: int = 1,
    workers: int = 1,
    connections: int = 4,
    in_flight: int = 4,
    failures: Path | None = None,
) -> dict[str, Any]:
    """Build a release in a folder, serve it, and send cases `first` to `first + cases`.

    Args:
        folder: for the release, the state store and the log.
        cases: how many.
        seed: which.
        first: number of the first.
        ids: "int64" or "string".
        small: whether to serve a few hundred items instead of the bundled sample, whose ids are int64.
        processes: that send.
        workers: of the server.
        connections: of each process.
        in_flight: calls under way on each.
        failures: where the bytes of cases that fail go; None: nowhere.

    Returns:
        The report.
    """
    built(folder, small_data(folder / "data", ids) if small or ids == "string" else None)
    config = Path(__file__).parents[2] / "engine" / "recall.toml"
    server = ServerProcess(folder, config, workers=workers)
    server.start()
    tally, used = Tally(), 0.0
    try:
        server.wait_for_log(f"{workers} of {workers} workers serve")
        before = resident(server)
        began = time.monotonic()
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            shares = [range(first + n, first + cases, processes) for n in range(processes)]
            asked = [
                pool.submit(send, server.target, seed, share, connections, in_flight, failures)
                for share in shares
            ]
            for each in asked:
                part, seconds = each.result()
                tally.add(part)
                used += seconds
        spent = time.monotonic() - began
        after = resident(server)
        alive = serves(server.target)
    finally:
        server.stop()
    log = server.log_text().splitlines()
    bad = [line for line in log if " ERROR " in line or " CRITICAL " in line or line.startswith("Traceback")]
    outcomes: dict[str, Any] = {}
    for (method, kind, status), count in sorted(tally.outcomes.items()):
        outcomes.setdefault(method, {}).setdefault(kind, {})[status] = count
    return {
        "seed": seed,
        "first": first,
        "cases": tally.outcomes.total(),
        "ids": ids,
        "seconds": round(spent, 1),
        "cases_per_second": round(tally.outcomes.total() / spent, 1),
        "client_cpu_microseconds_per_case": round(used / max(tally.outcomes.total(), 1) * 1e6, 1),
        "failed": tally.failed,
        "failures": tally.failures,
        "serves_afterwards": alive,
        "errors_in_the_log": len(bad),
        "first_errors_in_the_log": bad[:10],
        "resident_bytes": {"before": before, "after": after},
        "statuses": _by_status(tally),
        "outcomes": outcomes,
    }


def passed(report: dict[str, Any]) -> bool:
    """Whether a run found nothing."""
    busy = sum(report["statuses"][status] for status in BUSY)
    sound = not report["failed"] and not report["errors_in_the_log"] and busy <= MOST_BUSY * report["cases"]
    return sound and bool(report["serves_afterwards"])


def _by_status(tally: Tally) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (_method, _kind, status), count in tally.outcomes.items():
        counts[status] += count
    return counts


def serves(target: str) -> bool:
    """Whether a server answers an ordinary request."""
    try:
        with RecallClient(target, timeout=10.0) as client:
            client.wait_ready(10.0)
            return bool(client.recall(limit=10).candidates)
    except (grpc.RpcError, TimeoutError):
        return False


def resident(server: ServerProcess) -> int:
    """Resident bytes of a server and the processes it has started; 0 where the system does not say."""
    total, waiting = 0, [server.pid]
    page = os.sysconf("SC_PAGE_SIZE")
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            total += int((process / "statm").read_text().split()[1]) * page
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, IndexError):
            continue
    return total


def small_data(folder: Path, ids: str) -> Path:
    """Write a small data set whose ids are of a type, and return its folder."""
    draw = random.Random(1)
    rows = [(draw.randrange(60), draw.randrange(200)) for _ in range(2_000)]
    columns = {
        "user_id": [user if ids == "int64" else f"user-{user}" for user, _ in rows],
        "item_id": [item if ids == "int64" else f"item-{item}" for _, item in rows],
        "event": ["click"] * len(rows),
        "timestamp": [1_700_000_000 + n for n in range(len(rows))],
    }
    write_dataset(folder, pa.table(columns), meta={"name": "small", "id_type": ids})
    return folder
