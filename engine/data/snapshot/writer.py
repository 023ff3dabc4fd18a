"""Writes one snapshot, array by array, into a directory that nobody sees before it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from engine import __version__
from engine.core.errors import BuildError
from engine.core.types import AnyArray
from engine.data.snapshot.files import sync
from engine.data.snapshot.manifest import ARRAY_PATTERN, FORMAT, ArrayFile, Manifest, timestamp

THREADS = min(8, os.cpu_count() or 1)
"""How many files are hashed at once: hashing releases the interpreter lock."""

_KINDS = "biufcSUmM"
"""dtype kinds that can be mapped into memory as they are: no objects, no records."""


class SnapshotWriter:
    """Where a build puts its arrays: a `SnapshotSink` of `engine.core.channel`, from `SnapshotStore.begin`.

    Attributes:
        version: the snapshot's name once the context of `begin` has ended well; "" before.
    """

    def __init__(self, directory: Path, component: str, facts: Mapping[str, Any]) -> None:
        self.version = ""
        self._directory = directory
        self._component = component
        # Through JSON and back, so that what is hashed now is what a reader will parse (tuples become lists).
        self._facts = json.loads(json.dumps(facts, allow_nan=False))
        self._arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}

    def write(self, name: str, array: AnyArray) -> None:
        """Write one whole array, of any shape, in C order.

        Raises:
            BuildError: the name is taken or is not of [a-z0-9_.], or the dtype cannot be mapped into memory.
        """
        array = np.asarray(array, order="C")
        with self._create(name, array.dtype) as file:
            np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
        self._arrays[name] = (array.dtype, array.shape)

    @contextmanager
    def appender(self, name: str, dtype: npt.DTypeLike) -> Iterator[SnapshotAppender]:
        """Open a 1-d array of unknown length for writing piece by piece.

        The array is part of the snapshot once the context has ended, unless by an exception.

        Raises:
            BuildError: as `write`.
        """
        wanted = np.dtype(dtype)
        try:
            with self._create(name, wanted) as file:
                appender = SnapshotAppender(file, name, wanted)
                yield appender
                appender.finish()
        except BaseException:
            if name not in self._arrays:
                self._path(name).unlink(missing_ok=True)
            raise
        self._arrays[name] = (wanted, (appender.length,))

    def commit(self) -> Manifest:
        """Bring all files to the disk and write the manifest; the store then puts the directory in place."""
        with ThreadPoolExecutor(THREADS) as pool:
            files = dict(zip(self._arrays, pool.map(self._seal, self._arrays), strict=True))
        manifest = Manifest.make(
            format=FORMAT,
            created=timestamp(datetime.now(UTC)),
            component=self._component,
            code=__version__,
            files=files,
            **self._facts,
        )
        with open(self._directory / "manifest.json", "xb") as file:
            file.write(manifest.encode())
            file.flush()
            os.fsync(file.fileno())
        sync(self._directory)
        return manifest

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.npy"

    def _create(self, name: str, dtype: np.dtype[Any]) -> BinaryIO:
        # The error names the component: a build of a dozen channels writes hundreds of arrays.
        if not re.fullmatch(ARRAY_PATTERN, name):
            raise BuildError(f"{self._component}: array name {name!r} must be of [a-z0-9_.], not '.' first")
        if dtype.kind not in _KINDS:
            raise BuildError(
                f"{self._component}: array {name!r} of dtype {dtype} cannot be mapped into memory"
            )
        try:
            return open(self._path(name), "xb")
        except FileExistsError:
            raise BuildError(f"{self._component}: array {name!r} is written twice") from None

    def _seal(self, name: str) -> ArrayFile:
        dtype, shape = self._arrays[name]
        with open(self._path(name), "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
        return ArrayFile(file=self._path(name).name, bytes=size, sha256=digest, dtype=dtype.str, shape=shape)


class SnapshotAppender:
    """Writes one 1-d array piece by piece: the `ArrayAppender` of `engine.core.channel`."""

    def __init__(self, file: BinaryIO, name: str, dtype: np.dtype[Any]) -> None:
        self.length = 0
        self._file = file
        self._name = name
        self._dtype = dtype
        self._data_starts = self._write_header()

    def append(self, part: AnyArray) -> None:
        """Write `part`, 1-d and of a dtype that converts without loss, behind what is there.

        Raises:
            BuildError: `part` is not 1-d, or its dtype does not fit.
        """
        part = np.asarray(part)
        if part.ndim != 1 or not np.can_cast(part.dtype, self._dtype, "safe"):
            raise BuildError(
                f"array {self._name!r}: cannot append {part.ndim}-d {part.dtype} to 1-d {self._dtype}"
            )
        self._file.write(np.ascontiguousarray(part, self._dtype).view(np.uint8).data)
        self.length += part.size

    def finish(self) -> None:
        """Put the length, known now, into the header."""
        self._file.seek(0)
        if self._write_header() != self._data_starts:
            raise BuildError(f"array {self._name!r}: NumPy changed the size of the header")
        self._file.seek(0, os.SEEK_END)

    def _write_header(self) -> int:
        # NumPy pads the header so that the first axis may grow to 21 digits: rewritten, it keeps its size.
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()
