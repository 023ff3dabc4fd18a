"""What the sentinel says of a machine."""

import time
from pathlib import Path

import pytest

from engine.bench.sentinel import Sentinel


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system has no /proc")
def test_time_that_this_process_uses_is_its_own() -> None:
    with Sentinel() as sentinel:
        end = time.thread_time() + 0.5
        while time.thread_time() < end:
            pass
    findings = sentinel.findings
    assert findings["largest_host_gap_ms"] is not None
    assert findings["largest_host_gap_ms"] >= 0
    assert findings["cpu_own_percent"] is not None
    assert findings["cpu_own_percent"] > 0
    shares = [value for name, value in findings.items() if name.startswith("cpu_")]
    assert sum(share for share in shares if share is not None) <= 110
