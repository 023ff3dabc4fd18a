"""The towers while serving: embeddings looked up in memory-mapped tables, and small products (`engine/models/dense.py`).

Dense weights are copied and transposed when a tower is loaded, some hundred kilobytes. The tables of embeddings stay
where they are, mapped, one copy for all workers. No answer depends on what else is in the batch. `reference.py` beside
this is the same in plain NumPy, a row at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numba import njit

from engine.core.errors import SnapshotError
from engine.core.types import AnyArray, Float32Array, Int32Array
from engine.models import sequences
from engine.models.dense import dense, dense_relu, normalise, softmax_rows
from engine.models.encoded import Encoded, EncodedUsers
from engine.models.spec import ModelSpec, Side, tower_shape


class Weights:
    """The parameters of one tower, held to the shapes that its specification says."""

    def __init__(self, arrays: Mapping[str, AnyArray], side: Side) -> None:
        self._arrays, self._side = arrays, side

    def get(self, name: str, *shape: int) -> Float32Array:
        """Return a parameter, read-only.

        Raises:
            SnapshotError: it is missing, or of another type or shape.
        """
        array: Float32Array = self.named(f"{self._side}.{name}", *shape)
        return array

    def named(self, name: str, *shape: int, dtype: type = np.float32) -> Any:
        """Return an array by its whole name, of another type if so wanted; as `get`."""
        array = self._arrays.get(name)
        if array is None:
            raise SnapshotError("the model's specification needs it, and it is not there", name)
        if array.dtype != dtype or array.shape != shape:
            raise SnapshotError(
                f"is {array.dtype}{list(array.shape)}, the model's specification says {np.dtype(dtype)}{list(shape)}",
                name,
            )
        view = array.view()
        view.flags.writeable = False
        return view

    def transposed(self, name: str, out: int, inner: int) -> Float32Array:
        """Return a Linear's weight as [in, out], a copy."""
        return _sealed(np.ascontiguousarray(self.get(name, out, inner).T))


def _sealed(array: Float32Array) -> Float32Array:
    """Every weight is read-only, so that each kernel is compiled for one form of it."""
    array.flags.writeable = False
    return array


class _Tower:
    """What both towers share: embeddings, cross, MLP and the length of the result."""

    def __init__(self, spec: ModelSpec, side: Side, arrays: Mapping[str, AnyArray]) -> None:
        self.spec = spec
        weights = Weights(arrays, side)
        self._shape = tower_shape(spec, side)
        self._features = spec.features(side)
        self._tables = [
            weights.get(f"embeddings.{at}.weight", feature.size, feature.dimension)
            for at, feature in enumerate(self._features)
            if not feature.floats
        ]
        self._coded = [feature.coded for feature in self._features if not feature.floats]
        self._layers = [
            (weights.transposed(f"layers.{at}.weight", out, inner), weights.get(f"layers.{at}.bias", out))
            for at, (inner, out) in enumerate(self._shape.layers)
        ]
        self._bounds = np.concatenate((np.zeros(1, np.int64), np.cumsum(self._shape.fields, dtype=np.int64)))
        self._cross: list[tuple[Float32Array, Float32Array]] = []
        self._bilinear: Float32Array | None = None
        width, fields = self._shape.width, len(self._shape.fields)
        if self._shape.cross == "dcn":
            self._cross = [
                (
                    weights.transposed(f"cross.layers.{at}.weight", width, width),
                    weights.get(f"cross.layers.{at}.bias", width),
                )
                for at in range(spec.cross_layers)
            ]
        elif self._shape.cross in ("senet", "fibinet"):
            narrow = (fields + 1) // 2
            self._cross = [
                (
                    weights.transposed("cross.squeeze.weight", narrow, fields),
                    weights.get("cross.squeeze.bias", narrow),
                ),
                (
                    weights.transposed("cross.excite.weight", fields, narrow),
                    weights.get("cross.excite.bias", fields),
                ),
            ]
            if self._shape.cross == "fibinet":
                each = self._shape.fields[0]
                self._bilinear = weights.transposed("cross.bilinear.weight", each, each)

    def _input(self, encoded: Encoded, sequence: Float32Array | None, repeat: int) -> Float32Array:
        """float32[n * repeat, D]: the concatenated input, each row `repeat` times but for the sequence."""
        shape = self._shape
        x = np.empty((len(encoded) * repeat, shape.width), np.float32)
        code = many = 0
        for at, (table, coded) in enumerate(zip(self._tables, self._coded, strict=True)):
            if coded:
                _embed(table, encoded.codes, code, repeat, x, self._bounds[at])
                code += 1
            else:
                multi = encoded.multi[many]
                _embed_many(table, _read_only(multi.codes), multi.offsets, repeat, x, self._bounds[at])
                many += 1
        end = int(self._bounds[-1])
        if sequence is not None:
            x[:, end - shape.fields[-1] : end] = sequence
        if shape.floats:
            x[:, end:] = encoded.numbers if repeat == 1 else np.repeat(encoded.numbers, repeat, 0)
        return self._summed(x) if shape.summed else x

    def _summed(self, x: Float32Array) -> Float32Array:
        """float32[n, width + floats]: the fields added up, from the first to the last."""
        width, end = self._shape.fields[0], int(self._bounds[-1])
        total = np.empty((x.shape[0], width + self._shape.floats), np.float32)
        total[:, width:] = x[:, end:]
        total[:, :width] = x[:, :width]
        for start in range(width, end, width):
            total[:, :width] += x[:, start : start + width]
        return total

    def _crossed(self, x: Float32Array) -> Float32Array:
        if self._shape.cross == "none":
            return x
        if self._shape.cross == "dcn":
            first = x
            for weight, bias in self._cross:
                product = np.empty_like(x)
                dense(x, weight, bias, product)
                x = first * product + x
            return x
        means = np.empty((x.shape[0], len(self._shape.fields)), np.float32)
        _field_means(x, self._bounds, means)
        for weight, bias in self._cross:
            attention = np.empty((x.shape[0], weight.shape[1]), np.float32)
            dense_relu(means, weight, bias, attention)
            means = attention
        scaled = x.copy()
        end = int(self._bounds[-1])
        scaled[:, :end] *= np.repeat(means, self._shape.fields, 1)
        if self._bilinear is None:
            return scaled
        parts = [*self._interactions(x), *self._interactions(scaled), x[:, end:]]
        return np.concatenate(parts, 1)

    def _interactions(self, x: Float32Array) -> list[Float32Array]:
        """(W v_f) * v_g of every pair of fields f < g, in order."""
        assert self._bilinear is not None
        width = self._shape.fields[0]
        fields = [x[:, at * width : (at + 1) * width] for at in range(len(self._shape.fields))]
        nothing = np.zeros(width, np.float32)
        made = []
        for f, field in enumerate(fields[:-1]):
            product = np.empty((x.shape[0], width), np.float32)
            dense(np.ascontiguousarray(field), self._bilinear, _sealed(nothing), product)
            made += [product * other for other in fields[f + 1 :]]
        return made

    def _head(self, x: Float32Array) -> Float32Array:
        """Cross, MLP, and length 1 where the metric is the cosine."""
        x = self._crossed(x)
        for at, (weight, bias) in enumerate(self._layers):
            out = np.empty((x.shape[0], weight.shape[1]), np.float32)
            if at + 1 < len(self._layers):
                dense_relu(x, weight, bias, out)
            else:
                dense(x, weight, bias, out)
            x = out
        if self.spec.metric == "cosine":
            normalise(x)
        return x


class ItemTower(_Tower):
    """From what is known of an item to its vector."""

    def __init__(self, spec: ModelSpec, arrays: Mapping[str, AnyArray]) -> None:
        super().__init__(spec, "item", arrays)
        self._lengths = (
            Weights(arrays, "item").get("lengths", spec.items + 1) if spec.popularity_exponent else None
        )

    @classmethod
    def load(cls, spec: ModelSpec, arrays: Mapping[str, AnyArray]) -> Self:
        """Return the tower whose weights are `item.*`; SnapshotError where they are not as the specification says."""
        return cls(spec, arrays)

    def vectors(self, items: Encoded) -> Float32Array:
        """float32[m, dimension]: the vectors of m items."""
        vectors = self._head(self._input(items, None, 1))
        if self._lengths is not None:
            vectors *= self._lengths[items.codes[:, self.spec.item_code], None]
        return vectors


class UserTower(_Tower):
    """From what is known of a query to its vector or vectors."""

    def __init__(self, spec: ModelSpec, arrays: Mapping[str, AnyArray]) -> None:
        super().__init__(spec, "user", arrays)
        weights = Weights(arrays, "user")
        sequence, width = spec.sequence, spec.sequence.width
        self._items: Float32Array | None = None
        if sequence.kind == "none":
            return
        if spec.prompts:
            self._prompts = weights.get("sequence.prompts", spec.prompts + 1, width)
            self._intent = (
                weights.transposed("intent.weight", spec.prompts, spec.dimension),
                weights.get("intent.bias", spec.prompts),
            )
        tied = spec.tied_feature
        if tied is None:
            self._items = weights.get("sequence.items.weight", spec.items + 1, width)
        else:
            self._items = weights.named(
                f"item.embeddings.{tied}.weight", spec.item_features[tied].size, width
            )
        if sequence.weighted:
            self._item_weights = weights.get("sequence.weights", spec.items + 1)
        if sequence.kind == "attention":
            self._query = weights.get("sequence.query", width)
        elif sequence.kind == "gru":
            self._gru = (
                weights.transposed("sequence.gru.weight_ih_l0", 3 * width, width),
                weights.transposed("sequence.gru.weight_hh_l0", 3 * width, width),
                weights.get("sequence.gru.bias_ih_l0", 3 * width),
                weights.get("sequence.gru.bias_hh_l0", 3 * width),
            )
        elif sequence.kind == "sasrec":
            self._positions = weights.get("sequence.positions.weight", sequence.length, width)
            self._blocks = _blocks(weights, spec)
        elif sequence.kind == "comirec":
            self._comirec = (
                weights.transposed("sequence.hidden.weight", 4 * width, width),
                weights.transposed("sequence.heads.weight", sequence.interests, 4 * width),
            )

    @classmethod
    def load(cls, spec: ModelSpec, arrays: Mapping[str, AnyArray]) -> Self:
        """Return the tower whose weights are `user.*`; SnapshotError where they are not as the specification says."""
        return cls(spec, arrays)

    def vectors(self, users: EncodedUsers, tasks: Int32Array | None = None) -> Float32Array:
        """float32[n * interests, dimension]: the vectors of n queries, those of one query together.

        Args:
            users: what is known of the queries.
            tasks: int32[n], the prompt of each; where the tower has prompts.
        """
        return self.head(self.inputs(users, tasks))

    def inputs(self, users: EncodedUsers, tasks: Int32Array | None = None) -> Float32Array:
        """float32[n * interests, D]: the fields of n queries side by side (or their sum), and their floats."""
        return self._input(users, self._sequence(users, tasks), self.spec.vectors_per_user)

    def head(self, x: Float32Array) -> Float32Array:
        """float32[m, dimension]: the vectors of what `inputs` gives."""
        return self._head(x)

    def intent(self, vectors: Float32Array) -> Float32Array:
        """float32[n, prompts]: the probability of each task, from float32[n, dimension], the vectors of the intent."""
        shares = np.empty((vectors.shape[0], self.spec.prompts), np.float32)
        dense(vectors, *self._intent, shares)
        softmax_rows(shares)
        return shares

    def _sequence(self, users: EncodedUsers, tasks: Int32Array | None) -> Float32Array | None:
        """float32[n * interests, width]; None where the tower has no sequence."""
        table = self._items
        if table is None:
            return None
        spec = self.spec.sequence
        out = np.zeros((len(users) * spec.vectors, spec.width), np.float32)
        codes, lengths = users.sequence, users.lengths
        if tasks is not None:
            tokens = np.empty((int(lengths.sum()), spec.width), np.float32)
            numbers = np.zeros_like(codes)
            sequences.prompted(table, codes, lengths, self._prompts, tasks, tokens, numbers)
            table, codes = _sealed(tokens), numbers
        if spec.weighted:
            sequences.weighted_pooling(table, codes, lengths, self._item_weights, spec.length_exponent, out)
        elif spec.kind == "mean":
            sequences.mean_pooling(table, codes, lengths, out)
        elif spec.kind == "attention":
            sequences.attention_pooling(table, codes, lengths, self._query, out)
        elif spec.kind == "gru":
            sequences.gru(table, codes, lengths, *self._gru, out)
        elif spec.kind == "sasrec":
            arguments = (table, codes, lengths, self._positions, spec.heads, *self._blocks, out)
            sequences.sasrec(*arguments)
        else:
            sequences.comirec(table, codes, lengths, *self._comirec, out)
        return out


def _blocks(weights: Weights, spec: ModelSpec) -> tuple[Float32Array, ...]:
    """The parameters of SASRec's blocks as `sequences.sasrec` takes them, stacked."""
    width = spec.sequence.width
    names = [f"sequence.blocks.{b}" for b in range(spec.sequence.blocks)]

    def stacked(parts: list[Float32Array]) -> Float32Array:
        return _sealed(np.ascontiguousarray(np.stack(parts)))

    def linear(part: str) -> tuple[Float32Array, Float32Array]:
        return (
            stacked([weights.transposed(f"{name}.{part}.weight", width, width) for name in names]),
            stacked([weights.get(f"{name}.{part}.bias", width) for name in names]),
        )

    parts = ("attention_norm.weight", "attention_norm.bias", "feed_norm.weight", "feed_norm.bias")
    norms = stacked([np.stack([weights.get(f"{name}.{part}", width) for part in parts]) for name in names])
    inner = [weights.transposed(f"{name}.attention.in_proj_weight", 3 * width, width) for name in names]
    bias = [weights.get(f"{name}.attention.in_proj_bias", 3 * width) for name in names]
    last = stacked([weights.get(f"sequence.norm.{part}", width) for part in ("weight", "bias")])
    return (
        norms,
        stacked([part[:, :width] for part in inner]),
        stacked([part[:width] for part in bias]),
        stacked([part[:, width:] for part in inner]),
        stacked([part[width:] for part in bias]),
        *linear("attention.out_proj"),
        *linear("inner"),
        *linear("outer"),
        last,
    )


def _read_only(array: AnyArray) -> AnyArray:
    view = array.view()
    view.flags.writeable = False
    return view


@njit(nogil=True, cache=True)
def _embed(table, codes, column, repeat, out, start):  # type: ignore[no-untyped-def]
    """Copy the embedding of codes[r, column] to out[r * repeat + i, start:] for each i."""
    for r in range(codes.shape[0]):
        row = table[codes[r, column]]
        for i in range(repeat):
            y = out[r * repeat + i]
            for c in range(row.size):
                y[start + c] = row[c]


@njit(nogil=True, cache=True)
def _embed_many(table, codes, offsets, repeat, out, start):  # type: ignore[no-untyped-def]
    """Set out[r * repeat + i, start:] to the mean of the embeddings of row r's codes; zeros where it has none."""
    width = table.shape[1]
    for r in range(offsets.size - 1):
        y = out[r * repeat]
        for c in range(width):
            y[start + c] = np.float32(0)
        for p in range(offsets[r], offsets[r + 1]):
            row = table[codes[p]]
            for c in range(width):
                y[start + c] += row[c]
        if offsets[r + 1] > offsets[r]:
            share = np.float32(1) / np.float32(offsets[r + 1] - offsets[r])
            for c in range(width):
                y[start + c] *= share
        for i in range(1, repeat):
            other = out[r * repeat + i]
            for c in range(width):
                other[start + c] = y[start + c]


@njit(nogil=True, cache=True)
def _field_means(x, bounds, out):  # type: ignore[no-untyped-def]
    """Set out[r, f] to the mean of x[r, bounds[f]:bounds[f + 1]]."""
    for r in range(x.shape[0]):
        for f in range(bounds.size - 1):
            total = np.float32(0)
            for c in range(bounds[f], bounds[f + 1]):
                total += x[r, c]
            out[r, f] = total / np.float32(bounds[f + 1] - bounds[f])
