"""What was acknowledged as exposed never comes back, whichever server is asked.

    python -m loadtest.read_your_writes --checks 1000000

Two servers share one state store. Again and again a user is recalled from one of them, the whole answer is reported as
exposed to either, and as soon as that is acknowledged the other, or the same, is asked: none of the user's exposures may
be in the answer. Each pair of an exposure and a later answer is a check; the newest answer of each would hold the
exposures again if they were not filtered, because nothing else changes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path

from engine.client import Event, Exposure, IngestClient, RecallClient
from engine.config import default_config_path
from loadtest.servers import ServerProcess, built

AT_ONCE = 50
FIRST_USER = 10**15
"""Users whom no data set knows: all get the same answers until something is exposed to them."""


def follow_user(user: int, targets: list[str], most: int) -> tuple[int, int, int]:
    """Expose to one user whatever they get, until the catalogue is used up or `most` checks are done.

    Returns:
        Checks, how many of them failed, and how many answers were asked for.
    """
    draw = random.Random(user)
    exposed: set[int] = set()
    checks = failed = answers = 0
    with ExitStack() as stack:
        recalls = [stack.enter_context(RecallClient(target, timeout=30.0)) for target in targets]
        ingests = [stack.enter_context(IngestClient(target, timeout=30.0)) for target in targets]
        while checks < most:
            result = draw.choice(recalls).recall(user_id=user, limit=AT_ONCE)
            if any(report.status != "OK" for report in result.filters):
                raise RuntimeError("a filter could not judge: the state store does not answer")
            answers += 1
            items = [int(id_) for id_ in result.item_ids]
            checks += len(exposed)
            failed += len(exposed & set(items))
            if not items:
                break
            draw.choice(ingests).report([Event(user, Exposure(items))])
            exposed.update(items)
    return checks, failed, answers


def run(folder: Path, wanted: int, threads: int = 4, data: Path | None = None) -> tuple[int, int, int]:
    """Check with a data set, None being the bundled sample, until `wanted` checks are done.

    Returns:
        As `follow_user`, of all users together.
    """
    built(folder, data)
    servers = [ServerProcess(folder, default_config_path()) for _ in range(2)]
    totals = [0, 0, 0]
    try:
        for server in servers:
            server.start()
        targets = [server.target for server in servers]
        user = FIRST_USER
        with ThreadPoolExecutor(threads) as pool:
            while totals[0] < wanted:
                group = range(user, user + threads)
                user += threads
                left = -(-(wanted - totals[0]) // threads)
                for part in pool.map(follow_user, group, repeat(targets), repeat(left)):
                    totals = [total + more for total, more in zip(totals, part, strict=True)]
    finally:
        for server in reversed(servers):
            server.stop()
    return totals[0], totals[1], totals[2]


def main() -> None:
    """Run it from the command line; exit status 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks", type=int, default=1_000_000)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="recall-exposure-") as folder:
        checks, failed, answers = run(Path(folder), arguments.checks)
    spent = time.monotonic() - began
    print(f"{checks:,} checks over {answers:,} answers in {spent:.0f} s: {failed:,} exposures came back")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
