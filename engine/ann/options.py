"""The options of a vector index: one set for all kinds, each of which reads its own."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from engine.core.options import Online, Options, Tune

IndexKind: TypeAlias = Literal["hnsw", "hnsw_faiss", "ivf_int8", "ivf_flat", "ivf_pq", "exact"]
"""`hnsw`: a graph, by hnswlib where it is installed, else by faiss; `hnsw_faiss`: a graph by faiss; `ivf_int8`:
inverted lists of vectors in bytes; `ivf_flat`: of whole ones, `ivf_pq`: of compressed ones, by faiss; `exact`: every
vector is looked at."""


class IndexOptions(Options):
    """How an index is built and searched."""

    m: int = Field(default=16, ge=2, le=128)
    """`hnsw`, `hnsw_faiss`: links per vector and level; the lowest level has twice as many."""

    ef_construction: int = Field(default=200, ge=8, le=4096)
    """`hnsw`, `hnsw_faiss`: candidates held while a vector is linked."""

    ef_search: Annotated[int, Online(), Tune(64, 1024, log=True)] = Field(default=200, ge=1, le=100_000)
    """`hnsw`, `hnsw_faiss`: candidates held while searching; never fewer than are asked for."""

    lists: int | None = Field(default=None, ge=1, le=1_000_000)
    """`ivf_int8`, `ivf_flat`, `ivf_pq`: inverted lists; 4 times the square root of the number of vectors where it is not
    given."""

    probes: Annotated[int, Online(), Tune(1, 256, log=True)] = Field(default=32, ge=1, le=1_000_000)
    """`ivf_int8`, `ivf_flat`, `ivf_pq`: lists looked into; all of them where there are fewer."""

    parts: int | None = Field(default=None, ge=1, le=4096)
    """`ivf_pq`: pieces that a vector is cut into, of one code each. Must divide the dimension; where it is not given, the
    largest divisor up to a quarter of it."""

    bits: int = Field(default=8, ge=4, le=12)
    """`ivf_pq`: bits of a code."""

    rerank: Annotated[int, Online()] = Field(default=4, ge=1, le=100)
    """`ivf_pq`: how many times as many candidates as asked for are compared by their whole vectors."""

    tail: Annotated[int, Online()] = Field(default=4096, ge=0, le=1_000_000)
    """Vectors added while serving that are looked at one by one; those beyond go into the graph or the lists."""

    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Of the levels of a graph, and of the clustering."""
