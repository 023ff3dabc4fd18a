"""The ranking step of streaming VQ while serving: scores of thousands of items for each user, compiled.

`vq_spec.py` beside this has the formulas and the names of the arrays, `reference.py`'s manner is that of `rank_reference`
here. The tasks' scores are combined by weights w, which add up to 1. All but the activations is linear in a task, so that
one vector p = sum_t w_t p_t, or one head, answers for all of them. Of the complex step whatever depends on the user alone
is multiplied out before the first item is looked at:

- logits: q k = (Wq z) k = z (Wq^T k), a matrix [e, H l] for a user;
- the first layer reads (a, p, z, p * z) by W = (Wa, Wp, Wz, Wc), and a = Wo softmax(..) v + bo; so it is
  (Wz + Wc diag(p)) z + (Wa Wo v) softmax(..) + (Wp p + Wa bo + b): one product of (z, softmax) with a matrix.

An item costs e H l + (e + H l) h multiplications and H l exponentials; h is the width of the first layer.

Items of the build are in bytes, one per number, and a scale (`engine/ann/lists.py` has how): what such a step waits for
is memory. Users and what was published since are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numba import njit

from engine.ann.kernels import prefetch
from engine.core.errors import SnapshotError
from engine.core.sealed import sealed
from engine.core.types import AnyArray, BoolArray, Float32Array, Int8Array, Int32Array, Int64Array
from engine.models.dense import dense, dense_relu, dot, softmax
from engine.models.tiles import product, wide, widened
from engine.models.towers import Weights
from engine.models.vq_spec import VqSpec

_ask: Any = prefetch  # to a type checker a call of an intrinsic never returns

_BLOCK = 64
"""Items whose products of the complex step are made together."""

_AHEAD = 16
"""Items whose vectors are asked for before they are compared: two chunks of a cluster."""

_LINE = 64
"""Bytes in a line of the cache."""


class RankStep:
    """Scores of items for users.

    Args:
        spec: of the model, whose `rank` is not "none".
        arrays: `rank.*`.
        weights: float32[T], of the tasks; they add up to 1.
        codes: int8[items, e rounded up to 16] and
        scales: float32[items], z of the items as `cluster_lists.py` has it, in the order in which they are asked for (by
            slots).
        biases: float32[items, T], b in that order.

    Raises:
        SnapshotError: an array is missing, or not as the specification says.
    """

    def __init__(
        self,
        spec: VqSpec,
        arrays: Mapping[str, AnyArray],
        weights: Float32Array,
        codes: Int8Array,
        scales: Float32Array,
        biases: Float32Array,
    ) -> None:
        parts = Weights(arrays, "user")
        e, tasks = spec.rank_dimension, len(spec.tasks)
        self._spec, self._weights = spec, sealed(np.ascontiguousarray(weights, np.float32))
        self._codes, self._scales = sealed(codes), sealed(scales)
        # One number an item is left of the tasks': with one task it is the mapped one.
        self._biases = sealed(biases.reshape(-1) if tasks == 1 else biases @ self._weights)
        self._layers = [
            (
                parts.named(f"rank.user.layers.{at}.weight", out, inner),
                parts.named(f"rank.user.layers.{at}.bias", out),
            )
            for at, (inner, out) in enumerate(spec.rank_user_layers)
        ]
        if spec.rank == "two_tower":
            weight, bias = self._layers[-1]
            mixed = np.tensordot(self._weights, weight.reshape(tasks, e, -1), 1)
            # Zeros behind each user's p: the products with items are of so many terms.
            self._layers[-1] = (wide(mixed.T).T, wide(self._weights @ bias.reshape(tasks, e)))
        self._layers = [
            (_turned(weight), sealed(np.ascontiguousarray(bias))) for weight, bias in self._layers
        ]
        self._items = parts.named("rank.items.weight", spec.tower.items + 1, e)
        self._project = _turned(parts.named("rank.project.weight", e, spec.tower.dimension))
        self._unknown = parts.named("rank.bias.weight", spec.tower.items + 1, tasks)[0] @ self._weights
        # Items published since the build; one that nothing is known of is whoever code 0 stands for.
        self._fresh = np.empty((0, widened(e)), np.float32)
        self._fresh_biases = np.empty(0, np.float32)
        self._complex: tuple[Any, ...] = ()
        if spec.rank == "complex":
            self._complex = self._multiplied_out(parts)

    @classmethod
    def load(
        cls, spec: VqSpec, arrays: Mapping[str, AnyArray], weights: Float32Array, prefix: str = "lists"
    ) -> Self | None:
        """Return the ranking step of a bundle, its items in the order of `<prefix>.vectors`; None where it has none."""
        if spec.rank == "none":
            return None
        parts, items = Weights(arrays, "user"), spec.tower.items
        return cls(
            spec,
            arrays,
            weights,
            parts.named(f"{prefix}.vectors", items, widened(spec.rank_dimension), dtype=np.int8),
            parts.named(f"{prefix}.scales", items),
            parts.named(f"{prefix}.rank_bias", items, len(spec.tasks)),
        )

    def _multiplied_out(self, parts: Weights) -> tuple[Any, ...]:
        """Return what the kernel of the complex step is given besides the users and the items."""
        spec, e = self._spec, self._spec.rank_dimension
        query, key, value = (parts.named(f"rank.{name}.weight", e, e) for name in ("query", "key", "value"))
        out, out_bias = parts.named("rank.out.weight", e, e), parts.named("rank.out.bias", e)
        layers = [
            (
                parts.named(f"rank.layers.{at}.weight", wide, inner),
                parts.named(f"rank.layers.{at}.bias", wide),
            )
            for at, (inner, wide) in enumerate(spec.rank_layers)
        ]
        first, first_bias = layers[0]
        of_attention, of_user, of_item, of_cross = (first[:, at * e : (at + 1) * e] for at in range(4))
        heads = parts.named("rank.heads.weight", len(spec.tasks), spec.rank_hidden[-1])
        heads_bias = parts.named("rank.heads.bias", len(spec.tasks))
        # The layers after the first, end to end: a kernel takes no list of arrays of several shapes.
        behind = [part.ravel() for weight, bias in layers[1:] for part in (weight.T, bias)]
        return (
            spec.rank_heads,
            sealed(np.ascontiguousarray(query)),
            _turned(key),
            _turned(value),
            _turned(of_attention @ out),
            _turned(of_user),
            _turned(of_item),
            _turned(of_cross),
            sealed((of_attention @ out_bias + first_bias).astype(np.float32)),
            sealed(np.concatenate([*behind, np.empty(0, np.float32)]).astype(np.float32)),
            np.array(spec.rank_hidden, np.int64),
            sealed((self._weights @ heads).astype(np.float32)),
            np.float32(self._weights @ heads_bias),
        )

    @property
    def fresh_nbytes(self) -> int:
        """Bytes of what was published since the build."""
        return int(self._fresh.nbytes + self._fresh_biases.nbytes)

    def put(self, rows: Int32Array, vectors: Float32Array) -> None:
        """Take items that the build did not know.

        Args:
            rows: int32[m], from `spec.tower.items` on, each once; their slots are the same.
            vectors: float32[m, d], v of the index step.
        """
        self.make_room(int(rows.max(initial=-1)) + 1)
        made = np.empty((rows.size, self._spec.rank_dimension), np.float32)
        dense(vectors, self._project, self._items[0], made)
        self._fresh[rows - self._spec.tower.items, : made.shape[1]] = made

    def put_learnt(self, rows: Int32Array, vectors: Float32Array, biases: Float32Array) -> None:
        """Take items that the build did not know, as a trainer that follows has learnt them.

        Args:
            rows: int32[m], as `put` has them.
            vectors: float32[m, e], z.
            biases: float32[m, T], b.
        """
        self.make_room(int(rows.max(initial=-1)) + 1)
        places = rows - self._spec.tower.items
        self._fresh[places, : vectors.shape[1]] = vectors
        self._fresh_biases[places] = biases @ self._weights

    def make_room(self, rows: int) -> None:
        """Have something to rank each of the first `rows` items by, published since or not."""
        more = rows - self._spec.tower.items
        have = self._fresh.shape[0]
        if more > have:
            room = max(more, have * 5 // 4, 1024)
            for name, first in (("_fresh", wide(self._items[0])), ("_fresh_biases", self._unknown)):
                wider = np.empty((room, *first.shape), np.float32)
                wider[:have], wider[have:] = getattr(self, name), first
                setattr(self, name, wider)

    def users(self, x: Float32Array) -> Float32Array:
        """p of m users, its tasks combined, from float32[m, D], the input of the first user tower.

        float32[m, e]; of the two towers [m, e rounded up to 16], zeros behind.
        """
        for at, (weight, bias) in enumerate(self._layers):
            out = np.empty((x.shape[0], weight.shape[1]), np.float32)
            if at + 1 < len(self._layers):
                dense_relu(x, weight, bias, out)
            else:
                dense(x, weight, bias, out)
            x = out
        return x

    def score(
        self,
        users: Float32Array,
        asked: BoolArray,
        slots: Int32Array,
        offsets: Int64Array,
        out: Float32Array,
        histories: tuple[Int32Array, Int32Array] | None = None,
    ) -> None:
        """Set float32[t], the scores of the items of each query.

        Args:
            users: of the queries that are asked, in order, as `users` makes them.
            asked: bool[n], which of the batch these are.
            slots: int32[t or more], the items of all queries, end to end.
            offsets: int64[n + 1], those of each.
            out: float32[t or more].
            histories: complex: int32[m, t] codes of debiased histories, right-aligned, and int32[m] lengths.
        """
        given = (self._codes, self._scales, self._biases, self._fresh, self._fresh_biases)
        if not self._complex:
            _two_tower(users, asked, slots, offsets, *given, out)
            return
        assert histories is not None
        arguments = (users, asked, slots, offsets, *given, *histories, self._items, *self._complex, out)
        _complex(*arguments)


def task_weights(spec: VqSpec, weights: Mapping[str, float]) -> Float32Array:
    """float32[T]: what each task counts for, all of it 1; a task that is not named counts 1 before it is divided.

    Raises:
        SnapshotError: a task is named that the model does not have, or none counts for anything.
    """
    unknown = sorted(set(weights) - set(spec.tasks))
    if unknown:
        raise SnapshotError(
            f"task_weights names {unknown[0]!r}, and the model has the tasks {', '.join(spec.tasks)}", "spec"
        )
    each = np.array([weights.get(task, 1.0) for task in spec.tasks], np.float64)
    if not each.sum() > 0:
        raise SnapshotError("task_weights leaves no task of the model with a weight above 0", "spec")
    shares: Float32Array = (each / each.sum()).astype(np.float32)
    return shares


def _turned(weight: AnyArray) -> AnyArray:
    """A Linear's weight as [in, out], a copy."""
    return sealed(np.ascontiguousarray(np.asarray(weight, np.float32).T))


@njit(nogil=True, cache=True)
def _two_tower(  # type: ignore[no-untyped-def]
    users, asked, slots, offsets, codes, scales, biases, fresh, fresh_biases, out
):
    items, width = codes.shape
    numbers, levels = scales.reshape(-1, 1), biases.reshape(-1, 1)
    m = 0
    for q in range(asked.size):
        if not asked[q]:
            continue
        user = users[m]
        m += 1
        end = offsets[q + 1]
        for p in range(offsets[q], end):
            ahead = slots[min(p + _AHEAD, end - 1)]
            if ahead < items:
                for c in range(0, width, _LINE):
                    _ask(codes, ahead, c)
                _ask(numbers, ahead, 0)
                _ask(levels, ahead, 0)
            slot = slots[p]
            if slot < items:
                out[p] = product(user, codes, slot) * scales[slot] + biases[slot]
            else:
                at = slot - items
                out[p] = product(user, fresh, at) + fresh_biases[at]


@njit(nogil=True, cache=True)
def _complex(  # type: ignore[no-untyped-def]
    users, asked, slots, offsets, codes, scales, biases, fresh, fresh_biases, histories, lengths, table, heads,
    query, key, value, mixing, of_user, of_item, of_cross, first_bias, behind, widths, head, head_bias, out,
):  # fmt: skip
    items, e = codes.shape[0], table.shape[1]
    part = e // heads
    scale = np.float32(1 / np.sqrt(part))
    hidden = widths[0]
    widest = hidden
    for width in widths:
        widest = max(widest, width)
    longest = 0
    for length in lengths:
        longest = max(longest, length)
    keys, values = np.empty((longest, e), np.float32), np.empty((longest, e), np.float32)
    rows = np.empty((longest, e), np.float32)
    nothing = np.zeros(max(e, heads * longest), np.float32)
    z = np.empty((_BLOCK, e), np.float32)
    m = 0
    for q in range(asked.size):
        if not asked[q]:
            continue
        user, many = users[m], lengths[m]
        for j in range(many):
            code = histories[m, histories.shape[1] - many + j]
            for c in range(e):
                rows[j, c] = table[code, c]
        m += 1
        dense(rows[:many], key, nothing[:e], keys[:many])
        dense(rows[:many], value, nothing[:e], values[:many])
        seen = heads * many
        turned = np.zeros((e, seen), np.float32)
        whole = np.zeros((e + seen, hidden), np.float32)
        for h in range(heads):
            for j in range(many):
                for i in range(h * part, (h + 1) * part):
                    for c in range(e):
                        turned[c, h * many + j] += query[i, c] * keys[j, i] * scale
                    for c in range(hidden):
                        whole[e + h * many + j, c] += mixing[i, c] * values[j, i]
        const = np.empty(hidden, np.float32)
        for c in range(hidden):
            total = first_bias[c]
            for i in range(e):
                total += of_user[i, c] * user[i]
                whole[i, c] = of_item[i, c] + of_cross[i, c] * user[i]
            const[c] = total
        logits = np.empty((_BLOCK, seen), np.float32)
        x = np.empty((_BLOCK, e + seen), np.float32)
        for begin in range(offsets[q], offsets[q + 1], _BLOCK):
            count = min(_BLOCK, offsets[q + 1] - begin)
            for r in range(count):
                slot = slots[begin + r]
                if slot < items:
                    for c in range(e):
                        z[r, c] = np.float32(codes[slot, c]) * scales[slot]
                else:
                    for c in range(e):
                        z[r, c] = fresh[slot - items, c]
            if many:
                dense(z[:count], turned, nothing[:seen], logits[:count])
            for r in range(count):
                for c in range(e):
                    x[r, c] = z[r, c]
                for h in range(heads):
                    if many:
                        mine = logits[r, h * many : (h + 1) * many]
                        softmax(mine, many)
                        for j in range(many):
                            x[r, e + h * many + j] = mine[j]
            y = np.empty((count, hidden), np.float32)
            dense_relu(x[:count], whole, const, y)
            at = 0
            for layer in range(1, widths.size):
                inner, wide = widths[layer - 1], widths[layer]
                weight = behind[at : at + inner * wide].reshape(inner, wide)
                at += inner * wide
                after = np.empty((count, wide), np.float32)
                dense_relu(y, weight, behind[at : at + wide], after)
                at += wide
                y = after
            for r in range(count):
                slot = slots[begin + r]
                bias = biases[slot] if slot < items else fresh_biases[slot - items]
                out[begin + r] = dot(y[r], head) + head_bias + bias


def rank_reference(
    spec: VqSpec,
    arrays: Mapping[str, AnyArray],
    weights: Float32Array,
    x: Float32Array,
    vectors: Float32Array,
    biases: Float32Array,
    history: Int32Array | None = None,
) -> AnyArray:
    """The plain twin, of one user, in float64: float64[m], the scores of m items.

    Args:
        spec, arrays, weights: as of `RankStep`.
        x: float32[D], the input of the first user tower.
        vectors, biases: float32[m, e] and float32[m, T], of the items.
        history: complex: int32[l], codes of the debiased history.
    """
    w = {name: array.astype(np.float64) for name, array in arrays.items() if name.startswith("rank.")}
    e, tasks = spec.rank_dimension, len(spec.tasks)
    p = x.astype(np.float64)
    last = len(spec.rank_user_layers) - 1
    for at in range(last + 1):
        p = w[f"rank.user.layers.{at}.weight"] @ p + w[f"rank.user.layers.{at}.bias"]
        p = np.maximum(p, 0) if at < last else p
    z = vectors.astype(np.float64)
    if spec.rank == "two_tower":
        of_tasks = z @ p.reshape(tasks, e).T + biases
        return of_tasks @ weights
    assert history is not None
    part, rows = e // spec.rank_heads, w["rank.items.weight"][history]
    scores = np.empty(z.shape[0])
    for r, item in enumerate(z):
        mixed = np.zeros(e)
        if history.size:
            q, k, v = (
                w["rank.query.weight"] @ item,
                rows @ w["rank.key.weight"].T,
                rows @ w["rank.value.weight"].T,
            )
            for h in range(spec.rank_heads):
                mine = slice(h * part, (h + 1) * part)
                logits = k[:, mine] @ q[mine] / np.sqrt(part)
                shares = np.exp(logits - logits.max())
                mixed[mine] = shares @ v[:, mine] / shares.sum()
        y = np.concatenate((w["rank.out.weight"] @ mixed + w["rank.out.bias"], p, item, p * item))
        for at in range(len(spec.rank_layers)):
            y = np.maximum(w[f"rank.layers.{at}.weight"] @ y + w[f"rank.layers.{at}.bias"], 0)
        scores[r] = weights @ (w["rank.heads.weight"] @ y + w["rank.heads.bias"] + biases[r])
    return scores


def random_rank(spec: VqSpec, seed: int = 0) -> dict[str, Float32Array]:
    """Return random parameters of a ranking step, named and shaped as `vq_spec.py` says: for tests and benchmarks."""
    if spec.rank == "none":
        return {}
    e, tasks, items = spec.rank_dimension, len(spec.tasks), spec.tower.items
    shapes: dict[str, tuple[int, ...]] = {
        "items.weight": (items + 1, e),
        "project.weight": (e, spec.tower.dimension),
        "bias.weight": (items + 1, tasks),
    }
    for at, (inner, out) in enumerate(spec.rank_user_layers):
        shapes |= {f"user.layers.{at}.weight": (out, inner), f"user.layers.{at}.bias": (out,)}
    if spec.rank == "complex":
        shapes |= {f"{name}.weight": (e, e) for name in ("query", "key", "value", "out")}
        shapes["out.bias"] = (e,)
        for at, (inner, out) in enumerate(spec.rank_layers):
            shapes |= {f"layers.{at}.weight": (out, inner), f"layers.{at}.bias": (out,)}
        shapes |= {"heads.weight": (tasks, spec.rank_hidden[-1]), "heads.bias": (tasks,)}
    random = np.random.default_rng((seed, 0xD7))
    return {
        f"rank.{name}": random.standard_normal(each, np.float32) * np.float32(0.3)
        for name, each in shapes.items()
    }
