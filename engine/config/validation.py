"""From the values of a table to its typed options; what does not fit is one sentence that names the key."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import ValidationError

from engine.core.errors import ConfigError
from engine.core.options import Options


def typed(model: type[Any], values: dict[str, Any], field: str) -> Any:
    """Return the values of a table as its model.

    Args:
        model: of the table, an `Options`.
        values: as they stand in the document.
        field: dotted path of the table, for errors; empty: the whole document.

    Raises:
        ConfigError: the first value that does not fit, or a key that the table does not have.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # Errors are raised without their cause: pydantic's own text quotes what it got, and that may be a URL with a
        # password.
        first = error.errors()[0]
        path = ".".join([*([field] if field else []), *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"unknown key; known: {', '.join(_known_keys(model, first['loc'][:-1]))}", path
            ) from None
        raise ConfigError(
            f"{first['msg'].removeprefix('Value error, ')} (got {_without_password(repr(first['input']))})",
            path,
        ) from None


def _without_password(text: str) -> str:
    """Return a text without the user and password of any URL in it."""
    return re.sub(r"://\S*@", "://***@", text)


def _known_keys(model: type[Any], path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the table at a path inside a model; of the model itself where the path leads elsewhere."""
    inner: Any = model
    for part in path:
        if isinstance(inner, type) and issubclass(inner, Options) and part in inner.model_fields:
            inner = inner.model_fields[str(part)].annotation
        else:  # a table of tables: the value type is its last argument
            inner = (get_args(inner) or (None,))[-1]
    return list((inner if isinstance(inner, type) and issubclass(inner, Options) else model).model_fields)
