"""`recall bench pipeline`: CPU time of a request in the pipeline, without gRPC, at a catalogue of any size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.bench.made_up import CITIES, MadeUpState, city_centres, city_name
from engine.bench.report import circumstances, spread
from engine.bench.world import World, made_up_world
from engine.config import Config
from engine.core.channel import Progress
from engine.data.snapshot import SnapshotStore
from engine.online.hydrate import Hydrator
from engine.online.pipeline import Pipeline
from engine.online.replica import Replica
from engine.online.request import Request
from engine.state.history import HISTORY, SnapshotHistory

LATITUDES, LONGITUDES = city_centres()


def bench_pipeline(
    config: Config,
    channels: Sequence[str],
    items: int,
    limit: int,
    store: SnapshotStore,
    progress: Progress,
    repetitions: int = 7,
    requests: int = 1000,
) -> dict[str, Any]:
    """Build a synthetic world into the store (or find it there) and time requests of random users against it.

    Args:
        config: channels and their options.
        channels: which answer.
        items: catalogue size; users are a fifth of it, with 60 likes each.
        limit: candidates asked for.
        store: where the world is kept.
        progress: told of the build.
        repetitions: how often the requests are timed; the spread is over these.
        requests: per repetition and batch size.
    """
    world = made_up_world(config, channels, items, limit, store, progress)
    pipeline, users = _pipeline(world)
    now = world.now
    progress.start("requests", 2 * (repetitions + 1))
    rng = np.random.default_rng(5)
    report = circumstances() | {
        "items": items,
        "users": users,
        "channels": list(channels),
        "limit": limit,
        "repetitions": repetitions,
    }
    for size in (1, 8):
        cpu: list[float] = []
        parts: dict[str, list[float]] = {}
        for round_ in range(repetitions + 1):  # the first warms caches and kernels up and is not counted
            asked = rng.integers(0, users, (requests // size, size))
            batches = [[_request(user, limit, now) for user in row] for row in asked.tolist()]
            sums: dict[str, float] = {}
            started = time.process_time()
            for batch in batches:
                run = pipeline.run(batch)
                for name, spent in run.stage_us.items():
                    sums[name] = sums.get(name, 0.0) + spent
                for name, spent in zip(pipeline.channel_names, run.channel_us.tolist(), strict=True):
                    sums[name] = sums.get(name, 0.0) + spent
            spent = time.process_time() - started
            if round_:
                done = len(batches) * size
                cpu.append(spent / done * 1e6)
                for name, total in sums.items():
                    parts.setdefault(name, []).append(total / done)
            progress.advance()
        report |= spread(f"batch{size}_us", cpu, 1)
        report[f"batch{size}_parts_us"] = {
            name: round(float(np.median(values)), 1) for name, values in parts.items()
        }
    return report


def _request(user: int, limit: int, now: int) -> Request:
    """Return a request from the middle of a city, which asks for more like the item of the user's own number."""
    city = user % CITIES
    return Request(
        user_id=user,
        limit=limit,
        now=now,
        latitude=float(LATITUDES[city]),
        longitude=float(LONGITUDES[city]),
        city=city_name(city),
        triggers=np.array([user], np.int64),
    )


def _pipeline(world: World) -> tuple[Pipeline, int]:
    """Return the world's pipeline over made-up user state, and how many users there are."""
    snapshots = world.snapshots()
    replica = Replica.of(world.config, "bench", snapshots)
    live = replica.catalogue
    state = MadeUpState.of(SnapshotHistory(snapshots[HISTORY].arrays), live.base)
    hydrator = Hydrator(live.items, live.users, state, live.authors, live.columns)
    scene = world.config.scenes["default"]
    return Pipeline(scene, dict(replica.channels), dict(replica.filters), hydrator), len(live.users)
