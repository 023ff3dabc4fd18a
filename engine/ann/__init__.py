"""Nearest-neighbour indexes by inner product, behind one small interface. See docs/ann.md."""

from engine.ann.index import VectorIndex, build_index, load_index
from engine.ann.options import IndexKind, IndexOptions

__all__ = ["IndexKind", "IndexOptions", "VectorIndex", "build_index", "load_index"]
