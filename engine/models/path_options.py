"""How Deep Retrieval is trained: the table `training` of its channel's options. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engine.core.options import Options
from engine.models.options import Order


class PathTrainingOptions(Options):
    """Training of the paths, the user tower and the softmax that reranks (Gao et al. 2020, Deep Retrieval).

    What the model is made of stands beside this table in the channel's options, which check how it fits: `paths` (J) may
    not exceed `kept_paths` (S), and `width` to the power of `depth` has to be at least S and leave the items room: below
    items * J / 8 or so every path is crowded. `train_paths` checks the first of these again.
    """

    epochs: int = Field(default=12, ge=1, le=100_000)
    """Passes over the log in which everything learns. An update of an earlier model (`resume`, `incremental`) is always
    one pass."""

    fixed_epochs: int = Field(default=2, ge=0, le=100_000)
    """Passes after those in which the item vectors of the softmax stay as they are (section 4.1: against overfitting)."""

    batch: int = Field(default=4096, ge=1, le=1_048_576)
    """Examples per step, about: `gru` and `sasrec` learn every position of a history in one go, so that a step has whole
    histories, as many as come to this."""

    horizon: int = Field(default=1, ge=1, le=1000)
    """The label of an example is drawn among this many of the user's next items; 1: it is the next one."""

    order: Order = "shuffled"
    """`time`: pairs are learnt oldest first, as a stream comes; `shuffled`: anew in each pass."""

    learning_rate: float = Field(default=0.002, gt=0, le=10)
    """Step size."""

    decay: Literal["none", "linear"] = "none"
    """`linear`: the step size falls to 0 over the training."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decay of the weights of the dense layers; tables of embeddings are decayed where a batch touches them."""

    optimizer: Literal["adam", "adamw"] = "adam"
    """`adam` adds the decay to the gradient, `adamw` takes it off the weights."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the user tower and the layers of the paths."""

    feature_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the users' features replaced by code 0, so that the missing code is trained."""

    negatives: int = Field(default=1024, ge=0, le=100_000)
    """Items drawn per step that the softmax compares every example's label with; 0: all items, no sampling."""

    popularity_power: float = Field(default=0.75, ge=0, le=2)
    """Negatives are drawn with probability in proportion to an item's count to this power; 0 is uniform."""

    softmax_weight: float = Field(default=1.0, gt=0, le=100)
    """Weight of the softmax's loss beside that of the paths; the paper adds them up."""

    penalty: float = Field(default=0.03, ge=0, le=1e6)
    """alpha, how much a path of n items costs: alpha * n^4 / 4 (section 2.1); 0: items may crowd on a few paths. It is
    weighed against the items' counts of examples: the more events an item has, the more it takes to move it."""

    passes: int = Field(default=4, ge=1, le=100)
    """Passes of coordinate descent over the items in each M-step."""

    assign_every: int = Field(default=0, ge=0)
    """Batches between two M-steps; 0: one at the end of each epoch."""

    score_decay: float = Field(default=0.999, gt=0, le=1)
    """eta: what is left of an item's path scores at each further example of the item (section 3)."""

    scored_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the examples that beam search scores paths for: the dear part of a step."""

    validation: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the users whose newest item is held out to choose the best epoch; 0: the last one is taken."""

    patience: int = Field(default=5, ge=1)
    """Epochs without a better validation before it stops."""

    recall_at: int = Field(default=20, ge=1, le=1000)
    """K of the validation's Recall@K, of what beam search and reranking find."""

    recall_beam: int = Field(default=50, ge=1, le=10_000)
    """Paths that the validation searches for each user."""

    diverged: float = Field(default=3.0, gt=1)
    """A running mean of the loss above this times the first batch's stops the training as diverging."""

    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""
