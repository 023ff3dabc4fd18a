"""What several commands share: options of one name and meaning, and what they stand for."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from engine.client import Security
    from engine.config import Config
    from engine.data.snapshot import SnapshotStore

Id: TypeAlias = int | str
"""An item's or a user's id, of the kind that the catalogue has."""

ConfigOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Configuration file (TOML). Default: the one that ships with the package."
    ),
]
StoreOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--store", "-s", help="Folder of the snapshots. Default: store.path of the configuration."),
]

TlsOption: TypeAlias = Annotated[
    bool, typer.Option("--tls", help="Speak TLS; --ca and --certificate do, too.", envvar="RECALL_TLS")
]
CaOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Authorities to believe (PEM). Default: gRPC's.", envvar="RECALL_CA"),
]
CertificateOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Certificate of one's own (PEM).", envvar="RECALL_CERTIFICATE"),
]
KeyOption: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Key of the certificate (PEM).", envvar="RECALL_KEY")
]
TokenFileOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="File whose first line is the token to send.", envvar="RECALL_TOKEN_FILE"
    ),
]
InsecureOption: TypeAlias = Annotated[
    bool, typer.Option("--insecure", help="Send the token to another machine without TLS, too.")
]


def security_of(
    target: str,
    tls: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    token_file: Path | None,
    insecure: bool,
) -> Security:
    """Return the clients' arguments that a command's options mean, the files read.

    Raises:
        ConfigError: a file cannot be read, or what was given does not fit together.
    """
    from engine.client import Security
    from engine.client._security import Access

    def read(file: Path | None, option: str) -> bytes | None:
        try:
            return None if file is None else file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}", option) from error

    line = read(token_file, "--token-file")
    token = None if line is None else line.partition(b"\n")[0].decode("utf-8", "replace").strip()
    security = Security(
        tls=tls,
        ca=read(ca, "--ca"),
        certificate=read(certificate, "--certificate"),
        key=read(key, "--key"),
        token=token,
        insecure=insecure,
    )
    try:
        Access(target, **security)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return security


def settings(config: Path | None, store: Path | None, lenient: bool = False) -> tuple[Config, SnapshotStore]:
    """Return the configuration that a command's options mean, and its store; `lenient` as in `load_config`.

    Raises:
        ConfigError: the configuration is wrong.
    """
    from engine.config import load_config
    from engine.data.snapshot import SnapshotStore

    loaded = load_config(config, lenient)
    if store is not None:
        loaded = loaded.model_copy(update={"store": loaded.store.model_copy(update={"path": store})})
    return loaded, SnapshotStore(loaded.store.path)


def parse_id(text: str, strings: bool) -> Id:
    """Return an id as the catalogue has it: a number, unless it is not one or `strings` says so."""
    if strings or not text.removeprefix("-").isdecimal():
        return text
    return int(text)


def offset_time(offset: str) -> str:
    """Return when the entry of the live log at an offset was made, UTC, to the second; "none" before the first."""
    milliseconds = int(offset.partition("-")[0])
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S}" if milliseconds else "none"


def start_logging(level: int = logging.INFO) -> None:
    """Send the log to standard error, a line per record."""
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
