"""The options of the Deep Retrieval channel."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from engine.core.options import Online, Options
from engine.models.path_options import PathTrainingOptions
from engine.models.paths import PathSpec
from engine.models.spec import ITEM_ID, CrossKind, Feature, Join, SequenceSpec, Towers


class DeepRetrievalOptions(Options):
    """Options of Deep Retrieval: the user tower, the lattice, how both are trained, and how paths are searched."""

    user_features: tuple[Feature, ...] = ()
    """What the user tower reads besides the sequence."""

    item_features: tuple[Feature, ...] = ()
    """What makes items similar where one has no event yet: it joins the paths of those that share a value of these."""

    sequence: SequenceSpec = SequenceSpec(kind="gru", length=69)
    """What the user tower reads of what the user did; `comirec`, which gives several vectors, is not possible."""

    join: Join = "concatenate"
    """How the user tower's fields become its input: side by side, or added up, for which all must be of one width."""

    cross: CrossKind = "none"
    """Explicit crosses of the user tower's input."""

    cross_layers: int = Field(default=2, ge=1, le=16)
    """dcn: layers."""

    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = ()
    """Widths of the user tower's hidden layers."""

    dimension: int = Field(default=64, ge=1, le=4096)
    """Width of the user's vector, of the embedding of a node, and of the item vectors that rerank."""

    width: int = Field(default=100, ge=2, le=65_536)
    """K, nodes of a layer."""

    depth: int = Field(default=3, ge=1, le=62)
    """D, layers: there are width^depth paths."""

    path_hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = (64,)
    """Widths of the hidden layers of each layer's network."""

    paths: int = Field(default=3, ge=1, le=64)
    """J, paths of an item at most."""

    kept_paths: int = Field(default=20, ge=1, le=1000)
    """S, paths whose scores are kept for each item."""

    beam: Annotated[int, Field(ge=1, le=10_000), Online()] = 50
    """B, paths that are searched for a user."""

    rerank: Annotated[bool, Online()] = True
    """Whether the items of the paths are ordered by the small ranker; else by the probability of their path."""

    mask_exposed: Annotated[bool, Online()] = True
    """Whether what the user was shown is left out before the best are taken, so that they are all new to the user."""

    training: PathTrainingOptions = PathTrainingOptions()
    """How all of it is trained."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        try:
            whole = self.lattice.paths
            self.towers  # noqa: B018  # it is checked when it is made
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        if self.sequence.vectors != 1 or self.sequence.kind == "comirec":
            raise ValueError(
                "sequence.kind = 'comirec' gives several vectors, and paths are searched for one"
            )
        if self.paths > self.kept_paths:
            raise ValueError(f"paths = {self.paths} (J) is more than kept_paths = {self.kept_paths} (S)")
        if self.kept_paths > whole:
            raise ValueError(f"kept_paths = {self.kept_paths} (S) is more than width^depth = {whole} paths")
        if self.beam > whole:
            raise ValueError(f"beam = {self.beam} is more than width^depth = {whole} paths")
        for at, feature in enumerate(self.item_features):
            if feature.name == ITEM_ID or not (feature.coded or feature.multi):
                raise ValueError(
                    f"item_features.{at}: {feature.name!r} is no value that items share: take one of kind categorical, "
                    "multi, id, or a number in buckets"
                )
        return self

    @property
    def lattice(self) -> PathSpec:
        """The lattice and its networks."""
        return PathSpec(width=self.width, depth=self.depth, dimension=self.dimension, hidden=self.path_hidden)

    @property
    def towers(self) -> Towers:
        """The user tower; nothing says what the item tower of the pair is, as there is none."""
        return Towers(
            user_features=self.user_features,
            sequence=self.sequence,
            join=self.join,
            cross=self.cross,
            cross_layers=self.cross_layers,
            hidden=self.hidden,
            dimension=self.dimension,
            metric="inner",
            tie_items=False,
        )
