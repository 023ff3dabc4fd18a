"""`recall eval`, `recall tune` and `recall bench`: what they print, keep and refuse, on the bundled sample."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pytest

from engine.bench import report as bench_report
from engine.bench.build import equal_share
from engine.bench.memory import peak_memory
from engine.cli import app
from engine.config import load_config
from engine.core.channel import SilentProgress
from engine.core.errors import BuildError, ConfigError
from engine.data.dataset import Dataset, write_dataset
from engine.data.sample import sample_path
from engine.data.snapshot import SnapshotStore
from engine.offline.cache import UNUSED_DAYS, cached_store, remember
from engine.offline.synthetic import synthetic_interactions
from engine.offline.tune import Tuned, depth_of, tune, write_params

Recall: TypeAlias = Callable[..., tuple[int, str, str]]
CIRCUMSTANCES = {"machine", "cpus", "date", "commit"}
TASTE = "itemcf,swing,usercf"
AT_20 = {"recall@20", "ndcg@20", "hit@20", "precision@20", "f@20", "coverage@20", "tail@20", "candidates"}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width at which nothing folds."""
    monkeypatch.setenv("COLUMNS", "140")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all, so that each thing is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recall(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path) -> Recall:
    """Run a command in this process; return exit status, standard output, standard error."""
    monkeypatch.setenv("RECALL_CACHE", str(cache))

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, out, err

    return run


def one_object(out: str) -> dict[str, Any]:
    """The one JSON object that is all of standard output."""
    assert out.count("\n") == 1
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def refused(answer: tuple[int, str, str], words: str) -> None:
    """Exit status 2, one sentence, no traceback, nothing on standard output."""
    code, out, err = answer
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in err


# --- eval --------------------------------------------------------------------------------------


def test_eval_prints_one_json_object_of_the_promised_form(recall: Recall) -> None:
    code, out, err = recall("eval", sample_path(), "--at", "20", "--channels", TASTE, "--json")
    assert code == 0
    found = one_object(out)
    names = {"itemcf", "swing", "usercf"}
    assert found.keys() >= CIRCUMSTANCES
    assert found["protocol"] == "temporal"  # dataset.toml says so
    assert found["users"] > 100
    assert found["items"] == 3235
    assert "is the truth" in found["statement"]
    assert (found["part"], found["at"], found["merge"], found["cold"]) == ("test", [20], "quota", None)
    assert found["channels"].keys() == found["without"].keys() == found["unique_share"].keys() == names
    for metrics in (*found["channels"].values(), *found["without"].values(), found["merged"]):
        assert metrics.keys() == AT_20
        assert 0 < metrics["recall@20"] <= metrics["hit@20"] <= 1
        assert metrics["candidates"] <= 20
    assert all(found["overlap"][name].keys() == names - {name} for name in names)
    assert "evaluating" in err


def test_eval_builds_once_and_keeps_what_it_built(recall: Recall, cache: Path) -> None:
    options = ("--at", "20", "--channels", "itemcf,swing", "--json")
    first = one_object(recall("eval", sample_path(), *options)[1])
    again = one_object(recall("eval", sample_path(), *options, "--threads", 1)[1])
    assert first == again
    assert list(first["channels"]) == ["itemcf", "swing"]
    assert first["without"]["swing"] == first["channels"]["itemcf"]
    (store,) = (cache / "evaluations").iterdir()
    release = SnapshotStore(store).current()
    assert release is not None
    assert release.snapshots == first["snapshots"]


def test_eval_shows_tables(recall: Recall) -> None:
    code, out, _ = recall("eval", sample_path(), "--at", "50,20", "--channels", TASTE)
    assert code == 0
    assert re.search(r"^temporal: before \d+ is known", out)
    assert out.index("The first 20") < out.index("The first 50")
    assert re.search(r"^merged +0\.\d{4} +0\.\d{4} +0\.\d{4} +0\.\d{4}", out, re.MULTILINE)
    assert re.search(r"^without swing .* -?\d+\.\d%$", out, re.MULTILINE)
    assert re.search(r"^swing +[\d.]+ +\d+\.\d% +\d+\.\d% +\d+\.\d%$", out, re.MULTILINE)


def test_eval_of_one_channel_merges_nothing(recall: Recall) -> None:
    code, out, _ = recall("eval", sample_path(), "--channels", "itemcf", "--at", "20", "--json")
    assert code == 0
    found = one_object(out)
    assert (found["merged"], found["without"], found["overlap"]) == (None, {}, {"itemcf": {}})
    code, out, _ = recall("eval", sample_path(), "--channels", "itemcf", "--at", "20")
    assert code == 0
    assert "merged" not in out
    assert "in common" not in out


def test_eval_merges_as_it_is_told(recall: Recall) -> None:
    def merged(*options: str) -> float:
        asked = ("eval", sample_path(), "--channels", "itemcf,swing", "--at", "20", "--json", *options)
        value = one_object(recall(*asked)[1])["merged"]["ndcg@20"]
        assert isinstance(value, float)
        return value

    fused = merged("--merge", "rank_fusion")
    assert merged("--merge", "rank_fusion", "--weights", "swing=5, itemcf=1") != fused
    assert merged("--merge", "rank_fusion", "--rank-constant", "1") != fused
    assert merged("--merge", "snake") > 0


def test_eval_with_seeds_gives_means_and_deviations(recall: Recall, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs the extra train")
    params = tmp_path / "small.toml"
    params.write_text(
        "[two_tower]\ndimension = 8\nsequence = { kind = 'mean', width = 8 }\ntraining.epochs = 1\n"
    )
    options = ("--channels", "two_tower", "--at", "20", "--params", params, "--seeds", "1,2", "--threads", 1)
    found = one_object(recall("eval", sample_path(), *options, "--json")[1])
    assert found["seeds"] == [1, 2]
    assert [run["seed"] for run in found["runs"]] == [1, 2]
    values = [run["channels"]["two_tower"]["recall@20"] for run in found["runs"]]
    assert values[0] != values[1]
    assert found["channels"]["two_tower"]["recall@20"] == pytest.approx(np.mean(values))
    assert found["deviation"]["channels"]["two_tower"]["recall@20"] == pytest.approx(np.std(values, ddof=1))
    code, out, _ = recall("eval", sample_path(), *options)
    assert code == 0
    assert re.search(r"^two_tower +0\.\d{4} ±0\.\d{4}", out, re.MULTILINE)
    assert "means of seeds 1, 2" in out


def test_eval_on_validation_is_another_cut(recall: Recall) -> None:
    options = ("--channels", "itemcf", "--at", "20", "--json")
    test, validation = (
        one_object(recall("eval", sample_path(), *options, "--part", part)[1])
        for part in ("test", "validation")
    )
    assert validation["statement"] != test["statement"]
    assert validation["part"] == "validation"


def test_eval_of_disjoint_users_shows_the_metrics_of_its_papers(recall: Recall) -> None:
    options = ("--protocol", "disjoint-users", "--channels", "itemcf", "--at", "10", "--held-users", 30)
    code, out, _ = recall("eval", sample_path(), *options, "--held-seed", 4)
    assert code == 0
    assert "disjoint-users: 30 users drawn with seed 4 bring the older half" in out
    assert re.search(r"precision +recall +f +coverage", out)
    code, out, _ = recall("eval", sample_path(), *options, "--repeats", "--json")
    found = one_object(out)
    assert (found["users"], found["repeats"]) == (30, True)
    assert 0 < found["channels"]["itemcf"]["f@10"] < 1


def test_users_without_history_get_the_fallback(recall: Recall, tmp_path: Path) -> None:
    rows = [(user, item, item) for user in range(6) for item in range(8)]
    rows += [(9, 3, 1000), (0, 100, 1000), (100, 100, 1)]
    users, items, times = zip(*rows, strict=True)
    table = {"user_id": users, "item_id": items, "event": ["click"] * len(rows), "timestamp": times}
    write_dataset(tmp_path, pa.table(table), meta={"name": "tiny", "protocol": "temporal"})
    code, out, _ = recall("eval", tmp_path, "--at", "5", "--json")
    assert code == 0
    assert one_object(out)["cold"]["users"] == 1
    code, out, _ = recall("eval", tmp_path, "--at", "5")
    assert "1 user without history, fallback channels:" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--protocol", "nope"],
            "--protocol: expected one of fixed-split, leave-one-out, temporal, disjoint-users, got 'nope'",
        ),
        (["--protocol", "fixed-split"], "column 'split': is needed by the protocol fixed-split"),
        (["--channels", "nope"], "--channels: no channel is called 'nope'"),
        (["--channels", ","], "--channels: names no channel"),
        (["--at", "0"], "--at: expected whole numbers from 1 to 100000, got '0'"),
        (["--at", "20,x"], "got 'x'"),
        (["--at", "1" * 5000], "--at: expected whole numbers"),
        (["--at", ","], "--at: expected at least one number"),
        (["--scene", "nope"], "--scene: no scene is called 'nope'"),
        (["--merge", "nope"], "--merge: expected one of quota, snake, rank_fusion"),
        (["--weights", "itemcf=nan"], "--weights itemcf: expected a number above 0, got 'nan'"),
        (["--weights", "itemcf"], "expected a number above 0, got ''"),
        (["--weights", "popular=1"], "--weights: expected one of itemcf, swing, usercf, followed_authors, "),
        (["--rank-constant", "-1"], "--rank-constant: expected a number above 0"),
        (["--part", "train"], "--part: expected validation or test"),
        (["--params", "nope.toml"], "nope.toml: cannot be read"),
        (["--channels", "itemcf", "--seeds", "1,2"], "--seeds: means nothing: none of itemcf is trained"),
        (["--channels", "itemcf", "--seeds", "1"], "--seeds: expected two seeds or more"),
        (["--cache", "/dev/null/x"], "cannot be used as a cache"),
        (["--held-users", "5"], "--held-users: means nothing for temporal: it belongs to disjoint-users"),
        (["--held-seed", "5"], "--held-seed: means nothing for temporal"),
        (["--protocol", "disjoint-users", "--held-users", "99999"], "leave nobody to learn from"),
    ],
)
def test_eval_refuses_with_one_sentence(recall: Recall, options: list[str], words: str) -> None:
    refused(recall("eval", sample_path(), *options, "--json"), words)


def test_eval_wants_a_protocol_where_the_data_names_none(recall: Recall, tmp_path: Path) -> None:
    table = {"user_id": [1], "item_id": [1], "event": ["click"], "timestamp": [1]}
    write_dataset(tmp_path, pa.table(table), meta={"name": "tiny", "protocol": "leave-one-out, temporal"})
    refused(recall("eval", tmp_path), "--protocol: expected one of fixed-split, ")
    refused(recall("eval", tmp_path, "--protocol", "temporal"), "no user has both history and truth")


# --- the cache ---------------------------------------------------------------------------------


def made(store: SnapshotStore, component: str, size: int = 1) -> str:
    """A finished snapshot, two hours old, which no release names."""
    with store.begin(component, parameters={}, dataset="x") as writer:
        writer.write("a", np.zeros(size))
    os.utime(store.root / component / writer.version, (time.time() - 7200,) * 2)
    return writer.version


def test_the_cache_keeps_what_the_newest_evaluations_used(tmp_path: Path) -> None:
    store = cached_store(tmp_path, "a")
    catalogue = made(store, "catalogue")
    versions = []
    for _ in range(4):
        versions.append(made(store, "itemcf"))
        for _ in range(2):  # the same again is not another one
            remember(store, {"catalogue": catalogue, "itemcf": versions[-1]}, keep=2)
    assert store.versions("itemcf") == versions[:1:-1]
    assert store.versions("catalogue") == [catalogue]


def test_a_store_that_nobody_used_for_a_month_goes_and_nothing_else_does(tmp_path: Path) -> None:
    old, recent = cached_store(tmp_path, "old"), cached_store(tmp_path, "recent")
    for store in (old, recent):
        remember(store, {"catalogue": made(store, "catalogue")})
    (tmp_path / ("0" * 16)).mkdir()  # looks like one, but holds none
    (tmp_path / "mine").mkdir()
    long_ago = time.time() - (UNUSED_DAYS + 1) * 86_400
    for path in (old.root, tmp_path / ("0" * 16), tmp_path / "mine"):
        os.utime(path, (long_ago, long_ago))
    cached_store(tmp_path, "recent")
    assert {path.name for path in tmp_path.iterdir()} == {recent.root.name, "0" * 16, "mine"}


# --- tune --------------------------------------------------------------------------------------


def test_tune_finds_options_that_eval_takes(recall: Recall, tmp_path: Path) -> None:
    start, out_file = tmp_path / "start.toml", tmp_path / "params.toml"
    start.write_text("[itemcf]\nneighbours = 30\ntop_k = 10\n[swing]\nneighbours = 40\n")
    arguments = ["--channels", "itemcf", "--trials", 12, "--metric", "ndcg@10", "--json"]
    code, out, err = recall("tune", sample_path(), *arguments, "--params", start, "--out", out_file)
    assert code == 0
    found = one_object(out)
    assert found.keys() >= CIRCUMSTANCES
    assert (found["trials"], found["metric"], found["protocol"]) == (12, "ndcg@10", "temporal")
    tuned = found["itemcf"]
    assert tuned["best"] >= tuned["default"] > 0
    assert tuned["before"]["top_k"] == 10
    assert sum(tuned["importance"].values()) == pytest.approx(1, abs=0.01)
    assert "tuning itemcf" in err
    # What was given and not searched stays; what was found is what is in the file.
    written = tomllib.loads(out_file.read_text("utf-8"))
    assert written == {"itemcf": {"neighbours": 30, **tuned["options"]}, "swing": {"neighbours": 40}}
    # And eval, on the same part, measures what the search did.
    options = ("--part", "validation", "--channels", "itemcf", "--at", "10", "--json")
    code, out, _ = recall("eval", sample_path(), *options, "--params", out_file)
    assert code == 0
    assert one_object(out)["channels"]["itemcf"]["ndcg@10"] == pytest.approx(tuned["best"], rel=1e-6)


def test_the_same_seed_finds_the_same() -> None:
    sample = Dataset.open(sample_path())

    def search() -> dict[str, Tuned]:
        trials = 7  # five at random, then the sampler's own
        arguments = (load_config(), sample, "temporal", ["usercf"], "recall@20", trials, SilentProgress())
        return dict(tune(*arguments, seed=3))

    first = search()
    assert first["usercf"].trials == 7
    assert search() == first


def test_a_default_outside_the_range_searched_is_measured_all_the_same() -> None:
    config = load_config().with_channel_options({"itemcf": {"top_k": 5}})  # searched from 10
    sample = Dataset.open(sample_path())
    found = dict(tune(config, sample, "temporal", ["itemcf"], "recall@20", 1, SilentProgress()))
    assert found["itemcf"].before["top_k"] == found["itemcf"].options["top_k"] == 5
    assert (found["itemcf"].trials, found["itemcf"].importance) == (1, {})
    assert found["itemcf"].best == found["itemcf"].default > 0


def test_tune_shows_what_mattered(recall: Recall, tmp_path: Path) -> None:
    arguments = ["--channels", "itemcf", "--trials", 10, "--out", tmp_path / "p.toml"]
    code, out, _ = recall("tune", sample_path(), *arguments)
    assert code == 0
    assert re.search(r"^itemcf: recall@20 0\.\d{4} on validation, 0\.\d{4} before$", out, re.MULTILINE)
    assert re.search(r"^top_k +10 +\d+ +\d+\.\d%$", out, re.MULTILINE)
    assert "--params" in out


@pytest.mark.parametrize(("ended", "left"), [(0, False), (1, True)])
def test_ctrl_c_keeps_what_had_been_found(
    recall: Recall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: int, left: bool
) -> None:
    def interrupted(*arguments: object) -> Any:
        for _ in range(ended):
            yield "itemcf", Tuned(0.2, 0.1, {"top_k": 20}, {"top_k": 10}, {}, 5)
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.offline.tune.tune", interrupted)
    file = tmp_path / "p.toml"
    code, out, err = recall("tune", sample_path(), "--trials", 5, "--out", file, "--json")
    assert (code, out) == (130, "")
    assert file.exists() == left
    if left:
        assert tomllib.loads(file.read_text("utf-8")) == {"itemcf": {"top_k": 20}}
        assert err.endswith("holds what was found for itemcf\n")
    else:
        assert err.endswith("error: interrupted\n")


def test_ctrl_c_in_a_trial_is_one_line(
    recall: Recall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.offline.tune.World.in_memory", interrupted)
    code, out, err = recall("tune", sample_path(), "--out", tmp_path / "p.toml")
    assert (code, out) == (130, "")
    assert err.endswith("error: interrupted\n")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metric", "auc"], "expected recall@K, ndcg@K, hit@K, precision@K, f@K or coverage@K, got 'auc'"),
        (["--metric", "recall@0"], "got 'recall@0'"),
        (["--protocol", "nope"], "--protocol: "),
        (["--channels", "nope"], "no channel is called 'nope'"),
        (["--channels", "itemcf,popular"], "channels.popular: declares no options to tune"),
        (["--protocol", "fixed-split"], "column 'split'"),
        (["--out", "/nope/p.toml"], "--out /nope/p.toml: expected a file in a folder that exists"),
    ],
)
def test_tune_refuses_with_one_sentence(
    recall: Recall, tmp_path: Path, options: list[str], words: str
) -> None:
    refused(recall("tune", sample_path(), "--out", tmp_path / "p.toml", *options), words)
    assert not list(tmp_path.iterdir())


def test_tune_says_what_to_install_without_optuna(
    recall: Recall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    answer = recall("tune", sample_path(), "--out", tmp_path / "p.toml")
    refused(answer, "tuning needs Optuna: pip install 'recall-engine[tune]'")


def test_params_that_cannot_be_written_are_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_params(tmp_path / "nope" / "p.toml", {}, "", {})
    assert depth_of("hit@7") == 7


# --- bench -------------------------------------------------------------------------------------


def test_bench_build_compares_with_implicit(recall: Recall) -> None:
    pytest.importorskip("implicit")
    sizes = ["--synthetic", "300x200x4000", "--repetitions", 2, "--neighbours", 20]
    code, out, err = recall("bench", "build", *sizes, "--channels", "itemcf,usercf", "--json")
    assert code == 0
    found = one_object(out)
    assert found.keys() >= CIRCUMSTANCES
    for name in ("itemcf_s", "usercf_s", "implicit_cosine_s", "itemcf_over_implicit"):
        assert found[f"{name}_min"] <= found[name] <= found[f"{name}_max"]
    assert found["neighbours_equal_share"] > 0.99
    assert found["peak_rss_mb"] >= found["memory_itemcf"]["peak_rss_mb"] > 10
    assert "repetitions" in err


def test_bench_build_of_a_data_set_without_the_comparison(
    recall: Recall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "implicit.nearest_neighbours", None)
    arguments = ["bench", "build", "--data", sample_path(), "--channels", "itemcf", "--repetitions", 1]
    refused(recall(*arguments), "the comparison needs implicit: pip install 'recall-engine[bench]'")
    code, out, _ = recall(*arguments, "--no-compare", "--threads", 1)
    assert code == 0
    assert re.search(r"^itemcf_s +[\d.]+ +[\d.]+ +[\d.]+$", out, re.MULTILINE)
    assert "implicit" not in out
    assert re.search(r"^itemcf +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d,.]+$", out, re.MULTILINE)


def test_memory_that_cannot_be_measured_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(BuildError, match=r"itemcf: measuring its memory ended with status 1"):
        peak_memory(load_config(), synthetic_interactions(10, 10, 50), "itemcf", 1)


def test_neighbours_that_tie_with_the_last_one_kept_are_equal() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    theirs = sparse.csr_matrix(np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.2, 0.0, 1.0]]))
    ours = {
        "indptr": np.array([0, 1, 2, 3]),
        "neighbours": np.array([1, 2, 1]),
        "similarities": np.array([0.5, 0.5, 0.1]),
    }
    assert equal_share(ours, theirs) == pytest.approx(2 / 3)


def test_bench_pipeline_times_a_made_up_world_and_keeps_it(recall: Recall, cache: Path) -> None:
    arguments = ["bench", "pipeline", "--items", 500, "--limit", 20, "--requests", 16, "--repetitions", 2]
    code, out, _ = recall(*arguments, "--json")
    assert code == 0
    found = one_object(out)
    assert found.keys() >= CIRCUMSTANCES
    assert 0 < found["batch1_us_min"] <= found["batch1_us"] <= found["batch1_us_max"]
    assert found["batch8_us"] > 0
    assert found["batch1_parts_us"].keys() >= {"hydrate", "merge", "itemcf", "swing", "usercf"}
    code, out, err = recall(*arguments)
    assert code == 0
    assert re.search(r"^hydrate +[\d.]+ +[\d.]+$", out, re.MULTILINE)
    assert "done  itemcf" not in err
    assert list((cache / "worlds").iterdir())


def test_bench_state_times_the_read_of_users_who_did_a_lot(recall: Recall) -> None:
    sizes = ["--users", 6, "--batch", 3, "--repetitions", 2, "--reads", 3]
    code, out, err = recall("bench", "state", *sizes, "--json")
    assert code == 0, err
    found = one_object(out)
    assert found.keys() >= CIRCUMSTANCES
    assert 0 < found["read_us_min"] <= found["read_us"] <= found["read_us_max"]
    assert all(found[part] > 0 for part in ("used_us", "wall_us", "fetch_us", "decode_us", "ping_us"))
    assert found["bytes_per_user"] > 5_000
    refused(recall("bench", "state", "--users", 2), "--batch: a batch of 8 needs as many users, there are 2")


def test_bench_exposure_times_the_check_and_counts_false_positives(recall: Recall) -> None:
    sizes = ["--items", 1000, "--candidates", 50, "--repetitions", 2, "--checks", 3, "--trials", 1]
    code, out, err = recall("bench", "exposure", *sizes, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["check_us_min"] <= report["check_us"] <= report["check_us_max"]
    assert report["pybloom_us"] > 0
    rates = {(row["slices"], row["times"]): row["rate"] for row in report["false_positives"]}
    assert set(rates) == {(1, 1.0), (1, 5.0), (1, 20.0), (5, 0.5), (5, 1.0)}
    assert rates[1, 1.0] < 0.012  # of 20,000 strangers to one user: the table of the documentation has 20
    code, out, _ = recall("bench", "exposure", *sizes)
    assert code == 0
    assert "times planned" in out
    assert "pybloom-live takes" in out


def test_bench_scaling_shows_the_curve(recall: Recall) -> None:
    sizes = ["--users", 100, "--items", 80, "--events", 1000, "--steps", "2,1", "--repetitions", 1]
    code, out, _ = recall("bench", "scaling", *sizes, "--json")
    assert code == 0
    found = one_object(out)
    assert found.keys() >= CIRCUMSTANCES
    assert [row["times"] for row in found["curve"]] == [1, 2]
    assert found["curve"][0]["entries"] < found["curve"][1]["entries"]
    assert found["channel"] == "swing"
    code, out, _ = recall("bench", "scaling", *sizes, "--channel", "usercf")
    assert code == 0
    assert "usercf over 80 items" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build"], "expected one of --data DIR and --synthetic USERSxITEMSxEVENTS"),
        (["build", "--data", ".", "--synthetic", "1x1x1"], "expected one of --data DIR and"),
        (["build", "--synthetic", "10x10"], "--synthetic: expected USERSxITEMSxEVENTS, got '10x10'"),
        (["build", "--synthetic", "10x0x10"], "--synthetic: expected whole numbers from 1 "),
        (["build", "--synthetic", "9x9x9", "--channels", "nope"], "no channel is called 'nope'"),
        (["build", "--data", "/nope"], "/nope: is not a directory"),
        (["pipeline", "--channels", "nope"], "no channel is called 'nope'"),
        (["scaling", "--channel", "itemcf,swing"], "no channel is called 'itemcf swing'"),
        (["scaling", "--steps", "0"], "--steps: expected whole numbers"),
    ],
)
def test_bench_refuses_with_one_sentence(recall: Recall, arguments: list[str], words: str) -> None:
    refused(recall("bench", *arguments), words)


def test_the_commit_is_this_projects_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = bench_report.circumstances()["commit"]
    assert re.fullmatch(r"([0-9a-f]{7,}(-dirty)?)?", here)
    # A package installed into somebody else's repository must not report that one's commit.
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(bench_report, "__file__", str(tmp_path / "lib" / "engine" / "bench" / "report.py"))
    assert bench_report.circumstances()["commit"] == ""
