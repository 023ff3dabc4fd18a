"""`recall train --follow`: what it refuses before it begins."""

from __future__ import annotations

import pytest

from engine.cli import app

CONFIG = """
[state]
url = "{url}"

[ingest]
event_log = {event_log}

[interest]
click = 1.0

[channels.popular]
[channels.two_tower]
[channels.streaming_vq]

[scenes.default]
quotas = {{ popular = 50 }}
fallback = []
"""


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, event_log: str = "true", url: str = "") -> str:
        config = tmp_path / "config.toml"
        config.write_text(CONFIG.format(event_log=event_log, url=url))
        with pytest.raises(SystemExit) as ended:
            app(["train", *arguments, "--config", str(config), "--store", str(tmp_path / "store")])
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


def test_without_an_event_log_there_is_nothing_to_follow(refused):
    assert "ingest.event_log: is off" in refused("streaming_vq", "--follow", event_log="false")


def test_without_a_state_store_there_is_none(refused):
    assert "state.url: is 'none'" in refused("streaming_vq", "--follow", url="none")


def test_a_channel_that_learns_from_no_stream_is_refused(refused):
    assert "CHANNEL: the channel 'two_tower' does not learn from a stream" in refused("two_tower", "--follow")


def test_without_a_release_there_is_nothing_to_go_on_from(refused):
    assert "no release is in service; run `recall build`" in refused("streaming_vq", "--follow")


def test_it_takes_no_data_set_and_everything_else_needs_one(refused, tmp_path):
    assert "--follow: goes on from the release in service" in refused(
        "streaming_vq", str(tmp_path), "--follow"
    )
    assert "DIR: names no data set" in refused("streaming_vq")
