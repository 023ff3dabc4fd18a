"""Opens one snapshot: checks it against its manifest and maps its arrays into memory."""

from __future__ import annotations

import errno
import hashlib
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.core.errors import SnapshotError
from engine.core.types import AnyArray
from engine.data.snapshot.manifest import ArrayFile, Manifest
from engine.data.snapshot.writer import THREADS

_TOUCHED_SHARE = 0.5
"""Of the machine's memory: snapshots that are larger are not read ahead of their use."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An open snapshot.

    Attributes:
        path: its directory.
        manifest: what it holds and what it was made from.
        arrays: its arrays by name, mapped from the files, read-only; they outlive the files' deletion.
    """

    path: Path
    manifest: Manifest
    arrays: Mapping[str, AnyArray]

    @property
    def component(self) -> str:
        """Whose snapshot it is."""
        return self.manifest.component

    @property
    def version(self) -> str:
        """Its version."""
        return self.manifest.version


def load(path: Path, component: str) -> Snapshot:
    """Map the snapshot in directory `path`, checking everything but the checksums.

    Raises:
        SnapshotError: a file is missing or of the wrong size, or the manifest is damaged or another's.
    """
    file = path / "manifest.json"
    manifest = Manifest.read(file, path.name)
    if manifest.component != component:
        raise SnapshotError(f"wrong component: of {manifest.component!r}, not of {component!r}", str(file))
    arrays = {name: _map(path / entry.file, entry) for name, entry in manifest.files.items()}
    return Snapshot(path, manifest, MappingProxyType(arrays))


def touch(snapshots: Iterable[Snapshot]) -> int:
    """Have every page of the snapshots in memory and mapped, so that no kernel waits for one.

    Nothing is done where they are larger than half of the machine's memory: what is needed least would then push out
    what is needed most, and pages come as they are asked for.

    Returns:
        Bytes touched.
    """
    arrays = [array for snapshot in snapshots for array in snapshot.arrays.values() if array.size]
    size = sum(array.nbytes for array in arrays)
    if size > os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE * _TOUCHED_SHARE:
        return 0
    for array in arrays:
        np.bitwise_or.reduce(array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE])
    return size


def check_catalogue(snapshot: Snapshot, catalogue: str) -> None:
    """Hold the snapshot to the catalogue that its rows must mean.

    Raises:
        SnapshotError: it was built for another one.
    """
    built_for = snapshot.manifest.catalogue
    if built_for and built_for != catalogue:
        raise SnapshotError(
            f"wrong catalogue: built for catalogue {built_for}, the release has {catalogue or 'none'}",
            str(snapshot.path / "manifest.json"),
        )


def verify(snapshots: Iterable[Snapshot]) -> None:
    """Read every file of the snapshots through and compare checksums, several files at a time.

    Raises:
        SnapshotError: for the first file that differs.
    """
    files = [
        (snapshot.path / entry.file, entry)
        for snapshot in snapshots
        for entry in snapshot.manifest.files.values()
    ]
    # Largest first: the last thread to finish then has a small one.
    files.sort(key=lambda pair: -pair[1].bytes)
    with ThreadPoolExecutor(THREADS) as pool:
        results = [pool.submit(_verify_file, path, entry) for path, entry in files]
        try:
            for result in results:
                result.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _verify_file(path: Path, entry: ArrayFile) -> None:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise SnapshotError("the file is missing", str(path)) from None
    except OSError as error:
        raise SnapshotError(f"cannot be read: {error.strerror}", str(path)) from error
    if digest != entry.sha256:
        raise SnapshotError(
            f"damaged: its SHA-256 is {digest[:12]}..., the manifest has {entry.sha256[:12]}...", str(path)
        )


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> AnyArray:
    """Map an array copy-on-write, for `writable`; nothing ever gets into the file. Pages are shared all the same."""
    try:
        return np.memmap(path, dtype, "c", offset, shape)
    except OSError as error:
        # The system may not promise as much memory as copies of it all would take.
        if error.errno != errno.ENOMEM:
            raise
        return np.memmap(path, dtype, "r", offset, shape)


def _map(path: Path, entry: ArrayFile) -> AnyArray:
    try:
        size = os.stat(path).st_size
        if size != entry.bytes:
            what = "truncated" if size < entry.bytes else "wrong size"
            raise SnapshotError(f"{what}: expected {entry.bytes} bytes, there are {size}", str(path))
        dtype = np.dtype(entry.dtype)
        data = math.prod(entry.shape) * dtype.itemsize
        if data == 0:  # nothing can be mapped
            array = np.empty(entry.shape, dtype)
        else:
            # The manifest says what the header says, and is protected by its name; the array ends the file.
            array = _mapped(path, dtype, size - data, entry.shape)
    except FileNotFoundError:
        raise SnapshotError("the file is missing", str(path)) from None
    except OSError as error:
        raise SnapshotError(f"cannot be read: {error.strerror or error}", str(path)) from error
    # A plain view: slices of np.memmap, and numba's dispatch on one, cost several times those of np.ndarray.
    view = array.view(np.ndarray)
    view.flags.writeable = False
    return view
