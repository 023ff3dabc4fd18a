"""Kills of workers under load, in short; at full length `python -m loadtest.worker_kills`."""

from pathlib import Path

from loadtest import worker_kills
from loadtest.fuzz import small_data


def test_of_kills_only_requests_in_flight_feel_anything(tmp_path: Path) -> None:
    data = small_data(tmp_path / "small", "int64")
    report = worker_kills.run(tmp_path, kills=2, workers=2, per_second=50, data=data)
    assert report["with_retry"]["failed"] == {}
    assert set(report["without_retry"]["failed"]) <= {"UNAVAILABLE"}
