"""The wall clock of a server and its store jumps, forward and back, under load.

A library of some lines of C (clock.c) stands between these processes and the system's wall clock; the monotonic clock
is the system's own, as it is when an administrator or NTP sets the time. It needs a C compiler, `cc`. (libfaketime 0.9.10
would do the same, but Python's time.sleep fails under it.)
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

from engine.core.errors import ConfigError
from loadtest.faults.load import Load, Report, statuses
from loadtest.servers import ServerProcess, built, free_port, some_users, with_options

DAY = 86_400
_TIMEOUT = 30.0
"""Seconds that a recall may take: how fast it is answered is not looked at."""
JUMPS = (3600, -3600, DAY, 6 * DAY, 0)
"""Seconds from the true time, one after the other; the end is the true time. They lie within a slice of exposures, seven
days: a server reads the slice to come too, and no further one."""


class Clock:
    """The wall clock of processes that have `environment`."""

    def __init__(self, folder: Path) -> None:
        """Make it, in a folder of its own.

        Raises:
            ConfigError: there is no C compiler.
        """
        library = folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl", "-pthread"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise ConfigError(f"a clock that jumps needs a C compiler: {said.splitlines()[-1]}") from None
        file = folder / "ahead"
        file.write_bytes(bytes(8))
        self._file = file
        self.environment = {"LD_PRELOAD": str(library), "RECALL_CLOCK_FILE": str(file)}

    def jump(self, seconds: int) -> None:
        """Be so far ahead of the true time, at once."""
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


def run(
    folder: Path,
    seconds: float,
    per_second: float,
    jumps: Sequence[int] = JUMPS,
    data: Path | None = None,
) -> Report:
    """Let the clock of a server of a data set (None: the bundled sample) jump under load, and look what becomes of it.

    Args:
        folder: empty.
        seconds: after each jump.
        per_second: recalls.
        jumps: seconds from the true time, one after the other.
        data: the data set.

    Raises:
        ConfigError: there is no C compiler.
    """
    clock = Clock(folder)
    config = built(folder / "store", data)
    config_file = folder / "clock.toml"
    port = free_port()
    options = (
        ("server", "max_limit", 100_000),
        ("server", "metrics_port", port),
        ("state", "timeout_ms", 2000.0),
    )
    config_file.write_text(with_options(*options))
    server = ServerProcess(folder / "store", config_file, environment=clock.environment)
    report = Report()
    report.facts["jumps"] = []
    try:
        server.start()
        users = some_users(config)
        load = Load(server, users, per_second, timeout=_TIMEOUT)
        made = time.time() - _age(port)
        with load:
            for jump in jumps:
                began = time.monotonic()
                clock.jump(jump)
                time.sleep(seconds)
                lost = load.lost(server)
                seen = made + _age(port) - time.time()
                report.facts["jumps"].append(
                    {
                        "seconds": jump,
                        "the_server_says": round(seen),
                        **load.phase(began, time.monotonic()),
                        "lost": lost,
                    }
                )
                report.promise(abs(seen - jump) < 5, f"the server's clock did not jump by {jump} s")
                report.promise(not lost, f"{jump:+d} s: acknowledged and lost: {lost[:3]}")
        report.facts["lost_in_the_end"] = load.lost(server)
        report.facts["acknowledged_events"] = load.ledger.events
    finally:
        server.stop()
    refused = statuses(load.ledger.calls)
    flagged = sum(call.flagged for call in load.traffic.calls)
    report.facts["recall_failures"] = load.traffic.failures[:5]
    report.promise(not load.traffic.failed, f"recalls failed: {dict(load.traffic.failed)}")
    report.promise(not refused, f"reports were refused: {refused}")
    report.promise(
        10 * flagged <= len(load.traffic.calls),
        f"{flagged} of {len(load.traffic.calls)} answers were flagged",
    )
    report.promise(
        not report.facts["lost_in_the_end"], f"acknowledged and lost: {report.facts['lost_in_the_end'][:3]}"
    )
    return report


def _age(port: int) -> float:
    """Return how old the server says, by its wall clock, that its release is, in seconds."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.search(r"(?m)^recall_release_age_seconds(?:{.*})? (.*)$", text)
    assert found is not None
    return float(found[1])
