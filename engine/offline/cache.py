"""Where evaluations and benchmarks keep what they build, so that the next one need not, and how that stays small.

A store per key (a data set's fingerprint) lies in one folder. What an evaluation used is published in its store as a
release. That puts nothing in service, no server reads these stores, but it makes the store's own collection keep what
the newest evaluations used and delete the rest, with the locks and the grace that it has for builds under way.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from engine.core.errors import ConfigError
from engine.data.snapshot import SnapshotStore

KEEP = 6
"""Evaluations of one data set whose builds stay."""

UNUSED_DAYS = 30
"""A store that nobody has asked for this long is deleted."""


def cached_store(folder: Path, key: str) -> SnapshotStore:
    """Return the store of a key, and delete the stores in the same folder that have not been used for a month.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path = folder / blake2b(key.encode(), digest_size=8).hexdigest()
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.utime(path)  # says when it was last used
        for other in folder.iterdir():
            if _is_store(other) and time.time() - other.stat().st_mtime > UNUSED_DAYS * 86_400:
                shutil.rmtree(other, ignore_errors=True)
    except OSError as error:
        text = f"cannot be used as a cache: {error.strerror}; RECALL_CACHE names another folder"
        raise ConfigError(text, str(folder)) from error
    return SnapshotStore(path)


def remember(store: SnapshotStore, snapshots: Mapping[str, str], keep: int = KEEP) -> None:
    """Note what was used (component -> version), and delete what only evaluations before the newest `keep` used.

    Raises:
        SnapshotError: something of it is missing or damaged.
    """
    newest = store.current()
    if newest is None or newest.snapshots != dict(snapshots):
        store.publish(snapshots)
    store.collect(keep)


def _is_store(path: Path) -> bool:
    # Whoever names a folder of their own as the cache keeps everything else in it.
    return re.fullmatch("[0-9a-f]{16}", path.name) is not None and (path / "releases").is_dir()
