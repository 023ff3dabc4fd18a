"""The form of a data set: its files, their columns, and the rules that the values keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core.errors import DatasetError
from engine.data.ids import MAX_ID_BYTES, IdKind, valid_string_ids

File: TypeAlias = Literal["interactions", "items", "users", "follows", "authors"]
"""A file of a data set; on disk it is called `<file>.parquet`."""

FILES: tuple[File, ...] = ("interactions", "items", "users", "follows", "authors")

SPLITS = ("train", "tune", "test")
"""The values of the `split` column; their positions are the codes of `EventLog.splits`."""

LATEST = 4_102_444_800
"""2100-01-01 UTC: a later time is one in milliseconds that was taken for seconds."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What values must keep. `text` completes "n of m rows …"; `offenders` counts them in an array."""

    text: str
    offenders: Callable[[Any], int]


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of column types: how people call it, which pyarrow types belong to it, and its rules."""

    name: str
    accepts: Callable[[Any], bool]
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class Column:
    """A column that the form knows. `unique`: no value stands twice."""

    name: str
    kind: Kind
    required: bool = False
    unique: bool = False


def is_text(type_: Any) -> bool:
    """Whether a pyarrow type holds strings, dictionary-encoded or not."""
    plain_type = type_.value_type if pa.types.is_dictionary(type_) else type_
    return bool(pa.types.is_string(plain_type) or pa.types.is_large_string(plain_type))


def is_tags(type_: Any) -> bool:
    """Whether a pyarrow type holds lists of strings."""
    return bool((pa.types.is_list(type_) or pa.types.is_large_list(type_)) and is_text(type_.value_type))


def is_number(type_: Any) -> bool:
    """Whether a pyarrow type holds integers or floats."""
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_))


def file_name(file: File) -> str:
    """Return what a file is called on disk."""
    return f"{file}.parquet"


def form(id_type: IdKind) -> dict[File, tuple[Column, ...]]:
    """Return the columns of each file; any others are feature columns, which keep no rules."""
    key, link = _ID[id_type], _OPTIONAL_ID[id_type]
    return {
        "interactions": (
            Column("user_id", key, required=True),
            Column("item_id", key, required=True),
            Column("event", _EVENT, required=True),
            Column("timestamp", _TIME),
            Column("split", _SPLIT),
            Column("rating", _RATING),
            Column("watch_seconds", _NUMBER),
            Column("freq", _NUMBER),
            Column("timestamp_imputed", _FLAG),
        ),
        "items": (
            Column("item_id", key, required=True, unique=True),
            Column("author_id", link),
            Column("published_at", _OPTIONAL_TIME),
            Column("title", _TEXT),
            Column("tags", _TAGS),
            Column("city", _TEXT),
            Column("latitude", _LATITUDE),
            Column("longitude", _LONGITUDE),
            Column("quality", _SHARE),
            Column("duration_seconds", _NUMBER),
        ),
        "users": (Column("user_id", key, required=True, unique=True), Column("city", _TEXT)),
        "follows": (
            Column("user_id", key, required=True),
            Column("author_id", key, required=True),
            Column("timestamp", _TIME, required=True),
        ),
        "authors": (Column("author_id", key, required=True, unique=True), Column("name", _TEXT)),
    }


def check_types(file: str, schema: Any, columns: Iterable[Column]) -> None:
    """Hold a file's schema to the form.

    Raises:
        DatasetError: naming the first column that is missing, stands twice or has another type.
    """
    names = list(schema.names)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DatasetError(f"stands {names.count(twice[0])} times", file, twice[0])
    for column in columns:
        if column.name not in names:
            if column.required:
                raise DatasetError(
                    f"is missing; the file has {', '.join(names) or 'none'}", file, column.name
                )
            continue
        type_ = schema.field(column.name).type
        if not column.kind.accepts(type_):
            raise DatasetError(f"must hold {column.kind.name}, not {type_}", file, column.name)


def check_values(file: str, columns: Iterable[Column], batches: Iterable[Any]) -> int:
    """Hold the values of a file to the form.

    Args:
        file: the file's name, for the error.
        columns: those that the batches have.
        batches: pyarrow record batches.

    Returns:
        How many rows they have.

    Raises:
        DatasetError: naming the first rule broken, with how many rows of the whole file break it.
    """
    rules = [(column, rule) for column in columns for rule in column.kind.rules]
    broken = [0] * len(rules)
    rows = 0
    for batch in batches:
        rows += batch.num_rows
        plain = {column.name: _plain(file, column.name, batch.column(column.name)) for column in columns}
        for at, (column, rule) in enumerate(rules):
            broken[at] += rule.offenders(plain[column.name])
    for (column, rule), count in zip(rules, broken, strict=True):
        if count:
            raise DatasetError(f"{count:,} of {rows:,} rows {rule.text}", file, column.name)
    return rows


def feature_column(name: str) -> Column:
    """Return a column that keeps no rule but that its strings are UTF-8."""
    return Column(name, _ANY)


def _plain(file: str, column: str, values: Any) -> Any:
    """The array without dictionary encoding, its strings known to be UTF-8."""
    array = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    if is_text(array.type) or is_tags(array.type):
        # pyarrow reads bytes as strings unseen; they would fail later, when somebody looks at them.
        try:
            array.validate(full=True)
        except pa.ArrowInvalid as error:
            raise DatasetError(f"is not UTF-8: {error}", file, column) from error
    return array


def _count(mask: Any) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _integers(values: Any) -> Any:
    # Unsigned integers beyond int64 turn negative, which every rule about integers refuses.
    return values.cast(pa.int64(), safe=False)


def _reals(values: Any) -> Any:
    # Not safe: that would refuse integers that a float rounds.
    return values.cast(pa.float64(), safe=False)


def _bad_strings(values: Any) -> int:
    # Missing ids are counted by a rule of their own, or allowed.
    return int(np.count_nonzero(~valid_string_ids(values))) - int(values.null_count)


def _outside(low: float, high: float) -> Callable[[Any], int]:
    # A comparison with NaN is false: NaN is a missing value here, as null is.
    def offenders(values: Any) -> int:
        reals = _reals(values)
        return _count(pc.or_(pc.less(reals, low), pc.greater(reals, high)))

    return offenders


_NOT_NULL = Rule("are null", lambda values: int(values.null_count))
_INT_ID = Rule("are negative or beyond int64", lambda values: _count(pc.less(_integers(values), 0)))
_STRING_ID = Rule(f"are not 1 to {MAX_ID_BYTES} bytes long, or hold a NUL", _bad_strings)
_NOT_EARLY = Rule("are negative", lambda values: _count(pc.less(_integers(values), 0)))
_NOT_LATE = Rule(
    "lie after 2100-01-01 (times are seconds since the epoch)",
    lambda values: _count(pc.greater(_integers(values), LATEST)),
)
_NOT_EMPTY = Rule("are empty", lambda values: _count(pc.equal(pc.binary_length(values), 0)))
_KNOWN_SPLIT = Rule(
    f"hold none of {', '.join(SPLITS)}",
    lambda values: _count(pc.invert(pc.is_in(values, pa.array(SPLITS, values.type)))),
)
_FINITE = Rule("are NaN or infinite", lambda values: _count(pc.invert(pc.is_finite(_reals(values)))))

_ANY = Kind("anything", lambda _: True)
_TEXT = Kind("strings", is_text)
_TAGS = Kind("lists of strings", is_tags)
_NUMBER = Kind("numbers", is_number)
_FLAG = Kind("truth values", lambda type_: pa.types.is_boolean(type_) or pa.types.is_integer(type_))
_ID: dict[IdKind, Kind] = {
    "int64": Kind(
        'integers (or set id_type = "string" in dataset.toml)', pa.types.is_integer, (_NOT_NULL, _INT_ID)
    ),
    "string": Kind('strings (id_type is "string")', is_text, (_NOT_NULL, _STRING_ID)),
}
_OPTIONAL_ID: dict[IdKind, Kind] = {
    id_type: Kind(kind.name, kind.accepts, kind.rules[1:]) for id_type, kind in _ID.items()
}
_EVENT = Kind("strings", is_text, (_NOT_NULL, _NOT_EMPTY))
_OPTIONAL_TIME = Kind("integers (seconds since the epoch)", pa.types.is_integer, (_NOT_EARLY, _NOT_LATE))
_TIME = Kind(_OPTIONAL_TIME.name, _OPTIONAL_TIME.accepts, (_NOT_NULL, *_OPTIONAL_TIME.rules))
_SPLIT = Kind("strings", is_text, (_KNOWN_SPLIT,))
_RATING = Kind("numbers", is_number, (_FINITE,))
_LATITUDE = Kind("numbers (degrees)", is_number, (Rule("lie outside -90 … 90", _outside(-90, 90)),))
_LONGITUDE = Kind("numbers (degrees)", is_number, (Rule("lie outside -180 … 180", _outside(-180, 180)),))
_SHARE = Kind("numbers from 0 to 1", is_number, (Rule("lie outside 0 … 1", _outside(0, 1)),))
