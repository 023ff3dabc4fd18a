"""A batch whose answers are on their way: what is told to whoever counts, logs and traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.online.pipeline import Pipeline
from engine.online.run import Run


class Answered(NamedTuple):
    """One scene's part of a batch.

    Attributes:
        scene: its name.
        pipeline, run, release: what computed it.
        request_ids: n, as in the answers.
        traces: n, each caller's `traceparent` where it samples the request, else "".
        came: n, when each request came; on the clock of time.monotonic(), seconds, as the next two.
        began: when its computation began.
        ended: when the answers were there.
    """

    scene: str
    pipeline: Pipeline
    run: Run
    release: str
    request_ids: Sequence[str]
    traces: Sequence[str]
    came: Sequence[float]
    began: float
    ended: float

    @property
    def seconds(self) -> list[float]:
        """How long each request took from its arrival until its answer was there."""
        return [self.ended - came for came in self.came]


Observer = Callable[[Answered], None]
"""Told of each batch once its answers are on their way, on the compute thread."""
