"""Send malformed requests to a real server: each must be refused as INVALID_ARGUMENT, or answered."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from loadtest.fuzz.running import passed, run


def main() -> None:
    """Run it from the command line; exit status 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="loadtest.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--ids", choices=("int64", "string"), default="int64")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that send")
    parser.add_argument("--workers", type=int, default=1, help="of the server")
    parser.add_argument("--connections", type=int, default=4, help="of each process")
    parser.add_argument("--in-flight", type=int, default=4, help="calls under way on each connection")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--json", type=Path, help="write the report there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recall-fuzz-") as folder:
        report = run(
            Path(folder),
            arguments.cases,
            arguments.seed,
            arguments.first,
            arguments.ids,
            processes=arguments.processes,
            workers=arguments.workers,
            connections=arguments.connections,
            in_flight=arguments.in_flight,
            failures=arguments.failures,
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{report['cases']:,} cases in {report['seconds']:,} s ({report['cases_per_second']:,} a second): "
        f"{report['failed']:,} failed; {report['statuses']}; {report['errors_in_the_log']} errors in the server's log"
    )
    for failure in report["failures"][:20]:
        print(f"case {failure['case']}: {failure['method']}, {failure['kind']}: {failure['why']}")
    for line in report["first_errors_in_the_log"]:
        print(line)
    raise SystemExit(0 if passed(report) else 1)


if __name__ == "__main__":
    main()
