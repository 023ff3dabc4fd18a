"""Make faults; prints one JSON object. Exit status 1 if a promise is broken, 2 if a fault cannot be made here."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.core.errors import RecallError
from loadtest.faults import clock, disk, store
from loadtest.faults.load import Report

OTHERS: dict[str, Callable[[Path, float, float], Report]] = {
    "state-disk-full": lambda folder, seconds, rate: disk.state(folder, "everysec", seconds, rate),
    "state-disk-full-always": lambda folder, seconds, rate: disk.state(folder, "always", seconds, rate),
    "build-disk-full": lambda folder, *_: disk.build(folder),
    "clock-jump": clock.run,
}
SECONDS = {"clock-jump": 5.0}
"""After each jump; of every other fault 30."""


def main() -> None:
    names = [*store.FAULTS, *OTHERS]
    parser = argparse.ArgumentParser(
        prog="loadtest.faults", description=__doc__, epilog=f"Faults: {', '.join(names)}."
    )
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME")
    parser.add_argument(
        "--seconds", type=float, help="of each fault; default: 30, after a jump of the clock 5"
    )
    parser.add_argument("--per-second", type=float, default=100.0, help="recalls under way")
    parser.add_argument("--workers", type=int, default=1, help="of the server whose store fails")
    arguments = parser.parse_args()
    reports: dict[str, Report] = {}
    try:
        if any("disk" in name for name in arguments.names):
            disk.enter()
        for name in arguments.names:
            seconds = arguments.seconds or SECONDS.get(name, 30.0)
            with tempfile.TemporaryDirectory(prefix="recall-faults-") as folder:
                if name in OTHERS:
                    reports[name] = OTHERS[name](Path(folder), seconds, arguments.per_second)
                else:
                    reports |= store.run(
                        Path(folder), [name], seconds, arguments.per_second, arguments.workers
                    )
    except RecallError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps({name: report.as_json() for name, report in reports.items()}, indent=2))
    raise SystemExit(1 if any(report.broken for report in reports.values()) else 0)


if __name__ == "__main__":
    main()
