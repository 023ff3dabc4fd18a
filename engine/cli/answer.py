"""An answer of the recall service for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from engine import console
from engine.cli.common import Id

if TYPE_CHECKING:
    from engine.client import Proposal, RecallResult
    from engine.core.types import Int32Array
    from engine.data.catalogue import Catalogue, ItemText
    from engine.data.snapshot import SnapshotStore
    from engine.state.history import SnapshotHistory

_REMOVED_SHOWN = 20
"""Items per filter that are named; --json has all."""

_STATUS_STYLES = {"OK": "green", "ERROR": "bold red", "TIMEOUT": "yellow"}


@dataclass(frozen=True)
class Words:
    """Says what ids stand for; without a catalogue an id is all there is to say.

    Attributes:
        catalogue: of the release that answered, or None.
        history: of the same release, to say what two users have in common; or None.
    """

    catalogue: Catalogue | None = None
    history: SnapshotHistory | None = None

    @classmethod
    def of(cls, store: SnapshotStore, result: RecallResult) -> Words:
        """Open what the answer's own release knows.

        Raises:
            SnapshotError: the store does not have the snapshots that made the answer.
        """
        from engine.data.catalogue import Catalogue
        from engine.data.snapshot import CATALOGUE
        from engine.state.history import HISTORY, SnapshotHistory

        opened = {
            name: store.open(name, result.snapshots[name], verify=False).arrays
            for name in (CATALOGUE, HISTORY)
        }
        return cls(Catalogue.load(opened[CATALOGUE]), SnapshotHistory(opened[HISTORY]))

    def items(self, ids: Iterable[Id], author: bool = True) -> dict[Id, str]:
        """Return a few words per item: title, or the id where it has none; author; tags."""
        wanted = list(dict.fromkeys(ids))
        words: dict[Id, str] = {id_: f"item {id_}" for id_ in wanted}
        if self.catalogue is None or not wanted:
            return words
        rows = self.catalogue.items.rows(wanted)
        for item in self.catalogue.describe_items(rows[rows >= 0]):
            parts = [item.title or f"item {item.id}"]
            if author and item.author:
                parts.append(f"author {item.author}" if item.author.isdecimal() else item.author)
            if item.tags:
                # A tag that is a bare number says nothing without the word.
                numbers = all(tag.isdecimal() for tag in item.tags)
                parts.append(("tag " if numbers else "") + ", ".join(item.tags))
            words[item.id] = " · ".join(parts)
        return words

    def users(self, ids: Iterable[Id], asking: Id | None) -> dict[Id, str]:
        """Return a few words per user: how many items of its history the asking user's holds too."""
        wanted = list(dict.fromkeys(ids))
        words: dict[Id, str] = {id_: f"user {id_}" for id_ in wanted}
        if self.catalogue is None or self.history is None or asking is None or not wanted:
            return words
        import numpy as np

        lists = self._histories([asking, *wanted])
        for id_, rows in zip(wanted, lists[1:], strict=True):
            common = np.intersect1d(lists[0], rows).size
            words[id_] += f" · {common} item{'' if common == 1 else 's'} in common" if common else ""
        return words

    def history_of(self, user: Id) -> list[ItemText]:
        """Return the stored history of a user, newest first; empty without a catalogue."""
        if self.catalogue is None or self.history is None:
            return []
        return self.catalogue.describe_items(self._histories([user])[0])

    def _histories(self, ids: Sequence[Id]) -> list[Int32Array]:
        import numpy as np

        assert self.catalogue is not None
        assert self.history is not None
        read = self.history.histories(self.catalogue.users.rows(list(ids)))
        return np.split(read.rows, read.offsets[1:-1])


def show(result: RecallResult, words: Words, user: Id | None, rows: int | None = None) -> None:
    """Print an answer: a table of candidates with what caused them, and how each channel and filter fared.

    Args:
        result: the answer.
        words: says what ids stand for.
        user: who asked; None for a guest.
        rows: how many candidates at most; None for all.
    """
    out = console.output()
    _show_candidates(out, result, words, user, rows)
    _show_reports(out, result)
    _show_unknown(out, result)


def _show_candidates(
    out: Console, result: RecallResult, words: Words, user: Id | None, rows: int | None
) -> None:
    candidates = result.candidates[:rows]
    if not candidates:
        out.print("No candidates.")
        return
    kinds = {report.channel: report.trigger_kind for report in result.channels}
    proposals = [proposal for candidate in candidates for proposal in candidate.proposals]
    triggers = {kind: _triggers(proposals, kinds, kind) for kind in ("ITEM", "USER")}
    causes = {
        "ITEM": words.items(triggers["ITEM"], author=False),
        "USER": words.users(triggers["USER"], user),
    }
    names = words.items(candidate.id for candidate in candidates)
    shown = console.table(
        ("", "right"), ("item", "fold"), ("score", "right"), "channel", ("because of", "fold")
    )
    for place, candidate in enumerate(candidates, 1):
        channels = Text("\n").join(
            Text.assemble(f"{proposal.channel} ", (f"#{proposal.rank}", "cyan"))
            for proposal in candidate.proposals
        )
        because = "\n".join(_cause(proposal, kinds, causes) for proposal in candidate.proposals)
        shown.add_row(
            str(place), Text(names[candidate.id], "bold"), f"{candidate.score:.4f}", channels, Text(because)
        )
    out.print(shown)
    if len(candidates) < len(result.candidates):
        out.print(f"... and {len(result.candidates) - len(candidates):,} more", style="dim")


def _triggers(proposals: Iterable[Proposal], kinds: dict[str, str], kind: str) -> list[Id]:
    return [p.trigger for p in proposals if p.trigger is not None and kinds.get(p.channel) == kind]


def _cause(proposal: Proposal, kinds: dict[str, str], causes: dict[str, dict[Id, str]]) -> str:
    if proposal.trigger is None:
        return "-"
    kind = kinds.get(proposal.channel, "")
    known = causes.get(kind, {}).get(proposal.trigger)
    return known if known is not None else f"{kind.lower()} {proposal.trigger}"


def _show_reports(out: Console, result: RecallResult) -> None:
    numbers = [(name, "right") for name in ("returned", "eligible", "kept", "µs")]
    reports = console.table("channel", "status", *numbers, ("", "fold"))
    for report in result.channels:
        counts = (report.returned, report.eligible, report.kept, report.microseconds)
        status = Text(report.status, _STATUS_STYLES.get(report.status, "dim"))
        reports.add_row(report.channel, status, *(f"{count:,}" for count in counts), Text(report.message))
    out.print()
    out.print(reports)
    removed = ", ".join(f"{report.filter} {report.removed:,}" for report in result.filters)
    if removed:
        out.print(Text(f"\nremoved by filters: {removed}"))
    for name in (report.filter for report in result.filters if report.status == "UNAVAILABLE"):
        text = f"The filter {name} could not read the user's state and let everything pass."
        out.print(Text(text, "yellow"))
    if result.debug is not None:
        stages = ", ".join(f"{stage} {spent:,} µs" for stage, spent in result.debug.stages.items())
        out.print(Text(f"stages of a batch of {result.debug.batch_size}: {stages}"))
        out.print(Text(f"history that the channels saw: {len(result.debug.history):,} items"))
        for name, ids in result.debug.removed.items():
            if ids:
                more = f" and {len(ids) - _REMOVED_SHOWN:,} more" if len(ids) > _REMOVED_SHOWN else ""
                first = ", ".join(str(id_) for id_ in ids[:_REMOVED_SHOWN])
                out.print(Text(f"removed by {name}: {first}{more}"))
    out.print(Text(f"release {result.release}, request {result.request_id}", "dim"))


def _show_unknown(out: Console, result: RecallResult) -> None:
    unknown = result.unknown
    if unknown.user:
        out.print("The catalogue does not know this user.", style="yellow")
    counts = {
        "recent": unknown.recent_items,
        "excluded": unknown.exclude_items,
        "trigger": unknown.trigger_items,
    }
    for what, count in counts.items():
        if count:
            out.print(f"The catalogue does not know {count:,} of the {what} items.", style="yellow")


def as_json(result: RecallResult) -> str:
    """Return an answer as one JSON object: the fields of `RecallResult`."""
    plain: dict[str, Any] = dataclasses.asdict(result)
    if plain["debug"] is None:
        del plain["debug"]
    return json.dumps(plain, ensure_ascii=False)
