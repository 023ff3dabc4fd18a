"""The package of docs/add-a-channel.md: found as an entry point, built, asked over the serving pipeline."""

import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from engine import plugins
from engine.config import default_config_path, parse_config
from engine.core.candidates import ChannelStatus
from engine.core.channel import SilentProgress
from engine.core.errors import ConfigError
from engine.data.dataset import Dataset
from engine.data.sample import sample_path
from engine.data.snapshot import SnapshotStore
from engine.offline.build import build_release
from engine.online.replica import Replica
from engine.online.request import Request
from engine.testing import ChannelContract, built_channel, tiny_interactions

EXAMPLE = Path(__file__).with_name("plugin_example")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Put the example on the path the way an installer does: its modules, and its entry points beside them."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    facts = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (facts / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLE)
    plugins.forget()
    yield tmp_path
    sys.modules.pop("tag_mates", None)
    plugins.forget()


def config_with(channel):
    raw = tomllib.loads(default_config_path().read_text())
    raw["channels"][channel] = {}
    raw["server"]["channel_deadline_ms"] = 30_000.0  # a busy machine is not what is tested
    raw["scenes"]["default"]["quotas"] = {"itemcf": 50, channel: 50}
    return parse_config(raw)


def test_the_document_shows_the_package_as_it_is():
    text = (EXAMPLE.parents[1] / "docs" / "add-a-channel.md").read_text()
    assert (EXAMPLE / "tag_mates.py").read_text().strip() in text
    assert (EXAMPLE / "pyproject.toml").read_text().strip() in text


def test_an_outside_package_adds_a_channel(installed, tmp_path):
    config = config_with("tag_mates")
    store = SnapshotStore(tmp_path / "store")
    build_release(config, Dataset.open(sample_path()), store, SilentProgress())
    replica = Replica.open(config, store)
    pipeline = replica.pipelines["default"]
    users = replica.catalogue.users.ids(np.arange(20, dtype=np.int32)).tolist()
    run = pipeline.run([Request(user_id=user) for user in users])
    mine = pipeline.channel_names.index("tag_mates")
    answered = run.status[mine] == ChannelStatus.OK
    assert answered.sum() > 10
    assert (run.merged.kept[mine][answered] > 0).all()
    tags = replica.catalogue.base.tags["tags"]
    q = int(np.flatnonzero(answered)[0])
    history = run.batch.history
    last = history.rows[history.offsets[q]]
    own = run.merged.proposal_sources[run.merged.proposal_channels == mine]
    first = run.columns.fan_out.rows[own][run.columns.fan_out.query_of_candidate()[own] == q]
    assert {tags.take(np.array([row]))[0][0] for row in first} == {tags.take(np.array([last]))[0][0]}


def test_the_gate_of_the_example_is_reported(installed, tmp_path):
    config = config_with("tag_mates")
    store = SnapshotStore(tmp_path / "store")
    build_release(config, Dataset.open(sample_path()), store, SilentProgress())
    pipeline = Replica.open(config, store).pipelines["default"]
    run = pipeline.run([Request()])
    assert run.status[pipeline.channel_names.index("tag_mates"), 0] == ChannelStatus.GATED
    assert run.merged.rows.size > 0  # a guest is answered all the same


def test_a_plugin_that_cannot_be_imported_is_named(installed):
    (installed / "broken.py").write_text("raise RuntimeError('no such library')\n")
    points = next(installed.glob("*.dist-info")) / "entry_points.txt"
    points.write_text("[recall.channels]\nbroken = broken:Channel\nnot_one = json:JSONDecoder\n")
    plugins.forget()
    with pytest.raises(ConfigError, match=r"channels.broken.*cannot be imported.*no such library"):
        config_with("broken")
    with pytest.raises(ConfigError, match=r"channels.not_one.*not a subclass of Channel"):
        config_with("not_one")
    config_with("swing")  # the others are as they were


class TestTagMatesContract(ChannelContract):
    @pytest.fixture(autouse=True)
    def _installed(self, installed):
        pass

    def channel(self):
        from tag_mates import TagMates

        tags = {
            "tags.offsets": np.arange(self.items + 1),
            "tags.codes": np.arange(self.items, dtype=np.int32) % 5,
        }
        return built_channel(TagMates, tiny_interactions(self.users, self.items), tags)
