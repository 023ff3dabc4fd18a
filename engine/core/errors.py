"""Every error this project raises on purpose.

RecallError
├── ConfigError        the configuration is wrong: always loud, never degraded around
├── DatasetError       a data set's file is missing, broken or breaks a rule
├── SnapshotError      a snapshot is missing, damaged, of another format or of another catalogue
├── RequestError       a request breaks a limit or names what does not exist: INVALID_ARGUMENT
├── StateError         the state store cannot be had or used
│   └── StateUnavailableError   it does not answer now; it may again
├── ContractError      a channel or filter returned what its contract forbids
└── BuildError         an offline build cannot be done from what it was given
"""

from __future__ import annotations


class RecallError(Exception):
    """Base of the tree; its text is one sentence that a user can act on."""


class ConfigError(RecallError):
    """The configuration is wrong.

    `field` is the dotted path of the key ("scenes.feed.quotas.swing"), or empty when the whole file is meant.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class DatasetError(RecallError):
    """A data set breaks a rule. `file` is the file's name, `column` the column ("" when the whole file is meant)."""

    def __init__(self, message: str, file: str, column: str = "") -> None:
        where = f"{file}, column {column!r}" if column else file
        super().__init__(f"{where}: {message}")
        self.file = file
        self.column = column


class SnapshotError(RecallError):
    """A snapshot is refused. `file` is the path of the file at fault."""

    def __init__(self, message: str, file: str) -> None:
        super().__init__(f"{file}: {message}")
        self.file = file


class RequestError(RecallError):
    """A request is refused. `violations` are (field, what was expected) pairs; never empty."""

    def __init__(self, violations: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {text}" for field, text in violations))
        self.violations = violations


class StateError(RecallError):
    """The state store cannot be had or used; the text names the address or the program."""


class StateUnavailableError(StateError):
    """The state store does not answer now; what it was asked may be asked again."""


class ContractError(RecallError):
    """A plugin broke its contract; the text names the plugin and the rule."""


class BuildError(RecallError):
    """A build cannot be done; the text says what is missing."""
