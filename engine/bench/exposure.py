"""`recall bench exposure`: how long checking a request's candidates takes, and how many false positives there are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.bench.report import circumstances, spread
from engine.core.candidates import FanOut
from engine.core.channel import Progress
from engine.core.errors import ConfigError
from engine.core.exposure import ExposureBits, ExposureLayout, add
from engine.core.live import Exposure
from engine.core.types import Int64Array
from engine.state.exposure import PybloomBackend

SLICES = 4
CHANNELS = 3
USER = b"u1"
PYBLOOM_CHECKS = 20
"""Checks per repetition with pybloom-live, which takes its time."""

STRANGERS = 20_000
"""Keys that nobody was shown, asked for per trial."""

SINGLE = (1.0, 5.0, 20.0)
WHOLE = (0.5, 1.0)
"""Exposures over the planned ones: of one slice, and of each slice of a whole user."""


def bench_exposure(
    layout: ExposureLayout,
    items: int,
    candidates: int,
    progress: Progress,
    repetitions: int = 7,
    checks: int = 200,
    trials: int = 20,
) -> dict[str, Any]:
    """Time the check of one user's candidates, and count false positives.

    The user has 4 slices with half of the planned exposures. A check begins with the slice values as they were read
    from the store; its candidates are random, so that finding their keys is part of it.

    Args:
        layout: of the slices.
        items: size of the catalogue.
        candidates: per check, of three channels.
        progress: told how far it is.
        repetitions: how often `checks` checks are timed; the spread is over these.
        checks: per repetition.
        trials: users per row of the table of false positives.

    Returns:
        check_us and, where pybloom-live is installed, pybloom_us: CPU time of a check, median, min and max; and
        `false_positives`, a row each.
    """
    rng = np.random.default_rng(7)
    keys = rng.integers(0, 1 << 62, items)
    rows = rng.integers(0, items, (checks, candidates)).astype(np.int32)
    segments = np.linspace(0, candidates, CHANNELS + 1).astype(np.int64)
    asked = [FanOut(mine, segments, 1) for mine in rows]
    shown = [rng.integers(0, 1 << 62, layout.planned // 2) for _ in range(SLICES)]
    values = [[add(None, part.tolist(), layout) for part in shown]]
    report = circumstances() | {
        "items": items,
        "candidates": candidates,
        "planned": layout.planned,
        "bits": layout.bits,
        "hashes": layout.hashes,
        "repetitions": repetitions,
    }
    ours = _checks(lambda: ExposureBits.of(values), asked, keys)
    report |= spread("check_us", _timed(ours, repetitions, progress), 1)
    backend = _pybloom(layout)
    if backend is not None:
        for number, part in enumerate(shown):
            backend.record(USER, part, float(number))
        backend.slice_numbers(SLICES)
        theirs = _checks(lambda: backend.view([USER], ExposureBits.of([[]])), asked[:PYBLOOM_CHECKS], keys)
        report |= spread("pybloom_us", _timed(theirs, repetitions, progress), 1)
    report["false_positives"] = _false_positives(layout, trials, rng, progress)
    return report


def _checks(
    view: Callable[[], Exposure], asked: Sequence[FanOut], keys: Int64Array
) -> list[Callable[[], object]]:
    return [lambda mine=mine: view().seen(mine, keys) for mine in asked]  # type: ignore[misc]


def _timed(work: Sequence[Callable[[], object]], repetitions: int, progress: Progress) -> list[float]:
    """Return microseconds of CPU time per call, of each repetition; a first one warms up and is not counted."""
    progress.start("checks", repetitions + 1)
    spent = []
    for _ in range(repetitions + 1):
        started = time.thread_time()
        for call in work:
            call()
        spent.append((time.thread_time() - started) / len(work) * 1e6)
        progress.advance()
    return spent[1:]


def _pybloom(layout: ExposureLayout) -> PybloomBackend | None:
    try:
        return PybloomBackend(layout, 1, SLICES)
    except ConfigError:  # not installed
        return None


def _false_positives(
    layout: ExposureLayout, trials: int, rng: np.random.Generator, progress: Progress
) -> list[dict[str, Any]]:
    """Return a row per load: slices, times planned, links and bytes of a slice, and the rate with its extremes."""
    loads = [(1, times) for times in SINGLE] + [(SLICES + 1, times) for times in WHOLE]
    progress.start("false positives", len(loads) * trials)
    rows = np.arange(STRANGERS, dtype=np.int32)
    table = []
    for slices, times in loads:
        rates, value = [], b""
        for _ in range(trials):
            values = []
            for _ in range(slices):
                value = add(None, rng.integers(0, 1 << 62, int(times * layout.planned)).tolist(), layout)
                values.append(value)
            strangers = rng.integers(0, 1 << 62, STRANGERS)
            everything = FanOut(rows, np.array([0, STRANGERS]), 1)
            rates.append(float(ExposureBits.of([values]).seen(everything, strangers).mean()))
            progress.advance()
        table.append({"slices": slices, "times": times, "bytes": len(value)} | spread("rate", rates, 5))
    return table
