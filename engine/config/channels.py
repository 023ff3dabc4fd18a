"""What the table of a channel says besides its options: whose snapshot it loads, and its deadline."""

from __future__ import annotations

from typing import Any

from engine.core.channel import Channel
from engine.core.errors import ConfigError
from engine.core.options import Options, build_parameters
from engine.plugins import channel_class


def checked_deadline(value: Any, kind: type[Channel], field: str) -> float:
    """Refuse a `deadline_ms` that is no time, or that would have no effect."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"expected milliseconds above 0, got {value!r}", field)
    if kind.inline:
        text = "the channel runs on the compute thread, where nothing stops it; only others have a deadline"
        raise ConfigError(text, field)
    return float(value)


def check_lender(name: str, lender: Any, types: dict[str, str], lenders: dict[str, str]) -> None:
    """Refuse a `snapshot` that cannot be loaded by the channel that names it."""
    text = ""
    if not isinstance(lender, str) or lender not in types or lender == name:
        others = ", ".join(other for other in types if other != name)
        text = f"expected the name of another channel, got {lender!r}; declared: {others or 'none'}"
    elif lender in lenders:
        text = f"{lender!r} has no snapshot of its own; name {lenders[lender]!r}, whose snapshot it loads"
    else:
        mine, theirs = channel_class(types[name]), channel_class(types[lender])
        if not (mine.needs_build and theirs.needs_build):
            text = f"{(name if theirs.needs_build else lender)!r} has no snapshot: it is not built"
        elif getattr(mine.build, "__func__", mine) is not getattr(theirs.build, "__func__", theirs):
            text = (
                f"{lender!r} is a {types[lender]!r}, which builds other arrays than a {types[name]!r} loads"
            )
    if text:
        raise ConfigError(text, f"channels.{name}.snapshot")


def with_lent(own: Options, lent: Options, lender: str, field: str) -> Options:
    """Return a channel's options with those that the build reads taken from the channel whose snapshot it loads.

    Raises:
        ConfigError: it sets one of them itself, to something else.
    """
    built = build_parameters(lent)
    for option in built:
        if option in own.model_fields_set and getattr(own, option) != getattr(lent, option):
            text = f"the snapshot is that of {lender!r}, which is built with {getattr(lent, option)!r}"
            raise ConfigError(f"{text}; leave it out, or leave `snapshot` out", f"{field}.{option}")
    values = {name: getattr(lent if name in built else own, name) for name in type(own).model_fields}
    return type(own).model_construct(_fields_set=set(own.model_fields_set), **values)
