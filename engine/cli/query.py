"""`recall query`: ask a running server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine import console
from engine.cli.common import (
    CaOption,
    CertificateOption,
    Id,
    InsecureOption,
    KeyOption,
    TlsOption,
    TokenFileOption,
    parse_id,
    security_of,
)

if TYPE_CHECKING:
    from engine.client import Recall, RecallResult, Security

DEFAULT_TARGET = "127.0.0.1:50051"


def query(
    user: Annotated[str | None, typer.Option("--user", "-u", help="Who asks; without it, a guest.")] = None,
    target: Annotated[str, typer.Option("--target", "-t", help="The server, HOST:PORT.")] = DEFAULT_TARGET,
    scene: Annotated[str, typer.Option(help="A scene of the server. Default: its default.")] = "",
    limit: Annotated[int | None, typer.Option("--limit", "-n", help="Candidates at most.")] = None,
    recent: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID[:EVENT]", help="An item the user acted on just now; newest first, repeatable."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="An item that must not come back; repeatable.")
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="An item to find more like, in a scene made for it; repeatable."),
    ] = None,
    off: Annotated[
        list[str] | None, typer.Option(metavar="CHANNEL", help="Turn a channel off; repeatable.")
    ] = None,
    string_ids: Annotated[
        bool, typer.Option("--string-ids", help="Ids are strings, even those that look like numbers.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Add stage timings, the history's length and what filters removed."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", "-s", help="Folder of the server's snapshots: items get their titles and tags."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that the answer may take.")] = 5.0,
    tls: TlsOption = False,
    ca: CaOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    token_file: TokenFileOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Ask a running server for candidates and show where each of them came from."""
    from engine.cli import answer
    from engine.data.snapshot import SnapshotStore

    arguments: Recall = {"scene": scene, "debug": debug}
    user_id = None if user is None else parse_id(user, string_ids)
    if isinstance(user_id, int):
        arguments["user_id"] = user_id
    elif user_id is not None:
        arguments["user_key"] = user_id
    if limit is not None:
        arguments["limit"] = limit
    arguments["recent_items"] = [parse_recent(text, string_ids) for text in recent or ()]
    arguments["exclude"] = [parse_id(text, string_ids) for text in exclude or ()]
    arguments["like"] = [parse_id(text, string_ids) for text in like or ()]
    arguments["overrides"] = dict.fromkeys(off or (), False)
    security = security_of(target, tls, ca, certificate, key, token_file, insecure)
    began = time.perf_counter()
    result = ask(target, arguments, timeout, security)
    spent = time.perf_counter() - began
    if as_json:
        typer.echo(answer.as_json(result))
        return
    words = answer.Words() if store is None else answer.Words.of(SnapshotStore(store), result)
    answer.show(result, words, user_id)
    counted = console.counted(len(result.candidates), "candidate")
    console.output().print(f"{counted} in {console.seconds(spent)}, connecting included", style="dim")


def parse_recent(text: str, strings: bool) -> tuple[Id, str]:
    """Return (id, event) of `ID` or `ID:EVENT`."""
    id_, _, event = text.rpartition(":") if ":" in text else (text, "", "")
    return parse_id(id_, strings), event


def ask(target: str, arguments: Recall, timeout: float, security: Security) -> RecallResult:
    """Ask once; a failed call is one sentence and exit status 1.

    Raises:
        InvalidRequest: the server refuses the request.
        Exit: it cannot be reached, or failed.
    """
    import grpc

    from engine.client import RecallClient
    from engine.core.errors import RequestError

    try:
        with RecallClient(target, timeout=timeout, **security) as client:
            return client.recall(**arguments)
    except grpc.RpcError as error:
        code = error.code()
        hint = "; is it running? `recall serve` starts one" if code is grpc.StatusCode.UNAVAILABLE else ""
        console.say_error(f"{target} answered {code.name}: {error.details()}{hint}")
        raise typer.Exit(1) from error
    except (ValueError, TypeError) as error:  # protobuf's own words for a number beyond int64
        raise RequestError([("request", f"cannot be sent: {error}")]) from error
