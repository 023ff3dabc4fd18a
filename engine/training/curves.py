"""How a training went, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

FILE = "curves.png"


def draw(curves: Mapping[str, Sequence[float]], at: int, path: Path) -> None:
    """Write a PNG of the loss and, where there is one, Recall@`at` of the validation, by epoch."""
    # Loaded here: drawing is a tenth of a second at the end of a training, and nothing else needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    epochs = range(1, len(curves["loss"]) + 1)
    lines = axes.plot(epochs, curves["loss"], color="tab:blue", marker=".", label="loss")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curves.get("recall"):
        right = axes.twinx()
        lines += right.plot(
            epochs,
            curves["recall"],
            color="tab:orange",
            marker=".",
            label=f"Recall@{at} of the held-out items",
        )
        right.set_ylabel(f"Recall@{at}")
    axes.legend(handles=lines, loc="best")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
