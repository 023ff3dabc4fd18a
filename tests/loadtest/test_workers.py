"""Kills of workers under load, in short; at full length `python -m loadtest.worker_kills`."""

from pathlib import Path

from loadtest import worker_kills
from loadtest.fuzz import small_data
from loadtest.traffic import Call


def test_of_kills_only_requests_in_flight_feel_anything(tmp_path: Path) -> None:
    data = small_data(tmp_path / "small", "int64")
    report = worker_kills.run(tmp_path, kills=2, workers=2, per_second=50, data=data)
    assert report["with_retry"]["failed"] == {}
    assert set(report["without_retry"]["failed"]) <= {"UNAVAILABLE"}
    told = [report["without_retry"][f"sent_{when}"] for when in ("before_kill", "while_it_died", "later")]
    assert sum(told) == sum(report["without_retry"]["failed"].values())


def test_failed_calls_are_told_apart_by_when_they_were_sent() -> None:
    deaths = [(10.0, 10.2), (20.0, 20.1)]
    began_ended = [(9.9, 10.3), (10.1, 10.3), (10.25, 10.3), (19.9, 20.2), (20.5, 20.6)]
    failed = [Call(began, ended, "UNAVAILABLE") for began, ended in began_ended]
    assert worker_kills.sent_when(failed, deaths) == {
        "sent_before_kill": 2, "sent_while_it_died": 1, "sent_later": 2, "sent_later_ms_most": 400.0
    }  # fmt: skip
