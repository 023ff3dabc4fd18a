"""The configuration: every mistake is refused before anything starts, and the error names the key."""

from __future__ import annotations

import copy
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, cross_check, default_config_path, load_config, parse_config
from engine.core.errors import ConfigError
from engine.core.merge import MergeMode

RAW: dict[str, Any] = {
    "interest": {"click": 1.0},
    "channels": {"itemcf": {}, "swing": {}, "popular": {}},
    "scenes": {
        "default": {"limit": 20, "quotas": {"itemcf": 10, "swing": 10}, "fallback": ["popular"]},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return RAW with the value at a dotted path replaced; tables on the way are made."""
    raw = copy.deepcopy(RAW)
    *tables, last = path.split(".")
    table = raw
    for name in tables:
        table = table.setdefault(name, {})
    table[last] = value
    return raw


def refusal(raw: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return caught.value


def warnings_of(raw: dict[str, Any]) -> list[tuple[str, str]]:
    return [(finding.field, finding.text) for finding in cross_check(parse_config(raw))]


def test_the_file_that_ships_is_clean_and_spells_out_the_defaults() -> None:
    config = load_config()
    assert list(cross_check(config)) == []
    raw = tomllib.loads(default_config_path().read_text("utf-8"))
    for section in ("store", "server", "overload", "breaker", "history"):
        spelled, defaults = raw[section], type(getattr(config, section))().model_dump(mode="json")
        assert spelled == defaults, section
    scene = {
        key: value for key, value in raw["scenes"]["default"].items() if key not in ("quotas", "weights")
    }
    fields = type(config.scenes["default"]).model_fields
    assert scene == {key: "quota" if key == "merge" else _plain(fields[key].default) for key in scene}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_a_minimal_configuration_needs_only_interest_channels_and_scenes() -> None:
    config = parse_config(RAW)
    assert config.scenes["default"].merge is MergeMode.QUOTA
    assert config.scenes["default"].filters == (
        "availability",
        "seen",
        "excluded",
        "exposure",
        "dislikes",
    )
    assert config.scenes["default"].fail_open == ("exposure", "dislikes")
    assert config.channel("itemcf")[0].__name__ == "ItemCF"
    assert list(cross_check(config)) == []


@pytest.mark.parametrize(
    "path",
    [
        "serve",
        "server.prot",
        "store.folder",
        "history.length",
        "channels.itemcf.neighbors",
        "scenes.default.quota",
        "filters.seen.window",
    ],
)
def test_an_unknown_key_is_refused_by_its_dotted_path_and_the_known_ones_are_told(path: str) -> None:
    error = refusal(changed(path, 1))
    assert error.field == path
    assert "unknown key; known: " in str(error) or "expected a table" in str(error)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "path",
    [
        "scenes.default.weights.itemcf",
        "scenes.default.rank_constant",
        "interest.click",
        "min_rating",
        "server.reserve_ms",
        "channels.itemcf.shrinkage",
    ],
)
def test_what_is_not_a_finite_number_is_refused(path: str, value: float) -> None:
    assert refusal(changed(path, value)).field == path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("scenes.default.weights.itemcf", 0),
        ("scenes.default.weights.itemcf", -1.0),
        ("scenes.default.quotas.itemcf", -1),
        ("scenes.default.quotas.itemcf", 1.5),
        ("scenes.default.quotas.itemcf", 100_001),
        ("scenes.default.limit", 0),
        ("scenes.default.merge", "quotas"),
        ("scenes.default.merge", 0),
        ("server.port", 65_536),
        ("server.port", "http"),
        ("interest.click", -1),
        ("channels.itemcf.neighbours", 0),
        ("store.keep_releases", 0),
    ],
)
def test_a_value_out_of_range_or_of_the_wrong_type_is_refused(path: str, value: Any) -> None:
    assert refusal(changed(path, value)).field.startswith(path)


@pytest.mark.parametrize(
    ("path", "value", "field", "words"),
    [
        ("channels.nope", {}, "channels.nope", "no plugin of the group 'recall.channels' is called 'nope'"),
        ("channels.itemcf.type", "nope", "channels.itemcf", "'nope'"),
        ("channels.itemcf.type", 3, "channels.itemcf.type", "expected the name of a channel plugin"),
        ("channels.itemcf", 3, "channels.itemcf", "expected a table"),
        ("channels", 3, "channels", "expected a table"),
        ("filters.nope", {}, "filters.nope", "no plugin of the group 'recall.filters' is called 'nope'"),
        ("filters", [], "filters", "expected a table"),
        ("scenes.default.quotas.usercf", 5, "scenes.default.quotas.usercf", "no channel is called 'usercf'"),
        (
            "scenes.default.fallback",
            ["fresh"],
            "scenes.default.fallback.fresh",
            "no channel is called 'fresh'",
        ),
        ("scenes.default.fallback", ["itemcf"], "scenes.default.fallback", "has a quota too"),
        ("scenes.default.fallback", ["popular", "popular"], "scenes.default.fallback", "twice"),
        ("scenes.default.filters", ["seen", "seen"], "scenes.default.filters", "twice"),
        ("scenes.default.filters", ["nope"], "scenes.default.filters", "'nope'"),
        ("scenes.default.fail_open", ["exposure", "nope"], "scenes.default.fail_open", "'nope'"),
        ("state", {"exposure": {"planned": 100_000, "bits": 11}}, "state.exposure.planned", "1,048,576 bits"),
        ("scenes.default.weights", {"fresh": 1.0}, "scenes.default.weights.fresh", "no channel is called"),
        ("scenes.default.quotas", {"itemcf": 0, "swing": 0}, "scenes.default.quotas", "every quota is 0"),
        ("scenes.default.quotas", {}, "scenes.default.quotas", ""),
        ("scenes.default.limit", 6000, "scenes.default.limit", "above server.max_limit"),
        ("scenes", {}, "scenes", ""),
        ("interest", {"click": 0}, "interest", "no event kind has points"),
    ],
)
def test_every_name_is_cross_referenced(path: str, value: Any, field: str, words: str) -> None:
    error = refusal(changed(path, value))
    assert error.field == field
    assert words in str(error)


def test_a_weight_for_a_channel_of_another_scene_is_refused() -> None:
    raw = changed("scenes.feed", {"limit": 5, "quotas": {"swing": 5}, "fallback": ["popular"]})
    raw["scenes"]["feed"]["weights"] = {"itemcf": 2.0}
    error = refusal(raw)
    assert error.field == "scenes.feed.weights.itemcf"
    assert "no channel of the scene" in str(error)


def test_quotas_that_do_not_sum_to_the_limit_are_warned_about() -> None:
    assert warnings_of(changed("scenes.default.limit", 21)) == [
        ("scenes.default.quotas", "quotas sum to 20, below the limit of 21: the rest is backfilled")
    ]
    above = changed("scenes.default.limit", 19)
    assert warnings_of(above) == [
        ("scenes.default.quotas", "quotas sum to 20, above the limit of 19: they shrink in proportion")
    ]
    above["scenes"]["default"]["merge"] = "rank_fusion"  # where quotas only say who competes
    assert warnings_of(above) == []


def test_what_nobody_uses_and_a_scene_without_fallback_are_warned_about() -> None:
    raw = changed("scenes.default.fallback", [])
    raw["filters"] = {"excluded": {}}
    raw["scenes"]["default"]["filters"] = ["seen"]
    assert {field for field, _ in warnings_of(raw)} == {
        "scenes.default.fallback",
        "channels.popular",
        "filters.excluded",
    }


def test_one_plugin_may_serve_under_two_names_with_other_options() -> None:
    raw = changed("channels.itemcf_wide", {"type": "itemcf", "top_k": 50})
    raw["scenes"]["default"]["quotas"]["itemcf_wide"] = 5
    config = parse_config(raw)
    wide, options = config.channel("itemcf_wide")
    assert wide is config.channel("itemcf")[0]
    assert options.model_dump()["top_k"] == 50
    assert config.channels["itemcf"].top_k != 50


def test_parsing_leaves_the_document_as_it_was() -> None:
    raw = changed("channels.itemcf.type", "itemcf")
    before = copy.deepcopy(raw)
    parse_config(raw)
    assert raw == before


def test_channel_options_are_replaced_in_a_copy() -> None:
    config = parse_config(changed("channels.itemcf.top_k", 7))
    tuned = config.with_channel_options({"itemcf": {"neighbours": 50}})
    assert (tuned.channels["itemcf"].neighbours, tuned.channels["itemcf"].top_k) == (50, 7)
    assert config.channels["itemcf"].neighbours != 50
    assert isinstance(tuned, Config)


def test_options_may_declare_a_channel_that_is_installed() -> None:
    config = load_config()
    assert "two_tower" not in config.channels
    with_it = config.with_channel_options({"two_tower": {"trigger_items": 8}})
    kind, options = with_it.channel("two_tower")
    assert (kind.__name__, options.trigger_items) == ("TwoTower", 8)  # type: ignore[attr-defined]
    assert "two_tower" not in config.channel_types


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"two_tower": {"nope": 1}}, "params.two_tower.nope"),
        ({"nope": {}}, "params.nope"),
        ({"itemcf": {"nope": 1}}, "params.itemcf.nope"),
        ({"itemcf": {"neighbours": 0}}, "params.itemcf.neighbours"),
        ({"itemcf": {"shrinkage": math.nan}}, "params.itemcf.shrinkage"),
    ],
)
def test_channel_options_that_do_not_fit_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config().with_channel_options(changes)
    assert caught.value.field == field


@pytest.mark.parametrize("content", [b"[store", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_refused_by_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recall.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not valid TOML") as caught:
        load_config(path)
    assert caught.value.field == str(path)


def test_a_file_that_is_not_there_or_is_a_folder_is_refused_by_its_path(tmp_path: Path) -> None:
    for path in (tmp_path / "nope.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load_config(path)
        assert caught.value.field == str(path)


def lending(borrower: dict[str, Any], lender: dict[str, Any] | None = None) -> dict[str, Any]:
    raw = changed("channels.itemcf", lender or {})
    raw["channels"]["similar"] = {"type": "itemcf", "snapshot": "itemcf"} | borrower
    raw["scenes"]["default"]["quotas"] = {"swing": 10, "similar": 10}
    return raw


def test_a_channel_that_loads_anothers_snapshot_has_that_ones_options_of_the_build() -> None:
    config = parse_config(lending({"source": "trigger", "top_k": 99}, {"neighbours": 50, "top_k": 5}))
    options = config.channels["similar"]
    assert (options.neighbours, options.top_k, options.source) == (50, 99, "trigger")
    assert (config.snapshot_of("similar"), config.snapshot_of("itemcf")) == ("itemcf", "itemcf")
    assert config.channels["itemcf"].top_k == 5
    assert list(cross_check(config)) == [], "a channel that only lends its snapshot is used"
    tuned = config.with_channel_options({"itemcf": {"neighbours": 70, "top_k": 6}})
    options = tuned.channels["similar"]
    assert (options.neighbours, options.top_k) == (70, 99)
    same = parse_config(lending({"neighbours": 50}, {"neighbours": 50}))
    assert same.channels["similar"].neighbours == 50


def test_authors_channels_share_their_posting_lists() -> None:
    config = load_config()
    assert config.snapshot_of("interacted_authors") == "followed_authors"
    assert config.channel("interacted_authors")[0].__name__ == "InteractedAuthors"


@pytest.mark.parametrize(
    ("borrower", "field", "text"),
    [
        ({"snapshot": "nope"}, "snapshot", "expected the name of another channel, got 'nope'"),
        ({"snapshot": "similar"}, "snapshot", "expected the name of another channel, got 'similar'"),
        ({"snapshot": 3}, "snapshot", "expected the name of another channel, got 3"),
        (
            {"snapshot": "swing"},
            "snapshot",
            "'swing' is a 'swing', which builds other arrays than a 'itemcf' loads",
        ),
        ({"neighbours": 60}, "neighbours", "the snapshot is that of 'itemcf', which is built with 50"),
    ],
)
def test_a_snapshot_that_cannot_be_shared_is_refused(borrower: dict[str, Any], field: str, text: str) -> None:
    error = refusal(lending(borrower, {"neighbours": 50}))
    assert error.field == f"channels.similar.{field}"
    assert text in str(error)


def test_a_borrowed_snapshot_is_not_lent_on() -> None:
    raw = lending({})
    raw["channels"]["third"] = {"type": "itemcf", "snapshot": "similar"}
    assert "name 'itemcf'" in str(refusal(raw))


def test_params_cannot_take_a_borrower_away_from_what_it_loads() -> None:
    with pytest.raises(ConfigError, match="the snapshot is that of 'itemcf'") as caught:
        parse_config(lending({})).with_channel_options({"similar": {"neighbours": 7}})
    assert caught.value.field == "params.similar.neighbours"
