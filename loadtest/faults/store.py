"""The state store, a server of its own, is killed, hangs, refuses writes, or has no memory left, under load."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.errors import StateError
from engine.state.embedded import server_binary
from engine.state.store import StateStore
from loadtest.faults.load import RECOVERY_SECONDS, Load, Report
from loadtest.servers import ServerProcess, built, free_port, some_users, with_options
from loadtest.traffic import OK

_START_SECONDS = 30.0
_SETTLE_SECONDS = RECOVERY_SECONDS + 1.0
_IN_TIME_SECONDS = 0.05
"""After the fault began: what the store had answered already may still be on its way."""
_ANSWER_SECONDS = 30.0
"""How much longer a fault lasts on a machine so busy that no recall, or no report, has been answered in its time."""


class OwnStore:
    """A state store on a port of the loopback that nobody starts again but its owner; each write goes to its disk."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Start it, and wait until it has loaded its data and answers."""
        options = {
            "port": self._port,
            "bind": "127.0.0.1",
            "dir": self._folder,
            "save": "",
            "logfile": "store.log",
        }
        options |= {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        command = [str(server_binary())]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        self._process = subprocess.Popen(
            command, cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.wait()

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                StateStore.connect(self.url, "", 1000.0).close()
                return
            except StateError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def execute(self, *command: str | int) -> Any:
        """Run one command."""
        store = StateStore.connect(self.url, "", 1000.0)
        try:
            return store.execute(*command)
        finally:
            store.close()

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass(frozen=True)
class Fault:
    """What is done to the store.

    Attributes:
        reads_fail: whether users cannot be read meanwhile, so that every answer must say so.
    """

    reads_fail: bool

    def begin(self, store: OwnStore) -> None:
        """Break it."""
        raise NotImplementedError

    def end(self, store: OwnStore) -> None:
        """Mend it; returns when the store answers."""
        raise NotImplementedError


class Killed(Fault):
    """SIGKILL; later it is started again, and loads its data."""

    def begin(self, store: OwnStore) -> None:
        store.kill()

    def end(self, store: OwnStore) -> None:
        store.start()


class Hanging(Fault):
    """SIGSTOP: connections stay open, new ones are taken by the system, and nothing answers."""

    def begin(self, store: OwnStore) -> None:
        store.send(signal.SIGSTOP)

    def end(self, store: OwnStore) -> None:
        store.send(signal.SIGCONT)
        store.wait()


class ReadOnly(Fault):
    """It becomes the replica of a server that is not there: it answers reads and refuses writes."""

    def begin(self, store: OwnStore) -> None:
        store.execute("REPLICAOF", "127.0.0.1", 1)

    def end(self, store: OwnStore) -> None:
        store.execute("REPLICAOF", "NO", "ONE")


class OutOfMemory(Fault):
    """It may use less memory than it does, and may forget nothing."""

    def begin(self, store: OwnStore) -> None:
        store.execute("CONFIG", "SET", "maxmemory", 1)

    def end(self, store: OwnStore) -> None:
        store.execute("CONFIG", "SET", "maxmemory", 0)


FAULTS = {
    "store-killed": Killed(reads_fail=True),
    "store-hanging": Hanging(reads_fail=True),
    "store-read-only": ReadOnly(reads_fail=False),
    "store-out-of-memory": OutOfMemory(reads_fail=False),
}


def run(
    folder: Path,
    names: Sequence[str],
    seconds: float,
    per_second: float,
    workers: int = 1,
    data: Path | None = None,
    recovery: float = RECOVERY_SECONDS,
    settle: float = _SETTLE_SECONDS,
) -> dict[str, Report]:
    """Serve a data set and make some of `FAULTS`, one after the other, each for some seconds.

    Args:
        folder: empty.
        names: which.
        seconds: of each.
        per_second: recalls.
        workers: of the server.
        data: the data set; None: the bundled sample.
        recovery: seconds after its return by which the store must be in use again, and that a call may take; more than
            is promised where the machine has other work.
        settle: seconds that load goes on after the store is in use again.
    """
    config = built(folder / "store", data)
    store = OwnStore(folder / "data")
    store.start()
    config_file = folder / "faults.toml"
    config_file.write_text(with_options(("server", "max_limit", 100_000), ("state", "url", store.url)))
    server = ServerProcess(folder / "store", config_file, workers=workers)
    reports = {}
    try:
        server.start()
        server.wait_for_log(f"{workers} of {workers} workers serve")
        users = some_users(config)
        for number, name in enumerate(names):
            load = Load(server, users, per_second, number, timeout=recovery)
            reports[name] = make(FAULTS[name], store, server, load, seconds, recovery, settle)
    finally:
        server.stop()
        store.kill()
    return reports


def make(
    fault: Fault,
    store: OwnStore,
    server: ServerProcess,
    load: Load,
    seconds: float,
    recovery: float,
    settle: float,
) -> Report:
    """Break the store for some seconds under load, and look whether the server keeps its promises."""
    report = Report()
    with load:
        began = time.monotonic()
        fault.begin(store)
        broken = time.monotonic() + _IN_TIME_SECONDS
        time.sleep(seconds)
        mending = time.monotonic()
        while not all(load.between(broken, mending)) and mending < broken + _ANSWER_SECONDS:
            time.sleep(_IN_TIME_SECONDS)
            mending = time.monotonic()
        fault.end(store)
        mended = time.monotonic()
        while not load.serves_since(mended) and time.monotonic() < mended + recovery:
            time.sleep(_IN_TIME_SECONDS)
        time.sleep(settle)
        ended = time.monotonic()
    recalls, reports = load.between(broken, mending)
    recall_back, report_back = load.recovered_after(mended)
    report.facts = {
        "seconds": round(mending - broken, 1),
        "seconds_to_break": round(broken - began, 2),
        "seconds_of_return": round(mended - mending, 2),
        "before": load.phase(0.0, began),
        "meanwhile": load.phase(broken, mending),
        "after": load.phase(mended, ended),
        "recalls_recovered_after_s": recall_back,
        "reports_recovered_after_s": report_back,
        "acknowledged_events": load.ledger.events,
        "lost": load.lost(server),
        "recall_failures": load.traffic.failures[:5],
    }
    # Reads that wait for a store in vain take the time of others; on a busy machine some are refused, which says so.
    failed = {
        status: count for status, count in load.traffic.failed.items() if status != "RESOURCE_EXHAUSTED"
    }
    report.promise(not failed, f"recalls failed: {failed}")
    recalls = [call for call in recalls if call.status == OK]
    report.promise(bool(recalls), "nothing was answered meanwhile")
    flagged = sum(call.flagged for call in recalls)
    if fault.reads_fail:
        report.promise(
            flagged == len(recalls), f"{len(recalls) - flagged} of {len(recalls)} answers were not flagged"
        )
    else:  # a busy machine may miss the time limit of a read
        report.promise(2 * flagged <= len(recalls), f"{flagged} of {len(recalls)} answers were flagged")
    acknowledged = sum(call.status == OK for call in reports)
    report.promise(acknowledged == 0, f"{acknowledged} reports were acknowledged by a store that took none")
    # A store that hangs may be waited for longer than a caller waits; that one has no acknowledgement either.
    other = {call.status for call in load.ledger.calls} - {OK, "UNAVAILABLE", "DEADLINE_EXCEEDED"}
    report.promise(not other, f"reports were refused with {', '.join(sorted(other))}")
    report.promise(recall_back <= recovery, f"answers were flagged for {recall_back} s after the return")
    report.promise(report_back <= recovery, f"reports were refused for {report_back} s after the return")
    report.promise(not report.facts["lost"], f"acknowledged and lost: {report.facts['lost'][:3]}")
    return report
