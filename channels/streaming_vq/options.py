"""The options of the streaming VQ channel."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from channels.streaming_vq.merge import CHUNK
from engine.core.options import Online, Options
from engine.models.spec import ModelSpec, SequenceSpec, Towers
from engine.models.streaming_options import StreamingOptions
from engine.models.vq_spec import RankKind, VqSpec


class StreamingVqOptions(Towers):
    """Options of streaming VQ: the towers, the clusters, the ranking step, how they are trained, how lists are merged."""

    sequence: SequenceSpec = SequenceSpec(kind="mean")
    """What the user towers read of what the user did; `comirec`, which gives several vectors, is not possible."""

    metric: Literal["inner"] = "inner"
    """`inner`: an item's popularity is a bias beside the product."""

    clusters: int = Field(default=256, ge=2, le=1_048_576)
    """K, an eighth of the items at most; the paper has 16,384 for one task and 32,768 for several, over 350 million
    items."""

    rank: RankKind = "two_tower"
    """The ranking step: `two_tower` compares a second pair of vectors; `complex` lets every item ask the history, and
    crosses it with the user; `none` keeps the order of the index."""

    rank_dimension: int = Field(default=32, ge=1, le=1024)
    """Width of the ranking step's vectors."""

    rank_heads: int = Field(default=2, ge=1, le=64)
    """complex: heads of the attention; a divisor of `rank_dimension`."""

    rank_hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(default=(64,), min_length=1)
    """Widths of the hidden layers of the ranking step's networks."""

    rank_history: int = Field(default=20, ge=1, le=1024)
    """complex: items of the debiased history, at most."""

    rank_read: int = Field(default=50, ge=1, le=4096)
    """complex: newest items among which those of the debiased history are chosen."""

    secondary_clusters: int = Field(default=128, ge=1, le=65_536)
    """complex: coarser clusters by which a history is debiased."""

    dropped_clusters: int = Field(default=5, ge=0, le=1024)
    """complex: how many of the user's fullest coarser clusters are left out of the history; 0: none."""

    rank_list: Annotated[int, Field(ge=1, le=1_000_000), Online()] = 5000
    """Items that the merge of the clusters gives to the ranking step; an answer is never longer."""

    chunk: Annotated[int, Field(ge=1, le=1024), Online()] = CHUNK
    """Items of a cluster that the merge takes at once; 1: the exact order, for more time."""

    task_weights: Annotated[dict[str, Annotated[float, Field(ge=0)]], Online()] = Field(default={})
    """What each task counts for in both steps, 1 where it is not named; divided by their sum."""

    mask_exposed: Annotated[bool, Online()] = True
    """Whether what the user was shown is left out of the ranking step, so that all that is recalled is new to them."""

    training: StreamingOptions = StreamingOptions()
    """How all of it is trained."""

    @field_validator("sequence", mode="before")
    @classmethod
    def _own_defaults(cls, given: Any, info: ValidationInfo) -> Any:
        """Return a table that is given in part with the channel's own defaults in the rest."""
        if not isinstance(given, dict):
            return given
        own: Options = cls.model_fields[str(info.field_name)].default
        return own.model_dump(exclude_unset=True) | given

    @model_validator(mode="after")
    def _model_fits(self) -> Self:
        if self.sequence.kind == "comirec":
            raise ValueError(
                "sequence.kind = 'comirec' gives several vectors, and clusters are scored for one"
            )
        try:
            self.spec_of(ModelSpec(**{name: getattr(self, name) for name in Towers.model_fields}))
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        tasks = {task.name for task in self.training.tasks}
        unknown = sorted(set(self.task_weights) - tasks)
        if unknown:
            raise ValueError(
                f"task_weights names {unknown[0]!r}, and training.tasks has {', '.join(sorted(tasks))}"
            )
        if self.task_weights and not any(self.task_weights.get(task, 1.0) for task in tasks):
            raise ValueError("task_weights leaves no task with a weight above 0")
        return self

    def spec_of(self, tower: ModelSpec) -> VqSpec:
        """Return the specification of the model, given that of its towers with every size in it."""
        own = {name: getattr(self, name) for name in VqSpec.model_fields if name not in ("tower", "tasks")}
        return VqSpec(tower=tower, tasks=tuple(task.name for task in self.training.tasks), **own)
