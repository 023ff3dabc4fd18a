"""The scenario of locust, without its web page, against a real server; in processes of its own, which gevent patches."""

from __future__ import annotations

import csv
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import default_config_path
from engine.data.sample import sample_path
from loadtest import pictures
from loadtest.servers import ServerProcess, built

LOCUST = Path(sys.executable).with_name("locust")
SCENARIO = Path(__file__).parents[2] / "loadtest" / "locustfile.py"
pytestmark = pytest.mark.skipif(not LOCUST.exists(), reason="locust is not installed: pip install '.[load]'")

BLIND = """
[scenes.blind]
filters = ["seen"]

[scenes.blind.quotas]
itemcf = 100
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the sample that has a scene without the exposure filter too."""
    folder = tmp_path_factory.mktemp("locust")
    built(folder)
    config = folder / "blind.toml"
    config.write_text(default_config_path().read_text(encoding="utf-8") + BLIND, encoding="utf-8")
    server = ServerProcess(folder, config)
    server.start()
    yield server.target
    server.stop()


def run(target: str, folder: Path, *options: str) -> tuple[int, dict[str, dict[str, str]], str]:
    users = folder / "users.txt"
    users.write_text("\n".join(map(str, known_users())))
    command = [str(LOCUST), "-f", str(SCENARIO), "--host", target, "--headless", "--csv", str(folder / "run")]
    command += ["--csv-full-history", "-u", "6", "-r", "6", "-t", "4s", "--look-seconds", "0.05"]
    command += ["--timeout", "10", "--user-file", str(users), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    file = folder / "run_stats.csv"
    rows = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
    return done.returncode, {row["Name"]: row for row in rows}, done.stdout + done.stderr


def known_users() -> list[int]:
    import pyarrow.parquet as parquet

    column = parquet.read_table(sample_path() / "interactions.parquet", columns=["user_id"]).column(0)
    return sorted(set(column.to_pylist()))


def test_people_scroll_and_nothing_that_was_shown_comes_back(target, tmp_path):
    code, rows, said = run(target, tmp_path)
    assert code == 0, said
    assert {"Recall", "Recall again", "Report exposure"} <= rows.keys(), said
    assert int(rows["Recall again"]["Request Count"]) > 10
    assert int(rows["Aggregated"]["Failure Count"]) == 0
    drawn = ElementTree.fromstring(pictures.history(tmp_path / "run_stats_history.csv"))
    assert drawn.tag.endswith("svg")


def test_an_item_that_comes_back_is_a_failure_of_the_run(target, tmp_path):
    code, rows, said = run(target, tmp_path, "--scene", "blind")
    assert code == 1, said
    assert int(rows["Recall again"]["Failure Count"]) > 0
    assert "items came back that had been shown" in said


def test_options_that_make_no_sense_end_it(tmp_path):
    code, _, said = run("127.0.0.1:1", tmp_path, "--user-file", str(tmp_path / "nowhere"))
    assert code != 0
    assert "--user-ids, --user-file" in said


def test_a_report_of_the_bench_becomes_a_picture(tmp_path):
    row = {"in_flight": 1, "requests_per_s": 100.0, "p50_ms": 1.0, "p99_ms": 2.5, "batch_mean": 1.0}
    file = tmp_path / "serve.json"
    file.write_text(
        f'{{"concurrency": [{row}, {row | {"in_flight": 64, "requests_per_s": 910.0}}]}}'.replace("'", '"')
    )
    ElementTree.fromstring(pictures.concurrency(file))
