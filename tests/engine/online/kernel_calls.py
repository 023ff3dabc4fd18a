"""`python kernel_calls.py FOLDER int64|string`: which kernels a build and a server call, and which only once it serves.

Prints a JSON object: `called`, the kernels that Python called until the server said SERVING; `late`, those that only what
happened afterwards called. Runs in a process of its own, where no other test has called anything.
"""

import asyncio
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numba.core import event
from numba.core.dispatcher import Dispatcher

from engine.cli.story import CITY, PLACE, Story
from engine.client import Action, Dislike, Event, Exposure, Follow, IngestClient, Item, RecallClient, TakeDown
from engine.config import load_config
from engine.core.channel import SilentProgress
from engine.data.dataset import write_dataset
from engine.data.ids import IdKind
from engine.data.snapshot import SnapshotStore
from engine.offline.build import build_release
from engine.online.replica import Replica
from engine.online.server import Server
from engine.online.state import open_state

NOW = 1_600_000_000
PUBLISHED = 2_500
"""More than the first room that the tables of live items have."""


class Inner(event.Listener):
    """Remembers what was compiled because a kernel that was compiled calls it."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str, str]] = set()
        self._depth = threading.local()

    def on_start(self, event: Any) -> None:
        self._depth.value = getattr(self._depth, "value", 0) + 1

    def on_end(self, event: Any) -> None:
        self._depth.value -= 1
        if self._depth.value:
            function = event.data["dispatcher"].py_func
            signature = repr(tuple(event.data["args"]))
            self.found.add((function.__module__, function.__qualname__, signature))


def known() -> set[tuple[str, str, str]]:
    """Every kernel of the project with the types for which it is compiled or loaded."""
    return {
        (value.py_func.__module__, value.py_func.__qualname__, repr(tuple(types)))
        for name, module in list(sys.modules.items())
        if name.startswith(("engine.", "channels.", "filters."))
        for value in vars(module).values()
        if isinstance(value, Dispatcher)
        for types in value.signatures
    }


def dataset_in(folder: Path, kind: IdKind) -> Any:
    """80 items of 8 authors with tags, in two cities, and 60 users who follow authors."""
    rng = np.random.default_rng(0)

    def named(numbers: Any) -> list[Any]:
        return [int(n) if kind == "int64" else f"key-{n}" for n in numbers]

    users, items = np.repeat(np.arange(60), 20), rng.zipf(1.3, 1200) % 80
    interactions = pa.table(
        {
            "user_id": named(users),
            "item_id": named(items),
            "event": ["click", "like", "expose"] * 400,
            "timestamp": (NOW + rng.permutation(1200)).tolist(),
        }
    )
    rows = np.arange(80)
    columns = pa.table(
        {
            "item_id": named(rows),
            "author_id": named(rows % 8),
            "published_at": (NOW + 60 * rows).tolist(),
            "title": [f"title {row}" for row in rows],
            "tags": [[f"tag {row % 7}", f"tag {row % 5}"] for row in rows],
        }
    )
    return write_dataset(folder, interactions, items=columns, meta={"id_type": kind})


def live_operations(target: str, catalogue: Any, kind: IdKind) -> None:
    """Do everything that the interfaces allow."""

    def named(number: int) -> Any:
        return number if kind == "int64" else f"key-{number}"

    with RecallClient(target, timeout=30.0) as recall, IngestClient(target, timeout=30.0) as ingest:

        def ask(user: Any = None, **more: Any) -> None:
            who = {} if user is None else {"user_id" if kind == "int64" else "user_key": user}
            recall.recall(limit=100, location=PLACE, city=CITY, **who, **more)
            recall.recall(limit=20, **who)

        for step in Story(recall, ingest, catalogue).steps():
            assert step.then not in ("nothing new", "it is still there")
        for start in range(0, PUBLISHED, 500):
            ingest.upsert_items(
                [
                    Item(
                        named(10**6 + n),
                        author=named(n % 50),
                        title="t",
                        city=f"city {n % 9}",
                        location=PLACE,
                    )
                    for n in range(start, start + 500)
                ]
            )
            ask(named(1))
        ingest.upsert_items([Item(named(10**6), author=named(3), published_at=NOW), Item(named(5))])
        ingest.upsert_items([TakeDown(named(10**6 + n)) for n in range(300)])
        for user in (named(1), named(10**7)):
            ingest.report([Event(user, Follow(named(n))) for n in range(30)])
            ingest.report([Event(user, Action(named(10**6 + n), "like")) for n in range(400, 700)])
            ingest.report([Event(user, Exposure([named(10**6 + n) for n in range(700, 1200)]))])
            ingest.report([Event(user, Dislike(author=named(2))), Event(user, Dislike(item=named(7)))])
            ask(user)
        ask()
        ask(named(1), exclude=[named(3)])


async def main(folder: Path, kind: IdKind) -> None:
    inner = Inner()
    event.register("numba:compile", inner)
    dataset = dataset_in(folder / "data", kind)
    config = load_config(None)
    config = config.model_copy(
        update={
            "server": config.server.model_copy(update={"port": 0, "metrics_port": 0}),
            "store": config.store.model_copy(update={"path": folder / "store"}),
        }
    )
    store = SnapshotStore(config.store.path)
    build_release(config, dataset, store, SilentProgress())
    with open_state(config) as state:
        replica = Replica.open(config, store, state=state)
        server = Server(config, replica, state)
        port = await server.start()
        before = known()
        try:
            await asyncio.to_thread(live_operations, f"127.0.0.1:{port}", replica.catalogue, kind)
        finally:
            await server.stop(5)
    print(json.dumps({"called": sorted(before - inner.found), "late": sorted(known() - before)}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), "int64" if sys.argv[2] == "int64" else "string"))
