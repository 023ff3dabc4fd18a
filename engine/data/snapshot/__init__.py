"""The snapshot store: immutable directories of arrays, named together by releases, swapped atomically.

    <root>/<component>/<version>/manifest.json, <array>.npy ...  component: "catalogue", "history", a channel
    <root>/releases/<release>.json                               names one version of every component
    <root>/current                                               one line: the release in service

A release names a whole consistent set, so all of it swaps as one, and rolling back is pointing `current` at
an earlier release. Nothing is ever changed in place: what a reader has open stays as it is.
"""

from engine.data.snapshot.manifest import FORMAT, ArrayFile, Manifest, Release
from engine.data.snapshot.reader import Snapshot, touch
from engine.data.snapshot.store import CATALOGUE, Collected, SnapshotStore
from engine.data.snapshot.writer import SnapshotAppender, SnapshotWriter

__all__ = [
    "CATALOGUE",
    "FORMAT",
    "ArrayFile",
    "Collected",
    "Manifest",
    "Release",
    "Snapshot",
    "SnapshotAppender",
    "SnapshotStore",
    "SnapshotWriter",
    "touch",
]
