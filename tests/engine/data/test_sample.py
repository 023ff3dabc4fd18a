"""The bundled sample: it opens, it has enough in it for every channel, and its licence is with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import load_config, read_params
from engine.data.dataset import Dataset
from engine.data.sample import sample_path
from engine.data.sample.make_sample import MIN_USERS, POSITIVE, USERS, make_sample
from engine.data.summary import describe
from engine.offline.build import learnt_of, made_of

FULL = Path(__file__).parents[4] / "shared" / "data" / "kuairand-pure-partial"
PARAMS = Path(__file__).parents[3] / "docs" / "params" / "sample.toml"
FILES = ("interactions.parquet", "items.parquet", "users.parquet", "follows.parquet")


def test_sample_opens_and_holds_every_kind_of_event() -> None:
    dataset = Dataset.open(sample_path())
    summary = describe(dataset)
    assert summary.users == dataset.meta["users"] == USERS
    assert summary.items == dataset.meta["items"] == dataset.rows["items"]
    assert summary.events == dataset.meta["events"]
    assert set(summary.kinds) == {*POSITIVE, "expose", "dislike", "profile_enter"}
    assert min(summary.kinds.values()) >= 100
    assert summary.per_item.median >= MIN_USERS
    assert dataset.rows["follows"] > 200
    for column in ("author_id", "published_at", "duration_seconds", "tags"):
        assert dataset.has("items", column)


def test_the_vectors_that_come_with_it_are_of_this_sample_and_these_options() -> None:
    config = load_config().with_channel_options(read_params(PARAMS))
    channel, options = config.channel("two_tower")
    wanted = made_of(config, options, Dataset.open(sample_path()).fingerprint())
    arrays = learnt_of(sample_path(), "two_tower", channel, wanted)
    assert arrays is not None
    assert "item.embeddings.0.weight" in arrays


def test_sample_is_small_and_carries_its_licence_and_attribution() -> None:
    assert (
        sum((sample_path() / name).stat().st_size for name in (*FILES, "dataset.toml", "LICENSE")) < 1_000_000
    )
    meta = Dataset.open(sample_path()).meta
    assert meta["licence"] == "CC BY-SA 4.0"
    assert "Attribution-ShareAlike 4.0" in (sample_path() / meta["licence_file"]).read_text("utf-8")
    assert "Gao" in meta["attribution"]
    assert "kuairand.com" in meta["source"]
    assert meta["changes"]


@pytest.mark.skipif(not FULL.is_dir(), reason="the full data set is not here")
def test_sample_can_be_made_again(tmp_path: Path) -> None:
    made = make_sample(FULL, tmp_path)
    bundled = Dataset.open(sample_path())
    assert made.meta == bundled.meta
    assert made.rows == bundled.rows
    for name in FILES:
        # Not byte by byte: another version of pyarrow may encode otherwise.
        assert (tmp_path / name).stat().st_size == pytest.approx(
            (sample_path() / name).stat().st_size, rel=0.1
        )
