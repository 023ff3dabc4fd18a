"""What SIGKILLs of workers cost: only requests in flight on the dead one, and with the clients' retries none.

    python -m loadtest.worker_kills --kills 20 --workers 2

Workers are killed at random while several connections recall without pause, half of the kills with clients that do not
try again and half with clients that do, as they do by default. Prints JSON: what became of the requests, and how many
were in flight, on all workers, in the moments of the kills; exit status 1 if one failed in spite of retries.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.data.sample import sample_path
from loadtest.servers import ServerProcess, two_releases, without_shedding
from loadtest.traffic import Traffic


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
                for _ in range(count):
                    traffic.wait_for(50)
                    victim = draw.choice(server.worker_pids())
                    began = time.monotonic()
                    in_flight += traffic.in_flight
                    os.kill(victim, signal.SIGKILL)
                    starts += 1
                    server.wait_for_log(" serves release ", starts)
                    recovery.append(time.monotonic() - began)
                traffic.wait_for(50)
            report[name] = {"kills": count, "in_flight_at_kills": in_flight, **traffic.summary()}
    finally:
        server.stop()
    report["seconds_until_replaced"] = [round(each, 1) for each in recovery]
    return report


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
