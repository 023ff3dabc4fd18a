"""`recall bench ann`: what each kind of vector index finds, and what building and asking it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from engine.ann import IndexKind, IndexOptions, VectorIndex, build_index, load_index
from engine.bench.report import circumstances, spread
from engine.core.channel import Progress
from engine.core.errors import ConfigError
from engine.core.types import Float32Array, Int32Array

BATCHES = (1, 8)

SETTINGS: dict[IndexKind, tuple[dict[str, int], ...]] = {
    "exact": ({},),
    "hnsw": tuple({"ef_search": ef} for ef in (200, 300, 400, 800)),
    "hnsw_faiss": tuple({"ef_search": ef} for ef in (200, 300, 400, 800)),
    "ivf_int8": tuple({"probes": probes} for probes in (8, 16, 20, 32, 64)),
    "ivf_flat": tuple({"probes": probes} for probes in (8, 16, 32, 64, 128)),
    "ivf_pq": tuple({"probes": probes, "rerank": 4} for probes in (8, 32, 128)),
}
"""Per kind, the online options that are measured on one build."""

LATENT = 24
CLUSTER_SIZE = 1000
_WITHIN = 0.6
_NOISE = 0.05


def kinds_of(text: str) -> list[IndexKind]:
    """Return the kinds in `hnsw,exact`; ConfigError for what is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SETTINGS]
    if unknown or not names:
        got = f"got {unknown[0]!r}" if unknown else "got none"
        raise ConfigError(f"expected kinds of {', '.join(SETTINGS)}, {got}", "--kinds")
    return [kind for kind in SETTINGS if kind in names]


def options_of(pairs: Sequence[str]) -> IndexOptions:
    """Return the options that `m=32` and its like change; ConfigError for one that there is not, or out of range."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"expected NAME=VALUE, got {pair!r}", "--option")
        values[name.strip()] = value.strip()
    try:
        return IndexOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "--option") from error


def read_vectors(path: Path, flag: str) -> Float32Array:
    """Return the .npy, memory-mapped; ConfigError where it is none of float32[items, dimension]."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", flag) from error
    if (
        not isinstance(vectors, np.ndarray)
        or vectors.dtype != np.float32
        or vectors.ndim != 2
        or not vectors.size
    ):
        raise ConfigError(f"expected {path} to hold float32[items, dimension]", flag)
    return vectors


def made_up_vectors(
    items: int, dimension: int, queries: int, seed: int = 3
) -> tuple[Float32Array, Float32Array]:
    """Return normalised vectors in clusters, as towers make them: float32[items, d] and float32[queries, d].

    Each is a point of a 24-dimensional space (of `dimension`, where that is less), drawn normally around the centre of
    one of items / 1,000 clusters with 0.6 of the spread of the centres, mapped to `dimension` at random, with a little
    noise in every dimension. Queries are drawn as the vectors are.
    """
    random = np.random.default_rng(seed)
    latent = min(LATENT, dimension)
    clusters = max(1, items // CLUSTER_SIZE)
    centres = random.standard_normal((clusters, latent), np.float32)
    lift = random.standard_normal((latent, dimension), np.float32) / np.float32(np.sqrt(latent))
    vectors = np.empty((items + queries, dimension), np.float32)
    for start in range(0, len(vectors), 65_536):
        part = vectors[start : start + 65_536]
        points = centres[random.integers(0, clusters, len(part))]
        points = points + np.float32(_WITHIN) * random.standard_normal(points.shape, np.float32)
        part[:] = points @ lift + np.float32(_NOISE) * random.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors[:items], vectors[items:]


def queries_near(vectors: Float32Array, queries: int, seed: int = 3) -> Float32Array:
    """Return queries for vectors of which nobody asked yet: each is a vector drawn at random, moved by a normal step of
    half its length, so that it is near some and on none."""
    random = np.random.default_rng(seed)
    drawn = np.array(vectors[np.sort(random.integers(0, len(vectors), queries))])
    lengths = np.linalg.norm(drawn, axis=1, keepdims=True)
    steps = random.standard_normal(drawn.shape, np.float32) / np.float32(np.sqrt(drawn.shape[1]))
    return random.permutation(drawn + np.float32(0.5) * lengths * steps).astype(np.float32)


def bench_ann(
    vectors: Float32Array,
    queries: Float32Array,
    kinds: Sequence[IndexKind],
    options: IndexOptions,
    k: int,
    threads: int,
    progress: Progress,
    repetitions: int = 3,
) -> dict[str, Any]:
    """Build each kind, and measure it at several settings.

    Args:
        vectors: float32[items, d].
        queries: float32[n, d]; every repetition asks all of them.
        kinds: which.
        options: of the builds; those read online that `SETTINGS` has are replaced.
        k: how many are asked for.
        threads: of the builds; a search has one.
        progress: told how far it is.
        repetitions: how often the queries are timed per batch size, after one that is not counted.

    Returns:
        `rows`, one per kind and setting: recall (mean over the queries of the share of the true k nearest that was
        found), recall_p5 (of the worst 20th), batch1_us and batch8_us (CPU time of a query in such a batch, with min and
        max), build_s (wall time), build_cpu_s, bytes (of the index, without the vectors).

    Raises:
        BuildError: options do not fit the vectors.
        ConfigError: more is asked for than there is.
    """
    if queries.shape[1] != vectors.shape[1]:
        raise ConfigError(
            f"expected queries of {vectors.shape[1]} dimensions, got {queries.shape[1]}", "--queries"
        )
    if k > len(vectors):
        raise ConfigError(f"expected at most the {len(vectors):,} vectors there are, got {k:,}", "--k")
    truth = _truth(build_index("exact", vectors, options), queries, k, progress)
    rows = []
    for kind in kinds:
        wall, cpu = time.perf_counter(), time.process_time()
        index = build_index(kind, vectors, options, threads, progress)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        arrays = index.arrays()
        built = {
            "kind": kind,
            "library": index.library,
            "build_s": round(wall, 2),
            "build_cpu_s": round(cpu, 2),
            "bytes": sum(array.nbytes for array in arrays.values()),
        }
        del index
        for setting in SETTINGS[kind]:
            index = load_index(arrays, vectors, options.model_copy(update=setting))
            rows.append(
                built | {"setting": setting} | _measured(index, queries, truth, k, repetitions, progress)
            )
            del index
    return circumstances() | {
        "items": len(vectors),
        "dimension": int(vectors.shape[1]),
        "queries": len(queries),
        "k": k,
        "threads": threads,
        "repetitions": repetitions,
        "options": options.model_dump(mode="json"),
        "rows": rows,
    }


def _truth(index: VectorIndex, queries: Float32Array, k: int, progress: Progress) -> Int32Array:
    progress.start("exact answers", len(queries))
    parts = []
    for start in range(0, len(queries), 64):
        part = queries[start : start + 64]
        parts.append(index.search(part, k)[0])
        progress.advance(len(part))
    return np.concatenate(parts)


def _measured(
    index: VectorIndex,
    queries: Float32Array,
    truth: Int32Array,
    k: int,
    repetitions: int,
    progress: Progress,
) -> dict[str, Any]:
    # An exact index takes so long that a few queries say enough.
    asked = queries if index.kind != "exact" else queries[:64]
    progress.start(f"asking {index.kind}", (repetitions + 1) * len(BATCHES))
    found = index.search(asked, k)[0]
    recalls = np.array(
        [np.isin(mine, its).mean() for mine, its in zip(truth[: len(asked)], found, strict=True)]
    )
    measured: dict[str, Any] = {
        "recall": round(float(recalls.mean()), 4),
        "recall_p5": round(float(np.quantile(recalls, 0.05)), 4),
    }
    for batch in BATCHES:
        parts = [asked[start : start + batch] for start in range(0, len(asked) - batch + 1, batch)]
        wanted = np.full(batch, k, np.int32)
        spent = []
        for _ in range(repetitions + 1):
            started = time.process_time()
            for part in parts:
                index.search_masked(part, wanted)
            spent.append((time.process_time() - started) / (len(parts) * batch) * 1e6)
            progress.advance()
        measured |= spread(f"batch{batch}_us", spent[1:], 1)
    return measured
