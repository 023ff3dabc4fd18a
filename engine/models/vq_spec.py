"""What a streaming VQ model is made of: the one description that training and serving build the same model from.

Source: Bin et al. 2025, "Real-time Indexing for Large-scale Recommendation by Streaming Vector Quantization Retriever".
Notation as in `engine/models/spec.py`: an array [out, in] is a Linear's weight, y = x W^T + b. T is the number of tasks,
K of clusters, d the towers' dimension, e that of the ranking step. Codes of items are row + 1; row 0 of a table of items
is whatever came after the build.

**Index step.** u_p of task p is a user tower's vector, v an item tower's, Q(v) the vector of the item's cluster. The
score of an item is u_p . Q(v) + bias (eq. 11). Towers are those of `engine/models/spec.py`, with the inner product.

| array | type | what |
|---|---|---|
| `user.*`, or `user_<task>.*` of each task where there are several | float32 | user towers |
| `item.*` | float32 | the item tower |
| `bias.weight` | float32[items + 1] | v_bias of each code |
| `codebook.sums`, `.counts`, `.vectors` | float32 [K, d], [K], [K, d] | w, c and w / c of `engine/models/codebook.py` |
| `assignment` | int32[n] | the cluster of each item, those published since too; -1: none yet |
| `item_bias` | float32[n] | the bias of each item |
| `secondary` | int32[K] | the coarser cluster that each cluster is in; with `rank = "complex"` and `dropped_clusters` |

**Published since.** A trainer that follows gives m of the items published since the build a row each, in the order in
which they came. Its bundles have `published.keys` int64[m] and, as `published.<name>`, their rows of the item tower's
table of ids, of `bias.weight` and with a ranking step of `rank.items.weight`, `rank.bias.weight`, `rank.item_vectors`
and `rank.item_bias`.

**Ranking step.** x is the input of the first task's user tower: its fields side by side (or their sum) and its floats, as
`engine/models/spec.py` concatenates them. p = MLP(x) by `rank.user.layers.<l>`: ReLU between layers, widths
`rank_hidden`, then T e with `two_tower` (task by task), e with `complex`. The item's vector is
z = `rank.items.weight`[code] + `rank.project.weight` v, stored as `rank.item_vectors`; of an item published later,
without a row of its own, it is made with code 0. b_t is `rank.bias.weight`[code, t], stored as `rank.item_bias`.

- two_tower: the score of task t is p_t . z + b_t.
- complex: H heads of width e / H. S is [l, e], the rows of `rank.items.weight` of the debiased history (`debiased.py`);
  q = Wq z, k = Wk S, v = Wv S; per head a = softmax(q k / sqrt(e / H)) v over the l items, zeros where l is 0; then
  a = Wo a + bo.
  y = MLP(a, p, z, p * z side by side: 4 e) by `rank.layers.<l>`, ReLU after each; the score of task t is
  heads_t . y + heads bias_t + b_t.

Scores of the tasks are combined by whoever serves.

| array | shape | where |
|---|---|---|
| `rank.user.layers.<l>.weight`, `.bias` | [out, in], [out] | both |
| `rank.items.weight` | [items + 1, e] | both |
| `rank.project.weight` | [e, d] | both |
| `rank.bias.weight` | [items + 1, T] | both |
| `rank.item_vectors`, `rank.item_bias` | [n, e], [n, T] | both |
| `rank.query.weight`, `rank.key.weight`, `rank.value.weight` | [e, e] | complex: Wq, Wk, Wv |
| `rank.out.weight`, `.bias` | [e, e], [e] | complex: Wo, bo |
| `rank.layers.<l>.weight`, `.bias` | [out, in], [out] | complex; widths `rank_hidden` |
| `rank.heads.weight`, `.bias` | [T, last of `rank_hidden`], [T] | complex |
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from engine.core.options import Options
from engine.models.spec import ModelSpec, tower_shape

RankKind: TypeAlias = Literal["none", "two_tower", "complex"]

PUBLISHED = "published."
"""How the arrays begin that are of items published since the build, a row each."""


class VqSpec(Options):
    """A streaming VQ model as it is trained and served."""

    tower: ModelSpec
    """The towers: `metric = "inner"`, one vector per user, no prompts."""

    clusters: int = Field(ge=2, le=1_048_576)
    """K."""

    tasks: tuple[str, ...] = Field(default=("positive",), min_length=1)
    """Names of the tasks, one user tower each."""

    rank: RankKind = "none"
    """The ranking step."""

    rank_dimension: int = Field(default=32, ge=1, le=1024)
    """e."""

    rank_heads: int = Field(default=2, ge=1, le=64)
    """H; a divisor of `rank_dimension`."""

    rank_hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(default=(64,), min_length=1)
    """Widths of the hidden layers of the ranking step's networks."""

    rank_history: int = Field(default=20, ge=1, le=1024)
    """complex: items of the debiased history, at most."""

    rank_read: int = Field(default=50, ge=1, le=4096)
    """complex: newest items among which those of the debiased history are chosen."""

    secondary_clusters: int = Field(default=128, ge=1, le=65_536)
    """complex: coarser clusters by which a history is debiased."""

    dropped_clusters: int = Field(default=5, ge=0, le=1024)
    """complex: how many of the user's fullest coarser clusters are dropped from the history; 0: it stays as it is."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.tower.metric != "inner":
            raise ValueError(
                'streaming VQ compares by the inner product: metric = "cosine" has no room for a bias'
            )
        if self.tower.vectors_per_user > 1 or self.tower.prompts:
            raise ValueError("streaming VQ has one vector per user and task: no interests, no prompts")
        if self.rank_dimension % self.rank_heads:
            raise ValueError(
                f"rank_heads = {self.rank_heads} does not divide rank_dimension = {self.rank_dimension}"
            )
        if self.rank == "complex" and self.rank_read < self.rank_history:
            raise ValueError(f"rank_read = {self.rank_read} is less than rank_history = {self.rank_history}")
        return self

    @property
    def user_names(self) -> tuple[str, ...]:
        """What the arrays of each task's user tower begin with."""
        return ("user",) if len(self.tasks) == 1 else tuple(f"user_{task}" for task in self.tasks)

    @property
    def read(self) -> int:
        """Newest items of a history that are to be given: the towers and the ranking step take their parts of them."""
        sequence = self.tower.sequence
        of_tower = 0 if sequence.kind == "none" else sequence.length
        return max(of_tower, self.rank_read) if self.rank == "complex" else of_tower

    @property
    def rank_user_layers(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each `rank.user.layers.<l>`."""
        shape = tower_shape(self.tower, "user")
        width = shape.fields[0] + shape.floats if shape.summed else shape.width
        last = self.rank_dimension * (len(self.tasks) if self.rank == "two_tower" else 1)
        return tuple(pairwise((width, *self.rank_hidden, last)))

    @property
    def rank_layers(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each `rank.layers.<l>` of the complex ranking step."""
        return tuple(pairwise((4 * self.rank_dimension, *self.rank_hidden)))
