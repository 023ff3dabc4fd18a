"""How streaming VQ is trained: the table `training` of its channel's options. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from engine.core.options import Options


class Task(Options):
    """What one user tower learns: which events reward an impression, and how much."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Of the task; with several tasks the arrays of its user tower begin with `user_<name>.`."""

    kinds: tuple[str, ...] = ()
    """Kinds of events that reward an impression; none: what the data set calls a positive."""

    reward: Literal["one", "log_value"] = "one"
    """h: 1, or ln(1 + the event's value), as for the time that somebody stayed."""

    eta: float = Field(default=1.0, ge=0, le=10)
    """How strongly the reward draws the clusters: an impression counts (1 + h)^eta in their moving averages."""

    weight: float = Field(default=1.0, ge=0, le=100)
    """Weight of the task's losses."""


class StreamingOptions(Options):
    """Training of the index model, the codebook and the ranking step (Bin et al. 2025, streaming VQ)."""

    tasks: tuple[Task, ...] = Field(default=(Task(name="positive"),), min_length=1)
    """Tasks; each has a user tower of its own, and all share the clusters."""

    epochs: int = Field(default=1, ge=1, le=1000)
    """Passes over the log in a build: the last in order of time, as a stream comes, those before it shuffled, since in
    many logs a user's events stand close together. An update of an earlier model is always one pass."""

    batch: int = Field(default=256, ge=2, le=65_536)
    """Impressions per step: the items of all of them are compared with each other."""

    learning_rate: float = Field(default=0.02, gt=0, le=10)
    """Step size of the tables of embeddings; a stream has no end towards which it could fall."""

    dense_rate: float = Field(default=0.1, gt=0, le=100)
    """Step size of the dense layers, which every example moves, as a part of `learning_rate`."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decay of the weights of the dense layers; tables of embeddings are decayed where a batch touches them."""

    temperature: float = Field(default=1.0, gt=0, le=100)
    """Scores are divided by this in the losses."""

    feature_dropout: float = Field(default=0.02, ge=0, lt=1)
    """Share of features replaced by code 0, so that the missing code is trained. An id that is all that a tower reads
    stays."""

    negatives: int = Field(default=512, ge=0, le=65_536)
    """Items of the whole catalogue, drawn evenly, that every example is compared with besides those of its batch."""

    replay: float = Field(default=0.5, ge=0, le=16)
    """Impressions from memory that are learnt again per new one, against forgetting; 0: each is learnt once. They move no
    cluster."""

    memory: int = Field(default=20_000, ge=1, le=10_000_000)
    """Impressions that are remembered, the history of each with it; once there are so many a new one takes the place of
    one drawn at random."""

    auxiliary_weight: float = Field(default=1.0, ge=0, le=100)
    """Weight of L_aux, the softmax over the items' own vectors: what lets an item move by itself."""

    index_weight: float = Field(default=1.0, ge=0, le=100)
    """Weight of L_ind, the softmax over the items' clusters."""

    similarity_weight: float = Field(default=0.0, ge=0, le=100)
    """Weight of L_sim, the distance of items from their clusters. It ties items to where they are: for ablations."""

    bias: bool = True
    """Whether an item's popularity is a bias beside its vector; `false` for ablations."""

    centres: Literal["members", "moving"] = "members"
    """What a cluster's vector is: `members`, the mean of the items that are in it, each counted by how often it comes;
    `moving`, as in the paper, the moving average of whatever came to it."""

    decay: float = Field(default=0.97, gt=0, lt=1)
    """`moving`: alpha, what a batch leaves of the clusters' moving averages."""

    beta: float = Field(default=0.25, ge=0, le=2)
    """An item that comes every delta impressions counts delta^beta each time: more favours rare items."""

    boost: float = Field(default=5.0, ge=0, le=1000)
    """s, the disturbance: a cluster that counts less than 1 / s of the mean seems nearer than it is; 0: none does."""

    crowding: float = Field(default=1.0, ge=0, le=4)
    """A cluster with more items than the mean seems (items / mean)^crowding as far; 0: as in the paper, it does not."""

    frequency_rate: float = Field(default=0.05, gt=0, le=1)
    """Weight of the newest interval in the estimate of how often an item comes."""

    candidate_share: float = Field(default=0.25, ge=0, le=100)
    """Items of the candidate stream per impression: all items in turn, forward only; 0: none."""

    rank_weight: float = Field(default=1.0, gt=0, le=100)
    """Weight of the ranking step's loss."""

    rank_negatives: int = Field(default=16, ge=1, le=1024)
    """Ranking step `complex`: items that each example is compared with."""

    diverged: float = Field(default=3.0, gt=1)
    """A running mean of the loss above this times the first batch's stops the training as diverging."""

    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""

    label_seconds: int = Field(default=600, ge=1, le=86_400)
    """Live: how long after its exposure an item's actions reward the impression."""

    dump_minutes: float = Field(default=5.0, gt=0, le=1440)
    """Live: how often the trainer writes a bundle that swaps in."""

    spare_rows: int = Field(default=10_000, ge=0, le=10_000_000)
    """Live: how many items published since the build get embeddings and a bias of their own, first come first served;
    those behind them share one."""

    @model_validator(mode="after")
    def _tasks_differ(self) -> Self:
        names = [task.name for task in self.tasks]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"tasks names {twice[0]!r} twice")
        if not any(task.weight for task in self.tasks):
            raise ValueError("no task has a weight above 0")
        if not (self.auxiliary_weight or self.index_weight):
            raise ValueError("auxiliary_weight and index_weight are both 0: nothing is learnt")
        return self
