"""What a build learns about a feature from a column of the catalogue: its vocabulary, quantiles or scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.core.errors import ConfigError
from engine.core.keys import keys_of
from engine.core.types import AnyArray, Float64Array, Int64Array
from engine.data.columns import MISSING_INT, TextColumn
from engine.models.features.codes import AUTHOR, CITY, DEVICE, source_of
from engine.models.spec import CONTEXT, HOUR, HOURS, ITEM_ID, USER_ID, Feature, Side

_TIMES = ("published_at",)
_FILES = {"user": "users.parquet", "item": "items.parquet"}
OWN_ID = {"user": USER_ID, "item": ITEM_ID}


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a build learnt about one feature.

    Attributes:
        values: sorted int64[v], the number that code 1 + i stands for; None where codes are those of the column.
        keys: int64[v], the key of the id or string behind code 1 + i, by which the next build finds it again; None for
            what is no table.
        edges: float64[e], bounds of the buckets, rising.
        moments: float64[2], mean and deviation of a number.
        words: what the codes of the column stand for; None where they are no strings.
    """

    values: Int64Array | None = None
    keys: Int64Array | None = None
    edges: Float64Array | None = None
    moments: Float64Array | None = None
    words: TextColumn | None = None


def learn(
    side: Side, feature: Feature, rows: int, columns: Mapping[str, AnyArray], where: str
) -> tuple[int, Learnt]:
    """Return how many codes a feature has, and what is learnt about it."""
    name = feature.name
    hashed = feature.lookup == "hash" and feature.kind == "id"
    if feature.lookup == "hash" and feature.kind != "id":
        raise ConfigError(
            f'only features of kind "id" are hashed, {name!r} is {feature.kind!r}', f"{where}.lookup"
        )
    if hashed and feature.size < 2:
        raise ConfigError("a hashed id needs the number of its codes, 2 or more", f"{where}.size")
    if name.startswith(CONTEXT):
        if side == "item":
            raise ConfigError(f"{name!r} is known of the request, not of an item", f"{where}.name")
        if name == HOUR:
            _wants(feature, ("categorical",), "an hour", where)
            return HOURS + 1, Learnt()
        if name != CITY and not name.startswith(DEVICE):
            raise ConfigError(f"{name!r} is none of {CITY}, {HOUR} and {DEVICE}ATTRIBUTE", f"{where}.name")
        _wants(feature, ("categorical", "id"), "text", where)
    source = source_of(name)
    if source == OWN_ID[side]:
        _wants(feature, ("id",), "an id", where)
        keys = columns.get(f"{source}.keys", np.arange(rows, dtype=np.int64))
        return (feature.size if hashed else rows + 1), Learnt(keys=None if hashed else keys)
    if f"{source}.offsets" in columns:
        _wants(feature, ("multi",), "lists of strings", where)
        words = TextColumn.load(columns, f"{source}.vocabulary")
        return len(words) + 1, Learnt(keys=_keys_of(words), words=words)
    if source not in columns:
        there = sorted({key.split(".")[0] for key in columns if "." not in key or key.endswith(".offsets")})
        raise ConfigError(
            f"{_FILES[side]} has no column {source!r}; it has {', '.join(there) or 'none'}", f"{where}.name"
        )
    values = columns[source]
    if f"{source}.vocabulary.offsets" in columns:
        _wants(feature, ("id", "categorical"), "strings", where)
        words = TextColumn.load(columns, f"{source}.vocabulary")
        size = feature.size if hashed else len(words) + 1
        return size, Learnt(keys=_keys_of(words), words=words)
    if source == AUTHOR and side == "item":
        _wants(feature, ("id", "categorical"), "author ids", where)
        keys = columns.get("author.keys", np.arange(int(values.max(initial=-1)) + 1, dtype=np.int64))
        return (feature.size if hashed else keys.size + 1), Learnt(keys=keys)
    if feature.kind == "numeric":
        return _learn_number(feature, reals_of(values, source))
    if values.dtype != np.int64:
        _wants(feature, ("numeric",), f"{values.dtype} numbers", where)
    if feature.kind == "multi":
        raise ConfigError(f"column {source!r} of {_FILES[side]} holds integers, no lists", f"{where}.kind")
    if hashed:
        return feature.size, Learnt()
    distinct = np.unique(values[values != MISSING_INT])
    return distinct.size + 1, Learnt(values=distinct)


def _learn_number(feature: Feature, reals: Float64Array) -> tuple[int, Learnt]:
    known = reals[~np.isnan(reals)]
    if feature.scale == "bucket":
        quantiles = np.linspace(0, 1, feature.buckets + 1)[1:-1]
        edges = np.unique(np.quantile(known, quantiles)) if known.size else np.empty(0)
        return edges.size + 2, Learnt(edges=edges)
    values = logged(known) if feature.scale == "log" else known
    mean = float(values.mean()) if values.size else 0.0
    deviation = float(values.std()) if values.size else 1.0
    return 0, Learnt(moments=np.array([mean, deviation if deviation > 0 else 1.0]))


def _wants(feature: Feature, kinds: tuple[str, ...], holds: str, where: str) -> None:
    if feature.kind not in kinds:
        raise ConfigError(
            f"{feature.name!r} holds {holds}, which {feature.kind!r} does not fit: {' or '.join(kinds)} does",
            f"{where}.kind",
        )


def _keys_of(words: TextColumn) -> Int64Array:
    return keys_of(words.arrow().to_pylist())


def reals_of(values: AnyArray, name: str) -> Float64Array:
    """float64[n]: NaN where missing."""
    reals = values.astype(np.float64)
    if values.dtype == np.int64:
        reals[values == MISSING_INT] = np.nan
        if name in _TIMES:
            reals[values < 0] = np.nan
    reals[np.isinf(reals)] = np.nan
    return reals


def logged(values: Float64Array) -> Float64Array:
    """sign(x) log(1 + |x|): as the logarithm for counts, and defined for everything."""
    logarithms: Float64Array = np.sign(values) * np.log1p(np.abs(values))
    return logarithms
