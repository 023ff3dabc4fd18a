"""The terminal: where words go, how progress looks, and how an error ends a command.

Answers go to standard output, so that they can be piped; progress and errors go to standard error.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 110
"""Columns where nobody's terminal says how many: rich would take 80 and fold every table."""


def output() -> Console:
    """Return the console of standard output."""
    return _console(stderr=False)


def errors() -> Console:
    """Return the console of standard error."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    # Made when asked for: a console keeps the stream it was made with, and tests swap streams.
    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(stderr=stderr, width=wide, highlight=False)


def say_error(text: str) -> None:
    """Print one line of what went wrong to standard error; markup in it is text."""
    line = Text("error: ", style="bold red")
    line.append(text, style="default")
    errors().print(line, soft_wrap=True)


def table(*columns: str | tuple[str, str], title: str | None = None) -> Table:
    """Return an empty table in this project's looks.

    Args:
        columns: headers; a pair is (header, "left" or "right" or "fold"), where "fold" breaks long text.
        title: a line above it.
    """
    made = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        name, kind = (column, "left") if isinstance(column, str) else column
        made.add_column(
            name,
            justify="right" if kind == "right" else "left",
            no_wrap=kind != "fold",
            overflow="fold" if kind == "fold" else "ellipsis",
            header_style="bold",
        )
    return made


def size(count: float) -> str:
    """Return a number of bytes as people say it: 3.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: 1 item, 2,000 items."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def seconds(duration: float) -> str:
    """Return a duration as people say it: 42 ms, 3.1 s, 2 min 05 s."""
    if duration < 1:
        return f"{duration * 1000:.0f} ms"
    if duration < 100:
        return f"{duration:.1f} s"
    return f"{int(duration) // 60} min {int(duration) % 60:02d} s"


def cache_folder() -> Path:
    """Return this user's cache folder for this project: RECALL_CACHE, or where the platform wants it."""
    if os.environ.get("RECALL_CACHE"):
        return Path(os.environ["RECALL_CACHE"])
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.environ.get("XDG_CACHE_HOME", "").startswith("/"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    else:
        base = Path.home() / ".cache"
    return base / "recall-engine"


class _RateColumn(ProgressColumn):
    """Units per second since the task began."""

    def render(self, task: Task) -> Text:
        """Return the rate, or nothing while it is not known."""
        rate = task.finished_speed or task.speed
        # Trials and repetitions take seconds each, so a slow rate is told the other way round.
        text = "" if not rate else f"{rate:,.0f}/s" if rate >= 2 else f"{seconds(1 / rate)} each"
        return Text(text, style="cyan")


class BuildProgress:
    """A bar per task with rate and time left; what is done stays on the screen with the time it took.

    Where standard error is no terminal there are no bars: each finished task is one line.
    """

    def __init__(self) -> None:
        self._console = errors()
        self._live = self._console.is_terminal
        self._bars = Progress(
            TextColumn("  {task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._total = self._done = 0
        self._began = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A task that an exception broke off is not done, and is not said to be.
        if kind is None:
            self._end()
        self._bars.stop()

    def start(self, task: str, total: int) -> None:
        """Begin a task of `total` units of work; ends the one before."""
        self._end()
        self._name, self._total, self._done, self._began = task, total, 0, time.monotonic()
        self._task = self._bars.add_task(task, total=total)

    def advance(self, amount: int = 1) -> None:
        """Say that `amount` more units are done."""
        self._done += amount
        if self._task is not None:
            self._bars.advance(self._task, amount)

    def _end(self) -> None:
        if self._task is None:
            return
        self._bars.remove_task(self._task)
        self._task = None
        spent = time.monotonic() - self._began
        line = Text.assemble(
            ("  done  ", "green"), f"{self._name:<12} ", (f"{self._done:>12,}  in {seconds(spent)}", "dim")
        )
        self._console.print(line)
