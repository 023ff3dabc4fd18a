"""The options of the divide-and-conquer channel."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from channels.two_tower.options import TwoTowerOptions
from engine.core.options import Online, Tune
from engine.models.options import TrainingOptions
from engine.models.spec import SequenceSpec

MOST_CLUSTERS = 256
"""Clusters at most: each has a prompt, and a query of its own where it has a quota."""


class DivideAndConquerOptions(TwoTowerOptions):
    """Options of divide and conquer: those of the two towers, how the corpus is cut, and how quotas are shared out."""

    sequence: SequenceSpec = SequenceSpec(kind="sasrec")
    """What the user tower reads of what the user did; `none` and `comirec` cannot be prompted."""

    training: TrainingOptions = TrainingOptions(negatives={"popular": 4096}, batch=128)
    """How the towers are trained; of all negatives those in the positive's cluster count."""

    cluster: str = ""
    """A column of strings in items.parquet, each a cluster; empty: k-means finds them."""

    clusters: int = Field(default=10, ge=2, le=MOST_CLUSTERS)
    """How many clusters k-means makes."""

    alpha: Annotated[float, Field(ge=0, le=10), Online(), Tune(0.25, 2.0)] = 1.0
    """Quotas are in proportion to p(cluster)^alpha: 0 gives each cluster the same, 1 what the user is likely to want."""

    @model_validator(mode="after")
    def _negatives_fit(self) -> Self:
        if self.training.negatives.get("reject") and not self.rejects:
            raise ValueError("training.negatives names reject, and rejects no kind of event")
        if self.sequence.kind in ("none", "comirec"):
            raise ValueError(
                f"sequence.kind = {self.sequence.kind!r} cannot be prompted: take sasrec, gru, attention or mean"
            )
        if self.sequence.weighted:
            raise ValueError("a mean with item_exponent or length_exponent cannot be prompted")
        return self
