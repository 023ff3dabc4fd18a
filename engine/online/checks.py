"""What the readers of requests share: the rules for ids, texts and times, and how a breach is worded."""

from __future__ import annotations

from collections.abc import Iterable

from engine.data.ids import MAX_ID_BYTES, IdKind

MAX_TEXT_BYTES = 256
MAX_TIME = 4_102_444_800
"""2100-01-01T00:00:00Z: later than any time that is meant, so milliseconds given for seconds are caught."""

_KEY_RULE = f"expected 1 to {MAX_ID_BYTES} bytes of UTF-8 without a NUL"
_SHOWN = 64
_NAMED = 16


def is_key(key: str) -> bool:
    """Whether a string can be an id."""
    # NumPy drops NULs at the end of a string, so a key with one would be taken for another.
    return 0 < len(key.encode()) <= MAX_ID_BYTES and "\0" not in key


def fits(text: str, most: int) -> bool:
    """Whether a text has at most `most` bytes of UTF-8."""
    return len(text) * 4 <= most or len(text.encode()) <= most


def bad_key(key: str) -> str:
    """Say what is wrong with a string that is no key."""
    return f"{_KEY_RULE}, got {shown(key)}"


def bad_number(value: int) -> str:
    """Say what is wrong with an id below 0."""
    return f"expected 0 or more, got {value}"


def bad_kind(wanted: str, id_kind: IdKind) -> str:
    """Say what is wrong with an id in the field of the other type; `wanted` is the right one."""
    return f"expected {wanted} instead: ids of this catalogue are of type {id_kind}"


def bad_range(value: float, low: float, high: float) -> str:
    """Say what is wrong with a number outside its range."""
    return f"expected {low} to {high}, got {value}"


def bad_text(text: str, most: int) -> str:
    """Say what is wrong with a text that does not fit."""
    return f"expected at most {most} bytes of UTF-8, got {len(text.encode())}"


def bad_count(count: int, most: int) -> str:
    """Say what is wrong with a list that is too long."""
    return f"expected at most {most} entries, got {count}"


def names(known: Iterable[str]) -> str:
    """Return names with commas between them, the first 16 of many."""
    listed = list(known)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more


def shown(text: str) -> str:
    """Return the text in quotes, cut, so that nobody can blow up an error with what it quotes."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}..."
