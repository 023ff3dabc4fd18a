from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_world import ingesting
from typer.testing import CliRunner

from engine.cli import app
from engine.state.layout import DISLIKES, FOLLOWS, RECENT

CONFIG = """
[interest]
click = 1.0
view = 0.0
[channels.popular]
[scenes.default]
fallback = []
quotas.popular = 1
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with ingesting(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "recall.toml"
    path.write_text(CONFIG)
    return path


def run(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["ingest", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def interactions(path: Path, users, items, events, timestamps=None, watched=None) -> Path:
    columns = {"user_id": users, "item_id": items, "event": events}
    if timestamps is not None:
        columns["timestamp"] = timestamps
    if watched is not None:
        columns["watch_seconds"] = pa.array(watched, pa.float32())
    pq.write_table(pa.table(columns), path, row_group_size=7 if len(users) < 100 else None)
    return path


def counts_of(output: str, file: str) -> list[int]:
    """rows, of, accepted, duplicates, stale, refused, skipped"""
    (line,) = [line for line in output.splitlines() if line.startswith(file)]
    return [int(part.replace(",", "")) for part in line.split()[1:]]


def test_a_log_is_replayed_and_a_second_time_changes_nothing(world, config, tmp_path):
    log = interactions(
        tmp_path / "log.parquet",
        [1, 1, 1, 1, 2],
        [10, 11, 12, 13, 14],
        ["expose", "click", "dislike", "rate", "view"],
        [100, 200, 300, 400, 500],
        [None, 2.5, None, None, None],
    )
    arguments = (log, "-t", world.target, "-c", config)
    code, output = run(*arguments)
    assert code == 0, output
    assert counts_of(output, "log.parquet") == [5, 5, 4, 0, 0, 0, 1]
    assert "skipped in log.parquet: 1 rate" in output
    assert world.exposed(1, 10, time.time())
    assert [(key, value, at) for key, _, value, at in world.records(1, RECENT)] == [(11, 2.5, 200)]
    assert [key for key, *_ in world.records(1, DISLIKES)] == [12]
    code, output = run(*arguments)
    assert counts_of(output, "log.parquet") == [5, 5, 0, 4, 0, 0, 1]


def test_what_is_earlier_is_skipped(world, config, tmp_path):
    log = interactions(tmp_path / "log.parquet", [20] * 3, [1, 2, 3], ["click"] * 3, [100, 86_400, 90_000])
    code, output = run(log, "-t", world.target, "-c", config, "--since", "1970-01-02")
    assert code == 0, output
    assert counts_of(output, "log.parquet") == [3, 3, 2, 0, 0, 0, 1]
    assert [key for key, *_ in world.records(20, RECENT)] == [2, 3]


def test_refused_rows_are_counted_and_shown(world, config, tmp_path):
    log = interactions(tmp_path / "log.parquet", [30, -1, 30], [1, 2, 3], ["click"] * 3)
    code, output = run(log, "-t", world.target, "-c", config, "--batch", 1)
    assert code == 0, output
    assert counts_of(output, "log.parquet") == [3, 3, 2, 0, 0, 1, 0]
    assert "refused in log.parquet, row 1: user_id: expected 0 or more, got -1" in output


def test_a_data_set_is_replayed_items_first_and_goes_on_where_it_was(world, config, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    interactions(folder / "interactions.parquet", [40] * 20, range(20), ["click"] * 20, range(100, 120))
    pq.write_table(
        pa.table({"user_id": [40], "author_id": [9], "timestamp": [5]}), folder / "follows.parquet"
    )
    items = {
        "item_id": [70, 71],
        "author_id": [9, None],
        "published_at": [3, None],
        "title": ["Bread", None],
        "tags": [["a", "b"], None],
        "latitude": [1.5, float("nan")],
        "longitude": [2.5, None],
        "quality": pa.array([0.5, None], pa.float32()),
        "kind": ["x", "y"],
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    end = world.log.end()
    offsets = tmp_path / "offsets.json"
    arguments = (folder, "-t", world.target, "-c", config, "--offset-file", offsets, "--batch", 6)
    code, output = run(*arguments)
    assert code == 0, output
    assert counts_of(output, "items.parquet") == [2, 2, 2, 0, 0, 0, 0]
    assert counts_of(output, "follows.parquet") == [1, 1, 1, 0, 0, 0, 0]
    assert counts_of(output, "interactions.parquet") == [20, 20, 20, 0, 0, 0, 0]
    assert [key for key, *_ in world.records(40, FOLLOWS)] == [9]
    assert len(world.log.read(end, 10)) == 2
    saved = json.loads(offsets.read_text())
    assert sorted(saved.values()) == [1, 2, 20]
    # As if it had been broken off after eight rows of the interactions.
    offsets.write_text(json.dumps({name: 8 if rows == 20 else rows for name, rows in saved.items()}))
    code, output = run(*arguments)
    assert counts_of(output, "interactions.parquet") == [20, 20, 0, 12, 0, 0, 0]
    # Items again from the beginning: their time is the file's, so nothing is newer and nothing comes into the log.
    offsets.unlink()
    end = world.log.end()
    code, output = run(folder / "items.parquet", "-t", world.target, "-c", config)
    assert code == 0, output
    assert world.log.end() == end


def test_string_ids_are_sent_as_keys(config, tmp_path):
    log = interactions(tmp_path / "log.parquet", ["ann", "bob"], ["x", "y"], ["click", "expose"])
    with ingesting(tmp_path / "store", "string") as world:
        code, output = run(log, "-t", world.target, "-c", config)
        assert code == 0, output
        assert counts_of(output, "log.parquet") == [2, 2, 2, 0, 0, 0, 0]
        assert len(world.records("ann", RECENT)) == 1


def test_files_that_cannot_be_replayed_are_one_sentence(config, tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 this is none")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), other)
    odd = tmp_path / "odd.parquet"
    pq.write_table(pa.table({"user_id": [1], "item_id": [1.5], "event": ["click"]}), odd)
    bad_offsets = tmp_path / "offsets"
    bad_offsets.write_text("[]")
    good = interactions(tmp_path / "good.parquet", [1], [1], ["click"])
    for arguments, said in (
        ((broken,), "cannot be read as Parquet"),
        ((tmp_path / "none.parquet",), "No such file"),
        ((other,), "has neither the columns of interactions"),
        ((odd,), "column 'item_id'"),
        ((tmp_path,), "holds neither interactions.parquet"),
        ((good, "--offset-file", bad_offsets), "cannot be read as a file of offsets"),
        ((good, "--since", "yesterday"), "--since"),
        ((), "expected one of a file"),
        ((good, "--kafka", "b:1"), "expected one of a file"),
        (("--kafka", "b:1"), "--topic"),
        (("--kafka", "b:1", "--topic", "t", "--kafka-option", "x"), "KEY=VALUE"),
        (("--kafka", "b:1", "--topic", "t", "--kafka-option", "no.such=1"), "no.such"),
    ):
        code, output = run(*arguments, "-c", config)
        assert code == 2, (arguments, output)
        assert said in " ".join(output.split())
        assert output.count("error:") == 1


def test_a_server_that_is_not_there_is_exit_status_1(config, tmp_path):
    log = interactions(tmp_path / "log.parquet", [1], [1], ["click"])
    code, output = run(log, "-t", "127.0.0.1:1", "-c", config, "--patience", "0")
    assert code == 1
    assert "answered UNAVAILABLE" in output
    assert counts_of(output, "log.parquet")[0] == 0


def test_ctrl_c_says_how_far_it_came_and_the_next_one_goes_on(world, config, tmp_path):
    rows = 400_000
    log = interactions(tmp_path / "log.parquet", [50] * rows, [7] * rows, ["expose"] * rows)
    offsets = tmp_path / "offsets.json"
    command = [sys.executable, "-m", "engine", "ingest", str(log), "-t", world.target, "-c", str(config)]
    command += ["--offset-file", str(offsets), "--batch", "50"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not offsets.exists() and time.monotonic() < end:  # written after the first second
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGINT)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "interrupted; the same command goes on from there" in errors
    done = counts_of(output, "log.parquet")[0]
    assert 0 < done < rows
    assert list(json.loads(offsets.read_text()).values()) == [done]
