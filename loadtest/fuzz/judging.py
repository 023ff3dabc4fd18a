"""What a server made of the cases: whether its answers add up, and which cases failed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from recall.v1 import recall_pb2

from loadtest.fuzz.cases import METHODS, Case

OUTCOMES = ("OK", "INVALID_ARGUMENT")

BUSY = ("RESOURCE_EXHAUSTED", "CANCELLED")
"""Statuses of a call that an overloaded server, or gRPC in front of it, did not take."""

FAILURES_KEPT = 100


def judge(sent: Case, answers: list[bytes]) -> str:
    """Return what is wrong with the answers to a case whose status is OK; "" where nothing is."""
    if len(answers) != len(sent.messages):
        return f"{len(answers)} answers to {len(sent.messages)} messages"
    for data, answer in zip(sent.messages, answers, strict=True):
        try:
            asked = sent.method.request.FromString(data)
        except DecodeError:
            return "no message, and not refused"
        try:
            got = sent.method.response.FromString(answer)
        except DecodeError:
            return "the answer cannot be read"
        wrong = _recall_is_wrong(asked, got) if sent.method is METHODS[0] else _ingest_is_wrong(asked, got)
        if wrong:
            return wrong
    return ""


def _recall_is_wrong(asked: Any, got: Any) -> str:
    if asked.HasField("limit") and len(got.candidates) > asked.limit:
        return f"{len(got.candidates)} candidates, the limit is {asked.limit}"
    broken = [report.channel for report in got.channels if report.status == recall_pb2.CHANNEL_STATUS_ERROR]
    return f"channels failed: {', '.join(broken)}" if broken else ""


def _ingest_is_wrong(asked: Any, got: Any) -> str:
    count = len(asked.changes if hasattr(asked, "changes") else asked.events)
    answered = got.accepted + len(got.refused) + getattr(got, "duplicates", 0)
    return "" if answered == count else f"{answered} of {count} entries answered"


@dataclass
class Tally:
    """What became of the cases.

    Attributes:
        outcomes: (method, kind, status) -> cases.
        failures: the first that failed: number, method, kind, why.
        failed: how many did.
    """

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0

    def add(self, other: Tally) -> None:
        """Count what another process sent."""
        self.outcomes += other.outcomes
        self.failed += other.failed
        self.failures = (self.failures + other.failures)[:FAILURES_KEPT]

    def note(self, sent: Case, status: str, wrong: str, folder: Path | None) -> None:
        """Count a case; keep one that failed."""
        self.outcomes[sent.method.name, sent.kind, status] += 1
        if status not in (*OUTCOMES, *BUSY) and not wrong:
            wrong = status
        if not wrong:
            return
        self.failed += 1
        if self.failed > FAILURES_KEPT:
            return
        failure = {"case": sent.number, "method": sent.method.name, "kind": sent.kind, "why": wrong}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files = [folder / f"{sent.number}-{sent.method.name}-{n}.bin" for n in range(len(sent.messages))]
            for file, message in zip(files, sent.messages, strict=True):
                file.write_bytes(message)
            failure["files"] = [str(file) for file in files]
        self.failures.append(failure)
