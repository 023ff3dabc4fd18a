"""`recall ingest`: replay a log to a running server, or feed it from Kafka."""

from __future__ import annotations

import signal
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine import console
from engine.cli.common import (
    CaOption,
    CertificateOption,
    ConfigOption,
    InsecureOption,
    KeyOption,
    TlsOption,
    TokenFileOption,
    security_of,
    start_logging,
)
from engine.cli.query import DEFAULT_TARGET
from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from engine.client import IngestClient, Security
    from engine.offline.replay import Replay


def ingest(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE.parquet|DIR", help="A log, or a data set: its items, follows and interactions."
        ),
    ] = None,
    target: Annotated[str, typer.Option("--target", "-t", help="The server, HOST:PORT.")] = DEFAULT_TARGET,
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Events sent together.")] = 1000,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Skip what is earlier: seconds since the epoch, or 2024-05-31[T12:00] (UTC)."
        ),
    ] = None,
    offset_file: Annotated[
        Path | None, typer.Option(help="Note there how far it came; the same command goes on from there.")
    ] = None,
    kafka: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT[,...]", help="Read from these Kafka brokers instead of a file."),
    ] = None,
    topic: Annotated[str | None, typer.Option(help="The Kafka topic.")] = None,
    group: Annotated[str, typer.Option(help="The Kafka consumer group.")] = "recall",
    kafka_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of librdkafka; repeatable.")
    ] = None,
    config: ConfigOption = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds that the server may be away while a file is sent.")
    ] = 30.0,
    tls: TlsOption = False,
    ca: CaOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    token_file: TokenFileOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Send what users did, and items, to a running server: from Parquet files, or from Kafka until stopped."""
    if (path is None) == (kafka is None):
        raise ConfigError("expected one of a file or folder and --kafka BROKERS")
    security = security_of(target, tls, ca, certificate, key, token_file, insecure)
    if kafka is not None:
        if topic is None:
            raise ConfigError("expected the topic to read", "--topic")
        feed(target, kafka, topic, group, batch, options_of(kafka_option or []), security)
        return
    assert path is not None
    begin = None if since is None else moment(since)
    replay(path, target, batch, begin, offset_file, config, patience, security)


def replay(
    path: Path,
    target: str,
    batch: int,
    since: int | None,
    offset_file: Path | None,
    config: Path | None,
    patience: float,
    security: Security,
) -> None:
    """Replay files one after another; how far it came is said however it ends."""
    import grpc

    from engine.client import IngestClient
    from engine.config import load_config
    from engine.offline.replay import OffsetFile, Replay, files_of

    kinds = frozenset(load_config(config).interest)
    offsets = OffsetFile(offset_file)
    stop = threading.Event()
    replays = [
        Replay(file, kinds, batch=batch, since=since, offsets=offsets, stop=stop) for file in files_of(path)
    ]

    def interrupt(*_: object) -> None:
        # The exception alone is lost where it is raised in the middle of a finalizer or of another library's callback.
        stop.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with (
            IngestClient(target, timeout=max(patience, 10.0), **security) as client,
            console.BuildProgress() as progress,
        ):
            for each in replays:
                each.run(client, progress, patience)
    except KeyboardInterrupt:
        show(replays)
        hint = (
            "the same command goes on from there"
            if offset_file
            else "with --offset-file the next one goes on there"
        )
        console.say_error(f"interrupted; {hint}")
        raise typer.Exit(130) from None
    except (grpc.RpcError, ConnectionError) as error:
        show(replays)
        raise gave_up(target, error) from error
    finally:
        signal.signal(signal.SIGINT, before)
    show(replays)


def feed(
    target: str,
    brokers: str,
    topic: str,
    group: str,
    batch: int,
    options: dict[str, str],
    security: Security,
) -> None:
    """Feed from Kafka until SIGTERM or Ctrl-C."""
    import grpc

    from engine.client import IngestClient
    from engine.client.kafka import KafkaFeed

    start_logging()
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    client: IngestClient
    try:
        with IngestClient(target, **security) as client:
            from_kafka = KafkaFeed(client, brokers, topic, group, batch=batch, options=options)
            try:
                from_kafka.run(stop)
            except (grpc.RpcError, ConnectionError) as error:
                raise gave_up(target, error) from error
            finally:
                counts = ", ".join(f"{count:,} {what}" for what, count in sorted(from_kafka.counts.items()))
                console.errors().print(f"{topic}: {counts or 'no messages'}", markup=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(replays: list[Replay]) -> None:
    """Print what became of each file's rows, and the first refusals."""
    names = ("rows", "of", "accepted", "duplicates", "stale", "refused", "skipped")
    rows = console.table("file", *((name, "right") for name in names))
    for each in replays:
        totals = each.totals
        counts = (
            totals.rows,
            each.file.rows,
            totals.accepted,
            totals.duplicates,
            totals.stale,
            totals.refused,
            totals.skipped.total(),
        )
        rows.add_row(each.file.path.name, *(f"{count:,}" for count in counts))
    out = console.output()
    out.print(rows)
    for each in replays:
        for reason, count in each.totals.skipped.most_common():
            out.print(f"skipped in {each.file.path.name}: {count:,} {reason}", style="dim", markup=False)
        for refusal in each.totals.refusals:
            text = f"refused in {each.file.path.name}, row {refusal.index}: {refusal.field}: {refusal.reason}"
            out.print(text, markup=False, soft_wrap=True)


def gave_up(target: str, error: Any) -> typer.Exit:
    """Say in one sentence why the server could not be used; return the exit that follows."""
    import grpc

    if isinstance(error, grpc.RpcError):
        code = error.code()
        hint = "; is it running? `recall serve` starts one" if code is grpc.StatusCode.UNAVAILABLE else ""
        if code is grpc.StatusCode.UNIMPLEMENTED:
            hint = "; it has no state store: see [state] in its configuration"
        console.say_error(f"{target} answered {code.name}: {error.details()}{hint}")
    else:
        console.say_error(str(error))
    return typer.Exit(1)


def moment(text: str) -> int:
    """Return the seconds since the epoch that a text means.

    Raises:
        ConfigError: it means none.
    """
    if text.isdecimal():
        return int(text)
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"expected seconds since the epoch, or a date, got {text!r}", "--since") from error
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp())


def options_of(texts: list[str]) -> dict[str, str]:
    """Return the settings that KEY=VALUE texts mean; ConfigError if one is not of that form."""
    options = {}
    for text in texts:
        key, found, value = text.partition("=")
        if not found or not key:
            raise ConfigError(f"expected KEY=VALUE, got {text!r}", "--kafka-option")
        options[key] = value
    return options
