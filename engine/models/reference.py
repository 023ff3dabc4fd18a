"""The towers in plain NumPy, a row at a time, as the formulas of `spec.py` read: tests hold the compiled ones to it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.core.types import AnyArray, Float32Array, Int32Array
from engine.models.encoded import Encoded, EncodedUsers
from engine.models.spec import ModelSpec, Side, tower_shape


def item_vectors(spec: ModelSpec, arrays: Mapping[str, AnyArray], items: Encoded) -> Float32Array:
    """float32[m, dimension]: as `ItemTower.vectors`."""
    rows = [_row(spec, "item", arrays, items, r, None) for r in range(len(items))]
    if spec.popularity_exponent:
        at = spec.item_code
        rows = [arrays["item.lengths"][items.codes[r, at]] * row for r, row in enumerate(rows)]
    return np.array(rows, np.float32)


def user_vectors(
    spec: ModelSpec, arrays: Mapping[str, AnyArray], users: EncodedUsers, tasks: Int32Array | None = None
) -> Float32Array:
    """float32[n * interests, dimension]: as `UserTower.vectors`."""
    rows = []
    for r in range(len(users)):
        codes = [code for code in users.sequence[r].tolist() if code]
        prompt = None if tasks is None else arrays["user.sequence.prompts"][tasks[r]]
        made = _sequence(spec, arrays, codes, prompt)
        rows += [_row(spec, "user", arrays, users, r, vector) for vector in made]
    return np.array(rows, np.float32)


def intent(spec: ModelSpec, arrays: Mapping[str, AnyArray], vectors: Float32Array) -> Float32Array:
    """float32[n, prompts]: as `UserTower.intent`."""
    rows = [_softmax(_linear(arrays, "user.intent", vector)) for vector in vectors]
    return np.array(rows, np.float32).reshape(-1, spec.prompts)


def _row(
    spec: ModelSpec,
    side: Side,
    arrays: Mapping[str, AnyArray],
    encoded: Encoded,
    r: int,
    sequence: AnyArray | None,
) -> AnyArray:
    fields: list[AnyArray] = []
    code = many = 0
    for at, feature in enumerate(spec.features(side)):
        if feature.floats:
            continue
        table = arrays[f"{side}.embeddings.{at}.weight"]
        if feature.coded:
            fields.append(table[encoded.codes[r, code]])
            code += 1
        else:
            multi = encoded.multi[many]
            mine = multi.codes[multi.offsets[r] : multi.offsets[r + 1]]
            fields.append(table[mine].mean(0) if mine.size else np.zeros(feature.dimension, np.float32))
            many += 1
    if sequence is not None:
        fields.append(sequence)
    shape = tower_shape(spec, side)
    if shape.summed:
        fields = [np.sum(fields, 0)]
    x = _crossed(spec, side, arrays, fields, encoded.numbers[r])
    for layer in range(len(shape.layers)):
        x = _linear(arrays, f"{side}.layers.{layer}", x)
        if layer + 1 < len(shape.layers):
            x = np.maximum(x, 0)
    return x / max(float(np.linalg.norm(x)), 1e-12) if spec.metric == "cosine" else x


def _crossed(
    spec: ModelSpec, side: Side, arrays: Mapping[str, AnyArray], fields: list[AnyArray], numbers: AnyArray
) -> AnyArray:
    kind = tower_shape(spec, side).cross
    x: AnyArray = np.concatenate([*fields, numbers])
    if kind == "dcn":
        first = x
        for layer in range(spec.cross_layers):
            x = first * _linear(arrays, f"{side}.cross.layers.{layer}", x) + x
    elif kind in ("senet", "fibinet"):
        means = np.array([field.mean() for field in fields])
        squeezed = np.maximum(_linear(arrays, f"{side}.cross.squeeze", means), 0)
        excited = np.maximum(_linear(arrays, f"{side}.cross.excite", squeezed), 0)
        scaled = [field * a for field, a in zip(fields, excited, strict=True)]
        x = np.concatenate([*scaled, numbers])
        if kind == "fibinet":
            weight = arrays[f"{side}.cross.bilinear.weight"]
            pairs = [
                (weight @ each[f]) * each[g]
                for each in (fields, scaled)
                for f in range(len(each))
                for g in range(f + 1, len(each))
            ]
            x = np.concatenate([*pairs, numbers])
    return x


def _linear(arrays: Mapping[str, AnyArray], name: str, x: AnyArray) -> AnyArray:
    product: AnyArray = arrays[f"{name}.weight"] @ x + arrays[f"{name}.bias"]
    return product


def _sequence(
    spec: ModelSpec, arrays: Mapping[str, AnyArray], codes: list[int], prompt: AnyArray | None
) -> list[AnyArray | None]:
    """The sequence vectors of one history, oldest item first; [None] where the tower has no sequence."""
    sequence, width = spec.sequence, spec.sequence.width
    if sequence.kind == "none":
        return [None]
    if not codes:
        return [np.zeros(width, np.float32) for _ in range(sequence.vectors)]
    tied = spec.tied_feature
    name = "user.sequence.items.weight" if tied is None else f"item.embeddings.{tied}.weight"
    items = arrays[name][codes] if prompt is None else arrays[name][codes] * prompt

    def weight(part: str) -> AnyArray:
        return arrays[f"user.sequence.{part}"]

    if sequence.weighted:
        total: AnyArray = arrays["user.sequence.weights"][codes] @ items
        return [total / len(codes) ** sequence.length_exponent]
    if sequence.kind == "mean":
        return [items.mean(0)]
    if sequence.kind == "attention":
        weights = _softmax(np.append(items @ weight("query") / np.sqrt(width), 0))
        return [weights[:-1] @ items]
    if sequence.kind == "gru":
        state = np.zeros(width)
        for item in items:
            given = weight("gru.weight_ih_l0") @ item + weight("gru.bias_ih_l0")
            kept = weight("gru.weight_hh_l0") @ state + weight("gru.bias_hh_l0")
            reset, update = (
                1 / (1 + np.exp(-(given[part] + kept[part])))
                for part in (slice(0, width), slice(width, 2 * width))
            )
            new = np.tanh(given[2 * width :] + reset * kept[2 * width :])
            state = (1 - update) * new + update * state
        return [state]
    if sequence.kind == "comirec":
        logits = weight("heads.weight") @ np.tanh(weight("hidden.weight") @ items.T)
        return [_softmax(logits[i]) @ items for i in range(sequence.interests)]
    return [_sasrec(spec, arrays, items)]


def _sasrec(spec: ModelSpec, arrays: Mapping[str, AnyArray], items: AnyArray) -> AnyArray:
    sequence, width, n = spec.sequence, spec.sequence.width, len(items)
    size = width // sequence.heads
    x = items * np.sqrt(width) + arrays["user.sequence.positions.weight"][:n][::-1]
    for b in range(sequence.blocks):
        name = f"user.sequence.blocks.{b}"
        normed = _norm(arrays, f"{name}.attention_norm", x)
        weight, bias = arrays[f"{name}.attention.in_proj_weight"], arrays[f"{name}.attention.in_proj_bias"]
        queries, keys, values = np.split(normed @ weight.T + bias, 3, 1)
        mixed = []
        for h in range(sequence.heads):
            mine = slice(h * size, (h + 1) * size)
            logits = queries[:, mine] @ keys[:, mine].T / np.sqrt(size)
            heads = [_softmax(logits[j, : j + 1]) @ values[: j + 1, mine] for j in range(n)]
            mixed.append(np.array(heads))
        x = x + np.array([_linear(arrays, f"{name}.attention.out_proj", row) for row in np.hstack(mixed)])
        normed = _norm(arrays, f"{name}.feed_norm", x)
        fed = [
            _linear(arrays, f"{name}.outer", np.maximum(_linear(arrays, f"{name}.inner", row), 0))
            for row in normed
        ]
        x = x + np.array(fed)
    last: AnyArray = _norm(arrays, "user.sequence.norm", x)[-1]
    return last


def _norm(arrays: Mapping[str, AnyArray], name: str, x: AnyArray) -> AnyArray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    normed: AnyArray = (x - mean) / np.sqrt(variance + 1e-8)
    return normed * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def _softmax(logits: AnyArray) -> AnyArray:
    raised = np.exp(logits - logits.max())
    weights: AnyArray = raised / raised.sum()
    return weights


def random_weights(spec: ModelSpec, seed: int = 0) -> dict[str, Float32Array]:
    """Return random parameters of both towers, named and shaped as `spec.py` says: for tests and benchmarks."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    sides: tuple[Side, Side] = ("user", "item")
    for side in sides:
        shape = tower_shape(spec, side)
        for at, feature in enumerate(spec.features(side)):
            if not feature.floats:
                shapes[f"{side}.embeddings.{at}.weight"] = (feature.size, feature.dimension)
        for at, (inner, out) in enumerate(shape.layers):
            shapes |= {f"{side}.layers.{at}.weight": (out, inner), f"{side}.layers.{at}.bias": (out,)}
        cross, fields = f"{side}.cross", len(shape.fields)
        if shape.cross == "dcn":
            for at in range(spec.cross_layers):
                name = f"{cross}.layers.{at}"
                shapes |= {f"{name}.weight": (shape.width, shape.width), f"{name}.bias": (shape.width,)}
        elif shape.cross != "none":
            narrow = (fields + 1) // 2
            shapes |= {f"{cross}.squeeze.weight": (narrow, fields), f"{cross}.squeeze.bias": (narrow,)}
            shapes |= {f"{cross}.excite.weight": (fields, narrow), f"{cross}.excite.bias": (fields,)}
            if shape.cross == "fibinet":
                shapes[f"{cross}.bilinear.weight"] = (shape.fields[0], shape.fields[0])
    shapes |= {f"user.sequence.{name}": each for name, each in _sequence_shapes(spec).items()}
    if spec.prompts:
        shapes["user.sequence.prompts"] = (spec.prompts + 1, spec.sequence.width)
        shapes |= {"user.intent.weight": (spec.prompts, spec.dimension), "user.intent.bias": (spec.prompts,)}
    if spec.popularity_exponent:
        shapes["item.lengths"] = (spec.items + 1,)
    return {name: rng.normal(0, 0.3, each).astype(np.float32) for name, each in shapes.items()}


def _sequence_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    sequence, w = spec.sequence, spec.sequence.width
    shapes: dict[str, tuple[int, ...]] = {}
    if sequence.kind != "none" and not spec.tie_items:
        shapes["items.weight"] = (spec.items + 1, w)
    if sequence.weighted:
        shapes["weights"] = (spec.items + 1,)
    if sequence.kind == "attention":
        shapes["query"] = (w,)
    elif sequence.kind == "gru":
        for part in ("ih", "hh"):
            shapes |= {f"gru.weight_{part}_l0": (3 * w, w), f"gru.bias_{part}_l0": (3 * w,)}
    elif sequence.kind == "comirec":
        shapes |= {"hidden.weight": (4 * w, w), "heads.weight": (sequence.interests, 4 * w)}
    elif sequence.kind == "sasrec":
        shapes |= {"positions.weight": (sequence.length, w), "norm.weight": (w,), "norm.bias": (w,)}
        for b in range(sequence.blocks):
            block = f"blocks.{b}"
            shapes |= {f"{block}.attention.in_proj_weight": (3 * w, w)}
            shapes |= {f"{block}.attention.in_proj_bias": (3 * w,)}
            for part in ("attention.out_proj", "inner", "outer"):
                shapes |= {f"{block}.{part}.weight": (w, w), f"{block}.{part}.bias": (w,)}
            for part in ("attention_norm", "feed_norm"):
                shapes |= {f"{block}.{part}.weight": (w,), f"{block}.{part}.bias": (w,)}
    return shapes
