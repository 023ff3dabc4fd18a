"""The towers as torch modules: `engine/models/spec.py` has the formulas and the names; a test holds both sides equal.

Sequences come packed, the items of all users end to end without padding, so that no layer works on padding. Only
attention, GRU and multi-interest extraction need a rectangle: attention makes one per group of users of about the same
length, and the causal mask keeps its padding (behind the newest item) from every real position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engine.core.interactions import Interactions
from engine.core.types import AnyArray, Int32Array, Int64Array
from engine.models.encoded import Encoded, EncodedUsers
from engine.models.spec import ModelSpec, Side, tower_shape
from engine.training.pooling import pooled

NORM_EPS = 1e-8
COSINE_EPS = 1e-12

GROUP_FILL = 0.8
GROUP_STEP = 8
"""A group of sequences ends where the next one is below this part of the longest, and this many items shorter."""


@dataclass(frozen=True, slots=True)
class Features:
    """`Encoded` as tensors.

    Attributes:
        codes: int64[n, features of one code].
        multi: per feature of many codes int64[m] codes, and the offsets int64[n + 1] in NumPy.
        numbers: float32[n, 2 x plain numbers].
    """

    codes: Tensor
    multi: tuple[tuple[Tensor, Int64Array], ...]
    numbers: Tensor

    @classmethod
    def of(cls, encoded: Encoded, device: torch.device | str = "cpu") -> Features:
        """Return the rows as tensors on a device."""
        return cls(
            tensor(encoded.codes, device).long(),
            tuple((tensor(many.codes, device).long(), many.offsets) for many in encoded.multi),
            tensor(encoded.numbers, device),
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """Histories end to end, oldest item first: user r did codes[offsets[r]:offsets[r + 1]].

    Attributes:
        codes: int64[t], item codes (row + 1).
        offsets: int64[n + 1] in NumPy: the plan of the rectangles is made from it.
    """

    codes: Tensor
    offsets: Int64Array

    @classmethod
    def of(cls, users: EncodedUsers, device: torch.device | str = "cpu") -> Packed:
        """Return the right-aligned sequences of `users` packed."""
        offsets = np.zeros(len(users) + 1, np.int64)
        np.cumsum(users.lengths, out=offsets[1:])
        return cls(tensor(users.sequence[users.sequence > 0], device).long(), offsets)

    def __len__(self) -> int:
        return int(self.offsets.size - 1)

    @property
    def lengths(self) -> Int64Array:
        """int64[n]: how many items each did."""
        return np.diff(self.offsets)


def tensor(array: AnyArray, device: torch.device | str = "cpu") -> Tensor:
    """Return an array as a tensor, without a copy where it can be written to and stays on the CPU."""
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def history(matrix: Interactions, users: Int32Array, length: int, device: torch.device) -> Packed:
    """Return the newest items of users, oldest first, as serving gives them to the tower."""
    lengths = np.minimum(matrix.indptr[users + 1] - matrix.indptr[users], length)
    offsets = np.zeros(users.size + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    at = np.repeat(matrix.indptr[users] + lengths - 1 + offsets[:-1], lengths) - np.arange(int(offsets[-1]))
    return Packed(tensor(matrix.rows[at] + np.int32(1), device).long(), offsets)


def build_user_tower(spec: ModelSpec, dropout: float = 0.0) -> UserTower:
    """Return the user tower of a specification, freshly initialised from torch's random generator."""
    return UserTower(spec, dropout)


def build_item_tower(spec: ModelSpec, dropout: float = 0.0) -> ItemTower:
    """Return the item tower of a specification, freshly initialised from torch's random generator."""
    return ItemTower(spec, dropout)


class _Tower(nn.Module):
    """What both towers share: embeddings, cross, MLP, and the length of the result."""

    def __init__(self, spec: ModelSpec, side: Side, dropout: float) -> None:
        super().__init__()
        self.spec, self.dropout = spec, dropout
        self.features = spec.features(side)
        shape = tower_shape(spec, side)
        self.embeddings = nn.ModuleDict(
            {
                str(at): _table(feature.size, feature.dimension)
                for at, feature in enumerate(self.features)
                if not feature.floats
            }
        )
        self.fields, self.summed = shape.fields, shape.summed
        crosses: dict[str, type[_DeepCross] | type[_Senet]] = {
            "dcn": _DeepCross,
            "senet": _Senet,
            "fibinet": _Fibinet,
        }
        self.cross = crosses[shape.cross](spec, shape.fields, shape.width) if shape.cross != "none" else None
        self.layers = nn.ModuleList(_linear(inner, outer) for inner, outer in shape.layers)

    def _embedded(self, features: Features) -> list[Tensor]:
        made, code, many = [], 0, 0
        for at, feature in enumerate(self.features):
            if feature.coded:
                made.append(self.embeddings[str(at)](features.codes[:, code]))
                code += 1
            elif feature.multi:
                codes, offsets = features.multi[many]
                made.append(pooled(self.embeddings[str(at)], codes, offsets))
                many += 1
        return made

    def joined(self, fields: list[Tensor], numbers: Tensor) -> Tensor:
        """Return float32[n, width]: what the tower reads, the fields side by side or added up, then the numbers."""
        if self.summed:
            total = fields[0]
            for field in fields[1:]:
                total = total + field
            fields = [total]
        parts = [*fields, numbers] if numbers.shape[1] else fields
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _head(self, fields: list[Tensor], numbers: Tensor) -> Tensor:
        return self.head(self.joined(fields, numbers))

    def head(self, x: Tensor) -> Tensor:
        """Return float32[n, dimension], the vectors of what `joined` gives."""
        if self.cross is not None:
            x = self.cross(x)
        for at, layer in enumerate(self.layers):
            x = layer(x)
            if at + 1 < len(self.layers):
                x = dropped(F.relu(x), self.dropout, self.training)
        if self.spec.metric == "cosine":
            x = F.normalize(x, dim=1, eps=COSINE_EPS)
        return x


class ItemTower(_Tower):
    """Vectors of items from their features."""

    def __init__(self, spec: ModelSpec, dropout: float = 0.0) -> None:
        super().__init__(spec, "item", dropout)
        if spec.popularity_exponent:
            self.register_buffer("lengths", torch.ones(spec.items + 1))

    def measure(self, counts: Int64Array) -> None:
        """Set the lengths of the vectors from int64[items], how many users like each item."""
        liked = np.maximum(counts, 1).astype(np.float64)
        lengths = (np.concatenate([[1.0], liked]) / liked.mean()) ** self.spec.popularity_exponent
        self.get_buffer("lengths")[:] = torch.from_numpy(lengths.astype(np.float32))

    def forward(self, features: Features) -> Tensor:
        """Return float32[m, dimension]."""
        vectors = self._head(self._embedded(features), features.numbers)
        if self.spec.popularity_exponent:
            lengths = self.get_buffer("lengths")[features.codes[:, self.spec.item_code]]
            vectors = vectors * lengths.unsqueeze(1)
        return vectors


class UserTower(_Tower):
    """Query vectors of users from their features and what they did."""

    def __init__(self, spec: ModelSpec, dropout: float = 0.0) -> None:
        super().__init__(spec, "user", dropout)
        self.sequence = None if spec.sequence.kind == "none" else _Sequence(spec, dropout)
        self.intent = _linear(spec.dimension, spec.prompts) if spec.prompts else None

    def forward(
        self,
        features: Features,
        history: Packed,
        items: nn.Embedding | None = None,
        every: bool = False,
        tasks: Tensor | None = None,
        which: Int64Array | None = None,
    ) -> Tensor:
        """Return the query vectors.

        Args:
            features: of n users.
            history: what they did.
            items: the item tower's table of ids where the sequence shares it (`tie_items`).
            every: give a vector for every prefix of every history, instead of the whole ones alone (gru, sasrec).
            tasks: int64[n], the prompt of each history; where the tower has prompts.
            which: int64[m], rising, with `every`: the rows that are wanted, for which alone is computed what the others
                have no part in; None: all.

        Returns:
            float32[n * interests, dimension], a user's interests one after the other; with `every` float32[t, dimension],
            row r from the history up to and with entry r; of these the rows `which`.
        """
        fields, numbers = self._embedded(features), features.numbers
        if self.sequence is None:
            return self._head(fields, numbers)
        vectors = self.sequence(history, items, every, tasks, which)
        if every or self.spec.vectors_per_user > 1:
            # Each vector of a sequence goes through the rest as a row of its own, beside its user's features.
            lengths = history.lengths if which is None else np.diff(np.searchsorted(which, history.offsets))
            repeats = torch.as_tensor(lengths, device=vectors.device) if every else self.spec.vectors_per_user
            fields = [field.repeat_interleave(repeats, 0) for field in fields]
            numbers = numbers.repeat_interleave(repeats, 0)
        return self._head([*fields, vectors], numbers)

    def inputs(self, features: Features, history: Packed, items: nn.Embedding | None = None) -> Tensor:
        """Return what `head` makes the vectors of, in a tower of one vector per user; arguments as of `forward`."""
        fields = self._embedded(features)
        if self.sequence is not None:
            fields = [*fields, self.sequence(history, items, False, None)]
        return self.joined(fields, features.numbers)


class _Sequence(nn.Module):
    """The encoders of a history; one of their parts is there, as the kind says."""

    def __init__(self, spec: ModelSpec, dropout: float) -> None:
        super().__init__()
        sequence = spec.sequence
        self.kind, self.width, self.dropout = sequence.kind, sequence.width, dropout
        self.items = None if spec.tied_feature is not None else _table(spec.items + 1, sequence.width)
        self.exponent = sequence.length_exponent
        if sequence.weighted:
            self.register_buffer("weights", torch.ones(spec.items + 1))
        # At first a prompt changes nothing: every task begins as the one tower without prompts.
        self.prompts = nn.Parameter(torch.ones(spec.prompts + 1, self.width)) if spec.prompts else None
        if self.kind == "attention":
            self.query = nn.Parameter(torch.randn(self.width) / math.sqrt(self.width))
        elif self.kind == "gru":
            self.gru = nn.GRU(self.width, self.width, batch_first=True)
        elif self.kind == "sasrec":
            self.positions = _table(sequence.length, self.width)
            self.blocks = nn.ModuleList(
                _Block(self.width, sequence.heads, dropout) for _ in range(sequence.blocks)
            )
            self.norm = nn.LayerNorm(self.width, eps=NORM_EPS)
        elif self.kind == "comirec":
            self.hidden = _linear(self.width, 4 * self.width, bias=False)
            self.heads = _linear(4 * self.width, sequence.interests, bias=False)

    def weigh(self, counts: Int64Array, exponent: float) -> None:
        """Set the weights of a weighted mean from int64[items], how many users like each item."""
        weights = np.maximum(counts, 1).astype(np.float64) ** -exponent
        self.get_buffer("weights")[1:] = torch.from_numpy(weights.astype(np.float32))

    def forward(
        self,
        history: Packed,
        tied: nn.Embedding | None,
        every: bool,
        tasks: Tensor | None,
        which: Int64Array | None = None,
    ) -> Tensor:
        table = tied if self.items is None else self.items
        if table is None:
            raise ValueError("the sequence shares the item tower's table: give it")
        if every and self.kind not in ("gru", "sasrec"):
            raise ValueError(f"{self.kind} has no vector per position")
        prompts = None if self.prompts is None or tasks is None else self.prompts[tasks]
        if self.kind == "mean":
            weights = dict(self.named_buffers()).get("weights")
            mean = pooled(table, history.codes, history.offsets, weights, self.exponent)
            return mean if prompts is None else mean * prompts
        if prompts is not None:
            lengths = torch.as_tensor(history.lengths, device=prompts.device)
            prompts = prompts.repeat_interleave(lengths, 0)
        if self.kind == "sasrec":
            return self._sasrec(history, table, every, prompts, which)
        embedded = table(history.codes)
        if prompts is not None:
            embedded = embedded * prompts
        if self.kind == "gru":
            states = self._gru(embedded, history, every)
            return states if which is None else states[_index(which, states.device)]
        padded, real = _padded(embedded, history)
        return self._attention(padded, real) if self.kind == "attention" else self._interests(padded, real)

    def _attention(self, padded: Tensor, real: Tensor) -> Tensor:
        logits = (padded @ self.query) / math.sqrt(self.width)
        logits = logits.masked_fill(~real, -math.inf)
        zero = logits.new_zeros(logits.shape[0], 1)  # the zero vector's logit; its value adds nothing
        weights = torch.softmax(torch.cat([logits, zero], 1), 1)[:, :-1]
        return (weights.unsqueeze(1) @ padded).squeeze(1)

    def _interests(self, padded: Tensor, real: Tensor) -> Tensor:
        logits = self.heads(torch.tanh(self.hidden(padded))).transpose(1, 2)
        logits = logits.masked_fill(~real.unsqueeze(1), torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, 2) * real.unsqueeze(1)
        return (weights @ padded).reshape(-1, self.width)

    def _gru(self, embedded: Tensor, history: Packed, every: bool) -> Tensor:
        lengths = history.lengths
        present = np.flatnonzero(lengths)
        if not present.size:
            return embedded.new_zeros(0 if every else lengths.size, self.width)
        plan = _rows_by_time(lengths[present], history.offsets[present], embedded.device)
        states, _ = self.gru(nn.utils.rnn.PackedSequence(embedded[plan.order], plan.batch_sizes))
        if every:
            return states.data[plan.inverse]
        last = torch.as_tensor(history.offsets[1:][present] - 1, device=embedded.device)
        whole = states.data[plan.inverse[last]]
        if present.size == lengths.size:
            return whole
        at = torch.as_tensor(present, device=embedded.device)
        return embedded.new_zeros(lengths.size, self.width).index_copy(0, at, whole)

    def _sasrec(
        self,
        history: Packed,
        table: nn.Embedding,
        every: bool,
        prompts: Tensor | None,
        which: Int64Array | None,
    ) -> Tensor:
        lengths, device = history.lengths, table.weight.device
        plan = _plan(lengths, history.offsets)
        order = None if plan.order is None else _index(plan.order, device)
        x = table(history.codes if order is None else history.codes[order]) * math.sqrt(self.width)
        if prompts is not None:
            x = x * (prompts if order is None else prompts[order])
        x = x + self.positions(_index(plan.ages, device))
        x = dropped(x, self.dropout, self.training)
        # Of the last block only rows that are read matter: for the others there are keys and values.
        read = None
        if which is not None:
            read = _index(which if plan.inverse is None else plan.inverse[which], device)
        for block in self.blocks[:-1]:
            x = block(x, plan)
        x = self.blocks[-1](x, plan, read)
        if read is not None:
            return self.norm(x)
        if every:
            x = x if plan.inverse is None else x[_index(plan.inverse, device)]
            return self.norm(x)
        present = np.flatnonzero(lengths)
        last = history.offsets[1:][present] - 1
        last = last if plan.inverse is None else plan.inverse[last]
        whole = self.norm(x[_index(last, device)])
        if present.size == lengths.size:
            return whole
        return whole.new_zeros(lengths.size, self.width).index_copy(0, _index(present, device), whole)


class _Attention(nn.Module):
    """Causal multi-head attention over packed sequences, parameters as `nn.MultiheadAttention` has them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = _linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, plan: _Plan, read: Tensor | None = None) -> Tensor:
        """Return float32[t, width], or of the rows `read` alone."""
        width = x.shape[1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        # One gather and one split for all groups: slicing each out would make its gradient as large as the whole.
        if read is None:
            projected = F.linear(x, weight, bias)
        else:
            asked = F.linear(x[read], weight[:width], bias[:width])
            asked = x.new_zeros(x.shape).index_copy(0, read, asked)
            projected = torch.cat([asked, F.linear(x, weight[width:], bias[width:])], 1)
        if plan.cells is not None:
            projected = projected.index_select(0, _index(plan.cells, x.device))
        made = []
        for part, (users, longest) in zip(
            projected.split([users * longest for users, longest in plan.groups]), plan.groups, strict=True
        ):
            q, k, v = part.view(users, longest, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            made.append(out.transpose(1, 2).reshape(-1, width))
        whole = torch.cat(made) if len(made) != 1 else made[0]
        real = None if plan.real is None else _index(plan.real, x.device)
        if read is not None:
            real = read if real is None else real[read]
        return self.out_proj(whole if real is None else whole.index_select(0, real))


class _Block(nn.Module):
    """One block of SASRec, norms before its parts. The weights of the attention are not dropped, only its output."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = _Attention(width, heads)
        self.feed_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.inner = _linear(width, width)
        self.outer = _linear(width, width)

    def forward(self, x: Tensor, plan: _Plan, read: Tensor | None = None) -> Tensor:
        """Return float32[t, width], or of the rows `read` alone."""
        attended = self.attention(self.attention_norm(x), plan, read)
        x = (x if read is None else x[read]) + dropped(attended, self.dropout, self.training)
        inner = dropped(F.relu(self.inner(self.feed_norm(x))), self.dropout, self.training)
        return x + dropped(self.outer(inner), self.dropout, self.training)


class _DeepCross(nn.Module):
    """DCN-v2."""

    def __init__(self, spec: ModelSpec, fields: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear(width, width) for _ in range(spec.cross_layers))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = first * layer(x) + x
        return x


class _Senet(nn.Module):
    """Reweighting of the fields by what all of them say."""

    def __init__(self, spec: ModelSpec, fields: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.widths = fields
        self.squeeze = _linear(len(fields), (len(fields) + 1) // 2)
        self.excite = _linear((len(fields) + 1) // 2, len(fields))
        nn.init.ones_(
            self.excite.bias
        )  # every field counts at first: with ReLU a field at 0 would stay there

    def forward(self, x: Tensor) -> Tensor:
        fields = x[:, : sum(self.widths)].split(list(self.widths), 1)
        return torch.cat([*self.reweighted(fields), x[:, sum(self.widths) :]], 1)

    def reweighted(self, fields: tuple[Tensor, ...]) -> list[Tensor]:
        means = torch.stack([field.mean(1) for field in fields], 1)
        weights = F.relu(self.excite(F.relu(self.squeeze(means))))
        return [field * weights[:, at : at + 1] for at, field in enumerate(fields)]


class _Fibinet(_Senet):
    """Bilinear interactions of the fields as they are and reweighted."""

    def __init__(self, spec: ModelSpec, fields: tuple[int, ...], width: int) -> None:
        super().__init__(spec, fields, width)
        self.bilinear = _linear(fields[0], fields[0], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        fields = x[:, : sum(self.widths)].split(list(self.widths), 1)
        made = []
        for side in (fields, self.reweighted(fields)):
            turned = [self.bilinear(field) for field in side]
            made += [turned[f] * side[g] for f in range(len(side)) for g in range(f + 1, len(side))]
        return torch.cat([*made, x[:, sum(self.widths) :]], 1)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How packed tokens become rectangles, one per group of users, and back.

    Attributes:
        order: the order of the tokens in which the longest sequences come first; None: they come so.
        inverse: of the order.
        ages: int64[t], how many newer tokens each token's user has, in that order.
        groups: (users, longest) of each rectangle.
        cells: the token of each cell of all rectangles end to end; None: the tokens are the cells.
        real: the cell of each token; None likewise.
    """

    order: Int64Array | None
    inverse: Int64Array | None
    ages: Int64Array
    groups: tuple[tuple[int, int], ...]
    cells: Int64Array | None
    real: Int64Array | None


def _plan(lengths: Int64Array, offsets: Int64Array) -> _Plan:
    order = None
    if np.any(lengths[1:] > lengths[:-1]):
        users = np.argsort(-lengths, kind="stable")
        starts, lengths = offsets[users], lengths[users]
        order = _ranges(starts, lengths)
    lengths = lengths[: int(np.count_nonzero(lengths))]
    ends = np.cumsum(lengths)
    tokens = int(ends[-1]) if ends.size else 0
    ages = np.repeat(ends, lengths) - 1 - np.arange(tokens)
    groups, cells, real, at, before = [], [], [], 0, 0
    while at < lengths.size:
        longest = int(lengths[at])
        # Lengths fall, so that a group is a stretch of users.
        shortest = min(GROUP_FILL * longest, longest - GROUP_STEP)
        stop = int(np.searchsorted(-lengths, -shortest, side="right"))
        groups.append((stop - at, longest))
        column, mine = np.arange(longest), lengths[at:stop, None]
        # Padding, behind the newest, may be any token: no real one looks ahead, and what it gives is not read.
        cells.append(((ends[at:stop, None] - mine) + np.minimum(column, mine - 1)).ravel())
        real.append(np.flatnonzero((column < mine).ravel()) + before)
        before += (stop - at) * longest
        at = stop
    padded = before > tokens
    inverse = None
    if order is not None:
        inverse = np.empty_like(order)
        inverse[order] = np.arange(order.size)
    return _Plan(
        order, inverse, ages, tuple(groups),
        np.concatenate(cells) if padded else None, np.concatenate(real) if padded else None,
    )  # fmt: skip


def _ranges(starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """Return the ranges [start, start + length) end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    ranges: Int64Array = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return ranges


@dataclass(frozen=True, slots=True)
class _ByTime:
    """Tokens in the order that torch's packed sequences have: the first of every sequence, longest first, and so on."""

    order: Tensor
    inverse: Tensor
    batch_sizes: Tensor


def _rows_by_time(lengths: Int64Array, starts: Int64Array, device: torch.device) -> _ByTime:
    users = np.argsort(-lengths, kind="stable")
    steps = np.arange(int(lengths[users[0]]))
    sizes = np.searchsorted(-lengths[users], -steps, side="left")  # users with more than `step` items
    rank = _ranges(np.zeros(steps.size, np.int64), sizes)
    order = starts[users][rank] + np.repeat(steps, sizes)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    return _ByTime(_index(order, device), _index(inverse, device), torch.as_tensor(sizes))


def _padded(embedded: Tensor, history: Packed) -> tuple[Tensor, Tensor]:
    """Return float32[n, longest, width], left-aligned, and bool[n, longest]: which cells are real."""
    lengths = history.lengths
    longest = int(lengths.max(initial=0))
    cells = _ranges(np.arange(lengths.size) * longest, lengths)
    padded = embedded.new_zeros(lengths.size * longest, embedded.shape[1])
    padded = padded.index_copy(0, _index(cells, embedded.device), embedded)
    real = np.arange(longest) < lengths[:, None]
    return padded.view(lengths.size, longest, -1), torch.as_tensor(real, device=embedded.device)


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """Return x with a share of its cells set to 0 and the rest scaled up, while training.

    On the CPU a cell is kept by a byte, eight to a draw of the generator: torch draws a number per cell, which is a tenth
    of a step of SASRec. So the share is rounded to a 256th there.
    """
    if not share or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, share)
    cut = min(round(share * 256), 255)
    drawn = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    kept = (drawn.view(torch.uint8)[: x.numel()] >= cut).view(x.shape)
    return x * kept.to(x.dtype).mul_(256 / (256 - cut))


def _index(array: Int64Array, device: torch.device) -> Tensor:
    return torch.as_tensor(array, device=device)


def _table(size: int, width: int) -> nn.Embedding:
    table = nn.Embedding(max(size, 1), width, _weight=torch.empty(max(size, 1), width))
    nn.init.normal_(table.weight, std=0.02)
    return table


def _linear(inner: int, outer: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inner, outer, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
