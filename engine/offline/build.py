"""Build: a data set in, a release out. What an earlier build made of the same inputs is used again."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

import engine
from engine import __version__
from engine.config import Config
from engine.core.channel import BuildContext, BuildMode, Channel, Events, Progress, SnapshotSink
from engine.core.errors import BuildError, ConfigError, SnapshotError, StateError
from engine.core.interactions import Interactions
from engine.core.options import Options, build_parameters
from engine.core.types import AnyArray, BoolArray
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog, ignored_events, interest_matrix
from engine.data.fold import fold
from engine.data.follows import read_follows
from engine.data.learnt import read_learnt
from engine.data.snapshot import CATALOGUE, Release, SnapshotStore, SnapshotWriter
from engine.state.history import HISTORY, write_history
from engine.state.log import START, LiveLog, offset_key

log = logging.getLogger(__name__)

WORK_DAYS = 30
"""What an interrupted build left is kept so long, for the same build to go on from."""

SHARED_CODE = ("engine.models", "engine.training", "engine.ann")
"""What channels that learn share: it decides what they build as much as their own modules do."""

_IMPORTED = re.compile(r"^\s*(?:from|import)\s+(\w+\.[\w.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """What a release is built from.

    Attributes:
        catalogue: items, users, authors.
        liked: the interest matrix.
        now: the time of the last event that says somebody likes something, seconds since the epoch; ages are measured
            from it.
        key: names the data: the fingerprint, and the part of it where only a part is used.
        ignored: events that say nothing about interest, by kind.
        follows: who follows whom, users x authors; None where the data set has no follows.
        log_offset: up to where of the live log the catalogue holds what was published.
        events: events of the kinds that some channel reads; None where none does.
        folder: where channels may find what was learnt from just this; None: nowhere.
    """

    catalogue: Catalogue
    liked: Interactions
    now: int
    key: str
    ignored: Mapping[str, int]
    follows: Interactions | None = None
    log_offset: str = START
    events: Events | None = None
    folder: Path | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        events: EventLog,
        catalogue: Catalogue,
        key: str,
        where: BoolArray | None = None,
        follows: Interactions | None = None,
    ) -> Source:
        """Make the interest matrix of (a part of) an event log.

        Raises:
            BuildError: if no event says that anybody likes anything.
        """
        liked = interest_matrix(events, config.interest, where, config.min_rating)
        counts = events.counts_by_kind(where)
        ignored = ignored_events(events, config.interest, where, config.min_rating)
        if liked.entries == 0:
            kinds = ", ".join(f"{kind} ({n})" for kind, n in counts.items() if n) or "none"
            raise BuildError(
                f"no event of the data set earns points in [interest]; kinds of event there: {kinds}"
            )
        now = int(liked.timestamps.max())
        return cls(catalogue, liked, now, key, ignored, follows)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_release(
    config: Config,
    dataset: Dataset,
    store: SnapshotStore,
    progress: Progress,
    channels: Sequence[str] | None = None,
    threads: int | None = None,
    live_log: LiveLog | None = None,
    mode: BuildMode = "full",
) -> tuple[Release, Source]:
    """Build every channel that a scene uses, publish them as one release and collect old ones.

    What an earlier build made of the same data, options and code is used again; where that is everything, the release
    in service stays as it is.

    Args:
        config: the configuration.
        dataset: an open data set.
        store: where snapshots go.
        progress: told how far it is.
        channels: build these anew, whether or not they were built before; None: none of them.
        threads: cores to use; None for all.
        live_log: what was published, changed and taken down live goes into the catalogue, and the log is trimmed behind
            the oldest release that stays; None: there is none.
        mode: how those of `channels` are built.

    Raises:
        DatasetError, BuildError, ConfigError: as the parts raise them. Nothing is published then.
        StateError: the live log cannot be read; the same.
    """
    progress.start("reading", 2)
    catalogue = Catalogue.from_dataset(dataset)
    key, offset = dataset.fingerprint(), START
    if live_log is not None:
        # What is published from here on may be in the table too; taking it in twice changes nothing.
        offset = live_log.end()
        catalogue, digest = fold(catalogue, (change for part in live_log.table() for change in part))
        key = f"{key}.{digest}" if digest else key
    progress.advance()
    events = EventLog.read(dataset, catalogue)
    progress.advance()
    follows = read_follows(dataset, catalogue)
    source = Source.of(config, events, catalogue, key, follows=follows)
    source = replace(source, log_offset=offset, folder=dataset.path)
    anew = frozenset(config.snapshot_of(name) for name in channels or ())
    names = list(dict.fromkeys((*used_channels(config), *anew)))
    source = replace(source, events=events_read(config, names, events))
    del events
    versions = build_components(config, source, store, progress, names, threads, anew, mode)
    release = _in_service(store)
    if release is None or release.snapshots != versions:
        release = store.publish(versions)
    store.collect(config.store.keep_releases)
    if live_log is not None:
        _trim(live_log, store)
    return release, source


def _trim(live_log: LiveLog, store: SnapshotStore) -> None:
    """Delete what every release that stays already holds of the live log."""
    try:
        names = store.release_names()
        catalogues = [store.release(name).snapshots[CATALOGUE] for name in names]
        offsets = [store.manifest(CATALOGUE, version).log_offset for version in catalogues]
    except (SnapshotError, KeyError) as error:
        log.warning("the live log is not trimmed, since a release cannot be read: %s", error)
        return
    try:
        trimmed = live_log.trim(min(offsets, key=offset_key))
    except StateError as error:
        log.warning("the live log is not trimmed; the next build will do it: %s", error)
        return
    log.info("%d entries of the live log were before the oldest release and are deleted", trimmed)


def used_channels(config: Config) -> list[str]:
    """Return the channels whose snapshots the channels of some scene load, in order of declaration."""
    scenes = config.scenes.values()
    used = {config.snapshot_of(name) for scene in scenes for name in (*scene.quotas, *scene.fallback)}
    return [name for name in config.channels if name in used]


def build_components(
    config: Config,
    source: Source,
    store: SnapshotStore,
    progress: Progress,
    channels: Sequence[str],
    threads: int | None = None,
    anew: Collection[str] = (),
    mode: BuildMode = "full",
) -> dict[str, str]:
    """Build the catalogue, the history and some channels, or find them built.

    Args:
        config, source, store, progress, threads: as in `build_release`.
        channels: which channels; of one that loads another's snapshot, that other.
        anew: those of them that are built even where they were built before.
        mode: how `anew` are built; all others in full.

    Returns:
        component -> snapshot version.
    """
    threads = threads or usable_cores()
    columns, user_columns = source.catalogue.item_columns(), source.catalogue.user_columns()
    versions: dict[str, str] = {}

    def component(name: str, parameters: Mapping[str, Any], write: Callable[[SnapshotWriter], None]) -> None:
        catalogue = versions.get(CATALOGUE, "")
        found = None if name in anew else _built_before(store, name, parameters, source.key, catalogue)
        if found is None:
            with store.begin(
                name,
                parameters=parameters,
                dataset=source.key,
                catalogue=catalogue,
                log_offset=source.log_offset,
            ) as writer:
                write(writer)
            found = writer.version
        versions[name] = found

    component(CATALOGUE, {}, source.catalogue.save)
    interest = interest_parameters(config)
    component(
        HISTORY,
        {**interest, "keep": config.history.keep},
        lambda writer: write_history(writer, source.liked, config.history.keep),
    )
    for name in dict.fromkeys(config.snapshot_of(channel) for channel in channels):
        loaded, options = config.channel(name)
        if not loaded.needs_build:
            continue

        parameters = {**interest, "options": build_parameters(options), "code": code_of(loaded)}
        how: BuildMode = mode if name in anew else "full"
        work = _work_folder(store, name, parameters, source.key, versions[CATALOGUE], how)

        def write(
            writer: SnapshotWriter,
            name: str = name,
            loaded: Any = loaded,
            options: Any = options,
            how: BuildMode = how,
            work: Path = work,
        ) -> None:
            context = build_context(source, columns, writer, progress, threads, user_columns)
            kinds = loaded.event_kinds(options)
            events = None if source.events is None or not kinds else _of_kinds(source.events, kinds)
            previous = None if how == "full" else previous_arrays(store, name)
            learnt = None
            if loaded.learnt and source.folder is not None and name not in anew:
                learnt = learnt_of(source.folder, name, loaded, made_of(config, options, source.key))
            context = replace(context, events=events, mode=how, previous=previous, learnt=learnt, work=work)
            try:
                loaded.build(options, context)
            except ConfigError as error:
                # A channel knows its options, not what it is called.
                text = str(error).removeprefix(f"{error.field}: ")
                raise ConfigError(text, f"channels.{name}.{error.field}".rstrip(".")) from error

        component(name, parameters, write)
    _forget_work(store)
    return versions


def _work_folder(store: SnapshotStore, *what: Any) -> Path:
    """Return where a build of just this may leave what it has done: in no component's folder, so never collected."""
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    return store.root / ".work" / f"{what[0]}-{digest}"


def _forget_work(store: SnapshotStore) -> None:
    """Delete what builds left behind that nobody went on with for a month."""
    folder = store.root / ".work"
    for work in folder.iterdir() if folder.is_dir() else ():
        if time.time() - work.stat().st_mtime > WORK_DAYS * 86_400:
            shutil.rmtree(work, ignore_errors=True)


def previous_arrays(store: SnapshotStore, name: str) -> Mapping[str, AnyArray] | None:
    """Return the arrays of a component's snapshot in service, else of its newest sound one; None where there is none."""
    release = _in_service(store)
    versions = store.versions(name)
    if release is not None and name in release.snapshots:
        versions = [release.snapshots[name], *versions]
    for version in versions:
        try:
            return store.open(name, version, verify=True).arrays
        except SnapshotError as error:
            log.warning("cannot be started from: %s", error)
    return None


def events_read(
    config: Config, names: Sequence[str], events: EventLog, where: BoolArray | None = None
) -> Events | None:
    """Return the events of the kinds that some channels read, those where bool[events] is true; None where none does."""
    kinds: set[str] = set()
    for name in names:
        loaded, options = config.channel(name)
        kinds.update(loaded.event_kinds(options))
    if not kinds:
        return None
    found = Events(events.users, events.items, events.kinds, events.kind_names, events.timestamps)
    if where is not None:
        found = Events(
            events.users[where],
            events.items[where],
            events.kinds[where],
            events.kind_names,
            events.timestamps[where],
        )
    return _of_kinds(found, kinds)


def _of_kinds(events: Events, kinds: Collection[str]) -> Events:
    names = tuple(name for name in events.kind_names if name in kinds)
    if names == events.kind_names:
        return events
    codes = np.full(256, 255, np.uint8)
    for code, name in enumerate(names):
        codes[events.kind_names.index(name)] = code
    coded = codes[events.kinds]
    of_these = coded != 255
    return Events(
        events.users[of_these],
        events.items[of_these],
        coded[of_these],
        names,
        events.timestamps[of_these],
    )


def build_context(
    source: Source,
    columns: Mapping[str, AnyArray],
    sink: SnapshotSink,
    progress: Progress,
    threads: int,
    user_columns: Mapping[str, AnyArray],
) -> BuildContext:
    """Return what a channel is built from; `columns` and `user_columns` are those of the source's catalogue."""
    authors = len(source.catalogue.authors)
    return BuildContext(
        source.liked, columns, source.now, sink, progress, threads, source.follows, authors, user_columns
    )


def interest_parameters(config: Config) -> dict[str, Any]:
    """Return what the interest matrix depends on, as snapshots record it."""
    return {"interest": dict(config.interest), "min_rating": config.min_rating}


def made_of(config: Config, options: Options, key: str) -> dict[str, Any]:
    """Return what a training depends on, but for the code: the data, what counts as interest, the channel's options."""
    return {"dataset": key, **interest_parameters(config), "options": build_parameters(options)}


def learnt_of(
    folder: Path, name: str, channel: type[Channel], wanted: Mapping[str, Any]
) -> Mapping[str, AnyArray] | None:
    """Return the arrays that lie beside the data, where they are of what is `wanted`, as `made_of` says it; else None.

    Options that came after they were learnt count as they are by default.

    Raises:
        DatasetError: the file is damaged.
    """
    found = read_learnt(folder, name)
    if found is None:
        return None
    its, arrays = found
    try:
        options = build_parameters(channel.Config.model_validate(its.get("options")))
    except ValidationError:
        return None
    return arrays if {**its, "options": options} == wanted else None


def code_of(channel: type[Channel]) -> str:
    """Name the code of a channel, so that a changed builder builds anew: its class, and a digest of its module; of one
    that is in a package of its own, a folder below the folder of the plugins, of all modules of the package. Other
    plugins and the packages of `SHARED_CODE` are digested with it where it imports them, itself or through these."""
    file = inspect.getsourcefile(channel)
    digest = hashlib.sha256()
    for path in [] if file is None else _reached(channel.__module__, Path(file)):
        digest.update(path.read_bytes())
    return f"{channel.__module__}:{channel.__qualname__} {digest.hexdigest()[:12] if file else 'unknown'}"


def _reached(name: str, file: Path) -> list[Path]:
    """Return the files of a module's code and of what they import, in a fixed order."""
    plugins = name.partition(".")[0]
    above = file.parents[name.count(".") + (file.name == "__init__.py")]
    found: set[Path] = set()
    left = _modules(name, file)
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for imported in _IMPORTED.findall(path.read_text("utf-8")):
            package = ".".join(imported.split(".")[:2])
            if package in SHARED_CODE:
                left += _package(Path(engine.__file__).parent / package.partition(".")[2])
            elif package.startswith(f"{plugins}."):
                folder = above / plugins / package.partition(".")[2]
                module = folder.with_suffix(".py")
                left += [module] if module.is_file() else _package(folder)
    return sorted(found)


def _modules(name: str, file: Path) -> list[Path]:
    """Return the files that a channel's code is in: its module, or the package of two or more names that it is in."""
    is_package = file.name == "__init__.py"
    package = name if is_package else name.rpartition(".")[0]
    return _package(file.parent) if "." in package else [file]


def _package(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _in_service(store: SnapshotStore) -> Release | None:
    """Return the release in service; None where there is none, or what says so is damaged: publishing heals that."""
    try:
        return store.current()
    except SnapshotError as error:
        log.warning("no release is in service: %s", error)
        return None


def _built_before(
    store: SnapshotStore, name: str, parameters: Mapping[str, Any], key: str, catalogue: str
) -> str | None:
    """Return the newest sound version made of the same inputs by the same code, if there is one."""
    for version in store.versions(name):
        try:
            manifest = store.manifest(name, version)
            same = (manifest.parameters, manifest.dataset, manifest.catalogue, manifest.code)
            if same == (dict(parameters), key, catalogue, __version__):
                store.open(name, version, verify=True)
                return version
        except SnapshotError as error:
            log.warning("built anew: %s", error)
    return None
