"""What SIGKILLs of workers cost: only requests in flight on the dead one, and with the clients' retries none.

    python -m loadtest.worker_kills --kills 20 --workers 2

Workers are killed at random while several connections recall without pause, half of the kills with clients that do not
try again and half with clients that do, as they do by default. Prints JSON: what became of the requests, how many were
in flight, on all workers, in the moments of the kills, and when those that failed had been sent; exit status 1 if one
failed in spite of retries.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import select
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.sample import sample_path
from loadtest.servers import ServerProcess, two_releases, without_shedding
from loadtest.traffic import OK, Call, Traffic


def run(
    folder: Path, kills: int, workers: int, per_second: float = 200.0, data: Path | None = None
) -> dict[str, Any]:
    """Kill workers under load; return what became of it."""
    store, users = two_releases(folder / "store", data or sample_path())
    config_file = folder / "kills.toml"
    config_file.write_text(without_shedding())
    server = ServerProcess(store.root, config_file, workers=workers)
    server.start()
    draw = random.Random(1)
    report: dict[str, Any] = {"workers": workers}
    recovery: list[float] = []
    starts = workers
    try:
        server.wait_for_log(f"{workers} of {workers} workers serve")
        for name, retry, count in (
            ("without_retry", False, kills // 2),
            ("with_retry", True, kills - kills // 2),
        ):
            with Traffic(server.target, users, per_second=per_second, timeout=30.0, retry=retry) as traffic:
                in_flight = 0
                deaths: list[tuple[float, float]] = []
                for _ in range(count):
                    traffic.wait_for(50)
                    victim = draw.choice(server.worker_pids())
                    began = time.monotonic()
                    in_flight += traffic.in_flight
                    deaths.append((began, kill(victim)))
                    starts += 1
                    server.wait_for_log(" serves release ", starts)
                    recovery.append(time.monotonic() - began)
                traffic.wait_for(50)
            report[name] = {
                "kills": count,
                "in_flight_at_kills": in_flight,
                **traffic.summary(),
                **sent_when([call for call in traffic.calls if call.status != OK], deaths),
            }
    finally:
        server.stop()
    report["seconds_until_replaced"] = [round(each, 1) for each in recovery]
    return report


def kill(pid: int) -> float:
    """SIGKILL a process; return when it had ended, its sockets closed (`time.monotonic()`)."""
    if not hasattr(os, "pidfd_open"):  # then when its parent has heard of it, which is a little later
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, 0)
                time.sleep(0.001)
        return time.monotonic()
    handle = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        select.select([handle], [], [])
        return time.monotonic()
    finally:
        os.close(handle)


def sent_when(failed: Sequence[Call], deaths: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Tell when calls that failed had been sent.

    Args:
        failed: the calls.
        deaths: when each victim was killed, and when it had ended; rising.

    Returns:
        sent_before_kill, sent_while_it_died, sent_later: calls; sent_later_ms_most: how long after the end, at most.
    """
    counts = Counter[str](sent_before_kill=0, sent_while_it_died=0, sent_later=0)
    latest = 0.0
    for call in failed:
        killed, ended = max(
            (death for death in deaths if death[0] <= call.ended), default=(math.inf, math.inf)
        )
        if call.began <= killed:
            counts["sent_before_kill"] += 1
        elif call.began <= ended:
            counts["sent_while_it_died"] += 1
        else:
            counts["sent_later"] += 1
            latest = max(latest, call.began - ended)
    return {**counts, "sent_later_ms_most": round(latest * 1000, 1)}


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--per-second", type=float, default=200.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recall-worker-kills-") as folder:
        report = run(Path(folder), arguments.kills, arguments.workers, arguments.per_second)
    print(json.dumps(report, indent=2))
    raise SystemExit(1 if report["with_retry"]["failed"] else 0)


if __name__ == "__main__":
    main()
