"""What the tables say of each other: names that refer to nothing, and numbers that contradict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from engine.config.document import Config
from engine.core.errors import ConfigError
from engine.core.exposure import LARGEST_LINK
from engine.core.merge import MergeMode
from engine.core.options import Options
from engine.plugins import filter_class

RESERVED = ("catalogue", "history", "releases", "current", "state")
"""Names that a channel cannot have: the store uses them."""


class Finding(Options):
    """One thing that the lint has to say."""

    severity: Literal["error", "warning"]
    field: str
    text: str


def cross_check(config: Config) -> Iterator[Finding]:
    """Cross-reference every name: errors are refused at load, warnings are for `recall check`."""
    used: set[str] = set()
    for name in RESERVED:
        if name in config.channels:
            text = "is the name of something else in the store; use another, with `type` naming the plugin"
            yield Finding(severity="error", field=f"channels.{name}", text=text)
    if not any(points > 0 for points in config.interest.values()):
        yield Finding(
            severity="error", field="interest", text="no event kind has points, so nobody likes anything"
        )
    if config.breaker.failures > config.breaker.calls:
        text = f"expected at most breaker.calls, {config.breaker.calls}, got {config.breaker.failures:g}"
        yield Finding(severity="error", field="breaker.failures", text=text)
    exposure = config.state.exposure
    if exposure.planned * exposure.bits > LARGEST_LINK:
        text = f"{exposure.planned} exposures of {exposure.bits} bits are above {LARGEST_LINK:,} bits in all"
        yield Finding(severity="error", field="state.exposure.planned", text=text)
    for scene_name, scene in config.scenes.items():
        at = f"scenes.{scene_name}"
        for key, names in (
            ("quotas", tuple(scene.quotas)),
            ("fallback", scene.fallback),
            ("weights", tuple(scene.weights)),
        ):
            for name in names:
                used.add(name)
                if name not in config.channels:
                    text = f"no channel is called {name!r}; declared: {', '.join(config.channels) or 'none'}"
                    yield Finding(severity="error", field=f"{at}.{key}.{name}", text=text)
        for name in scene.filters:
            try:
                config.filter(name)
            except ConfigError as error:
                yield Finding(severity="error", field=f"{at}.filters", text=str(error))
        for name in scene.fail_open:  # one that the scene does not have is fine: the default names two
            try:
                filter_class(name)
            except ConfigError as error:
                yield Finding(severity="error", field=f"{at}.fail_open", text=str(error))
        for name in scene.fallback:
            if name in scene.quotas:
                text = f"{name!r} has a quota too; a channel is either asked always or only as a fallback"
                yield Finding(severity="error", field=f"{at}.fallback", text=text)
        for name in scene.weights:
            if name not in scene.quotas and name not in scene.fallback:
                text = f"{name!r} is no channel of the scene"
                yield Finding(severity="error", field=f"{at}.weights.{name}", text=text)
        for label, names in (("fallback", scene.fallback), ("filters", scene.filters)):
            if len(set(names)) != len(names):
                yield Finding(severity="error", field=f"{at}.{label}", text="names one component twice")
        for n, step in enumerate(scene.degrade):
            for name in step.without:
                if name not in scene.quotas and name not in scene.fallback:
                    text = f"{name!r} is no channel of the scene"
                    yield Finding(severity="error", field=f"{at}.degrade.{n}.without", text=text)
            if not set(scene.quotas) - set(step.without):
                text = "leaves no channel but the fallback"
                yield Finding(severity="warning", field=f"{at}.degrade.{n}.without", text=text)
            if n and step.at <= scene.degrade[n - 1].at:
                text = f"expected more than the {scene.degrade[n - 1].at:g} of the step before"
                yield Finding(severity="error", field=f"{at}.degrade.{n}.at", text=text)
        if scene.limit > config.server.max_limit:
            text = f"{scene.limit} is above server.max_limit, {config.server.max_limit}"
            yield Finding(severity="error", field=f"{at}.limit", text=text)
        total = sum(scene.quotas.values())
        if total == 0:
            yield Finding(severity="error", field=f"{at}.quotas", text="every quota is 0")
        elif total < scene.limit:
            text = f"quotas sum to {total}, below the limit of {scene.limit}: the rest is backfilled"
            yield Finding(severity="warning", field=f"{at}.quotas", text=text)
        elif total > scene.limit and scene.merge is not MergeMode.RANK_FUSION:
            text = f"quotas sum to {total}, above the limit of {scene.limit}: they shrink in proportion"
            yield Finding(severity="warning", field=f"{at}.quotas", text=text)
        if not scene.fallback:
            text = "no fallback: an unknown user gets an empty answer"
            yield Finding(severity="warning", field=f"{at}.fallback", text=text)
    used |= {config.snapshot_of(name) for name in used}
    for name in config.channels:
        if name not in used:
            yield Finding(severity="warning", field=f"channels.{name}", text="declared, but no scene uses it")
    for name in config.filters:
        if not any(name in scene.filters for scene in config.scenes.values()):
            yield Finding(severity="warning", field=f"filters.{name}", text="declared, but no scene uses it")
