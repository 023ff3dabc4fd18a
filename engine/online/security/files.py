"""The files that secure a server: reading them, who else may, and whether they have changed."""

from __future__ import annotations

import logging
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.errors import ConfigError

_log = logging.getLogger(__name__)


def read_file(file: Path, field: str) -> bytes:
    """Return what a file holds; ConfigError, naming the field, where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", field) from error


def warn_of_readers(file: Path, field: str) -> None:
    """Warn where everybody on this machine may read a file that is a secret."""
    if mode_of(file) & stat.S_IROTH:
        _log.warning("%s: %s may be read by everybody on this machine; chmod o-r it", field, file)


def mode_of(file: Path) -> int:
    """Return the mode of a file; 0 where it is not there."""
    try:
        return file.stat().st_mode
    except OSError:
        return 0


@dataclass(frozen=True)
class _Gone:
    """Stands for a file that is not there."""


def signature_of(file: Path) -> Any:
    """Return something that is another when a file has changed."""
    try:
        status = file.stat()
    except OSError:
        return _Gone()
    return status.st_mtime_ns, status.st_size, status.st_ino
