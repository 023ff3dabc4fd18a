"""A process that does nothing but wake up: what it misses, the machine took from everybody.

A benchmark on a shared machine measures its neighbours too. The longest time for which this process did not come round,
and who used how much of the processors' time, tell such a run from one that says something of the engine.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

TICK_SECONDS = 0.01


class Sentinel:
    """Watches the machine while the block runs.

    Attributes:
        findings: after the block. `largest_host_gap_ms`: the longest that a process with nothing to do waited for its
            turn, beyond the 10 ms that it sleeps. Of all processors' time, `cpu_own_percent`: what this process and those
            below it used; `cpu_elsewhere_percent`: what others on this machine did; `cpu_stolen_percent`: what the host
            gave to other virtual machines. These are None where there is no /proc.
    """

    findings: dict[str, float | None]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._before = _Ticks.now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = _Ticks.now()
        output, _ = self._process.communicate()
        gap = json.loads(output) if self._process.returncode == 0 else None
        self.findings = {"largest_host_gap_ms": gap} | _shares(self._before, after)


class _Ticks(NamedTuple):
    """Processor time since the start of the machine, in ticks; `own` is of living processes only."""

    whole: int
    used: int
    stolen: int
    own: int

    @classmethod
    def now(cls) -> _Ticks | None:
        if not Path("/proc/stat").exists():
            return None
        # user, nice, system, idle, waiting for a disk, interrupts (two kinds), stolen
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        each = [int(field) for field in fields]
        stolen = each[7]
        return cls(sum(each), sum(each) - each[3] - each[4] - stolen, stolen, _own_ticks())


def _own_ticks() -> int:
    """Sum up this process and all below it."""
    spent: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything. Behind it are the state, the parent, and later the times.
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        process = int(path.parent.name)
        spent[process] = int(fields[11]) + int(fields[12])
        children.setdefault(int(fields[1]), []).append(process)
    below = [os.getpid()]
    for process in below:  # grows as it goes
        below += children.get(process, [])
    return sum(spent.get(process, 0) for process in below)


def _shares(before: _Ticks | None, after: _Ticks | None) -> dict[str, float | None]:
    names = ("cpu_own_percent", "cpu_elsewhere_percent", "cpu_stolen_percent")
    if before is None or after is None:
        return dict.fromkeys(names)
    whole, used, stolen, own = (b - a for a, b in zip(before, after, strict=True))
    shares = (own, used - own, stolen)
    return {
        name: round(100 * max(0, share) / max(1, whole), 1) for name, share in zip(names, shares, strict=True)
    }


def _watch() -> None:
    """Wake up every 10 ms until standard input ends, and print the longest delay in milliseconds."""
    longest = 0.0
    last = time.perf_counter()
    while not select.select([sys.stdin], [], [], TICK_SECONDS)[0]:
        now = time.perf_counter()
        longest = max(longest, now - last - TICK_SECONDS)
        last = now
    print(round(longest * 1e3, 1))


if __name__ == "__main__":
    _watch()
