"""Compiling the kernels ahead, on all cores, and noticing those that nobody compiled ahead.

The first build and the first server on a machine then find them cached.

numba compiles a kernel when it is first called, and one at a time: a lock lets no two threads of a process compile. So
processes do it here. `kernels.txt` says which kernels Python calls, with which types; kernels that only other kernels
call come along with those. What it leaves out, a plugin's kernel say, is compiled at its first call as ever. A test
holds it to what a build and a server call; `python -m engine.bench.signatures` writes it anew.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from numba import types
from numba.core import event

log = logging.getLogger(__name__)

COMPILED = "compiled while serving"
"""Stands in the log where a kernel was."""

LIST = Path(__file__).parent / "kernels.txt"
"""A line per kernel and types: module, name, types, tabs between them; what takes longest comes first."""


class Kernel(NamedTuple):
    """A kernel and the types it is called with.

    Attributes:
        module, name: where it is.
        signature: the types of its arguments, as numba prints them.
    """

    module: str
    name: str
    signature: str

    @property
    def dispatcher(self) -> Any:
        """The kernel itself, numba's `Dispatcher`; its module is imported."""
        return getattr(import_module(self.module), self.name)

    def compile(self) -> None:
        """Compile it, or load it where it is cached."""
        self.dispatcher.compile(eval(self.signature, vars(types)))  # the package's own file


def listed() -> list[Kernel]:
    """Return what `kernels.txt` lists, in its order."""
    return [Kernel(*line.split("\t")) for line in LIST.read_text(encoding="utf-8").splitlines()]


def missing() -> bool:
    """Tell whether a kernel of the list has nothing in the cache that is as new as its source."""
    for kernel in listed():
        dispatcher = kernel.dispatcher
        code = dispatcher.py_func.__code__
        source = Path(code.co_filename)
        cached = Path(dispatcher.stats.cache_path).glob(
            f"{source.stem}.{kernel.name}-{code.co_firstlineno}.*.nbi"
        )
        if not any(index.stat().st_mtime >= source.stat().st_mtime for index in cached):
            return True
    return False


def compile_all(advance: Callable[[], None], processes: int | None = None) -> None:
    """Compile what the list holds.

    A process that fails leaves its share to the first call of each kernel, so this never fails.

    Args:
        advance: called for each kernel.
        processes: how many share the work; None: one per core.
    """
    count = processes if processes is not None else _cores()
    with tempfile.TemporaryDirectory() as claims:
        command = [sys.executable, "-m", __name__, claims]
        with ExitStack() as stack:
            running = []
            for _ in range(count):
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                running.append(stack.enter_context(process))
                stack.callback(process.terminate)  # where we are interrupted; else it has ended
            for process in running:
                assert process.stdout is not None
                for _ in process.stdout:
                    advance()


class _Late(event.Listener):
    """Logs each compilation that a call from Python began, with the kernels that it calls."""

    def __init__(self) -> None:
        self._began: dict[int, list[float]] = {}

    def on_start(self, event: Any) -> None:
        self._began.setdefault(threading.get_ident(), []).append(time.monotonic())

    def on_end(self, event: Any) -> None:
        under_way = self._began[threading.get_ident()]
        spent = time.monotonic() - under_way.pop()
        if not under_way:
            kernel = event.data["dispatcher"].py_func
            log.warning("%s.%s %s, in %.1f s", kernel.__module__, kernel.__qualname__, COMPILED, spent)


_late = _Late()
_watching = False


def watch() -> None:
    """From now on log every compilation: while it lasts, nothing else in this process runs for long."""
    global _watching
    if not _watching:
        event.register("numba:compile", _late)  # type: ignore[no-untyped-call]
        _watching = True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(claims: Path) -> None:
    """Compile what no other process has claimed; a file in the folder is a claim, a printed line one kernel done."""
    gc.disable()  # a compiler's objects are many and live long: looking through them takes a twelfth of the time
    for number, kernel in enumerate(listed()):
        try:
            (claims / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        kernel.compile()
        print(kernel.name, flush=True)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
