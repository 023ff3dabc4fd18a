"""Typed options of channels and filters, and the marks that tell the tuner and the builder about them."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Base of every component's options: unknown keys, NaN and infinity are refused; a docstring stands under each."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True)
class Tune:
    """Marks an option that `recall tune` searches: `Annotated[float, Field(ge=0), Tune(0.0, 1.0)]`.

    Attributes:
        low, high: the range searched, both ends included (ints for an int option).
        log: search on a logarithmic scale.
        choices: searched instead of a range, where the option is no number.
        timed: searched only where the data has timestamps, because it means nothing without an order of events.
    """

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[str, ...] = ()
    timed: bool = False


@dataclass(frozen=True, slots=True)
class Online:
    """Marks an option that only the online half reads: changing it needs no new build."""


def tunable(options: type[Options]) -> dict[str, Tune]:
    """Return the options that carry a `Tune` mark, in order of declaration."""
    return {
        name: mark
        for name, field in options.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Tune)
    }


def build_parameters(options: Options) -> dict[str, object]:
    """Return the options that the offline half reads, those of options within them too: what a snapshot is keyed by."""
    dumped = options.model_dump(mode="json")
    parameters: dict[str, object] = {}
    for name, field in type(options).model_fields.items():
        if not any(isinstance(mark, Online) for mark in field.metadata):
            value = getattr(options, name)
            parameters[name] = build_parameters(value) if isinstance(value, Options) else dumped[name]
    return parameters
