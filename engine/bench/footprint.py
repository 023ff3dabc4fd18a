"""`recall bench memory`: what a release takes on disk and in memory, by component and array, and for how many items.

An array counts for what its length goes with: items, users or authors. Entries, such as neighbours, count for the rows
that their offsets divide them among; hash tables and keys for the arrays that stand beside them; a vocabulary counts for
nothing, and stays as it is. Arrays are mapped into memory and there once for all workers of a machine. What a worker has
of its own, the live columns and what channels make of their arrays, is measured in a process that loads them.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from engine.bench.report import circumstances
from engine.bench.world import World
from engine.core.channel import Progress
from engine.core.types import AnyArray
from engine.data.catalogue import Catalogue
from engine.data.live import LiveCatalogue
from engine.data.snapshot import CATALOGUE
from engine.online.replica import load_context
from engine.state.history import HISTORY, SnapshotHistory

FIXED = "fixed"
AXES = ("item", "user", "author", FIXED)
_STATUS = Path("/proc/self/status")


def bench_memory(world: World, larger: int, progress: Progress) -> dict[str, Any]:
    """Say what each array of a world takes, what a worker has of its own, and what a larger catalogue would take.

    Args:
        world: what is measured.
        larger: items of the larger catalogue. Authors grow with it; users, and what is kept of each, are as they are.
        progress: told of the loading.

    Returns:
        The report. `arrays`: bytes of each, what it counts for, and bytes per one of these; `components`: the sums, bytes
        per item, user and author; `own`: bytes of a worker's own after each part was loaded, None where the system does
        not say (it is Linux that does); `larger`: bytes of what counts for items and authors, at that size.
    """
    snapshots = world.snapshots()
    catalogue = Catalogue.load(snapshots[CATALOGUE].arrays)
    counts = {"item": len(catalogue.items), "user": len(catalogue.users), "author": len(catalogue.authors)}
    arrays = []
    components: dict[str, dict[str, float]] = {}
    for name, snapshot in snapshots.items():
        axes = axes_of(snapshot.arrays, counts)
        sums = components.setdefault(name, dict.fromkeys(("bytes", *AXES), 0))
        for array, values in snapshot.arrays.items():
            axis = axes[array]
            sums["bytes"] += values.nbytes
            sums[axis] += values.nbytes
            row = {"component": name, "array": array, "dtype": values.dtype.name, "bytes": values.nbytes}
            each = None if axis == FIXED else round(values.nbytes / counts[axis], 2)
            arrays.append(row | {"counts_for": axis, "bytes_each": each})
    progress.start("loading", 1)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        own = pool.submit(own_memory, world).result()
    progress.advance()
    times = larger / counts["item"]
    report = circumstances() | {"items": counts["item"], "users": counts["user"], "authors": counts["author"]}
    report["components"] = {
        name: {
            "bytes": sums["bytes"],
            "per_item": round((sums["item"] + sums["author"]) / counts["item"], 1),
            "per_user": round(sums["user"] / counts["user"], 1),
            "larger": round((sums["item"] + sums["author"]) * times),
        }
        for name, sums in components.items()
    }
    report["own"] = (
        None
        if own is None
        else {
            name: {"bytes": taken, "per_item": round(taken / counts["item"], 1)}
            for name, taken in own.items()
        }
    )
    report["larger"] = larger
    report["arrays"] = arrays
    return report


def axes_of(arrays: Mapping[str, AnyArray], counts: Mapping[str, int]) -> dict[str, str]:
    """Return what each array of a snapshot counts for.

    Args:
        arrays: of one component, by name.
        counts: how many there are of each axis but `FIXED`; where two are equal the first one counts.
    """
    found: dict[str, str] = {}
    entries: dict[int, str] = {}
    for name, array in arrays.items():
        length = len(array) if array.ndim else 0
        for axis, count in counts.items():
            if length not in (count, count + 1):
                continue
            found[name] = axis
            if length == count + 1 and array.dtype.kind == "i":
                entries[int(array[-1])] = axis
            break
    for name, array in arrays.items():
        if name not in found and array.ndim and len(array) in entries:
            found[name] = entries[len(array)]
    beside: dict[str, str] = {}
    for name, axis in found.items():
        beside.setdefault(name.rpartition(".")[0], axis)
    return {name: found.get(name, beside.get(name.rpartition(".")[0], FIXED)) for name in arrays}


def own_memory(world: World) -> dict[str, int] | None:
    """Load a world in this process; return the bytes of memory of its own, mapped files left out, that each part added.

    Returns:
        By part: "process" before the first, "catalogue", "history" and the channels; None where the system does not say.
    """
    snapshots = world.snapshots()
    taken = {"process": _anonymous()}
    if taken["process"] == 0:
        return None
    kept: list[Any] = []
    before = taken["process"]

    def note(name: str, part: Any) -> None:
        nonlocal before
        kept.append(part)
        gc.collect()
        now = _anonymous()
        taken[name] = max(0, now - before)
        before = now

    live = LiveCatalogue.of(Catalogue.load(snapshots[CATALOGUE].arrays))
    note(CATALOGUE, live)
    note(HISTORY, SnapshotHistory(snapshots[HISTORY].arrays))
    scene = world.config.scenes["default"]
    for name in (*scene.quotas, *scene.fallback):
        loaded, options = world.config.channel(name)
        lender = world.config.snapshot_of(name)
        arrays = snapshots[lender].arrays if lender in snapshots else {}
        note(name, loaded.load(options, load_context(arrays, live)))
    return taken


def _anonymous() -> int:
    """Bytes of this process's memory that are no file's; 0 where the system does not say."""
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
