"""The options of the divide-and-conquer channel."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from channels.two_tower.options import TwoTowerOptions
from engine.core.options import Online, Tune
from engine.models.options import LISTWISE, TrainingOptions
from engine.models.spec import SequenceSpec

MOST_CLUSTERS = 256
"""Clusters at most: each has a prompt, and a query of its own where it has a quota."""


SHARES_NEGATIVES = (*LISTWISE, "gbce")
"""Losses for which a batch shares the negatives drawn from the corpus; the others draw theirs for each positive."""


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

    pass_over_history: Annotated[bool, Online()] = True
    """Items of the user's history are passed over, so that quotas are filled with others; turn it off where a scene
    returns what the user had."""

    @field_validator("training", mode="before")
    @classmethod
    def _drawn_from_the_cluster(cls, given: Any) -> Any:
        """Return the table with negatives that the loss can use, where it names none."""
        if isinstance(given, dict) and given.get("loss", "softmax") not in SHARES_NEGATIVES:
            return {"negatives": {"cluster": 2}} | given
        return given

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
        if self.liker_weight:
            raise ValueError("liker_weight needs one vector of a user, and there is one per prompt")
        return self
