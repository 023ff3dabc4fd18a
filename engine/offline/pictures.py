"""Pictures of what was measured: a figure that is written when it is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def drawing(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Give an empty figure to draw on, and write it; the end of the file's name says how (.png, .svg, .pdf).

    Args:
        path: the file, in a folder that exists.
        size: width and height in inches.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        # Loaded here: nothing but pictures needs it, and it is not installed where only recall is served.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        text = "pictures need matplotlib, which is not installed: pip install 'recall-engine[train]'"
        raise ConfigError(text, str(path)) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", str(path)) from error
    except ValueError as error:  # an ending that stands for no format
        raise ConfigError(f"cannot be drawn: {error}", str(path)) from error
