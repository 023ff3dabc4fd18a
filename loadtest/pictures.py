"""Pictures of load tests, as SVG written by hand.

python -m loadtest.pictures history run_stats_history.csv out.svg    # locust --csv=run
python -m loadtest.pictures concurrency serve.json out.svg           # recall bench serve --json > serve.json
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 760, 200, 64, 150, 30, 34
COLOURS = ("#1f6feb", "#d1242f", "#8250df", "#1a7f37", "#9a6700")

Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One chart: named lines over a shared x axis; `marks` are the x values that get a tick, none: round numbers."""

    title: str
    lines: dict[str, list[Point]]
    marks: Sequence[float] = ()


def picture(panels: Sequence[Panel], x_label: str, logarithmic: bool = False) -> str:
    """Return an SVG of panels below each other."""
    points = [point for panel in panels for line in panel.lines.values() for point in line]
    if not points:
        raise ValueError("there is nothing to draw")
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    height = len(panels) * (PANEL + TOP) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    ]

    def across(x: float) -> float:
        if logarithmic:
            x, first, last = math.log(x), math.log(low), math.log(high)
        else:
            first, last = low, high
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / ((last - first) or 1)

    for number, panel in enumerate(panels):
        top = number * (PANEL + TOP) + TOP
        most = _round_up(max((y for line in panel.lines.values() for _, y in line), default=1.0))

        def down(y: float, top: float = top, most: float = most) -> float:
            return top + PANEL * (1 - y / most)

        parts.append(f'<text x="{LEFT}" y="{top - 10}" font-weight="bold">{_escaped(panel.title)}</text>')
        for step in range(5):
            y = most * step / 4
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="#d0d7de"/>'
                f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:,g}</text>'
            )
        if number == len(panels) - 1:
            marks = panel.marks or [low + (high - low) * step / 5 for step in range(6)]
            parts += [
                f'<text x="{across(x):.1f}" y="{top + PANEL + 16}" text-anchor="middle">{x:,.4g}</text>'
                for x in marks
            ]
            parts.append(
                f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{top + PANEL + 30}" text-anchor="middle">'
                f"{_escaped(x_label)}</text>"
            )
        for place, (name, line) in enumerate(panel.lines.items()):
            colour = COLOURS[place % len(COLOURS)]
            drawn = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
            parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
            y = top + 14 + 18 * place
            parts.append(
                f'<line x1="{WIDTH - RIGHT + 12}" x2="{WIDTH - RIGHT + 32}" y1="{y - 4}" y2="{y - 4}" '
                f'stroke="{colour}" stroke-width="2"/><text x="{WIDTH - RIGHT + 38}" y="{y}">{_escaped(name)}</text>'
            )
    parts.append("</svg>\n")
    return "".join(parts)


def history(file: Path) -> str:
    """Return the picture of a run of locust: its `..._stats_history.csv`."""
    names = ("Requests/s", "Failures/s", "User Count", "50%", "95%", "99%")
    lines: dict[str, list[Point]] = {name: [] for name in names}
    with file.open(newline="", encoding="utf-8") as content:
        rows = [row for row in csv.DictReader(content) if row["Name"] == "Aggregated"]
    for row in rows:
        second = float(row["Timestamp"]) - float(rows[0]["Timestamp"])
        for name in names:
            if row[name] not in ("", "N/A"):
                lines[name].append((second, float(row[name])))
    panels = [
        Panel("calls a second", {"answered": lines["Requests/s"], "failed": lines["Failures/s"]}),
        Panel("latency, ms", {"p50": lines["50%"], "p95": lines["95%"], "p99": lines["99%"]}),
        Panel("people", {"people": lines["User Count"]}),
    ]
    return picture(panels, "seconds")


def concurrency(file: Path) -> str:
    """Return the picture of throughput and latency against requests in flight: a report of `recall bench serve`."""
    rows = json.loads(file.read_text(encoding="utf-8"))["concurrency"]
    marks = [row["in_flight"] for row in rows]

    def line(name: str) -> list[Point]:
        return [(row["in_flight"], row[name]) for row in rows]

    panels = [
        Panel("requests a second", {"answered": line("requests_per_s")}),
        Panel("latency, ms", {"p50": line("p50_ms"), "p99": line("p99_ms")}),
        Panel("requests of a batch", {"mean": line("batch_mean")}, marks),
    ]
    return picture(panels, "requests in flight", logarithmic=True)


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 4, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value) if value > 0 else 1.0


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def main(arguments: Sequence[str]) -> None:
    """Draw one picture."""
    kinds = {"history": history, "concurrency": concurrency}
    if len(arguments) != 3 or arguments[0] not in kinds:
        raise SystemExit((__doc__ or "").strip())
    Path(arguments[2]).write_text(kinds[arguments[0]](Path(arguments[1])), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
