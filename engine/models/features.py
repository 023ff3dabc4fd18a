"""Features of users and items: columns of the catalogue and of the request as codes and floats.

A build learns an `Encoder` per side from the columns of the catalogue: which code each value has, where the quantiles of
a number lie. It is written into the model's snapshot, and encodes while serving as it did in training. Whatever a build
did not see is code 0, or the missing flag of a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba import njit

from engine.core.channel import SnapshotSink
from engine.core.errors import ConfigError
from engine.core.keys import keys_of
from engine.core.query import History, QueryBatch
from engine.core.types import (
    NO_ROW,
    AnyArray,
    Float32Array,
    Float64Array,
    Int32Array,
    Int64Array,
)
from engine.data.columns import MISSING_INT, TextColumn
from engine.models.encoded import Encoded, EncodedUsers, Multi
from engine.models.spec import CONTEXT, HOUR, HOURS, ITEM_ID, USER_ID, Feature, Side

AUTHOR = "author"
CITY = f"{CONTEXT}city"
DEVICE = f"{CONTEXT}device."
_TIMES = ("published_at",)
_FILES = {"user": "users.parquet", "item": "items.parquet"}
_OWN_ID = {"user": USER_ID, "item": ITEM_ID}
_LARGEST_TABLE = 1 << 31


@dataclass(frozen=True, slots=True)
class _Learnt:
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


class Encoder:
    """Encodes the features of one side.

    Attributes:
        features: with their sizes.
        rows: how many rows of users or items the build knew.
    """

    def __init__(
        self, side: Side, features: tuple[Feature, ...], rows: int, learnt: Sequence[_Learnt]
    ) -> None:
        self.side: Side = side
        self.features = features
        self.rows = rows
        self._learnt = tuple(learnt)

    @classmethod
    def fit(
        cls,
        side: Side,
        features: Sequence[Feature],
        rows: int,
        columns: Mapping[str, AnyArray],
        field: str,
        previous: Encoder | None = None,
    ) -> Self:
        """Learn what the codes mean.

        Args:
            side: whose features.
            features: as declared; their sizes need not be known.
            rows: users or items of the catalogue.
            columns: `Catalogue.item_columns` or `.user_columns`.
            field: dotted path of the features in the configuration, for errors.
            previous: the encoder of a model that is trained on: quantiles and scales stay as they were there.

        Raises:
            ConfigError: a feature names what the data has not, or what is of another type.
        """
        known = {} if previous is None else {f.name: at for at, f in enumerate(previous.features)}
        sized, learnt = [], []
        for at, feature in enumerate(features):
            where = f"{field}.{at}"
            mine = _learn(side, feature, rows, columns, where)
            if previous is not None and feature.name in known:
                before = previous._learnt[known[feature.name]]
                if before.edges is not None and mine[1].edges is not None:
                    mine = before.edges.size + 2, before
                elif before.moments is not None and mine[1].moments is not None:
                    mine = 0, before
            sized.append(feature.model_copy(update={"size": mine[0]}))
            learnt.append(mine[1])
        return cls(side, tuple(sized), rows, learnt)

    # --- to disk and back --------------------------------------------------------------------------------------

    def save(self, sink: SnapshotSink) -> None:
        """Write the arrays `features.<side>.*`; features go by their number: names need not be names of files."""
        prefix = f"features.{self.side}"
        sink.write(f"{prefix}.rows", np.array([self.rows], np.int64))
        for at, learnt in enumerate(self._learnt):
            for name in ("values", "keys", "edges", "moments"):
                array = getattr(learnt, name)
                if array is not None:
                    sink.write(f"{prefix}.{at}.{name}", array)
            if learnt.words is not None:
                learnt.words.save(sink, f"{prefix}.{at}.words")

    @classmethod
    def load(cls, side: Side, features: tuple[Feature, ...], arrays: Mapping[str, AnyArray]) -> Self:
        """Return what `save` wrote."""
        prefix = f"features.{side}"
        learnt = []
        for at in range(len(features)):
            own = {
                name: arrays.get(f"{prefix}.{at}.{name}") for name in ("values", "keys", "edges", "moments")
            }
            words = (
                TextColumn.load(arrays, f"{prefix}.{at}.words")
                if f"{prefix}.{at}.words.offsets" in arrays
                else None
            )
            learnt.append(_Learnt(**own, words=words))
        return cls(side, features, int(arrays[f"{prefix}.rows"][0]), learnt)

    # --- encoding ----------------------------------------------------------------------------------------------

    def encode(self, columns: Mapping[str, AnyArray], rows: Int32Array) -> Encoded:
        """Encode some rows.

        Args:
            columns: values of just these rows under the names of the catalogue's columns (`<name>.offsets` and
                `<name>.codes` of lists), each [n]; what is not there is missing. Codes of strings, authors and tags
                are those of the catalogue that the encoder learnt from, and beyond them unknown.
            rows: int32[n], their rows; from `self.rows` on unknown.

        Returns:
            The encoded rows.
        """
        n = rows.size
        codes, multi, numbers = [], [], []
        for feature, learnt in zip(self.features, self._learnt, strict=True):
            name = source_of(feature.name)
            if feature.multi:
                multi.append(_many(columns, name, n, feature.size))
            elif feature.coded:
                codes.append(self._codes(feature, learnt, name, columns, rows))
            else:
                numbers += _scaled(feature, learnt, columns.get(name), n, name)
        return Encoded(
            np.stack(codes, 1) if codes else np.empty((n, 0), np.int32),
            tuple(multi),
            np.stack(numbers, 1) if numbers else np.empty((n, 0), np.float32),
        )

    def _codes(
        self,
        feature: Feature,
        learnt: _Learnt,
        name: str,
        columns: Mapping[str, AnyArray],
        rows: Int32Array,
    ) -> Int32Array:
        """int32[n]: the codes of one feature."""
        if feature.name == HOUR:
            return np.zeros(rows.size, np.int32)
        if feature.kind == "numeric":
            assert learnt.edges is not None
            values = columns.get(name)
            if values is None:
                return np.zeros(rows.size, np.int32)
            reals = _reals(values, name)
            bucket = 1 + np.searchsorted(learnt.edges, reals, "right")
            return np.where(np.isnan(reals), 0, bucket).astype(np.int32)
        if feature.lookup == "hash" and feature.kind == "id":
            return self._hashed(feature, learnt, name, columns, rows)
        if name == _OWN_ID[self.side]:
            return np.where((rows >= 0) & (rows < self.rows), rows + 1, 0).astype(np.int32)
        values = columns.get(name)
        if values is None:
            return np.zeros(rows.size, np.int32)
        if learnt.values is not None:
            place = np.searchsorted(learnt.values, values)
            place = np.minimum(place, max(learnt.values.size - 1, 0))
            known = (learnt.values[place] == values) if learnt.values.size else np.zeros(rows.size, np.bool_)
            return np.where(known, place + 1, 0).astype(np.int32)
        coded = values.astype(np.int32) + 1
        return np.where((coded > 0) & (coded < feature.size), coded, 0).astype(np.int32)

    def _hashed(
        self,
        feature: Feature,
        learnt: _Learnt,
        name: str,
        columns: Mapping[str, AnyArray],
        rows: Int32Array,
    ) -> Int32Array:
        if name == _OWN_ID[self.side]:
            keys = columns.get(f"{name}.keys")
            if keys is None:
                return np.zeros(rows.size, np.int32)
            return hash_codes(keys, feature.size)
        values = columns.get(name)
        if values is None:
            return np.zeros(rows.size, np.int32)
        if learnt.keys is None:
            return np.where(values == MISSING_INT, 0, hash_codes(values, feature.size)).astype(np.int32)
        known = (values >= 0) & (values < learnt.keys.size)
        codes = np.zeros(rows.size, np.int32)
        codes[known] = hash_codes(learnt.keys[values[known]], feature.size)
        return codes

    def words(self, name: str) -> dict[str, int]:
        """Return the code of each string of a feature of one code; empty where it is none of strings."""
        for feature, learnt in zip(self.features, self._learnt, strict=True):
            if feature.name == name and learnt.words is not None:
                texts = learnt.words.arrow().to_pylist()
                if feature.lookup == "hash" and feature.kind == "id":
                    return dict(zip(texts, hash_codes(keys_of(texts), feature.size).tolist(), strict=True))
                return {text: code + 1 for code, text in enumerate(texts)}
        return {}

    def code_column(self, name: str) -> int:
        """Return which column of `Encoded.codes` a feature is; -1 where it is not there."""
        coded = [feature.name for feature in self.features if feature.coded]
        return coded.index(name) if name in coded else -1

    def moved(self, at: int, previous: Encoder, there: int) -> Int64Array | None:
        """Return which row of a previous encoder's table each code of a feature had.

        Args:
            at: the feature, here.
            previous: another encoder of the same side.
            there: the same feature's position in it.

        Returns:
            int64[size]: rows of the previous table; 0, "missing", for what is new. None where the two tables mean
            different things.
        """
        here, before = self._learnt[at], previous._learnt[there]
        mine, theirs = self.features[at], previous.features[there]
        if (mine.kind, mine.lookup, mine.dimension) != (theirs.kind, theirs.lookup, theirs.dimension):
            return None
        if mine.name == HOUR or (mine.kind == "numeric" and here.edges is before.edges):
            return np.arange(mine.size, dtype=np.int64)
        if mine.lookup == "hash" and mine.kind == "id":
            return np.arange(mine.size, dtype=np.int64) if mine.size == theirs.size else None
        now = here.keys if here.values is None else here.values
        then = before.keys if before.values is None else before.values
        if now is None or then is None:
            return None
        return moved_codes(now, then)


def moved_codes(now: Int64Array, then: Int64Array) -> Int64Array:
    """Return int64[now.size + 1]: for code 0, then 1 + position in `now`, the code of the same key in `then`, or 0."""
    order = np.argsort(then, kind="stable")
    place = np.minimum(np.searchsorted(then[order], now), max(then.size - 1, 0))
    found = order[place] if then.size else np.zeros(now.size, np.int64)
    same = (then[found] == now) if then.size else np.zeros(now.size, np.bool_)
    return np.concatenate((np.zeros(1, np.int64), np.where(same, found + 1, 0)))


def source_of(name: str) -> str:
    """Return the catalogue's column that a feature is read from: of a request's, the user's column of the same name."""
    if name == CITY:
        return "city"
    return name.removeprefix(DEVICE)


def hour_codes(timestamps: Int64Array) -> Int32Array:
    """Return int32[n]: the code of `context.hour` at some times, seconds since the epoch; 0 for 0, not known."""
    return np.where(timestamps > 0, timestamps // 3600 % HOURS + 1, 0).astype(np.int32)


def hash_codes(keys: AnyArray, size: int) -> Int32Array:
    """Return int32[n]: keys spread over the codes 1 to size - 1 (the finaliser of SplitMix64, Steele et al. 2014)."""
    z = keys.astype(np.int64).view(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (1 + z % np.uint64(size - 1)).astype(np.int32)


# --- learning -----------------------------------------------------------------------------------------------------


def _learn(
    side: Side, feature: Feature, rows: int, columns: Mapping[str, AnyArray], where: str
) -> tuple[int, _Learnt]:
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
            return HOURS + 1, _Learnt()
        if name != CITY and not name.startswith(DEVICE):
            raise ConfigError(f"{name!r} is none of {CITY}, {HOUR} and {DEVICE}ATTRIBUTE", f"{where}.name")
        _wants(feature, ("categorical", "id"), "text", where)
    source = source_of(name)
    if source == _OWN_ID[side]:
        _wants(feature, ("id",), "an id", where)
        keys = columns.get(f"{source}.keys", np.arange(rows, dtype=np.int64))
        return (feature.size if hashed else rows + 1), _Learnt(keys=None if hashed else keys)
    if f"{source}.offsets" in columns:
        _wants(feature, ("multi",), "lists of strings", where)
        words = TextColumn.load(columns, f"{source}.vocabulary")
        return len(words) + 1, _Learnt(keys=_keys_of(words), words=words)
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
        return size, _Learnt(keys=_keys_of(words), words=words)
    if source == AUTHOR and side == "item":
        _wants(feature, ("id", "categorical"), "author ids", where)
        keys = columns.get("author.keys", np.arange(int(values.max(initial=-1)) + 1, dtype=np.int64))
        return (feature.size if hashed else keys.size + 1), _Learnt(keys=keys)
    if feature.kind == "numeric":
        return _learn_number(feature, _reals(values, source))
    if values.dtype != np.int64:
        _wants(feature, ("numeric",), f"{values.dtype} numbers", where)
    if feature.kind == "multi":
        raise ConfigError(f"column {source!r} of {_FILES[side]} holds integers, no lists", f"{where}.kind")
    if hashed:
        return feature.size, _Learnt()
    distinct = np.unique(values[values != MISSING_INT])
    return distinct.size + 1, _Learnt(values=distinct)


def _learn_number(feature: Feature, reals: Float64Array) -> tuple[int, _Learnt]:
    known = reals[~np.isnan(reals)]
    if feature.scale == "bucket":
        quantiles = np.linspace(0, 1, feature.buckets + 1)[1:-1]
        edges = np.unique(np.quantile(known, quantiles)) if known.size else np.empty(0)
        return edges.size + 2, _Learnt(edges=edges)
    values = _logged(known) if feature.scale == "log" else known
    mean = float(values.mean()) if values.size else 0.0
    deviation = float(values.std()) if values.size else 1.0
    return 0, _Learnt(moments=np.array([mean, deviation if deviation > 0 else 1.0]))


def _wants(feature: Feature, kinds: tuple[str, ...], holds: str, where: str) -> None:
    if feature.kind not in kinds:
        raise ConfigError(
            f"{feature.name!r} holds {holds}, which {feature.kind!r} does not fit: {' or '.join(kinds)} does",
            f"{where}.kind",
        )


def _keys_of(words: TextColumn) -> Int64Array:
    return keys_of(words.arrow().to_pylist())


# --- values -------------------------------------------------------------------------------------------------------


def _reals(values: AnyArray, name: str) -> Float64Array:
    """float64[n]: NaN where missing."""
    reals = values.astype(np.float64)
    if values.dtype == np.int64:
        reals[values == MISSING_INT] = np.nan
        if name in _TIMES:
            reals[values < 0] = np.nan
    reals[np.isinf(reals)] = np.nan
    return reals


def _logged(values: Float64Array) -> Float64Array:
    """sign(x) log(1 + |x|): as the logarithm for counts, and defined for everything."""
    logged: Float64Array = np.sign(values) * np.log1p(np.abs(values))
    return logged


def _scaled(
    feature: Feature, learnt: _Learnt, values: AnyArray | None, n: int, name: str
) -> list[Float32Array]:
    """Two columns: value of mean 0 and deviation 1 (0 where missing), missing flag."""
    assert learnt.moments is not None
    if values is None:
        return [np.zeros(n, np.float32), np.ones(n, np.float32)]
    reals = _reals(values, name)
    missing = np.isnan(reals)
    if feature.scale == "log":
        reals = _logged(reals)
    mean, deviation = learnt.moments
    scaled = np.where(missing, 0.0, (reals - mean) / deviation)
    return [scaled.astype(np.float32), missing.astype(np.float32)]


def _many(columns: Mapping[str, AnyArray], name: str, n: int, size: int) -> Multi:
    offsets = columns.get(f"{name}.offsets")
    if offsets is None:
        return Multi(np.empty(0, np.int32), np.zeros(n + 1, np.int64))
    codes = columns[f"{name}.codes"].astype(np.int32) + 1
    known = (codes > 0) & (codes < size)
    if known.all():
        return Multi(codes, offsets.astype(np.int64))
    before = np.concatenate((np.zeros(1, np.int64), np.cumsum(known)))
    return Multi(codes[known], before[offsets].astype(np.int64))


# --- tables of encoded rows -----------------------------------------------------------------------------------------


def save_encoded(sink: SnapshotSink, prefix: str, encoded: Encoded) -> None:
    """Write the arrays `prefix.codes`, `.numbers`, `.multi.<i>.codes` and `.multi.<i>.offsets`."""
    sink.write(f"{prefix}.codes", encoded.codes)
    sink.write(f"{prefix}.numbers", encoded.numbers)
    for at, many in enumerate(encoded.multi):
        sink.write(f"{prefix}.multi.{at}.codes", many.codes)
        sink.write(f"{prefix}.multi.{at}.offsets", many.offsets)


def load_encoded(arrays: Mapping[str, AnyArray], prefix: str) -> Encoded:
    """Return what `save_encoded` wrote."""
    multi: list[Multi] = []
    while f"{prefix}.multi.{len(multi)}.codes" in arrays:
        at = len(multi)
        multi.append(Multi(arrays[f"{prefix}.multi.{at}.codes"], arrays[f"{prefix}.multi.{at}.offsets"]))
    return Encoded(arrays[f"{prefix}.codes"], tuple(multi), arrays[f"{prefix}.numbers"])


def take_encoded(table: Encoded, rows: Int32Array) -> Encoded:
    """Return some rows of a table of encoded rows; -1, and what lies beyond the table, has nothing known.

    Args:
        table: [t] encoded rows.
        rows: int32[n].
    """
    codes = np.zeros((rows.size, table.codes.shape[1]), np.int32)
    numbers = np.zeros((rows.size, table.numbers.shape[1]), np.float32)
    if codes.shape[1] or numbers.shape[1]:
        _take(_sealed(table.codes), _sealed(table.numbers), _sealed(rows), codes, numbers)
    if not table.multi:
        return Encoded(codes, (), numbers)
    known = np.where((rows >= 0) & (rows < len(table)), rows, NO_ROW)
    multi = tuple(Multi(*_take_many(many.codes, many.offsets, known)) for many in table.multi)
    return Encoded(codes, multi, numbers)


def take_users(users: EncodedUsers, rows: Int64Array) -> EncodedUsers:
    """Return some rows of encoded users, int64[n], what they did included."""
    own = take_encoded(users, rows.astype(np.int32))
    return EncodedUsers(own.codes, own.multi, own.numbers, users.sequence[rows], users.lengths[rows])


@njit(nogil=True, cache=True)
def _take(codes, numbers, rows, out_codes, out_numbers):  # type: ignore[no-untyped-def]
    """Copy rows of a table; of those outside it say that every number is missing."""
    for r in range(rows.size):
        row = rows[r]
        if 0 <= row < codes.shape[0]:
            for c in range(codes.shape[1]):
                out_codes[r, c] = codes[row, c]
            for c in range(numbers.shape[1]):
                out_numbers[r, c] = numbers[row, c]
        else:
            for c in range(1, numbers.shape[1], 2):
                out_numbers[r, c] = np.float32(1)


def _take_many(codes: Int32Array, offsets: Int64Array, rows: AnyArray) -> tuple[Int32Array, Int64Array]:
    safe = np.maximum(rows, 0)
    counts = (
        np.where(rows >= 0, offsets[safe + 1] - offsets[safe], 0)
        if offsets.size > 1
        else np.zeros(rows.size, np.int64)
    )
    ends = np.zeros(rows.size + 1, np.int64)
    np.cumsum(counts, out=ends[1:])
    starts = offsets[safe] if offsets.size > 1 else np.zeros(rows.size, np.int64)
    at = np.arange(int(ends[-1])) + np.repeat(starts - ends[:-1], counts)
    taken: Int32Array = codes[at]
    return taken, ends


# --- queries --------------------------------------------------------------------------------------------------------


class QueryEncoder:
    """Encodes a batch of queries for the user tower: who asks, from where, when, and what they did."""

    def __init__(self, encoder: Encoder, table: Encoded, items: int, length: int) -> None:
        """Take what is needed.

        Args:
            encoder: of the user features.
            table: the encoded rows of all users of the catalogue.
            items: rows of the catalogue that have a code in sequences.
            length: newest items read; 0: the tower has no sequence.
        """
        self._table = table
        self._items = items
        self._length = length
        self._hour = encoder.code_column(HOUR)
        self._city = encoder.code_column(CITY)
        self._cities = encoder.words(CITY)
        self._hashed_user = -1
        self._hashed_size = 0
        self._devices: list[tuple[int, str, dict[str, int]]] = []
        for feature in encoder.features:
            column = encoder.code_column(feature.name)
            if feature.name == USER_ID and feature.lookup == "hash":
                self._hashed_user, self._hashed_size = column, feature.size
            if feature.name.startswith(DEVICE):
                attribute = feature.name.removeprefix(DEVICE)
                self._devices.append((column, attribute, encoder.words(feature.name)))

    def encode(self, batch: QueryBatch) -> EncodedUsers:
        """Encode a batch: what the request says of city and device stands in for what the catalogue knows."""
        own = take_encoded(self._table, batch.users)
        codes = own.codes
        if self._hour >= 0:
            codes[:, self._hour] = hour_codes(batch.now)
        if self._city >= 0:
            for q, city in enumerate(batch.cities):
                if city:
                    codes[q, self._city] = self._cities.get(city, 0)
        for column, attribute, words in self._devices:
            for q, device in enumerate(batch.devices):
                if attribute in device:
                    codes[q, column] = words.get(device[attribute], 0)
        if self._hashed_user >= 0:
            ids = batch.user_ids
            keys = ids.astype(np.int64) if ids.dtype.kind == "i" else keys_of(ids.tolist())
            hashed = hash_codes(keys, self._hashed_size)
            codes[:, self._hashed_user] = np.where(batch.guests, 0, hashed)
        sequence, lengths = encode_histories(batch.history, self._items, self._length)
        return EncodedUsers(codes, own.multi, own.numbers, sequence, lengths)


def encode_histories(history: History, items: int, length: int) -> tuple[Int32Array, Int32Array]:
    """Return what users did as the towers read it.

    Args:
        history: newest first.
        items: rows from here on have no code and are left out.
        length: newest items kept.

    Returns:
        int32[n, longest] codes (row + 1), right-aligned, newest last, 0 is padding; int32[n] lengths.
    """
    n = history.offsets.size - 1
    if not length or not history.rows.size:
        return np.zeros((n, 0), np.int32), np.zeros(n, np.int32)
    longest = int(min((history.offsets[1:] - history.offsets[:-1]).max(), length))
    codes = np.zeros((n, longest), np.int32)
    lengths = np.zeros(n, np.int32)
    _encode_histories(_sealed(history.rows), history.offsets, items, codes, lengths)
    return codes, lengths


def _sealed(array: AnyArray) -> AnyArray:
    """A read-only view: one form of the kernel is compiled."""
    view = array.view()
    view.flags.writeable = False
    return view


@njit(nogil=True, cache=True)
def _encode_histories(rows, offsets, items, codes, lengths):  # type: ignore[no-untyped-def]
    most = codes.shape[1]
    for q in range(lengths.size):
        taken = 0
        for p in range(offsets[q], offsets[q + 1]):
            row = rows[p]
            if 0 <= row < items:
                codes[q, most - 1 - taken] = row + 1
                taken += 1
                if taken == most:
                    break
        lengths[q] = taken


def encode_histories_reference(history: History, items: int, length: int) -> tuple[Int32Array, Int32Array]:
    """The plain twin of `encode_histories`: what its tests hold it to."""
    lists = []
    for q in range(history.offsets.size - 1):
        mine = history.rows[history.offsets[q] : history.offsets[q + 1]].tolist()
        lists.append([row + 1 for row in mine if 0 <= row < items])
    longest = min(max((int(d) for d in np.diff(history.offsets)), default=0), length)
    codes = np.zeros((len(lists), longest), np.int32)
    for q, mine in enumerate(lists):
        for place, code in enumerate(mine[:longest]):
            codes[q, longest - 1 - place] = code
    return codes, np.array([min(len(mine), longest) for mine in lists], np.int32)


def item_columns_of(columns: Any, rows: Int32Array) -> dict[str, AnyArray]:
    """Return what the live columns (`ItemColumns`) say of some items, for `Encoder.encode`: missing as there."""
    counts = columns.tag_counts[rows].astype(np.int64)
    starts = columns.tag_starts[rows]
    offsets = np.zeros(rows.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    at = np.arange(int(offsets[-1])) + np.repeat(starts - offsets[:-1], counts)
    return {
        "item_id.keys": columns.keys[rows],
        "author": columns.authors[rows],
        "city": columns.cities[rows],
        "published_at": columns.published_at[rows],
        "quality": columns.quality[rows],
        "latitude": columns.latitude[rows],
        "longitude": columns.longitude[rows],
        "tags.offsets": offsets,
        "tags.codes": columns.tag_codes[at],
    }


LIVE_COLUMNS = ("item_id", "author", "city", "published_at", "quality", "latitude", "longitude", "tags")
"""Columns of items that are known of what is published live; any other feature of such an item is missing."""


def encode_live(encoder: Encoder, table: Encoded, columns: Any, rows: Int32Array) -> Encoded:
    """Encode items as they are now; what the live columns do not say stays as the build had it.

    Args:
        encoder: of the item features.
        table: all items of the build, encoded; of later ones it says nothing.
        columns: the live columns, an `ItemColumns`.
        rows: int32[m].
    """
    live = encoder.encode(item_columns_of(columns, rows), rows)
    stored = take_encoded(table, rows)
    code = many = number = 0
    multi = list(live.multi)
    for feature in encoder.features:
        stays = source_of(feature.name) not in LIVE_COLUMNS
        if feature.coded:
            if stays:
                live.codes[:, code] = stored.codes[:, code]
            code += 1
        elif feature.multi:
            if stays:
                multi[many] = stored.multi[many]
            many += 1
        else:
            if stays:
                live.numbers[:, number : number + 2] = stored.numbers[:, number : number + 2]
            number += 2
    return Encoded(live.codes, tuple(multi), live.numbers)
