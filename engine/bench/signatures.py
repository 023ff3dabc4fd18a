"""Which kernels a build and a server call, with which types: `python -m engine.bench.signatures` lists them anew.

It takes a minute, since it compiles them all to see which are called and how long each takes.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before numba is imported: nothing may be cached, else nothing is compiled
    _folder = tempfile.TemporaryDirectory()
    os.environ["NUMBA_CACHE_DIR"] = _folder.name

from numba.core import event

from engine.config import load_config
from engine.core.channel import SilentProgress
from engine.data.dataset import Dataset
from engine.data.sample import sample_path
from engine.data.snapshot import SnapshotStore
from engine.offline.build import build_release
from engine.offline.learnt import with_learnt
from engine.online.kernels import LIST, Kernel
from engine.online.replica import Replica
from engine.online.state import open_state
from engine.online.warm_up import warm_up

PACKAGES = ("engine.", "channels.", "filters.")


class Calls(event.Listener):
    """Hears of every compilation; remembers those that a call from Python began.

    Attributes:
        seconds: CPU time of each, with the kernels that it calls.
    """

    def __init__(self) -> None:
        self.seconds: dict[Kernel, float] = {}
        self._began: dict[int, list[float]] = {}

    def on_start(self, event: Any) -> None:
        """A compilation begins."""
        self._began.setdefault(threading.get_ident(), []).append(time.thread_time())

    def on_end(self, event: Any) -> None:
        """A compilation ends."""
        under_way = self._began[threading.get_ident()]
        spent = time.thread_time() - under_way.pop()
        function = event.data["dispatcher"].py_func
        if not under_way and function.__module__.startswith(PACKAGES):
            signature = repr(tuple(event.data["args"]))
            self.seconds[Kernel(function.__module__, function.__qualname__, signature)] = spent


def run_everything(folder: Path) -> None:
    """Build the sample with the channels that came with it, load it, and run what a server runs before it says SERVING.

    Raises:
        StateError: there is no state store to be had.
    """
    config = with_learnt(load_config(None), sample_path())
    store = SnapshotStore(folder)
    build_release(config, Dataset.open(sample_path()), store, SilentProgress())
    with open_state(config) as state:
        warm_up(config, Replica.open(config, store, state=state), state)


def _main() -> None:
    calls = Calls()
    event.register("numba:compile", calls)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        run_everything(Path(folder))
    slowest_first = sorted(calls.seconds, key=lambda kernel: -calls.seconds[kernel])
    LIST.write_text("".join("\t".join(kernel) + "\n" for kernel in slowest_first), encoding="utf-8")
    for kernel in slowest_first:
        print(f"{calls.seconds[kernel]:6.2f} s  {kernel.module}.{kernel.name}", file=sys.stderr)


if __name__ == "__main__":
    _main()
