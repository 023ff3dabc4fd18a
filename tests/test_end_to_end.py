"""From a data set on disk to answers on the wire, through the programs that people start."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine.cli import app
from engine.client import InvalidRequest, RecallClient, RecallResult
from engine.config import Config, default_config_path, load_config
from engine.core.channel import SilentProgress
from engine.core.errors import SnapshotError
from engine.data.dataset import Dataset, write_dataset
from engine.data.sample import sample_path
from engine.data.snapshot import SnapshotStore
from engine.offline.build import build_release
from engine.online.replica import Replica
from engine.online.server import serve

SERVICE = "recall.v1.RecallService"
LARGEST = 2**63 - 1

# --- the programs --------------------------------------------------------------------------------


def recall(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line as a process."""
    command = [sys.executable, "-m", "engine", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=os.environ | {"COLUMNS": "160"}
    )


@dataclass
class Serving:
    """A `recall serve` process."""

    process: subprocess.Popen[str]
    target: str
    log: Path

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal; return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(store: Path, folder: Path) -> Iterator[Serving]:
    """Start `recall serve --port 0` and read from its output where it listens."""
    log = folder / "serve.log"
    command = [sys.executable, "-u", "-m", "engine", "serve", "--store", str(store), "--port", "0"]
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        watchdog.cancel()
        found = re.fullmatch(r"Serving on (127\.0\.0\.1:\d+) with 1 worker\. Ctrl-C stops\.\n", line)
        assert found is not None, line + log.read_text()
        yield Serving(process, found[1], log)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
        end_orphaned_store(store)


def end_orphaned_store(store: Path) -> None:
    """End the embedded store of a process that was killed: it waits for the next one to take it over."""
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((store / "state" / "store.pid").read_text()), signal.SIGTERM)


@contextmanager
def serving_here(config: Config, store: SnapshotStore) -> Iterator[RecallClient]:
    """The same server in a thread of this process, which starts faster."""
    replica = Replica.open(config, store)
    config = config.model_copy(update={"server": config.server.model_copy(update={"port": 0})})
    ready = threading.Event()
    known: dict[str, Any] = {}

    async def main() -> None:
        known["loop"], known["stop"] = asyncio.get_running_loop(), asyncio.Event()

        def on_ready(port: int) -> None:
            known["port"] = port
            ready.set()

        await serve(config, replica, on_ready, known["stop"])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(60)
        with RecallClient(f"127.0.0.1:{known['port']}", timeout=60) as client:
            yield client
    finally:
        known["loop"].call_soon_threadsafe(known["stop"].set)
        thread.join()


def built(config: Config, data: Path, store: Path) -> SnapshotStore:
    made = SnapshotStore(store)
    build_release(config, Dataset.open(data), made, SilentProgress())
    return made


def data_of(path: Path, likes: Sequence[tuple[Any, Any]], strings: bool = False, **more: Any) -> Path:
    """A data set of who liked what, each a second after the one before."""
    kind = pa.string() if strings else pa.int64()
    users, items = zip(*likes, strict=True)
    table = pa.table(
        {
            "user_id": pa.array(users, kind),
            "item_id": pa.array(items, kind),
            "event": ["click"] * len(likes),
            "timestamp": list(range(1_700_000_000, 1_700_000_000 + len(likes))),
        }
    )
    meta = {"name": path.name, "id_type": "string" if strings else "int64"}
    write_dataset(path, table, meta=meta, **more)
    return path


def ring(users: int, items: int, length: int = 4, first: int = 0) -> list[tuple[int, int]]:
    """User u likes the items u, u + 1, ... of a ring."""
    return [(first + user, first + (user + at) % items) for user in range(users) for at in range(length)]


# --- the sample, built and served by processes ---------------------------------------------------


@pytest.fixture(scope="session")
def sample_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that `recall build` made of the bundled sample."""
    store = tmp_path_factory.mktemp("sample") / "store"
    done = recall("build", sample_path(), "--store", store)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Release \S+ is in service: ", done.stdout, re.MULTILINE)
    return store


@pytest.fixture(scope="session")
def served(sample_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`recall serve` on that store."""
    with serving(sample_store, tmp_path_factory.mktemp("served")) as process:
        yield process


@pytest.fixture(scope="session")
def client(served: Serving) -> Iterator[RecallClient]:
    with RecallClient(served.target, timeout=60) as connected:
        yield connected


@pytest.fixture(scope="session")
def users(sample_store: Path) -> list[int]:
    """Some users of the sample."""
    index = Replica.open(load_config(), SnapshotStore(sample_store)).catalogue.users
    return index.ids(np.arange(0, len(index), len(index) // 6, dtype=np.int32)).tolist()


def test_several_users_are_answered_by_at_least_three_channels(client, users):
    answers = {user: client.recall(user_id=user, debug=True) for user in users}
    for result in answers.values():
        proposers = {proposal.channel for each in result.candidates for proposal in each.proposals}
        assert len(proposers & {"itemcf", "swing", "usercf", "popular", "fresh"}) >= 3
        assert len(result.candidates) == 300
        assert result.unknown.user is False
    assert len({tuple(result.item_ids) for result in answers.values()}) == len(users)


def test_scores_and_provenance_are_consistent(client, users, sample_store):
    catalogue = Replica.open(load_config(), SnapshotStore(sample_store)).catalogue
    known_users = set(catalogue.users.ids(np.arange(len(catalogue.users), dtype=np.int32)).tolist())
    for user in users:
        result = client.recall(user_id=user, limit=150, debug=True)
        history = set(result.debug.history)
        reports = {report.channel: report for report in result.channels}
        assert len(set(result.item_ids)) == len(result.item_ids) == 150
        assert not history & set(result.item_ids)
        kept: Counter[str] = Counter()
        places: dict[str, dict[int, float]] = {name: {} for name in reports}
        for each in result.candidates:
            # Reciprocal-rank fusion of what the answer itself says.
            assert each.score == pytest.approx(sum(1 / (60 + p.rank) for p in each.proposals), rel=1e-5)
            assert len({p.channel for p in each.proposals}) == len(each.proposals) >= 1
            for proposal in each.proposals:
                kept[proposal.channel] += 1
                assert proposal.rank not in places[proposal.channel]
                places[proposal.channel][proposal.rank] = proposal.score
                assert 1 <= proposal.rank <= reports[proposal.channel].eligible
                if proposal.channel in ("itemcf", "swing"):
                    assert proposal.trigger in history
                elif proposal.channel == "usercf":
                    assert proposal.trigger in known_users - {user}
                else:
                    assert proposal.trigger is None
        for name, report in reports.items():
            assert report.kept == kept[name]
            assert report.kept <= report.eligible <= report.returned
            assert report.status in (("OK",) if report.returned else ("EMPTY", "SKIPPED"))
            by_rank = [score for _, score in sorted(places[name].items())]
            assert by_rank == sorted(by_rank, reverse=True)
        removed = sum(each.removed for each in result.filters)
        assert (
            sum(r.returned for r in reports.values()) == sum(r.eligible for r in reports.values()) + removed
        )


def test_the_answer_names_the_release_that_made_it(client, users, sample_store):
    release = SnapshotStore(sample_store).current()
    result = client.recall(user_id=users[0])
    assert result.release == release.name
    assert dict(result.snapshots) == release.snapshots


def test_asked_by_many_at_once_everybody_gets_their_own_answer(client, users):
    alone = {user: client.recall(user_id=user, limit=50).candidates for user in users}
    asked = users * 6
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda user: client.recall(user_id=user, limit=50).candidates, asked))
    assert together == [alone[user] for user in asked]


def test_strangers_and_guests_are_answered_by_the_fallback(client):
    for asked in ({"user_id": 10**15}, {}):
        result = client.recall(limit=20, **asked)
        assert {p.channel for each in result.candidates for p in each.proposals} <= {"popular", "fresh"}
        assert len(result.candidates) == 20


def test_exclusion_reaches_to_the_last_item(client, users, sample_store):
    items = Replica.open(load_config(), SnapshotStore(sample_store)).catalogue.items
    everything = items.ids(np.arange(len(items), dtype=np.int32)).tolist()
    history = set(client.recall(user_id=users[0], debug=True).debug.history)
    last = next(item for item in reversed(everything) if item not in history)
    others = [item for item in everything if item != last]
    assert client.recall(user_id=users[0], exclude=others).item_ids == [last]
    assert client.recall(user_id=users[0], exclude=everything).item_ids == []


def test_health_and_reflection_answer(served):
    with grpc.insecure_channel(served.target) as channel:
        for name in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=name)
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=60)
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        (answer,) = stub.ServerReflectionInfo(iter([ask]), timeout=60)
        assert answer.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("limit", [0, 5001, 2**31 - 1])
def test_a_limit_of_none_and_a_huge_one_are_refused_by_name(client, limit):
    with pytest.raises(InvalidRequest) as caught:
        client.recall(limit=limit)
    assert [violation.field for violation in caught.value.violations] == ["limit"]
    assert caught.value.__cause__.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_scene_is_refused_by_name(client):
    with pytest.raises(InvalidRequest, match="expected one of default") as caught:
        client.recall(scene="nope")
    assert [violation.field for violation in caught.value.violations] == ["scene"]


def test_the_command_line_asks_the_same(client, served, users):
    done = recall("query", "--target", served.target, "--user", users[0], "--limit", 7, "--json")
    assert done.returncode == 0, done.stderr
    told = [candidate["id"] for candidate in json.loads(done.stdout)["candidates"]]
    assert told == client.recall(user_id=users[0], limit=7).item_ids


# --- processes that are ended --------------------------------------------------------------------


@pytest.fixture
def two_releases(tmp_path: Path) -> SnapshotStore:
    """A store with a release of one data set, and after it one of another, which share no file."""
    store = tmp_path / "store"
    for name, users in (("first", 12), ("second", 15)):
        built(load_config(), data_of(tmp_path / name, ring(users, users)), store)
    return SnapshotStore(store)


def test_a_damaged_release_is_refused_by_name_and_the_one_before_serves_until_told_to_stop(
    two_releases, tmp_path
):
    newest, before = two_releases.release_names()
    victim = next(
        (two_releases.root / "usercf" / two_releases.release(newest).snapshots["usercf"]).glob("*.npy")
    )
    victim.write_bytes(victim.read_bytes()[:-1])
    with serving(two_releases.root, tmp_path) as process:
        with RecallClient(process.target, timeout=60) as client:
            result = client.recall(user_id=3, limit=5)
            assert result.release == before
            assert len(result.candidates) == 5
        log = process.log.read_text()
        assert f"release refused, an earlier one serves: {victim}: " in log
        assert process.end() == 0
        assert "Traceback" not in process.log.read_text()
    assert two_releases.current().name == newest  # serving changes nothing in the store


def test_a_build_killed_in_the_middle_leaves_the_earlier_release(sample_store, tmp_path):
    # Without the state store, which may be running.
    copied = shutil.copytree(sample_store, tmp_path / "store", ignore=shutil.ignore_patterns("state"))
    store = SnapshotStore(copied)
    before = store.current()
    path = tmp_path / "recall.toml"
    path.write_text(default_config_path().read_text("utf-8").replace("click = 1.0", "click = 1.5"), "utf-8")
    command = [sys.executable, "-u", "-m", "engine", "build", str(sample_path()), "--store", str(store.root)]
    for moment in ("reading", "itemcf"):
        process = subprocess.Popen(
            [*command, "--config", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            if f"done  {moment}" in line:
                break
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        process.stderr.close()
        assert store.current() == before
        release, _, refused = store.newest_valid()
        assert (release, refused) == (before, [])
    assert list(store.root.glob("*/.tmp-*"))  # a killed build cannot clear up; the next one does
    with serving_here(load_config(), store) as client:
        assert client.recall(limit=3).release == before.name
    built(load_config(), sample_path(), store.root)
    assert not list(store.root.glob("*/.tmp-*"))
    assert store.current().snapshots == before.snapshots


def files_of(store: SnapshotStore, name: str) -> list[Path]:
    """Every file that a release consists of."""
    release = store.release(name)
    found = [
        path
        for component, version in release.snapshots.items()
        for path in sorted((store.root / component / version).iterdir())
    ]
    return [*found, store.root / "releases" / f"{name}.json"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_whichever_file_is_cut_off_it_is_named_and_the_earlier_release_serves(two_releases, caplog, share):
    newest, before = two_releases.release_names()
    files = files_of(two_releases, newest)
    assert len(files) > 30
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(
            whole[: min(int(len(whole) * share), len(whole) - 2)]
        )  # the last byte of a manifest is a line's end
        caplog.clear()
        replica = Replica.open(load_config(), two_releases)
        assert replica.release == before
        (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
        assert f"release refused, an earlier one serves: {file}: " in record.getMessage()
        file.write_bytes(whole)
    assert Replica.open(load_config(), two_releases).release == newest


def test_a_release_whose_every_file_is_whole_serves_though_the_pointer_is_cut_off(two_releases, caplog):
    pointer = two_releases.root / "current"
    pointer.write_bytes(pointer.read_bytes()[:9])
    assert Replica.open(load_config(), two_releases).release == two_releases.release_names()[0]
    assert f"{pointer}: damaged" in caplog.text


def test_where_no_release_is_whole_nothing_is_served(two_releases, capsys):
    for name in two_releases.release_names():
        victim = files_of(two_releases, name)[0]
        victim.write_bytes(b"")
    newest = files_of(two_releases, two_releases.release_names()[0])[0]
    with pytest.raises(SnapshotError) as caught:
        Replica.open(load_config(), two_releases)
    assert caught.value.file == str(newest)
    with pytest.raises(SystemExit) as ended:
        app(["serve", "--store", str(two_releases.root), "--port", "0"])
    assert ended.value.code == 2
    assert f"error: {newest}: " in capsys.readouterr().err


# --- data sets of every kind -----------------------------------------------------------------------


def proposers(result: RecallResult) -> set[str]:
    return {proposal.channel for each in result.candidates for proposal in each.proposals}


def test_string_ids_end_to_end(tmp_path):
    def key(number: int) -> str:
        return ("Ω" if number % 2 else "") + f"item {number}"

    likes = [(f"user-{user}", key(item)) for user, item in ring(12, 12)]
    titles = pa.table({"item_id": [key(n) for n in range(12)], "author_id": [f"a{n % 3}" for n in range(12)]})
    config = load_config()
    store = built(config, data_of(tmp_path / "data", likes, strings=True, items=titles), tmp_path / "store")
    with serving_here(config, store) as client:
        result = client.recall(user_key="user-3", debug=True, exclude=[key(8), "nobody's"])
        assert result.debug.history == tuple(key(n) for n in (6, 5, 4, 3))
        assert set(result.item_ids) == {key(n) for n in range(12)} - {key(n) for n in (3, 4, 5, 6, 8)}
        assert proposers(result) >= {"itemcf", "swing", "usercf"}
        triggers = {p.channel: p.trigger for each in result.candidates for p in each.proposals}
        assert triggers["itemcf"] in result.debug.history
        assert triggers["usercf"].startswith("user-")
        assert result.unknown.exclude_items == 1
        recent = client.recall(user_key="nobody", recent_items=[key(1)], recent_mode="override", debug=True)
        assert recent.debug.history == (key(1),)
        assert recent.unknown.user is True
        with pytest.raises(InvalidRequest) as caught:
            client.recall(user_id=3)
        assert [violation.field for violation in caught.value.violations] == ["user_id"]


def test_ids_at_the_ends_of_int64_end_to_end(tmp_path):
    # Two ends and some between; the user 0 and the largest one like alike, but for an item each.
    ends = [0, 1, 2**31, 2**32, 2**53 + 1, LARGEST - 1, LARGEST]
    likes = [(0, item) for item in ends[1:]] + [(LARGEST, item) for item in ends[:-1]]
    likes += [(2**53 + 1, item) for item in ends]
    config = load_config()
    store = built(config, data_of(tmp_path / "data", likes), tmp_path / "store")
    with serving_here(config, store) as client:
        low, high = client.recall(user_id=0, debug=True), client.recall(user_id=LARGEST, debug=True)
        assert (low.item_ids, high.item_ids) == ([0], [LARGEST])
        assert low.debug.history == tuple(reversed(ends[1:]))
        for result in (low, high):
            assert proposers(result) >= {"itemcf", "swing", "usercf"}
            assert {p.trigger for p in result.candidates[0].proposals if p.channel == "itemcf"} <= set(ends)
        assert set(client.recall(exclude=[0, LARGEST]).item_ids) == set(ends[1:-1])
        assert client.recall(recent_items=[LARGEST], debug=True).debug.history == (LARGEST,)
        assert client.recall(user_id=LARGEST - 1).unknown.user is True


@pytest.mark.parametrize("strings", [False, True])
def test_one_user_and_one_item_end_to_end(tmp_path, strings):
    like = ("u", "i") if strings else (7, 9)
    config = load_config()
    store = built(config, data_of(tmp_path / "data", [like], strings=strings), tmp_path / "store")
    with serving_here(config, store) as client:
        asked = {"user_key": like[0]} if strings else {"user_id": like[0]}
        assert client.recall(**asked).candidates == ()  # they know all there is
        assert client.recall().item_ids == [like[1]]
        assert client.recall(exclude=[like[1]]).item_ids == []
        stored = client.recall(**asked, debug=True)
        assert stored.debug.history == (like[1],)
        assert stored.unknown.user is False


@pytest.mark.parametrize("likes", [[(1, item) for item in range(5)], [(user, 1) for user in range(5)]])
def test_one_user_of_many_items_and_one_item_of_many_users(tmp_path, likes):
    config = load_config()
    store = built(config, data_of(tmp_path / "data", likes), tmp_path / "store")
    with serving_here(config, store) as client:
        assert client.recall(user_id=1).candidates == ()
        assert sorted(client.recall().item_ids) == sorted({item for _, item in likes})
        fewer = client.recall(user_id=1, recent_items=[likes[0][1]], recent_mode="override")
        assert sorted(fewer.item_ids) == sorted({item for _, item in likes} - {likes[0][1]})


# --- what is refused, in one sentence ----------------------------------------------------------------


def test_an_empty_data_set_is_one_sentence(tmp_path, capsys):
    data = data_of(tmp_path / "data", [(1, 1)])
    table = pq.read_table(data / "interactions.parquet")
    pq.write_table(table.slice(0, 0), data / "interactions.parquet")
    with pytest.raises(SystemExit) as ended:
        app(["build", str(data), "--store", str(tmp_path / "store")])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err == "error: interactions.parquet: holds no rows\n"
    assert SnapshotStore(tmp_path / "store").current() is None


@pytest.mark.parametrize("file", ["interactions.parquet", "items.parquet"])
@pytest.mark.parametrize("damage", ["cut off", "garbage", "flipped", "nothing"])
def test_a_corrupt_parquet_file_is_one_sentence_that_names_it(tmp_path, capsys, file, damage):
    titles = pa.table({"item_id": list(range(300)), "title": [f"title {n}" for n in range(300)]})
    data = data_of(tmp_path / "data", ring(300, 300), items=titles)
    whole = (data / file).read_bytes()
    middle = len(whole) // 3
    content = {
        "cut off": whole[: len(whole) // 2],
        "garbage": b"PAR1" + bytes(range(256)) + b"PAR1",
        "flipped": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
        "nothing": b"",
    }[damage]
    (data / file).write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        app(["build", str(data), "--store", str(tmp_path / "store")])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert re.search(rf"^error: {re.escape(file)}\S*[:,] ", err.splitlines()[-1])
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert SnapshotStore(tmp_path / "store").current() is None


def test_a_corrupt_parquet_file_ends_the_program_with_2(tmp_path):
    data = data_of(tmp_path / "data", [(1, 1)])
    (data / "interactions.parquet").write_bytes(b"PAR1 and nothing else")
    done = recall("build", data, "--store", tmp_path / "store")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: interactions.parquet: cannot be read as Parquet: ")
    assert len(done.stderr.splitlines()) == 1


NAN_KEYS = {
    "scenes.default.weights.itemcf": ("[scenes.default.weights]", "[scenes.default.weights]\nitemcf = nan"),
    "scenes.default.rank_constant": ("rank_constant = 60.0", "rank_constant = nan"),
    "interest.click": ("click = 1.0", "click = nan"),
    "channels.popular.half_life_days": ("half_life_days = 30.0", "half_life_days = inf"),
    "server.reserve_ms": ("reserve_ms = 2.0", "reserve_ms = nan"),
}


@pytest.mark.parametrize("key", NAN_KEYS)
def test_a_number_that_is_none_in_the_config_is_named_by_its_dotted_key(tmp_path, capsys, key):
    text = default_config_path().read_text("utf-8")
    old, new = NAN_KEYS[key]
    assert old in text
    path = tmp_path / "recall.toml"
    path.write_text(text.replace(old, new, 1), "utf-8")
    for command in (["check"], ["build", str(sample_path())], ["serve"]):
        with pytest.raises(SystemExit) as ended:
            app([*command, "--config", str(path), "--store", str(tmp_path / "store")])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert err.startswith(f"error: {key}: ")
        assert len(err.splitlines()) == 1
