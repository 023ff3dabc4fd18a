"""The sweeps of Deep Retrieval: what is measured is not measured again, a value that cannot be is refused first."""

from __future__ import annotations

import json

import pytest

from engine.bench.path_sweeps import (
    SWEPT,
    Sweeps,
    append_record,
    draw_sweeps,
    points_of,
    read_records,
    run_sweeps,
)
from engine.cli import app
from engine.config import load_config
from engine.core.channel import SilentProgress
from engine.core.errors import ConfigError
from engine.data.dataset import Dataset
from engine.data.sample import sample_path
from engine.data.snapshot import SnapshotStore
from engine.offline.protocols import HeldUsers

OPTIONS = {
    "dimension": 8,
    "sequence": {"kind": "mean", "width": 8, "length": 10},
    "width": 8,
    "depth": 2,
    "path_hidden": [8],
    "paths": 2,
    "kept_paths": 4,
    "beam": 8,
    "training": {"epochs": 1, "fixed_epochs": 0, "negatives": 64},
}


def config_of(**changes):
    return load_config().with_channel_options({"deep_retrieval": OPTIONS | changes})


def sweeps_of(values, seeds=()):
    return Sweeps(values=values, at=10, seeds=seeds, part="validation", held=HeldUsers(40, 1))


def test_the_own_value_is_a_point_of_every_curve_and_seeds_come_one_after_the_other():
    points = points_of(config_of(), sweeps_of({"beam": (1, 16), "penalty": (0.0,)}, seeds=(1, 2)))
    own = config_of().channels["deep_retrieval"].training.penalty
    assert [(point.setting, point.value, point.seed) for point in points] == [
        (setting, value, seed)
        for seed in (1, 2)
        for setting, value in (
            ("", 0),
            ("beam", 1),
            ("beam", 8),
            ("beam", 16),
            ("penalty", 0),
            ("penalty", own),
        )
    ]
    last = points[-2].config.channels["deep_retrieval"]
    assert (last.training.penalty, last.training.seed, last.training.negatives) == (0, 2, 64)


def test_a_value_that_does_not_fit_is_refused_before_anything_is_trained():
    with pytest.raises(ConfigError, match=r"--beam.*beam = 65 is more than width\^depth = 64 paths"):
        points_of(config_of(), sweeps_of({"beam": (1, 65)}))
    with pytest.raises(ConfigError, match="--width"):
        points_of(config_of(), sweeps_of({"width": (1,)}))


def test_results_outlive_a_torn_line(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, {"key": "a", "recall": 1})
    with path.open("a") as file:
        file.write('{"key": "b", "rec')
    append_record(path, {"key": "c", "recall": 3})
    assert {key: record["recall"] for key, record in read_records(path).items()} == {"a": 1, "c": 3}
    with pytest.raises(ConfigError, match="cannot be written"):
        append_record(tmp_path / "not-there" / "results.jsonl", {})


def test_a_sweep_measures_each_point_once(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'recall-engine[train]'")
    dataset = Dataset.open(sample_path())
    sweeps = sweeps_of({"beam": (1, 64), "penalty": (0.0,)})
    results, store = tmp_path / "results.jsonl", SnapshotStore(tmp_path / "store")
    report = run_sweeps(config_of(), dataset, sweeps, store, results, SilentProgress(), 1)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(lines) == 4  # the base, two beams, one penalty
    assert len(store.versions("deep_retrieval")) == 2  # all beams search one model
    beams = {row["value"]: row for row in report["sweeps"]["beam"]}
    assert list(beams) == [1, 8, 64]
    assert report["users"] == 40
    # All paths searched, and reranked: that is the brute force.
    assert beams[64]["recall"] == pytest.approx(beams[64]["all_recall"])
    assert beams[64]["of_brute_force"] == pytest.approx(1)
    assert beams[1]["reached"] < beams[8]["reached"] < beams[64]["reached"]
    assert beams[1]["all_recall"] == beams[64]["all_recall"]
    assert [row["value"] for row in report["sweeps"]["penalty"]] == [0, report["base"]["penalty"]]
    # Once more: nothing is built, all of it was there.
    nothing = SnapshotStore(tmp_path / "nothing")
    assert run_sweeps(config_of(), dataset, sweeps, nothing, results, SilentProgress(), 1) == report
    assert nothing.versions("deep_retrieval") == []
    pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed: pip install 'recall-engine[train]'"
    )
    pictures = draw_sweeps(report, tmp_path)
    assert [each.name for each in pictures] == [
        f"deep-retrieval-{m}.png" for m in ("recall", "precision", "f")
    ]
    assert all(each.stat().st_size > 1000 for each in pictures)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--sweep", "beam,speed"), f"--sweep: expected one of {', '.join(SWEPT)}, got 'speed'"),
        (("--sweep", ","), "--sweep: expected at least one setting"),
        (("--penalty", "1,-1"), "--penalty: expected numbers from 0 on, got '-1'"),
        (("--penalty", "nan"), "got 'nan'"),
        (("--width", "0"), "--width: expected whole numbers"),
        (("--part", "train"), "--part: expected validation or test"),
        (("--paths", "30", "--sweep", "paths"), "paths = 30 (J) is more than kept_paths = 20 (S)"),
        (("--held-users", "99999"), "leave nobody to learn from"),
    ],
)
def test_the_command_refuses_with_one_sentence(options, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RECALL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended:
        app(["bench", "deep-retrieval-sweeps", str(sample_path()), "--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.replace("\n", " ")
