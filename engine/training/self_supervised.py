"""Self-supervised loss of items: two views of one item, with different features hidden, are to have like vectors.

The item tower learns from likes, and most items have few. This teaches it about the long tail from the features alone
(Yao et al. 2021, Self-supervised Learning for Large-scale Item Recommendations, sections 3.1 to 3.3; the course).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.core.types import BoolArray, Float64Array
from engine.models.encoded import Encoded, Multi
from engine.models.options import Mask
from engine.models.spec import Feature

HIDDEN_SHARE = 0.5
"""Share of the features that `random` hides, and of the codes that `dropout` does."""

LEVELS = 32
"""Codes that mutual information tells apart in a feature: the most frequent, and the rest as one."""


def two_views(
    encoded: Encoded,
    features: tuple[Feature, ...],
    mask: Mask,
    related: Float64Array,
    random: np.random.Generator,
) -> tuple[Encoded, Encoded]:
    """Return two copies of the rows with different features hidden.

    Args:
        encoded: the items of a batch.
        features: the item tower's.
        mask: `random` hides a random half of the features in each view; `dropout` a random half of the codes of each
            multi-valued feature; `complementary` a half in the one and the other half in the other; `information` a drawn
            feature with the half most related to it in the one, the rest in the other.
        related: float64[features, features], from `mutual_information`.
        random: what draws.
    """
    count = len(features)
    if mask == "dropout":
        return _some_codes(encoded, random), _some_codes(encoded, random)
    if mask == "random":
        first = random.random(count) < HIDDEN_SHARE
        return hidden(encoded, features, first), hidden(
            encoded, features, random.random(count) < HIDDEN_SHARE
        )
    if mask == "complementary":
        first = np.zeros(count, np.bool_)
        first[random.permutation(count)[: count // 2]] = True
    else:
        seed = int(random.integers(count))
        first = np.zeros(count, np.bool_)
        first[np.argsort(-related[seed], kind="stable")[: max(count // 2, 1)]] = True
    return hidden(encoded, features, first), hidden(encoded, features, ~first)


def hidden(encoded: Encoded, features: tuple[Feature, ...], gone: BoolArray) -> Encoded:
    """Return the rows without some features: code 0, no codes, or a missing number."""
    coded = np.array([feature.coded for feature in features], np.bool_)
    codes = encoded.codes.copy()
    codes[:, gone[coded]] = 0
    multi = tuple(
        Multi(many.codes[:0], np.zeros_like(many.offsets)) if out else many
        for many, out in zip(
            encoded.multi,
            (g for g, feature in zip(gone, features, strict=True) if feature.multi),
            strict=True,
        )
    )
    numbers = encoded.numbers.copy()
    floats = np.array([feature.floats for feature in features], np.bool_)
    for at in np.flatnonzero(gone[floats]):
        numbers[:, 2 * at], numbers[:, 2 * at + 1] = 0.0, 1.0
    return Encoded(codes, multi, numbers)


def _some_codes(encoded: Encoded, random: np.random.Generator) -> Encoded:
    multi = []
    for many in encoded.multi:
        keep = random.random(many.codes.size) >= HIDDEN_SHARE
        before = np.concatenate([[0], np.cumsum(keep)])
        multi.append(Multi(many.codes[keep], before[many.offsets].astype(np.int64)))
    return Encoded(encoded.codes, tuple(multi), encoded.numbers)


def mutual_information(encoded: Encoded, features: tuple[Feature, ...]) -> Float64Array:
    """Return float64[features, features]: the mutual information of each pair, in nats; the diagonal is the entropy.

    MI(a, b) = sum p(x, y) log(p(x, y) / (p(x) p(y))), over the most frequent codes; of many codes the first stands for
    the row, of a number whether it is above the mean.
    """
    columns, code, many, number = [], 0, 0, 0
    for feature in features:
        if feature.coded:
            values = encoded.codes[:, code]
            code += 1
        elif feature.multi:
            lists = encoded.multi[many]
            values = np.zeros(len(encoded), np.int32)
            some = np.diff(lists.offsets) > 0
            values[some] = lists.codes[lists.offsets[:-1][some]]
            many += 1
        else:
            values = (encoded.numbers[:, 2 * number] > 0).astype(np.int32) + 1
            values[encoded.numbers[:, 2 * number + 1] > 0] = 0
            number += 1
        columns.append(_levels(values))
    made = np.zeros((len(columns), len(columns)))
    for a, left in enumerate(columns):
        for b, right in enumerate(columns):
            joint = np.bincount(left * LEVELS + right, minlength=LEVELS * LEVELS).reshape(LEVELS, LEVELS)
            p = joint / max(left.size, 1)
            outer = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
            there = p > 0
            made[a, b] = float((p[there] * np.log(p[there] / outer[there])).sum())
    return made


def _levels(values: np.typing.NDArray[np.int32]) -> np.typing.NDArray[np.int64]:
    counts = np.bincount(values)
    ranks = np.empty(counts.size, np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(counts.size)
    return np.minimum(ranks, LEVELS - 1)[values]


def view_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE between the views: -log of softmax over j of (first_i . second_j / temperature) at j = i.

    Args:
        first, second: float32[n, d], the vectors of the views; they are given length 1 here.
        temperature: what cosines are divided by.
    """
    first = torch.nn.functional.normalize(first, dim=1)
    second = torch.nn.functional.normalize(second, dim=1)
    same = torch.arange(first.shape[0], device=first.device)
    return torch.nn.functional.cross_entropy(first @ second.T / temperature, same)
