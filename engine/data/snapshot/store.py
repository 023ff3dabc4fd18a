"""The store: builds go in, releases name them, replicas open the newest sound release."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from engine.core.errors import BuildError, SnapshotError
from engine.data.snapshot import reader
from engine.data.snapshot.files import TEMPORARY, claim, locked, replace_file, sync, temporary_beside
from engine.data.snapshot.manifest import (
    COMPONENT_PATTERN,
    NAME_PATTERN,
    Manifest,
    Release,
    moment_of,
    timestamp,
)
from engine.data.snapshot.reader import Snapshot
from engine.data.snapshot.writer import SnapshotWriter

CATALOGUE = "catalogue"
"""The component whose version says what the rows of all others mean."""

_RESERVED = ("releases", "current", "state")


@dataclass(slots=True)
class Collected:
    """What `SnapshotStore.collect` deleted.

    Attributes:
        releases: names of releases.
        snapshots: (component, version) pairs.
        unfinished: leftovers of builds that died.
        errors: retained releases that cannot be read. What they need is unknown, so with one of them no
            snapshot is deleted.
    """

    releases: list[str] = field(default_factory=list)
    snapshots: list[tuple[str, str]] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    errors: list[SnapshotError] = field(default_factory=list)


class SnapshotStore:
    """Snapshots and releases under one directory, which comes into being with the first build.

    Readers take no lock. `publish`, `rollback` and `collect` take turns.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._releases = self.root / "releases"
        self._current = self.root / "current"

    # --- building ------------------------------------------------------------------------------------------

    @contextmanager
    def begin(
        self,
        component: str,
        *,
        parameters: Mapping[str, Any],
        dataset: str,
        catalogue: str = "",
        log_offset: str = "0-0",
    ) -> Iterator[SnapshotWriter]:
        """Build a snapshot: arrays go to the writer, and the snapshot exists once the context has ended.

        If it ends by an exception there is no trace of it. It is not in service before `publish`;
        `writer.version` names it for that.

        Args:
            component: "catalogue", "history" or a channel's name.
            parameters: the options it is built with; must be JSON.
            dataset: the data set's fingerprint.
            catalogue: version of the catalogue that its rows mean; "" if it has none.
            log_offset: entry of the live log up to which the data set reaches.

        Raises:
            SnapshotError: no such name for a component is allowed.
            BuildError: from the writer, or the files cannot be written, as on a full disk.
        """
        home = self._home(component)
        facts = {
            "parameters": parameters,
            "dataset": dataset,
            "catalogue": catalogue,
            "log_offset": log_offset,
        }
        temporary = temporary_beside(home / "version")
        lock: int | None = None
        try:
            home.mkdir(parents=True, exist_ok=True)
            with self._locked():  # so that `collect` does not see the directory before it is claimed
                temporary.mkdir()
                lock = claim(temporary)
            writer = SnapshotWriter(temporary, component, facts)
            yield writer
            version = writer.commit().version
            os.rename(temporary, home / version)
            sync(home)
            sync(self.root)
            writer.version = version
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # Array.tofile has no reason: it took less than it was given.
            reason = error.strerror or "only a part of an array went to the disk"
            where = error.filename or home
            raise BuildError(f"{component}: its snapshot cannot be written to {where}: {reason}") from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            if lock is not None:
                os.close(lock)

    def versions(self, component: str) -> list[str]:
        """Return the finished versions of a component, newest first, published or not, sound or not."""
        return _names(self._home(component), "")

    def manifest(self, component: str, version: str) -> Manifest:
        """Read one version's manifest, so that a build can see whether it already has what it would make.

        Raises:
            SnapshotError: it is missing or damaged.
        """
        return Manifest.read(self._home(component) / version / "manifest.json", version)

    # --- opening -------------------------------------------------------------------------------------------

    def open(
        self, component: str, version: str, verify: bool = True, catalogue: str | None = None
    ) -> Snapshot:
        """Open one snapshot.

        Args:
            component: whose.
            version: which.
            verify: compare checksums, which reads every byte; sizes and headers are always checked.
            catalogue: the catalogue version that it must have been built for; None if any will do.

        Raises:
            SnapshotError: naming the file and what is wrong with it.
        """
        snapshot = reader.load(self._home(component) / version, component)
        if catalogue is not None:
            reader.check_catalogue(snapshot, catalogue)
        if verify:
            reader.verify([snapshot])
        return snapshot

    def load_release(
        self, release: Release, verify: bool = True, opened: Mapping[str, Snapshot] | None = None
    ) -> dict[str, Snapshot]:
        """Open every snapshot of a release and check that all were built for its catalogue.

        Args:
            release: which.
            verify: compare checksums, those of `opened` excepted.
            opened: snapshots by component that are open already; those that the release names too are used again.

        Raises:
            SnapshotError: for the first thing wrong.
        """
        catalogue = release.snapshots.get(CATALOGUE, "")
        snapshots: dict[str, Snapshot] = {}
        new = []
        for component, version in release.snapshots.items():
            known = (opened or {}).get(component)
            if known is not None and known.version == version:
                reader.check_catalogue(known, catalogue)
                snapshots[component] = known
            else:
                snapshots[component] = self.open(component, version, verify=False, catalogue=catalogue)
                new.append(snapshots[component])
        if verify:
            reader.verify(new)
        return snapshots

    def newest_valid(self, verify: bool = True) -> tuple[Release, dict[str, Snapshot], list[SnapshotError]]:
        """Open the release in service; if it is damaged, the newest one before it that is sound.

        Releases newer than the current one are left alone: somebody rolled back from them. Only if `current`
        itself is lost or damaged does every release come into question, newest first.

        Returns:
            The release, its snapshots by component, and why each release tried before it was refused.

        Raises:
            SnapshotError: no release can be opened; the text is that of the first refusal.
        """
        refused: list[SnapshotError] = []
        pointer = self._pointer()
        names = self.release_names()
        try:
            current = self.current_name()
            if current is None and names:
                raise SnapshotError("the file is missing, though there are releases", str(self._current))
            names = [name for name in names if current is None or name < current]
            if current is not None:
                names.insert(0, current)
        except SnapshotError as error:
            refused.append(error)
        for name in names:
            try:
                release = self.release(name)
                return release, self.load_release(release, verify), refused
            except SnapshotError as error:
                refused.append(error)
        if not refused:
            raise SnapshotError("no release has been published here", str(self.root))
        if self._pointer() != pointer:
            # A newer release came into service meanwhile, and what was tried here may have been collected.
            return self.newest_valid(verify)
        raise refused[0]

    # --- releases ------------------------------------------------------------------------------------------

    def publish(self, snapshots: Mapping[str, str]) -> Release:
        """Make a release of one version per component and put it in service.

        Raises:
            SnapshotError: a snapshot is missing or damaged, or built for another catalogue, or the disk is full;
                nothing changed.
        """
        with self._locked():
            made = datetime.now(UTC)
            names = self.release_names()
            if names:  # names sort by time, so a clock that was set back must not make the new one the older
                made = max(made, moment_of(names[0]) + timedelta(microseconds=1))
            release = Release.make(created=timestamp(made), snapshots=dict(snapshots))
            self.load_release(release, verify=False)
            self._releases.mkdir(exist_ok=True)
            file = self._releases / f"{release.name}.json"
            self._replace(file, release.encode())
            try:
                self._replace(self._current, f"{release.name}\n".encode())
            except SnapshotError:
                file.unlink()
                raise
        return release

    def current(self) -> Release | None:
        """Return the release in service, or None if nothing was ever published.

        Raises:
            SnapshotError: `current` is damaged or names a release that is missing or damaged.
        """
        name = self.current_name()
        return None if name is None else self.release(name)

    def current_name(self) -> str | None:
        """Return the name of the release in service, or None if nothing was ever published.

        Raises:
            SnapshotError: `current` is damaged or names a release that is not there.
        """
        try:
            name = self._current.read_text("utf-8").removesuffix("\n")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise SnapshotError(f"cannot be read: {error}", str(self._current)) from error
        if not re.fullmatch(NAME_PATTERN, name):
            raise SnapshotError("damaged: it holds no release's name", str(self._current))
        if not (self._releases / f"{name}.json").exists():
            raise SnapshotError(f"names release {name}, which does not exist", str(self._current))
        return name

    def release_names(self) -> list[str]:
        """Return the names of all releases, newest first, readable or not."""
        return _names(self._releases, ".json")

    def release(self, name: str) -> Release:
        """Read a release.

        Raises:
            SnapshotError: it is missing or damaged.
        """
        return Release.read(self._releases / f"{name}.json", name)

    def releases(self) -> list[Release]:
        """Return the releases that can be read, newest first."""
        found = []
        for name in self.release_names():
            try:
                found.append(self.release(name))
            except SnapshotError:
                continue
        return found

    def rollback(self, name: str | None = None) -> Release:
        """Put an earlier release back in service.

        Args:
            name: which (a later one is allowed too); None for the one before the current one.

        Raises:
            SnapshotError: there is none, or a file of it is missing or cut off, or the disk is full; nothing changed.
        """
        with self._locked():
            if name is None:
                current = self.current_name()
                earlier = [other for other in self.release_names() if current is not None and other < current]
                if not earlier:
                    raise SnapshotError("there is no release before the current one", str(self._current))
                name = earlier[0]
            release = self.release(name)
            self.load_release(release, verify=False)
            self._replace(self._current, f"{release.name}\n".encode())
        return release

    def retire(self, names: Iterable[str]) -> None:
        """Delete releases, so that they do not count among those that `collect` keeps; the one in service stays."""
        with self._locked():
            current = self.current_name()
            for name in set(names).intersection(self.release_names()) - {current}:
                (self._releases / f"{name}.json").unlink()

    # --- tidying -------------------------------------------------------------------------------------------

    def collect(self, keep: int, grace_seconds: float = 3600.0) -> Collected:
        """Delete old releases, the snapshots that no retained release names, and what dead builds left.

        Args:
            keep: how many of the newest releases stay; the current one stays always.
            grace_seconds: a finished snapshot younger than this stays: its build may be about to publish it.

        Raises:
            ValueError: keep is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        collected = Collected()
        if not self.root.is_dir():
            return collected
        with self._locked():
            in_use = self._retain(keep, collected)
            doomed: list[Path] = []
            for home in self._components():
                dead = [path for path in home.glob(f"{TEMPORARY}*") if _is_dead(path)]
                collected.unfinished += [f"{home.name}/{path.name}" for path in dead]
                doomed += dead
                for version in _names(home, "") if not collected.errors else []:
                    age = time.time() - (home / version).stat().st_mtime
                    if (home.name, version) not in in_use and age >= grace_seconds:
                        # Out of sight in one step: half of a snapshot never shows under its name.
                        doomed.append(temporary_beside(home / version))
                        os.rename(home / version, doomed[-1])
                        collected.snapshots.append((home.name, version))
            # Whoever writes these files holds the lock that is held here, so none is in use.
            for path in [*self.root.glob(f"{TEMPORARY}*"), *self._releases.glob(f"{TEMPORARY}*")]:
                path.unlink()
                collected.unfinished.append(path.name)
        for path in doomed:
            shutil.rmtree(path, ignore_errors=True)
        return collected

    def _retain(self, keep: int, collected: Collected) -> set[tuple[str, str]]:
        """Delete the releases that need not stay; return the (component, version) pairs of those that do."""
        names = self.release_names()
        retained = set(names[:keep])
        try:
            current = self.current_name()
            retained |= set() if current is None else {current}
        except SnapshotError as error:
            collected.errors.append(error)
            retained = set(names)  # any of them may be the one in service
        in_use: set[tuple[str, str]] = set()
        for name in names:
            if name not in retained:
                (self._releases / f"{name}.json").unlink()
                collected.releases.append(name)
                continue
            try:
                in_use |= set(self.release(name).snapshots.items())
            except SnapshotError as error:
                collected.errors.append(error)
        return in_use

    # --- inside --------------------------------------------------------------------------------------------

    def _home(self, component: str) -> Path:
        if not re.fullmatch(COMPONENT_PATTERN, component) or component in _RESERVED:
            raise SnapshotError(f"{component!r} cannot be the name of a component", str(self.root))
        return self.root / component

    def _components(self) -> list[Path]:
        return sorted(
            path
            for path in self.root.iterdir()
            if path.name not in _RESERVED and re.fullmatch(COMPONENT_PATTERN, path.name) and path.is_dir()
        )

    def _pointer(self) -> bytes | None:
        try:
            return self._current.read_bytes()
        except OSError:
            return None

    def _replace(self, path: Path, content: bytes) -> None:
        """Write a file of releases; SnapshotError where that cannot be done."""
        try:
            replace_file(path, content)
        except OSError as error:
            raise SnapshotError(f"cannot be written: {error.strerror}", str(path)) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root / ".lock"):
            yield


def _names(directory: Path, suffix: str) -> list[str]:
    if not directory.is_dir():
        return []
    names = (path.name.removesuffix(suffix) for path in directory.iterdir() if path.name.endswith(suffix))
    return sorted((name for name in names if re.fullmatch(NAME_PATTERN, name)), reverse=True)


def _is_dead(temporary: Path) -> bool:
    """Whether no living process builds in this directory."""
    try:
        descriptor = claim(temporary)
    except FileNotFoundError:  # its build ended, or another collection got there first
        return False
    if descriptor is None:
        return False
    os.close(descriptor)
    return True
