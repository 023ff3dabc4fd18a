"""Divide and conquer: the corpus in clusters, one tower that is prompted per cluster, quotas by the user's intent.

Source: Zhang et al. 2023, "Divide and Conquer: Towards Better Embedding-based Retrieval for Recommender Systems from a
Multi-task Perspective" (arXiv 2302.02657). The intent is a head on the same tower under a prompt of its own, where the
paper has a model beside; rounding and order of the quotas are ours (`quotas.py`), the paper is silent on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np

from channels.divide_and_conquer.options import DivideAndConquerOptions
from channels.divide_and_conquer.quotas import allot, begins_of, interleave, sharpen
from channels.divide_and_conquer.search import ClusterSearch
from channels.two_tower.answers import nearest_triggers
from channels.two_tower.build import build_bundle, check_liked
from channels.two_tower.bundle import Bundle
from channels.two_tower.channel import TwoTower
from channels.two_tower.options import TwoTowerOptions
from engine.core.candidates import CandidateBatch
from engine.core.channel import BuildContext, LoadContext
from engine.core.errors import SnapshotError
from engine.core.query import History, QueryBatch
from engine.core.types import AnyArray, Float32Array, Int32Array, RaggedRows
from engine.models.features import take_users


class ClusteredBundle(Bundle):
    """A trained model with prompts, and the clusters that they are for.

    Attributes:
        search: the clusters' indexes.
    """

    search: ClusterSearch

    def load_indexes(self, arrays: Mapping[str, AnyArray], config: TwoTowerOptions) -> None:
        """Read the clusters and the index of each; SnapshotError as `DivideAndConquer.load`."""
        clusters = arrays.get("clusters")
        count = self.spec.prompts
        if (
            clusters is None
            or clusters.dtype != np.int32
            or clusters.shape != (self.spec.items,)
            or not count
        ):
            raise SnapshotError(f"no clusters of {self.spec.items:,} items", "clusters")
        if clusters.size and not 0 <= clusters.min() <= clusters.max() < count:
            raise SnapshotError(f"names clusters that are none of {count}", "clusters")
        indexes, centres = [], np.zeros((count, self.spec.dimension), np.float32)
        for cluster in range(count):
            name = f"cluster.{cluster}.vectors"
            vectors = arrays.get(name)
            if vectors is None or len(vectors) != np.count_nonzero(clusters == cluster):
                raise SnapshotError("not the vectors of the cluster's items", name)
            indexes.append(self._index(arrays, f"index.{cluster}.", vectors, config))
            if len(vectors):
                mean = vectors.mean(0, dtype=np.float64)
                centres[cluster] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        self.search = ClusterSearch(indexes, clusters, centres)


class DivideAndConquer(TwoTower):
    """Recalls from every cluster the items nearest to the user's vector there, as many as the user's intent gives it."""

    Config = DivideAndConquerOptions
    bundle = ClusteredBundle
    learnt = ()  # prompts are those of the clusters, which another machine may cut a little otherwise

    def __init__(self, config: DivideAndConquerOptions, context: LoadContext, model: Bundle) -> None:
        self._search = cast(ClusteredBundle, model).search
        super().__init__(config, context, model)

    @classmethod
    def build(cls, config: TwoTowerOptions, context: BuildContext) -> None:
        """Cut the corpus, train tower, prompts and intent, build the clusters' indexes, and write all of it.

        Raises:
            BuildError: as of `TwoTower`.
            ConfigError: as of `TwoTower`; or the column of clusters is not there or makes too many.
        """
        from channels.divide_and_conquer.clusters import clusters_of

        check_liked("divide_and_conquer", context)
        clusters, count = clusters_of(cast(DivideAndConquerOptions, config), context)
        build_bundle("divide_and_conquer", config, context, clusters, count)

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Ask for the intent of each query, give every cluster its quota, and search those that have one.

        What the request forbids, and with `pass_over_history` what the user had, takes no place of a quota.
        """
        if not k.any():
            return CandidateBatch.empty(len(batch))
        config = cast(DivideAndConquerOptions, self.config)
        n, count = len(batch), self._model.spec.prompts
        users = self._queries.encode(batch)
        shares = self._tower.intent(self._tower.vectors(users, np.full(n, count, np.int32)))
        sharpen(shares, np.float32(config.alpha))
        quotas = np.zeros((n, count), np.int32)
        history = batch.history if config.pass_over_history else History.empty(n)
        lists = RaggedRows(history.rows, history.offsets), batch.excluded
        with self._one_at_a_time:
            without, room = self._search.pass_over(lists)
            allot(shares, room, k, quotas)
            pairs = np.flatnonzero(quotas)
            vectors = self._tower.vectors(take_users(users, pairs // count), (pairs % count).astype(np.int32))
            begins = begins_of(quotas)
            found, counts = self._search.find(vectors, pairs, quotas, begins, without)
        rows, scores = np.empty(found.size, np.int32), np.empty(found.size, np.float32)
        offsets = np.empty(n + 1, np.int64)
        whole = interleave(found, begins, counts, shares, rows, scores, offsets)
        answer = CandidateBatch(rows[:whole], scores[:whole], np.full(whole, -1, np.int32), offsets)
        nearest_triggers(
            answer, batch.history, self.config.trigger_items, self._model.vectors, *self._new.arrays
        )
        return answer

    def _make_searchable(self, rows: Int32Array, vectors: Float32Array) -> None:
        self._search.add(rows, vectors)
        self._notice_taken_down()

    def _notice_taken_down(self) -> None:
        self._search.allow(self._columns.available)
