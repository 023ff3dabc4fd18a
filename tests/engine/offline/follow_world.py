"""A small world with a streaming VQ model, for the trainer that follows; and that trainer as a process of its own.

    python follow_world.py FOLDER URL [SECONDS BETWEEN CHECKPOINTS]

follows until SIGTERM, and prints a line whenever it tells how far it is.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config import Config, parse_config
from engine.core.channel import SilentProgress
from engine.core.errors import RecallError
from engine.core.options import Options
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset, write_dataset
from engine.data.snapshot import CATALOGUE, Snapshot, SnapshotStore
from engine.models.cluster_lists import as_served
from engine.models.features import Encoder, save_encoded
from engine.models.spec import Feature, ModelSpec, SequenceSpec, Towers
from engine.models.streaming_options import StreamingOptions
from engine.models.vq_spec import VqSpec
from engine.offline import follow
from engine.offline.build import build_release
from engine.state.events import EventLog, action_record, shown_records
from engine.state.layout import kind_of, user_tag
from engine.state.store import StateStore

NOW = 1_700_000_000
ITEMS, USERS = 60, 40
LATE = (500, 501)
"""Ids that the build does not know; entries have events of them."""
INTEREST = {"click": 1.0, "finish": 2.0}
TOWERS = Towers(
    user_features=(Feature(name="user_id", kind="id", dimension=8),),
    item_features=(
        Feature(name="item_id", kind="id", dimension=8),
        Feature(name="tags", kind="multi", dimension=8),
    ),
    sequence=SequenceSpec(kind="mean", length=8, width=8),
    hidden=(16,),
    dimension=8,
    metric="inner",
)


class VqOptions(Options):
    """The options of a channel that learns from a stream."""

    training: StreamingOptions = StreamingOptions(batch=32, negatives=16, label_seconds=60, dump_minutes=60)


def config_of(folder: Path, **training: Any) -> Config:
    scene = {"quotas": {"popular": 10}, "fallback": []}
    config = parse_config(
        {
            "store": {"path": str(folder / "store"), "keep_releases": 5},
            "interest": INTEREST,
            "ingest": {"event_log": True},
            "channels": {"popular": {}},
            "scenes": {"default": scene},
        }
    )
    options = VqOptions()
    options = VqOptions(training=options.training.model_copy(update=training))
    # The class is another's: only the options matter to who follows.
    return config.model_copy(
        update={
            "channels": {**config.channels, "vq": options},
            "channel_types": {**config.channel_types, "vq": "popular"},
        }
    )


def dataset_of(folder: Path, kind: str = "int64") -> Dataset:
    rng = np.random.default_rng(3)
    users, items = rng.integers(0, USERS, 600), rng.integers(0, ITEMS, 600)
    items[:ITEMS], users[:USERS] = np.arange(ITEMS), np.arange(USERS)
    name = (lambda n: int(n)) if kind == "int64" else (lambda n: f"key-{n}")
    interactions = pa.table(
        {
            "user_id": [name(n) for n in users],
            "item_id": [name(n) for n in items],
            "event": ["click"] * 600,
            "timestamp": [NOW - 10_000 + n for n in range(600)],
        }
    )
    tags = [[f"tag{n % 5}"] for n in range(ITEMS)]
    table = pa.table({"item_id": [name(n) for n in range(ITEMS)], "tags": tags})
    return write_dataset(folder, interactions, items=table, meta={"id_type": kind})


def build_world(folder: Path, config: Config, kind: str = "int64") -> SnapshotStore:
    """A release with a model of streaming VQ that has learnt nothing yet."""
    from engine.training.streaming_trainer import StreamingTrainer

    store = SnapshotStore(config.store.path)
    release, source = build_release(config, dataset_of(folder / "data", kind), store, SilentProgress())
    catalogue: Catalogue = source.catalogue
    columns, user_columns = catalogue.item_columns(), catalogue.user_columns()
    rows, user_rows = len(catalogue.items), len(catalogue.users)
    user = Encoder.fit("user", TOWERS.user_features, user_rows, user_columns, "")
    item = Encoder.fit("item", TOWERS.item_features, rows, columns, "")
    towers = {name: getattr(TOWERS, name) for name in Towers.model_fields}
    towers |= {"user_features": user.features, "item_features": item.features}
    spec = VqSpec(tower=ModelSpec(**towers, items=rows), clusters=8)
    users = user.encode(user_columns, np.arange(user_rows, dtype=np.int32))
    items = item.encode(columns, np.arange(rows, dtype=np.int32))
    trainer = StreamingTrainer(spec, config.channels["vq"].training, items)
    every = np.arange(rows, dtype=np.int32)
    trainer.assign(every)
    version = release.snapshots[CATALOGUE]
    with store.begin("vq", parameters={}, dataset=source.key, catalogue=version) as writer:
        writer.write("spec", np.frombuffer(spec.model_dump_json().encode(), np.uint8))
        for encoder, table in ((user, users), (item, items)):
            encoder.save(writer)
            save_encoded(writer, f"encoded.{encoder.side}", table)
        for name, array in as_served(spec, trainer.arrays()).items():
            writer.write(name, array)
    store.publish({**release.snapshots, "vq": writer.version})
    return store


def served(store: SnapshotStore) -> Snapshot:
    release = store.current()
    assert release is not None
    return store.open("vq", release.snapshots["vq"])


def entry(seed: int, events: int = 40) -> bytes:
    """Records of an entry: exposures, clicks and finishes of a few minutes; also of users whom nobody knew."""
    rng = np.random.default_rng(seed)
    parts = []
    for n in range(events):
        user, item = int(rng.integers(0, USERS + 5)), int(rng.integers(0, ITEMS))
        time = NOW + 30 * seed + n
        if rng.random() < 0.6:
            parts.append(shown_records(user_tag(user), [item, (item + 1) % ITEMS], time))
        else:
            kind = "click" if rng.random() < 0.7 else "finish"
            parts.append(action_record(user_tag(user), item, kind_of(kind), time, 5.0))
    for item in LATE:
        user, time = seed % USERS, NOW + 30 * seed + events
        parts.append(shown_records(user_tag(user), [item], time))
        if item == LATE[0]:
            parts.append(action_record(user_tag(user), item, kind_of("finish"), time, 5.0))
    return b"".join(parts)


def main(folder: Path, url: str, checkpoint_seconds: float) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    follow.CHECKPOINT_SECONDS, follow.TELL_SECONDS = checkpoint_seconds, 0.1
    store = StateStore.connect(url, "test", 1000.0)
    config = config_of(folder)
    follower = follow.Follower(
        config,
        "vq",
        SnapshotStore(config.store.path),
        store,
        EventLog(store, 10**6),
        tell=lambda told: print(told.steps, told.events, told.waiting, flush=True),
    )
    try:
        follower.run(stop)
    except RecallError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 30.0)
