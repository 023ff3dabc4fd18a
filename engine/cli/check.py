"""`recall check`: what is wrong with a configuration, said before anything starts, and the pipeline drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from engine import console
from engine.cli.common import ConfigOption, StoreOption, settings
from engine.cli.drawing import draw_scene
from engine.core.errors import SnapshotError

if TYPE_CHECKING:
    from engine.config import Config, Finding
    from engine.data.snapshot import Release, SnapshotStore


def check(config: ConfigOption = None, store: StoreOption = None) -> None:
    """Check a configuration, and the release in service against it; draw the pipeline of each scene.

    Exit status 0 where it is clean or has warnings only, 2 where a server would not start.
    """
    from engine.config import cross_check

    loaded, snapshots = settings(config, store, lenient=True)
    findings = [*cross_check(loaded), *check_security(loaded)]
    if _errors(findings) == 0:  # names that refer to nothing can neither be looked up nor drawn
        versions = None
        try:
            release = snapshots.current()
            findings += check_release(loaded, snapshots, release)
            versions = None if release is None else release.snapshots
        except SnapshotError as error:
            findings.append(_finding("error", "store", str(error)))
        # Plain text: the boxes must not be folded by a narrow terminal, nor read as markup.
        for scene in loaded.scenes:
            typer.echo(draw_scene(loaded, scene, versions) + "\n")
    show_findings(findings)
    errors = _errors(findings)
    counts = console.counted(errors, "error"), console.counted(len(findings) - errors, "warning")
    console.output().print(", ".join(counts))
    if errors:
        raise typer.Exit(2)


def _errors(findings: list[Finding]) -> int:
    return sum(finding.severity == "error" for finding in findings)


def check_security(config: Config) -> Iterator[Finding]:
    """Look at certificates, tokens and the addresses that are open to others."""
    from engine.core.errors import ConfigError
    from engine.online.security import check

    try:
        check(config)
    except ConfigError as error:
        yield _finding("error", error.field, str(error).removeprefix(f"{error.field}: "))


def check_release(config: Config, store: SnapshotStore, release: Release | None) -> Iterator[Finding]:
    """Compare the release in service with what the configuration wants.

    Raises:
        SnapshotError: a snapshot of the release is missing or damaged.
    """
    from engine.core.options import build_parameters
    from engine.offline.build import interest_parameters, used_channels

    if release is None:
        yield _finding("warning", "store", f"nothing is built in {store.root} yet; `recall build` does that")
        return
    opened = store.load_release(release, verify=False)
    for name in used_channels(config):
        loaded, options = config.channel(name)
        if not loaded.needs_build:
            continue
        if name not in opened:
            text = f"release {release.name} has no snapshot of it; run `recall build`"
            yield _finding("error", f"channels.{name}", text)
            continue
        parameters = opened[name].manifest.parameters
        if any(parameters.get(key) != value for key, value in interest_parameters(config).items()):
            text = "was built with other points or another min_rating; run `recall build`"
            yield _finding("warning", f"channels.{name}", text)
        built = parameters.get("options", {})
        wanted = build_parameters(options)
        changed = [key for key in wanted if built.get(key) != wanted[key]]
        if changed:
            was = ", ".join(f"{key} = {built.get(key)!r}" for key in changed)
            yield _finding("warning", f"channels.{name}", f"was built with {was}; run `recall build`")


def show_findings(findings: list[Finding]) -> None:
    """Print the findings, errors first."""
    out = console.output()
    for finding in sorted(findings, key=lambda each: each.severity != "error"):
        style = "bold red" if finding.severity == "error" else "yellow"
        out.print(
            Text.assemble((finding.severity, style), f"  {finding.field}: {finding.text}"), soft_wrap=True
        )


def _finding(severity: str, field: str, text: str) -> Finding:
    from engine.config import Finding

    return Finding.model_validate({"severity": severity, "field": field, "text": text})
