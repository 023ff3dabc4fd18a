"""The encoder of one side, users or items: from columns to codes and floats, in a build and while serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from engine.core.channel import SnapshotSink
from engine.core.keys import keys_of
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array
from engine.data.columns import MISSING_INT, TextColumn
from engine.models.encoded import Encoded, Multi
from engine.models.features.codes import hash_codes, moved_codes, source_of
from engine.models.features.learning import OWN_ID, Learnt, learn, logged, reals_of
from engine.models.spec import HOUR, Feature, Side


class Encoder:
    """Encodes the features of one side.

    Attributes:
        features: with their sizes.
        rows: how many rows of users or items the build knew.
    """

    def __init__(
        self, side: Side, features: tuple[Feature, ...], rows: int, learnt: Sequence[Learnt]
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
            mine = learn(side, feature, rows, columns, where)
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
            learnt.append(Learnt(**own, words=words))
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
        learnt: Learnt,
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
            reals = reals_of(values, name)
            bucket = 1 + np.searchsorted(learnt.edges, reals, "right")
            return np.where(np.isnan(reals), 0, bucket).astype(np.int32)
        if feature.lookup == "hash" and feature.kind == "id":
            return self._hashed(feature, learnt, name, columns, rows)
        if name == OWN_ID[self.side]:
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
        learnt: Learnt,
        name: str,
        columns: Mapping[str, AnyArray],
        rows: Int32Array,
    ) -> Int32Array:
        if name == OWN_ID[self.side]:
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


def _scaled(
    feature: Feature, learnt: Learnt, values: AnyArray | None, n: int, name: str
) -> list[Float32Array]:
    """Two columns: value of mean 0 and deviation 1 (0 where missing), missing flag."""
    assert learnt.moments is not None
    if values is None:
        return [np.zeros(n, np.float32), np.ones(n, np.float32)]
    reals = reals_of(values, name)
    missing = np.isnan(reals)
    if feature.scale == "log":
        reals = logged(reals)
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
