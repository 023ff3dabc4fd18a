"""A trained model of Deep Retrieval, looked at from outside: who is on which path, and what a user's beam holds.

It reads the arrays of the channel's snapshot (`channels/deep_retrieval/bundle.py` lists them), as the build left them:
what was published since is on no path here. Nothing of it serves; what serves is the channel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.core.errors import ConfigError, SnapshotError
from engine.core.query import QueryBatch
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array, RaggedRows
from engine.models.features import Encoder, QueryEncoder, load_encoded
from engine.models.paths import PathModel, PathSpec
from engine.models.spec import ModelSpec
from engine.models.towers import UserTower
from engine.offline.pictures import drawing

_AT_ONCE = 256
"""Users whose scores of all items are held at once."""

QUANTILES = (50, 90, 99)


class Lattice:
    """A trained model and the paths of its items.

    Attributes:
        spec: of the lattice.
        items: rows of the catalogue it was built with.
        assignment: int64[items, J], codes, -1 where an item has fewer paths.
        codes: int64[P], the paths that have an item, rising; a path's *place* is its position here.
        sizes: int64[P], items on each.
        vectors, bias: float32[items, e], float32[items], of the softmax that reranks.
    """

    def __init__(self, arrays: Mapping[str, AnyArray]) -> None:
        """Read the arrays of a snapshot; SnapshotError if they are no model of Deep Retrieval."""
        try:
            said = json.loads(bytes(arrays["spec"]))
            tower = ModelSpec.model_validate(said["tower"])
            self.spec = PathSpec.model_validate(said["lattice"])
            self.assignment: Int64Array = arrays["assignment"]
            self.codes: Int64Array = arrays["lists.paths"]
            self._offsets: Int64Array = arrays["lists.offsets"]
            self._rows: Int32Array = arrays["lists.rows"]
            self.vectors: Float32Array = arrays["rank.vectors"]
            self.bias: Float32Array = arrays["rank.bias"]
            encoder = Encoder.load("user", tower.user_features, arrays)
            users = load_encoded(arrays, "encoded.user")
        except (KeyError, ValueError, TypeError) as error:
            raise SnapshotError(f"no model of Deep Retrieval: {error}", "spec") from error
        self.items = tower.items
        self.sizes: Int64Array = np.diff(self._offsets)
        length = tower.sequence.length if tower.sequence.kind != "none" else 0
        self._queries = QueryEncoder(encoder, users, tower.items, length)
        self._tower = UserTower.load(tower, arrays)
        self._paths = PathModel.load(self.spec, arrays)

    def users(self, batch: QueryBatch) -> Float32Array:
        """float32[n, e]: the vectors of the users who ask."""
        return self._tower.vectors(self._queries.encode(batch))

    def beam(self, users: Float32Array, beam: int) -> tuple[Int64Array, Float32Array]:
        """Return each user's likeliest paths, at most as many as there are: codes, and logs of probabilities."""
        return self._paths.beam(users, min(beam, self.spec.paths))

    def places(self, codes: Int64Array) -> Int64Array:
        """int64[...]: the places of paths; -1 of one that has no item."""
        at = np.minimum(np.searchsorted(self.codes, codes), max(self.codes.size - 1, 0))
        found = self.codes[at] == codes if self.codes.size else np.zeros(np.shape(codes), np.bool_)
        return np.where(found, at, -1)

    def members(self, place: int) -> Int32Array:
        """int32[...]: the items of a path, rising."""
        return self._rows[self._offsets[place] : self._offsets[place + 1]]

    def code_of(self, name: str) -> int:
        """Return the code of a path that is written as its nodes, "36-27-20".

        Raises:
            ConfigError: it is no path of this lattice.
        """
        parts = name.split("-")
        fits = len(parts) == self.spec.depth and all(part.isascii() and part.isdecimal() for part in parts)
        if not (fits and all(len(part) < 9 and int(part) < self.spec.width for part in parts)):
            form = "-".join(["N"] * self.spec.depth)
            raise ConfigError(
                f"expected a path as {form}, each N a node from 0 to {self.spec.width - 1}, got {name!r}",
                "--path",
            )
        return int(self.spec.codes(np.array([int(part) for part in parts], np.int64)))

    def reached(self, users: Float32Array, beam: int) -> tuple[RaggedRows, Int64Array]:
        """Return the items on each user's beam, each once, and the place of the likeliest path that has it.

        Returns:
            The items in order of the paths, and int64[entries], a place each.
        """
        codes, _ = self.beam(users, beam)
        places = self.places(codes)
        rows: list[Int32Array] = []
        from_: list[Int64Array] = []
        for mine in places:
            found = mine[mine >= 0]
            lists = [self.members(place) for place in found.tolist()]
            together = np.concatenate([*lists, np.empty(0, np.int32)])
            _, first = np.unique(together, return_index=True)
            first.sort()
            rows.append(together[first])
            from_.append(np.repeat(found, [each.size for each in lists])[first])
        return RaggedRows.of(rows), np.concatenate([*from_, np.empty(0, np.int64)]).astype(np.int64)

    def best_of_all(self, users: Float32Array, k: int, without: RaggedRows | None = None) -> RaggedRows:
        """Return what the softmax likes best among all items that are on a path: no path is looked at.

        The paper's brute force (section 4.1), which beam search is measured against. Of equals the lower row comes first.

        Args:
            users: float32[n, e].
            k: items for each, at most.
            without: what each user is not given.
        """
        on_a_path = np.flatnonzero((self.assignment >= 0).any(1)).astype(np.int32)
        table, bias = self.vectors[on_a_path].T, self.bias[on_a_path]
        column = np.full(self.items, -1, np.int64)
        column[on_a_path] = np.arange(on_a_path.size)
        lists: list[Int32Array] = []
        for start in range(0, len(users), _AT_ONCE):
            scores = users[start : start + _AT_ONCE] @ table + bias
            for q, mine in enumerate(scores):
                left = mine.size
                if without is not None:
                    at = start + q
                    known = column[without.rows[without.offsets[at] : without.offsets[at + 1]]]
                    known = known[known >= 0]
                    mine[known] = -np.inf
                    left -= known.size
                take = min(k, left)
                worst = np.partition(mine, mine.size - take)[mine.size - take] if take else np.inf
                above = np.flatnonzero(mine >= worst)
                lists.append(on_a_path[above[np.argsort(-mine[above], kind="stable")[:take]]])
        return RaggedRows.of(lists)


@dataclass(frozen=True)
class PathSizes:
    """How many items are on the paths.

    Attributes:
        items: of the catalogue.
        placed: of these, how many are on a path.
        paths: K^D, how many there are.
        used: how many have an item.
        entries: items counted as often as they have paths.
        mean: items of a used path.
        quantiles: the sizes that 50, 90 and 99 % of the used paths do not exceed.
        largest: items of the fullest path.
        largest_share: of the placed items, how many are on it.
        fullest: the code of the fullest path, of equals the lowest; -1 where no path is used.
        bins: (least, most, paths, items) of sizes 1, 2, 3 to 4, 5 to 8, ..., as far as there are.
    """

    items: int
    placed: int
    paths: int
    used: int
    entries: int
    mean: float
    quantiles: tuple[float, ...]
    largest: int
    largest_share: float
    fullest: int
    bins: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, lattice: Lattice) -> PathSizes:
        """Count the items on the paths of a model."""
        sizes = lattice.sizes
        placed = int((lattice.assignment >= 0).any(1).sum())
        largest = int(sizes.max(initial=0))
        bins = []
        least, most = 1, 1
        while least <= largest:
            inside = sizes[(sizes >= least) & (sizes <= most)]
            bins.append((least, most, int(inside.size), int(inside.sum())))
            least, most = most + 1, most * 2
        return cls(
            items=lattice.items,
            placed=placed,
            paths=lattice.spec.paths,
            used=int(sizes.size),
            entries=int(sizes.sum()),
            mean=float(sizes.mean()) if sizes.size else 0.0,
            quantiles=tuple(np.percentile(sizes, QUANTILES, method="higher").tolist())
            if sizes.size
            else (0.0,) * 3,
            largest=largest,
            largest_share=largest / placed if placed else 0.0,
            fullest=int(lattice.codes[int(np.argmax(sizes))]) if sizes.size else -1,
            bins=tuple(bins),
        )


@dataclass(frozen=True)
class TopPath:
    """Which path most candidates come from.

    Attributes:
        users: how many were asked.
        reached: candidates of a user's beam, mean.
        code: the path that most of all these come from, -1 where there are none.
        share: of all of them, how many do.
        kept: candidates that the softmax keeps, mean.
        kept_code, kept_share: the same of these.
    """

    users: int
    reached: float
    code: int
    share: float
    kept: float
    kept_code: int
    kept_share: float

    @classmethod
    def of(cls, lattice: Lattice, users: Float32Array, beam: int, k: int) -> TopPath:
        """Ask for some users.

        Args:
            lattice: the model.
            users: float32[n, e].
            beam: B.
            k: how many the softmax keeps.
        """
        found, places = lattice.reached(users, beam)
        kept: list[Int64Array] = []
        for q in range(len(users)):
            mine = slice(found.offsets[q], found.offsets[q + 1])
            rows = found.rows[mine]
            scores = lattice.vectors[rows] @ users[q] + lattice.bias[rows]
            kept.append(places[mine][np.argsort(-scores, kind="stable")[:k]])
        chosen = np.concatenate([*kept, np.empty(0, np.int64)]).astype(np.int64)
        top, share = _top(lattice, places)
        kept_top, kept_share = _top(lattice, chosen)
        n = max(len(users), 1)
        return cls(len(users), places.size / n, top, share, chosen.size / n, kept_top, kept_share)


def _top(lattice: Lattice, places: Int64Array) -> tuple[int, float]:
    if places.size == 0:
        return -1, 0.0
    counts = np.bincount(places)
    return int(lattice.codes[int(np.argmax(counts))]), float(counts.max() / places.size)


def draw_sizes(lattice: Lattice, path: Path) -> None:
    """Write a PNG of how many paths have how many items, both on a logarithmic scale.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    sizes, counts = np.unique(lattice.sizes, return_counts=True)
    with drawing(path, (7, 4)) as figure:
        axes = figure.add_subplot()
        # Bars of equal width on a logarithmic axis: from a size to the next whole one.
        axes.bar(sizes, counts, width=1.0, align="edge", color="tab:blue")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("items on a path")
        axes.set_ylabel("paths")
        axes.set_title(
            f"{lattice.spec.width}^{lattice.spec.depth} paths, {lattice.codes.size:,} of them in use"
        )
        axes.grid(alpha=0.3)
