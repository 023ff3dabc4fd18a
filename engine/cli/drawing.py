"""A scene's pipeline as text: a box per stage, in the order in which a request goes down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config import Config, SceneConfig

WIDTH = 100
_LABEL = 10


def draw_scene(config: Config, scene_name: str, versions: Mapping[str, str] | None = None) -> str:
    """Return the drawing of a scene.

    Args:
        config: the configuration.
        scene_name: one of its scenes.
        versions: component -> snapshot version of the release in service; None where there is none.
    """
    scene = config.scenes[scene_name]
    boxes = [_box(stage, lines) for stage, lines in _stages(config, scene, versions)]
    arrow = " " * (WIDTH // 2) + "▼"
    return "\n".join([f"scene {scene_name!r}", f"\n{arrow}\n".join(boxes)])


def stage_names(config: Config, scene_name: str) -> list[str]:
    """Return the stages that the drawing shows, in order."""
    return [stage for stage, _ in _stages(config, config.scenes[scene_name], None)]


def _stages(
    config: Config, scene: SceneConfig, versions: Mapping[str, str] | None
) -> list[tuple[str, list[str]]]:
    fill = [_channel(config, name, "", versions) for name in scene.fallback]
    return [
        (
            "query",
            [f"every field is checked; limit: {scene.limit:,}, at most {config.server.max_limit:,}"],
        ),
        (
            "hydrate",
            [f"ids become rows; history: the newest {config.history.keep:,} items of the user, recent_items"],
        ),
        (
            "fan_out",
            [
                _channel(config, name, f"quota {quota:<6,}weight {scene.weights.get(name, 1.0):g}", versions)
                for name, quota in scene.quotas.items()
            ],
        ),
        ("mask", list(scene.filters) or ["no filter"]),
        (
            "merge",
            [_merge(scene), f"score: sum of weight / ({scene.rank_constant:g} + rank) over the channels"],
        ),
        ("fill", ["where the answer is short:", *fill] if fill else ["no fallback"]),
        ("encode", ["candidates with every channel's rank, score and trigger; a report per channel"]),
    ]


def _channel(config: Config, name: str, quota: str, versions: Mapping[str, str] | None) -> str:
    kind = config.channel_types[name]
    loaded, _ = config.channel(name)
    parts = [name if kind == name else f"{name} ({kind})", quota]
    if not loaded.needs_build:
        parts.append("needs no snapshot")
    elif versions is not None:
        lender = config.snapshot_of(name)
        of = "" if lender == name else f"of {lender} "
        parts.append(f"snapshot {of}{versions[lender]}" if lender in versions else "NO SNAPSHOT")
    return f"{parts[0]:<24}" + "  ".join(part for part in parts[1:] if part)


def _merge(scene: SceneConfig) -> str:
    total = sum(scene.quotas.values())
    how = {
        "quota": "each channel takes its quota, in this order",
        "snake": "channels take turns, first to last and back, up to their quotas",
        "rank_fusion": "what stands within the quotas competes by score",
    }[scene.merge.name.lower()]
    return f"{scene.merge.name.lower()}: {how}; {total:,} in all"


def _box(stage: str, lines: list[str]) -> str:
    inner = WIDTH - 4
    room = inner - _LABEL
    rows = [line if len(line) <= room else line[: room - 1] + "…" for line in lines]
    labels = [stage, *[""] * (len(rows) - 1)]
    body = [f"│ {label:<{_LABEL}}{row:<{room}} │" for label, row in zip(labels, rows, strict=True)]
    return "\n".join([f"┌{'─' * (WIDTH - 2)}┐", *body, f"└{'─' * (WIDTH - 2)}┘"])
