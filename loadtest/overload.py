"""Three times what the server can do: `python -m loadtest.overload` prints one JSON object.

A server of the bundled sample runs on one core, the client on another. The peak is what a closed loop gets answered. Then
an open loop sends a multiple of it: goodput is what is answered of that, p99 from the moment that a request is due. Once
without steps of degrading, once with those of `recall bench serve`. `per_cpu_s` is what is answered per second of the
server's CPU time: where other work shares its core, this is what can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from recall.v1 import recall_pb2 as pb

from engine.bench.http2 import Load, Samples, send
from engine.bench.serve import DEGRADE_STEPS
from engine.config import DegradeStep, load_config
from engine.data.snapshot import SnapshotStore
from engine.online.replica import Replica
from engine.online.server import serve
from engine.online.service import METHOD
from loadtest.servers import built

LIMIT = 500
USERS = 500
CLOSED = 32
"""Requests in flight while the peak is measured: two batches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--factor", type=float, default=3.0, help="of the peak")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recall-overload-") as name:
        built(Path(name))
        rounds = [_round(Path(name), options.factor, options.seconds) for _ in range(options.rounds)]
    keys = rounds[0].keys()
    print(
        json.dumps(
            {key: statistics.median(each[key] for each in rounds) for key in keys} | {"rounds": rounds}
        )
    )


def _round(store: Path, factor: float, seconds: float) -> dict[str, float]:
    messages = [pb.RecallRequest(user_id=user, limit=LIMIT).SerializeToString() for user in range(USERS)]
    report: dict[str, float] = {}
    peak = 0.0
    for name, steps in (("plain", ()), ("degrading", DEGRADE_STEPS)):
        with _server(store, steps) as (port, process):
            if not steps:
                closed, per_cpu_s = _send(
                    process, Load(port, METHOD, messages, in_flight=CLOSED, seconds=seconds, warm_up=0.0)
                )
                peak = closed.rate
                report |= {"peak": peak, "peak_per_cpu_s": per_cpu_s}
                report |= {"peak_p99_ms": closed.percentiles()["p99_ms"]}
            load = Load(port, METHOD, messages, rate=factor * peak, seconds=seconds, warm_up=0.0)
            over, per_cpu_s = _send(process, load)
        report |= {f"{name}_{key}": value for key, value in _said(over, peak).items()}
        report |= {f"{name}_per_cpu_s": per_cpu_s}
    return {key: round(value, 3) for key, value in report.items()}


def _send(process: int, load: Load) -> tuple[Samples, float]:
    """Send a load; also returns how many requests were answered per second of CPU time."""
    before = _cpu_seconds(process)
    samples = send(load)
    return samples, samples.rate * samples.seconds / (_cpu_seconds(process) - before)


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _said(over: Samples, peak: float) -> dict[str, float]:
    refused = over.waits[~over.answered & np.isfinite(over.waits)]
    return {
        "goodput": over.rate,
        "goodput_of_peak": over.rate / peak,
        **over.percentiles(),
        "refused": refused.size / over.seconds,
        "refused_p50_ms": float(np.median(refused)) * 1e3 if refused.size else 0.0,
        "never_answered": float(np.isnan(over.waits).sum()) / over.seconds,
        "mean_bytes": float(over.sizes[over.answered].mean()) if over.answered.any() else 0.0,
        "client_late_ms": over.late * 1e3,
    }


@contextmanager
def _server(store: Path, steps: tuple[DegradeStep, ...]) -> Iterator[tuple[int, int]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    cores = sorted(os.sched_getaffinity(0))
    process = context.Process(target=_serve, args=(store, steps, theirs, cores[0]), daemon=True)
    process.start()
    os.sched_setaffinity(0, cores[-1:])
    try:
        assert process.pid is not None
        yield ours.recv(), process.pid
    finally:
        os.sched_setaffinity(0, cores)
        process.terminate()
        process.join()


def _serve(store: Path, steps: tuple[DegradeStep, ...], ready: Connection, core: int) -> None:
    os.sched_setaffinity(0, {core})
    shipped = load_config()
    scene = shipped.scenes["default"].model_copy(update={"degrade": steps})
    server = shipped.server.model_copy(update={"port": 0})
    config = shipped.model_copy(update={"scenes": {"default": scene}, "server": server})
    replica = Replica.open(config, SnapshotStore(store), verify=False)
    asyncio.run(serve(config, replica, ready.send))


if __name__ == "__main__":
    main()
