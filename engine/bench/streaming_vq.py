"""`recall bench streaming-vq`: what a request costs, part by part, what a move costs, and what an item takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from engine.bench.report import circumstances, spread
from engine.core.channel import BuildContext, LoadContext, Progress, SilentProgress
from engine.core.errors import ConfigError
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.memory import MemorySink
from engine.core.query import History, QueryBatch
from engine.core.types import AnyArray, Float32Array
from engine.models.rank import random_rank
from engine.models.reference import random_weights
from engine.models.spec import ModelSpec
from engine.plugins import channel_class

BATCHES = (1, 8)

LARGER = 350_000_000
"""Items that the memory is worked out for besides: those of the paper."""

SPREAD = 0.3
"""Of the vectors' entries and the biases: a cluster's score varies more than its items' biases, as after a training."""

_LIKES = 1000
"""Users of the made-up log; each item is liked once."""

_DEEP_RETRIEVAL = {"assignment": 24, "lists.rows": 12}
"""Bytes an item that the index of Deep Retrieval takes with J = 3: codes of its paths, and its places in their lists."""


def bench_streaming_vq(
    items: int,
    clusters: int,
    rank_list: int,
    dimension: int,
    rank: str,
    rank_dimension: int,
    k: int,
    asked: int,
    repetitions: int,
    progress: Progress,
    history: int = 50,
) -> dict[str, Any]:
    """Time a channel of random weights, as it was built and after every item was moved once.

    Items are in random clusters; biases and vectors are drawn from normal distributions. Users are random histories, of
    which the tower reads the mean.

    Args:
        items, clusters, rank_list, dimension, rank, rank_dimension: as the channel's options.
        k: how many are asked for.
        asked: queries; every repetition asks all of them.
        repetitions: how often they are timed, after one that is not counted.
        progress: told how far it is.
        history: items that a user did.

    Returns:
        `rows`, per `lists` ("built", "moved") and batch size CPU microseconds of a request, each with min and max:
        scores_us (of the clusters), merge_us, search_us (both, and the ranking step and the cut to k), tower_us (user
        towers, in none of the others), and of lists as built sort_us (the keys of all items, sorted, in merge_us's place)
        and ratio, sort_us / merge_us; rank_us is what search_us has besides. `assign_us`, of an assignment. `memory`,
        bytes an item: `mapped`, one copy for all workers, by array, and `own`, of a worker where every item was moved;
        `index`, of the arrays that say where an item is, beside `deep_retrieval`'s with three paths; `larger`, GiB
        of these for 350 million items.

    Raises:
        ConfigError: fewer items than are asked for, or clusters than items.
    """
    kind: Any = channel_class("streaming_vq")
    if k > min(items, rank_list):
        raise ConfigError(
            f"expected at most the {min(items, rank_list):,} items there can be, got {k:,}", "--k"
        )
    if clusters > items:
        raise ConfigError(f"expected at most the {items:,} items there are, got {clusters:,}", "--clusters")
    config = kind.Config(
        clusters=clusters, rank_list=rank_list, dimension=dimension, rank=rank, rank_dimension=rank_dimension,
        sequence={"kind": "mean", "width": dimension, "length": history},
    )  # fmt: skip
    random = np.random.default_rng(5)
    sink = MemorySink()
    context = BuildContext(_made_up_log(items), {}, 0, sink, SilentProgress(), 1)
    progress.start("making the lists", 1)
    kind.write(config, context, _trained(config, items, random))
    channel = kind.load(config, LoadContext(sink.arrays, items, _LIKES, ItemColumns(items)))
    progress.advance()

    questions = _queries(asked, items, history)
    clusters_of, biases = sink.arrays["assignment"], sink.arrays["item_bias"]
    rows: list[dict[str, Any]] = []
    assign_us: list[float] = []
    for lists in ("built", "moved"):
        if lists == "moved":
            clusters_of, biases, assign_us = _move_all(
                channel, items, clusters, random, repetitions, progress
            )
        for size in BATCHES:
            row: dict[str, Any] = {"lists": lists, "batch": size}
            row |= _times(
                channel, questions, size, k, (clusters_of, biases), repetitions, progress, lists == "built"
            )
            rows.append(row)
    return circumstances() | {
        "items": items, "clusters": clusters, "rank_list": rank_list, "dimension": dimension, "rank": rank,
        "rank_dimension": rank_dimension, "history": history, "k": k, "queries": asked, "repetitions": repetitions,
        "rows": rows, **spread("assign_us", assign_us, 3), "memory": _memory(channel, sink.arrays, items),
    }  # fmt: skip


def _trained(config: Any, items: int, random: np.random.Generator) -> dict[str, AnyArray]:
    """Return arrays as a training gives them, at random."""
    towers = ModelSpec(
        **{name: getattr(config, name) for name in ModelSpec.model_fields if hasattr(config, name)}
    )
    first = towers.features("item")[0].model_copy(update={"size": items + 1})
    spec = config.spec_of(towers.model_copy(update={"item_features": (first,), "items": items}))
    arrays: dict[str, AnyArray] = dict(random_weights(spec.tower)) | dict(random_rank(spec))

    def normal(*shape: int) -> Float32Array:
        return random.standard_normal(shape, np.float32) * np.float32(SPREAD)

    arrays["bias.weight"] = normal(items + 1)
    arrays["codebook.vectors"] = normal(spec.clusters, spec.tower.dimension)
    arrays["codebook.counts"] = np.ones(spec.clusters, np.float32)
    arrays["codebook.sums"] = arrays["codebook.vectors"]
    arrays["assignment"] = random.integers(0, spec.clusters, items).astype(np.int32)
    arrays["item_bias"] = arrays["bias.weight"][1:]
    if spec.rank != "none":
        arrays["rank.item_vectors"] = normal(items, spec.rank_dimension)
        arrays["rank.item_bias"] = normal(items, 1)
    if spec.rank == "complex":
        arrays["secondary"] = random.integers(0, spec.secondary_clusters, spec.clusters).astype(np.int32)
    return arrays


def _move_all(
    channel: Any, items: int, clusters: int, random: np.random.Generator, repetitions: int, progress: Progress
) -> tuple[AnyArray, AnyArray, list[float]]:
    """Assign every item, in random order, a thousand at a time; return clusters, biases and microseconds of each."""
    to = random.integers(0, clusters, items).astype(np.int32)
    biases = random.standard_normal(items, np.float32) * np.float32(SPREAD)
    order = random.permutation(items).astype(np.int32)
    parts = np.array_split(order, max(1, repetitions))
    progress.start("moving every item", len(parts))
    # What an assignment runs is loaded before it is timed.
    channel.assign(order[:1], to[order[:1]], biases[order[:1]])
    spent = []
    for part in parts:
        started = time.process_time()
        for begin in range(0, part.size, 1000):
            rows = part[begin : begin + 1000]
            channel.assign(rows, to[rows], biases[rows])
        spent.append((time.process_time() - started) / max(part.size, 1) * 1e6)
        progress.advance()
    return to, biases, spent


def _times(
    channel: Any,
    questions: QueryBatch,
    size: int,
    k: int,
    assigned: tuple[AnyArray, AnyArray],
    repetitions: int,
    progress: Progress,
    sorts: bool,
) -> dict[str, Any]:
    """Return CPU microseconds of a request in batches of one size; see `bench_streaming_vq`."""
    starts = range(0, len(questions) - size + 1, size)
    batches = [_queries_of(questions, start, size) for start in starts]
    encoded = [channel._queries.encode(batch) for batch in batches]
    made = [channel.user_vectors(users) for users in encoded]
    vectors, inputs = [each[0] for each in made], [each[1] for each in made]
    scores = [channel._scorer.scores(mine) for mine in vectors]
    asked, wanted = np.ones(size, np.bool_), np.full(size, k, np.int32)
    most = channel.config.rank_list

    def merge(b: int) -> Any:
        return channel._merger.merge(scores[b], asked, most, batches[b].excluded)

    def search(b: int) -> object:
        return channel.search(vectors[b], inputs[b], encoded[b], batches[b], wanted)

    def tower(b: int) -> object:
        return channel.user_vectors(channel._queries.encode(batches[b]))

    def sort(b: int) -> object:
        return [_sorted(line, *assigned, most) for line in scores[b]]

    every = range(len(batches))
    some = range(0, len(batches), max(1, len(batches) * size // 16))  # it takes so long that a few say enough
    jobs: dict[str, tuple[Callable[[int], object], Sequence[int]]] = {
        "scores_us": (lambda b: channel._scorer.scores(vectors[b]), every),
        "merge_us": (merge, every),
        "search_us": (search, every),
        "tower_us": (tower, every),
    }
    if sorts:
        jobs["sort_us"] = (sort, some)
    row: dict[str, Any] = {}
    for name, (job, which) in jobs.items():
        progress.start(f"{name.removesuffix('_us')}, {size} together", repetitions + 1)
        spent = []
        for _ in range(repetitions + 1):
            started = time.process_time()
            for b in which:
                job(b)
            spent.append((time.process_time() - started) / (len(which) * size) * 1e6)
            progress.advance()
        row |= spread(name, spent[1:], 1)
    row["rank_us"] = round(row["search_us"] - row["scores_us"] - row["merge_us"], 1)
    if sorts:
        row["ratio"] = round(row["sort_us"] / row["merge_us"], 1)
    return row


def _sorted(line: Float32Array, clusters: AnyArray, biases: AnyArray, most: int) -> AnyArray:
    """Return the first `most` of all items by key: what the merge stands in for."""
    keys = line[clusters] + biases
    order: AnyArray = np.argsort(-keys)[:most]
    return order


def _memory(channel: Any, arrays: Mapping[str, AnyArray], items: int) -> dict[str, Any]:
    """Return bytes an item of what is mapped and what is a worker's own, and GiB for 350 million items."""
    names = ("assignment", "item_bias", *sorted(name for name in arrays if name.startswith("lists.")))
    mapped = {
        name: round(arrays[name].nbytes / items, 2)
        for name in names
        if name in arrays and arrays[name].shape[0] == items
    }
    own = channel._lists.nbytes
    each = {name: round(own[name] / items, 2) for name in ("blocks", "slots")}
    index = {
        name: mapped[name] for name in ("assignment", "item_bias", "lists.rows", "lists.places", "lists.bias")
    }
    fixed = (
        own["clusters"]
        + channel._scorer.nbytes
        + sum(arrays[name].nbytes for name in ("codebook.vectors", "lists.offsets"))
    )
    gib = 2.0**30
    return {
        "mapped": mapped,
        "own": each,
        "clusters_bytes": int(fixed),
        "index": round(sum(index.values()), 2),
        "deep_retrieval": dict(_DEEP_RETRIEVAL),
        "larger": {
            "items": LARGER,
            "index_gib": round(sum(index.values()) * LARGER / gib, 2),
            "ranking_gib": round((sum(mapped.values()) - sum(index.values())) * LARGER / gib, 2),
            "own_gib": round(sum(each.values()) * LARGER / gib, 2),
        },
    }


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


def _queries(count: int, items: int, history: int) -> QueryBatch:
    random = np.random.default_rng((6, 0xD8))
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
