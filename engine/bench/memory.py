"""How much memory a build adds: measured in a process of its own that has the input, compiled kernels and nothing else.

The process is a new one, not a fork: forking a process that has threads can deadlock, and a child of a large parent
begins with the parent's memory. `python -m engine.bench.memory FOLDER` is that process; `peak_memory` starts it.
"""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from engine.config import Config
from engine.core.channel import BuildContext, SilentProgress
from engine.core.errors import BuildError
from engine.core.interactions import Interactions
from engine.core.memory import MemorySink
from engine.data.snapshot import SnapshotStore
from engine.offline.synthetic import synthetic_interactions
from engine.plugins import channel_class

_ARRAYS = ("indptr", "rows", "weights", "timestamps")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_memory(config: Config, liked: Interactions, name: str, threads: int) -> dict[str, float]:
    """Build a channel once, to disk, and return what the build added to its process's memory, in MB of 2^20 bytes.

    `added_with_input_mb` is the peak less what was there before, the input counted in; `promised_mb` is what the
    documentation promises, 3 x the input CSR + the output; `peak_rss_mb` is the whole process, interpreter and all.
    Where the system cannot reset a peak (only Linux can), growth is counted from the earlier peak, so that
    `added_with_input_mb` is a lower bound there, and `exact` is false.

    Raises:
        BuildError: the build failed, or was killed for its memory.
    """
    with TemporaryDirectory(prefix="recall-bench-") as folder:
        for array in _ARRAYS:
            np.save(Path(folder, f"{array}.npy"), getattr(liked, array))
        job = {
            "channel": config.channel_types[name],
            "options": config.channels[name].model_dump(mode="json"),
            "users": liked.users,
            "items": liked.items,
            "threads": threads,
        }
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        # -P: a folder called `engine` where the command was given must not stand in for ours.
        command = [sys.executable, "-P", "-m", "engine.bench.memory", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BuildError(f"{name}: measuring its memory ended with status {done.returncode}: {last}")
    before, peak, output, exact = json.loads(done.stdout)
    csr = liked.rows.nbytes + liked.weights.nbytes + liked.indptr.nbytes
    added = peak - before + csr
    return {
        "input_csr_mb": round(csr / 2**20, 1),
        "output_mb": round(output / 2**20, 1),
        "added_with_input_mb": round(added / 2**20, 1),
        "promised_mb": round((3 * csr + output) / 2**20, 1),
        "share_of_promised": round(added / (3 * csr + output), 3),
        "peak_rss_mb": round(peak / 2**20, 1),
        "exact": exact,
    }


def measure(folder: Path) -> tuple[int, int, int, bool]:
    """Do the build that a folder describes; return (bytes before, at the peak, written, whether the peak was reset)."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    kind = channel_class(job["channel"])
    options = kind.Config.model_validate(job["options"])

    def build(liked: Interactions, sink: Any) -> None:
        now = int(liked.timestamps.max(initial=0))
        kind.build(options, BuildContext(liked, {}, now, sink, SilentProgress(), job["threads"]))

    # A small build first: kernels and thread stacks are the process's, not the data's.
    build(synthetic_interactions(50, 40, 500), MemorySink())
    arrays = (np.load(folder / f"{array}.npy") for array in _ARRAYS)
    liked = Interactions(job["users"], job["items"], *arrays)
    _give_back()
    exact = _reset_peak()
    before = _resident()
    store = SnapshotStore(folder / "store")
    with store.begin("bench", parameters={}, dataset="bench") as writer:
        build(liked, writer)
    peak = _peak()
    written = sum(file.bytes for file in store.manifest("bench", writer.version).files.values())
    return before, peak, written, exact


def _give_back() -> None:
    """Have the allocator return what it keeps for later: the build would fill it without the peak showing it."""
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _resident() -> int:
    """Bytes this process has in memory now; at most, where the system does not say."""
    return _status("VmRSS") or _peak()


def _peak() -> int:
    """Bytes this process had in memory at most, since the reset where there was one."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    with suppress(OSError):
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
