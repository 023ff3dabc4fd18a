"""Recalls and reports under way while something breaks, and what became of them before, meanwhile and afterwards."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from engine.client import RecallClient
from loadtest import kills
from loadtest.servers import ServerProcess
from loadtest.traffic import OK, Call, Traffic, milliseconds

REPORTERS = 2
REPORT_PAUSE = 0.02
"""Seconds between the calls of a reporter."""

REPORT_TIMEOUT = 20.0
"""Longer than the server waits for its store, so that its own answer comes, and not the client's deadline."""

RECALL_TIMEOUT = 2.0
RECOVERY_SECONDS = 2.0
"""Promised: so long after its return the store is in use again."""

_SETTLE_CALLS = 50


@dataclass
class Report:
    """What a fault did: facts, and the promises that were broken, in words."""

    facts: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def promise(self, kept: bool, words: str) -> None:
        """Note a promise that was not kept."""
        if not kept:
            self.broken.append(words)

    def as_json(self) -> dict[str, Any]:
        """Return facts, and what is broken."""
        return {**self.facts, "broken": self.broken}


class Load:
    """Constant recalls, and reporters who note what is acknowledged, while the context lasts.

    Attributes:
        traffic: the recalls.
        ledger: what was acknowledged.
    """

    def __init__(
        self,
        server: ServerProcess,
        users: list[int],
        per_second: float,
        seed: int = 0,
        timeout: float = RECALL_TIMEOUT,
    ) -> None:
        """Ask for `users`; report of users that no data set knows. `seed` keeps the items of several loads apart."""
        self._target = server.target
        self.traffic = Traffic(server.target, users, per_second=per_second, timeout=timeout)
        self.ledger = kills.Ledger()
        with RecallClient(server.target, timeout=30.0) as client:
            result = client.recall(user_id=kills.SEED_USER - 1, limit=100_000)
        self.catalogue = [int(id_) for id_ in result.item_ids]
        self._stop = threading.Event()
        self._reporters = [
            threading.Thread(
                target=kills.report,
                args=(self._target, self.catalogue, self.ledger, self._stop, REPORTERS * seed + number),
                kwargs={"timeout": REPORT_TIMEOUT, "pause": REPORT_PAUSE},
            )
            for number in range(REPORTERS)
        ]

    def __enter__(self) -> Self:
        self.traffic.__enter__()
        for reporter in self._reporters:
            reporter.start()
        self.traffic.wait_for(_SETTLE_CALLS)
        time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for reporter in self._reporters:
            reporter.join()
        self.traffic.__exit__()

    def between(self, since: float, until: float) -> tuple[list[Call], list[Call]]:
        """Return the recalls and the reports that began and ended between two moments."""
        recalls, reports = (
            [call for call in list(calls) if since <= call.began and call.ended <= until]
            for calls in (self.traffic.calls, self.ledger.calls)
        )
        return recalls, reports

    def serves_since(self, moment: float) -> bool:
        """Whether a recall and a report that began since a moment were answered as they should be."""
        recalls, reports = self.between(moment, time.monotonic())
        return any(call.status == OK and not call.flagged for call in recalls) and any(
            call.status == OK for call in reports
        )

    def phase(self, since: float, until: float) -> dict[str, Any]:
        """Return what became of the calls between two moments, in short."""
        recalls, reports = self.between(since, until)
        return {
            "recalls": len(recalls),
            "recalls_failed": statuses(recalls),
            "recalls_flagged": sum(call.flagged for call in recalls),
            "recall": milliseconds(call for call in recalls if call.status == OK),
            "reports_acknowledged": sum(call.status == OK for call in reports),
            "reports_refused": statuses(reports),
            "report": milliseconds(reports),
        }

    def recovered_after(self, moment: float) -> tuple[float, float]:
        """Return the seconds from a moment until no recall was flagged or failed any more, and no report refused."""
        bad_recalls = [call.ended for call in self.traffic.calls if call.flagged or call.status != OK]
        bad_reports = [call.ended for call in self.ledger.calls if call.status != OK]
        return round(max([moment, *bad_recalls]) - moment, 2), round(max([moment, *bad_reports]) - moment, 2)

    def lost(self, server: ServerProcess) -> list[str]:
        """Return, in words, what was acknowledged and is not there."""
        return kills.settled(server, self.catalogue, self.ledger)


def statuses(calls: Sequence[Call]) -> dict[str, int]:
    """Return how many calls ended with which status, those that succeeded left out."""
    return dict(Counter(call.status for call in calls if call.status != OK))
