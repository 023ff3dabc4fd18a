"""`recall bench streaming-vq-drift`: a planted world changes in mid-stream, under streaming VQ and under a nightly index.

Users have one interest each, items belong to one; some items are shown far more often than others. After the warm-up a
share of the items belongs to another interest from one moment to the next. The trainer goes on learning; the other index
is the same model as it was at that moment, users' and items' vectors compared exactly, and stays so until the next night.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

from engine.bench.report import circumstances
from engine.core.channel import Progress
from engine.core.errors import BuildError
from engine.core.types import AnyArray, BoolArray, Float32Array, Int32Array
from engine.models.codebook import balance_of
from engine.models.encoded import Encoded, EncodedUsers
from engine.models.spec import Feature, ModelSpec
from engine.models.streaming_options import StreamingOptions
from engine.models.vq_spec import VqSpec

INTERESTS, WIDTH, BEST = 20, 16, 30

MINUTES = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30)
"""Minutes of the stream after the change at which is looked."""

BACK = 0.98
"""Part of the recall before the change at which it counts as back."""


def bench_drift(
    users: int,
    items: int,
    clusters: int,
    rate: int,
    share: float,
    warm_up: int,
    seeds: Sequence[int],
    options: StreamingOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Let the world change under both.

    Args:
        users, items, clusters: how many.
        rate: impressions a minute, each with a reward.
        share: of the items that change.
        warm_up: minutes before the change.
        seeds: a world and a training each.
        options: of the training; one task.
        progress: told how far it is.

    Returns:
        `rows`, per minute of `MINUTES`: `live` and `frozen`, the share of the 30 best items of a user that are of the
        user's interest, each with its deviation `_sd`, and `largest`, the fullest cluster's share; `before`, that share
        before the change; `back`, per seed the first minute in which it is back, -1 where it is not in 30.

    Raises:
        BuildError: PyTorch is not installed.
    """
    try:
        from engine.training.impressions import ImpressionBatch
        from engine.training.streaming_trainer import StreamingTrainer
    except ModuleNotFoundError as error:
        raise BuildError("training needs PyTorch: pip install 'recall-engine[train]'") from error

    tower = ModelSpec(
        user_features=(Feature(name="user_id", kind="id", dimension=WIDTH, size=users + 1),),
        item_features=(Feature(name="item_id", kind="id", dimension=WIDTH, size=items + 1),),
        dimension=WIDTH, metric="inner", items=items, tie_items=False,
    )  # fmt: skip
    spec = VqSpec(tower=tower, clusters=clusters)
    records: list[dict[int, dict[str, float]]] = []
    befores: list[float] = []
    backs: list[int] = []
    for seed in seeds:
        world = _World(users, items, seed)
        trainer = StreamingTrainer(spec, options.model_copy(update={"seed": seed}), _codes(items))
        owed = candidates = 0.0

        def minute(world: _World = world, trainer: StreamingTrainer = trainer) -> None:
            nonlocal owed, candidates
            owed += rate
            while owed >= options.batch:
                owed -= options.batch
                whose, what = world.shown(options.batch)
                none = np.zeros((options.batch, 0), np.int32)
                ids = _codes(users).codes[whose]
                encoded = EncodedUsers(
                    ids, (), np.empty((options.batch, 0), np.float32), none, np.zeros(options.batch, np.int32)
                )
                ones = np.ones((options.batch, 1), np.float32)
                trainer.step(ImpressionBatch(whose, encoded, what, ones, np.full(options.batch, 1, np.int64)))
                candidates += options.candidate_share * options.batch
                trainer.assign(trainer.candidates(int(candidates)))
                candidates -= int(candidates)

        progress.start(f"seed {seed}", warm_up + max(MINUTES))
        for _ in range(warm_up):
            minute()
            progress.advance()
        arrays = trainer.arrays()
        frozen = _best(arrays["user.embeddings.0.weight"][1:], arrays["item.embeddings.0.weight"][1:], arrays)
        before = world.right(_of_clusters(arrays))
        world.change(share)
        found: dict[int, dict[str, float]] = {}
        back = -1
        for at in range(max(MINUTES) + 1):
            if at:
                minute()
                progress.advance()
            arrays = trainer.arrays()
            live = world.right(_of_clusters(arrays))
            if back < 0 and at and live >= BACK * before:
                back = at
            found[at] = {
                "live": live,
                "frozen": world.right(frozen),
                "largest": balance_of(arrays["assignment"], clusters).largest,
            }
        records.append(found)
        befores.append(before)
        backs.append(back)
    rows = [{"minute": at} | _summed([found[at] for found in records]) for at in MINUTES]
    return circumstances() | {
        "users": users, "items": items, "clusters": clusters, "rate": rate, "share": share, "warm_up": warm_up,
        "seeds": list(seeds), "before": mean(befores), "back": backs, "rows": rows,
    }  # fmt: skip


class _World:
    def __init__(self, users: int, items: int, seed: int) -> None:
        self._random = np.random.default_rng((seed, 0xD21F7))
        self._of_user = self._random.integers(0, INTERESTS, users)
        self._of_item = np.arange(items) % INTERESTS
        self._popularity = (np.arange(items) // INTERESTS + 1.0) ** -0.8

    def change(self, share: float) -> None:
        """Give a share of the items another interest."""
        moved: BoolArray = self._random.random(self._of_item.size) < share
        step = self._random.integers(1, INTERESTS, self._of_item.size)
        self._of_item = np.where(moved, (self._of_item + step) % INTERESTS, self._of_item)

    def shown(self, count: int) -> tuple[Int32Array, Int32Array]:
        """Return int32[count] users and int32[count] items that they like."""
        users = self._random.integers(0, self._of_user.size, count).astype(np.int32)
        items = np.empty(count, np.int32)
        for interest in range(INTERESTS):
            mine = np.flatnonzero(self._of_user[users] == interest)
            its = np.flatnonzero(self._of_item == interest)
            weights = self._popularity[its] / self._popularity[its].sum()
            items[mine] = self._random.choice(its, mine.size, p=weights)
        return users, items

    def right(self, best: AnyArray) -> float:
        """Return the share of int32[users, 30] that is of the users' interest."""
        return float(np.mean(self._of_item[best] == self._of_user[:, None]))


def _of_clusters(arrays: dict[str, AnyArray]) -> AnyArray:
    """Return int[users, 30], the best by u . Q(v) + bias; items that are in no cluster are none of them."""
    assignment = arrays["assignment"]
    vectors = arrays["codebook.vectors"][np.maximum(assignment, 0)]
    biases = np.where(assignment < 0, -np.inf, arrays["item_bias"]).astype(np.float32)
    return _best(arrays["user.embeddings.0.weight"][1:], vectors, {"item_bias": biases})


def _best(users: Float32Array, vectors: AnyArray, arrays: dict[str, AnyArray]) -> AnyArray:
    scores = users @ vectors.T + arrays["item_bias"]
    order: AnyArray = np.argpartition(-scores, BEST, axis=1)[:, :BEST]
    return order


def _codes(count: int) -> Encoded:
    return Encoded(np.arange(1, count + 1, dtype=np.int32)[:, None], (), np.empty((count, 0), np.float32))


def _summed(records: Sequence[dict[str, float]]) -> dict[str, float]:
    made: dict[str, float] = {}
    for name in records[0]:
        values = [record[name] for record in records]
        made |= {name: mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else 0.0}
    return made
