"""How vector models are trained: the table `training` of their channels' options. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from engine.core.options import Options

Loss: TypeAlias = Literal[
    "softmax", "full_softmax", "user_softmax", "bce", "gbce", "hinge", "logistic", "nce"
]
NegativeSource: TypeAlias = Literal["in_batch", "popular", "cluster", "reject", "interpolated"]
Mask: TypeAlias = Literal["random", "dropout", "complementary", "information"]
Mode: TypeAlias = Literal["full", "resume", "incremental"]
Order: TypeAlias = Literal["shuffled", "time"]

LISTWISE: tuple[Loss, ...] = ("softmax", "full_softmax", "user_softmax")
"""Losses that compare one positive with all negatives at once."""

WHOLE: tuple[Loss, ...] = ("full_softmax", "user_softmax")
"""Losses over the whole catalogue: no negatives are drawn."""

WHY_NOT_EXPOSED = (
    "items that were shown and not clicked are no negatives of recall: the funnel chose them for this user, so they "
    "are nearly what the user wants, and a click was missed by chance; they belong in the training of a ranking model "
    "(use reject, cluster or interpolated for hard negatives)"
)


class TrainingOptions(Options):
    """Training of a pair of towers."""

    epochs: int = Field(default=20, ge=1, le=100_000)
    """Passes over the log, at most. An update of an earlier model (`resume`, `incremental`) is always one pass."""

    batch: int = Field(default=1024, ge=1, le=1_048_576)
    """Examples per step: (user, liked item) pairs; for `sasrec` and `gru`, which learn every position of a sequence in
    one go, and for `user_softmax`, users."""

    learning_rate: float = Field(default=0.001, gt=0, le=10)
    """Step size."""

    warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the training in which the step size rises to `learning_rate`."""

    decay: Literal["none", "linear"] = "none"
    """`linear`: the step size falls to 0 over the training."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decay of the weights of the dense layers; tables of embeddings are decayed where a batch touches them."""

    optimizer: Literal["adam", "adamw"] = "adam"
    """`adam` adds the decay to the gradient, `adamw` takes it off the weights."""

    loss: Loss = "softmax"
    """Listwise: `softmax` over the negatives, `full_softmax` over all items, `user_softmax` the same with the items of
    a user compared once for all the user's likes; pointwise: `bce`, `gbce`, `nce`; pairwise:
    `hinge`, `logistic`."""

    temperature: float = Field(default=0.1, gt=0, le=100)
    """Scores are divided by this in the loss. About 0.05 to 0.2 for `cosine`, 1 for `inner`."""

    margin: float = Field(default=1.0, gt=0, le=100)
    """hinge: how much better the positive must be."""

    calibration: float = Field(default=0.75, ge=0, le=1)
    """gbce: how far the positive's probability is calibrated back; 0 is plain BCE."""

    negatives: dict[NegativeSource, Annotated[int, Field(ge=0, le=100_000)]] = Field(default={"in_batch": 1})
    """Negatives by source. `in_batch`: how many other positives of the batch, 1 takes all of them. `popular`: drawn from
    the corpus, shared by the batch (listwise losses, gbce) or drawn for each example. `cluster`, `reject` and
    `interpolated`: for each example. `full_softmax` and `user_softmax` need none."""

    popularity_power: float = Field(default=0.75, ge=0, le=2)
    """`popular` draws an item with probability in proportion to its count to this power; 0 is uniform."""

    negative_power: float = Field(default=0.0, ge=-2, le=2)
    """user_softmax: a negative counts (its users / those of the mean item)^this; below 0 spares popular items."""

    interpolation: float = Field(default=0.5, ge=0, le=1)
    """interpolated: at most this part of the positive is mixed into a hard negative."""

    logq: Literal["exact", "streaming", "none"] = "exact"
    """softmax: logits are corrected by the log of how often an item is drawn: from counts, or estimated while it runs."""

    history: Literal["auto", "past", "others", "whole"] = "auto"
    """What an example's user did: the `past` of the positive, all `others` of the user's items, or with `user_softmax`
    the `whole`, the positive too; `auto` takes the past where the data has times, but for `user_softmax`."""

    order: Order = "shuffled"
    """`time`: pairs are learnt oldest first, as a stream comes; `shuffled`: anew in each pass."""

    hot_threshold: float = Field(default=0.0, ge=0, le=1)
    """Positives of items of a larger share f of the log are kept with probability sqrt(this / f); 0: all are kept."""

    self_supervised: float = Field(default=0.0, ge=0, le=100)
    """Weight of the self-supervised loss of items."""

    masks: tuple[Mask, ...] = ("random", "dropout", "complementary", "information")
    """Ways in which the self-supervised loss hides features, one drawn per step."""

    event_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default={})
    """Weight of an example per kind of event; 1 where absent."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the towers."""

    feature_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of features replaced by code 0, so that the missing code is trained. An id that is all that a tower reads
    stays."""

    validation: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the users whose newest item is held out to choose the best epoch; 0: the last one is taken."""

    patience: int = Field(default=5, ge=1)
    """Epochs without a better validation before it stops."""

    recall_at: int = Field(default=20, ge=1, le=1000)
    """K of the validation's Recall@K."""

    diverged: float = Field(default=3.0, gt=1)
    """A running mean of the loss above this times the first batch's stops the training as diverging."""

    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""

    @field_validator("negatives", mode="before")
    @classmethod
    def _none_exposed(cls, negatives: object) -> object:
        if isinstance(negatives, dict) and "exposed" in negatives:
            raise ValueError(WHY_NOT_EXPOSED)
        return negatives

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.loss not in WHOLE and not any(self.negatives.values()):
            raise ValueError("negatives names no source with a count above 0")
        if self.loss == "user_softmax" and self.history == "past":
            raise ValueError('user_softmax compares by the whole history: history is "others" or "whole"')
        if self.loss != "user_softmax" and self.history == "whole":
            raise ValueError(
                'history = "whole" is for user_softmax: others would learn to repeat what they read'
            )
        if self.loss != "user_softmax" and self.negative_power:
            raise ValueError(
                "negative_power is for user_softmax; popularity_power and logq are for drawn negatives"
            )
        if self.self_supervised and not self.masks:
            raise ValueError("self_supervised needs a mask")
        return self
