"""`recall bench deep-retrieval`: what a search of paths costs, beside comparing every item."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import njit

from engine.bench.report import circumstances, spread
from engine.core.channel import BuildContext, LoadContext, Progress, SilentProgress
from engine.core.errors import ConfigError
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.memory import MemorySink
from engine.core.query import History, QueryBatch
from engine.core.select import offer, row_of, sort_key
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.models.encoded import Encoded
from engine.models.features import Encoder, QueryEncoder
from engine.models.paths import PathModel, random_paths
from engine.models.reference import random_weights
from engine.models.spec import ModelSpec
from engine.models.towers import UserTower
from engine.plugins import channel_class

BATCHES = (1, 8)

PATHS = 3
"""J, paths of an item."""

SPREAD = 1.5
"""Of what the layers' softmaxes read: about as sure of themselves as trained ones."""

_LIKES = 1000
"""Users of the made-up log; each item is liked once."""


def bench_deep_retrieval(
    items: int,
    width: int,
    depth: int,
    beam: int,
    dimension: int,
    hidden: tuple[int, ...],
    reached: int,
    k: int,
    asked: int,
    repetitions: int,
    progress: Progress,
    history: int = 69,
) -> dict[str, Any]:
    """Time a channel of random weights against comparing the user's vector with every item's.

    Items lie on paths that users of the same kind are searched for, three each, as many paths as let a user reach about
    `reached` items: Gao et al. 2020, section 4.1, take a beam that gives 5 to 10 times what is asked for. Users are
    vectors drawn at random; the user tower is a GRU over random histories.

    Args:
        items, width, depth, beam, dimension, hidden: as the channel's options.
        reached: items on a user's paths, about.
        k: how many are asked for.
        asked: queries; every repetition asks all of them.
        repetitions: how often they are timed, after one that is not counted.
        progress: told how far it is.
        history: items that a user did.

    Returns:
        `rows`, one per batch size: CPU microseconds of a request, each with min and max: beam_us, gather_us (lists, masks
        and ranker), search_us (both), tower_us (the user tower, which is in none of the others), brute_us (all items'
        inner products and the best k); and `ratio`, brute_us / search_us. Besides: `reached`, entries on the lists of a
        user's paths; `paths`, in use.

    Raises:
        ConfigError: there are fewer paths than the beam, or fewer items than are asked for.
    """
    kind: Any = channel_class("deep_retrieval")
    if beam > width**depth:
        raise ConfigError(f"expected at most the {width**depth:,} paths there are, got {beam:,}", "--beam")
    if k > items:
        raise ConfigError(f"expected at most the {items:,} items there are, got {k:,}", "--k")
    config = kind.Config(
        width=width, depth=depth, beam=beam, dimension=dimension, path_hidden=hidden, paths=min(PATHS, width**depth),
        kept_paths=min(PATHS, width**depth), sequence={"kind": "gru", "width": dimension, "length": history},
    )  # fmt: skip
    random = np.random.default_rng(5)
    log = _made_up_log(items)
    sink = MemorySink()
    context = BuildContext(log, {}, 0, sink, SilentProgress(), 1)
    spec = ModelSpec(**dict(config.towers) | {"items": items})
    trained: dict[str, AnyArray] = {
        name: array for name, array in random_weights(spec).items() if name.startswith("user.")
    }
    trained |= random_paths(config.lattice, 0, SPREAD)
    trained["rank.vectors"] = random.standard_normal((items, dimension), np.float32)
    trained["rank.bias"] = random.standard_normal(items, np.float32)
    lattice = PathModel.load(config.lattice, trained)
    tower = UserTower.load(spec, trained)
    encoder = Encoder.fit("user", (), _LIKES, {}, "user_features")
    nobody = Encoded(np.empty((_LIKES, 0), np.int32), (), np.empty((_LIKES, 0), np.float32))
    encode = QueryEncoder(encoder, nobody, items, history)

    wanted = max(config.paths * items * beam // max(reached, 1), beam)
    codes = _paths_in_use(lattice, beam, wanted, progress)
    chosen = random.integers(0, codes.size, (items, config.paths))
    trained["assignment"] = trained["scores.paths"] = np.sort(codes[chosen], axis=1)
    trained["scores.values"] = np.ones((items, config.paths), np.float32)
    progress.start("making the lists", 1)
    kind.write(config, context, trained)
    channel = kind.load(config, LoadContext(sink.arrays, items, _LIKES, ItemColumns(items)))
    progress.advance()

    questions = _queries(asked, items, history, 6)
    vectors = _users(asked, dimension, 6)
    rows = []
    for size in BATCHES:
        starts = range(0, asked - size + 1, size)
        batches = [_queries_of(questions, start, size) for start in starts]
        mine = [np.ascontiguousarray(vectors[start : start + size]) for start in starts]
        found = [lattice.beam(part, beam) for part in mine]
        many = [np.full(size, k, np.int32)] * len(mine)
        everything = [trained["rank.vectors"]] * len(mine), [trained["rank.bias"]] * len(mine)
        brute = range(0, len(mine), max(1, len(mine) * size // 64))  # one takes so long that a few say enough
        jobs: dict[str, tuple[Callable[[int], object], range]] = {
            "beam_us": (_job(lattice.beam, mine, [beam] * len(mine)), range(len(mine))),
            "gather_us": (
                _job(channel.gather, mine, *zip(*found, strict=True), batches, many), range(len(mine)),
            ),
            "search_us": (_job(channel.search, mine, batches, many), range(len(mine))),
            "tower_us": (_job(lambda batch: tower.vectors(encode.encode(batch)), batches), range(len(mine))),
            "brute_us": (_job(best_of_all, mine, *everything, [k] * len(mine)), brute),
        }  # fmt: skip
        row: dict[str, Any] = {"batch": size}
        for name, (job, which) in jobs.items():
            progress.start(f"{name.removesuffix('_us')}, {size} together", repetitions + 1)
            row |= spread(name, _timed(job, which, size, repetitions, progress), 1)
        row["ratio"] = round(row["brute_us"] / row["search_us"], 1)
        rows.append(row)
    paths, _ = lattice.beam(vectors, beam)
    sizes = np.bincount(np.searchsorted(codes, trained["assignment"].ravel()), minlength=codes.size)
    at = np.minimum(np.searchsorted(codes, paths), codes.size - 1)
    on = np.where(codes[at] == paths, sizes[at], 0).sum(1)
    return circumstances() | {
        "items": items, "width": width, "depth": depth, "beam": beam, "dimension": dimension, "hidden": list(hidden),
        "history": history, "k": k, "queries": asked, "repetitions": repetitions, "paths": int(codes.size),
        "reached": round(float(on.mean()), 1), "rows": rows,
    }  # fmt: skip


def _job(do: Callable[..., object], *arguments: Sequence[Any]) -> Callable[[int], object]:
    """Return what does the b-th of a list of calls."""
    calls = list(zip(*arguments, strict=True))
    return lambda b: do(*calls[b])


def _timed(
    job: Callable[[int], object], which: range, size: int, repetitions: int, progress: Progress
) -> list[float]:
    """Return CPU microseconds per query of each repetition."""
    spent = []
    for _ in range(repetitions + 1):
        started = time.process_time()
        for b in which:
            job(b)
        spent.append((time.process_time() - started) / (len(which) * size) * 1e6)
        progress.advance()
    return spent[1:]


def _made_up_log(items: int) -> Interactions:
    indptr = np.linspace(0, items, _LIKES + 1).astype(np.int64)
    return Interactions(
        _LIKES,
        items,
        indptr,
        np.arange(items, dtype=np.int32),
        np.ones(items, np.float32),
        np.zeros(items, np.int64),
    )


def _queries(count: int, items: int, history: int, seed: int) -> QueryBatch:
    random = np.random.default_rng((seed, 0xD4))
    rows = random.integers(0, items, count * history).astype(np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * history
    did = History(rows, np.ones(rows.size, np.float32), np.zeros(rows.size, np.int64), offsets)
    return QueryBatch.plain(np.full(count, -1, np.int32), did)


def _queries_of(batch: QueryBatch, start: int, size: int) -> QueryBatch:
    offsets = batch.history.offsets
    part = slice(int(offsets[start]), int(offsets[start + size]))
    did = History(
        batch.history.rows[part],
        batch.history.weights[part],
        batch.history.timestamps[part],
        offsets[start : start + size + 1] - offsets[start],
    )
    return QueryBatch.plain(np.full(size, -1, np.int32), did)


def _users(count: int, dimension: int, seed: int) -> Float32Array:
    return np.random.default_rng((seed, 0xD5)).standard_normal((count, dimension), np.float32)


def _paths_in_use(lattice: PathModel, beam: int, wanted: int, progress: Progress) -> Int64Array:
    """Return codes that made-up users are searched for, rising: `wanted` of them or a few more, or what 100,000 have."""
    progress.start("searching the paths of users", 200)
    seen = np.empty(0, np.int64)
    for seed in range(200):
        if seen.size >= wanted:
            break
        users = _users(500, lattice.spec.dimension, 100 + seed)
        seen = np.union1d(seen, lattice.beam(users, beam)[0])
        progress.advance()
    return seen


def best_of_all(
    users: Float32Array, vectors: Float32Array, bias: Float32Array, k: int
) -> tuple[Int32Array, Float32Array]:
    """Return the k items of the largest u . w_v + b_v for each user, by comparing all: int32 and float32[n, k]."""
    products = users @ vectors.T
    rows, scores = np.empty((len(users), k), np.int32), np.empty((len(users), k), np.float32)
    _best(products, bias, rows, scores)
    return rows, scores


@njit(nogil=True, cache=True)
def _best(products, bias, rows, scores):  # type: ignore[no-untyped-def]
    k = rows.shape[1]
    keys = np.empty(4 * k, np.uint64)
    one = np.empty(1, np.float32)
    bits = one.view(np.uint32)
    for q in range(rows.shape[0]):
        line = products[q]
        count, worst = 0, np.uint64(0)
        for row in range(bias.size):
            one[0] = line[row] + bias[row]
            count, worst = offer(keys, count, k, worst, sort_key(bits[0], row))
        chosen = np.sort(keys[:count])
        for rank in range(k):
            best = row_of(chosen[count - 1 - rank])
            rows[q, rank] = best
            scores[q, rank] = line[best] + bias[best]
