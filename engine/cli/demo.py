"""`recall demo`: the bundled sample, built, served and asked, in one command."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from engine import console
from engine.cli import story, streaming_story
from engine.cli.build import BuildReport, run_build
from engine.cli.common import Id, parse_id, settings
from engine.core.errors import StateError

if TYPE_CHECKING:
    from engine.cli.answer import Words
    from engine.client import RecallClient, RecallResult
    from engine.config import Config
    from engine.data.dataset import Dataset
    from engine.data.snapshot import SnapshotStore
    from engine.online.replica import Replica
    from engine.online.state import State

SHOWN = 8
"""Candidates printed: with three channels each, about a screen."""

WANTED_CHANNELS = 3
LIKELY = (15, 40)
"""A user whose history has so many items is neither a stranger nor more than a person can look at."""
TRIED = 64

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

NEWEST = 5
"""Items of the history named."""


def demo(
    once: Annotated[bool, typer.Option("--once", help="Print one answer and exit.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Your own data set. Default: the sample that comes with the package.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the built snapshots go. Default: your cache folder.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port; 0 takes a free one. Default: 50051, or a free one."),
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="Ask for this user. Default: one with a telling answer.")
    ] = None,
    train: Annotated[
        bool,
        typer.Option(
            "--train/--no-train", help="Let streaming VQ learn meanwhile, where PyTorch is installed."
        ),
    ] = True,
) -> None:
    """Build a real data set, serve it and ask it: the whole way in one command."""
    from engine.data.sample import sample_path
    from engine.offline.learnt import with_learnt
    from engine.online.replica import Replica
    from engine.online.state import open_state

    config, store = settings(None, directory if directory is not None else console.cache_folder() / "demo")
    chosen = port if port is not None else _free_or_any(config.server.host, config.server.port)
    config = config.model_copy(update={"server": config.server.model_copy(update={"port": chosen})})
    out = console.output()
    source = data if data is not None else sample_path()
    config = with_learnt(config, source)
    _compile_kernels()
    out.print(Text.assemble(("1. Build", "bold"), f" the channels of {source}"), soft_wrap=True)
    report = run_build(config, source, store)
    _show_built(report)
    out.print(Text.assemble(("\n2. Serve", "bold"), " them over gRPC"))
    with ExitStack() as stack:
        try:
            state = stack.enter_context(open_state(config))
        except StateError as error:  # a machine without a store program shows the rest
            out.print(_indented(f"Without live state: {error}", "yellow"))
            state = None
        replica = Replica.open(config, store, state=state)
        asyncio.run(_serve_and_ask(config, replica, report.dataset, store, once, user, state, train))


def _compile_kernels() -> None:
    """Compile the kernels on all cores where this machine has not yet; later they would be, on one."""
    from engine.online import kernels

    if kernels.missing():
        with console.BuildProgress() as progress:
            progress.start("compiling", len(kernels.listed()))
            kernels.compile_all(progress.advance)


def _show_built(report: BuildReport) -> None:
    out = console.output()
    meta = report.dataset.meta
    liked = report.source.liked
    counts = (
        console.counted(report.dataset.rows["interactions"], "event"),
        console.counted(liked.users, "user"),
        console.counted(liked.items, "item"),
    )
    built = console.counted(len(report.release.snapshots) - len(report.reused), "snapshot")
    out.print(
        _indented(
            f"{report.dataset.name}: {', '.join(counts)}. "
            f"{built} built, {len(report.reused)} used again, in {console.seconds(report.spent)}."
        )
    )
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in report.source.ignored.items())
    if left_out:
        out.print(_indented(f"Left out, as they say nothing about interest: {left_out}."))
    for key in ("licence", "attribution"):
        if key in meta:
            out.print(_indented(f"{key}: {meta[key]}", "dim"))


async def _serve_and_ask(
    config: Config,
    replica: Replica,
    dataset: Dataset,
    store: SnapshotStore,
    once: bool,
    user: str | None,
    state: State | None,
    train: bool,
) -> None:
    """Run the server in this process, ask it from a thread over the network, and serve on until a signal."""
    from engine.online.server import serve

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def interrupted() -> None:
        for number in _SIGNALS:  # so that a second one ends us at once
            loop.remove_signal_handler(number)
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, interrupted)
    listening: asyncio.Future[int] = loop.create_future()
    serving = asyncio.create_task(serve(config, replica, listening.set_result, stop, state))
    either: set[asyncio.Future[Any]] = {serving, listening}
    began = time.monotonic()
    with console.errors().status("   warming up; the first start on a machine compiles the kernels"):
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    try:
        if listening.done() and not stop.is_set():
            target = f"{config.server.host}:{listening.result()}"
            spent = console.seconds(time.monotonic() - began)
            console.output().print(f"   listening on {target} after {spent}")
            asked = await asyncio.to_thread(
                _show_what_happens, config, target, replica, dataset, store, user, state, train
            )
            if not once and not stop.is_set():
                _show_how_to_ask(target, asked, store.root)
                await serving
                console.output().print("\nStopped.")
                return
        if stop.is_set():
            raise KeyboardInterrupt
    finally:
        stop.set()
        await serving


def _show_what_happens(
    config: Config,
    target: str,
    replica: Replica,
    dataset: Dataset,
    store: SnapshotStore,
    user: str | None,
    state: State | None,
    train: bool,
) -> Id:
    """Ask, and where there is live state tell the stories; return the user who was asked for."""
    if state is None or streaming_story.CHANNEL not in replica.channels:
        asked = _ask_and_show(target, replica, dataset, store, user)
        if state is not None:
            story.tell(target, replica.catalogue)
        return asked
    from engine.state.assignments import AssignmentLog

    with ExitStack() as stack:
        trainer = None
        if train:  # it comes up while the rest is shown
            trainer = stack.enter_context(streaming_story.training(config, store.root))
        asked = _ask_and_show(target, replica, dataset, store, user)
        story.tell(target, replica.catalogue)
        log = AssignmentLog(state.store, config.snapshot_of(streaming_story.CHANNEL))
        streaming_story.tell(target, replica.catalogue, asked, log, trainer)
    return asked


def _ask_and_show(
    target: str, replica: Replica, dataset: Dataset, store: SnapshotStore, user: str | None
) -> Id:
    from engine.cli import answer
    from engine.client import RecallClient

    with RecallClient(target, timeout=10.0) as client:
        if user is None:
            asked = choose_user(client, replica, store)
        else:
            asked = parse_id(user, replica.catalogue.id_type == "string")
        began = time.perf_counter()
        result = recall(client, asked)
        spent = time.perf_counter() - began
    words = answer.Words.of(store, result)
    out = console.output()
    out.print(Text.assemble(("\n3. Ask", "bold"), " for user ", (str(asked), "bold")))
    for line in describe_user(dataset, words, asked):
        out.print(_indented(line))
    shown = min(SHOWN, len(result.candidates))
    first = f"; the first {shown}" if shown < len(result.candidates) else ""
    counted = console.counted(len(result.candidates), "candidate")
    out.print(f"\n{counted} in {console.seconds(spent)}, network included{first}:\n")
    answer.show(result, words, asked, SHOWN)
    return asked


def recall(client: RecallClient, user: Id) -> RecallResult:
    """Ask for one user, whose id is of either kind."""
    return client.recall(user_id=user) if isinstance(user, int) else client.recall(user_key=user)


def choose_user(client: RecallClient, replica: Replica, store: SnapshotStore) -> Id:
    """Return the first user with a history of likely length in whose answer's front three channels show.

    Always the same one for the same data and options. Where nobody has such an answer: the most channels.
    """
    import numpy as np

    from engine.state.history import HISTORY

    history = store.open(HISTORY, replica.versions[HISTORY], verify=False)
    lengths = np.diff(history.arrays["indptr"])
    likely = np.flatnonzero((lengths >= LIKELY[0]) & (lengths <= LIKELY[1]))
    # Data without such users has others; the longest histories say most.
    rows = (likely if likely.size else np.argsort(-lengths, kind="stable"))[:TRIED]
    best: tuple[int, Id] | None = None
    for user in replica.catalogue.users.ids(rows.astype(np.int32)).tolist():
        result = recall(client, user)
        front = {p.channel for candidate in result.candidates[:SHOWN] for p in candidate.proposals}
        if best is None or len(front) > best[0]:
            best = (len(front), user)
        if len(front) >= WANTED_CHANNELS:
            break
    assert best is not None, "a data set has at least one user"
    return best[1]


def describe_user(dataset: Dataset, words: Words, user: Id) -> list[str]:
    """Return what a user did, in words: events by kind, the commonest tags, the newest items."""
    liked = words.history_of(user)
    if not liked:
        return ["has no history: channels that need none answer"]
    tags = Counter(tag for item in liked for tag in item.tags)
    common = ", ".join(f"{tag} ({count})" for tag, count in tags.most_common(4))
    newest = words.items((item.id for item in liked[:NEWEST]), author=False)
    return [
        f"events: {', '.join(f'{kind} {count}' for kind, count in _events(dataset, user))}",
        f"history: {console.counted(len(liked), 'item')}"
        + (f", most often with the tags {common}" if common else ""),
        f"newest: {'; '.join(newest.values())}",
    ]


def _events(dataset: Dataset, user: Id) -> list[tuple[str, int]]:
    """Count a user's events by kind, in the data set itself: a release keeps their sum only."""
    import pyarrow.compute as pc

    counts: Counter[str] = Counter()
    for batch in dataset.batches("interactions", ["user_id", "event"]):
        mine = batch.filter(pc.equal(batch.column("user_id"), user))
        counts.update(mine.column("event").to_pylist())
    return counts.most_common()


def _show_how_to_ask(target: str, user: Id, store: Path) -> None:
    out = console.output()
    where = "" if target == "127.0.0.1:50051" else f" --target {target}"
    key, value = ("user_id", str(user)) if isinstance(user, int) else ("user_key", f'"{user}"')
    folder = shlex.quote(str(store))
    lines = (
        f"{_own_command()} query{where} --user {shlex.quote(str(user))} --limit 10 --store {folder}",
        f'grpcurl -plaintext -d \'{{"{key}": {value}, "limit": 3}}\' {target} recall.v1.RecallService/Recall',
        f"{_as_called(Path(sys.executable))} -c 'from engine.client import RecallClient; "
        f'print(RecallClient("{target}").recall({key}={value}, limit=3).item_ids)\'',
    )
    out.print(
        Text.assemble(("\nYour turn", "bold"), f": {target} answers until Ctrl-C. From another terminal:\n")
    )
    for line in lines:
        out.print(Text(f"   {line}"), soft_wrap=True)


def _own_command() -> str:
    """Return how this program was called, as short as it works from this folder."""
    if Path(sys.argv[0]).name == "recall":
        return _as_called(Path(sys.argv[0]))
    return f"{_as_called(Path(sys.executable))} -m engine"


def _as_called(program: Path) -> str:
    if shutil.which(program.name) == str(program):
        return program.name
    if program.is_absolute() and program.is_relative_to(Path.cwd()):
        return shlex.quote(os.path.relpath(program))
    return shlex.quote(str(program))


def _indented(line: str, style: str = "") -> Padding:
    return Padding(Text(line, style), (0, 0, 0, 3), expand=False)


def _free_or_any(host: str, port: int) -> int:
    """Return the port if nobody listens there, else 0: a demo should not fail because another one runs."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return 0
    return port
