"""`recall bench build`: how long the neighbour builders take, beside `implicit`'s, and how much memory."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.bench.report import circumstances, spread
from engine.config import Config
from engine.core.channel import BuildContext, SilentProgress
from engine.core.errors import ConfigError
from engine.core.interactions import Interactions
from engine.core.memory import MemorySink
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog, interest_matrix
from engine.data.snapshot import SnapshotStore
from engine.offline.build import usable_cores
from engine.offline.synthetic import synthetic_interactions


def load_likes(config: Config, directory: Path) -> Interactions:
    """Return the interest matrix of a data set: of its train part where it has a split, else of all."""
    dataset = Dataset.open(directory)
    events = EventLog.read(dataset, Catalogue.from_dataset(dataset))
    where = events.splits != 2 if events.splits is not None else None
    return interest_matrix(events, config.interest, where, config.min_rating)


def bench_build(
    config: Config,
    liked: Interactions,
    channels: Sequence[str],
    repetitions: int,
    neighbours: int,
    store: Path,
) -> dict[str, Any]:
    """Time the builds of some channels, and ItemCF against implicit's CosineRecommender.

    Args:
        config: options; ItemCF is compared with its cosine and `neighbours` kept.
        liked: the data.
        channels: which to time, with their options.
        repetitions: how often; alternating.
        neighbours: kept per item in the comparison.
        store: folder for the memory measurement's snapshots.

    Raises:
        ConfigError: implicit is not installed, or a channel is not declared.
    """
    threads = usable_cores()
    times: dict[str, list[float]] = {name: [] for name in (*channels, "cosine", "implicit")}
    implicit_lists = None
    for round_ in range(repetitions + 1):  # the first warms kernels up and is not counted
        for name in channels:
            started = time.perf_counter()
            _build(config, name, liked, MemorySink(), threads)
            if round_:
                times[name].append(time.perf_counter() - started)
        cosine = config.with_channel_options({"itemcf": _COSINE | {"neighbours": neighbours}})
        started = time.perf_counter()
        sink = _build(cosine, "itemcf", liked, MemorySink(), threads)
        if round_:
            times["cosine"].append(time.perf_counter() - started)
        spent, implicit_lists = _implicit_cosine(liked, neighbours, threads)
        if round_:
            times["implicit"].append(spent)
    assert implicit_lists is not None
    ratios = [ours / theirs for ours, theirs in zip(times["cosine"], times["implicit"], strict=True)]
    report = circumstances() | {
        "users": liked.users,
        "items": liked.items,
        "entries": liked.entries,
        "threads": threads,
        "neighbours": neighbours,
        "repetitions": repetitions,
    }
    for name in channels:
        report |= spread(f"{name}_s", times[name])
    report |= spread("itemcf_cosine_s", times["cosine"]) | spread("implicit_cosine_s", times["implicit"])
    report |= spread("itemcf_over_implicit", ratios)
    report["neighbours_equal_share"] = round(_equal_share(sink.arrays, implicit_lists), 6)
    report |= {f"memory_{name}": peak_memory(config, liked, name, store, threads) for name in channels}
    report["peak_rss_mb"] = max(report[f"memory_{name}"]["peak_rss_mb"] for name in channels)
    return report


_COSINE: dict[str, Any] = {
    "activity_exponent": 0.0,
    "source_exponent": 0.5,
    "target_exponent": 0.5,
    "shrinkage": 0.0,
    "normalize": "none",
    "amplification": 1.0,
    "half_life_days": 0.0,
}


def _build(config: Config, name: str, liked: Interactions, sink: Any, threads: int) -> Any:
    loaded, options = config.channel(name)
    now = int(liked.timestamps.max(initial=0))
    loaded.build(options, BuildContext(liked, {}, now, sink, SilentProgress(), threads))
    return sink


def _implicit_cosine(liked: Interactions, neighbours: int, threads: int) -> tuple[float, Any]:
    try:
        import scipy.sparse
        from implicit.nearest_neighbours import CosineRecommender
    except ImportError as error:
        raise ConfigError("the comparison needs implicit: pip install 'recall-engine[bench]'") from error
    matrix = scipy.sparse.csr_matrix(
        (liked.weights, liked.rows.astype(np.int32), liked.indptr), shape=(liked.users, liked.items)
    )
    matrix.sort_indices()
    started = time.perf_counter()
    model = CosineRecommender(K=neighbours + 1, num_threads=threads)  # its lists hold the item itself
    model.fit(matrix, show_progress=False)
    return time.perf_counter() - started, model.similarity


def _equal_share(ours: Any, theirs: Any) -> float:
    """Return the share of our neighbours that implicit has too, or that tie with the last one it kept."""
    theirs = theirs.tocsr()
    equal = 0
    for i in range(ours["indptr"].size - 1):
        part = slice(int(ours["indptr"][i]), int(ours["indptr"][i + 1]))
        at = slice(int(theirs.indptr[i]), int(theirs.indptr[i + 1]))
        others, scores = theirs.indices[at], theirs.data[at]
        least = scores[others != i].min(initial=np.inf)
        mine, similarity = ours["neighbours"][part], ours["similarities"][part]
        equal += int(np.count_nonzero(np.isin(mine, others) | (np.abs(similarity - least) < 1e-5)))
    return equal / max(int(ours["indptr"][-1]), 1)


def peak_memory(
    config: Config, liked: Interactions, name: str, store: Path, threads: int
) -> dict[str, float]:
    """Build a channel once, to disk, in a process of its own, and return what the build added to its memory.

    `over_input` is (peak resident memory - memory before the build) / (bytes of the input CSR, 8 an entry and 8 a user)
    with the CSR itself counted in, `formula` what the documentation promises: 3 x the input CSR + the output.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(config, liked, name, store, threads, sender))
    child.start()
    before, peak, output = receiver.recv()
    child.join()
    csr = liked.rows.nbytes + liked.weights.nbytes + liked.indptr.nbytes
    added = peak - before + csr
    return {
        "input_csr_mb": round(csr / 2**20, 1),
        "output_mb": round(output / 2**20, 1),
        "added_with_input_mb": round(added / 2**20, 1),
        "promised_mb": round((3 * csr + output) / 2**20, 1),
        "share_of_promised": round(added / (3 * csr + output), 3),
        "peak_rss_mb": round(peak / 2**20, 1),
    }


def _measure(config: Config, liked: Interactions, name: str, store: Path, threads: int, sender: Any) -> None:
    # A small build first: kernels and thread stacks are the process's, not the data's.
    tiny = synthetic_interactions(50, 40, 500)
    _build(config, name, tiny, MemorySink(), threads)
    _reset_peak()
    before = _resident()
    snapshots = SnapshotStore(store)
    with snapshots.begin(name, parameters={}, dataset="bench") as writer:
        _build(config, name, liked, writer, threads)
    peak = _peak()
    manifest = snapshots.manifest(name, writer.version)
    sender.send((before, peak, sum(file.bytes for file in manifest.files.values())))


def _resident() -> int:
    """Bytes this process has in memory now."""
    for line in _status():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return _peak()


def _peak() -> int:
    """Bytes this process had in memory at most."""
    for line in _status():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status() -> Iterable[str]:
    path = Path("/proc/self/status")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else ()


def _reset_peak() -> None:
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5", encoding="utf-8")


def bench_scaling(
    config: Config, name: str, users: int, items: int, events: int, steps: Sequence[int]
) -> dict[str, Any]:
    """Time one channel's build while users and events grow together over one catalogue.

    Args:
        config: options; the caps of Swing are what keeps it linear.
        name: the channel.
        users, items, events: sizes at step 1.
        steps: multiples of users and events.
    """
    threads = usable_cores()
    _build(config, name, synthetic_interactions(50, 40, 500), MemorySink(), threads)
    rows = []
    for step in steps:
        liked = synthetic_interactions(users * step, items, events * step)
        started = time.perf_counter()
        _build(config, name, liked, MemorySink(), threads)
        spent = time.perf_counter() - started
        rows.append(
            {
                "times": step,
                "entries": liked.entries,
                "s": round(spent, 2),
                "us_per_entry": round(spent / liked.entries * 1e6, 2),
            }
        )
    return circumstances() | {"channel": name, "items": items, "threads": threads, "curve": rows}
