"""`recall bench mstep`: how long Deep Retrieval's M-step takes for a catalogue, and what its penalty does."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from engine.bench.report import circumstances, spread
from engine.core.channel import Progress
from engine.core.errors import ConfigError
from engine.core.types import Float32Array, Float64Array, Int64Array
from engine.models.assignment import assign, moved_share, path_sizes, random_paths

BLOCK = 1_000_000
"""Items that scores are made up for at once."""

SKEW = 4.0
"""How crowded the made-up favourites are: a candidate is at quantile u^SKEW of the paths, u uniform."""


def bench_mstep(
    items: int,
    per_item: int,
    kept: int,
    width: int,
    depth: int,
    penalty: float,
    passes: int,
    threads: int,
    progress: Progress,
    repetitions: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Time the M-step on made-up scores and compare its paths with those without a penalty.

    Args:
        items: of the made-up catalogue; all have scores.
        per_item: J.
        kept: S, at most width^depth / 10.
        width, depth: K and D.
        penalty: alpha.
        passes: of coordinate descent.
        threads: cores to use.
        progress: told of the items.
        repetitions: how often the one with the penalty is timed.
        seed: of the scores.

    Returns:
        `seconds` with `_min` and `_max`; `rows`, with the penalty and without: `penalty`, `largest` (items on the fullest
        path), `largest_share` of the items, `paths` in use, `mean_size`; `moved`: share of the items whose paths the last
        pass still changed.
    """
    paths = width**depth
    if not kept * 10 <= paths < 1 << 53:
        raise ConfigError(
            f"width {width} and depth {depth} make {paths:,} paths: made-up scores need 10 x {kept} to 2^53"
        )
    candidates, scores, counts = made_up_scores(items, kept, paths, seed)
    start = random_paths(items, per_item, paths, np.random.default_rng(seed))
    # Compiled, or read from the cache, before the clock runs.
    assign(candidates[:10], scores[:10], counts[:10], per_item, penalty, 1, threads, progress, start[:10])
    times, rows = [], []
    for _ in range(repetitions):
        began = time.monotonic()
        chosen = assign(candidates, scores, counts, per_item, penalty, passes, threads, progress, start)
        times.append(time.monotonic() - began)
    rows.append({"penalty": penalty, **_sizes(chosen)})
    before = assign(
        candidates, scores, counts, per_item, penalty, max(passes - 1, 1), threads, progress, start
    )
    without = assign(candidates, scores, counts, per_item, 0.0, 1, threads, progress, start)
    rows.append({"penalty": 0.0, **_sizes(without)})
    return {
        "items": items, "per_item": per_item, "kept": kept, "width": width, "depth": depth, "passes": passes,
        "threads": threads, **spread("seconds", times), "rows": rows, "moved": round(moved_share(before, chosen), 5),
        **circumstances(),
    }  # fmt: skip


def made_up_scores(
    items: int, kept: int, paths: int, seed: int
) -> tuple[Int64Array, Float32Array, Float64Array]:
    """Return int64[items, kept] paths, float32 scores of them, best first, and float64[items] counts with a long tail.

    An item's candidates are distinct, each at a skewed quantile of the paths of its own class.
    """
    random = np.random.default_rng(seed)
    candidates, scores = np.empty((items, kept), np.int64), np.empty((items, kept), np.float32)
    for begin in range(0, items, BLOCK):
        n = min(BLOCK, items - begin)
        # One candidate in each of `kept` interleaved classes of paths: no path comes twice.
        drawn = (random.random((n, kept)) ** SKEW * (paths // kept)).astype(np.int64)
        candidates[begin : begin + n] = drawn * kept + random.permuted(
            np.tile(np.arange(kept), (n, 1)), axis=1
        )
        scores[begin : begin + n] = -np.sort(-random.standard_exponential((n, kept), np.float32), 1)
    counts = np.floor(random.pareto(1.2, items) * 5 + 1)
    return candidates, scores, counts


def _sizes(chosen: Int64Array) -> dict[str, float]:
    sizes = path_sizes(chosen)[1]
    return {
        "largest": int(sizes.max()),
        "largest_share": float(sizes.max() / len(chosen)),
        "paths": int(sizes.size),
        "mean_size": float(sizes.mean()),
    }
