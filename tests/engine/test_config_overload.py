"""Configuration of deadlines, breakers, admission and degrading."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from engine.config import cross_check, default_config_path, parse_config
from engine.core.channel import Channel
from engine.core.errors import ConfigError
from engine.plugins import channel_class


def raw() -> dict[str, Any]:
    return tomllib.loads(default_config_path().read_text("utf-8"))


class Remote(Channel):
    needs_build = False


@pytest.fixture
def remote(monkeypatch):
    """A configuration with a channel of another package."""

    def found(name: str) -> type[Channel]:
        return Remote if name == "remote" else channel_class(name)

    monkeypatch.setattr("engine.config.reading.channel_class", found)
    values = raw()
    values["channels"]["remote"] = {}
    values["scenes"]["default"]["quotas"]["remote"] = 0
    return values


def test_a_channel_beside_has_the_deadline_of_its_table_or_that_of_the_server(remote):
    assert parse_config(remote).deadline_of("remote") == 50.0
    remote["server"]["channel_deadline_ms"] = 20
    assert parse_config(remote).deadline_of("remote") == 20.0
    remote["channels"]["remote"]["deadline_ms"] = 5
    config = parse_config(remote)
    assert (config.deadline_of("remote"), config.channels["remote"].model_dump()) == (5.0, {})


@pytest.mark.parametrize("value", [0, -1, "soon", True, float("inf"), float("nan")])
def test_a_deadline_is_a_time(remote, value):
    remote["channels"]["remote"]["deadline_ms"] = value
    with pytest.raises(ConfigError, match=r"^channels\.remote\.deadline_ms: expected milliseconds above 0"):
        parse_config(remote)


def test_an_inline_channel_has_no_deadline():
    values = raw()
    values["channels"]["itemcf"]["deadline_ms"] = 5
    with pytest.raises(ConfigError, match=r"^channels\.itemcf\.deadline_ms: the channel runs on the compute"):
        parse_config(values)


@pytest.mark.parametrize(
    ("steps", "field"),
    [
        (
            [{"at": 0.5, "without": ["nobody"]}],
            r"scenes\.default\.degrade\.0\.without: 'nobody' is no channel",
        ),
        ([{"at": 0.5}, {"at": 0.5}], r"scenes\.default\.degrade\.1\.at: expected more than the 0\.5"),
        ([{"at": 0.0}], r"scenes\.default\.degrade\.0\.at"),
        ([{"at": 0.5, "limit": 1.5}], r"scenes\.default\.degrade\.0\.limit"),
        ([{"limit": 0.5}], r"scenes\.default\.degrade\.0\.at"),
        (
            [{"at": 0.5, "less": 1}],
            r"scenes\.default\.degrade\.0\.less: unknown key; known: ",
        ),
    ],
)
def test_steps_that_cannot_be(steps, field):
    values = raw()
    values["scenes"]["default"]["degrade"] = steps
    with pytest.raises(ConfigError, match=rf"^{field}"):
        parse_config(values)


def test_the_steps_that_are_shown_in_the_file_that_ships_are_sound():
    text = default_config_path().read_text("utf-8")
    begin = text.index("# [[scenes.default.degrade]]")
    end = text.index("\n\n", begin)
    steps = "\n".join(line.removeprefix("#").strip() for line in text[begin:end].splitlines())
    values = raw()
    values["scenes"]["default"]["degrade"] = tomllib.loads(steps)["scenes"]["default"]["degrade"]
    config = parse_config(values)
    assert len(config.scenes["default"].degrade) == 2
    assert list(cross_check(config)) == []


def test_a_step_that_leaves_only_the_fallback_is_warned_of():
    values = raw()
    every = list(values["scenes"]["default"]["quotas"])
    values["scenes"]["default"]["degrade"] = [{"at": 0.9, "without": every}]
    (finding,) = cross_check(parse_config(values))
    assert (finding.severity, finding.field) == ("warning", "scenes.default.degrade.0.without")


def test_a_breaker_that_could_never_open_is_refused():
    values = raw()
    values["breaker"] = {"failures": 30, "calls": 20}
    with pytest.raises(ConfigError, match=r"^breaker\.failures: expected at most breaker\.calls, 20"):
        parse_config(values)
