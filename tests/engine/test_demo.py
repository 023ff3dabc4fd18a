"""The demo: a newcomer's first minute, from nothing to an answer with its reasons."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pytest

from engine.cli import app, streaming_story
from engine.core.errors import StateError
from engine.data.dataset import write_dataset

Demo: TypeAlias = Callable[..., tuple[int, str, str]]

CHANNELS = ("itemcf", "swing", "usercf", "two_tower", "deep_retrieval", "streaming_vq", "popular", "fresh")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width at which nothing folds: test runners set a narrow one."""
    monkeypatch.setenv("COLUMNS", "140")


@pytest.fixture
def demo(capsys: pytest.CaptureFixture[str]) -> Demo:
    """Run `recall demo --once --port 0 --no-train` in this process; return exit status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(["demo", "--once", "--port", "0", "--no-train", *map(str, arguments)])
        out, err = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, out, err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sample's snapshots go, once for all tests."""
    return tmp_path_factory.mktemp("demo")


def candidates_of(out: str) -> str:
    """Return the table of candidates."""
    return out.split("because of")[1].split("\n... and ")[0]


def test_it_answers_for_a_real_user_from_three_channels_with_reasons(demo: Demo, folder: Path) -> None:
    code, out, _ = demo("--dir", folder)
    assert code == 0
    table = candidates_of(out)
    assert sum(f" {channel} #" in table for channel in CHANNELS) >= 3
    assert re.search(r"^\s*1 +item \d+ · author \d+ · tag \d+ +0\.\d{4} +\w+ #\d+", table, re.MULTILINE)
    assert re.search(r"#\d+ +item \d+ · tag \d+", table)
    assert re.search(r"#\d+ +user \d+ · \d+ items? in common", table)
    assert re.search(r"events: click \d+", out)
    assert re.search(r"newest: item \d+ · tag ", out)
    assert re.search(r"^itemcf +OK +\d+", out, re.MULTILINE)
    for channel in ("two_tower", "deep_retrieval", "streaming_vq"):  # from what comes with the sample
        assert re.search(rf"^{channel} +OK +[1-9]\d*", out, re.MULTILINE), channel
    assert "licence: CC BY-SA 4.0" in out
    assert "attribution: KuaiRand" in out
    assert "Your turn" not in out


def test_it_tells_a_live_story(demo: Demo, folder: Path) -> None:
    _, out, _ = demo("--dir", folder)
    story = out.split("4. Live")[1]
    for expected in (
        r"candidates because of it: itemcf \d+, swing \d+",
        r"follows author \d+ +\d+ candidates from followed_authors",
        r"publishes a post in Shanghai +it is number \d+ of the list, from followed_authors #1, .*geo #1,",
        r"same_city #1",
        r"20 more are shown +none of them is there",
        r"candidates from cache",
        r"the filter dislikes removes [1-9]",
        r"taken down +it is not there",
    ):
        assert re.search(expected, story), expected


def test_a_post_is_in_a_cluster_and_recalled_from_it_as_soon_as_it_is_published(
    demo: Demo, folder: Path
) -> None:
    _, out, _ = demo("--dir", folder)
    story = " ".join(out.split("5. Learning")[1].split())
    assert "where PyTorch is installed a trainer learns meanwhile" in story
    assert re.search(r"published; the channel .* streaming_vq #\d+ of user \d+, from cluster \d+", story)
    assert "the trainer has" not in story


def test_a_machine_without_a_store_program_shows_the_rest(
    demo: Demo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> str:
        raise StateError("no program here")

    monkeypatch.setattr("engine.state.embedded.EmbeddedStore.start", missing)
    code, out, _ = demo("--dir", folder)
    assert code == 0
    assert "Without live state: no program here" in out
    assert "4. Live" not in out


def test_the_second_time_builds_nothing_and_answers_the_same(demo: Demo, folder: Path) -> None:
    _, first, _ = demo("--dir", folder)
    _, second, _ = demo("--dir", folder)
    assert "0 snapshots built, 15 used again" in second
    assert candidates_of(first) == candidates_of(second)
    chosen = [re.search(r"for user (\d+)", out) for out in (first, second)]
    assert chosen[0] is not None
    assert chosen[1] is not None
    assert chosen[0][1] == chosen[1][1]


def test_an_unknown_user_is_answered_by_what_needs_no_history(demo: Demo, folder: Path) -> None:
    code, out, _ = demo("--dir", folder, "--user", 10**12)
    assert code == 0
    assert "has no history: channels that need none answer" in out
    assert " streaming_vq #1" in candidates_of(out)  # by the biases of the items


def test_a_taken_port_is_one_sentence(demo: Demo, folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = demo("--dir", folder, "--port", taken.getsockname()[1])
    assert code == 2
    assert re.search(r"^error: server.port: cannot listen on 127.0.0.1:\d+", err, re.MULTILINE)
    assert "Traceback" not in err


def own_data(path: Path, kind: Any, likes: list[tuple[Any, Any]], **more: Any) -> Path:
    users, items = zip(*likes, strict=True)
    events = {
        "user_id": pa.array(users, kind),
        "item_id": pa.array(items, kind),
        "event": ["click"] * len(likes),
        "timestamp": list(range(1_700_000_000, 1_700_000_000 + len(likes))),
    }
    meta = {"name": "own", "id_type": "string" if kind == pa.string() else "int64"}
    write_dataset(path, pa.table(events), meta=meta, **more)
    return path


def test_own_data_with_titles_names_and_string_ids_reads_well(demo: Demo, tmp_path: Path) -> None:
    # Everybody likes a, b and c; ann has not seen d, which the others like too.
    likes = [(user, item) for user in ("bob", "cy", "dee") for item in "abcd"]
    likes += [("ann", item) for item in "abc"]
    titles = pa.table(
        {
            "item_id": list("abcd"),
            "title": ["Alien", "Brazil", "Casino [uncut]", "Diva"],
            "author_id": ["x", "x", "y", "y"],
            "tags": [["sf"], ["sf", "satire"], [], ["thriller"]],
        }
    )
    authors = pa.table({"author_id": ["x", "y"], "name": ["Xenia", "Yann"]})
    data = own_data(tmp_path / "own", pa.string(), likes, items=titles, authors=authors)
    code, out, _ = demo("--dir", tmp_path / "store", "--data", data, "--user", "ann")
    assert code == 0
    assert re.search(r"1 +Diva · Yann · thriller +0\.\d+ +itemcf #1 +(Alien|Brazil|Casino)", out)
    assert "Casino [uncut]" in out  # brackets are text, not markup
    assert "for user ann" in out


@pytest.mark.parametrize("likes", [[(0, 0)], [(0, 0), (2**63 - 1, 2**63 - 1)]])
def test_one_user_one_item_and_ids_at_the_ends_are_answered(
    demo: Demo, tmp_path: Path, likes: list[tuple[int, int]]
) -> None:
    data = own_data(tmp_path / "own", pa.int64(), likes)
    code, out, err = demo("--dir", tmp_path / "store", "--data", data)
    assert (code, err.count("error")) == (0, 0)
    assert "for user 0" in out or f"for user {2**63 - 1}" in out


def test_data_that_is_none_is_one_sentence(demo: Demo, tmp_path: Path) -> None:
    code, out, err = demo("--dir", tmp_path / "store", "--data", tmp_path)
    assert code == 2
    assert re.search(r"^error: \S+: is missing from ", err.splitlines()[-1])
    assert "Serve" not in out


def snippets(page: str) -> list[str]:
    """Return the Python code of a page."""
    text = (Path(__file__).parents[2] / page).read_text("utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_what_the_front_page_says_about_own_data_works(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(snippets("README.md")[2], {})
    code, out, _ = demo("--dir", "store", "--data", "mydata")
    assert code == 0
    assert "mydata: 4 events, 2 users, 3 items." in out


def test_both_languages_of_the_front_page_show_the_same_code() -> None:
    def code(page: str) -> list[str]:
        return [re.sub(r"\s+#.*", "", each) for each in snippets(page)]

    assert code("README.md") == code("README.zh-CN.md")


def test_it_keeps_serving_until_ctrl_c_and_what_it_tells_you_to_type_works(folder: Path) -> None:
    command = [sys.executable, "-m", "engine", "demo", "--dir", str(folder), "--port", "0", "--no-train"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    try:
        assert running.stdout is not None
        lines: list[str] = []
        for line in running.stdout:
            lines.append(line.rstrip())
            if "RecallClient(" in line:
                break
        told = [line.strip() for line in lines if "-m engine query" in line or "RecallClient(" in line]
        assert len(told) == 2, "\n".join(lines)
        for each in told:
            done = subprocess.run(each, shell=True, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert re.search(r"\d", done.stdout)
        port = re.search(r"RecallClient\(\"127.0.0.1:(\d+)\"\)", told[1])
        assert port is not None
        page = snippets("README.md")[0].replace("50051", port[1])
        done = subprocess.run([sys.executable, "-c", page], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Proposal(") >= 3
        page = snippets("README.md")[1].replace("50051", port[1])
        done = subprocess.run([sys.executable, "-c", page], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        rest, _ = running.communicate(timeout=60)
        assert running.returncode == 0
        assert rest.strip().endswith("Stopped.")
        assert "Traceback" not in rest
    finally:
        running.kill()
        running.wait()


def test_a_trainer_assigns_what_is_published_while_it_runs(
    demo: Demo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last one: what the trainer has learnt stays in the folder, and changes later answers.
    pytest.importorskip("torch", reason="training needs PyTorch (pip install 'recall-engine[train]')")
    for patience in ("READY_SECONDS", "TRAINED_SECONDS"):
        monkeypatch.setattr(streaming_story, patience, 300.0)
    code, out, _ = demo("--dir", folder, "--train")
    assert code == 0
    story = " ".join(out.split("5. Learning")[1].split())
    put = re.search(r"while the trainer runs the trainer has put it into cluster (\d+)", story)
    assert put is not None, story
    assert re.search(rf"asked for streaming_vq #\d+ of user \d+, from cluster {put[1]} ", story)
    assert re.search(r"the trainer has taken in \d+ events", story)
