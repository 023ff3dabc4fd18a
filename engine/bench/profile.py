"""Where the time of a worker under load goes: its threads' processor time, and py-spy's samples of their stacks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from engine.core.errors import ConfigError

SAMPLES_PER_SECOND = 250

PLACES: tuple[tuple[str, str], ...] = (
    # The first that matches a frame counts, frames from the innermost out.
    ("state read", r"\(engine/state/"),
    ("channel {}", r"recall_batch \(channels/(\w+)\.py"),
    ("parse", r"\(engine/online/wire\.py|\(engine/online/request\.py"),
    ("encode", r"\(engine/online/(encode|response_bytes|candidate_bytes)\.py"),
    ("metrics and notes", r"\(engine/online/(metrics|recalls)\.py|_observe \("),
    ("hydrate", r"\(engine/online/hydrate\.py"),
    ("filter {}", r"\(filters/(\w+)\.py"),
    ("mask around the filters", r"\(engine/online/mask\.py|_mask \(engine/online/pipeline\.py"),
    ("merge", r"_merge\w* \(engine/online/pipeline\.py"),
    ("fill", r"_fill \(engine/online/pipeline\.py"),
    (
        "fan-out around the channels",
        r"\(engine/online/fan_out\.py|_fan_out \(engine/online/pipeline\.py|of \(engine/online/run\.py",
    ),
    ("pipeline around the stages", r"\(engine/online/(pipeline|run)\.py"),
    ("queue hop", r"\(engine/online/batcher\.py|\(engine/online/admission\.py"),
    ("service around the parse", r"\(engine/online/service\.py"),
    ("gRPC and event loop", r"\(engine/online/calls\.py|grpc/|asyncio/|selectors\.py"),
)

Stacks = dict[str, float]
"""Frames with semicolons between them, outermost first -> samples, or what these stand for."""

_WAITING = re.compile(
    r"^(Condition\.)?(wait|acquire)|^\w*Selector\.select|^(Connection\.)?_recv|^_worker |accept \(|^Thread\.|^thread"
    r"|read_from_socket|_can_read"
)
"""Innermost frames of a thread that waits, for the state store among others; py-spy takes some of them for work while
the machine is busy."""


def record(pid: int, seconds: float, file: Path) -> subprocess.Popen[bytes]:
    """Start py-spy on a process; it ends by itself after `seconds` and leaves its stacks in the file.

    Raises:
        ConfigError: py-spy is not installed.
    """
    beside = Path(sys.executable).with_name("py-spy")
    program = os.fspath(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        raise ConfigError("the profile needs py-spy: pip install 'recall-engine[bench]'", "--profile")
    command = [program, "record", "--pid", str(pid), "--format", "raw", "--output", os.fspath(file)]
    command += ["--rate", str(SAMPLES_PER_SECOND), "--duration", str(max(1, round(seconds))), "--threads"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def read_stacks(file: Path) -> dict[int, Stacks]:
    """Read what py-spy left: the samples of each thread, by the system's number of it; waiting is left out."""
    threads: dict[int, Stacks] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        thread, *frames = line.rpartition(" ")[0].split(";")
        number = re.match(r"thread \((\d+)\)", thread)
        if number is None or not frames or _WAITING.search(frames[-1]):
            continue
        stack = ";".join(_short(frame) for frame in frames)
        mine = threads.setdefault(int(number[1]), {})
        mine[stack] = mine.get(stack, 0.0) + int(line.rpartition(" ")[2])
    return threads


def weighed(threads: Mapping[int, Stacks], worth: Mapping[int, float]) -> Stacks:
    """Put the stacks of all threads together, each thread's samples sharing what the thread is worth.

    So a sample that was taken while its thread waited for a core or for the interpreter lock costs nothing more than its
    share of what the thread really used.
    """
    stacks: Stacks = {}
    for number, mine in threads.items():
        total = sum(mine.values())
        for stack, count in mine.items():
            stacks[stack] = stacks.get(stack, 0.0) + worth.get(number, 0.0) * count / total
    return stacks


def places(stacks: Mapping[str, float]) -> dict[str, float]:
    """Return what each place of `PLACES` has of the stacks, most first; "else" is what fits none."""
    found: dict[str, float] = {}
    for stack, count in stacks.items():
        name = _place(stack.split(";"))
        found[name] = found.get(name, 0.0) + count
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def thread_seconds(pid: int) -> dict[int, tuple[str, float]]:
    """Return the processor time that each thread of a process has used: thread id -> (system's name, seconds)."""
    ticks = os.sysconf("SC_CLK_TCK")
    used = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            text = (task / "stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        name, _, rest = text.partition("(")[2].rpartition(")")
        fields = rest.split()
        used[int(task.name)] = name, (int(fields[11]) + int(fields[12])) / ticks
    return used


def switches(pid: int) -> int:
    """Return how often the threads of a process have left their core so far, of themselves or not."""
    count = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            text = (task / "status").read_text()
        except OSError:  # it ended meanwhile
            continue
        count += sum(int(number) for number in re.findall(r"ctxt_switches:\s+(\d+)", text))
    return count


def flame_graph(stacks: Mapping[str, float], least: float = 0.004) -> str:
    """Return an SVG: a bar per frame, as wide as its share of the samples, on the frame that called it.

    Args:
        stacks: as `weighed` returns them.
        least: frames of a smaller share are left out.
    """
    root: _Frame = _Frame("all")
    for stack, count in stacks.items():
        root.add(stack.split(";"), count)
    total = root.count or 1.0
    width, height = 1200.0, 16
    depth = root.depth(least * total)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {(depth + 1) * height}" '
        'font-family="monospace" font-size="10">'
    ]

    def draw(frame: _Frame, left: float, level: int) -> None:
        wide = width * frame.count / total
        top = (depth - level) * height
        share = 100 * frame.count / total
        name = frame.name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        letters = int(wide / 6.2)
        cut = frame.name if len(frame.name) <= letters else frame.name[: max(letters - 1, 0)] + "…"
        text = cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") if letters > 3 else ""
        parts.append(
            f'<g><title>{name}: {share:.1f} %</title><rect x="{left:.1f}" y="{top}" width="{max(wide - 0.5, 0.5):.1f}" '
            f'height="{height - 1}" fill="{_colour(frame.name)}"/>'
            f'<text x="{left + 2:.1f}" y="{top + 11}">{text}</text></g>'
        )
        for child in sorted(frame.children.values(), key=lambda each: each.name):
            if child.count >= least * total:
                draw(child, left, level + 1)
                left += width * child.count / total

    draw(root, 0.0, 0)
    return "".join([*parts, "</svg>\n"])


class _Frame:
    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0.0
        self.children: dict[str, _Frame] = {}

    def add(self, stack: Iterable[str], count: float) -> None:
        frame = self
        frame.count += count
        for name in stack:
            # Lines of one function are one bar.
            name = re.sub(r":\d+\)$", ")", name)
            frame = frame.children.setdefault(name, _Frame(name))
            frame.count += count

    def depth(self, least: float) -> int:
        return 1 + max(
            (child.depth(least) for child in self.children.values() if child.count >= least), default=0
        )


def _place(frames: list[str]) -> str:
    for frame in reversed(frames):
        for name, pattern in PLACES:
            match = re.search(pattern, frame)
            if match:
                return name.format(*match.groups())
    return "else"


def _short(frame: str) -> str:
    """Cut the folders off in front of the packages, so that a picture says nothing of the machine."""
    return re.sub(
        r"\((?:.*/)?((?:engine|channels|filters|grpc|asyncio|recall|numpy|numba|redis)/)", r"(\1", frame
    )


def _colour(name: str) -> str:
    if re.search(r"\((channels|filters|engine/core)/", name):
        return "#f4b183"
    if "(engine/" in name:
        return "#f8d49b"
    return "#c9d7ea" if re.search(r"\((grpc|asyncio)/", name) else "#dddddd"
