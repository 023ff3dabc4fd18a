"""What a pair of towers is made of: the one description that training and serving build the same model from.

Notation: an array [out, in] is a Linear's weight as torch keeps it, y = x W^T + b. `f` numbers the fields, `D` is the
width of what is concatenated.

**Input of a tower**, concatenated in this order: the embedding of every feature that has codes (id, categorical, bucketed
numeric: one row of its table; multi: the mean of its rows, zeros where it has none), in the order of the features; then
the sequence vector (user tower only); then two floats per plain numeric feature, value and missing flag, in the order
of the features. The embeddings and the sequence vector are the *fields*; the floats are none. With `join = "sum"` the
fields are added up instead, and the floats stand behind the sum.

**Parameters** (names as torch's `state_dict()` has them; float32; `user.` or `item.` stands before them in a snapshot):

| name | shape | where |
|---|---|---|
| `embeddings.<i>.weight` | [size, dimension] | feature i (position among the tower's features), if it has codes |
| `sequence.items.weight` | [items + 1, width] | any sequence, unless `tie_items`; row 0 is padding |
| `sequence.weights` | [items + 1] | weighted mean: c^-item_exponent, c how many users an item has; not trained |
| `sequence.query` | [width] | attention |
| `sequence.gru.weight_ih_l0`, `.weight_hh_l0`, `.bias_ih_l0`, `.bias_hh_l0` | [3 width, width], [3 width] | gru |
| `sequence.positions.weight` | [length, width] | sasrec; row p is the p-th newest |
| `sequence.blocks.<b>.attention_norm.weight`, `.bias` | [width] | sasrec |
| `sequence.blocks.<b>.attention.in_proj_weight`, `.in_proj_bias` | [3 width, width], [3 width] | sasrec: q, k, v |
| `sequence.blocks.<b>.attention.out_proj.weight`, `.bias` | [width, width], [width] | sasrec |
| `sequence.blocks.<b>.feed_norm.weight`, `.bias` | [width] | sasrec |
| `sequence.blocks.<b>.inner.weight`, `.bias`, `.outer.weight`, `.bias` | [width, width], [width] | sasrec |
| `sequence.norm.weight`, `.bias` | [width] | sasrec |
| `sequence.prompts` | [prompts + 1, width] | with prompts: one per task, the last the intent's |
| `intent.weight`, `.bias` | [prompts, dimension], [prompts] | with prompts |
| `sequence.hidden.weight` | [4 width, width] | comirec: W1, no bias |
| `sequence.heads.weight` | [interests, 4 width] | comirec: W2, no bias |
| `cross.layers.<l>.weight`, `.bias` | [D, D], [D] | dcn |
| `cross.squeeze.weight`, `.bias` | [(f + 1) // 2, f], [(f + 1) // 2] | senet, fibinet |
| `cross.excite.weight`, `.bias` | [f, (f + 1) // 2], [f] | senet, fibinet |
| `cross.bilinear.weight` | [field width, field width] | fibinet, no bias |
| `layers.<l>.weight`, `.bias` | [out, in], [out] | the MLP: `hidden`, then `dimension` |
| `lengths` | [items + 1] | item tower with `popularity_exponent`: the length of each item's vector; not trained |

**Sequences.** E is [n, width], the embeddings of the items that are no padding, oldest first. Of an empty history the
vector is zeros, whatever the kind.

- mean: sum(E) / n; weighted sum_i (w_i E_i) / n^length_exponent, w of `sequence.weights`. With 0.5 and 0.5 it is the
  symmetric normalisation of graph convolutions (He et al. 2020, LightGCN, eq. 3).
- attention: w = softmax over (E q / sqrt(width), 0); sum of w_i E_i: the 0 belongs to a zero vector, so that an
  irrelevant history gives about nothing (the target-free form of the attention with a zero vector of Ai et al. 2019).
- gru: torch's GRU cell from a zero state over E; the last state.
- sasrec: X = sqrt(width) E + P[n - 1 - i]; per block X = X + MHA(N(X), N(X), N(X)), causal, then X = X + outer(relu(
  inner(N'(X)))); N LayerNorm with eps 1e-8; the vector is the final LayerNorm of the last row (Kang and McAuley 2018,
  with the norm before each part as theirs; queries, keys and values are all normed, which theirs are not).
- comirec: A = softmax over the items of (heads tanh(hidden E^T)), interests = A E: [interests, width] (Cen et al. 2020,
  eq. 5 and 6, without positions); each interest goes through the rest of the tower as a row of its own.

**Prompts.** One tower that serves K tasks, the clusters of a corpus, is told the task by a vector: E of task k is E t_k,
each item's embedding times the prompt, before anything else is done with it (Zhang et al. 2023, divide and conquer).
Row K of the prompts belongs to a task of its own, the intent: which cluster the next item is in. Its probabilities are
softmax(intent(vector)), the vector being what the tower makes of the history under prompt K.

**Cross**, over the concatenated input x of width D:

- dcn: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l (Wang et al. 2021, eq. 1); its output goes into the MLP.
- senet: z_f = mean of field f; a = relu(excite(relu(squeeze(z)))); every field is multiplied by its a_f (Huang et al.
  2019, eq. 2 to 5 with mean pooling); the floats stay behind them as they are.
- fibinet: for the fields v and the reweighted fields v', for f < g in order: (W v_f) * v_g, all of v, then all of v';
  the floats behind them ("field-all" with one W for both; Huang et al. 2019, eq. 6 to 8). All fields are of one width.

**MLP**: Linear and ReLU for each width of `hidden`, then Linear to `dimension`. It is left out where `hidden` is empty,
there is no cross, and the input is one field (or sum of fields) of width `dimension`: then the tower is a table of ids
(matrix factorisation), or a sequence encoder. With `metric = "cosine"` the result is divided by max(its L2 norm, 1e-12).
With `popularity_exponent` an item's is then multiplied by its length, (c / mean c)^popularity_exponent, c how many users
like it, at least 1: a cosine has no place for how popular an item is, and this gives it one without a dimension more.
Code 0, an item that the build did not know, counts as c = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from engine.core.options import Options

FeatureKind: TypeAlias = Literal["id", "categorical", "multi", "numeric"]
Scale: TypeAlias = Literal["log", "bucket", "none"]
Lookup: TypeAlias = Literal["table", "hash"]
SequenceKind: TypeAlias = Literal["none", "mean", "attention", "gru", "sasrec", "comirec"]
CrossKind: TypeAlias = Literal["none", "dcn", "senet", "fibinet"]
Join: TypeAlias = Literal["concatenate", "sum"]
Side: TypeAlias = Literal["user", "item"]

SIDES: tuple[Side, Side] = ("user", "item")

ITEM_ID = "item_id"
"""The feature that is an item itself: with `lookup = "table"` the code of row r is r + 1."""

USER_ID = "user_id"
"""The feature that is a user: with `lookup = "table"` the code of row u is u + 1."""

CONTEXT = "context."
"""How the names of features of the request begin: `context.city`, `context.hour`, `context.device.<attribute>`."""

HOUR = "context.hour"
"""The hour of the day in UTC: code 1 + hour, 0 where the time is not known. The only feature that differs between two
events of a user, so that training takes it from the time of the event."""

HOURS = 24


class Feature(Options):
    """One feature of a tower.

    Code 0 of everything that has codes means "missing or unknown".
    """

    name: str = Field(min_length=1)
    """A column of users.parquet or items.parquet; `user_id`, `item_id`; or a feature of the request (`context.`)."""

    kind: FeatureKind
    """`id`, `categorical`: one value; `multi`: a list of strings; `numeric`: a number."""

    dimension: int = Field(default=16, ge=1, le=4096)
    """Width of the embedding; means nothing for a number that is no bucket."""

    scale: Scale = "none"
    """Of a number: `bucket` makes it a code by quantiles, `log` and `none` a float of mean 0 and deviation 1."""

    buckets: int = Field(default=16, ge=2, le=4096)
    """With `scale = "bucket"`: quantiles."""

    lookup: Lookup = "table"
    """Of an id: `table` gives each id of the build its own code, `hash` spreads all ids over `size - 1` codes."""

    size: int = Field(default=0, ge=0)
    """Rows of the embedding table, row 0 for what is unknown. Given with `lookup = "hash"`, else found by the build."""

    @property
    def coded(self) -> bool:
        """Whether it is one code per row: a column of `Encoded.codes`."""
        return self.kind in ("id", "categorical") or (self.kind == "numeric" and self.scale == "bucket")

    @property
    def multi(self) -> bool:
        """Whether it is any number of codes per row: an entry of `Encoded.multi`."""
        return self.kind == "multi"

    @property
    def floats(self) -> bool:
        """Whether it is a value and a missing flag: two columns of `Encoded.numbers`."""
        return not self.coded and not self.multi


class SequenceSpec(Options):
    """The encoder of what the user did."""

    kind: SequenceKind = "none"
    """`none`: the tower has no sequence."""

    length: int = Field(default=50, ge=1, le=4096)
    """Newest items that are read."""

    width: int = Field(default=64, ge=1, le=4096)
    """Width of an item's embedding in the sequence, and of the sequence vector."""

    blocks: int = Field(default=2, ge=1, le=64)
    """sasrec: blocks."""

    heads: int = Field(default=1, ge=1, le=64)
    """sasrec: heads of the attention; a divisor of `width`."""

    interests: int = Field(default=4, ge=1, le=64)
    """comirec: query vectors per user."""

    item_exponent: float = Field(default=0.0, ge=0, le=2)
    """mean: an item that c users like counts c^-this."""

    length_exponent: float = Field(default=1.0, ge=0, le=2)
    """mean: the sum over n items is divided by n^this."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        if self.kind != "mean" and (self.item_exponent, self.length_exponent) != (0.0, 1.0):
            raise ValueError(
                f'item_exponent and length_exponent are of kind = "mean", and kind is "{self.kind}"'
            )
        return self

    @property
    def weighted(self) -> bool:
        """Whether it is a mean with weights: there is `sequence.weights`."""
        return (self.item_exponent, self.length_exponent) != (0.0, 1.0)

    @property
    def vectors(self) -> int:
        """How many vectors it gives per user."""
        return self.interests if self.kind == "comirec" else 1


class Towers(Options):
    """A pair of towers as a configuration declares it: sizes of tables are not known yet."""

    user_features: tuple[Feature, ...] = ()
    """What the user tower reads besides the sequence."""

    item_features: tuple[Feature, ...] = ()
    """What the item tower reads; none: the item's id alone, of width `dimension`."""

    sequence: SequenceSpec = SequenceSpec()
    """What the user tower reads of what the user did."""

    join: Join = "concatenate"
    """How the user tower's fields become its input: side by side, or added up, for which all must be of one width."""

    item_join: Join = "concatenate"
    """The same of the item tower."""

    cross: CrossKind = "none"
    """Explicit crosses of the user tower's input."""

    item_cross: CrossKind = "none"
    """The same of the item tower."""

    cross_layers: int = Field(default=2, ge=1, le=16)
    """dcn: layers."""

    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = ()
    """Widths of the user tower's hidden layers."""

    item_hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = ()
    """The same of the item tower."""

    dimension: int = Field(default=64, ge=1, le=4096)
    """Width of the vectors that are compared."""

    metric: Literal["cosine", "inner"] = "cosine"
    """`cosine`: both vectors have length 1."""

    popularity_exponent: float = Field(default=0.0, ge=0, le=1)
    """cosine: the vector of an item that c users like gets the length (c / that of the mean item)^this instead of 1."""

    tie_items: bool = True
    """Whether the sequence reads the item tower's `item_id` embedding instead of a table of its own."""

    def features(self, side: Side) -> tuple[Feature, ...]:
        """Return the features of one tower."""
        if side == "user":
            return self.user_features
        return self.item_features or (Feature(name=ITEM_ID, kind="id", dimension=self.dimension),)

    @property
    def vectors_per_user(self) -> int:
        """Query vectors per user: 1, or the number of interests."""
        return self.sequence.vectors

    @property
    def tied_feature(self) -> int | None:
        """Position among the item features of the embedding that the sequence reads; None: it has a table of its own."""
        if not self.tie_items or self.sequence.kind == "none":
            return None
        return next(at for at, feature in enumerate(self.features("item")) if feature.name == ITEM_ID)

    @property
    def item_code(self) -> int:
        """Which column of the encoded items is the item itself; there is one where something is tied or has a length."""
        own = self.features("item")
        at = next(at for at, feature in enumerate(own) if feature.name == ITEM_ID)
        return sum(feature.coded for feature in own[:at])

    @model_validator(mode="after")
    def _length_fits(self) -> Self:
        if self.popularity_exponent:
            if self.metric != "cosine":
                raise ValueError('popularity_exponent is of metric = "cosine"; inner products have lengths')
            if not any(f.name == ITEM_ID and f.lookup == "table" for f in self.features("item")):
                raise ValueError('popularity_exponent needs the item feature "item_id" with lookup = "table"')
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for side in SIDES:
            names = [feature.name for feature in self.features(side)]
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ValueError(f"{side}_features names {twice[0]!r} twice")
        if not self.user_features and self.sequence.kind == "none":
            raise ValueError("a user needs a feature or a sequence")
        if self.tie_items and self.sequence.kind != "none":
            tied = [feature for feature in self.features("item") if feature.name == ITEM_ID]
            if not tied or tied[0].lookup != "table":
                raise ValueError('tie_items needs the item feature "item_id" with lookup = "table"')
            if tied[0].dimension != self.sequence.width:
                raise ValueError(
                    f"tie_items: the dimension of item_id is {tied[0].dimension}, the width of the sequence "
                    f"{self.sequence.width}"
                )
        for side in SIDES:
            if self._join(side) == "sum":
                widths = _field_widths(self, side)
                if not widths or len(set(widths)) > 1:
                    raise ValueError(f"a sum needs fields of one width; the {side} tower has {list(widths)}")
                if self._cross(side) != "none":
                    raise ValueError(f"{self._cross(side)}: fields that are added up cannot be crossed")
            if self._cross(side) in ("senet", "fibinet"):
                widths = _field_widths(self, side)
                if not widths:
                    raise ValueError(f"{self._cross(side)}: the {side} tower has no field")
                if self._cross(side) == "fibinet" and (len(widths) < 2 or len(set(widths)) > 1):
                    raise ValueError(
                        f"fibinet needs two or more fields of one width; the {side} tower has {list(widths)}"
                    )
        return self

    def _cross(self, side: Side) -> CrossKind:
        return self.cross if side == "user" else self.item_cross

    def _join(self, side: Side) -> Join:
        return self.join if side == "user" else self.item_join


class ModelSpec(Towers):
    """A pair of towers as it is trained and served: `item_features` is filled in, and every size is known."""

    items: int = Field(default=0, ge=0)
    """Rows of the catalogue it was trained on; sequence codes are 1 to this."""

    prompts: int = Field(default=0, ge=0)
    """Tasks that share the user tower, each with a prompt; 0: it has one task and no prompt."""

    @model_validator(mode="after")
    def _prompts_fit(self) -> Self:
        if self.prompts and self.sequence.kind in ("none", "comirec"):
            raise ValueError(f"prompts need a sequence of one vector, and {self.sequence.kind} is none")
        if self.prompts and self.sequence.weighted:
            raise ValueError("prompts: item_exponent and length_exponent are for a tower without them")
        return self


@dataclass(frozen=True, slots=True)
class TowerShape:
    """The widths inside a tower, as both sides build it.

    Attributes:
        fields: width of each field: embeddings in order, then the sequence.
        floats: how many floats stand behind them.
        summed: whether the fields are added up.
        cross: the kind of cross.
        crossed: width of what the MLP reads.
        layers: (in, out) of each Linear; empty where the MLP is left out.
    """

    fields: tuple[int, ...]
    floats: int
    summed: bool
    cross: CrossKind
    crossed: int
    layers: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        """Width of the concatenated input."""
        return sum(self.fields) + self.floats


def tower_shape(spec: Towers, side: Side) -> TowerShape:
    """Return the widths inside one tower."""
    fields = _field_widths(spec, side)
    floats = 2 * sum(feature.floats for feature in spec.features(side))
    cross = spec.cross if side == "user" else spec.item_cross
    hidden = spec.hidden if side == "user" else spec.item_hidden
    summed = (spec.join if side == "user" else spec.item_join) == "sum"
    joined = fields[:1] if summed else fields
    width = sum(joined) + floats
    if cross == "fibinet":
        width = len(fields) * (len(fields) - 1) * fields[0] + floats
    left_out = not hidden and cross == "none" and not floats and joined == (spec.dimension,)
    ends = [width, *hidden, spec.dimension]
    layers = () if left_out else tuple(pairwise(ends))
    return TowerShape(fields, floats, summed, cross, width, layers)


def _field_widths(spec: Towers, side: Side) -> tuple[int, ...]:
    widths = [feature.dimension for feature in spec.features(side) if not feature.floats]
    if side == "user" and spec.sequence.kind != "none":
        widths.append(spec.sequence.width)
    return tuple(widths)
