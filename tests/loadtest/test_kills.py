"""What was acknowledged survives SIGKILL; the whole of it, 50 rounds, is `python -m loadtest.kills`."""

from loadtest import kills, read_your_writes
from loadtest.fuzz import small_data


def test_nothing_acknowledged_is_lost_when_server_store_or_both_are_killed(tmp_path):
    data = small_data(tmp_path / "small", "int64")
    ledger, problems = kills.run(tmp_path / "kills", rounds=3, durability="always", data=data)
    assert problems == []
    assert ledger.events > 30
    assert ledger.failures > 0, "nothing was under way when the processes died"


def test_an_exposure_never_comes_back_from_either_of_two_servers(tmp_path):
    data = small_data(tmp_path / "small", "int64")
    checks, failed, answers = read_your_writes.run(tmp_path / "store", wanted=10_000, data=data)
    assert failed == 0
    assert checks >= 10_000
    assert answers > 50
