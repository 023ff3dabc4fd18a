"""The filter contract: says of each candidate whether it stays."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from engine.core.candidates import FanOut
from engine.core.channel import LoadContext
from engine.core.options import Options
from engine.core.query import QueryBatch
from engine.core.types import BoolArray, Int32Array, Int64Array


class Filter:
    """Removes candidates that must not be shown.

    A plugin subclasses this and implements `keep`. Counting what each filter removed is the framework's.
    """

    Config: ClassVar[type[Options]] = Options
    """The options of this filter; unknown keys are refused."""

    bounded: ClassVar[bool] = True
    """Whether `overfetch` covers all that `keep` can remove. False where that is not known, or would be too many: the
    filter then says how many it expects, and an answer may come out short of its quotas."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def load(cls, config: Any, context: LoadContext) -> Self:
        """Return a filter for a catalogue; a filter has no snapshot, so `context.arrays` is empty."""
        del context
        return cls(config)

    def update(self, rows: Int32Array) -> None:
        """Take note that items were published, changed or taken down, as `Channel.update` does."""

    def overfetch(self, batch: QueryBatch) -> Int64Array | None:
        """Say how many more candidates each channel should bring to make up for what this filter removes.

        It need not raise where state cannot be read: `keep` does.

        Returns:
            int64[n], or None for none.
        """
        del batch
        return None

    def keep(self, batch: QueryBatch, candidates: FanOut) -> BoolArray | None:
        """Return bool[m]: True where the candidate stays; None where all do.

        Raises:
            StateUnavailableError: if it needs user state that could not be read. A scene that lists the filter in
                `fail_open` goes on without it and says so in the answer; in any other the request fails.
        """
        raise NotImplementedError(f"{type(self).__name__} has no keep()")
