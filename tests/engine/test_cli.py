"""The command line: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from recall.v1 import recall_pb2 as pb

from engine import __version__, console
from engine.cli import app, main
from engine.cli.answer import Words, show
from engine.cli.common import parse_id
from engine.cli.drawing import draw_scene, stage_names
from engine.cli.query import parse_recent
from engine.client._messages import to_result
from engine.config import Config, default_config_path, load_config, read_params
from engine.core.errors import BuildError, ConfigError
from engine.data.sample import sample_path
from engine.data.snapshot import SnapshotStore
from engine.online.replica import Replica
from engine.online.server import serve

Recall: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width at which nothing folds: test runners set a narrow one."""
    monkeypatch.setenv("COLUMNS", "140")


@pytest.fixture
def recall(capsys: pytest.CaptureFixture[str]) -> Recall:
    """Run a command in this process; return exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, out, err

    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a release of the bundled sample."""
    path = tmp_path_factory.mktemp("store")
    with pytest.raises(SystemExit) as ended:
        app(["build", str(sample_path()), "--store", str(path)])
    assert ended.value.code == 0
    return path


@pytest.fixture(scope="module")
def target(store: Path) -> Iterator[str]:
    """A server of that release."""
    config = any_port(load_config())
    replica = Replica.open(config, SnapshotStore(store))
    up = threading.Event()
    control: dict[str, Any] = {}

    async def run() -> None:
        control["loop"], control["stop"] = asyncio.get_running_loop(), asyncio.Event()

        def ready(port: int) -> None:
            control["port"] = port
            up.set()

        await serve(config, replica, ready, control["stop"])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert up.wait(120)
    yield f"127.0.0.1:{control['port']}"
    control["loop"].call_soon_threadsafe(control["stop"].set)
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def user(store: Path) -> int:
    """A user of the sample."""
    known = Replica.open(load_config(), SnapshotStore(store)).catalogue.users
    return int(known.ids(np.zeros(1, np.int32))[0])


def any_port(config: Config) -> Config:
    return config.model_copy(update={"server": config.server.model_copy(update={"port": 0})})


# --- the program -------------------------------------------------------------------------------


def test_version_and_help(recall: Recall) -> None:
    assert recall("--version") == (0, f"recall {__version__}\n", "")
    code, out, _ = recall("--help")
    assert code == 0
    for command in (
        "demo",
        "build",
        "serve",
        "query",
        "check",
        "eval",
        "tune",
        "bench",
        "data",
        "releases",
        "publish",
    ):
        assert re.search(rf"\b{command}\b", out)
        assert recall(command, "--help")[0] == 0


def test_main_is_the_same_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["recall", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == f"recall {__version__}\n"


def test_wrong_usage_ends_with_2(recall: Recall) -> None:
    for arguments in (["nope"], ["build"], ["serve", "--port", "70000"], ["query", "--nope"]):
        code, out, err = recall(*arguments)
        assert (code, out) == (2, "")
        assert err


def test_our_own_errors_are_one_line_without_a_traceback(recall: Recall, tmp_path: Path) -> None:
    code, out, err = recall("build", tmp_path / "nope", "--store", tmp_path)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "nope: is not a directory" in err
    assert "Traceback" not in err


def test_ctrl_c_ends_with_130_and_one_line(
    recall: Recall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.offline.build.build_release", interrupted)
    code, out, err = recall("build", sample_path(), "--store", tmp_path)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err


# --- build and releases ------------------------------------------------------------------------


def test_build_says_what_it_made_and_what_it_left_out(store: Path, recall: Recall) -> None:
    code, out, err = recall("build", sample_path(), "--store", store)
    assert code == 0
    assert re.search(r"^swing +reused +\d+ +[\d.]+ MB +\d{8}T", out, re.MULTILINE)
    assert re.search(r"left out: [\d,]+ 'expose' events, which have no points in \[interest\]", out)
    assert "is in service" in out
    assert "checking" in err
    assert " built " not in out


def test_build_takes_options_per_channel_from_a_file(recall: Recall, tmp_path: Path) -> None:
    params = tmp_path / "params.toml"
    params.write_text("[itemcf]\nneighbours = 5\n")
    code, _, _ = recall("build", sample_path(), "--store", tmp_path, "--params", params, "--threads", 1)
    assert code == 0
    made = SnapshotStore(tmp_path)
    release = made.current()
    assert release is not None
    manifest = made.manifest("itemcf", release.snapshots["itemcf"])
    assert manifest.parameters["options"]["neighbours"] == 5
    # The configuration itself says otherwise, and check tells.
    code, out, _ = recall("check", "--store", tmp_path)
    assert code == 0
    assert "channels.itemcf: was built with neighbours = 5; run `recall build`" in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[nope]\nx = 1", "params.toml.nope: no channel is called 'nope'"),
        ("[itemcf]\nx = 1", "params.toml.itemcf.x: unknown key"),
        ("itemcf = 1", "params.toml.itemcf: expected a table of options"),
        ("[itemcf", "is not valid TOML"),
    ],
)
def test_a_wrong_file_of_options_is_refused(recall: Recall, tmp_path: Path, content: str, words: str) -> None:
    params = tmp_path / "params.toml"
    params.write_text(content)
    code, out, err = recall("build", sample_path(), "--store", tmp_path / "store", "--params", params)
    assert (code, out) == (2, "")
    assert words in err
    assert not (tmp_path / "store").exists()


def test_a_file_of_options_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_params(tmp_path / "nope.toml")


@pytest.mark.parametrize("channels", ["nope", "itemcf,nope", " , "])
def test_an_unknown_channel_is_refused(recall: Recall, tmp_path: Path, channels: str) -> None:
    code, _, err = recall("build", sample_path(), "--store", tmp_path, "--channels", channels)
    assert code == 2
    assert "error: --channels: " in err


def test_a_failed_build_publishes_nothing(
    recall: Recall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise BuildError("no data")

    monkeypatch.setattr("channels.swing.Swing.build", broken)
    code, _, err = recall("build", sample_path(), "--store", tmp_path)
    assert code == 2
    assert err.endswith("error: no data\n")
    assert "done  swing" not in err
    assert SnapshotStore(tmp_path).current() is None


def test_releases_are_listed_and_rolled_back(recall: Recall, tmp_path: Path) -> None:
    code, _, err = recall("releases", "list", "--store", tmp_path)
    assert code == 2
    assert "`recall build` makes one" in err
    for anew in ([], ["--channels", "popular"]):  # the same again would leave the release as it is
        assert recall("build", sample_path(), "--store", tmp_path, *anew)[0] == 0
    newest, before = SnapshotStore(tmp_path).release_names()
    code, out, _ = recall("releases", "list", "--store", tmp_path)
    assert code == 0
    assert re.search(rf"^in service +{newest}", out, re.MULTILINE)
    assert recall("releases", "rollback", "--store", tmp_path) == (
        0,
        f"Release {before} is in service.\n",
        "",
    )
    code, out, _ = recall("releases", "list", "--store", tmp_path)
    assert re.search(rf"^in service +{before}", out, re.MULTILINE)
    assert recall("releases", "rollback", "nope", "--store", tmp_path)[0] == 2
    assert recall("publish", newest, "--store", tmp_path)[1] == f"Release {newest} is in service.\n"
    assert SnapshotStore(tmp_path).current_name() == newest


# --- check -------------------------------------------------------------------------------------


def test_check_draws_the_stages_that_the_pipeline_runs(store: Path) -> None:
    config = load_config()
    pipeline = Replica.open(config, SnapshotStore(store)).pipelines["default"]
    assert stage_names(config, "default") == ["query", *(name for name, _ in pipeline.stages), "encode"]
    drawing = draw_scene(config, "default")
    assert len({len(line) for line in drawing.splitlines()[1:] if line.startswith(("│", "┌", "└"))}) == 1
    for name in pipeline.channel_names + pipeline.filter_names:
        assert name in drawing


def test_check_is_clean_on_what_ships(store: Path, recall: Recall) -> None:
    code, out, err = recall("check", "--store", store)
    assert (code, err) == (0, "")
    assert "quota 60 " in out
    assert out.endswith("0 errors, 0 warnings\n")


def test_check_warns_where_nothing_is_built(recall: Recall, tmp_path: Path) -> None:
    code, out, _ = recall("check", "--store", tmp_path / "none")
    assert code == 0
    assert "warning  store: nothing is built in " in out
    assert not (tmp_path / "none").exists()


def test_check_names_a_file_that_is_cut_off(store: Path, recall: Recall, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    victim = next((tmp_path / "store" / "swing").glob("*/*.npy"))
    victim.write_bytes(victim.read_bytes()[:-1])
    code, out, _ = recall("check", "--store", tmp_path / "store")
    assert code == 2
    assert f"error  store: {victim}: " in out


def test_check_names_a_channel_that_the_release_lacks(store: Path, recall: Recall, tmp_path: Path) -> None:
    text = default_config_path().read_text("utf-8")
    more = text.replace("[channels.fresh]", '[channels.fresh]\n[channels.fresh2]\ntype = "fresh"')
    path = tmp_path / "recall.toml"
    path.write_text(more.replace('"popular", "fresh"]', '"popular", "fresh", "fresh2"]'), "utf-8")
    code, out, _ = recall("check", "--config", path, "--store", store)
    assert code == 2
    assert re.search(r"fresh2 \(fresh\) +NO SNAPSHOT", out)
    assert re.search(r"error  channels.fresh2: release \S+ has no snapshot of it; run `recall build`", out)
    assert out.endswith("1 error, 0 warnings\n")


def test_check_refuses_a_wrong_configuration(recall: Recall, tmp_path: Path) -> None:
    path = tmp_path / "recall.toml"
    path.write_text(default_config_path().read_text("utf-8") + "\n[scenes.default.quota]\n", "utf-8")
    code, out, err = recall("check", "-c", path)
    assert (code, out) == (2, "")
    assert "error: scenes.default.quota: unknown key; known: " in err


# --- query -------------------------------------------------------------------------------------


def test_query_prints_one_json_object(target: str, user: int, recall: Recall) -> None:
    code, out, err = recall("query", "--target", target, "--user", user, "--limit", 5, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert len(answer["candidates"]) == 5
    assert {"channel", "rank", "score", "trigger"} == set(answer["candidates"][0]["proposals"][0])
    assert {report["channel"] for report in answer["channels"]} >= {"itemcf", "swing", "usercf"}
    assert "debug" not in answer


def test_query_finds_more_like_an_item_for_anybody(target: str, user: int, recall: Recall) -> None:
    plain = json.loads(recall("query", "-t", target, "-u", user, "-n", 20, "--json")[1])
    first = plain["candidates"][0]["id"]
    code, out, _ = recall(
        "query", "-t", target, "--scene", "related", "--like", first, "--like", 10**15, "--json"
    )
    assert code == 0
    answer = json.loads(out)
    status = {report["channel"]: report["status"] for report in answer["channels"]}
    assert (status["similar_itemcf"], status["similar_swing"]) == ("OK", "OK")
    best = answer["candidates"][0]
    assert best["proposals"][0]["trigger"] == first
    assert first not in [candidate["id"] for candidate in answer["candidates"]]
    assert answer["unknown"]["trigger_items"] == 1


def test_query_passes_every_option_on(target: str, user: int, recall: Recall) -> None:
    plain = json.loads(recall("query", "-t", target, "-u", user, "-n", 20, "--json")[1])
    first = plain["candidates"][0]["id"]
    arguments = ["query", "-t", target, "-u", user, "-n", 20, "--json", "--scene", "default", "--debug"]
    arguments += ["--exclude", first, "--off", "swing", "--off", "usercf", "--recent", f"{first}:click"]
    code, out, _ = recall(*arguments)
    assert code == 0
    answer = json.loads(out)
    assert answer["debug"]["history"][0] == first
    counts = {report["filter"]: report["removed"] for report in answer["filters"]}
    removed = answer["debug"]["removed"]
    assert set(removed) == set(counts)
    assert removed["seen"]
    assert all(len(ids) <= counts[name] for name, ids in removed.items())
    assert first not in {candidate["id"] for candidate in answer["candidates"]}
    status = {report["channel"]: report["status"] for report in answer["channels"]}
    assert (status["itemcf"], status["swing"], status["usercf"]) == ("OK", "SKIPPED", "SKIPPED")


def test_query_shows_a_table_and_with_the_store_what_the_items_are(
    store: Path, target: str, user: int, recall: Recall
) -> None:
    code, out, _ = recall("query", "--target", target, "--user", user, "--limit", 3, "--debug")
    assert code == 0
    assert re.search(r"^1 +item \d+ +0\.\d{4} +\w+ #\d+ +(item|user) \d+", out, re.MULTILINE)
    assert " · " not in out
    assert "stages of a batch of 1: hydrate" in out
    assert re.search(r"^removed by seen: \d+", out, re.MULTILINE)
    code, out, _ = recall("query", "--target", target, "--user", user, "--limit", 3, "--store", store)
    assert code == 0
    assert re.search(r"^1 +item \d+ · author \d+ · tag \d+", out, re.MULTILINE)
    assert re.search(r"user \d+ · \d+ items? in common", out)


def test_an_answer_without_a_filter_says_so_and_names_the_first_of_what_was_removed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    removed = pb.RemovedItems(filter="seen", item_ids=range(25))
    response = pb.RecallResponse(debug=pb.DebugInfo(removed=[removed, pb.RemovedItems(filter="exposure")]))
    response.filters.add(filter="seen", removed=30, status=pb.FILTER_STATUS_OK)
    response.filters.add(filter="exposure", status=pb.FILTER_STATUS_UNAVAILABLE)
    show(to_result(response), Words(), None)
    lines = capsys.readouterr().out.splitlines()
    assert "removed by filters: seen 30, exposure 0" in lines
    assert "The filter exposure could not read the user's state and let everything pass." in lines
    assert [line for line in lines if line.startswith("removed by seen")] == [
        f"removed by seen: {', '.join(map(str, range(20)))} and 5 more"
    ]
    assert not any(line.startswith("removed by exposure") for line in lines)


def test_query_says_so_where_the_catalogue_does_not_know(target: str, recall: Recall) -> None:
    arguments = ["--user", 10**15, "--limit", 3, "--recent", 10**15, "--exclude", 10**15]
    code, out, _ = recall("query", "--target", target, *arguments)
    assert code == 0
    assert "does not know this user" in out
    assert "does not know 1 of the recent items" in out
    assert "does not know 1 of the excluded items" in out


def test_query_names_what_the_server_refuses(target: str, recall: Recall) -> None:
    for arguments, words in (
        (["--limit", 0], "limit: expected 1 to 5000, got 0"),
        (["--scene", "nope"], "scene: expected one of default"),
        (["--user", "ann"], "user_key: expected user_id instead"),
        (["--off", "nope"], "expected one of itemcf"),
        (["--user", 2**70], "request: cannot be sent"),
    ):
        code, out, err = recall("query", "--target", target, *arguments)
        assert (code, out) == (2, "")
        assert words in err


def test_query_without_a_server_ends_with_1_and_a_hint(recall: Recall) -> None:
    code, out, err = recall("query", "--target", "127.0.0.1:1", "--user", 1)
    assert (code, out) == (1, "")
    assert err.startswith("error: 127.0.0.1:1 answered UNAVAILABLE: ")
    assert "`recall serve` starts one" in err


def test_query_with_a_store_that_did_not_make_the_answer_is_refused(
    target: str, user: int, recall: Recall, tmp_path: Path
) -> None:
    code, out, err = recall("query", "--target", target, "--user", user, "--store", tmp_path)
    assert (code, out) == (2, "")
    assert "manifest.json" in err


def test_ids_are_numbers_unless_they_are_not() -> None:
    assert parse_id("42", False) == 42
    assert parse_id("42", True) == "42"
    assert parse_id("-1", False) == -1
    assert parse_id("a-1", False) == "a-1"
    assert parse_recent("42", False) == (42, "")
    assert parse_recent("42:click", False) == (42, "click")
    assert parse_recent("a:b:click", False) == ("a:b", "click")


# --- serve -------------------------------------------------------------------------------------


def test_serve_says_what_to_do_where_nothing_is_built(recall: Recall, tmp_path: Path) -> None:
    code, out, err = recall("serve", "--store", tmp_path)
    assert (code, out) == (2, "")
    assert "`recall build DIR` makes one" in err


# --- data --------------------------------------------------------------------------------------


def test_data_describe_counts_everything(recall: Recall) -> None:
    code, out, _ = recall("data", "describe", sample_path())
    assert code == 0
    rows = tomllib.loads((sample_path() / "dataset.toml").read_text("utf-8"))["events"]
    assert re.search(rf"^interactions.parquet +{rows:,} ", out, re.MULTILINE)
    assert "events by kind" in out
    assert "CC BY-SA 4.0" in out


def test_data_sample_copies_the_sample_with_its_licence_and_overwrites_nothing(
    recall: Recall, tmp_path: Path
) -> None:
    folder = tmp_path / "a" / "sample"
    assert recall("data", "sample", folder)[0] == 0
    assert {path.name for path in folder.iterdir()} >= {"interactions.parquet", "dataset.toml", "LICENSE"}
    assert not list(folder.glob("*.py"))
    assert recall("data", "describe", folder)[0] == 0
    code, _, err = recall("data", "sample", folder)
    assert code == 2
    assert "is there already" in err


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    folder = tmp_path / "ml-latest-small"
    folder.mkdir()
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,7,4.5,964982703\n2,7,2.0,964982704\n"
    )
    (folder / "movies.csv").write_text("movieId,title,genres\n7,Heat (1995),Action|Crime\n")
    return folder


def test_data_import_passes_the_importers_options_on(recall: Recall, movielens: Path, tmp_path: Path) -> None:
    code, out, _ = recall("data", "import", "movielens", movielens, tmp_path / "ml")
    assert code == 0
    assert "2 events of 2 users on 1 item," in out
    for option in (["--min-rating", "4"], ["--min-rating=4"]):
        code, out, _ = recall("data", "import", "movielens", movielens, tmp_path / "ml", *option)
        assert code == 0
        assert "1 event of 1 user on 1 item," in out


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("nope", [], "there are movielens, lightgcn"),
        ("movielens", ["--nope", "1"], "it has: --min-rating"),
        ("lightgcn", ["--min-rating", "1"], "it has: none"),
        ("movielens", ["--min-rating", "x"], "--min-rating: "),
        ("movielens", ["--min-rating"], "--min-rating: expected a value"),
        ("movielens", ["4"], "it has: --min-rating"),
    ],
)
def test_data_import_refuses_what_it_does_not_know(
    recall: Recall, movielens: Path, tmp_path: Path, kind: str, options: list[str], words: str
) -> None:
    code, _, err = recall("data", "import", kind, movielens, tmp_path / "out", *options)
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


# --- the terminal ------------------------------------------------------------------------------


def test_progress_says_what_is_done_and_not_what_was_broken_off(capsys: pytest.CaptureFixture[str]) -> None:
    with console.BuildProgress() as progress:
        progress.start("first", 10)
        progress.advance(10)
        progress.start("second", 5)
        progress.advance()
    with suppress(KeyboardInterrupt), console.BuildProgress() as progress:
        progress.start("third", 5)
        raise KeyboardInterrupt
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"done +first +10 +in ", err)
    assert re.search(r"done +second +1 +in ", err)
    assert "third" not in err


def test_sizes_and_durations_read_well() -> None:
    assert [console.size(count) for count in (0, 999, 1000, 3_400_000, 5e9, 7e12)] == [
        "0 B", "999 B", "1.0 kB", "3.4 MB", "5.0 GB", "7.0 TB",
    ]  # fmt: skip
    assert [console.seconds(spent) for spent in (0.042, 3.14, 125)] == ["42 ms", "3.1 s", "2 min 05 s"]


def test_the_cache_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RECALL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert console.cache_folder() == tmp_path / "xdg" / "recall-engine"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    assert console.cache_folder() == tmp_path / ".cache" / "recall-engine"
    monkeypatch.setattr("sys.platform", "darwin")
    assert console.cache_folder() == tmp_path / "Library" / "Caches" / "recall-engine"
    monkeypatch.setenv("RECALL_CACHE", str(tmp_path / "mine"))
    assert console.cache_folder() == tmp_path / "mine"
