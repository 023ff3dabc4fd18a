"""No request fails while another release is put in service, again and again, under load.

    python -m loadtest.reload --reloads 20 --workers 2

Two releases of the bundled sample take turns in service while several connections recall without pause, each request with
a deadline. Prints JSON: what became of the requests and how long reloads took; exit status 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.client import RecallClient
from engine.data.sample import sample_path
from loadtest.servers import ServerProcess, two_releases, without_shedding
from loadtest.traffic import Traffic


def run(
    folder: Path, reloads: int, workers: int, per_second: float = 200.0, data: Path | None = None
) -> dict[str, Any]:
    """Reload under load; return what became of it."""
    store, users = two_releases(folder / "store", data or sample_path())
    config_file = folder / "reload.toml"
    config_file.write_text(without_shedding(("server", "reload_seconds", 0.1)))
    server = ServerProcess(store.root, config_file, workers=workers)
    started = server.start()
    spent: list[float] = []
    try:
        server.wait_for_log(f"{workers} of {workers} workers serve")
        with Traffic(server.target, users, per_second=per_second) as traffic:
            traffic.wait_for(50)
            for number in range(reloads):
                serving = store.current_name()
                other = next(name for name in store.release_names() if name != serving)
                began = time.monotonic()
                store.rollback(other)
                server.wait_for_log("answers instead of", number + 1)
                spent.append(time.monotonic() - began)
                traffic.wait_for(50)
            with RecallClient(server.target, timeout=10.0) as client:
                last = client.recall(user_id=users[0]).release
    finally:
        server.stop()
    return {
        "workers": workers,
        "seconds_to_serving": round(started, 1),
        "reloads": reloads,
        "seconds_per_reload": [round(each, 2) for each in spent],
        "last_release_answers": last == store.current_name(),
        **traffic.summary(),
    }


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--per-second", type=float, default=200.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recall-reload-") as folder:
        report = run(Path(folder), arguments.reloads, arguments.workers, arguments.per_second)
    print(json.dumps(report, indent=2))
    raise SystemExit(1 if report["failed"] or not report["last_release_answers"] else 0)


if __name__ == "__main__":
    main()
