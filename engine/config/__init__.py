"""The configuration: one commented TOML file, typed, unknown keys refused. See docs/configuration.md."""

from engine.config.checks import Finding, cross_check
from engine.config.document import Config
from engine.config.reading import SECTIONS, default_config_path, load_config, parse_config, read_params
from engine.config.tables import (
    AllowConfig,
    BreakerConfig,
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
    TelemetryConfig,
)

__all__ = [
    "SECTIONS",
    "AllowConfig",
    "BreakerConfig",
    "Config",
    "DegradeStep",
    "ExposureConfig",
    "Finding",
    "HistoryConfig",
    "IngestConfig",
    "OverloadConfig",
    "SceneConfig",
    "SecurityConfig",
    "ServerConfig",
    "StateConfig",
    "StoreConfig",
    "TelemetryConfig",
    "cross_check",
    "default_config_path",
    "load_config",
    "parse_config",
    "read_params",
]
