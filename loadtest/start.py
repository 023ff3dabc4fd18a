"""How long a server takes to its first answer, and the memory of several workers against one.

    python -m loadtest.start --items 1000000 --workers 1 4

A made-up world (that of `recall bench pipeline`, built once and kept in its cache) is served by `recall serve`, with a
state store. Prints JSON per number of workers: seconds to SERVING, and the most memory in MB of 2^20 bytes
while recalls of random users were answered. PSS counts a page that processes share in equal parts, `private` what
belongs to one alone, `rss` counts shared pages in each. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from engine import console
from engine.bench.world import made_up_world
from engine.config import load_config
from engine.core.channel import SilentProgress
from engine.data.snapshot import SnapshotStore
from engine.offline.cache import cached_store
from loadtest.servers import ServerProcess, own_folder, with_options
from loadtest.traffic import Traffic


class Memory:
    """Looks at the memory of some processes every half second while the context lasts.

    Attributes:
        most: per process and kind, the most that was seen.
        most_pss: the most of all processes together at a time.
    """

    def __init__(self, pids: list[int]) -> None:
        self.most: dict[int, dict[str, float]] = {pid: {} for pid in pids}
        self.most_pss = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            ending = self._stop.wait(0.5)
            now = {pid: memory_of(pid) for pid in self.most}
            self.most_pss = max(self.most_pss, sum(found["pss"] for found in now.values()))
            for pid, found in now.items():
                for kind, value in found.items():
                    self.most[pid][kind] = max(value, self.most[pid].get(kind, 0.0))
            if ending:
                return


def memory_of(pid: int) -> dict[str, float]:
    """Return the rss, pss, private and anonymous memory (no file's) of a process in MB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {name: int(value) / 1024 for name, value in re.findall(r"(?m)^(\w+): +(\d+) kB$", text)}
    return {
        "rss": found["Rss"],
        "pss": found["Pss"],
        "private": found["Private_Clean"] + found["Private_Dirty"],
        "anonymous": found["Anonymous"],
    }


def seconds_until(log: str, text: str, began: datetime) -> float:
    """Return the seconds from a moment to the first line of the log with a text: interpreter and imports count."""
    line = next(line for line in log.splitlines() if text in line)
    return round((datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f") - began).total_seconds(), 1)


def run(folder: Path, world: SnapshotStore, users: list[int], workers: int, requests: int) -> dict[str, Any]:
    """Serve the world with so many workers; return how long the start took and the memory."""
    store = own_folder(world, folder / f"store-{workers}")
    config = folder / "start.toml"
    config.write_text(with_options(("server", "reload_seconds", 0.0)))
    server = ServerProcess(store, config, workers=workers)
    began = datetime.now()
    try:
        server.start()
        server.wait_for_log(f"{workers} of {workers} workers serve")
        pids = server.worker_pids()
        with (
            Memory([server.pid, *pids]) as memory,
            Traffic(server.target, users, connections=4 * workers, per_second=400, timeout=30) as traffic,
        ):
            traffic.wait_for(requests, patience=600)
    finally:
        server.stop()
    of_workers = [memory.most[pid] for pid in pids]
    return {
        "workers": workers,
        "seconds_to_first_serving": seconds_until(server.log_text(), " serves release ", began),
        "seconds_to_all_serving": seconds_until(server.log_text(), " workers serve after ", began),
        "most_pss_all_mb": round(memory.most_pss),
        "supervisor_private_mb": round(memory.most[server.pid]["private"]),
        "worker_private_mb": [round(each["private"]) for each in of_workers],
        "worker_rss_mb": [round(each["rss"]) for each in of_workers],
        "recalls": traffic.answered.total(),
        "failed": dict(traffic.failed),
        "start": [line[24:] for line in server.log_text().splitlines() if re.search(r" after | in \d", line)],
    }


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, default=4000)
    arguments = parser.parse_args()
    config = load_config()
    store = cached_store(console.cache_folder() / "worlds", "pipeline")
    channels = list(config.scenes["default"].quotas)
    world = made_up_world(config, channels, arguments.items, 500, store, SilentProgress())
    index = world.replica().catalogue.users
    draw = np.random.default_rng(1).integers(0, len(index), 2000).astype(np.int32)
    users = index.ids(draw).tolist()
    size = sum(file.stat().st_size for path in world.snapshots().values() for file in path.path.glob("*.npy"))
    report: dict[str, Any] = {"items": arguments.items, "arrays_mb": round(size / 2**20)}
    with tempfile.TemporaryDirectory(prefix="recall-start-") as folder:
        report["runs"] = [
            run(Path(folder), store, users, workers, arguments.requests) for workers in arguments.workers
        ]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
