"""The whole loop of streaming VQ under load: serve, report, train, assign, serve.

    python -m loadtest.streaming_vq --minutes 10 --kills 1 --picture streaming-vq.svg

The bundled sample is cut in time. A server is built from the events before the cut, without some of the items; what comes
after is sent to it in its order, faster than it was and as of the moment, and those items are published, while
`recall train streaming_vq --follow` learns from it and users are asked for. Prints JSON:

- `assigned_ms`: from the acknowledgement of a publication until the trainer's assignment of the item is in the log, 0
  where it was there sooner; of those that no kill of the trainer held up, and `assigned_after_kill_ms` of the others:
  what was published, and not assigned, when it was killed, or before it said that nothing waits any more.
- `recallable_ms`: until the channel returns the item. The channel puts an item into a cluster by itself, too, before the
  trainer has said anything.
- `recall@k`: how often an item that a user is about to like was among the k that the channel gave just before.
- `balance`: the fullest cluster's share, the empty clusters, items of the clusters at p99 over those at p50.
- what the trainer said of itself, and what a kill of it cost: seconds until it wrote again, and until nothing waited.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.bench.report import circumstances
from engine.client import Action, Event, Exposure, IngestClient, Item, RecallClient
from engine.client import Dislike as Disliked
from engine.config import Config, load_config
from engine.core.channel import SilentProgress
from engine.data.dataset import write_dataset
from engine.data.sample import sample_path
from engine.data.snapshot import CATALOGUE, SnapshotStore
from engine.models.codebook import balance_of
from engine.offline.build import build_release
from engine.online.state import FOLDER
from engine.state.assignments import AssignmentLog
from engine.state.store import StateStore
from loadtest.pictures import Panel, Point, picture
from loadtest.servers import ServerProcess

CHANNEL = "streaming_vq"
DEPTHS = (50, 200)
ALL = 4000
"""More than the sample has items: an item that is in any cluster is in such an answer."""

ITEMS_AT_ONCE = 0.02
"""Seconds between two looks whether what was published is recalled: part of what is measured, half of it on average."""

REPORTED = 1000
"""Events sent together, at most."""

CONFIGURATION = """
[store]
path = {store}

[server]
max_limit = 5000
reload_seconds = 0.5

[ingest]
event_log = true

[interest]
click = 1.0
finish = 1.0
like = 2.0
comment = 2.0
follow = 2.0
share = 2.0

[channels.streaming_vq]
clusters = {clusters}
dimension = 32
rank = "none"
user_features = [{{ name = "user_id", kind = "id", dimension = 16 }}]
item_features = [
  {{ name = "item_id", kind = "id", dimension = 32 }},
  {{ name = "tags", kind = "multi", dimension = 16 }},
  {{ name = "author", kind = "id", dimension = 16 }},
]
sequence = {{ kind = "mean", length = 50, width = 32 }}
hidden = [64]

[channels.streaming_vq.training]
batch = 256
epochs = {epochs}
label_seconds = {label_seconds}
dump_minutes = {dump_minutes}

[scenes.default]
quotas = {{ streaming_vq = 4000 }}
limit = 300
filters = ["availability"]
fallback = []

[scenes.unseen]
quotas = {{ streaming_vq = 1000 }}
limit = 200
filters = ["availability", "seen"]
fallback = []
"""


@dataclass(frozen=True)
class World:
    """What is built and what is sent.

    Attributes:
        config: the configuration; its file is `file`.
        events: what happened after the cut, in order of time.
        items: what is known of each item, by id.
        known: ids of the items that the release has.
        published: (share of the events after which it is published, id) of each item that it has not, in order of time.
    """

    config: Config
    file: Path
    events: pa.Table
    items: dict[int, dict[str, Any]]
    known: set[int]
    published: list[tuple[float, int]]


def cut_world(
    folder: Path, share: float, held_out: float, clusters: int, epochs: int, dump_minutes: float
) -> World:
    """Build a release of the sample's first events, without some of its items, and return the others.

    What is held out is published evenly over the time; its events before that are left out.
    """
    whole = sample_path()
    events = pq.read_table(whole / "interactions.parquet").sort_by("timestamp")
    cut = events["timestamp"][int(len(events) * share)].as_py()
    rng = np.random.default_rng(7)
    every = np.sort(pc.unique(events["item_id"]).to_numpy())
    held = rng.permutation(every)[: round(held_out * every.size)]
    before = events.filter(
        pc.and_(pc.less(events["timestamp"], cut), pc.invert(pc.is_in(events["item_id"], pa.array(held))))
    )
    after = events.filter(pc.greater_equal(events["timestamp"], cut))
    items, users = (pq.read_table(whole / f"{name}.parquet") for name in ("items", "users"))
    known = pc.unique(before["item_id"])
    data = write_dataset(
        folder / "data",
        before,
        items=items.filter(pc.is_in(items["item_id"], known)),
        users=users,
        meta={"id_type": "int64"},
    )
    file = folder / "streaming.toml"
    file.write_text(
        CONFIGURATION.format(
            store=json.dumps(str(folder / "store")), clusters=clusters, epochs=epochs, label_seconds=5,
            dump_minutes=dump_minutes,
        )
    )  # fmt: skip
    config = load_config(file)
    build_release(config, data, SnapshotStore(config.store.path), SilentProgress(), threads=1)
    described = {row["item_id"]: row for row in items.to_pylist()}
    known_ids = set(known.to_pylist())
    late = [id_ for id_ in every.tolist() if id_ not in known_ids]
    moments = np.linspace(0.02, 0.95, len(late)).tolist()
    return World(config, file, after, described, known_ids, list(zip(moments, late, strict=True)))


class Trainer:
    """`recall train streaming_vq --follow` in a process of its own."""

    LINE = re.compile(
        r"([\d,]+) events +([\d,]+)/s +lag ([\d.]+ \w+|\d+ min \d+ s) \(([\d,]+) waiting\) +([\d,]+) steps +loss (\S+) +"
        r"([\d,]+) assignments/s"
    )

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self.log = folder / "trainer.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, after a kill too."""
        command = [sys.executable, "-m", "engine", "train", CHANNEL, "--follow", "--threads", "1"]
        command += ["--config", str(self._world.file), "--store", str(self._world.config.store.path)]
        with self.log.open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def end(self, number: signal.Signals) -> int:
        """Send it a signal and wait until it is gone; return its status."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(60)

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def said(self) -> list[dict[str, float]]:
        """Return what it said of itself, line by line."""
        found = []
        for match in self.LINE.finditer(self.log.read_text(errors="replace")):
            events, rate, _, waiting, steps, loss, assignments = match.groups()
            found.append(
                {
                    "events": _number(events), "events_per_s": _number(rate), "waiting": _number(waiting),
                    "steps": _number(steps), "loss": float(loss), "assignments_per_s": _number(assignments),
                }
            )  # fmt: skip
        return found


@dataclass
class Seen:
    """What was seen, with seconds since the beginning."""

    acknowledged: dict[int, float] = field(default_factory=dict)
    assigned: dict[int, float] = field(default_factory=dict)
    recalled: dict[int, float] = field(default_factory=dict)
    hits: list[tuple[float, tuple[bool, ...]]] = field(default_factory=list)
    balance: list[tuple[float, float, float, float]] = field(default_factory=list)
    written: list[tuple[float, int, int]] = field(default_factory=list)
    sent: int = 0
    refused: int = 0
    kills: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)
    caught_up: list[float] = field(default_factory=list)

    def note(self, keys: Collection[int], now: float) -> None:
        """Take in that the trainer has assigned items; the first time counts.

        A trainer is often quicker than the acknowledgement, so that nothing is known of the publication yet.
        """
        for key in keys:
            self.assigned.setdefault(key, now)

    def held_up(self) -> set[int]:
        """Return the items whose assignment a kill of the trainer held up."""
        gone = list(zip(self.kills, self.caught_up, strict=False))
        return {
            key
            for key, at in self.acknowledged.items()
            if any(
                at <= kill + seconds and self.assigned.get(key, math.inf) >= kill for kill, seconds in gone
            )
        }


class Run:
    """One run against a server and a trainer."""

    def __init__(self, world: World, target: str, trainer: Trainer, minutes: float, asked: float) -> None:
        self._world, self._target, self._trainer = world, target, trainer
        self._seconds = minutes * 60
        self._asked = asked
        self._began = 0.0
        self._ended = threading.Event()
        self.seen = Seen()
        self._waiting: deque[int] = deque()
        self.failures: list[str] = []

    def measure(self, kills: int) -> None:
        """Send, ask and watch until the time is up."""
        self._began = time.monotonic()
        works = (self._send, self._watch_log, self._watch_items)
        threads = [threading.Thread(target=self._guarded, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        try:
            for number in range(kills):
                self._sleep_until(self._seconds * (number + 1) / (kills + 1))
                self._kill()
            self._sleep_until(self._seconds)
            time.sleep(2.0)
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _sleep_until(self, moment: float) -> None:
        self._ended.wait(max(0.0, moment - self._now()))

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except Exception as error:  # it must be told, whatever it is
            self.failures.append(f"{work.__name__}: {error!r}")
            self._ended.set()

    def _kill(self) -> None:
        self._trainer.end(signal.SIGKILL)
        self.seen.kills.append(self._now())
        written, said = len(self.seen.written), len(self._trainer.said())
        self._trainer.start()
        while len(self.seen.written) == written and not self._ended.wait(0.05):
            pass
        self.seen.back.append(self._now() - self.seen.kills[-1])
        while not self._ended.wait(0.5):
            if any(line["events"] and not line["waiting"] for line in self._trainer.said()[said:]):
                break
        self.seen.caught_up.append(self._now() - self.seen.kills[-1])

    def _send(self) -> None:
        """Send what happened at its share of the time; ask first for some of the users who are about to like an item."""
        rows = self._world.events.select(
            ["user_id", "item_id", "event", "timestamp", "watch_seconds"]
        ).to_pylist()
        liked = set(self._world.config.interest)
        known, rng = set(self._world.known), np.random.default_rng(1)
        published = deque(self._world.published)
        positives = sum(row["event"] in liked for row in rows)
        share = min(1.0, self._asked * self._seconds / max(positives, 1))
        with (
            IngestClient(self._target, timeout=60.0) as ingest,
            RecallClient(self._target, timeout=10.0) as recall,
            ThreadPoolExecutor(2) as pool,
        ):
            at = 0
            while at < len(rows) and not self._ended.is_set():
                due = min(len(rows), int(len(rows) * self._now() / self._seconds) + 1)
                batch, at = rows[at:due], due
                while published and published[0][0] * len(rows) <= at:
                    id_ = published.popleft()[1]
                    self._publish(ingest, id_)
                    known.add(id_)
                batch = [row for row in batch if row["item_id"] in known]
                asked = [row for row in batch if row["event"] in liked and rng.random() < share]
                list(pool.map(lambda row: self._ask(recall, row), asked))
                events = [event for event in map(_event_of, batch) if event is not None]
                for start in range(0, len(events), REPORTED):
                    ingest.report(events[start : start + REPORTED])
                self.seen.sent += len(batch)
                self._ended.wait(0.05)

    def _publish(self, ingest: IngestClient, id_: int) -> None:
        row = self._world.items[id_]
        ingest.upsert_items([Item(id_, author=row["author_id"], tags=row["tags"] or [], title=str(id_))])
        self.seen.acknowledged[id_] = self._now()
        self._waiting.append(id_)

    def _ask(self, recall: RecallClient, row: dict[str, Any]) -> None:
        try:
            answer = recall.recall(user_id=row["user_id"], scene="unseen", limit=max(DEPTHS))
        except grpc.RpcError:  # a busy machine: that it was asked in vain is counted
            self.seen.refused += 1
            return
        found = list(answer.item_ids)
        self.seen.hits.append((self._now(), tuple(row["item_id"] in found[:depth] for depth in DEPTHS)))

    def _watch_items(self) -> None:
        with RecallClient(self._target, timeout=10.0) as recall:
            while not self._ended.wait(ITEMS_AT_ONCE):
                if not self._waiting:
                    continue
                wanted = list(self._waiting)
                try:
                    found = set(recall.recall(user_id=1, limit=ALL).item_ids)
                except grpc.RpcError:
                    self.seen.refused += 1
                    continue
                now = self._now()
                for id_ in wanted:
                    if id_ in found:
                        self.seen.recalled[id_] = now
                        self._waiting.remove(id_)

    def _watch_log(self) -> None:
        """Follow the assignment log as a worker does, and keep count of the clusters."""
        config = self._world.config
        snapshots = SnapshotStore(config.store.path)
        release = snapshots.current()
        assert release is not None
        bundle = snapshots.open(CHANNEL, release.snapshots[CHANNEL])
        catalogue = snapshots.open(CATALOGUE, release.snapshots[CATALOGUE])
        clusters = int(bundle.arrays["codebook.counts"].size)
        keys = bundle.arrays["item_keys"].tolist()
        where = dict(zip(keys, bundle.arrays["assignment"].tolist(), strict=True))
        del catalogue
        socket = config.store.path / FOLDER / "store.sock"
        store = StateStore.connect(f"unix://{socket}", config.state.prefix, 1000.0)
        log = AssignmentLog(store, CHANNEL)
        offset, look = "0-0", 0.0
        while not self._ended.is_set():
            items, offset, entries, _ = log.read(offset, bundle.version, 1000, 100)
            now = self._now()
            moved = 0
            for key, cluster in zip(items.keys.tolist(), items.clusters.tolist(), strict=True):
                moved += where.get(key) != cluster
                where[key] = cluster
            self.seen.note(items.keys.tolist(), now)
            if entries:
                self.seen.written.append((now, len(items), moved))
            if now >= look:
                balance = balance_of(np.array(list(where.values()), np.int32), clusters)
                self.seen.balance.append((now, balance.largest, balance.empty, balance.spread))
                look = now + 1.0
        store.close()


def run(folder: Path, minutes: float, kills: int, asked: float, **built: Any) -> tuple[dict[str, Any], Run]:
    """Build, serve, train and measure; return the report and the run."""
    began = time.monotonic()
    world = cut_world(folder, **built)
    spent = time.monotonic() - began
    server = ServerProcess(world.config.store.path, world.file)
    trainer = Trainer(world, folder)
    try:
        server.start()
        trainer.start()
        _wait_for(trainer)
        measured = Run(world, server.target, trainer, minutes, asked)
        measured.measure(kills)
        status = trainer.end(signal.SIGTERM)
    finally:
        if trainer.alive():
            trainer.end(signal.SIGKILL)
        server.stop()
    report = circumstances() | _report(measured, trainer, world)
    report |= {"built_in_s": round(spent, 1), "trainer_status": status, "minutes": minutes}
    report["releases_served"] = server.log_text().count("answers instead of")
    return report, measured


def _wait_for(trainer: Trainer) -> None:
    deadline = time.monotonic() + 600
    while not trainer.said():
        if time.monotonic() > deadline or not trainer.alive():
            raise RuntimeError(
                f"the trainer does not come up: {trainer.log.read_text(errors='replace')[-1000:]}"
            )
        time.sleep(0.2)


def _report(measured: Run, trainer: Trainer, world: World) -> dict[str, Any]:
    seen, said = measured.seen, trainer.said()
    published = seen.acknowledged

    held_up = seen.held_up()

    def waits(then: dict[int, float], keys: Collection[int]) -> dict[str, float]:
        found = [max(0.0, then[key] - published[key]) * 1e3 for key in keys if key in then]
        return _percentiles(found) | {"items": len(keys), "never": len(keys) - len(found)}

    hits = np.array([each for _, each in seen.hits], np.float64)
    balance = np.array([row[1:] for row in seen.balance])
    rates = [line["events_per_s"] for line in said if line["events_per_s"]]
    return {
        "events_sent": seen.sent,
        "refused": seen.refused,
        "items_published": len(published),
        "assigned_ms": waits(seen.assigned, published.keys() - held_up),
        "assigned_after_kill_ms": waits(seen.assigned, held_up),
        "recallable_ms": waits(seen.recalled, published.keys()),
        **{
            f"recall@{depth}": {
                "asked": len(hits),
                "whole": round(float(hits[:, n].mean()), 4),
                "first_third": round(float(hits[: len(hits) // 3, n].mean()), 4),
                "last_third": round(float(hits[-len(hits) // 3 :, n].mean()), 4),
            }
            for n, depth in enumerate(DEPTHS)
            if len(hits) >= 3
        },
        "balance": {
            "at_first": dict(
                zip(("fullest", "empty", "p99_over_p50"), balance[0].round(4).tolist(), strict=True)
            ),
            "at_last": dict(
                zip(("fullest", "empty", "p99_over_p50"), balance[-1].round(4).tolist(), strict=True)
            ),
            "worst": dict(
                zip(("fullest", "empty", "p99_over_p50"), balance.max(0).round(4).tolist(), strict=True)
            ),
        },
        "assignments": sum(row[1] for row in seen.written),
        "assignments_per_s": round(sum(row[1] for row in seen.written) / max(seen.written[-1][0], 1e-9), 1),
        "moves": sum(row[2] for row in seen.written),
        "trainer": {
            "steps": said[-1]["steps"],
            "events_per_s_median": float(np.median(rates)) if rates else 0.0,
            "most_waiting": max(line["waiting"] for line in said),
            "last_loss": next(
                (line["loss"] for line in reversed(said) if line["loss"] == line["loss"]), None
            ),
        },
        "kills": len(seen.kills),
        "back_after_s": [round(each, 1) for each in seen.back],
        "caught_up_after_s": [round(each, 1) for each in seen.caught_up],
        "failures": measured.failures,
    }


def draw(measured: Run, bins: int = 40) -> str:
    """Return the picture of a run: recall, balance and assignments over time."""
    seen = measured.seen
    end = max(row[0] for row in seen.balance)
    edges = np.linspace(0, end, bins + 1)
    hits_at = np.array([at for at, _ in seen.hits])
    hits = np.array([each for _, each in seen.hits], np.float64).reshape(-1, len(DEPTHS))

    def mean(values: Any, at: Any) -> Iterator[Point]:
        for low, high in itertools.pairwise(edges):
            there = values[(at >= low) & (at < high)]
            if there.size:
                yield (float(low + high) / 2 / 60, float(there.mean()))

    written_at = np.array([row[0] for row in seen.written])
    width = end / bins

    def rate(column: int) -> Iterator[Point]:
        values = np.array([row[column] for row in seen.written], np.float64)
        for low, high in itertools.pairwise(edges):
            yield (
                float(low + high) / 2 / 60,
                float(values[(written_at >= low) & (written_at < high)].sum() / width),
            )

    panels = [
        Panel("recall of what is liked next", {f"@{d}": list(mean(hits[:, n], hits_at)) for n, d in enumerate(DEPTHS)}),
        Panel("clusters", {
            "share of the fullest": [(at / 60, largest) for at, largest, _, _ in seen.balance],
            "share empty": [(at / 60, empty) for at, _, empty, _ in seen.balance],
        }),
        Panel("per second", {"assignments": list(rate(1)), "of them moves": list(rate(2))}),
    ]  # fmt: skip
    waits = [
        (at / 60, max(0.0, seen.assigned[key] - at))
        for key, at in seen.acknowledged.items()
        if key in seen.assigned
    ]
    if waits:
        panels.append(Panel("seconds from publication to assignment", {"each item": sorted(waits)}))
    return picture(panels, "minutes")


def _event_of(row: dict[str, Any]) -> Event | None:
    """Return what happened as of the moment that it is sent: by the old clock minutes would pass in each second, and the
    trainer, which waits for a minute of the stream at most, would learn a few impressions a step."""
    kind, user, item = row["event"], row["user_id"], row["item_id"]
    if kind == "expose":
        return Event(user, Exposure([item]))
    if kind == "dislike":
        return Event(user, Disliked(item=item))
    if kind not in ("click", "finish", "like", "comment", "follow", "share"):
        return None
    return Event(user, Action(item, kind, watch_seconds=row["watch_seconds"]))


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "max": round(max(values), 1)}


def _number(text: str) -> float:
    return float(text.replace(",", ""))


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="recall-streaming-") as made:
        yield Path(made)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kills", type=int, default=1, help="SIGKILLs of the trainer, spread over the time")
    parser.add_argument(
        "--asked", type=float, default=10.0, help="users asked for a second, to measure recall"
    )
    parser.add_argument(
        "--share", type=float, default=0.6, help="of the events that the release is built from"
    )
    parser.add_argument("--held-out", type=float, default=0.1, help="of the items, published while it runs")
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--dump-minutes", type=float, default=2.0)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--folder", type=Path, help="keep what is made there; must not exist yet")
    arguments = parser.parse_args()
    with _folder(arguments.folder) as folder:
        report, measured = run(
            folder, arguments.minutes, arguments.kills, arguments.asked,
            share=arguments.share, held_out=arguments.held_out, clusters=arguments.clusters,
            epochs=arguments.epochs, dump_minutes=arguments.dump_minutes,
        )  # fmt: skip
    print(json.dumps(report, indent=2))
    if arguments.picture is not None:
        arguments.picture.write_text(draw(measured))
    good = (
        not report["failures"] and report["assigned_ms"].get("never") == 0 and report["trainer_status"] == 0
    )
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
