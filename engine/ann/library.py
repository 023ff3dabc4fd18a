"""What the index asks of a library: find entries near a query, take more entries, and be stored as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from engine.core.types import AnyArray, Float32Array, Int32Array


class Library(Protocol):
    """An index inside a library. Entries are numbered from 0 in the order in which they were added.

    It is used by one thread at a time.
    """

    name: str
    """The library and its version."""

    exact_scores: bool
    """Whether the scores are inner products; otherwise they are estimates, and the index computes them anew."""

    @property
    def can_add(self) -> bool:
        """Whether `add` works here."""

    def depth(self, wanted: int) -> int:
        """Return how many entries a search for `wanted` is asked for: one of few steps, so that queries share them."""

    def search(self, queries: Float32Array, depth: int, deeper: int) -> tuple[Int32Array, Float32Array]:
        """Return int32[n, depth] entries and float32[n, depth] scores, padded with -1.

        What a query gets must not depend on the others. `deeper` says how often it was asked before in vain.
        """

    def add(self, vectors: Float32Array) -> None:
        """Append entries."""

    def parameters(self) -> dict[str, Any]:
        """Return what `arrays` cannot hold: JSON values."""

    def arrays(self) -> Mapping[str, AnyArray]:
        """Return the state."""


def step(first: int, wanted: int) -> int:
    """Return the least of first, 2 first, 4 first ... that is not below `wanted`."""
    depth = max(1, first)
    while depth < wanted:
        depth *= 2
    return depth
