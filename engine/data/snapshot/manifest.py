"""What the store's JSON files hold, and how a damaged one is told from a sound one.

A manifest and a release carry the digest of their own content in their name, and their name is where they
lie: the directory `<stamp>-<digest>`, the file `<stamp>-<digest>.json`. So a changed byte in them is noticed
without a checksum file beside them, and equal content has an equal digest.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from engine.core.errors import SnapshotError

FORMAT = 1
"""The newest layout this version reads, and the one it writes."""

COMPONENT_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
ARRAY_PATTERN = r"^[a-z0-9_][a-z0-9_.]*$"
NAME_PATTERN = r"^\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{12}$"

Component = Annotated[str, StringConstraints(pattern=COMPONENT_PATTERN)]
ArrayName = Annotated[str, StringConstraints(pattern=ARRAY_PATTERN)]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""Of a version or a release: when it was made (UTC, sorts by time) and the digest of its content."""

_UNNAMED = "00000000T000000.000000Z-000000000000"
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


def timestamp(moment: datetime) -> str:
    """Return the moment as the records write it: ISO 8601, UTC, microseconds."""
    return moment.astimezone(UTC).strftime(_TIME)


def moment_of(name: str) -> datetime:
    """Return when the version or release of this name was made."""
    return datetime.strptime(name.split("-")[0], "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC)


class _Record(BaseModel):
    """A JSON file whose name proves its content."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name_key: ClassVar[str]
    """The key that holds the record's own name."""

    format: int = FORMAT
    created: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{6}Z$")]

    @classmethod
    def make(cls, **content: Any) -> Self:
        """Return the record of this content under the name that follows from it."""
        unnamed = cls.model_validate({"format": FORMAT, cls.name_key: _UNNAMED, **content})
        return cls.model_validate(unnamed.model_dump(by_alias=True) | {cls.name_key: unnamed.true_name()})

    def true_name(self) -> str:
        """Return the name that follows from the content."""
        content = self.model_dump(mode="json", exclude={"version", "name", "created"})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        stamp = self.created.replace("-", "").replace(":", "")
        return f"{stamp}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def encode(self) -> bytes:
        """Return the file's bytes."""
        text = json.dumps(
            self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False, allow_nan=False
        )
        return text.encode() + b"\n"

    @classmethod
    def read(cls, path: Path, name: str) -> Self:
        """Read the record from its file and hold it to the name that it lies under.

        Raises:
            SnapshotError: it is missing, damaged, or of a newer format.
        """
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise SnapshotError("the file is missing", str(path)) from None
        except OSError as error:
            raise SnapshotError(f"cannot be read: {error.strerror}", str(path)) from error
        try:
            content = json.loads(raw)
        except ValueError as error:
            raise SnapshotError(
                f"truncated or damaged: its {len(raw)} bytes are not JSON ({error})", str(path)
            ) from None
        version = content.get("format") if isinstance(content, dict) else None
        # The format comes first: a newer one may differ in anything else.
        if type(version) is int and version > FORMAT:
            raise SnapshotError(
                f"written by a newer version: format {version}, and this one reads up to {FORMAT}", str(path)
            )
        if version != FORMAT:
            raise SnapshotError(f"damaged: format is {version!r}, expected {FORMAT}", str(path))
        try:
            record = cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise SnapshotError(f"damaged: key {key!r}: {first['msg']}", str(path)) from None
        if content[cls.name_key] != name:
            raise SnapshotError(
                f"damaged or moved: it says {cls.name_key} {content[cls.name_key]!r}", str(path)
            )
        if record.true_name() != name:
            raise SnapshotError("damaged: its content differs from the digest in its name", str(path))
        return record


class ArrayFile(BaseModel):
    """One array of a snapshot: its file, the file's size and checksum, and the array's type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_][a-z0-9_.]*\.npy$")]
    bytes: int
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    dtype: str
    shape: tuple[int, ...]


class Manifest(_Record):
    """What a snapshot holds and what it was made from.

    Attributes:
        component: whose snapshot it is.
        version: its name: directory, release entry and wire all say this.
        created: when it was finished, ISO 8601, UTC.
        parameters: the options it was built with.
        dataset: fingerprint of the data set it was built from.
        catalogue: version of the catalogue that its rows mean; "" for the catalogue and what has no rows.
        log_offset: entry of the live log up to which the data set reaches; replay starts behind it.
        code: version of this package that wrote it.
        files: the arrays, by name.
    """

    name_key: ClassVar[str] = "version"

    component: Component
    version: Name
    parameters: dict[str, Any]
    dataset: str
    catalogue: str
    log_offset: str
    code: str
    files: dict[ArrayName, ArrayFile]


class Release(_Record):
    """One version of every component, in service together.

    Attributes:
        name: the release's name (key "release" in the file).
        created: when it was published, ISO 8601, UTC.
        snapshots: the version of each component.
    """

    name_key: ClassVar[str] = "release"

    name: Annotated[Name, Field(alias="release")]
    snapshots: dict[Component, Name]
