"""What every benchmark report says of where and when it was made, and how repetitions are summed up."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from engine import __version__
from engine.offline.build import usable_cores


def circumstances() -> dict[str, Any]:
    """Return machine, cpus, Python, date, commit ("" outside a checkout, "-dirty" with changes) and version of a run."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}",
        "cpus": usable_cores(),
        "python": sys.version,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "version": __version__,
    }


def spread(name: str, values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return the median under `name` and the extremes under `name`_min and `name`_max."""
    return {
        name: round(float(median(values)), digits),
        f"{name}_min": round(float(min(values)), digits),
        f"{name}_max": round(float(max(values)), digits),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "processor unknown"


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    # Where the package lies in site-packages, a repository around it is somebody else's.
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", os.fspath(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
