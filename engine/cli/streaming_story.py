"""The part of the demo about streaming VQ: posts that are published get a cluster at once, and are recalled from there;
where PyTorch is installed, by a trainer that learns meanwhile.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine import console
from engine.cli.common import Id
from engine.cli.story import PATIENCE_SECONDS, Step, show

if TYPE_CHECKING:
    from engine.client import IngestClient, Item, RecallClient, RecallResult
    from engine.config import Config
    from engine.data.live import LiveCatalogue
    from engine.state.assignments import AssignmentLog

CHANNEL = "streaming_vq"
READY_SECONDS = 60.0
"""How long the trainer may take to load PyTorch and its model."""

TRAINED_SECONDS = 30.0
"""How long it may take until the trainer shows what it did: on an idle machine some hundredths of a second."""

LEARNT = 100
"""Likes that the trainer is given to learn from."""

LIMIT = 1000
"""Candidates asked for, and the channel's quota: a post that nobody has seen stands behind many that people like."""

ASKED = 200
"""Users who may be asked for, until one is given a post."""


@dataclass(frozen=True)
class Trainer:
    """A trainer that runs.

    Attributes:
        process: the program.
        log: what it says.
    """

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> list[str]:
        """Return the lines in which it says how far it is."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return [line for line in lines if " assignments/s " in line]

    def ready(self) -> bool:
        """Wait until it takes events in; False where it ended or takes too long."""
        until = time.monotonic() + READY_SECONDS
        while not self.said():
            if self.process.poll() is not None or time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True


@contextmanager
def training(config: Config, folder: Path) -> Iterator[Trainer | None]:
    """Run the trainer for as long as the context lasts; None where PyTorch is not installed.

    Args:
        config: of the demo; the store program must run already.
        folder: of the snapshots.
    """
    if importlib.util.find_spec("torch") is None:
        yield None
        return
    from engine.data.dataset import to_toml

    path, log = folder / "trainer.toml", folder / "trainer.log"
    options = config.channel(CHANNEL)[1].model_dump(mode="json", exclude_none=True)
    said = {
        "interest": dict(config.interest),
        "ingest": {"event_log": True},
        "store": {"path": str(folder.resolve()), "keep_releases": config.store.keep_releases},
        "state": config.state.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
        "channels": {CHANNEL: options},
        "scenes": {"default": {"quotas": {CHANNEL: 1}, "fallback": []}},
    }
    path.write_text("".join(f"{key} = {to_toml(value)}\n" for key, value in said.items()), "utf-8")
    command = [sys.executable, "-m", "engine", "train", CHANNEL, "--follow", "--threads", "1"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--config", str(path)], stdout=out, stderr=out, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        yield Trainer(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class StreamingStory:
    """Tells it to one server."""

    def __init__(
        self, recall: RecallClient, ingest: IngestClient, catalogue: LiveCatalogue, user: Id
    ) -> None:
        """Take clients of one server, its catalogue, and a user to ask for."""
        import numpy as np

        self._recall, self._ingest, self._catalogue, self._user = recall, ingest, catalogue, user
        self._number = int(time.time() * 1000) * 1000
        self._posts: list[Id] = []
        # Not everybody likes what resembles one user's: the others are asked for until somebody is given it.
        known = catalogue.users.ids(np.arange(min(ASKED, len(catalogue.users)), dtype=np.int32)).tolist()
        self._others: Iterator[Id] = itertools.cycle([user, *known])

    def steps(self, log: AssignmentLog, trainer: Trainer | None) -> Iterator[Step]:
        """Let it happen, a step at a time.

        Args:
            log: of the channel.
            trainer: None: nobody trains.
        """
        best = self._best()
        if best is None:
            return
        like, cluster = best
        post = self._publish(like, 1)
        yield self._recalled(
            f"a post like item {like} of cluster {cluster} is published; the channel puts it where its features belong",
            post,
        )
        if trainer is None:
            return
        if not trainer.ready():
            yield Step("the trainer", f"does not come up: see {trainer.log}", 0.0)
            return
        post = self._publish(like, 2)
        asked = time.perf_counter()
        where = self._assigned(log, post)
        spent = time.perf_counter() - asked
        happened = "another is published while the trainer runs"
        if where is None:
            yield Step(happened, "the trainer has not assigned it", spent)
            return
        yield Step(happened, f"the trainer has put it into cluster {where}", spent)
        yield self._recalled("and it is asked for", post, where)
        self._learn(post)
        yield Step(f"{LEARNT} new users like it", self._learnt(trainer, LEARNT), 0.0)

    def _best(self) -> tuple[Id, int] | None:
        """Return the item that the channel ranks first for the user, and its cluster; None where it answers nothing."""
        found = [
            (proposal.rank, candidate.id, int(proposal.trigger or 0))
            for candidate in self._ask().candidates
            for proposal in candidate.proposals
            if proposal.channel == CHANNEL
        ]
        return min(found)[1:] if found else None

    def _ask(self) -> RecallResult:
        if isinstance(self._user, int):
            return self._recall.recall(limit=LIMIT, user_id=self._user, overrides={CHANNEL: LIMIT})
        return self._recall.recall(limit=LIMIT, user_key=self._user, overrides={CHANNEL: LIMIT})

    def _publish(self, like: Id, number: int) -> Id:
        """Publish a post by the author and with the tags of an item; return its id."""
        from engine.client import Item

        catalogue = self._catalogue
        rows = catalogue.items.rows([like])
        authors = catalogue.columns.authors[rows]
        author = catalogue.authors.ids(authors).tolist()[0] if authors[0] >= 0 else None
        strings = catalogue.id_type == "string"
        post: Id = f"demo-post-{self._number + number}" if strings else self._number + number
        item: Item = Item(
            post, author=author, tags=list(catalogue.describe_items(rows)[0].tags), title="A new post"
        )
        self._ingest.upsert_items([item])
        self._posts.append(post)
        return post

    def take_down(self) -> None:
        """Take down what was published: the next demo begins as this one did."""
        from engine.client import TakeDown

        if self._posts:
            self._ingest.upsert_items([TakeDown(post) for post in self._posts])

    def _learn(self, item: Id) -> None:
        """Have users whom nobody knows like an item: something to learn for the trainer."""
        from engine.client import Action, Event

        strings = self._catalogue.id_type == "string"
        users: list[Id] = [
            f"demo-{self._number + n}" if strings else self._number + n for n in range(10, 10 + LEARNT)
        ]
        self._ingest.report([Event(user, Action(item, "like")) for user in users])

    def _recalled(self, happened: str, post: Id, cluster: int | None = None) -> Step:
        """Ask until the channel's candidates have the post, from a cluster where one is given."""

        first = self._user

        def told() -> str:
            for candidate in self._ask().candidates:
                for proposal in candidate.proposals if candidate.id == post else ():
                    mine = proposal.channel == CHANNEL
                    if mine and (cluster is None or proposal.trigger == cluster):
                        return f"{CHANNEL} #{proposal.rank} of user {self._user}, from cluster {proposal.trigger}"
            self._user = next(self._others)
            return ""

        words, spent = _until(told, TRAINED_SECONDS)
        # Where others were asked for, the time is that of the search.
        return Step(happened, words or "nobody is given it", spent if self._user == first else 0.0)

    def _assigned(self, log: AssignmentLog, post: Id) -> int | None:
        """Wait until the trainer has put a post into a cluster, and return it."""
        import numpy as np

        from engine.core.keys import key_of

        key = np.array([key_of(post)], np.int64)

        def told() -> str:
            found = log.lookup(key)
            return str(int(found.clusters[0])) if len(found) else ""

        words, _ = _until(told, TRAINED_SECONDS)
        return int(words) if words else None

    @staticmethod
    def _learnt(trainer: Trainer, events: int) -> str:
        """Wait until the trainer has taken the events in; return what it says."""

        def told() -> str:
            newest = trainer.said()[-1]
            taken = int(newest.split()[0].replace(",", ""))
            return newest if taken >= events else ""

        words, _ = _until(told, TRAINED_SECONDS)
        if not words:
            return "the trainer has not said so"
        taken, _, rest = words.partition(" events")
        waiting = rest.partition("assignments/s")[2].strip().partition(" impressions")[0]
        return f"the trainer has taken in {taken} events; {waiting} impressions wait for their rewards"


def _until(told: Callable[[], str], patience: float = PATIENCE_SECONDS) -> tuple[str, float]:
    """Ask until there is something to tell; return it, "" where there never is, and the seconds."""
    began = time.perf_counter()
    while True:
        words, spent = told(), time.perf_counter() - began
        if words or spent > patience:
            return words, spent
        time.sleep(0.01)


def tell(
    target: str, catalogue: LiveCatalogue, user: Id, log: AssignmentLog, trainer: Trainer | None
) -> None:
    """Print it as it happens."""
    from rich.text import Text

    from engine.client import IngestClient, RecallClient

    out = console.output()
    said = "" if trainer is not None else "; where PyTorch is installed a trainer learns meanwhile"
    with RecallClient(target, timeout=10.0) as recall, IngestClient(target, timeout=10.0) as ingest:
        story = StreamingStory(recall, ingest, catalogue, user)
        out.print(
            Text.assemble(
                ("\n5. Learning", "bold"), f": streaming VQ knows a post before anybody has seen it{said}\n"
            )
        )
        with console.errors().status("   the trainer loads PyTorch" if trainer is not None else ""):
            try:
                steps = list(story.steps(log, trainer))
            finally:
                story.take_down()
        show(out, steps)
