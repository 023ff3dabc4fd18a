"""The tokens by which callers are known, and their file, which is read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.config import SecurityConfig
from engine.core.errors import ConfigError
from engine.online.security.files import mode_of, read_file, signature_of, warn_of_readers

TOKENS_VARIABLE = "RECALL_TOKENS"
"""Environment variable with tokens, written as in the file: they count besides those of `security.tokens`."""

LOOK_SECONDS = 1.0
"""How often the file of tokens is looked at, when there are calls."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_PREFIX_BYTES = 8

_log = logging.getLogger(__name__)


class Tokens:
    """The tokens that are known, by their SHA-256; the tokens themselves are nowhere."""

    def __init__(self, file: Path | None, variable: str) -> None:
        """Read them.

        Args:
            file: lines NAME:SHA256; empty ones and those that begin with # say nothing. None: no file.
            variable: more of them, with white space or commas between them.

        Raises:
            ConfigError: they cannot be read, or a line is wrong; lines are never quoted, as a token may stand there.
        """
        self._file = file
        self._fixed = _read_tokens(re.split(r"[\s,]+", variable), TOKENS_VARIABLE, "entry")
        self._signature: Any = None
        self._next_look = 0.0
        self._known: dict[bytes, tuple[bytes, str]] = {}
        if file is None:
            self._take({})
        else:
            self._signature, read = _read_token_file(file)
            self._take(read)
            self._next_look = time.monotonic() + LOOK_SECONDS

    @classmethod
    def of(cls, settings: SecurityConfig) -> Tokens | None:
        """Return those of the configuration and the environment; None where neither has any."""
        variable = os.environ.get(TOKENS_VARIABLE, "").strip()
        if not settings.tokens and not variable:
            return None
        return cls(Path(settings.tokens) if settings.tokens else None, variable)

    @property
    def names(self) -> frozenset[str]:
        """The names of their holders, as allow-lists have them."""
        return frozenset(name for _, name in self._known.values())

    def holder(self, token: str) -> str | None:
        """Return whose token it is, as allow-lists have it ("token:NAME"); None where nobody's.

        What it takes does not tell how much of a token is right: only hashes are looked up and compared.
        """
        if self._file is not None and time.monotonic() >= self._next_look:
            self._look(self._file)
        digest = hashlib.sha256(token.encode()).digest()
        found = self._known.get(digest[:_PREFIX_BYTES])
        if found is None or not hmac.compare_digest(found[0], digest):
            return None
        return found[1]

    def _take(self, read: Mapping[bytes, str]) -> None:
        merged = {**read, **self._fixed}
        self._known = {digest[:_PREFIX_BYTES]: (digest, f"token:{name}") for digest, name in merged.items()}

    def _look(self, file: Path) -> None:
        """Read the file again where it has changed; one that is wrong leaves all as it is."""
        self._next_look = time.monotonic() + LOOK_SECONDS
        signature = signature_of(file)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._signature, read = _read_token_file(file)
        except ConfigError as error:
            _log.error("the tokens stay as they were: %s", error)
            return
        self._take(read)
        _log.info("tokens read anew: %s", ", ".join(sorted(self.names)) or "none")


def _read_token_file(file: Path) -> tuple[Any, dict[bytes, str]]:
    signature = signature_of(file)
    text = read_file(file, "security.tokens").decode("utf-8", "replace")
    if mode_of(file) & (stat.S_IWGRP | stat.S_IWOTH):
        text = f"{file} may be written by others than its owner, who could let themselves in; chmod go-w it"
        raise ConfigError(text, "security.tokens")
    warn_of_readers(file, "security.tokens")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return signature, _read_tokens(lines, "security.tokens", "line")


def _read_tokens(lines: Iterable[str], field: str, unit: str) -> dict[bytes, str]:
    known: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        name, _, digest = line.rpartition(":")
        if not _NAME.fullmatch(name) or not _DIGEST.fullmatch(digest):
            text = (
                f"{unit} {number}: expected NAME:SHA256, a name and the 64 hex digits of the token's SHA-256"
            )
            raise ConfigError(text, field)
        if known.setdefault(bytes.fromhex(digest), name) != name:
            raise ConfigError(f"{unit} {number}: this token is another name's already", field)
    return known
