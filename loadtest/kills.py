"""Kill the server, its store, or both, at random moments, and look for anything that was acknowledged and is lost.

    python -m loadtest.kills --rounds 50 --durability always

A reporter sends exposures, actions and publications without a pause and notes what is acknowledged. Every round kills
once and lets things come back. Then every user is asked for the whole catalogue: an acknowledged exposure or action
must be missing from the answer, an acknowledged publication must be in it. A user who was shown nothing gets the whole
catalogue, so an item that another does not get was filtered, and is not merely unranked.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from engine.client import Action, Event, Exposure, IngestClient, Item, RecallClient
from loadtest.servers import ServerProcess, built, kill_store, with_options
from loadtest.traffic import OK, Call

VICTIMS = ("server", "store", "both")
USERS = 40
EXPOSED_AT_ONCE = 3
MOST_PER_USER = 400
"""Exposures per user: well below what a slice is planned for, so that false positives stay rare."""
MOST_PUBLISHED = 500
"""By one reporter."""
_TRIES = 20
FIRST_PUBLISHED = 10**12
"""Ids of the published items, above those of every data set."""
SEED_USER = 10**15
"""Ids of the users, whom no data set knows."""


@dataclass
class Ledger:
    """What was acknowledged.

    Attributes:
        hidden: user -> items that must not come back.
        published: items that must be there.
        events: how many events were acknowledged.
        failures: how many calls failed.
        calls: every call that has ended.
    """

    hidden: dict[int, set[int]] = field(default_factory=dict)
    published: set[int] = field(default_factory=set)
    events: int = 0
    failures: int = 0
    calls: list[Call] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def report(
    target: str,
    catalogue: list[int],
    ledger: Ledger,
    stop: threading.Event,
    seed: int,
    timeout: float = 5.0,
    pause: float = 0.0,
) -> None:
    """Report until told to stop; what fails is not noted as acknowledged, and not sent again.

    Args:
        target: the server.
        catalogue: the items to report.
        ledger: told of every call.
        stop: ends it.
        seed: of what is reported; also keeps the published items of several reporters apart, below 1,000.
        timeout: of a call, in seconds.
        pause: seconds between calls.
    """
    draw = random.Random(seed)
    published = 0
    with IngestClient(target, timeout=timeout) as client:
        while not stop.wait(pause):
            user = SEED_USER + draw.randrange(USERS)
            items = draw.sample(catalogue, EXPOSED_AT_ONCE + 1)
            began, status = time.monotonic(), OK
            try:
                if draw.random() < 0.2 and published < MOST_PUBLISHED:
                    published += 1
                    item = FIRST_PUBLISHED + seed * 1000 + published
                    if client.upsert_items([Item(item, published_at=1_700_000_000)]).accepted == 1:
                        with ledger.lock:
                            ledger.published.add(item)
                            ledger.events += 1
                elif len(ledger.hidden.get(user, ())) <= MOST_PER_USER:
                    events = [Event(user, Exposure(items[:-1])), Event(user, Action(items[-1], "click"))]
                    if client.report(events).accepted == 2:
                        with ledger.lock:
                            ledger.hidden.setdefault(user, set()).update(items)
                            ledger.events += 2
                else:
                    continue
            except grpc.RpcError as error:
                status = error.code().name  # type: ignore[attr-defined]
                with ledger.lock:
                    ledger.failures += 1
                time.sleep(0.02)
            ledger.calls.append(Call(began, time.monotonic(), status))


def lost(target: str, catalogue: list[int], ledger: Ledger) -> list[str]:
    """Return, in words, whatever was acknowledged and is not there."""
    found: list[str] = []
    with ledger.lock:
        hidden = {user: set(items) for user, items in ledger.hidden.items()}
        published = set(ledger.published)
    everything = len(catalogue) + len(published) + 1000
    with RecallClient(target, timeout=30.0) as client:
        stranger = set(client.recall(user_id=SEED_USER - 1, limit=everything).item_ids)
        missing = (set(catalogue) | published) - stranger
        if missing:
            found.append(f"{len(missing)} items of the catalogue or published are not recallable")
        for user, items in hidden.items():
            for _ in range(
                _TRIES
            ):  # on a busy machine a read may miss its time limit, and the answer says so
                result = client.recall(user_id=user, limit=everything)
                if all(report.status == "OK" for report in result.filters):
                    break
                time.sleep(0.1)
            else:
                found.append(f"user {user}: a filter could not judge")
            back = items & set(result.item_ids)
            if back:
                found.append(f"user {user}: {len(back)} items came back")
    return found


def run(
    folder: Path, rounds: int, durability: str, seed: int = 1, say: bool = False, data: Path | None = None
) -> tuple[Ledger, list[str]]:
    """Run some rounds in a folder, with a data set; None: the bundled sample.

    Returns:
        What was acknowledged, and whatever of it is lost, in words.
    """
    built(folder, data)
    config_file = folder / "kills.toml"
    config_file.write_text(
        with_options(("state", "durability", durability), ("server", "max_limit", 100_000))
    )
    server = ServerProcess(folder, config_file)
    server.start()
    draw = random.Random(seed)
    ledger, problems = Ledger(), list[str]()
    try:
        with RecallClient(server.target, timeout=30.0) as client:
            catalogue = [int(id_) for id_ in client.recall(user_id=SEED_USER - 1, limit=100_000).item_ids]
        for number in range(rounds):
            victim = VICTIMS[number % len(VICTIMS)]
            stop = threading.Event()
            reporters = [
                threading.Thread(target=report, args=(server.target, catalogue, ledger, stop, number * 2 + n))
                for n in range(2)
            ]
            for reporter in reporters:
                reporter.start()
            time.sleep(draw.uniform(0.1, 1.0))
            if victim in ("store", "both"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    kill_store(folder)
            if victim in ("server", "both"):
                server.kill()
                server.start()
            else:
                time.sleep(draw.uniform(0.1, 1.0))  # reports go on while the store comes back
            stop.set()
            for reporter in reporters:
                reporter.join()
            server.wait_until_serving()
            problems += [
                f"round {number + 1}, {victim} killed: {text}" for text in settled(server, catalogue, ledger)
            ]
            if say:
                print(
                    f"round {number + 1}: killed {victim}; {ledger.events:,} events acknowledged, "
                    f"{ledger.failures:,} calls failed, {len(problems)} losses",
                    flush=True,
                )
    finally:
        server.stop()
    return ledger, problems


def settled(server: ServerProcess, catalogue: list[int], ledger: Ledger, patience: float = 10.0) -> list[str]:
    """Return what is lost once the store is back: until then filters cannot judge and say so."""
    deadline = time.monotonic() + patience
    while True:
        try:
            found = lost(server.target, catalogue, ledger)
        except grpc.RpcError as error:
            found = [str(error)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.25)


def main() -> None:
    """Run it from the command line; exit status 1 if anything is lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--durability", choices=("always", "everysec"), default="always")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recall-kills-") as folder:
        ledger, problems = run(Path(folder), arguments.rounds, arguments.durability, arguments.seed, say=True)
    print(f"{ledger.events:,} events acknowledged, {len(problems)} losses")
    for problem in problems:
        print(problem)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
