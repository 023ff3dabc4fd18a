"""Malformed requests are refused and nothing else happens; the whole of it is `python -m loadtest.fuzz`."""

from __future__ import annotations

from collections import Counter

from loadtest import fuzz

CASES = 1_000


def test_every_malformed_request_is_refused_or_answered(tmp_path):
    report = fuzz.run(tmp_path, CASES, seed=11, small=True, connections=2, failures=tmp_path / "failures")
    assert report["failures"] == []
    assert report["first_errors_in_the_log"] == []
    assert fuzz.passed(report)
    assert sum(report["statuses"].values()) == CASES
    assert min(report["statuses"][status] for status in fuzz.OUTCOMES) > 20
    assert set(report["outcomes"]) == {method.name for method in fuzz.METHODS}


def test_a_case_is_the_same_whatever_was_made_before_it():
    alone = [fuzz.case(3, number) for number in (500, 7)]
    in_turn = [fuzz.case(3, number) for number in range(501)]
    assert alone == [in_turn[500], in_turn[7]]
    assert fuzz.case(4, 7).messages != alone[1].messages


def test_every_kind_is_made_within_the_largest_message():
    made = [fuzz.case(5, number) for number in range(3_000)]
    kinds = Counter(each.kind for each in made)
    assert len(kinds) == 9
    assert all(len(message) <= fuzz.MAX_BYTES for each in made for message in each.messages)
    assert any(len(message) > 1 << 20 for each in made for message in each.messages)


def test_a_case_that_fails_is_kept(tmp_path):
    tally = fuzz.Tally()
    sent = fuzz.Case(4711, fuzz.METHODS[2], "mutated", (b"one", b"two"))
    tally.note(sent, "OK", "", tmp_path)
    tally.note(sent, "INVALID_ARGUMENT", "", tmp_path)
    tally.note(sent, "INTERNAL: oh", "", tmp_path)
    (failure,) = tally.failures
    assert (failure["case"], failure["why"]) == (4711, "INTERNAL: oh")
    assert [(tmp_path / f"4711-ReportStream-{n}.bin").read_bytes() for n in range(2)] == [b"one", b"two"]


def test_answers_that_do_not_add_up_are_found():
    recall, report = fuzz.METHODS[0], fuzz.METHODS[1]
    two = report.request(events=[{}, {}]).SerializeToString()
    right = report.response(accepted=1, duplicates=1).SerializeToString()
    assert fuzz.judge(fuzz.Case(0, report, "", (two,)), [right]) == ""
    wrong = report.response(accepted=1).SerializeToString()
    assert fuzz.judge(fuzz.Case(0, report, "", (two,)), [wrong]) == "1 of 2 entries answered"
    assert fuzz.judge(fuzz.Case(0, report, "", (b"\xff",)), [right]) == "no message, and not refused"
    assert fuzz.judge(fuzz.Case(0, report, "", (two,)), [b"\xff"]) == "the answer cannot be read"
    assert fuzz.judge(fuzz.Case(0, report, "", (two, two)), [right]) == "1 answers to 2 messages"
    one = recall.request(limit=1).SerializeToString()
    long = recall.response(candidates=[{}, {}]).SerializeToString()
    assert fuzz.judge(fuzz.Case(0, recall, "", (one,)), [long]) == "2 candidates, the limit is 1"
