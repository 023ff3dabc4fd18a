"""`recall serve`: worker processes on one port, watched, replaced, reloaded and stopped; all of it real."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.request import urlopen

import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.client import RecallClient
from engine.config import default_config_path
from engine.core.errors import ConfigError
from engine.data.dataset import write_dataset
from engine.data.snapshot import SnapshotStore
from engine.online.reservation import Reservation
from loadtest.servers import free_port, two_releases, without_shedding
from loadtest.traffic import Traffic

HUNG_SECONDS = 5.0
PATIENCE = 90.0

RUN = """
import asyncio, sys
from pathlib import Path
from engine.cli.common import settings, start_logging
from engine.online.supervisor import Supervisor

file, store = map(Path, sys.argv[1:3])
config, _ = settings(file, store)
start_logging()
ready = lambda port: print("port", port, flush=True)
asyncio.run(Supervisor(config, file.read_text(), ready, hung_seconds=float(sys.argv[3])).run())
"""


def ring_data(folder: Path, users: int = 20) -> Path:
    """A data set in which each user clicks on four items of a ring."""
    pairs = [(user, (user + at) % users) for user in range(users) for at in range(4)]
    owners, items = zip(*pairs, strict=True)
    times = [1_700_000_000 + 3600 * n for n in range(len(pairs))]
    write_dataset(
        folder,
        pa.table({"user_id": owners, "item_id": items, "event": ["click"] * len(pairs), "timestamp": times}),
        meta={"name": folder.name, "id_type": "int64"},
    )
    return folder


class Running:
    """A supervisor's process with two workers."""

    def __init__(self, store: SnapshotStore, users: list[int], folder: Path) -> None:
        self.store, self.users = store, users
        self.log = folder / "log"
        self.metrics_port = free_port()
        config = folder / "two.toml"
        options = {"workers": 2, "reload_seconds": 0.1, "port": 0, "metrics_port": self.metrics_port}
        config.write_text(without_shedding(*(("server", key, value) for key, value in options.items())))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN, str(config), str(store.root), str(HUNG_SECONDS)],
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("port "), self.said()
        self.port = int(line.split()[1])
        self.target = f"127.0.0.1:{self.port}"

    def said(self) -> str:
        return self.log.read_text()

    def until_said(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.said().count(text) < times:
            assert time.monotonic() < deadline, f"{text!r} was not said: {self.said()[-2000:]}"
            time.sleep(0.02)

    def workers(self) -> dict[int, int]:
        """The newest process of each worker, by its number."""
        return {
            int(n): int(pid) for n, pid in re.findall(r"worker (\d) \(process (\d+)\) serves", self.said())
        }

    def metrics(self) -> dict[tuple[str, str], float]:
        """Samples by name and worker, those of one name together."""
        with urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        found: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.name, sample.labels.get("worker", "")
                found[key] = found.get(key, 0.0) + sample.value
        return found

    def release(self) -> str:
        with RecallClient(self.target, timeout=60.0) as client:
            return client.recall(user_id=self.users[0], limit=5).release

    def put_in_service(self, name: str) -> None:
        reloads = self.said().count("answers instead of")
        self.store.rollback(name)
        self.until_said("answers instead of", reloads + 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[SnapshotStore, list[int]]:
    """A store with two releases, and some users."""
    folder = tmp_path_factory.mktemp("made")
    return two_releases(folder / "store", ring_data(folder / "data"))


@pytest.fixture(scope="module")
def running(
    made: tuple[SnapshotStore, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    server = Running(*made, tmp_path_factory.mktemp("running"))
    yield server
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.said()
    server.process.communicate()


def test_connections_spread_over_the_workers_and_their_metrics_come_together(running):
    deadline = time.monotonic() + PATIENCE
    while True:
        with RecallClient(running.target, timeout=60.0) as client:
            client.recall(user_id=running.users[0], limit=5)
        counted = running.metrics()
        answered = [counted.get(("recall_requests_total", worker), 0.0) for worker in ("0", "1")]
        if all(answered):
            break
        assert time.monotonic() < deadline
    assert counted["recall_workers", ""] == 2
    assert 0 < counted["recall_release_age_seconds", ""] < 3600


def test_no_request_fails_while_releases_change(running):
    with Traffic(running.target, running.users, per_second=50, timeout=60) as traffic:
        before = running.store.current_name()
        other = next(name for name in running.store.release_names() if name != before)
        for name in (other, before):
            traffic.wait_for(30)
            running.put_in_service(name)
            assert running.release() == name
        traffic.wait_for(30)
    assert traffic.failed == {}
    assert traffic.answered[other] > 0
    assert set(traffic.answered) == {before, other}


def test_a_worker_that_is_killed_is_replaced_and_no_client_notices(running):
    victim = running.workers()[1]
    restarts = running.said().count("(process ")
    with Traffic(running.target, running.users, per_second=50, timeout=60) as traffic:
        traffic.wait_for(30)
        os.kill(victim, signal.SIGKILL)
        running.until_said(f"worker 1 (process {victim}) ended: killed by SIGKILL")
        deadline = time.monotonic() + PATIENCE
        while running.workers()[1] == victim:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        traffic.wait_for(30)
    assert traffic.failed == {}
    assert running.said().count("(process ") > restarts
    assert running.metrics()["recall_worker_restarts_total", "1"] == 1
    assert running.release() == running.store.current_name()


def test_a_worker_that_hangs_is_killed_and_replaced(running):
    victim = running.workers()[0]
    os.kill(victim, signal.SIGSTOP)
    running.until_said(f"worker 0 (process {victim}) has not answered for {HUNG_SECONDS:g} s: it is killed")
    deadline = time.monotonic() + PATIENCE
    while running.workers()[0] == victim:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert running.release() == running.store.current_name()


def test_a_damaged_release_is_refused_and_the_other_goes_on_serving(running):
    before = running.store.current_name()
    other = next(name for name in running.store.release_names() if name != before)
    version = running.store.release(other).snapshots["popular"]
    assert version != running.store.release(before).snapshots["popular"]
    victim = next((running.store.root / "popular" / version).glob("scores*.npy"))
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        running.store.rollback(other)
        running.until_said(f"release {before} goes on serving, {other} is refused: ")
        assert running.release() == before
        assert running.metrics()["recall_reloads_total", ""] >= 3
    finally:
        victim.write_bytes(content)
    running.store.rollback(before)


def test_workers_end_when_the_supervisor_is_killed(running):
    workers = running.workers()
    running.process.kill()
    running.process.wait()
    deadline = time.monotonic() + PATIENCE
    for pid in workers.values():
        while alive(pid):
            assert time.monotonic() < deadline, running.said()[-2000:]
            time.sleep(0.02)
    assert running.said().count("the supervisor is gone") == 2
    with suppress(FileNotFoundError, ProcessLookupError):  # the store waits for the next supervisor
        os.kill(int((running.store.root / "state" / "store.pid").read_text()), signal.SIGTERM)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        with suppress(ProcessLookupError):
            os.kill(pid, 0)
            return not Path("/proc").is_dir()
        return False


def test_what_a_worker_cannot_start_with_ends_it_all_with_one_sentence(made, tmp_path):
    store, _ = made
    config = tmp_path / "more.toml"
    text = default_config_path().read_text("utf-8")
    text += '\n[channels.more]\ntype = "swing"\nalpha = 3.0\n[scenes.other.quotas]\nmore = 10\n[state]\nurl = "none"\n'
    config.write_text(text)
    command = [
        sys.executable,
        "-m",
        "engine",
        "serve",
        "-c",
        str(config),
        "-s",
        str(store.root),
        "--port",
        "0",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: channels.more: the release has no snapshot of it; run `recall build`"
    )
    assert "Traceback" not in done.stderr


def test_a_port_is_reserved_for_those_who_share_it():
    with Reservation("127.0.0.1", 0) as first:
        assert first.port > 0
        with pytest.raises(
            ConfigError, match=f"cannot listen on 127.0.0.1:{first.port}: Address already in use"
        ):
            Reservation("127.0.0.1", first.port)
        with ExitStack() as stack:
            for _ in range(2):
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener.bind(("127.0.0.1", first.port))
                listener.listen()
            with pytest.raises(ConfigError, match="Address already in use"):
                Reservation("127.0.0.1", first.port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="Address already in use"):
            Reservation("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match=r"server\.port: cannot listen on nowhere\.invalid:1: "):
        Reservation("nowhere.invalid", 1)
