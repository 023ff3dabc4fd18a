"""Paths of a K x D lattice while serving: the probability of each, layer by layer, and the beam search for the best.

Source: Gao et al. 2020, "Learning a Retrievable Structure for Large-Scale Recommendations" (Deep Retrieval), section 2.1
for the model, 2.2 and algorithm 1 for the search.

A path is D nodes, one per layer, each 0 to K - 1; its *code* is the number c_1 K^(D-1) + ... + c_D. Layer d (from 0)
reads the user's vector followed by the embeddings of the nodes c_1 to c_d, puts it through a Linear and ReLU per width of
`hidden` and a Linear to K, and its softmax is p(c_(d+1) | user, c_1 .. c_d). p(path | user) is their product.

**Parameters** (names as torch's `state_dict()` has them; float32; `paths.` stands before them in a snapshot):

| name | shape | |
|---|---|---|
| `nodes.<d>.weight` | [K, e] | embeddings of the nodes c_(d+1), d = 0 .. D - 2 |
| `layers.<d>.<l>.weight`, `.bias` | [out, in], [out] | the l-th Linear of layer d; in of the first is e (d + 1) |

While serving the first Linear of a layer is not multiplied out per path: its product with the user's vector is the same
for all paths of a user, and that with a node's embedding the same for all users, so that the latter are tables, made when
the model is loaded, and a path's row is a sum of rows. What is left per path are the products behind it, a few of one
user's paths at a time, so that no answer depends on who else asks. Paths are taken best first, and as no continuation is
likelier than the path that it continues, a layer ends as soon as what comes is not likelier than all that is kept: the
rest would change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Self

import numpy as np
from numba import njit
from pydantic import Field, model_validator

from engine.core.bounds import bound_of, reaching
from engine.core.options import Options
from engine.core.select import row_of, select_top, sort_digits, sort_key
from engine.core.types import AnyArray, Float32Array, Float64Array, Int64Array
from engine.models.dense import dense
from engine.models.tiles import multiply, soften, wide, widened
from engine.models.towers import Weights

MOST_PATHS = 2**62
"""Codes of paths are int64."""

_BLOCK = 8
"""Paths of a user that a layer continues at once."""


class PathSpec(Options):
    """A lattice of paths and the networks that choose among its nodes."""

    width: int = Field(ge=1, le=65_536)
    """K, the nodes of a layer."""

    depth: int = Field(ge=1, le=62)
    """D, the layers."""

    dimension: int = Field(ge=1, le=4096)
    """e, the width of the user's vector and of the embedding of a node."""

    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = ()
    """Widths of the hidden layers of each layer's network."""

    @model_validator(mode="after")
    def _codes_fit(self) -> Self:
        if self.paths > MOST_PATHS:
            raise ValueError(f"width^depth = {self.width}^{self.depth} paths are more than 2^62")
        return self

    @property
    def paths(self) -> int:
        """K^D, how many paths there are."""
        return int(self.width**self.depth)

    def linears(self, layer: int) -> tuple[tuple[int, int], ...]:
        """Return (in, out) of each Linear of a layer, counted from 0."""
        return tuple(pairwise((self.dimension * (layer + 1), *self.hidden, self.width)))

    def codes(self, nodes: AnyArray) -> Int64Array:
        """int64[...]: the codes of paths given as their nodes, [..., depth]."""
        codes = np.zeros(nodes.shape[:-1], np.int64)
        for layer in range(self.depth):
            codes = codes * self.width + nodes[..., layer]
        return codes

    def nodes(self, codes: AnyArray) -> Int64Array:
        """int64[..., depth]: the nodes of paths given by their codes."""
        powers = np.array([self.width ** (self.depth - 1 - layer) for layer in range(self.depth)], np.int64)
        nodes: Int64Array = np.asarray(codes, np.int64)[..., None] // powers % self.width
        return nodes

    def name(self, code: int) -> str:
        """Return a path as people read it, its nodes: "36-27-20"."""
        return "-".join(map(str, self.nodes(np.array(code)).tolist()))


class PathModel:
    """The networks of a lattice, ready to search."""

    def __init__(self, spec: PathSpec, arrays: Mapping[str, AnyArray]) -> None:
        self.spec = spec
        weights = Weights(arrays, "user")
        e, first_width = spec.dimension, spec.linears(0)[0][1]
        room = widened(first_width)
        nodes = [
            weights.named(f"paths.nodes.{d}.weight", spec.width, e).astype(np.float64)
            for d in range(spec.depth - 1)
        ]
        users = np.zeros((e, spec.depth * room), np.float32)
        # What fills up the width that a softmax reads counts for nothing in it.
        nothing = -np.inf
        bias = np.full(spec.depth * room, 0 if spec.hidden else nothing, np.float32)
        parts: list[AnyArray] = []
        plan = np.zeros((spec.depth, 2), np.int64)
        written = 0

        def put(part: AnyArray) -> None:
            nonlocal written
            parts.append(np.ascontiguousarray(part, np.float32).ravel())
            written += part.size

        for d in range(spec.depth):
            linears = [
                (
                    weights.named(f"paths.layers.{d}.{at}.weight", out, inner),
                    weights.named(f"paths.layers.{d}.{at}.bias", out),
                )
                for at, (inner, out) in enumerate(spec.linears(d))
            ]
            whole, own = linears[0]
            mine = slice(d * room, d * room + first_width)
            users[:, mine], bias[mine] = whole[:, :e].T, own
            plan[d, 0] = written
            for at in range(d):
                put(wide(nodes[at] @ whole[:, (at + 1) * e : (at + 2) * e].T.astype(np.float64)))
            plan[d, 1] = written
            for weight, own in linears[1:]:
                put(wide(wide(weight).T))
                put(wide(own, nothing if weight is linears[-1][0] else 0))
        widths = np.array([widened(out) for _, out in spec.linears(0)], np.int64)
        flat = np.concatenate([*parts, np.empty(0, np.float32)])
        self._arguments = (users, bias, flat, plan, widths, spec.width)

    @classmethod
    def load(cls, spec: PathSpec, arrays: Mapping[str, AnyArray]) -> Self:
        """Return the model whose parameters are `paths.*`; SnapshotError names one that is not as `spec` says."""
        return cls(spec, arrays)

    def beam(self, users: Float32Array, beam: int) -> tuple[Int64Array, Float32Array]:
        """Search for the likeliest paths of every user, keeping `beam` prefixes per layer.

        No user's answer depends on the others'. Of prefixes that are equally likely the one whose own prefix came first
        comes first, then the smaller node.

        Args:
            users: float32[n, dimension], C-contiguous.
            beam: B, 1 to `spec.paths`.

        Returns:
            int64[n, B], codes of paths, likeliest first, and float32[n, B], the logs of their probabilities.

        Raises:
            ValueError: `beam` is not between 1 and the number of paths.
        """
        if not 1 <= beam <= self.spec.paths:
            raise ValueError(f"a beam of {beam} among {self.spec.paths} paths")
        paths = np.empty((users.shape[0], beam), np.int64)
        logs = np.empty((users.shape[0], beam), np.float32)
        _beam(users, *self._arguments, paths, logs)
        return paths, logs


@njit(nogil=True, cache=True)
def _first_hidden(base, tables, nodes, begin, depth, rectify, out):  # type: ignore[no-untyped-def]
    """Set each row of `out` to what the first Linear makes of a path: the user's row and a row per node, summed.

    Args:
        base: float32[w], of the user.
        tables: float32[depth * K, w], the rows of the nodes of each layer before.
        nodes: int64[n, D], of which `depth` count; from the path `begin` on.
        depth: layers before.
        rectify: whether a ReLU follows.
        out: float32[n, w].
    """
    width = 0 if depth == 0 else tables.shape[0] // depth
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[r, c] = base[c]
        for j in range(depth):
            row = j * width + nodes[begin + r, j]
            for c in range(out.shape[1]):
                out[r, c] += tables[row, c]
        if rectify:
            for c in range(out.shape[1]):
                out[r, c] = out[r, c] if out[r, c] > np.float32(0) else np.float32(0)


@njit(nogil=True, cache=True)
def _rectify(x):  # type: ignore[no-untyped-def]
    """Set what is below 0 in float32[n, m] to 0."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            x[r, c] = x[r, c] if x[r, c] > np.float32(0) else np.float32(0)


@njit(nogil=True, cache=True)
def _beam(users, first, bias, flat, plan, widths, width, paths, logs):  # type: ignore[no-untyped-def]
    """Search for every user; `PathModel.beam` says what for.

    Args:
        users: float32[n, e].
        first: float32[e, D w], the parts of the first Linears that read the user, layer after layer; bias: float32[D w].
        flat: float32[...], per layer d the tables of its d nodes, [K, w] each, then weight [in, out] and bias of each
            further Linear. All widths here are rounded up to 16, with zeros; the biases of what a softmax reads, with
            -inf.
        plan: int64[D, 2], where in `flat` the tables of each layer begin, and where its Linears.
        widths: int64[Linears], the width that each ends in, rounded up.
        width: K.
        paths: int64[n, B], logs: float32[n, B]: filled.
    """
    n, beam = paths.shape
    depth, w = plan.shape[0], widths[0]
    padded = widths[widths.size - 1]
    widest = 0
    for at in range(widths.size):
        widest = max(widest, widths[at])
    base = np.empty((n, depth * w), np.float32)
    dense(users, first, bias, base)
    read, write = np.empty(_BLOCK * widest, np.float32), np.empty(_BLOCK * widest, np.float32)
    room = 2 * beam + _BLOCK * width
    values, children = np.empty(room, np.float32), np.empty(room, np.int64)
    bits, places = values.view(np.uint32), np.empty(room, np.int32)
    keys = np.empty((2, room), np.uint64)
    nodes, next_nodes = np.empty((beam, depth), np.int64), np.empty((beam, depth), np.int64)
    codes, next_codes = np.empty(beam, np.int64), np.empty(beam, np.int64)
    log, next_log = np.empty(beam, np.float32), np.empty(beam, np.float32)
    for q in range(n):
        have = 1
        codes[0] = 0
        log[0] = np.float32(0)
        for d in range(depth):
            keep = beam if have > beam // width else min(beam, have * width)
            tables = flat[plan[d, 0] : plan[d, 1]].reshape((d * width, w))
            count = 0
            worst = np.float32(-np.inf)
            for begin in range(0, have, _BLOCK):
                if count >= keep and log[begin] <= worst:
                    break
                rows = min(_BLOCK, have - begin)
                x = read[: rows * w].reshape((rows, w))
                _first_hidden(base[q, d * w : (d + 1) * w], tables, nodes, begin, d, widths.size > 1, x)
                at = plan[d, 1]
                for level in range(1, widths.size):
                    if level > 1:
                        _rectify(x)
                    inner, outer = widths[level - 1], widths[level]
                    weight = flat[at : at + inner * outer].reshape((inner, outer))
                    at += inner * outer
                    y = write[: rows * outer].reshape((rows, outer))
                    multiply(x, weight, flat[at : at + outer], y)
                    at += outer
                    x = y
                    read, write = write, read
                for r in range(rows):
                    # One of the terms is exp(0): the sum is no less than 1.
                    total = np.log(max(soften(x, r), np.float32(1)))
                    parent = log[begin + r]
                    if parent + (np.float32(0) - total) < worst:  # its likeliest child
                        continue
                    row = r * padded
                    for at in range(row, row + width):
                        read[at] = parent + (read[at] - total)
                    for i in range(reaching(read, row, row + width, worst, places)):
                        values[count], children[count] = (
                            read[places[i]],
                            (begin + r) * width + places[i] - row,
                        )
                        count += 1
                # Any bound that is not too high will do.
                if count >= 2 * keep:
                    worst = bound_of(values, count, keep)
                    count = reaching(values, 0, count, worst, places)
                    if count >= 2 * keep:  # many are equal: those that came first are kept
                        for i in range(count):
                            keys[0, i] = sort_key(bits[places[i]], places[i])
                        select_top(keys[0], count, keep)
                        for i in range(keep):
                            places[i] = row_of(keys[0, i])
                        places[:keep].sort()
                        count = keep
                    for i in range(count):
                        values[i], children[i] = values[places[i]], children[places[i]]
            # Equal ones stay in their order, which is that of their own prefixes and then of the nodes.
            for i in range(count):
                keys[0, i] = ~sort_key(bits[i], i)
            best = sort_digits(keys, count, 32)
            for rank in range(keep):
                i = row_of(~keys[best, rank])
                parent_at, node = children[i] // width, children[i] % width
                next_codes[rank] = codes[parent_at] * width + node
                next_log[rank] = values[i]
                for j in range(d):
                    next_nodes[rank, j] = nodes[parent_at, j]
                next_nodes[rank, d] = node
            codes, next_codes = next_codes, codes
            nodes, next_nodes = next_nodes, nodes
            log, next_log = next_log, log
            have = keep
        for rank in range(beam):
            paths[q, rank] = codes[rank]
            logs[q, rank] = log[rank]


def beam_reference(
    spec: PathSpec, arrays: Mapping[str, AnyArray], user: Float32Array, beam: int
) -> list[tuple[int, float]]:
    """The plain twin of `PathModel.beam`, of one user in float64: (code, log probability), likeliest first."""
    prefixes: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for d in range(spec.depth):
        grown: list[tuple[tuple[int, ...], float]] = []
        for prefix, so_far in prefixes:
            logs = node_logs(spec, arrays, user, prefix)
            grown += [((*prefix, node), so_far + float(logs[node])) for node in range(spec.width)]
        prefixes = sorted(grown, key=lambda pair: -pair[1])[: min(beam, spec.width ** (d + 1))]
    return [(int(spec.codes(np.array(path))), log) for path, log in prefixes]


def node_logs(
    spec: PathSpec, arrays: Mapping[str, AnyArray], user: Float32Array, prefix: tuple[int, ...]
) -> Float64Array:
    """float64[K]: log p(node | user, prefix) of every node behind a prefix, plainly."""
    d = len(prefix)
    parts = [user, *(arrays[f"paths.nodes.{at}.weight"][node] for at, node in enumerate(prefix))]
    x = np.concatenate(parts).astype(np.float64)
    last = len(spec.hidden)
    for at in range(last + 1):
        weight = arrays[f"paths.layers.{d}.{at}.weight"].astype(np.float64)
        x = weight @ x + arrays[f"paths.layers.{d}.{at}.bias"]
        if at < last:
            x = np.maximum(x, 0)
    logs: Float64Array = x - x.max() - np.log(np.exp(x - x.max()).sum())
    return logs


def random_paths(spec: PathSpec, seed: int = 0, scale: float = 1.0) -> dict[str, Float32Array]:
    """Return random parameters, named as they are in a snapshot: for tests and benchmarks.

    Args:
        spec: of the lattice.
        seed: of the numbers.
        scale: how far apart the nodes of a layer are, about: the spread of what a softmax reads, for users of spread 1.
    """
    random = np.random.default_rng((seed, 0xD2))
    made = {
        f"paths.nodes.{d}.weight": random.standard_normal((spec.width, spec.dimension), np.float32)
        for d in range(spec.depth - 1)
    }
    for d in range(spec.depth):
        linears = spec.linears(d)
        for at, (inner, out) in enumerate(linears):
            gain = (
                np.sqrt(1 / inner) * (scale if at + 1 == len(linears) else 1.0) * (np.sqrt(2) if at else 1.0)
            )
            weight = random.standard_normal((out, inner), np.float32) * np.float32(gain)
            made[f"paths.layers.{d}.{at}.weight"] = weight
            made[f"paths.layers.{d}.{at}.bias"] = np.zeros(out, np.float32)
    return made
