"""The live part of the demo: a new user and a new post, and how each answer differs from the one before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from engine import console
from engine.cli.common import Id

if TYPE_CHECKING:
    from engine.client import IngestClient, RecallClient, RecallResult
    from engine.data.live import LiveCatalogue

PLACE, CITY = (31.2304, 121.4737), "Shanghai"
"""The sample's items have no places, so nothing else is near."""
PATIENCE_SECONDS = 5.0
LIMIT = 100


@dataclass(frozen=True)
class Step:
    """What happened, what the next answer showed of it, and how long after the acknowledgement."""

    happened: str
    then: str
    seconds: float


class Story:
    """Tells the story to one server."""

    def __init__(self, recall: RecallClient, ingest: IngestClient, catalogue: LiveCatalogue) -> None:
        """Take clients of one server, and the catalogue to choose an author from."""
        self._recall, self._ingest, self._catalogue = recall, ingest, catalogue
        strings = catalogue.id_type == "string"
        number = int(time.time() * 1000) * 1000
        self.user: Id = f"demo-{number}" if strings else number
        self.post: Id = f"demo-post-{number}" if strings else number + 1

    def _chosen(self, answer: RecallResult) -> tuple[Id, Id | None]:
        """Return an item of an answer and its author: the one with most items, or None where there are no authors."""
        import numpy as np

        rows = self._catalogue.items.rows(answer.item_ids)
        authors = self._catalogue.columns.authors
        sizes = np.bincount(authors[authors >= 0], minlength=1)
        mine = authors[rows]
        best = int(np.where(mine >= 0, sizes[np.maximum(mine, 0)], 0).argmax())
        author = self._catalogue.authors.ids(mine[best : best + 1]).tolist()[0] if mine[best] >= 0 else None
        return answer.item_ids[best], author

    def _commonest_topic(self) -> str | None:
        """Return the tag of most items; None where there are no tags."""
        import numpy as np

        columns = self._catalogue.columns
        if not columns.tag_codes.size:
            return None
        code = int(np.bincount(columns.tag_codes).argmax())
        return next(tag for tag, known in columns.tag_vocabulary.items() if known == code)

    def steps(self) -> Iterable[Step]:
        """Let it happen, a step at a time."""
        from engine.client import Action, Dislike, Event, Exposure, Follow, Item, Leftovers, TakeDown

        user, post = self.user, self.post
        first = self._ask()
        yield Step(
            "a user asks whom nobody knows", f"{len(first.item_ids)} candidates: {_channels(first)}", 0.0
        )

        liked, author = self._chosen(first)
        self._report(Event(user, Action(liked, "like")))
        yield self._step(
            f"likes item {liked}", lambda answer: _because_of(answer, liked), "nothing resembles it"
        )
        if author is not None:
            self._report(Event(user, Follow(author)))
            yield self._step(f"follows author {author}", lambda answer: _from(answer, "followed_authors"))
        self._ingest.upsert_items(
            [Item(post, author=author, title="A new post", city=CITY, location=PLACE, quality=1.0)]
        )
        by = f"{f'author {author}' if author is not None else 'somebody'} publishes a post in {CITY}"
        yield self._step(by, lambda answer: _place_of(answer, post))

        shown = [id_ for id_ in self._ask().item_ids if id_ != post][:20]
        self._report(Event(user, Exposure([post, *shown])))
        yield self._step("the post and 20 more are shown", lambda answer: _gone(answer, {post, *shown}))

        left = self._ask().item_ids[-5:]
        self._report(Event(user, Leftovers(left)))
        yield self._step("fine ranking leaves 5 over", lambda answer: _from(answer, "cache"))
        topic = self._commonest_topic()
        if topic is not None:
            self._report(Event(user, Dislike(topic=topic)))
            yield self._step(f"dislikes the topic {topic}", lambda answer: _removed(answer, "dislikes"))
        self._ingest.upsert_items([TakeDown(post)])
        yield self._step(
            "the post is taken down",
            lambda answer: _gone(answer, {post}),
            guest=True,
            otherwise="it is still there",
        )

    def _report(self, event: object) -> None:
        self._ingest.report([event])  # type: ignore[list-item]

    def _ask(self, guest: bool = False) -> RecallResult:
        if guest:
            return self._recall.recall(limit=LIMIT, location=PLACE, city=CITY)
        if isinstance(self.user, int):
            return self._recall.recall(limit=LIMIT, location=PLACE, city=CITY, user_id=self.user)
        return self._recall.recall(limit=LIMIT, location=PLACE, city=CITY, user_key=self.user)

    def _step(
        self,
        happened: str,
        told: Callable[[RecallResult], str],
        otherwise: str = "nothing new",
        guest: bool = False,
    ) -> Step:
        """Ask until the answer shows what happened; say so where it never does."""
        began = time.perf_counter()
        while True:
            words = told(self._ask(guest))
            spent = time.perf_counter() - began
            if words or spent > PATIENCE_SECONDS:
                return Step(happened, words or otherwise, spent)


def tell(target: str, catalogue: LiveCatalogue) -> None:
    """Print the story as it happens."""
    from engine.client import IngestClient, RecallClient

    out = console.output()
    with RecallClient(target, timeout=10.0) as recall, IngestClient(target, timeout=10.0) as ingest:
        story = Story(recall, ingest, catalogue)
        out.print(
            Text.assemble(
                ("\n4. Live", "bold"), ": what is reported and published counts in the next answer\n"
            )
        )
        show(out, story.steps())


def show(out: Console, steps: Iterable[Step]) -> None:
    """Print steps when all have happened."""
    table = console.table(
        ("what happens", "fold"), ("what the next answer shows", "fold"), ("after", "right")
    )
    for step in steps:
        after = f"{step.seconds * 1000:.0f} ms" if step.seconds else ""
        table.add_row(step.happened, step.then, after)
    out.print(table)


def _channels(answer: RecallResult) -> str:
    return ", ".join(f"{report.channel} {report.kept}" for report in answer.channels if report.kept)


def _because_of(answer: RecallResult, item: Id) -> str:
    kinds = {report.channel: report.trigger_kind for report in answer.channels}
    counts: dict[str, int] = {}
    for candidate in answer.candidates:
        for proposal in candidate.proposals:
            if proposal.trigger == item and kinds.get(proposal.channel) == "ITEM":
                counts[proposal.channel] = counts.get(proposal.channel, 0) + 1
    found = ", ".join(f"{channel} {count}" for channel, count in counts.items())
    return f"candidates because of it: {found}" if found else ""


def _from(answer: RecallResult, channel: str) -> str:
    kept = next((report.kept for report in answer.channels if report.channel == channel), 0)
    return f"{kept} candidates from {channel}" if kept else ""


def _place_of(answer: RecallResult, item: Id) -> str:
    for place, candidate in enumerate(answer.candidates, 1):
        if candidate.id == item:
            channels = ", ".join(f"{p.channel} #{p.rank}" for p in candidate.proposals)
            return f"it is number {place} of the list, from {channels}"
    return ""


def _gone(answer: RecallResult, items: set[Id]) -> str:
    if items & set(answer.item_ids):
        return ""
    return "none of them is there" if len(items) > 1 else "it is not there"


def _removed(answer: RecallResult, name: str) -> str:
    removed = next((report.removed for report in answer.filters if report.filter == name), 0)
    return f"the filter {name} removes {removed} candidates" if removed else ""
