"""How much of a request is compiled code: every kernel that Python calls, timed where it is called."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba import njit
from numba.core.dispatcher import Dispatcher
from recall.v1 import recall_pb2 as pb

from engine.bench.report import spread
from engine.online.encode import encode
from engine.online.replica import Replica
from engine.online.wire import parse

_PACKAGES = ("engine.", "channels.", "filters.")
SCENE = "default"


def bench_kernels(replica: Replica, config: Any, messages: Sequence[bytes], batch: int) -> dict[str, Any]:
    """Run batches down the pipeline on this thread, first plainly, then with a clock around every kernel.

    All times are processor time of this thread, so that what else the machine does is not in them; `stages` and
    `channels` alone are the pipeline's own, on the wall. A kernel's time is from the call in Python to its return: it
    holds what numba needs to hand the arguments over, which `call_us` says for one call with ten arrays, the clock's own
    time included. Kernels that only other kernels call are inside those.

    Args:
        replica: what answers, live state included.
        config: its configuration.
        messages: serialized requests; as many batches as they make, five times.
        batch: requests of a batch.

    Returns:
        Microseconds per request: pipeline_us (parsing and encoding included), parse_us, encode_us and kernels_us with
        their spreads over five rounds, `stages` and `channels` as the pipeline times them, `kernels` by name, and
        kernel_calls per request.
    """
    pipeline = replica.pipelines[SCENE]
    rounds: dict[str, list[float]] = {}
    stages: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    part = max(batch, len(messages) // 5 // batch * batch)
    batches = [messages[at : at + batch] for at in range(0, len(messages), batch)]
    batches = [each for each in batches if len(each) == batch]

    def run(each: Sequence[bytes]) -> tuple[float, float, float, Any]:
        began = time.thread_time()
        requests = [
            parse(pb.RecallRequest.FromString(data), config, replica.catalogue.id_type, math.inf, 0)[1]
            for data in each
        ]
        parsed = time.thread_time()
        done = pipeline.run(requests)
        ran = time.thread_time()
        encode(replica, pipeline, done, ["bench"] * batch, [False] * batch)
        ended = time.thread_time()
        return parsed - began, ran - parsed, ended - ran, done

    for each in batches[: max(2, len(batches) // 4)]:  # compiles, and warms caches up
        run(each)
    size = max(1, part // batch)
    measured = 0
    for round_ in range(0, len(batches) - size + 1, size):
        sums = np.zeros(3)
        for each in batches[round_ : round_ + size]:
            *spent, done = run(each)
            sums += spent
            for name, microseconds in done.stage_us.items():
                stages[name] = stages.get(name, 0.0) + microseconds
            for name, microseconds in zip(pipeline.channel_names, done.channel_us.tolist(), strict=True):
                stages[f"channel {name}"] = stages.get(f"channel {name}", 0.0) + microseconds
        measured += size * batch
        parse_us, run_us, encode_us = (sums / (size * batch) * 1e6).tolist()
        rounds.setdefault("parse_us", []).append(parse_us)
        rounds.setdefault("encode_us", []).append(encode_us)
        rounds.setdefault("pipeline_us", []).append(parse_us + run_us + encode_us)
        with timed_kernels() as spent_in:
            for each in batches[round_ : round_ + size]:
                run(each)
        rounds.setdefault("kernels_us", []).append(
            sum(seconds for seconds, _ in spent_in.values()) / (size * batch) * 1e6
        )
        for name, (seconds, calls) in spent_in.items():
            total = kernels.setdefault(name, [0.0, 0.0])
            total[0] += seconds * 1e6
            total[1] += calls
    report: dict[str, Any] = {"batch": batch, "requests": measured}
    for name, values in rounds.items():
        report |= spread(name, values, 1)
    report["stages"] = {
        name: round(total / measured, 1) for name, total in stages.items() if not name.startswith("channel ")
    }
    report["channels"] = {
        name.removeprefix("channel "): round(total / measured, 1)
        for name, total in stages.items()
        if name.startswith("channel ")
    }
    ordered = sorted(kernels.items(), key=lambda entry: -entry[1][0])
    report["kernels"] = {name: round(spent[0] / measured, 2) for name, spent in ordered}
    report["kernel_calls"] = round(sum(spent[1] for spent in kernels.values()) / measured, 1)
    report["call_us"] = round(_empty_call_us(), 2)
    return report


@contextmanager
def timed_kernels() -> Iterator[dict[str, tuple[float, int]]]:
    """Put a clock around every kernel that a module of the project names, for as long as the context lasts.

    What is called must be compiled already: numba cannot compile a kernel that calls one with a clock around it.

    Yields:
        Name of the kernel -> (seconds, calls), filled as they are called.
    """
    spent: dict[str, tuple[float, int]] = {}
    replaced: list[tuple[Any, str, Dispatcher]] = []
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith(_PACKAGES):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, Dispatcher):
                replaced.append((module, name, value))
                setattr(module, name, _timed(value, spent))
    try:
        yield spent
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def _timed(kernel: Dispatcher, spent: dict[str, tuple[float, int]]) -> Callable[..., Any]:
    name = f"{kernel.py_func.__module__}.{kernel.py_func.__name__}"
    clock = time.thread_time

    def call(*arguments: Any) -> Any:
        began = clock()
        result = kernel(*arguments)
        seconds, calls = spent.get(name, (0.0, 0))
        spent[name] = (seconds + clock() - began, calls + 1)
        return result

    return call


def _empty_call_us() -> float:
    """Microseconds of a call, with the clock around it, that hands ten arrays over and does nothing; least of five."""
    arrays = [np.zeros(1, np.int32)] * 10
    _nothing(*arrays)
    best = math.inf
    for _ in range(5):
        spent: dict[str, tuple[float, int]] = {}
        call = _timed(_nothing, spent)
        for _ in range(1000):
            call(*arrays)
        best = min(best, *(seconds for seconds, _ in spent.values()))
    return best * 1e3


@njit(nogil=True)
def _nothing(a, b, c, d, e, f, g, h, i, j):  # type: ignore[no-untyped-def]
    return a.size
