"""People who scroll: a load test with locust (https://locust.io).

    pip install 'recall-engine[load]'
    locust -f loadtest/locustfile.py --host 127.0.0.1:50051 --user-ids 0-199999

opens locust's web page on port 8089; `--headless -u 50 -r 10 -t 60s` runs without it, and docs/load-test.md has the rest:
several processes, several machines, pictures.

Each simulated person asks for candidates, is shown a part of them, clicks some, and asks again. Whatever was acknowledged
as shown must not come back: an answer that holds such an item counts as a failure of "Recall again", and so does an
answer whose filters could not judge.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import grpc.experimental.gevent
from locust import User, constant, events, task
from locust.exception import RescheduleTask, StopUser

from engine.client import Action, Event, Exposure, IngestClient, InvalidRequest, RecallClient, RecallResult

# locust has patched the standard library before it reads this file; gRPC's own waiting must be made to know of it.
grpc.experimental.gevent.init_gevent()


@events.init_command_line_parser.add_listener
def options(parser: Any) -> None:
    """Add what this test can be told, on the command line and on the web page."""
    group = parser.add_argument_group("recall")
    group.add_argument(
        "--user-ids", default="0-999", metavar="FIRST-LAST", help="Range of user ids to draw from."
    )
    group.add_argument(
        "--user-file", default="", metavar="FILE", help="User ids, one a line, instead of the range."
    )
    group.add_argument("--string-ids", action="store_true", help="The ids of --user-file are strings.")
    group.add_argument("--scene", default="", help="Scene that is asked for. Default: the server's.")
    group.add_argument("--limit", type=int, default=300, help="Candidates asked for.")
    group.add_argument("--screen", type=int, default=10, help="Candidates shown of each answer.")
    group.add_argument("--screens", type=int, default=5, help="Answers that a person looks at on average.")
    group.add_argument("--click-rate", type=float, default=0.1, help="Chance that a shown item is clicked.")
    group.add_argument("--look-seconds", type=float, default=1.0, help="How long a screen is looked at.")
    group.add_argument("--timeout", type=float, default=1.0, help="Seconds that a call may take.")
    group.add_argument(
        "--ca", default="", metavar="FILE", help="Authorities to believe; the calls use TLS then."
    )
    # On the parser itself, because locust keeps secrets off the web page for those alone.
    parser.add_argument(
        "--token", default="", env_var="RECALL_TOKEN", is_secret=True, help="Sent with each call."
    )


class People:
    """Ids to draw from."""

    def __init__(self, chosen: Any) -> None:
        self._ids: range | list[int] | list[str]
        if chosen.user_file:
            lines = Path(chosen.user_file).read_text(encoding="utf-8").split()
            self._ids = lines if chosen.string_ids else [int(line) for line in lines]
        else:
            first, _, last = chosen.user_ids.partition("-")
            self._ids = range(int(first), int(last or first) + 1)
        if not self._ids:
            raise ValueError("there are no users to draw from")

    def draw(self) -> int | str:
        """Return anybody."""
        return random.choice(self._ids)


@events.init.add_listener
def prepare(environment: Any, **_: Any) -> None:
    """Read the ids once for the process; a wrong option ends locust here."""
    try:
        environment.people = People(environment.parsed_options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--user-ids, --user-file: {error}") from error
    environment.clients = {}
    # Importing took its time, which gevent has not noticed: --run-time would begin with the import.
    gevent.get_hub().loop.update_now()


class Person(User):  # type: ignore[misc]
    """Somebody who scrolls. Weights: of ten turns nine look at what comes, one comes back after having been away."""

    def wait_time(self) -> float:
        """Return how long this person looks before acting again: about --look-seconds, never less than half."""
        mean = self.environment.parsed_options.look_seconds
        return mean / 2 + random.expovariate(2 / mean) if mean > 0 else constant(0)(self)

    def on_start(self) -> None:
        """Connect, as an application server does: one connection for everybody in the process."""
        if not self.host:
            raise StopUser("--host says where the server listens")
        clients = self.environment.clients
        if self.host not in clients:
            clients[self.host] = self._connected(RecallClient), self._connected(IngestClient)
        self._recalls, self._ingests = clients[self.host]
        self._begin()

    def _connected(self, kind: type[Any]) -> Any:
        chosen = self.environment.parsed_options
        security = {name: getattr(chosen, name) for name in ("token", "ca") if getattr(chosen, name)}
        target = self.host.removeprefix("http://").removeprefix("https://").rstrip("/")
        return kind(target, timeout=chosen.timeout, **security)

    def _begin(self) -> None:
        """Be somebody else, who has seen nothing in this test."""
        self._id = self.environment.people.draw()
        self._shown: set[int | str] = set()

    @task(9)
    def look(self) -> None:
        """Ask, be shown the first of it, click some of those."""
        chosen = self.environment.parsed_options
        answer = self._recall()
        screen = answer.item_ids[: chosen.screen]
        if not screen:
            self._begin()  # has seen everything that there is for them
            return
        self._report("Report exposure", [Event(self._id, Exposure(screen))])
        self._shown.update(screen)
        clicked = [item for item in screen if random.random() < chosen.click_rate]
        if clicked:
            self._report("Report click", [Event(self._id, Action(item, "click")) for item in clicked])
        if random.random() < 1 / chosen.screens:
            self._recall()  # the check of the last screen
            self._begin()

    @task(1)
    def come_back(self) -> None:
        """Pull to refresh: ask again without looking at anything."""
        self._recall()

    def _recall(self) -> RecallResult:
        chosen = self.environment.parsed_options
        scene = {"scene": chosen.scene} if chosen.scene else {}
        name = "Recall again" if self._shown else "Recall"
        answer: RecallResult = self._timed(
            name,
            lambda: self._recalls.recall(user_id=self._id, limit=chosen.limit, **scene),
            self._wrong,
            lambda answer: len(answer.candidates),
        )
        return answer

    def _wrong(self, answer: RecallResult) -> Exception | None:
        """Return what is wrong with an answer that came."""
        blind = [report.name for report in answer.filters if report.status != "OK"]
        if blind:
            return RuntimeError(f"filters could not judge: {', '.join(blind)}")
        back = self._shown.intersection(answer.item_ids)
        if back:
            return AssertionError("items came back that had been shown")
        return None

    def _report(self, name: str, what: list[Event]) -> None:
        def wrong(result: Any) -> Exception | None:
            return RuntimeError(f"refused: {result.refused[0].reason}") if result.refused else None

        self._timed(name, lambda: self._ingests.report(what), wrong, lambda _: len(what))

    def _timed(
        self,
        name: str,
        call: Callable[[], Any],
        wrong: Callable[[Any], Exception | None],
        size: Callable[[Any], int],
    ) -> Any:
        """Call, and tell locust how long it took and what went wrong; its bytes are items and events here."""
        began = time.perf_counter()
        result, error = None, None
        try:
            result = call()
        except grpc.RpcError as failure:
            error = RuntimeError(failure.code().name)  # type: ignore[attr-defined]
        except InvalidRequest as failure:
            error = failure
        spent = (time.perf_counter() - began) * 1000
        self.environment.events.request.fire(
            request_type="grpc",
            name=name,
            response_time=spent,
            response_length=0 if error is not None else size(result),
            exception=error if error is not None else wrong(result),
            context={},
        )
        if error is not None:
            raise RescheduleTask
        return result
