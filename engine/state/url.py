"""The URL of the state store: where it comes from, and how it may be shown."""

from __future__ import annotations

import os
from urllib.parse import quote, urlsplit

from engine.core.errors import StateError

URL_VARIABLE = "RECALL_STATE_URL"
"""Environment variable that stands in for `state.url`; the way to keep a password out of the configuration."""

UNREADABLE = "(unreadable URL)"

SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
    "redis+cluster": "redis",
    "rediss+cluster": "rediss",
}


def state_url(configured: str, password_file: str = "") -> str:
    """Return the URL of the state store: the environment's RECALL_STATE_URL, or what the configuration says.

    Args:
        configured: `state.url`.
        password_file: a file whose first line is the password, instead of one in the URL; empty: none.

    Raises:
        StateError: the file cannot be read, or there is no URL that the password could be for.
    """
    url = os.environ.get(URL_VARIABLE) or configured
    if not password_file:
        return url
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise StateError("state.password_file is set, but no URL of a store that asks for a password")
    try:
        with open(password_file, encoding="utf-8") as file:
            password = file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise StateError(f"state.password_file: {password_file} cannot be read: {why}") from None
    if not password:
        raise StateError(f"state.password_file: the first line of {password_file} is empty")
    before, at, where = rest.rpartition("@")
    user = before.partition(":")[0] if at else ""
    return f"{scheme}://{user}:{quote(password, safe='')}@{where}"


def address_of(url: str) -> str:
    """Return a URL as it may be shown: without user, password and options."""
    try:
        parts = urlsplit(url)
        where = parts.path if parts.scheme == "unix" else (parts.netloc.rpartition("@")[2] or "localhost")
        # A password that is not percent-encoded may end what is taken for the host.
        broken = bool(parts.netloc) and "@" in f"{parts.path}{parts.query}{parts.fragment}"
    except ValueError:
        broken = True
    return UNREADABLE if broken else f"{parts.scheme}://{where}"
