"""Faults of what a server stands on, in short; at full length, and full disks too, `python -m loadtest.faults`."""

import shutil

import pytest

from loadtest.faults import clock, store
from loadtest.fuzz import small_data


def test_a_server_outlives_its_store(tmp_path):
    data = small_data(tmp_path / "small", "int64")
    reports = store.run(
        tmp_path, list(store.FAULTS), seconds=2.0, per_second=50, data=data, recovery=60.0, settle=0.3
    )
    assert [report.broken for report in reports.values()] == [[]] * len(store.FAULTS)
    assert reports["store-killed"].facts["meanwhile"]["recalls_flagged"] > 10
    assert reports["store-out-of-memory"].facts["meanwhile"]["reports_refused"]["UNAVAILABLE"] > 0
    assert all(report.facts["acknowledged_events"] > 10 for report in reports.values())


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_clock_that_jumps_loses_nothing(tmp_path):
    data = small_data(tmp_path / "small", "int64")
    report = clock.run(tmp_path, seconds=0.3, per_second=50, jumps=(6 * clock.DAY, 0), data=data)
    assert report.broken == []
    assert report.facts["acknowledged_events"] > 10
