"""An hour at half load: the memory of the server's processes must stay where it is.

    python -m loadtest.soak --minutes 60

A closed loop measures what the server can do; then half of that is asked for in an open loop, over connections that are
made anew every half minute, while reports come in and items change. Supervisor and workers are looked at every few
seconds. Prints JSON; exit status 1 if, after the warm-up, the last tenth of the time needs over 2 % more resident memory
than the first, a process was replaced, or a report was lost. The state store grows with its data and is told apart.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from recall.v1 import recall_pb2 as pb

from engine import console
from engine.bench.http2 import Load, Samples, send
from engine.bench.world import made_up_world
from engine.client import Action, Event, Exposure, IngestClient, Item
from engine.config import load_config
from engine.core.channel import SilentProgress
from engine.offline.cache import cached_store
from engine.online.service import METHOD
from loadtest.servers import ServerProcess, built, own_folder, some_users, with_options
from loadtest.start import memory_of

FLAT = 0.02
"""Promised: the memory of the last window is so much above that of the first at most."""

WINDOW = 0.1
"""Share of the time after the warm-up that a window has."""

SEGMENT_SECONDS = 30.0
SHOWN = 10
"""Items of an answer that are reported as exposed; one of them is clicked."""

LIMIT = 300
_IN_FLIGHT = 32
_MESSAGES = 2000
_KEPT = 240
"""Samples in the report at most."""


@dataclass
class Reports:
    """What became of the reports.

    Attributes:
        outcomes: calls by status.
        events: acknowledged.
        changes: of items, acknowledged.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    events: int = 0
    changes: int = 0


def report(
    target: str, users: list[int], items: list[int], rate: float, stop: threading.Event, reports: Reports
) -> None:
    """Report exposures and clicks of random users, `rate` calls a second, and once a second a change of an item."""
    draw = random.Random(1)
    began = time.monotonic()
    calls = changed = 0
    with IngestClient(target) as client:
        while not stop.wait(max(0.0, began + calls / rate - time.monotonic())):
            calls += 1
            user, shown = draw.choice(users), draw.sample(items, min(SHOWN, len(items)))
            events = [Event(user, Exposure(shown)), Event(user, Action(shown[0], "click"))]
            try:
                reports.events += client.report(events).accepted
                reports.outcomes["OK"] += 1
                if time.monotonic() - began > changed:
                    changed += 1
                    change = Item(draw.choice(items), published_at=int(time.time()), quality=draw.random())
                    reports.changes += client.upsert_items([change]).accepted
            except grpc.RpcError as error:
                reports.outcomes[error.code().name] += 1  # type: ignore[attr-defined]


def ask(connection: Connection, load: Load, until: float) -> None:
    """Send a load again and again until a moment of `time.monotonic()`; tells of each turn.

    In a process of its own.
    """
    while (left := until - time.monotonic()) > 1.0:
        connection.send(said(send(Load(**{**vars(load), "seconds": min(load.seconds, left)}))))
    connection.close()


def said(samples: Samples) -> dict[str, float]:
    """Return what became of a load's requests."""
    came = np.isfinite(samples.waits)
    return {
        "answered": float(samples.answered.sum()),
        "refused": float((came & ~samples.answered).sum()),
        "never_answered": float((~came).sum()),
        "p99_ms": samples.percentiles()["p99_ms"],
    }


def flatness(moments: list[float], values: list[float], warm_up: float) -> dict[str, float]:
    """Return the slope (per hour) of a series after the warm-up, and its means in the first and the last window.

    Args:
        moments: seconds from the beginning, rising.
        values: at each.
        warm_up: seconds that do not count.
    """
    at, value = np.array(moments), np.array(values)
    counted = at >= warm_up
    at, value = at[counted], value[counted]
    width = WINDOW * (at[-1] - at[0])
    first = float(value[at <= at[0] + width].mean())
    last = float(value[at >= at[-1] - width].mean())
    slope = float(np.polyfit(at, value, 1)[0]) * 3600 if at.size > 1 else 0.0
    return {
        "first_mb": round(first, 1),
        "last_mb": round(last, 1),
        "growth": round(last / first - 1, 5),
        "slope_mb_an_hour": round(slope, 2),
        "most_mb": round(float(value.max()), 1),
    }


def run(
    server: ServerProcess,
    store_pid: int,
    users: list[int],
    items: list[int],
    minutes: float,
    warm_up: float,
    every: float,
    share: float,
    reports_per_second: float,
) -> dict[str, Any]:
    """Load a server that runs, and look at its memory.

    Args:
        server: the server.
        store_pid: the process of its state store.
        users: who is asked for and reported of.
        items: that are reported.
        minutes: how long, the warm-up included.
        warm_up: minutes of these that do not count.
        every: seconds between looks.
        share: of the measured peak that is asked for.
        reports_per_second: calls, of one exposure of ten items and one click.
    """
    port = int(server.target.rpartition(":")[2])
    messages = [pb.RecallRequest(user_id=user, limit=LIMIT).SerializeToString() for user in users]
    peak = send(Load(port, METHOD, messages, in_flight=_IN_FLIGHT, seconds=5.0, warm_up=2.0)).rate
    load = Load(port, METHOD, messages, rate=share * peak, seconds=SEGMENT_SECONDS, warm_up=0.0)
    pids = {"supervisor": server.pid} | {f"worker {n}": pid for n, pid in enumerate(server.worker_pids())}
    reports, stop = Reports(), threading.Event()
    reporter = threading.Thread(
        target=report, args=(server.target, users, items, reports_per_second, stop, reports)
    )
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    began = time.monotonic()
    asker = context.Process(target=ask, args=(theirs, load, began + 60 * minutes), daemon=True)
    asker.start()
    theirs.close()
    reporter.start()
    moments: list[float] = []
    series: dict[str, list[float]] = {}
    turns: list[dict[str, float]] = []
    gone: list[str] = []
    try:
        while (now := time.monotonic() - began) < 60 * minutes and not gone:
            looks: dict[str, dict[str, float]] = {}
            for name, pid in {**pids, "state store": store_pid}.items():
                try:
                    looks[name] = memory_of(pid)
                except (FileNotFoundError, ProcessLookupError):
                    gone.append(name)
            if not gone:
                moments.append(now)
                for name, look in looks.items():
                    series.setdefault(name, []).append(look["rss"])
                for kind in ("rss", "pss", "anonymous"):
                    series.setdefault(kind, []).append(sum(looks[name][kind] for name in pids))
            turns += _told(ours)
            time.sleep(every)
    finally:
        stop.set()
        reporter.join()
        if gone:
            asker.terminate()
        asker.join()
        turns += _told(ours)
    thin = max(1, len(moments) // _KEPT)
    memory = {name: flatness(moments, values, 60 * warm_up) for name, values in series.items()}
    refused = reports.outcomes.total() - reports.outcomes["OK"]
    grown = memory["rss"]["growth"]
    broken = [f"the {name} died" for name in gone]
    broken += [f"resident memory grew by {grown:.1%}"] if grown > FLAT else []
    broken += [f"{refused} reports failed: {dict(reports.outcomes)}"] if refused else []
    return {
        "minutes": minutes,
        "warm_up_minutes": warm_up,
        "peak_per_second": round(peak, 1),
        "asked_per_second": round(load.rate, 1),
        **{
            name: round(sum(turn[name] for turn in turns))
            for name in ("answered", "refused", "never_answered")
        },
        "p99_ms_median": round(float(np.nanmedian([turn["p99_ms"] for turn in turns])), 1) if turns else None,
        "events_acknowledged": reports.events,
        "item_changes_acknowledged": reports.changes,
        "memory": memory,
        "samples": {
            "seconds": [round(moment) for moment in moments[::thin]],
            "rss_mb": [round(value, 1) for value in series["rss"][::thin]],
            "state_store_mb": [round(value, 1) for value in series["state store"][::thin]],
        },
        "broken": broken,
    }


def _told(connection: Connection) -> list[dict[str, float]]:
    told = []
    try:
        while connection.poll():
            told.append(connection.recv())
    except EOFError:
        pass
    return told


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="the warm-up included")
    parser.add_argument("--warm-up", type=float, help="minutes that do not count; default: a sixth")
    parser.add_argument(
        "--items", type=int, default=0, help="of a made-up world; default: the bundled sample"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.5, help="of the measured peak")
    parser.add_argument(
        "--reports", type=float, default=20.0, help="calls a second, of an exposure and a click"
    )
    parser.add_argument("--every", type=float, default=5.0, help="seconds between looks")
    arguments = parser.parse_args()
    warm_up = arguments.minutes / 6 if arguments.warm_up is None else arguments.warm_up
    with tempfile.TemporaryDirectory(prefix="recall-soak-") as name:
        folder = Path(name)
        config = load_config()
        if arguments.items:
            cache = cached_store(console.cache_folder() / "worlds", "pipeline")
            channels = list(config.scenes["default"].quotas)
            made_up_world(config, channels, arguments.items, 500, cache, SilentProgress())
            root = own_folder(cache, folder / "store")
            config = config.model_copy(update={"store": config.store.model_copy(update={"path": root})})
        else:
            config = built(folder / "store")
        users = some_users(config, _MESSAGES)
        config_file = folder / "soak.toml"
        config_file.write_text(with_options(("server", "reload_seconds", 0.0)))
        server = ServerProcess(config.store.path, config_file, workers=arguments.workers)
        try:
            server.start()
            server.wait_for_log(f"{arguments.workers} of {arguments.workers} workers serve")
            with server.client() as client:
                items = [int(id_) for id_ in client.recall(limit=1000).item_ids]
            store_pid = int((config.store.path / "state" / "store.pid").read_text())
            found = run(
                server, store_pid, users, items, arguments.minutes, warm_up, arguments.every, arguments.share,
                arguments.reports,
            )  # fmt: skip
        finally:
            server.stop()
    print(json.dumps({"items": arguments.items, "workers": arguments.workers, **found}, indent=2))
    raise SystemExit(1 if found["broken"] else 0)


if __name__ == "__main__":
    main()
