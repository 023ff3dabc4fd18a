"""`recall synth`: what it writes, says and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cli import app
from engine.data.dataset import Dataset

SMALL = ["--items", "50", "--users", "20", "--events", "1000"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        app([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code if isinstance(ended.value.code, int) else 0, out, err


def test_it_writes_a_data_set_and_says_how_fast(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "synth", tmp_path / "new", *SMALL, "--end", "2024-03-01")
    assert code == 0
    assert "1,000 interactions, 50 items, 20 users" in out
    assert "events/s" in out
    assert "events" in err
    dataset = Dataset.open(tmp_path / "new")
    assert dataset.meta["end"] == 1_709_251_200
    assert run(capsys, "data", "describe", tmp_path / "new")[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--items", "0"], "--items: expected a whole number from 1 "),
        (["--users", "0"], "--users: expected a whole number from 1 "),
        (["--days", "-3"], "--days: expected a whole number from 1 "),
        (["--interests", "51"], "--interests: there cannot be more interests than items"),
        (["--end", "soon"], "--end: expected a day such as 2024-02-01, got 'soon'"),
    ],
)
def test_bad_numbers_end_with_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], words: str
) -> None:
    code, out, err = run(capsys, "synth", tmp_path / "new", *SMALL, *options)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_filled_end_with_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for folder, words in (
        (tmp_path, "not empty"),
        (tmp_path / "file" / "new", "cannot be written: File exists"),
    ):
        code, out, err = run(capsys, "synth", folder, *SMALL)
        assert (code, out) == (2, "")
        assert words in " ".join(err.split())
        assert "Traceback" not in err
