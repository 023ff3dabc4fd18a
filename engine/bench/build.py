"""`recall bench build`: how long the neighbour builders take, beside `implicit`'s, and how much memory.

`recall bench scaling`: how one builder's time grows with the data.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from engine.bench.memory import peak_memory
from engine.bench.report import circumstances, spread
from engine.config import Config
from engine.core.channel import BuildContext, Progress, SilentProgress
from engine.core.errors import ConfigError
from engine.core.interactions import Interactions
from engine.core.memory import MemorySink
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog, interest_matrix
from engine.data.form import SPLITS
from engine.offline.build import usable_cores
from engine.offline.synthetic import synthetic_interactions

ITEMCF = "itemcf"

COSINE: dict[str, Any] = {
    "activity_exponent": 0.0,
    "source_exponent": 0.5,
    "target_exponent": 0.5,
    "shrinkage": 0.0,
    "normalize": "none",
    "amplification": 1.0,
    "half_life_days": 0.0,
}
"""The options that make ItemCF's similarity the plain cosine, which is what implicit's is."""

Fit: TypeAlias = Callable[[Interactions, int, int], tuple[float, Any]]
"""(likes, neighbours, threads) -> (seconds, the similarities as a SciPy matrix)."""


def load_likes(config: Config, directory: Path) -> Interactions:
    """Return the interest matrix of a data set: without its test part where it has one."""
    dataset = Dataset.open(directory)
    events = EventLog.read(dataset, Catalogue.from_dataset(dataset))
    where = events.splits != SPLITS.index("test") if events.splits is not None else None
    return interest_matrix(events, config.interest, where, config.min_rating)


def bench_build(
    config: Config,
    liked: Interactions,
    channels: Sequence[str],
    repetitions: int,
    neighbours: int,
    progress: Progress,
    compare: bool = True,
    threads: int | None = None,
) -> dict[str, Any]:
    """Time the builds of some channels, and ItemCF's plain cosine against implicit's CosineRecommender.

    Args:
        config: options of the channels.
        liked: the data.
        channels: which to time, with their options.
        repetitions: how often; what is compared takes turns.
        neighbours: kept per item in the comparison.
        progress: told of each repetition.
        compare: whether implicit runs at all.
        threads: cores to use; None for all.

    Raises:
        ConfigError: implicit is not installed, or a channel is not declared or builds nothing.
        BuildError: a build failed.
    """
    threads = threads or usable_cores()
    for name in channels:
        if not config.channel(name)[0].needs_build:
            raise ConfigError("builds nothing, so there is nothing to time", f"channels.{name}")
    # Before anything is timed, so that a missing package costs nobody minutes.
    fit = _implicit() if compare else None
    cosine = config.with_channel_options({ITEMCF: COSINE | {"neighbours": neighbours}}) if compare else config
    times: dict[str, list[float]] = {}
    ours = theirs = None
    progress.start("repetitions", repetitions + 1)
    for round_ in range(repetitions + 1):  # the first warms kernels and caches up and is not counted
        spent = {f"{name}_s": _build(config, name, liked, threads)[0] for name in channels}
        if fit is not None:
            spent["itemcf_cosine_s"], ours = _build(cosine, ITEMCF, liked, threads)
            spent["implicit_cosine_s"], theirs = fit(liked, neighbours, threads)
            spent["itemcf_over_implicit"] = spent["itemcf_cosine_s"] / spent["implicit_cosine_s"]
        for key, value in spent.items() if round_ else ():
            times.setdefault(key, []).append(value)
        progress.advance()
    report = circumstances() | {
        "users": liked.users,
        "items": liked.items,
        "entries": liked.entries,
        "threads": threads,
        "repetitions": repetitions,
    }
    for key, values in times.items():
        report |= spread(key, values)
    if ours is not None and theirs is not None:
        report |= {"neighbours": neighbours, "neighbours_equal_share": round(equal_share(ours, theirs), 6)}
    progress.start("memory", len(channels))
    for name in channels:
        report[f"memory_{name}"] = peak_memory(config, liked, name, threads)
        progress.advance()
    report["peak_rss_mb"] = max(report[f"memory_{name}"]["peak_rss_mb"] for name in channels)
    return report


def bench_scaling(
    config: Config,
    name: str,
    users: int,
    items: int,
    events: int,
    steps: Sequence[int],
    progress: Progress,
    repetitions: int = 1,
    threads: int | None = None,
) -> dict[str, Any]:
    """Time one channel's build while users and events grow together over one catalogue.

    Args:
        config: options; the caps of Swing are what keeps it linear.
        name: the channel.
        users, items, events: sizes at step 1.
        steps: multiples of users and events.
        progress: told of each build.
        repetitions: builds per step; the time is their median.
        threads: cores to use; None for all.
    """
    threads = threads or usable_cores()
    _build(config, name, synthetic_interactions(50, 40, 500), threads)
    curve: list[dict[str, float]] = []
    progress.start(f"scaling {name}", len(steps) * repetitions)
    for step in steps:
        liked = synthetic_interactions(users * step, items, events * step)
        spent = []
        for _ in range(repetitions):
            spent.append(_build(config, name, liked, threads)[0])
            progress.advance()
        row = {"times": step, "users": liked.users, "entries": liked.entries} | spread("s", spent)
        row["us_per_entry"] = round(row["s"] / liked.entries * 1e6, 3)
        # 1 is linear; above 1 the build grows faster than its data.
        row["over_first"] = round(row["us_per_entry"] / curve[0]["us_per_entry"], 3) if curve else 1.0
        curve.append(row)
    return circumstances() | {
        "channel": name,
        "items": items,
        "threads": threads,
        "repetitions": repetitions,
        "curve": curve,
    }


def equal_share(ours: Any, theirs: Any) -> float:
    """Return the share of our neighbours that implicit has too, or that tie with the last one it kept.

    Args:
        ours: arrays of ItemCF's snapshot.
        theirs: SciPy CSR, each row holding the item itself too.
    """
    equal = 0
    for i in range(ours["indptr"].size - 1):
        part = slice(int(ours["indptr"][i]), int(ours["indptr"][i + 1]))
        at = slice(int(theirs.indptr[i]), int(theirs.indptr[i + 1]))
        others, scores = theirs.indices[at], theirs.data[at]
        least = scores[others != i].min(initial=np.inf)
        mine, similarity = ours["neighbours"][part], ours["similarities"][part]
        equal += int(np.count_nonzero(np.isin(mine, others) | (np.abs(similarity - least) < 1e-5)))
    return equal / max(int(ours["indptr"][-1]), 1)


def _build(config: Config, name: str, liked: Interactions, threads: int) -> tuple[float, dict[str, Any]]:
    """Build in memory; return (seconds, arrays)."""
    loaded, options = config.channel(name)
    now = int(liked.timestamps.max(initial=0))
    sink = MemorySink()
    began = time.perf_counter()
    loaded.build(options, BuildContext(liked, {}, now, sink, SilentProgress(), threads))
    return time.perf_counter() - began, sink.arrays


def _implicit() -> Fit:
    try:
        import scipy.sparse
        from implicit.nearest_neighbours import CosineRecommender
    except ImportError as error:
        text = "the comparison needs implicit: pip install 'recall-engine[bench]', or --no-compare without it"
        raise ConfigError(text) from error

    def fit(liked: Interactions, neighbours: int, threads: int) -> tuple[float, Any]:
        matrix = scipy.sparse.csr_matrix(
            (liked.weights, liked.rows.astype(np.int32), liked.indptr), shape=(liked.users, liked.items)
        )
        matrix.sort_indices()
        model = CosineRecommender(K=neighbours + 1, num_threads=threads)  # its lists hold the item itself
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of the form of a matrix that it makes itself
            began = time.perf_counter()
            model.fit(matrix, show_progress=False)
            spent = time.perf_counter() - began
        return spent, model.similarity.tocsr()

    return fit
