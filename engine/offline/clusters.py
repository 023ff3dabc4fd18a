"""A trained model of streaming VQ, looked at from outside: how full its clusters are, who is in one, what moved.

It reads the arrays of the channel's snapshot, and, where there is one, the assignment log that a trainer has written
since. Nothing of it serves; what serves is the channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.core.errors import ConfigError, SnapshotError
from engine.core.types import AnyArray, Float32Array, Float64Array, Int32Array, Int64Array
from engine.models.vq_spec import VqSpec
from engine.offline.pictures import drawing
from engine.state.assignments import AssignedItems

QUANTILES = (50, 90, 99)

PARTS = 12
"""Equal parts of the time that is looked back at."""

FLOWS = 5
"""Pairs of clusters named, of those between which most items moved."""


class Clusters:
    """A trained model and the clusters of its items.

    Attributes:
        spec: of the model.
        assignment: int32[n], of each item, -1 where it is in none; what was published since comes behind the catalogue.
        bias: float32[n].
        vectors: float32[K, d].
    """

    def __init__(self, arrays: Mapping[str, AnyArray]) -> None:
        """Read the arrays of a snapshot; SnapshotError if they are no model of streaming VQ."""
        try:
            self.spec = VqSpec.model_validate_json(bytes(arrays["spec"]))
            self.assignment: Int32Array = np.array(arrays["assignment"], np.int32)
            self.bias: Float32Array = np.array(arrays["item_bias"], np.float32)
            self.vectors: Float32Array = arrays["codebook.vectors"]
        except (KeyError, ValueError, TypeError) as error:
            raise SnapshotError(f"no model of streaming VQ: {error}", "spec") from error
        wanted = (self.spec.clusters, self.spec.tower.dimension)
        if self.vectors.shape != wanted or self.assignment.max(initial=-1) >= self.spec.clusters:
            raise SnapshotError(f"has no {wanted[0]:,} clusters of {wanted[1]} numbers", "codebook.vectors")

    def put(self, rows: Int32Array, clusters: Int32Array, biases: Float32Array) -> None:
        """Move items to where a trainer has put them.

        Args:
            rows: int32[m], each once; from the catalogue's end on what was published since.
            clusters, biases: int32[m], float32[m].

        Raises:
            SnapshotError: a cluster that there is not.
        """
        if clusters.size and not 0 <= clusters.min() <= clusters.max() < self.spec.clusters:
            raise SnapshotError(
                f"names cluster {clusters.max()}, and there are {self.spec.clusters:,}", "table"
            )
        more = int(rows.max(initial=-1)) + 1 - self.assignment.size
        if more > 0:
            self.assignment = np.concatenate((self.assignment, np.full(more, -1, np.int32)))
            self.bias = np.concatenate((self.bias, np.zeros(more, np.float32)))
        self.assignment[rows], self.bias[rows] = clusters, biases

    @property
    def sizes(self) -> Int64Array:
        """int64[K]: items of each."""
        return np.bincount(self.assignment[self.assignment >= 0], minlength=self.spec.clusters)

    def members(self, cluster: int) -> Int32Array:
        """int32[...]: the items of a cluster as the merge takes them: by falling bias, of equal bias by row.

        Raises:
            ConfigError: there is no such cluster.
        """
        if not 0 <= cluster < self.spec.clusters:
            raise ConfigError(
                f"there is no cluster {cluster}: they are 0 to {self.spec.clusters - 1:,}", "--cluster"
            )
        rows = np.flatnonzero(self.assignment == cluster).astype(np.int32)
        return rows[np.argsort(-self.bias[rows], kind="stable")]

    def nearest(self, cluster: int, count: int) -> list[int]:
        """Return the other clusters nearest to one, nearest first."""
        distances = np.linalg.norm(self.vectors - self.vectors[cluster], axis=1)
        order = np.argsort(distances, kind="stable")
        return [int(each) for each in order if each != cluster][:count]

    def plane(self) -> tuple[Float64Array, Float64Array]:
        """Return float64[K, 2], the clusters on the plane in which they differ most (the first two principal components),
        and float64[2], the shares of their variance that the two axes have."""
        centred = self.vectors.astype(np.float64) - self.vectors.mean(0, dtype=np.float64)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        at = np.zeros((self.spec.clusters, 2))
        at[:, : min(2, s.size)] = (u * s)[:, :2]
        shares = np.zeros(2)
        shares[: min(2, s.size)] = (s**2 / max(float((s**2).sum()), 1e-30))[:2]
        return at, shares


@dataclass(frozen=True)
class ClusterSizes:
    """How full the clusters are.

    Attributes:
        items: in all; placed: those in a cluster.
        clusters: K; used: those that have an item.
        mean, quantiles: items of a cluster, empty ones too; at most so many in 50, 90 and 99 % of them.
        largest, largest_share, fullest: items of the fullest cluster, their share of those placed, and which it is.
        spread: the 99 % quantile over the median; None where the median is 0.
        dispersion: the variance over the mean: 1 where a random hash put the items, more where they crowd.
        bins: (least, most, clusters, items) of the clusters with so many items, empty ones first.
    """

    items: int
    placed: int
    clusters: int
    used: int
    mean: float
    quantiles: tuple[float, ...]
    largest: int
    largest_share: float
    fullest: int
    spread: float | None
    dispersion: float
    bins: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, clusters: Clusters) -> ClusterSizes:
        """Count the items of the clusters of a model."""
        sizes = clusters.sizes
        placed, largest = int(sizes.sum()), int(sizes.max())
        quantiles = tuple(np.percentile(sizes, QUANTILES).tolist())
        bins = [(0, 0, int((sizes == 0).sum()), 0)]
        least, most = 1, 1
        while least <= largest:
            inside = sizes[(sizes >= least) & (sizes <= most)]
            bins.append((least, most, int(inside.size), int(inside.sum())))
            least, most = most + 1, most * 2
        return cls(
            items=clusters.assignment.size,
            placed=placed,
            clusters=sizes.size,
            used=int((sizes > 0).sum()),
            mean=float(sizes.mean()),
            quantiles=quantiles,
            largest=largest,
            largest_share=largest / placed if placed else 0.0,
            fullest=int(sizes.argmax()),
            spread=quantiles[-1] / quantiles[0] if quantiles[0] else None,
            dispersion=float(sizes.var() / sizes.mean()) if placed else 0.0,
            bins=tuple(bins),
        )


@dataclass(frozen=True)
class Moves:
    """How assignments moved in the last minutes of an assignment log.

    Attributes:
        minutes: so many.
        assignments: that were written.
        items: distinct ones among them.
        first: items that were in no cluster before, as far as is known.
        moves: assignments that moved their item; moved: distinct items of these.
        away: items that are in another cluster now than at the beginning.
        parts: (assignments, moves) of each twelfth of the time, oldest first.
        flows: (from, to, moves) of the pairs of clusters between which most moved.
        newest_ms: when the newest assignment of all was written, milliseconds since the epoch; 0: none is there.
    """

    minutes: float
    assignments: int
    items: int
    first: int
    moves: int
    moved: int
    away: int
    parts: tuple[tuple[int, int], ...]
    flows: tuple[tuple[int, int, int], ...]
    newest_ms: int

    @classmethod
    def of(
        cls,
        entries: Iterable[tuple[int, AssignedItems]],
        known: AssignedItems,
        known_ms: int,
        now_ms: int,
        minutes: float,
    ) -> Moves:
        """Follow the items through the log.

        Args:
            entries: when each was written, milliseconds since the epoch, and its assignments, oldest first: as far back
                as the log goes, since it says where items were before.
            known: where the items of a snapshot were, each once.
            known_ms: when the snapshot was.
            now_ms: the end of the minutes.
            minutes: to look back.
        """
        there = list(entries)
        before = sum(at <= known_ms for at, _ in there)
        there.insert(before, (known_ms, known))
        times = np.repeat([at for at, _ in there], [len(items) for _, items in there]).astype(np.int64)
        told = np.repeat([at != before for at in range(len(there))], [len(items) for _, items in there])
        every = AssignedItems.join([items for _, items in there])
        order = np.argsort(every.keys, kind="stable")
        keys, clusters, times, told = every.keys[order], every.clusters[order], times[order], told[order]
        again = np.append(False, keys[1:] == keys[:-1])
        came_from = np.append(np.int32(-1), clusters[:-1])
        came_from = np.where(again, came_from, -1)
        since = now_ms - round(minutes * 60_000)
        late = told & (times >= since)
        moves = late & (came_from >= 0) & (came_from != clusters)
        # The first line of an item among the late ones says where it was at the beginning, the last where it is.
        place = np.flatnonzero(late)
        _, begin = np.unique(keys[place], return_index=True)
        end = np.append(begin[1:], place.size) - 1 if begin.size else begin
        was, is_ = came_from[place[begin]], clusters[place[end]]
        part = np.clip((times - since) * PARTS // max(now_ms - since, 1), 0, PARTS - 1)
        pairs, counts = np.unique(
            np.stack((came_from[moves], clusters[moves]), 1), axis=0, return_counts=True
        )
        top = np.argsort(-counts, kind="stable")[:FLOWS]
        return cls(
            minutes=minutes,
            assignments=int(late.sum()),
            items=int(begin.size),
            first=int((was < 0).sum()),
            moves=int(moves.sum()),
            moved=int(np.unique(keys[moves]).size),
            away=int(((was >= 0) & (was != is_)).sum()),
            parts=tuple(
                (int((late & (part == at)).sum()), int((moves & (part == at)).sum())) for at in range(PARTS)
            ),
            flows=tuple((*pairs[at].tolist(), int(counts[at])) for at in top),
            newest_ms=int(times[told].max(initial=0)),
        )


def draw_clusters(clusters: Clusters, path: Path) -> None:
    """Write a picture: the clusters on their principal plane, coloured by how many items they have, and how many clusters
    have how many items.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    sizes, (at, shares) = clusters.sizes, clusters.plane()
    with drawing(path, (11, 4.5)) as figure:
        plane, histogram = figure.subplots(1, 2, width_ratios=(3, 2))
        empty = sizes == 0
        plane.scatter(*at[empty].T, s=12, facecolors="none", edgecolors="tab:red", label="empty")
        order = np.flatnonzero(~empty)[np.argsort(sizes[~empty], kind="stable")]  # the fullest on top
        marks = plane.scatter(
            *at[order].T, c=np.log2(sizes[order]), s=14 + 120 * sizes[order] / max(int(sizes.max()), 1),
            cmap="viridis", alpha=0.8,
        )  # fmt: skip
        bar = figure.colorbar(marks, ax=plane, label="items")
        most = max(int(sizes.max()), 1)
        least = int(sizes[~empty].min(initial=most))
        ticks = np.arange(math.ceil(math.log2(least)), math.floor(math.log2(most)) + 1)
        bar.set_ticks(ticks.tolist(), labels=[f"{2**tick:,}" for tick in ticks.tolist()])
        plane.set_xlabel(f"first principal component, {shares[0]:.0%} of the variance")
        plane.set_ylabel(f"second, {shares[1]:.0%}")
        plane.set_title(f"{sizes.size:,} clusters, {int(empty.sum()):,} of them empty")
        if empty.any():
            plane.legend(loc="best")
        histogram.hist(sizes, bins=min(40, int(sizes.max()) + 1), color="tab:blue")
        histogram.axvline(float(sizes.mean()), color="black", linestyle=":")
        histogram.yaxis.get_major_locator().set_params(integer=True)
        histogram.set_xlabel("items of a cluster (dotted: the mean)")
        histogram.set_ylabel("clusters")
