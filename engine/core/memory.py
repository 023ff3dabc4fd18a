"""A snapshot that lives in memory: what tuning and tests build, try and throw away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from engine.core.types import AnyArray


class MemorySink:
    """Takes a build's arrays and keeps them; a `SnapshotSink`."""

    def __init__(self) -> None:
        self.arrays: dict[str, AnyArray] = {}

    def write(self, name: str, array: AnyArray) -> None:
        """Keep one array."""
        self.arrays[name] = array

    @contextmanager
    def appender(self, name: str, dtype: Any) -> Iterator[MemoryAppender]:
        """Collect pieces, and keep them end to end when the context ends."""
        appender = MemoryAppender()
        yield appender
        self.arrays[name] = np.concatenate([np.empty(0, dtype), *appender.parts]).astype(dtype, copy=False)


class MemoryAppender:
    """Collects the pieces of one array."""

    def __init__(self) -> None:
        self.parts: list[AnyArray] = []

    def append(self, part: AnyArray) -> None:
        """Collect one piece."""
        self.parts.append(part)
