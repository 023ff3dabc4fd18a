"""The options of the two-tower channel."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from engine.ann import IndexKind, IndexOptions
from engine.core.options import Online, Options
from engine.models.options import TrainingOptions
from engine.models.spec import SequenceSpec, Towers


class TwoTowerOptions(Towers):
    """Options of the two-tower channel: the towers, how they are trained, and how their vectors are searched."""

    sequence: SequenceSpec = SequenceSpec(kind="mean")
    """What the user tower reads of what the user did."""

    training: TrainingOptions = TrainingOptions()
    """How the towers are trained."""

    rejects: tuple[str, ...] = ()
    """Kinds of event that say that ranking threw an item out: where the negatives `reject` come from."""

    cluster: str = ""
    """A column of strings in items.parquet: the negatives `cluster` are items that have the positive's string."""

    liker_weight: float = Field(default=0.0, ge=0, le=4)
    """How far the item vectors are drawn towards the vectors of the users who like the item, after the training."""

    index: IndexKind = "hnsw"
    """The kind of index."""

    index_options: IndexOptions = IndexOptions()
    """How the index is built and searched."""

    trigger_items: Annotated[int, Field(ge=0, le=1000), Online()] = 20
    """Newest items of the user among which the trigger of each candidate is looked for, the nearest; 0: none has one."""

    @field_validator("sequence", "training", mode="before")
    @classmethod
    def _own_defaults(cls, given: Any, info: ValidationInfo) -> Any:
        """Return a table that is given in part with the channel's own defaults in the rest."""
        if not isinstance(given, dict):
            return given
        own: Options = cls.model_fields[str(info.field_name)].default
        return own.model_dump(exclude_unset=True) | given

    @field_validator("liker_weight")
    @classmethod
    def _one_vector_of_a_user(cls, weight: float, info: ValidationInfo) -> float:
        sequence = info.data.get("sequence")
        if weight and isinstance(sequence, SequenceSpec) and sequence.kind == "comirec":
            raise ValueError("needs one vector of a user, and comirec makes several")
        return weight

    @model_validator(mode="after")
    def _negatives_fit(self) -> Self:
        negatives = self.training.negatives
        if negatives.get("reject") and not self.rejects:
            raise ValueError("training.negatives names reject, and rejects no kind of event")
        if negatives.get("cluster") and not self.cluster:
            raise ValueError("training.negatives names cluster, and cluster no column of items.parquet")
        return self
