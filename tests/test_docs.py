"""The documentation against the code: links resolve, and what the pages list is what there is."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from engine.ann import IndexOptions
from engine.config import (
    SECTIONS,
    AllowConfig,
    BreakerConfig,
    Config,
    DegradeStep,
    ExposureConfig,
    HistoryConfig,
    IngestConfig,
    OverloadConfig,
    SceneConfig,
    SecurityConfig,
    ServerConfig,
    StateConfig,
    StoreConfig,
    default_config_path,
)
from engine.core.merge import MergeMode
from engine.core.options import Online, Options
from engine.data.form import FILES, form
from engine.data.importers import IMPORTERS, importer_options
from engine.models.options import TrainingOptions
from engine.models.path_options import PathTrainingOptions
from engine.models.spec import Feature, SequenceSpec
from engine.models.streaming_options import StreamingOptions, Task
from engine.online import wire
from engine.plugins import CHANNELS, FILTERS, channel_class, filter_class, plugin_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

OWN_CHANNELS = [
    name
    for name in plugin_names(CHANNELS)
    if channel_class(name).__module__.split(".")[:2] == ["channels", name]
]
OWN_FILTERS = [name for name in plugin_names(FILTERS) if filter_class(name).__module__ == f"filters.{name}"]

MODELS: dict[str, type[Options]] = {
    "store": StoreConfig,
    "server": ServerConfig,
    "security": SecurityConfig,
    "security.allow": AllowConfig,
    "overload": OverloadConfig,
    "breaker": BreakerConfig,
    "history": HistoryConfig,
    "state": StateConfig,
    "ingest": IngestConfig,
    "state.exposure": ExposureConfig,
    "scenes.NAME": SceneConfig,
    "scenes.NAME.degrade": DegradeStep,
    **{f"channels.{name}": channel_class(name).Config for name in OWN_CHANNELS},
    "channels.two_tower.item_features": Feature,
    "channels.two_tower.sequence": SequenceSpec,
    "channels.two_tower.training": TrainingOptions,
    "channels.two_tower.index_options": IndexOptions,
    "channels.deep_retrieval.training": PathTrainingOptions,
    "channels.streaming_vq.training": StreamingOptions,
    "channels.streaming_vq.training.tasks": Task,
    **{f"filters.{name}": filter_class(name).Config for name in OWN_FILTERS},
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        found = file.exists()
        if found and anchor and file.suffix == ".md":
            found = anchor in anchors(file.read_text(encoding="utf-8"))
        if not found:
            broken.append(link)
    assert not broken


def test_our_own_plugins_are_all_looked_at() -> None:
    files = {path.stem for folder in ("channels", "filters") for path in (ROOT / folder).glob("[a-z]*.py")}
    files |= {path.parent.name for path in (ROOT / "channels").glob("*/__init__.py")}
    assert files == {*OWN_CHANNELS, *OWN_FILTERS}


def test_every_section_is_listed() -> None:
    assert set(table("Sections")) == set(SECTIONS)
    assert Config.model_fields["min_rating"].default is None  # "absent" in the table


@pytest.mark.parametrize("section", MODELS)
def test_every_option_stands_with_its_default(section: str) -> None:
    rows = table(f"`[{section}]`")
    fields = MODELS[section].model_fields
    assert list(rows) == list(fields)
    for name, field in fields.items():
        tables = field.default if isinstance(field.default, tuple) else (field.default,)
        if any(isinstance(each, Options) for each in tables):
            expected = "see below"  # a table of its own, or several
        else:
            expected = "required" if field.is_required() else f"`{toml(field.default)}`"
        assert rows[name]["default"] == expected, name
        for word in allowed(field):
            assert word in rows[name]["allowed"], name


@pytest.mark.parametrize("channel", OWN_CHANNELS)
def test_every_option_says_what_reads_it(channel: str) -> None:
    rows = table(f"`[channels.{channel}]`")
    for name, field in channel_class(channel).Config.model_fields.items():
        online = any(isinstance(mark, Online) for mark in field.metadata)
        assert rows[name]["read by"] == ("serve" if online else "build"), name


def test_points_are_those_that_ship() -> None:
    shipped = tomllib.loads(default_config_path().read_text(encoding="utf-8"))["interest"]
    assert {name: float(row["points"]) for name, row in table("`[interest]`").items()} == shipped


def test_every_rule_of_the_data_form_has_its_wording() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    columns = [column for kind in ("int64", "string") for file in FILES for column in form(kind)[file]]
    wordings = {rule.text for column in columns for rule in column.kind.rules}
    wordings |= {column.kind.name for column in columns} | {f"`{column.name}`" for column in columns}
    assert sorted(wording for wording in wordings if wording not in page) == []


def test_every_importer_is_described() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for kind in IMPORTERS:
        assert f"| `{kind}` |" in page
        for option in importer_options(kind):
            assert f"`--{option.replace('_', '-')}`" in page


def test_limits_of_the_api_are_those_of_the_wire() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    limits = {
        "`recent_items`": wire.MAX_RECENT,
        "`exclude_item_keys`": wire.MAX_EXCLUDED,
        "`trigger_item_keys`": wire.MAX_TRIGGERS,
        "`channel_overrides`": wire.MAX_OVERRIDES,
        "`context.device`": wire.MAX_DEVICE,
        "`context.city`": wire.MAX_TEXT_BYTES,
        "`request_id`": wire.MAX_REQUEST_ID_BYTES,
        "`context.time`": wire.MAX_TIME,
    }
    for field, limit in limits.items():
        row = next(line for line in page.splitlines() if line.startswith("|") and field in line.split("|")[1])
        assert f"{limit:,}" in row, field


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(heading: str) -> dict[str, dict[str, str]]:
    """The first table under a heading of the configuration page: first cell without backticks -> cell by column."""
    body = re.split(rf"^#+ {re.escape(heading)}$", CONFIGURATION, maxsplit=1, flags=re.MULTILINE)
    assert len(body) == 2, f"no heading {heading!r}"
    own = re.split(r"^#+ ", body[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in own.splitlines() if line.startswith("|")
    ]
    if not lines:
        return {}
    names = lines[0]
    return {cells[0].strip("`"): dict(zip(names, cells, strict=True)) for cells in lines[2:]}


def toml(default: Any) -> str:
    if isinstance(default, MergeMode):
        return json.dumps(default.name.lower())
    if isinstance(default, Path):
        return json.dumps(str(default))
    return json.dumps(default)


def allowed(field: Any) -> list[str]:
    """What the column "allowed" must say about a field."""
    if field.annotation is MergeMode:
        return [mode.name.lower() for mode in MergeMode]
    choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for mark in field.metadata:
        for name, sign in signs.items():
            if hasattr(mark, name):
                choices.append(f"{sign} {getattr(mark, name):,.10g}")
    return choices
