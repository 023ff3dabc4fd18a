"""What was acknowledged survives SIGKILL; the whole of it, 50 rounds, is `python -m loadtest.kills`."""

from loadtest import kills, read_your_writes


def test_nothing_acknowledged_is_lost_when_server_store_or_both_are_killed(tmp_path):
    ledger, problems = kills.run(tmp_path, rounds=3, durability="always")
    assert problems == []
    assert ledger.events > 30
    assert ledger.failures > 0, "nothing was under way when the processes died"


def test_an_exposure_never_comes_back_from_either_of_two_servers(tmp_path):
    checks, failed, answers = read_your_writes.run(tmp_path, wanted=20_000)
    assert failed == 0
    assert checks >= 20_000
    assert answers > 50
