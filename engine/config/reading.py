"""Reading the configuration: one commented TOML file, typed, unknown keys refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from engine.config.channels import check_lender, checked_deadline, with_lent
from engine.config.checks import cross_check
from engine.config.document import Config
from engine.config.validation import typed
from engine.core.errors import ConfigError
from engine.core.options import Options
from engine.plugins import channel_class, filter_class

SECTIONS = (
    "store",
    "server",
    "security",
    "overload",
    "breaker",
    "history",
    "state",
    "ingest",
    "telemetry",
    "interest",
    "min_rating",
    "channels",
    "filters",
    "scenes",
)


def default_config_path() -> Path:
    """Return the commented configuration that ships with the package."""
    return Path(__file__).parents[1] / "recall.toml"


def load_config(path: Path | None = None, lenient: bool = False) -> Config:
    """Read a configuration file, or the one that ships with the package.

    Args:
        path: the file; None is the one that ships with the package.
        lenient: take names that refer to nothing, so that `cross_check` can list them all.

    Raises:
        ConfigError: one sentence naming the key (dotted path) and what was expected.
    """
    return parse_config(_read_toml(path or default_config_path()), lenient)


def read_params(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file of options per channel, as `recall tune` writes it, for `Config.with_channel_options`.

    Raises:
        ConfigError: it cannot be read, or is not one table of options per channel.
    """
    tables = _read_toml(path)
    for name, options in tables.items():
        if not isinstance(options, dict):
            raise ConfigError("expected a table of options", f"{path.name}.{name}")
    return tables


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"is not valid TOML: {error}", str(path)) from error


def parse_config(raw: dict[str, Any], lenient: bool = False) -> Config:
    """Turn a parsed TOML document into a checked configuration; as `load_config`."""
    for key in raw:
        if key not in SECTIONS:
            raise ConfigError(f"unknown key; known: {', '.join(SECTIONS)}", key)
    raw = dict(raw)
    for section in ("channels", "filters"):
        table = raw.get(section, {})
        if not isinstance(table, dict):
            raise ConfigError("expected a table", section)
        for name, value in table.items():
            if not isinstance(value, dict):
                raise ConfigError("expected a table", f"{section}.{name}")
    types: dict[str, str] = {}
    lenders: dict[str, str] = {}
    deadlines: dict[str, float] = {}
    channels: dict[str, Options] = {}
    for name, values in raw.get("channels", {}).items():
        values = dict(values)
        kind = values.pop("type", name)
        if not isinstance(kind, str):
            raise ConfigError("expected the name of a channel plugin", f"channels.{name}.type")
        try:
            loaded = channel_class(kind)
        except ConfigError as error:
            raise ConfigError(str(error), f"channels.{name}") from error
        if "snapshot" in values:
            lenders[name] = values.pop("snapshot")
        if "deadline_ms" in values:
            deadlines[name] = checked_deadline(
                values.pop("deadline_ms"), loaded, f"channels.{name}.deadline_ms"
            )
        types[name] = kind
        channels[name] = typed(loaded.Config, values, f"channels.{name}")
    for name, lender in lenders.items():
        check_lender(name, lender, types, lenders)
        channels[name] = with_lent(channels[name], channels[lender], lender, f"channels.{name}")
    filters: dict[str, Options] = {}
    for name, values in raw.get("filters", {}).items():
        try:
            options = filter_class(name).Config
        except ConfigError as error:
            raise ConfigError(str(error), f"filters.{name}") from error
        filters[name] = typed(options, values, f"filters.{name}")
    raw |= {
        "channels": channels,
        "filters": filters,
        "channel_types": types,
        "channel_snapshots": lenders,
        "channel_deadlines": deadlines,
    }
    config: Config = typed(Config, raw, "")
    errors = [problem for problem in cross_check(config) if problem.severity == "error"]
    if errors and not lenient:
        raise ConfigError(errors[0].text, errors[0].field)
    return config
